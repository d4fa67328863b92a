"""The benchmark suite: what it writes, how it counts, and that its references are right."""

import dataclasses
import itertools
import json
import types

import jax
import numpy as np
import pytest

from meanformer import bench
from meanformer.__main__ import main
from meanformer.bench import cases, contenders, measure, picture, reference, report, suite
from meanformer.measures import Uniform

TINY = cases.Case(
    "tiny/sphere",
    "a few tokens on S²",
    "made up",
    (60,),
    lambda: Uniform(3),
    5.0,
    np.eye(3),
    cases.oblique(),
    np.diag([1.0, -1.0, 0.5]),
    dtypes=("float64",),
    contenders=("torch", "NumPy", "Dense"),
    targets=(cases.Target("seconds", 1e3, 1e-9, ("Dense",)),),
)
RING = dataclasses.replace(
    TINY, name="tiny/usa", model="USA", contenders=("NumPy", "Blockwise")
)


@pytest.fixture
def tiny(monkeypatch):
    """Two small cases instead of those of the suite, and no torch."""
    found = {case.name: case for case in (TINY, RING)}
    for module in (cases, report):
        monkeypatch.setattr(module, "CASES", found)
    torch = dataclasses.replace(contenders.CONTENDERS["torch"], package="no_such_package")
    monkeypatch.setitem(contenders.CONTENDERS, "torch", torch)
    return found


def lines_of(folder):
    text = (folder / "bench.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


# ------------------------------------------------------------------- the command


def test_a_run_leaves_records_a_table_and_a_plot(tiny, tmp_path, capsys):
    """Each contender that is there has a line with times and a small error; the missing peer
    is said; the table has the target; a second run adds to the first."""
    out = tmp_path / "bench"
    command = ["bench", "--cases", "tiny/sphere", "--repeats", "2", "--out", str(out)]
    assert main(command) == 0
    told = capsys.readouterr().out
    assert "torch is not installed and left out" in told
    assert "device: cpu" in told
    lines = lines_of(out)
    assert [line["name"] for line in lines] == ["NumPy", "Dense"]
    for line in lines:
        assert line["parameters"]["n"] == 60
        assert len(line["run_seconds"]) == 2
        assert line["median_seconds"] > 0
        assert 0 <= line["max_abs_error"] < 1e-13
        assert {"versions", "device", "cores", "commit", "command"} <= line.keys()
    assert lines[1]["compile_seconds"] > 0
    assert lines[1]["temporary_bytes"] >= 60 * 60 * 8  # all pairs
    table = (out / "bench.md").read_text(encoding="utf-8")
    assert "| tiny/sphere | Dense | forward | 60 | 3 | 5 | float64 |" in table
    assert "| ≤ 1e+03 s | ≤ 1e-09 s | yes |" in table
    for name in ("bench.png", "bench.pdf"):
        assert (out / name).stat().st_size > 5_000
    assert main([*command, "--quick"]) == 0
    assert len(lines_of(out)) == 4


def test_what_was_measured_survives_an_interruption(tiny, tmp_path, monkeypatch, capsys):
    """Ctrl-C in the second case: status 130, the first one's records, and a table of them."""
    real = suite.problem

    def interrupted(case, *rest):
        if case.name == "tiny/usa":
            raise KeyboardInterrupt
        return real(case, *rest)

    monkeypatch.setattr(suite, "problem", interrupted)
    assert main(["bench", "--repeats", "1", "--out", str(tmp_path)]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert {line["case"] for line in lines_of(tmp_path)} == {"tiny/sphere"}
    assert "tiny/sphere" in (tmp_path / "bench.md").read_text(encoding="utf-8")


def broken(kind):
    """`Dense` that fails, or that is wrong."""
    dense = contenders.CONTENDERS["Dense"]

    def failing(p, what):
        raise RuntimeError("no such device")

    def wrong(p, what):
        prepared = dense.prepare(p, what)
        return dataclasses.replace(prepared, read=lambda out: np.asarray(out) + 1e-3)

    prepare = failing if kind == "failing" else wrong
    return dataclasses.replace(dense, prepare=prepare)


@pytest.mark.parametrize(
    ("kind", "said"), [("failing", "no such device"), ("wrong", "error 1.0e-03")]
)
def test_a_sum_of_ours_that_fails_or_is_wrong_fails_the_command(
    tiny, tmp_path, monkeypatch, capsys, kind, said
):
    """The peers are measured all the same; what fails is a record without time."""
    monkeypatch.setitem(contenders.CONTENDERS, "Dense", broken(kind))
    arguments = ["--cases", "tiny/sphere", "--repeats", "1", "--out", str(tmp_path)]
    assert main(["bench", *arguments]) == 1
    assert said in capsys.readouterr().err
    timed = {line["name"]: line["median_seconds"] for line in lines_of(tmp_path)}
    assert timed["NumPy"] > 0
    assert (timed["Dense"] is None) == (kind == "failing")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cases", "denze"], "Did you mean `dense`?"),
        (["--cases", "growth/d2", "growth/d33"], "Did you mean `growth/d3`?"),
        (["--repeats", "0"], "`--repeats` must be an integer ≥ 1, but is 0"),
        (["--seed", "-1"], "`--seed` must be an integer ≥ 0, but is -1"),
    ],
)
def test_bad_arguments_are_named_and_nothing_is_written(
    tmp_path, capsys, arguments, said
):
    out = tmp_path / "out"
    assert main(["bench", *arguments, "--out", str(out)]) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()


def test_records_that_are_broken_are_refused_before_anything_runs(tmp_path, capsys):
    (tmp_path / "bench.jsonl").write_text('{"case": "dense/d3"}\n{"case": \n')
    assert main(["bench", "--cases", "dense", "--out", str(tmp_path)]) == 2
    assert "line 2" in capsys.readouterr().err


def test_the_list_names_every_case(capsys):
    assert main(["bench", "--list"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in told] == list(cases.CASES)


def test_float64_is_left_out_where_there_is_none(tiny, tmp_path, monkeypatch, capsys):
    """On a TPU: said, and nothing else of that case is measured."""
    monkeypatch.setattr(suite.jax, "default_backend", lambda: "tpu")
    lines = list(bench.run_suite([TINY], bench.Options(tmp_path / "bench.jsonl", 1)))
    assert lines == []
    assert "float64 left out: a TPU has none" in capsys.readouterr().out


# ------------------------------------------------------------------- the cases


def test_cases_are_whole():
    """Each has a law on its own sphere, targets about contenders that it has, quick sizes that
    are small; 12 of them ask what `Auto` picks."""
    for case in cases.CASES.values():
        assert case.law().d == case.d
        assert set(case.contenders) <= contenders.CONTENDERS.keys()
        assert max(case.quick().ns) <= 1024
        assert list(case.ns) == sorted(set(case.ns))
        for target in case.targets:
            assert set(target.contenders) <= set(case.contenders)
            assert set(target.dtypes) <= set(case.dtypes)
            assert target.dream is None or target.dream <= target.must
    assert len(bench.chosen(["auto"])) == 12
    assert bench.chosen([]) == list(cases.CASES.values())
    assert [c.name for c in bench.chosen(["growth/d3", "dense"])] == [
        "dense/d3",
        "dense/d64",
        "growth/d3",
    ]


def test_the_oblique_matrix_has_its_singular_values():
    B = cases.oblique()
    np.testing.assert_allclose(np.linalg.svd(B)[1], [1, 0.6, 0.3], rtol=1e-12)
    assert np.abs(B - B.T).max() > 0.1


def test_tokens_are_the_same_in_both_dtypes():
    single, double = (reference.problem(TINY, 40, t, 3) for t in ("float32", "float64"))
    np.testing.assert_array_equal(single.x, double.x.astype(np.float32))
    np.testing.assert_allclose(np.linalg.norm(double.x, axis=1), 1, rtol=1e-14)


# ------------------------------------------------------------------- the reference


def scalar(p, x):
    """Σ ⟨G_i, V m_i⟩ over the rows of the reference, token by token."""
    total = 0.0
    for i in p.rows:
        w = [np.exp(p.case.beta * (p.Q @ x[i]) @ (p.K @ y)) for y in x]
        m = sum(a * y for a, y in zip(w, x)) / sum(w)
        total += p.G[i] @ p.V @ m
    return total


def test_the_exact_gradient_is_the_slope_of_the_scalar(monkeypatch):
    """Against central differences along three random tangents; error h² ≈ 1e-10."""
    monkeypatch.setattr(reference, "ROWS", 5)
    p = reference.problem(TINY, 12, "float64", 0)
    assert len(p.rows) == 5
    slope = reference.exact_gradient(p)
    np.testing.assert_allclose(np.sum(slope * p.x, axis=1), 0, atol=1e-14)
    rng, h = np.random.default_rng(1), 1e-5
    for _ in range(3):
        v = reference.tangential(p.x, rng.normal(size=p.x.shape))
        found = (scalar(p, p.x + h * v) - scalar(p, p.x - h * v)) / (2 * h)
        np.testing.assert_allclose(np.sum(slope * v), found, rtol=1e-7)


def test_the_exact_field_is_the_sum_over_tokens():
    """Also the unnormalised one, in units of e^{−β‖B‖}."""
    p = reference.problem(RING, 30, "float64", 0)
    B, beta = p.Q.T @ p.K, RING.beta
    exponents = beta * p.x @ B @ p.x.T - beta * np.linalg.norm(B, 2)
    expected = np.mean(np.exp(exponents)[:, :, None] * (p.x @ p.V.T), axis=1)
    np.testing.assert_allclose(reference.exact_field(p), expected, rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", [TINY, RING], ids=["SA", "USA"])
@pytest.mark.parametrize("name", ["torch", "CBXpy", "NumPy"])
def test_peers_compute_the_same_field(name, case, dtype):
    """And torch its gradient, up to 200 roundings of the exponents."""
    contender = contenders.CONTENDERS[name]
    if contender.package:
        pytest.importorskip(contender.package)
    p = reference.problem(case, 300, dtype, 0)
    error = 200 * float(np.finfo(dtype).eps)
    for what, exact in (
        ("forward", reference.exact_field),
        ("gradient", reference.exact_gradient),
    ):
        if contender.unfit(p, what) or (what == "gradient" and case is RING):
            continue
        found = contender.prepare(p, what).value(p.some()).astype(float)
        if what == "forward":
            found = found[p.rows]
        else:
            found = reference.tangential(p.x.astype(float), found)
        np.testing.assert_allclose(found, exact(p), atol=error)


def test_what_cannot_be_computed_is_not_asked_for():
    """CBXpy normalises and has no derivatives, harmonics are for d = 2, 3, `Dense` for few."""
    p = reference.problem(RING, 10, "float64", 0)
    assert contenders.CONTENDERS["CBXpy"].unfit(p, "forward")
    assert contenders.CONTENDERS["NumPy"].unfit(p, "gradient")
    wide = reference.problem(cases.CASES["dense/d64"], 10, "float64", 0)
    assert contenders.CONTENDERS["Harmonic"].unfit(wide, "forward")
    assert contenders.CONTENDERS["Auto"].quadratic(wide)
    many = dataclasses.replace(p, x=np.zeros((20_001, 3)))
    assert contenders.CONTENDERS["Dense"].unfit(many, "forward")


# ------------------------------------------------------------------- the harness


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a contender moves it, and the order of the calls."""
    now, order = [0.0], []

    def takes(name, seconds):
        durations = itertools.cycle(seconds)

        def call():
            order.append(name)
            now[0] += next(durations)

        return call

    clock = types.SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(measure, "time", clock)
    return takes, order


def test_contenders_run_in_turn_and_the_first_run_is_not_kept(clock):
    takes, order = clock
    a, b = takes("a", [9.0, 1.0, 2.0, 3.0]), takes("b", [5.0])
    seconds = measure.in_turn({"a": a, "b": b}, 3)
    assert order == ["a", "b"] * 4
    assert seconds == {"a": [1.0, 2.0, 3.0], "b": [5.0, 5.0, 5.0]}


def test_slow_contenders_run_less_often_and_very_slow_ones_once(clock):
    """Of 20 s: 7 s fit twice, 11 s run alone, 0.5 s as often as asked."""
    takes, order = clock
    runs = {n: takes(n, [s]) for n, s in (("a", 7.0), ("b", 11.0), ("c", 0.5))}
    seconds = measure.in_turn(runs, 5, budget=20.0)
    assert seconds == {"a": [7.0] * 2, "b": [11.0], "c": [0.5] * 5}
    assert order.count("b") == 1


def test_fast_contenders_are_run_several_times_for_one_time(clock):
    """1 ms for a span of 20 ms: means over 20 runs, after one not kept."""
    takes, order = clock
    fast = takes("a", [0.001])
    seconds = measure.in_turn({"a": fast}, 2, least=0.02, first={"a": 0.001})
    np.testing.assert_allclose(seconds["a"], [0.001, 0.001], rtol=1e-9)
    assert len(order) == 2 * (1 + 20)


def test_compiled_reports_the_memory_between(capsys):
    """Sorted pairs n × n cannot be formed without n² numbers."""
    x = jax.numpy.linspace(0.0, 1.0, 200)
    call, seconds, temporary = bench.compiled(
        lambda x: jax.numpy.sort(x[:, None] * x, axis=1)[:, 3].sum(), x
    )
    assert float(call()) == pytest.approx(float(np.sum(x * x[3])))
    assert float(call(2 * x)) == pytest.approx(4 * float(np.sum(x * x[3])))
    assert seconds > 0
    assert temporary >= 200 * 200 * 8


# ------------------------------------------------------------------- arithmetic


def line(name, n=1000, seconds=1.0, dtype="float64", run="now", **more):
    """A record as the suite writes it."""
    return {
        "case": "growth/d2",
        "name": name,
        "pass": "forward",
        "run": run,
        "parameters": {"n": n, "d": 2, "dtype": dtype, "beta": 50.0, "model": "SA"},
        "median_seconds": seconds,
        "max_abs_error": 1e-9,
        "temporary_bytes": None,
        "device": "cpu",
        "processor": "abacus",
        "cores": 2,
        "versions": {"jax": "0"},
        "commit": "none",
        "command": "meanformer bench",
        "when": "now",
    } | more


def test_how_much_faster_is_the_ratio_to_torch_of_the_same_round():
    """2 s of torch in float32 over 4 ms: 500; other sizes, runs, passes do not count."""
    others = [
        line("torch", seconds=2.0, dtype="float32"),
        line("torch", seconds=3.0),
        line("torch", seconds=7.0, n=10),
        line("torch", seconds=7.0, run="before"),
        line("torch", seconds=7.0, **{"pass": "gradient"}),
        line("torch", seconds=7.0, case="growth/d3"),
        line("NumPy", seconds=7.0),
    ]
    found = report.faster(line("Harmonic", seconds=0.004), others)
    assert found == {"torch float32": 500.0, "torch float64": 750.0}
    assert report.faster(line("Harmonic", seconds=None), others) == {}


def test_the_exponent_is_that_of_a_power_law():
    """t = 3 n^1.3 exactly; what was extrapolated (as n²) has no say."""
    ns = (1e4, 1e5, 1e6)
    lines = [line("Auto", int(n), 3 * n**1.3) for n in ns]
    assert report.exponent(lines) == pytest.approx(1.3, abs=1e-12)
    assert report.exponent(lines[:2]) is None
    base = {"n": 100, "seconds": 1.0}
    guess = line("Auto", 10**7, 1e30, extrapolated_from=base)
    assert report.exponent([guess, *lines]) == pytest.approx(1.3, abs=1e-12)
    assert report.exponent([*lines, guess]) is None
    mixed = [line("Harmonic", int(n), n) for n in ns] + lines
    assert report.exponent(mixed) == pytest.approx(1.3, abs=1e-12)


def judged(quantity, lines, **more):
    both = ("forward", "gradient")
    case = dataclasses.replace(cases.CASES["growth/d2"], ns=(10, 1000), passes=both)
    target = cases.Target(quantity, 1.0, None, ("Harmonic", "Auto"), **more)
    return report.judged(target, case, lines)


def test_a_target_takes_the_best_contender_that_is_right_at_full_size():
    """The fastest is wrong by 1e-3, the next has too few tokens, then one of unknown error; one
    was not run."""
    lines = [
        line("Harmonic", seconds=0.1, max_abs_error=1e-3),
        line("Harmonic", n=10, seconds=0.2),
        line("Harmonic", seconds=0.2, max_abs_error=None),
        line("Auto", seconds=0.5),
        line("Auto", seconds=0.3, dtype="float32", extrapolated_from={"n": 1}),
        line("Blockwise", seconds=0.01),
    ]
    assert judged("seconds", lines, error=1e-6) == [("float64", 0.5)]
    assert judged("seconds", lines) == [("float64", 0.1)]


def test_targets_about_ratios_compare_within_one_round():
    """Times over torch float32, over the best dense sum, over the evaluation, over the best
    partition; memory in numbers per token."""
    lines = [
        line(
            "Harmonic", seconds=0.1, faster={"torch float32": 50.0}, temporary_bytes=800
        ),
        line("Blockwise", seconds=2.0),
        line("Dense", seconds=4.0),
        line("Dense", seconds=0.001, run="before"),
        line("Harmonic", seconds=0.3, temporary_bytes=32_000, **{"pass": "gradient"}),
        line("Auto", seconds=0.15),
    ]
    for quantity, value in (
        ("torch", 0.02),
        ("dense", 0.05),
        ("gradient", 3.0),
        ("memory", 4.0),
    ):
        [(dtype, found)] = judged(quantity, lines)
        assert (dtype, found) == ("float64", pytest.approx(value))
    [(_, found)] = judged("best", lines[1:4] + lines[5:])
    assert found == pytest.approx(0.075)


def test_the_newest_record_of_a_measurement_counts_on_each_device():
    lines = [
        line("Auto", seconds=1.0),
        line("Auto", seconds=2.0, run="later"),
        line("Auto", seconds=3.0, device="NVIDIA"),
        {"name": "a record of another program"},
    ]
    found = report.newest(lines)
    assert sorted(x["median_seconds"] for x in found) == [2.0, 3.0]
    text = report.page(lines)
    assert "## abacus, 2 cores" in text
    assert "## NVIDIA (host: abacus), 2 cores" in text


def test_the_page_says_what_was_missed_and_what_was_not_run():
    """A target above its bound, a torch time from n², the choice of `Auto`."""
    case = cases.CASES["auto/n2000-d2-beta50"]
    of = {"case": case.name, "n": 2000}
    lines = [
        line("Dense", seconds=2.0, **of),
        line("Auto", seconds=3.0, **of),
        line(
            "torch", n=10**6, seconds=400.0, extrapolated_from={"n": 1, "seconds": 4e-10}
        ),
        line(
            "Auto", n=10**6, seconds=0.5, exponent=1.25, faster={"torch float64": 800.0}
        ),
        line("Harmonic", n=10**6, seconds=None, skipped="ValueError: no | room"),
    ]
    text = report.page(lines)
    assert f"| {case.name} | float64 | 1.50× the time of the fastest partition |" in text
    assert "| growth/d2 | float64 | 1.25 | ≤ 1.1 | ≤ 1 | **no** |" in text
    assert f"| {case.name} | float64 | 2 s |  |  | 3 s | 1.50 |" in text
    assert "400 s*" in text
    assert "~800×" in text
    assert "ValueError: no ¦ room" in text


def test_the_plot_has_each_contender_in_its_colour_and_the_guess_apart():
    """Solid, dashed, dotted: float64, float32, not run."""
    lines = [
        line("torch", n, n**2 * 1e-6, dtype, extrapolated_from=base)
        for dtype in ("float32", "float64")
        for n, base in ((10, None), (100, None), (1000, {"n": 100, "seconds": 1.0}))
    ]
    lines += [line("Auto", n, n * 1e-6) for n in (10, 100)]
    figure = picture.plot(lines)
    (ax,) = figure.axes
    drawn = {(ln.get_color(), ln.get_linestyle(), len(ln.get_xdata())) for ln in ax.lines}
    assert {("#D55E00", "-", 2), ("#D55E00", "--", 2), ("#000000", "-", 2)} <= drawn
    assert ax.get_xscale() == ax.get_yscale() == "log"
    assert ax.get_xlabel() == "tokens n"
    assert ax.get_ylabel() == "time of one evaluation (s)"
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["Auto", "torch", "float64", "float32", "as n², not run"]
    assert picture.plot([]) is None
    colours = [style["color"] for style in picture.STYLES.values()]
    assert len(set(colours)) == len(contenders.CONTENDERS)


def test_what_would_take_too_long_is_extrapolated_and_not_run(tiny, tmp_path):
    """A case that allows a nanosecond: 4000 tokens from 1000, as n²."""
    case = dataclasses.replace(TINY, ns=(4000,), contenders=("NumPy",), longest=1e-9)
    [found] = bench.run_suite([case], bench.Options(tmp_path / "bench.jsonl", 1))
    base = found["extrapolated_from"]
    assert base["n"] in (1000, 4000 // 4)
    assert found["median_seconds"] == pytest.approx(16 * base["seconds"])
    assert "max_abs_error" not in found
