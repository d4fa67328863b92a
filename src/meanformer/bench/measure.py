"""The harness: compile, run in turn, keep every time, say how wrong and where."""

import datetime
import functools
import gc
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .. import files
from ..experiments.report import peak_memory_mb, versions

PEERS = ("torch", "cbx", "POT", "ducc0", "jax-finufft")  # named in records if installed


def in_turn(
    contenders: Mapping[str, Callable[[], object]],
    repeats: int = 7,
    *,
    budget: float | int = math.inf,
    least: float | int = 0.0,
    first: Mapping[str, float] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each contender, run A B A B …, after one run of each that is not kept.

    `budget`: seconds that one contender may take in all; one whose first run takes half of
    it is not run again, and that run is its only time. `least`: a time is the mean over as
    many runs as take so many seconds, after one that is not kept. `first`: seconds of first
    runs that were made already."""
    first = dict(first or {})
    for name, call in contenders.items():
        if name not in first:
            first[name] = _seconds(call)
    counts = {
        name: 0 if 2 * s >= budget else int(min(repeats, max(1, budget / max(s, 1e-9))))
        for name, s in first.items()
    }
    seconds = {name: [] if counts[name] else [first[name]] for name in contenders}
    for turn in range(repeats):
        for name, call in contenders.items():
            if turn >= counts[name]:
                continue
            runs = runs_per_time(first[name], least)
            if runs > 1:
                _seconds(call)
            seconds[name].append(_seconds(call, runs))
    return seconds


def runs_per_time(first: float, least: float | int) -> int:
    """How many runs make one time, if the first took `first` seconds."""
    return max(1, min(1000, math.ceil(least / max(first, 1e-9))))


def _seconds(call: Callable[[], object], runs: int = 1) -> float:
    begin = time.perf_counter()
    for _ in range(runs):
        jax.block_until_ready(call())
    return (time.perf_counter() - begin) / runs


def compiled(f: Callable, *args: Any) -> tuple[Callable[..., Any], float, int]:
    """`f(*args)` as a call without tracing (of other arguments of the same shapes if it is
    given some), the seconds to compile it, and the bytes of temporary memory that the
    compiler reserved."""
    begin = time.perf_counter()
    program = jax.jit(f).lower(*args).compile()
    seconds = time.perf_counter() - begin
    memory = program.memory_analysis()
    temporary = 0 if memory is None else int(memory.temp_size_in_bytes)
    return lambda *others: program(*(others or args)), seconds, temporary


def watched(call: Callable[[], Any]) -> tuple[Any, float, float | None]:
    """The result of one run, its seconds, and by how many MB the resident memory of this
    process rose above its level before (a lower bound of what the run needs; None where the
    system, unlike Linux, does not forget an older peak)."""
    gc.collect()
    before = _resident("VmRSS") if _forget_peak() else None
    begin = time.perf_counter()
    result = jax.block_until_ready(call())
    seconds = time.perf_counter() - begin
    after = None if before is None else _resident("VmHWM")
    grown = None if before is None or after is None else round(after - before, 1)
    return result, seconds, grown


def _forget_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident(field: str) -> float | None:
    """A size of this process in MB, by its name in /proc/self/status."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(field + ":")]
    return int(found[0]) * 1024 / 1e6 if found else None


def available_memory() -> float:
    """Bytes that a new array may take without swapping; 4·10⁹ where that is not known."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 4e9
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024.0 if found else 4e9


def cores() -> int:
    """How many cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


@functools.cache
def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [
        line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
    ]
    return named[0] if named else platform.processor() or platform.machine()


def load() -> float | None:
    """How many processes wanted to run in the last minute, this one included."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):  # not on every system
        return None


def machine() -> dict[str, Any]:
    """Where the numbers were computed, and by what."""
    return {
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "cores": cores(),
        "processor": processor(),
        "load": load(),
        "versions": versions() | _peer_versions(),
        "commit": commit(),
        "command": _command(),
    }


def _command() -> str:
    program = Path(sys.argv[0]).name
    return " ".join(
        ["meanformer" if program == "__main__.py" else program, *sys.argv[1:]]
    )


def _peer_versions() -> dict[str, str]:
    found = {}
    for package in PEERS:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def commit() -> str:
    """The commit of this checkout ("-dirty" if files were changed), else "unknown"."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():  # installed: a repository around it is another's
        return "unknown"
    try:
        out = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            check=True,
            cwd=root,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return out.stdout.strip()


def record(
    path: Path,
    name: str,
    question: str,
    parameters: dict[str, Any],
    seconds: list[float],
    **more: Any,
) -> dict[str, Any]:
    """One measurement as a dict, printed and appended to the file `path` as a line of JSON.
    Without `seconds` it says in `more` why there is no time."""
    line = {
        "name": name,
        "question": question,
        "parameters": parameters,
        "median_seconds": float(np.median(seconds)) if seconds else None,
        "run_seconds": [float(f"{s:.5g}") for s in seconds],
        **more,
        **machine(),
        "peak_memory_mb": round(peak_memory_mb()),
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    append(path, line)
    print(_shown(line), flush=True)
    return line


def append(path: Path, line: dict[str, Any]) -> None:
    """`line` added to a file of JSON lines, which is whole at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    with files.atomic(path) as draft:
        text = json.dumps(line, ensure_ascii=False, allow_nan=False)
        draft.write_text(f"{old}{text}\n", encoding="utf-8")


def _shown(line: dict[str, Any]) -> str:
    parameters = " ".join(f"{k}={v}" for k, v in line["parameters"].items())
    name = " ".join([line["name"], *([line["pass"]] if "pass" in line else [])])
    text = f"{name:28} {parameters:52}"
    if line["median_seconds"] is None:
        return f"{text} {line.get('skipped', 'no time')}"
    text += f" {line['median_seconds']:.3g} s"
    if line.get("max_abs_error") is not None:
        text += f"  error {line['max_abs_error']:.1e}"
    if line.get("extrapolated_from"):
        text += f"  (∝ n² from n = {line['extrapolated_from']['n']}, not run)"
    if "ratio" in line and "peer" in line:
        text += f"  {line['ratio']:.2f} × the time of {line['peer']}"
    for peer, factor in line.get("faster", {}).items():
        text += f"  {factor:.3g}× {peer}"
    return text
