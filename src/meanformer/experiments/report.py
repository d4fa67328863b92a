"""What an experiment returns and how it is written: checked claims, figures, data."""

import dataclasses
import json
import math
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .. import files, plotting

try:
    import resource
except ImportError:  # Windows
    resource = None

_SIGNS = {"=": "within", "<": "at most", ">": "at least"}


@dataclasses.dataclass(frozen=True)
class Check:
    """One claim of a paper against what was measured.

    - `measured`, `expected`, `tolerance`: numbers. With `relation` "=" the claim holds if
        |measured − expected| ≤ tolerance; with "<" ("≤") if measured ≤ expected +
        tolerance; with ">" ("≥") if measured ≥ expected − tolerance.
    - `source`: where the expected value comes from: theory or an independent computation.
    - `effect`: how far the measured value would be from `expected` if the claim failed in
        the way stated in `rival`. The tolerance may not exceed half of it.
    """

    claim: str
    item: str
    measured: float
    expected: float
    tolerance: float
    source: str
    effect: float
    rival: str
    relation: str = "="

    def __post_init__(self):
        if self.relation not in _SIGNS:
            raise ValueError(
                f"Argument `relation` must be one of = < >, not {self.relation!r}."
            )
        if not self.source or not self.rival:
            raise ValueError("Arguments `source` and `rival` must say something.")
        if not 0 <= self.tolerance <= abs(self.effect) / 2:
            raise ValueError(
                f"Argument `tolerance` must be at most half of the effect {self.effect:g} "
                f"that the check is to show, but is {self.tolerance:g} ({self.claim})."
            )

    @property
    def holds(self) -> bool:
        difference = self.measured - self.expected
        if not math.isfinite(difference):
            return False
        if self.relation == "=":
            return bool(abs(difference) <= self.tolerance)
        sign = 1 if self.relation == "<" else -1
        return bool(sign * difference <= self.tolerance)

    def as_dict(self) -> dict[str, Any]:
        row = {
            k: float(v) if isinstance(v, np.generic | float | int) else v
            for k, v in dataclasses.asdict(self).items()
        }
        # JSON has no NaN: an undefined measurement is null, and does not hold.
        row |= {
            k: None
            for k, v in row.items()
            if isinstance(v, float) and not math.isfinite(v)
        }
        return row | {"holds": self.holds}


@dataclasses.dataclass
class Report:
    """The outcome of an experiment."""

    parameters: dict[str, Any]
    checks: list[Check]
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)
    arrays: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def holds(self) -> bool:
        return all(c.holds for c in self.checks)


def slope(t: np.ndarray, y: np.ndarray) -> float:
    """Least-squares slope of y against t."""
    return float(np.polyfit(t, y, 1)[0])


def nearest_index(ts: np.ndarray, times) -> list[int]:
    """Where in `ts` the given times are, or nearly so."""
    return [int(np.argmin(np.abs(ts - t))) for t in times]


def table(checks: list[Check]) -> str:
    """The checks as text: claim, item, measured, expected, holds."""
    signs = {"=": "", "<": "≤ ", ">": "≥ "}
    rows = [("claim", "item", "measured", "expected", "holds")]
    for c in checks:
        if c.relation == "=":
            expected = f"{c.expected:.4g} ± {c.tolerance:.2g}"
        else:
            slack = c.tolerance if c.relation == "<" else -c.tolerance
            expected = f"{signs[c.relation]}{c.expected + slack:.4g}"
        held = "yes" if c.holds else "NO"
        rows.append((c.claim, c.item, f"{c.measured:.4g}", expected, held))
    widths = [max(len(r[i]) for r in rows) for i in range(5)]
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(r, widths)).rstrip() for r in rows
    ]
    lines.insert(1, "  ".join("─" * w for w in widths))
    return "\n".join(lines)


def versions() -> dict[str, str]:
    """Versions of what computed the numbers."""
    packages = ("meanformer", "jax", "jaxlib", "equinox", "diffrax", "numpy", "scipy")
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def peak_memory_mb() -> float:
    """Largest resident memory of this process so far, in MB (0 where unknown)."""
    if resource is None:
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def write(
    report: Report,
    out: Path,
    *,
    name: str,
    source: str,
    seed: int,
    seconds: float,
    compile_seconds: float,
) -> list[Path]:
    """Figures (PNG and PDF), `data.npz` and `summary.json`, each written whole or not at
    all; the summary last, so that its presence says that the rest is there."""
    out.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for stem, figure in report.figures.items():
        paths += plotting.save(figure, out / stem)
    arrays = {k: np.asarray(v) for k, v in report.arrays.items()}
    with files.atomic(out / "data.npz") as draft, open(draft, "wb") as file:
        np.savez_compressed(file, **arrays)  # pyright: ignore[reportArgumentType]
    paths.append(out / "data.npz")
    summary = {
        "experiment": name,
        "source": source,
        "parameters": report.parameters,
        "seed": seed,
        "checks": [c.as_dict() for c in report.checks],
        "holds": report.holds,
        "notes": report.notes,
        "seconds": round(seconds, 2),
        "compile_seconds": round(compile_seconds, 2),
        "peak_memory_mb": round(peak_memory_mb()),
        "versions": versions(),
        "device": jax.default_backend(),
    }
    with files.atomic(out / "summary.json") as draft:
        text = json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False)
        draft.write_text(text + "\n", encoding="utf-8")
    return [*paths, out / "summary.json"]
