"""What the records say: ratios, exponents, targets, and all of it as a Markdown page."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .cases import CASES, OURS, PEERS, Case, Target

Line = dict[str, Any]


def read(path: Path) -> list[Line]:
    """The records of a file of JSON lines, none if it does not exist. **Raises:**
    `ValueError` that names the line that is not JSON."""
    if not path.exists():
        return []
    lines = []
    for i, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"Argument `--out` must hold records that are JSON, but line {i} of {path} "
                f"is not: {error}. Repair or remove it."
            ) from error
    return lines


# ------------------------------------------------------------------------ numbers


def key(line: Line) -> tuple[str, str, str, str]:
    """What is measured, up to n: case, contender, dtype, pass."""
    return line["case"], line["name"], line["parameters"]["dtype"], line["pass"]


def faster(line: Line, others: Iterable[Line]) -> dict[str, float]:
    """How many times faster than torch in each dtype: its time over that of `line`, of the
    same case, n and pass, in the same run."""
    if line["median_seconds"] is None or line["name"] == "torch":
        return {}
    return {
        f"torch {other['parameters']['dtype']}": other["median_seconds"]
        / line["median_seconds"]
        for other in others
        if other["name"] == "torch"
        and other["median_seconds"] is not None
        and _same_round(line, other)
        and other["pass"] == line["pass"]
    }


def _same_round(a: Line, b: Line) -> bool:
    return (a["case"], a["run"], a["parameters"]["n"]) == (
        b["case"],
        b["run"],
        b["parameters"]["n"],
    )


def exponent(lines: Sequence[Line]) -> float | None:
    """a of time ∝ n^a, by least squares of log time against log n over the records of the
    same contender, run, dtype and pass as the last one; None for fewer than three sizes or
    if the last one was not run. Times that were not measured do not count."""
    last = lines[-1]
    if last["median_seconds"] is None or last.get("extrapolated_from"):
        return None
    points = {
        line["parameters"]["n"]: line["median_seconds"]
        for line in lines
        if key(line) == key(last)
        and line["run"] == last["run"]
        and line["median_seconds"] is not None
        and not line.get("extrapolated_from")
    }
    if len(points) < 3:
        return None
    n, t = np.log(np.array(list(points.items()), float)).T
    return float(np.polyfit(n, t, 1)[0])


def newest(lines: Iterable[Line]) -> list[Line]:
    """One record of each measurement on each device: the last; in the order of the cases."""
    kept: dict[tuple, Line] = {}
    for line in lines:
        if "case" in line:
            kept[(*key(line), line["parameters"]["n"], device(line))] = line
    order = {name: i for i, name in enumerate(CASES)}
    names = {name: i for i, name in enumerate((*OURS, *PEERS))}

    def place(line: Line) -> tuple:
        p = line["parameters"]
        return (
            order.get(line["case"], len(order)),
            p["n"],
            line["pass"],
            p["dtype"],
            names.get(line["name"], len(names)),
        )

    return sorted(kept.values(), key=place)


def device(line: Line) -> str:
    """Where a record was made, in words."""
    kind, processor = line["device"], line["processor"]
    what = processor if kind.lower() == "cpu" else f"{kind} (host: {processor})"
    return f"{what}, {line['cores']} cores"


# ------------------------------------------------------------------------ targets


def judged(target: Target, case: Case, lines: Iterable[Line]) -> list[tuple[str, float]]:
    """(dtype, number) of the target, where it was measured at the case's own size: the least
    over its contenders in each of its dtypes."""
    lines = [
        line
        for line in lines
        if line["case"] == case.name
        and line["median_seconds"] is not None
        and not line.get("extrapolated_from")
    ]
    found = []
    for dtype in target.dtypes:
        numbers = [
            value
            for line in lines
            if line["parameters"]["n"] == case.ns[-1]
            and line["name"] in target.contenders
            and line["parameters"]["dtype"] == dtype
            and (target.quantity != "memory" or line["pass"] == case.passes[-1])
            and _right(line, target.error)
            and (value := _number(target.quantity, line, lines)) is not None
        ]
        if numbers:
            found.append((dtype, min(numbers)))
    return found


def _right(line: Line, most: float | None) -> bool:
    """Whether the error is known to be at most so large."""
    error = line.get("max_abs_error")
    return most is None or (error is not None and error <= most)


def _number(quantity: str, line: Line, lines: list[Line]) -> float | None:
    forward = line["pass"] == "forward"
    if quantity == "seconds":
        return line["median_seconds"] if forward else None
    if quantity == "exponent":
        return line.get("exponent")
    if quantity == "memory":
        if line.get("temporary_bytes") is None:
            return None
        size = np.dtype(line["parameters"]["dtype"]).itemsize
        return line["temporary_bytes"] / size / line["parameters"]["n"]
    if quantity == "torch":
        speed = line.get("faster", {}).get("torch float32")
        return None if speed is None or not forward else 1 / speed
    peers = {"gradient": (line["name"],), "dense": ("Dense", "Blockwise")}
    base = [
        other["median_seconds"]
        for other in lines
        if _same_round(line, other)
        and other["parameters"]["dtype"] == line["parameters"]["dtype"]
        and other["name"] in peers.get(quantity, ("Dense", "Blockwise", "Harmonic"))
        and other["pass"] == "forward"
    ]
    if not base or forward == (quantity == "gradient"):
        return None
    return line["median_seconds"] / min(base)


_MEANINGS = {
    "torch": ("time", "of torch, float32"),
    "dense": ("time", "of our dense sums"),
    "gradient": ("time", "of the evaluation"),
    "best": ("time", "of the fastest partition"),
    "exponent": ("exponent of n", ""),
    "seconds": ("time", "s"),
    "memory": ("temporary memory", "numbers per token"),
}


def meaning(target: Target, value: float | None) -> str:
    """A bound, or a measured number, of a target in words."""
    if value is None:
        return ""
    what, of = _MEANINGS[target.quantity]
    if target.quantity in ("exponent", "seconds", "memory"):
        return f"{value:.3g} {of}".strip()
    if value < 0.5:
        return f"{_digits(1 / value)}× faster than {of.removeprefix('of ')}"
    return f"{value:.2f}× the {what} {of}"


def _digits(value: float) -> str:
    """Three significant digits without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


# ------------------------------------------------------------------------ the page


def page(lines: Sequence[Line]) -> str:
    """All records as Markdown, by device: targets, measurements, exponents, the choices of
    `Auto`."""
    text = ["# Benchmarks", "", "Made by `meanformer bench` from `bench.jsonl`."]
    everything = newest(lines)
    for place in dict.fromkeys(map(device, everything)):
        here = [line for line in everything if device(line) == place]
        last = max(here, key=lambda line: line["when"])
        versions = ", ".join(f"{k} {v}" for k, v in last["versions"].items())
        text += [
            "",
            f"## {place}",
            "",
            f"{versions}; commit {last['commit']}; {last['when']}; ",
        ]
        text[-1] += f"`{last['command']}`."
        for title, rows in (
            ("Targets", _target_rows(here)),
            ("Measurements", _measurement_rows(here)),
            ("What `Auto` picks", _auto_rows(here)),
        ):
            if len(rows) > 1:
                text += ["", f"### {title}", "", *_table(rows)]
        text += [
            "",
            "Times are medians. Error: largest absolute one at 200 tokens, against NumPy float64 "
            "over all pairs. Memory: temporary memory by the compiler, or (≈) the growth of the "
            "resident peak. ~: torch was extrapolated as n² from fewer tokens, not run; * : this "
            "line was.",
        ]
    return "\n".join(text) + "\n"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return [head, "|" + "---|" * len(rows[0]), *body]


def _target_rows(lines: list[Line]) -> list[list[str]]:
    rows = [["case", "dtype", "measured", "must", "dream", "met"]]
    for name, case in CASES.items():
        for target in case.targets:
            for dtype, value in judged(target, case, lines):
                dream = target.dream is not None and value <= target.dream
                met = "dream" if dream else "yes" if value <= target.must else "**no**"
                words = [meaning(target, v) for v in (value, target.must, target.dream)]
                if target.quantity == "torch" and _guessed(name, case.ns[-1], lines):
                    words[0] = f"~{words[0]}"
                bounds = [f"≤ {w}" if "faster" not in w and w else w for w in words[1:]]
                rows.append([name, dtype, words[0], *bounds, met])
    return rows


def _guessed(name: str, n: int, lines: list[Line]) -> bool:
    """Whether the time of torch at this size was extrapolated."""
    return any(
        line["case"] == name
        and line["name"] == "torch"
        and line["parameters"]["n"] == n
        and line["parameters"]["dtype"] == "float32"
        and bool(line.get("extrapolated_from"))
        for line in lines
    )


def _measurement_rows(lines: list[Line]) -> list[list[str]]:
    head = [
        "case",
        "contender",
        "pass",
        "n",
        "d",
        "β",
        "dtype",
        "time",
        "error",
        "memory",
    ]
    rows = [[*head, "faster than torch float32", "than torch float64", "exponent"]]
    for line in lines:
        p = line["parameters"]
        guess = "*" if line.get("extrapolated_from") else ""
        seconds = line["median_seconds"]
        time = line.get("skipped", "") if seconds is None else f"{_time(seconds)}{guess}"
        ratios = [
            _ratio(line.get("faster", {}).get(f"torch {t}"), t, line, lines)
            for t in ("float32", "float64")
        ]
        error = line.get("max_abs_error")
        rows.append(
            [
                line["case"],
                line["name"],
                line["pass"],
                f"{p['n']}",
                f"{p['d']}",
                f"{p['beta']:g}",
                p["dtype"],
                time.replace("|", "¦"),
                "" if error is None else f"{error:.0e}",
                _memory(line),
                *ratios,
                "" if line.get("exponent") is None else f"{line['exponent']:.2f}",
            ]
        )
    return rows


def _ratio(value: float | None, dtype: str, line: Line, lines: list[Line]) -> str:
    if value is None:
        return ""
    guessed = any(
        other["name"] == "torch"
        and other["parameters"]["dtype"] == dtype
        and bool(other.get("extrapolated_from"))
        and _same_round(line, other)
        and other["pass"] == line["pass"]
        for other in lines
    )
    return f"{'~' if guessed else ''}{_digits(value)}×"


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size or unit == "µs":
            return f"{_digits(seconds / size)} {unit}"
    raise AssertionError


def _memory(line: Line) -> str:
    if line.get("temporary_bytes") is not None:
        return f"{line['temporary_bytes'] / 1e6:.3g} MB"
    if line.get("peak_growth_mb") is not None:
        return f"≈ {line['peak_growth_mb']:.3g} MB"
    return ""


def _auto_rows(lines: list[Line]) -> list[list[str]]:
    """`Auto` beside the partitions, where it and at least one of them were run."""
    names = ("Dense", "Blockwise", "Harmonic")
    rows = [["case", "dtype", *names, "Auto", "Auto/best"]]
    for line in lines:
        if line["name"] != "Auto" or line["median_seconds"] is None:
            continue
        if not line["case"].startswith("auto/"):
            continue
        times = {
            other["name"]: other["median_seconds"]
            for other in lines
            if _same_round(line, other)
            and key(other)[2:] == key(line)[2:]
            and other["name"] in names
            and other["median_seconds"] is not None
            and not other.get("extrapolated_from")
        }
        if times:
            shown = [_time(times[name]) if name in times else "" for name in names]
            own = line["median_seconds"]
            rows.append(
                [
                    line["case"],
                    line["parameters"]["dtype"],
                    *shown,
                    _time(own),
                    f"{own / min(times.values()):.2f}",
                ]
            )
    return rows
