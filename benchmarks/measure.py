"""The harness: compile, run in turn, keep every time, say how wrong and where."""

import datetime
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np

from meanformer import files
from meanformer.experiments.report import peak_memory_mb, versions

RECORDS = Path(__file__).parent / "records"


def in_turn(
    contenders: Mapping[str, Callable[[], object]], repeats: int = 7
) -> dict[str, list[float]]:
    """Seconds of each contender, run A B A B …, after one run of each that is not kept."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for kept in range(repeats + 1):
        for name, call in contenders.items():
            begin = time.perf_counter()
            jax.block_until_ready(call())
            if kept:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def compiled(f: Callable, *args) -> tuple[Callable[[], object], float, int]:
    """`f(*args)` as a call without tracing, the seconds to compile it, and the bytes of
    temporary memory that the compiler reserved."""
    begin = time.perf_counter()
    program = jax.jit(f).lower(*args).compile()
    seconds = time.perf_counter() - begin
    memory = program.memory_analysis()
    return lambda: program(*args), seconds, int(memory.temp_size_in_bytes)


def record(
    file: str, name: str, question: str, parameters: dict, seconds: list[float], **more
) -> dict:
    """One measurement as a dict, printed and appended to records/`file`.jsonl."""
    line = {
        "name": name,
        "question": question,
        "parameters": parameters,
        "median_seconds": float(np.median(seconds)),
        "run_seconds": [round(s, 6) for s in seconds],
        **more,
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "versions": versions() | _peer_versions(),
        "peak_memory_mb": round(peak_memory_mb()),
        "commit": _commit(),
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    RECORDS.mkdir(exist_ok=True)
    path = RECORDS / f"{file}.jsonl"
    old = path.read_text() if path.exists() else ""
    with files.atomic(path) as draft:
        draft.write_text(old + json.dumps(line, ensure_ascii=False) + "\n")
    error = more.get("max_abs_error")
    print(
        f"{name:34} {json.dumps(parameters):64} {line['median_seconds']:.5f} s"
        + (f"  error {error:.1e}" if error is not None else "")
        + (f"  ratio {more['ratio']:.2f} to {more['peer']}" if "ratio" in more else ""),
        flush=True,
    )
    return line


def _commit() -> str:
    try:
        out = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parent,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return out.stdout.strip()


def _peer_versions() -> dict[str, str]:
    try:
        import torch
    except ImportError:
        return {}
    return {"torch": str(torch.__version__)}
