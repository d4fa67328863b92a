"""The files that are made of the records: the table, and time against n as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import files, plotting
from .report import Line, device, newest, page, read

# Okabe and Ito's colours, told apart by the colour-blind. `Auto` lies thin on what it picks.
STYLES: dict[str, dict[str, Any]] = {
    "Dense": {"color": "#56B4E9", "lw": 1.3, "marker": "s", "ms": 3},
    "Blockwise": {"color": "#0072B2", "lw": 2.4, "marker": "s", "ms": 4},
    "Harmonic": {"color": "#009E73", "lw": 2.4, "marker": "o", "ms": 4.5},
    "Auto": {"color": "#000000", "lw": 0.8, "marker": "o", "ms": 1.8},
    "torch": {"color": "#D55E00", "lw": 1.3, "marker": "^", "ms": 3.5},
    "NumPy": {"color": "#E69F00", "lw": 1.3, "marker": "v", "ms": 3.5},
    "CBXpy": {"color": "#CC79A7", "lw": 1.3, "marker": "D", "ms": 3},
}
_LINES = {"float64": "-", "float32": (0, (4, 1.5))}
_NOT_RUN = "as n², not run"
_GUESS = {"ls": (0, (1, 1.5)), "lw": 1.0}


def plot(lines: Sequence[Line]) -> plotting.Picture | None:
    """Time of one evaluation against n, a panel for each case with several n on each device
    (for each case if there is none with several), up to six; None without times."""
    timed = [
        line
        for line in newest(lines)
        if line["median_seconds"] is not None and line["pass"] == "forward"
    ]
    places: dict[tuple[str, str], list[Line]] = {}
    for line in timed:
        places.setdefault((line["case"], device(line)), []).append(line)
    several = [
        own for own in places.values() if len({x["parameters"]["n"] for x in own}) > 1
    ]
    drawn = (several or list(places.values()))[:6]
    if not drawn:
        return None
    columns = min(len(drawn), 3)
    rows = -(-len(drawn) // columns)
    width = plotting.PAGE if columns > 1 else plotting.COLUMN
    name_device = len({place for _, place in places}) > 1
    with plotting.blank(width, 2.2 * rows + (0.4 if columns > 1 else 0.9)) as figure:
        grid = figure.subplots(rows, columns, squeeze=False)
        legend: dict[str, Any] = {}
        for ax, own in zip(grid.ravel(), drawn):
            legend |= _panel(ax, own)
            p = own[0]["parameters"]
            title = f"{own[0]['case']}: d = {p['d']}, β = {p['beta']:g}"
            ax.set_title(f"{title}\n{device(own[0])}" if name_device else title)
        for ax in grid.ravel()[len(drawn) :]:
            ax.set_axis_off()
        for ax in grid[:, 0]:
            ax.set_ylabel("time of one evaluation (s)")
        names = [name for name in (*STYLES, *_LINES, _NOT_RUN) if name in legend]
        figure.legend(
            [legend[name] for name in names],
            names,
            loc="outside lower center",
            ncols=5 if columns > 1 else 3,
            frameon=False,
            fontsize=7,
        )
    return figure


def _panel(ax: Any, lines: Sequence[Line]) -> dict[str, Any]:
    """Draw one case; returns what the legend names, by name."""
    legend: dict[str, Any] = {}
    keys: dict[str, Any] = {}
    for name, style in STYLES.items():
        for dtype, dash in _LINES.items():
            own = [
                line
                for line in lines
                if line["name"] == name and line["parameters"]["dtype"] == dtype
            ]
            n, t = _points([x for x in own if not x.get("extrapolated_from")])
            more_n, more_t = _points([x for x in own if x.get("extrapolated_from")])
            if len(n):
                hollow = {"mfc": "white"} if dtype == "float32" else {}
                (drawn,) = ax.plot(n, t, ls=dash, mew=0.7, **(style | hollow))
                legend.setdefault(name, drawn)
                keys[dtype] = dash
            if len(more_n):
                way = np.append(n[-1:], more_n), np.append(t[-1:], more_t)
                (drawn,) = ax.plot(*way, color=style["color"], **_GUESS)
                legend.setdefault(name, drawn)
                keys[_NOT_RUN] = _GUESS["ls"]
    for name, dash in keys.items():
        (legend[name],) = ax.plot([], [], ls=dash, lw=1, color="#777777")
    ax.set(xlabel="tokens n", xscale="log", yscale="log")
    return legend


def _points(lines: Sequence[Line]) -> tuple[np.ndarray, np.ndarray]:
    n = np.array([line["parameters"]["n"] for line in lines], float)
    return n, np.array([line["median_seconds"] for line in lines], float)


def write(folder: Path) -> list[Path]:
    """bench.md, bench.png and bench.pdf in the folder, from all records of bench.jsonl there,
    each written whole or not at all. Returns the paths; none without records."""
    lines = read(folder / "bench.jsonl")
    if not lines:
        return []
    with files.atomic(folder / "bench.md") as draft:
        draft.write_text(page(lines), encoding="utf-8")
    paths = [folder / "bench.md"]
    picture = plot(lines)
    if picture is not None:
        paths += plotting.save(picture, folder / "bench")
    return paths
