"""The experiments: their checks are honest, they hold in the quick version, and (slow) at
the papers' sizes."""

import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest

from helpers import run_quick_version
from meanformer import experiments
from meanformer.__main__ import main
from meanformer.experiments import (
    Check,
    independent,
    multiscale_alignment,
    multiscale_heat,
)
from meanformer.experiments.report import Report, table, write

NAMES = list(experiments.REGISTRY)


def check(**changes):
    base = {
        "claim": "a number is one",
        "item": "A0",
        "measured": 1.0,
        "expected": 1.0,
        "tolerance": 0.1,
        "source": "arithmetic",
        "effect": 1.0,
        "rival": "a number that is zero",
    }
    return Check(**(base | changes))


# ------------------------------------------------------------------ checks


def test_a_check_holds_within_its_tolerance_only():
    assert check(measured=1.1 - 1e-9).holds
    assert not check(measured=1.11).holds
    assert check(measured=0.2, relation="<").holds
    assert not check(measured=1.2, relation="<").holds
    assert check(measured=7.0, relation=">").holds
    assert not check(measured=0.8, relation=">").holds


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_undefined_measurement_does_not_hold(value):
    """NaN fails, and is null in JSON."""
    row = check(measured=value)
    assert not row.holds
    assert row.as_dict()["measured"] is None
    json.dumps(row.as_dict(), allow_nan=False)


def test_a_check_that_could_not_fail_is_refused():
    """The tolerance may be at most half of the effect that the check is to show."""
    check(tolerance=0.5, effect=1.0)
    for tolerance in (0.51, -0.1, math.nan):
        with pytest.raises(ValueError, match="at most half of the effect"):
            check(tolerance=tolerance, effect=1.0)
    with pytest.raises(ValueError, match="`source` and `rival` must say"):
        check(source="")


def test_the_table_shows_what_failed():
    text = table([check(), check(claim="another", measured=3.0)])
    assert text.splitlines()[2].endswith("yes")
    assert text.splitlines()[3].endswith("NO")


# ------------------------------------------------------------------ the runs


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("multiscale/")])
def test_quick_version_holds_and_writes_what_the_command_promises(name, tmp_path):
    """Other papers' experiments: `test_experiments_concentration`."""
    run_quick_version(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_paper_size_holds(name, tmp_path):
    """The claims at the paper's own sizes."""
    assert main(["run", name, "--out", str(tmp_path)]) == 0


def test_same_seed_gives_the_same_numbers():
    """Twice the same bits; another seed, other tokens."""
    settings = experiments.Settings(seed=3, tokens=300, quick=True)
    a, b = multiscale_alignment.fig1a(settings), multiscale_alignment.fig1a(settings)
    np.testing.assert_array_equal(a.arrays["snapshots"], b.arrays["snapshots"])
    assert [c.measured for c in a.checks] == [c.measured for c in b.checks]
    other = multiscale_alignment.fig1a(dataclasses.replace(settings, seed=4))
    assert np.abs(other.arrays["snapshots"][0] - a.arrays["snapshots"][0]).max() > 0.1


def test_independent_masses_do_not_depend_on_their_step():
    """The plain NumPy mean field has converged in time, and its masses sum to 1."""
    args = (multiscale_heat.CENTRES, multiscale_heat.SHARES, multiscale_heat.SIGMA, 10.0)
    coarse = independent.three_cluster_masses(*args, step=0.1)
    fine = independent.three_cluster_masses(*args, step=0.05)
    np.testing.assert_allclose(coarse, fine, atol=2e-3)
    np.testing.assert_allclose(fine.sum(), 1, rtol=1e-12)


def test_a_failing_check_is_reported_by_the_exit_status(monkeypatch, tmp_path, capsys):
    failing = Report({}, [check(measured=5.0)], {}, {"x": np.zeros(2)})
    known = experiments.REGISTRY["multiscale/fig1a"]
    broken = dataclasses.replace(known, run=lambda settings: failing)
    monkeypatch.setitem(experiments.REGISTRY, known.name, broken)
    assert main(["run", known.name, "--out", str(tmp_path)]) == 1
    assert "0 of 1 checks hold" in capsys.readouterr().out
    assert json.loads((tmp_path / "summary.json").read_text())["holds"] is False


# ------------------------------------------------------------------ the command


def test_list_names_every_experiment_with_its_source(capsys):
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == NAMES
    assert all("arXiv" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["multiscale/fig1"], "Did you mean `multiscale/fig1"),
        (
            ["multiscale/fig1a", "--tokens", "0"],
            "`--tokens` must be an integer ≥ 1, but is 0",
        ),
        (["multiscale/fig1a", "--tokens", "5"], "`--tokens` must be at least 200"),
        (
            ["multiscale/fig1a", "--seed", "-1"],
            "`--seed` must be an integer ≥ 0, but is -1",
        ),
    ],
)
def test_bad_arguments_are_explained_and_nothing_is_written(
    arguments, message, tmp_path, capsys
):
    """Exit status 2, the message names the argument, the rule and the value."""
    out = tmp_path / "out"
    assert main(["run", *arguments, "--out", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_an_unwritable_folder_is_refused(tmp_path, capsys):
    """A folder below a file cannot be made."""
    (tmp_path / "file").write_text("")
    bad = tmp_path / "file" / "out"
    assert main(["run", "multiscale/fig1a", "--out", str(bad)]) == 2
    error = capsys.readouterr().err
    assert "`--out` must be a folder that can be written" in error
    assert "Choose another" in error


def test_the_parser_refuses_with_status_2(tmp_path):
    """Words that are no numbers, a precision that does not exist, no such option."""
    for arguments in (["--tokens", "many"], ["--precision", "16"], ["--speed", "1"]):
        with pytest.raises(SystemExit) as stopped:
            main(["run", "multiscale/fig1a", *arguments, "--out", str(tmp_path / "x")])
        assert stopped.value.code == 2
    assert not (tmp_path / "x").exists()


def test_ctrl_c_leaves_nothing(monkeypatch, tmp_path, capsys):
    def interrupted(settings):
        raise KeyboardInterrupt

    known = experiments.REGISTRY["multiscale/fig1a"]
    broken = dataclasses.replace(known, run=interrupted)
    monkeypatch.setitem(experiments.REGISTRY, known.name, broken)
    out = tmp_path / "out"
    assert main(["run", known.name, "--out", str(out)]) == 130
    assert "nothing was written" in capsys.readouterr().err
    assert not out.exists()


def test_ctrl_c_while_writing_leaves_whole_files_and_no_summary(monkeypatch, tmp_path):
    """The summary comes last: without it, the folder is unfinished."""

    class Stubborn(dict):
        def items(self):
            raise KeyboardInterrupt

    report = Report({}, [check()], {}, Stubborn(x=np.zeros(1)))
    options = {
        "name": "n",
        "source": "s",
        "seed": 0,
        "seconds": 1.0,
        "compile_seconds": 0.0,
    }
    with pytest.raises(KeyboardInterrupt):
        write(report, tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_the_installed_command_runs():
    """`python -m meanformer list` in a process of its own; help exits with 0."""
    for arguments in (["list"], ["--help"], ["run", "--help"]):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-m", "meanformer", *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr


def test_float32_runs_hold_too(tmp_path):
    """`--precision 32` in a process of its own, for the alignment experiment."""
    command = ["-m", "meanformer", "run", "multiscale/fig1a", "--quick"]
    done = subprocess.run(
        [sys.executable, *command, "--precision", "32", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        json.loads((tmp_path / "summary.json").read_text())["parameters"]["precision"]
        == 32
    )
