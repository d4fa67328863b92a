"""Output files: each is written whole or not at all."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path beside `path` (same suffix) that replaces it when the block ends
    well, and vanishes when it does not (an error, Ctrl-C)."""
    path = Path(path)
    handle, name = tempfile.mkstemp(
        prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent
    )
    os.close(handle)
    draft = Path(name)
    try:
        yield draft
        mode = 0o666 & ~_umask()
        os.chmod(draft, mode)  # mkstemp makes it private
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_folder(path: str | os.PathLike, name: str) -> Path:
    """`path` as a folder in which files can be written; it is not left behind if this
    call had to create it.

    **Raises:** `ValueError` that names the argument and the reason."""
    path = Path(path)
    created = [p for p in (path, *path.parents) if not p.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(
            f"Argument `{name}` must be a folder that can be written, but {path} is not: "
            f"{error.strerror or error}. Choose another folder."
        ) from error
    finally:
        for folder in created:  # innermost first
            with contextlib.suppress(OSError):
                folder.rmdir()
    return path
