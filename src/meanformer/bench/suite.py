"""The suite: every contender of a case in turn, each measurement a line of JSON."""

import dataclasses
import datetime
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .cases import OURS, Case
from .contenders import CONTENDERS, Contender, Prepared
from .measure import cores, in_turn, load, processor, record, runs_per_time, watched
from .reference import Problem, exact_field, exact_gradient, problem, tangential
from .report import exponent, faster, key

LEAST = 0.02  # seconds that one time spans: faster runs are repeated within it


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command sets: where records go, how many times are kept, seed of the tokens,
    and whether the cases are small."""

    path: Path
    repeats: int = 7
    seed: int = 0
    quick: bool = False


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One contender of one pass in one dtype."""

    contender: Contender
    problem: Problem
    what: str
    prepared: Prepared

    @property
    def name(self) -> str:
        return f"{self.contender.name} {self.problem.dtype} {self.what}"


def run_suite(cases: Sequence[Case], options: Options) -> Iterator[dict[str, Any]]:
    """Measure the cases one by one; yields each record once it is in the file."""
    print(
        f"device: {jax.default_backend()}, {jax.devices()[0].device_kind}; {cores()} cores, "
        f"{processor()}",
        flush=True,
    )
    busy = load()
    if busy is not None and busy > 0.5 * cores():
        print(
            f"the machine is busy (load {busy:g}): times are not to be trusted, least those "
            "of torch and NumPy, whose threads wait for each other",
            flush=True,
        )
    for contender in CONTENDERS.values():
        if contender.missing and any(contender.name in c.contenders for c in cases):
            print(
                f"{contender.name} is not installed and left out: "
                "pip install 'meanformer[bench]' brings it",
                flush=True,
            )
    run = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    for case in cases:
        print(f"\n{case.name}: {case.title}", flush=True)
        if options.quick:
            case = case.quick()
        case = dataclasses.replace(case, dtypes=_dtypes(case))
        series = _Series(case, options, run)
        for n in case.ns:
            yield from _round(series, n)


def _dtypes(case: Case) -> tuple[str, ...]:
    if jax.default_backend() != "tpu":
        return case.dtypes
    if "float64" in case.dtypes:
        print("float64 left out: a TPU has none", flush=True)
    return tuple(t for t in case.dtypes if t != "float64")


@dataclasses.dataclass
class _Series:
    """The records of one case in this run."""

    case: Case
    options: Options
    run: str
    lines: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def write(
        self, p: Problem, what: str, name: str, seconds: list[float], **more: Any
    ) -> dict[str, Any]:
        """A record with what follows from those before it: how much faster than torch, and
        the exponent of n."""
        about = {"case": self.case.name, "run": self.run, "pass": what, **more}
        line = {
            **about,
            "name": name,
            "parameters": _parameters(p),
            "median_seconds": float(np.median(seconds)) if seconds else None,
        }
        fit = exponent([*self.lines, line])
        line = record(
            self.options.path,
            name,
            self.case.title,
            line["parameters"],
            seconds,
            **about,
            faster=faster(line, self.lines),
            **({} if fit is None else {"exponent": fit}),
            kappa=self.case.kappa,
            source=self.case.source,
            seed=self.options.seed,
            quick=self.options.quick,
        )
        self.lines.append(line)
        return line


def _round(series: _Series, n: int) -> Iterator[dict[str, Any]]:
    """All contenders of one case with n tokens: prepared, run once, then in turn. What fails
    leaves a record that says why, and the others go on."""
    case, entries = series.case, []
    for dtype in case.dtypes:
        p = problem(case, n, dtype, series.options.seed)
        for what, name in itertools.product(case.passes, case.contenders):
            contender = CONTENDERS[name]
            if contender.missing or contender.unfit(p, what):
                continue
            try:
                expected = _expected(contender, p, what, series.lines)
                if expected is None:
                    prepared = contender.prepare(p, what)
                    entries.append(_Entry(contender, p, what, prepared))
            except Exception as error:
                yield series.write(p, what, name, [], skipped=_why(error))
            else:
                if expected is not None:
                    seconds, base = expected
                    yield series.write(p, what, name, [seconds], extrapolated_from=base)
    results: dict[str, Any] = {}
    first: dict[str, float] = {}
    growth: dict[str, float | None] = {}
    for e in list(entries):
        try:
            results[e.name], first[e.name], growth[e.name] = watched(e.prepared.call)
        except Exception as error:
            entries.remove(e)
            yield series.write(
                e.problem, e.what, e.contender.name, [], skipped=_why(error)
            )
    times = in_turn(
        {e.name: e.prepared.call for e in entries},
        series.options.repeats,
        budget=case.budget,
        least=LEAST,
        first=first,
    )
    exact: dict[tuple[str, str], np.ndarray] = {}
    for e in entries:
        p, seconds = e.problem, times[e.name]
        if (p.dtype, e.what) not in exact:
            truth = exact_field if e.what == "forward" else exact_gradient
            exact[p.dtype, e.what] = truth(p)
        alone = seconds == [first[e.name]]
        yield series.write(
            p,
            e.what,
            e.contender.name,
            seconds,
            runs_per_time=1 if alone else runs_per_time(first[e.name], LEAST),
            compile_seconds=e.prepared.compile_seconds,
            temporary_bytes=e.prepared.temporary_bytes,
            peak_growth_mb=growth[e.name],
            max_abs_error=_error(
                e, exact[p.dtype, e.what], results[e.name], first[e.name]
            ),
            largest=float(np.abs(exact[p.dtype, e.what]).max()),
            reference=f"NumPy float64, all pairs, {len(p.rows)} tokens",
            threads=e.prepared.threads,
            note=e.prepared.note,
        )


def _expected(
    contender: Contender, p: Problem, what: str, lines: list[dict[str, Any]]
) -> tuple[float, dict[str, Any]] | None:
    """Seconds of a run that is not made, because it would take too long or too much memory,
    and what they are extrapolated from; None if it is to be made."""
    if not contender.quadratic(p):
        return None
    n, dtype = p.n, p.dtype
    known = [
        (line["parameters"]["n"], line["median_seconds"])
        for line in lines
        if key(line)[1:] == (contender.name, dtype, what)
        and line["median_seconds"] is not None
        and not line.get("extrapolated_from")
    ]
    size, seconds = max(known, default=(0, 0.0))
    probe = contender.first_probe
    # Larger and larger, until the time is not that of a call but of a sum over pairs.
    while seconds < 0.1 and probe < n and contender.roomy(p.first(probe)):
        prepared = contender.prepare(p.first(probe), what)
        seconds = min(watched(prepared.call)[1] for _ in range(2))
        size, probe = probe, 4 * probe
    expected = seconds * (n / size) ** 2 if size else 0.0
    if expected <= p.case.longest and contender.roomy(p):
        return None
    if not size:
        raise MemoryError(f"n = {n} takes more memory than there is")
    return expected, {"n": size, "seconds": seconds}


def _error(entry: _Entry, exact: np.ndarray, result: Any, seconds: float) -> float | None:
    """The largest error of a result at the rows of the reference; of a gradient, of its
    tangential part in another run, for directions G on those rows only. None if that run
    would take longer than a case may."""
    p = entry.problem
    if entry.what == "forward":
        return float(np.abs(entry.prepared.read(result)[p.rows] - exact).max())
    if seconds > p.case.longest:
        return None
    found = entry.prepared.value(p.some()).astype(np.float64)
    return float(np.abs(tangential(p.x.astype(np.float64), found) - exact).max())


def _parameters(p: Problem) -> dict[str, Any]:
    return {
        "n": p.n,
        "d": p.d,
        "dtype": p.dtype,
        "beta": p.case.beta,
        "model": p.case.model,
    }


def _why(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text}"[:300]


def wrong(line: dict[str, Any]) -> str:
    """What is amiss with a record of ours ("": nothing): no number at all, or an error far
    above what its dtype and its default tolerance promise."""
    if line["name"] not in OURS:
        return ""
    if line.get("skipped"):
        return line["skipped"]
    error = line.get("max_abs_error")
    if error is None:
        return ""
    dtype = line["parameters"]["dtype"]
    kappa, scale = line["kappa"], max(1.0, line["largest"])
    if line["pass"] == "gradient":
        scale *= max(1.0, kappa)
    promised = (1e-10 if dtype == "float64" else 1e-5) + kappa * float(
        np.finfo(dtype).eps
    )
    if error <= 10 * promised * scale:
        return ""
    return f"error {error:.1e}, far above {promised * scale:.1e}"
