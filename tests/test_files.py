"""Output files are whole or absent, and a folder is tried without a trace."""

import os
import stat

import pytest

from meanformer import files


def test_a_file_appears_when_the_block_ends_well(tmp_path):
    """Inside the block the target is untouched; the draft lies beside it, same suffix."""
    target = tmp_path / "run.npz"
    target.write_text("old")
    with files.atomic(target) as draft:
        assert draft.parent == tmp_path
        assert draft.suffix == ".npz"
        draft.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert os.listdir(tmp_path) == ["run.npz"]


@pytest.mark.parametrize("reason", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("before", ["old", None])
def test_an_interrupted_write_changes_nothing(tmp_path, reason, before):
    """An error, Ctrl-C or exit inside the block: the old file (or none), no draft."""
    target = tmp_path / "run.npz"
    if before is not None:
        target.write_text(before)

    def interrupted():
        with files.atomic(target) as draft:
            draft.write_text("half a fi")
            raise reason

    with pytest.raises(reason):
        interrupted()
    assert os.listdir(tmp_path) == ([] if before is None else ["run.npz"])
    assert before is None or target.read_text() == before


def test_a_draft_that_was_removed_leaves_the_old_file(tmp_path):
    """If the writer took the draft away there is nothing to put in place: an error."""
    target = tmp_path / "run.npz"
    target.write_text("old")

    def removed():
        with files.atomic(target) as draft:
            draft.unlink()

    with pytest.raises(FileNotFoundError):
        removed()
    assert target.read_text() == "old"


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_follow_the_umask(tmp_path, mask):
    """0666 & ~umask, as for any file that a program opens; the umask is left as it was."""
    before = os.umask(mask)
    try:
        with files.atomic(tmp_path / "run.json") as draft:
            draft.write_text("{}")
        mode = stat.S_IMODE((tmp_path / "run.json").stat().st_mode)
    finally:
        after = os.umask(before)
    assert mode == 0o666 & ~mask
    assert after == mask


def test_a_path_may_be_text(tmp_path):
    """A string does as well as a Path."""
    with files.atomic(f"{tmp_path}/run.txt") as draft:
        draft.write_text("text")
    assert (tmp_path / "run.txt").read_text() == "text"


def test_a_folder_that_can_be_written_is_not_left_behind(tmp_path):
    """A new folder, several levels deep, is tried and removed; an old one stays."""
    deep = tmp_path / "a" / "b" / "c"
    assert files.check_folder(deep, "out") == deep
    assert os.listdir(tmp_path) == []
    (tmp_path / "old").mkdir()
    files.check_folder(str(tmp_path / "old"), "out")
    assert os.listdir(tmp_path) == ["old"]
    assert os.listdir(tmp_path / "old") == []


@pytest.mark.parametrize("below", [".", "x", "x/y"])
def test_a_folder_that_cannot_be_written_is_refused_by_name(tmp_path, below):
    """A regular file is no folder and holds none; nothing is left and nothing is lost."""
    obstacle = tmp_path / "notes.txt"
    obstacle.write_text("keep")
    message = (
        r"Argument `out` must be a folder that can be written, but .*notes\.txt.* is "
    )
    with pytest.raises(ValueError, match=f"{message}not: .* Choose another folder"):
        files.check_folder(obstacle / below, "out")
    assert os.listdir(tmp_path) == ["notes.txt"]
    assert obstacle.read_text() == "keep"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(tmp_path):
    """A read-only folder is refused, and so is a new one inside it."""
    tmp_path.chmod(0o500)
    try:
        for folder in (tmp_path, tmp_path / "new"):
            with pytest.raises(ValueError, match="`out` must be a folder"):
                files.check_folder(folder, "out")
    finally:
        tmp_path.chmod(0o700)
    assert os.listdir(tmp_path) == []
