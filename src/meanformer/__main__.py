"""The command `meanformer`: list the experiments, run one, measure what the sums cost."""

import contextlib
import dataclasses
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

from . import bench as suite, experiments
from .bench.cases import listing as list_cases
from .bench.suite import wrong
from .checks import check_count, nearest
from .experiments.report import table, write
from .files import check_folder


@dataclasses.dataclass(frozen=True)
class List:
    """Every experiment, one line each, with its source."""


@dataclasses.dataclass(frozen=True)
class Run:
    """Run an experiment: figures (PNG and PDF), data.npz and summary.json in OUT, and the
    table of checks. Exit status 0 if all hold, 1 if one fails, 2 for bad arguments."""

    name: tyro.conf.Positional[str]
    """One of those that `meanformer list` prints, such as multiscale/fig1a."""
    out: Path | None = None
    """Folder to write in; default runs/NAME. Files of an earlier run are replaced."""
    seed: int = 0
    """Seed of the random initial tokens; the same seed gives the same numbers."""
    tokens: int | None = None
    """Number of tokens; default as in the paper."""
    quick: bool = False
    """A smaller, faithful version, in seconds."""
    precision: Literal[32, 64] = 64
    """Bits of a floating-point number."""
    layers: bool = False
    """The paper's fixed Euler layers where the default is adaptive steps (multiscale/fig2,
    multiscale/fig3)."""


@dataclasses.dataclass(frozen=True)
class Bench:
    """Time the fields of the papers and others, against torch, NumPy and CBXpy: one line per
    measurement in OUT/bench.jsonl, and of all lines there a table (bench.md) and a plot
    (bench.png, bench.pdf). Time a quiet machine; all cases take most of an hour. Exit status
    1 if one of our sums fails or is wrong, 2 for bad arguments."""

    cases: tuple[str, ...] = ()
    """Names of cases, or of groups of them such as dense, growth, auto; default all."""
    quick: bool = False
    """Few tokens and two repeats: seconds per case. Says nothing about speed."""
    repeats: int | None = None
    """Times to keep of each contender, run in turn; default 7, in a quick run 2."""
    out: Path = Path("runs/bench")
    """Folder to write in. Records are added to those that are there."""
    seed: int = 0
    """Seed of the random tokens."""
    list: bool = False
    """Only name the cases, one line each."""


Command = (
    Annotated[List, tyro.conf.subcommand("list")]
    | Annotated[Run, tyro.conf.subcommand("run")]
    | Annotated[Bench, tyro.conf.subcommand("bench")]
)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    command = tyro.cli(
        Command,  # pyright: ignore[reportArgumentType]
        prog="meanformer",
        description="How tokens move through a deep transformer: the papers' experiments.",
        args=argv,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    if isinstance(command, List):
        print(listing())
        return 0
    if isinstance(command, Bench):
        return bench(command)
    return run(command)


def listing() -> str:
    """All experiments: name, what it shows, source."""
    width = max(len(name) for name in experiments.REGISTRY)
    return "\n".join(
        f"{e.name.ljust(width)}  {e.title}  [{e.source}]"
        for e in experiments.REGISTRY.values()
    )


def run(options: Run) -> int:
    """Run one experiment; returns the exit status of the command."""
    try:
        experiment = experiments.REGISTRY.get(options.name)
        if experiment is None:
            known = nearest(options.name, experiments.REGISTRY)
            raise ValueError(
                f"Argument `NAME` must be an experiment, but is {options.name!r}. {known} "
                "See `meanformer list`."
            )
        settings = experiments.Settings(
            seed=options.seed,
            tokens=options.tokens,
            quick=options.quick,
            layers=options.layers,
            progress=True,
        )
        out = (
            Path("runs", *experiment.name.split("/"))
            if options.out is None
            else options.out
        )
        check_folder(out, "--out")
    except ValueError as error:
        return _refused(error)
    jax.config.update("jax_enable_x64", options.precision == 64)
    begin = time.perf_counter()
    try:
        with _compile_clock() as compiling:
            report = experiment.run(settings)
    except experiments.BadArgument as error:
        return _refused(error)
    except KeyboardInterrupt:
        print("meanformer: interrupted; nothing was written.", file=sys.stderr)
        return 130
    seconds = time.perf_counter() - begin
    try:
        paths = write(
            report,
            out,
            name=experiment.name,
            source=experiment.source,
            seed=options.seed,
            seconds=seconds,
            compile_seconds=sum(compiling, 0.0),
        )
    except KeyboardInterrupt:
        print(
            f"meanformer: interrupted while writing to {out}; the files there are whole, "
            "summary.json comes last.",
            file=sys.stderr,
        )
        return 130
    print(table(report.checks))
    for note in report.notes:
        print(f"\n{note}")
    print(
        f"\n{experiment.name}: {sum(c.holds for c in report.checks)} of "
        f"{len(report.checks)} checks hold; {seconds:.1f} s, of which "
        f"{100 * min(1, sum(compiling) / seconds):.0f} % compilation; "
        f"{paths[-1].parent}/: {', '.join(p.name for p in paths)}"
    )
    return 0 if report.holds else 1


def bench(options: Bench) -> int:
    """Run the benchmark suite; returns the exit status of the command."""
    if options.list:
        print(list_cases())
        return 0
    try:
        cases = suite.chosen(options.cases)
        repeats = check_count(
            (2 if options.quick else 7) if options.repeats is None else options.repeats,
            "--repeats",
        )
        check_count(options.seed, "--seed", minimum=0)
        check_folder(options.out, "--out")
        suite.read(options.out / "bench.jsonl")
    except ValueError as error:
        return _refused(error)
    jax.config.update("jax_enable_x64", True)
    path = options.out / "bench.jsonl"
    settings = suite.Options(path, repeats, options.seed, options.quick)
    amiss: list[str] = []
    interrupted = False
    try:
        for line in suite.run_suite(cases, settings):
            if why := wrong(line):
                amiss.append(f"{line['case']}, {line['name']}: {why}")
    except KeyboardInterrupt:
        interrupted = True
    paths = suite.write(options.out)
    names = ", ".join([path.name, *(p.name for p in paths)]) if paths else "nothing"
    print(f"\n{options.out}/: {names}")
    if interrupted:
        print(
            "meanformer: interrupted; the records made so far are kept.", file=sys.stderr
        )
        return 130
    for text in amiss:
        print(f"meanformer: {text}", file=sys.stderr)
    return 1 if amiss else 0


def _refused(error: ValueError) -> int:
    """Say why, with the options' names as the user typed them; status 2."""
    message = re.sub(r"`(tokens|seed)`", r"`--\1`", str(error))
    print(f"meanformer: {message}", file=sys.stderr)
    return 2


@contextlib.contextmanager
def _compile_clock() -> Iterator[list[float]]:
    """Seconds that jax spends on lowering and compiling inside the block."""
    spent: list[float] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event.endswith(("backend_compile_duration", "jaxpr_to_mlir_module_duration")):
            spent.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield spent
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


if __name__ == "__main__":
    sys.exit(main())
