"""Charts of measurement beside theory: experiments describe curves, this draws them.

Measured values are blue and green, dots or solid lines; theory is vermillion and other warm
colours, dashed or thin; every curve is named in the legend of its panel."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import plotting
from .checks import nearest

_DOTS: dict[str, Any] = {"ls": "", "mew": 0}
_KINDS: dict[str, dict[str, Any]] = {
    "measured": {"color": "#0072B2", "lw": 1.3},
    "measured2": {"color": "#009E73", "lw": 1.3},
    "points": _DOTS | {"color": "#56B4E9", "marker": "o", "ms": 2.6},
    "points2": _DOTS | {"color": "#009E73", "marker": "s", "ms": 2.6},
    "faint": _DOTS | {"color": "#0072B2", "marker": "o", "ms": 2, "alpha": 0.3},
    "faint2": _DOTS | {"color": "#009E73", "marker": "s", "ms": 2, "alpha": 0.3},
    "interval": {"color": "#0072B2", "fmt": "o", "ms": 3, "lw": 1.2, "capsize": 2},
    "interval2": {"color": "#009E73", "fmt": "s", "ms": 3, "lw": 1.2, "capsize": 2},
    "theory": {"color": "#D55E00", "lw": 1.1, "ls": (0, (5, 1.5))},
    "theory2": {"color": "#000000", "lw": 0.9, "ls": (0, (1.5, 1.2))},
    "theory3": {"color": "#CC79A7", "lw": 0.9, "ls": (0, (4, 1.2, 1, 1.2))},
    "theory4": {"color": "#E69F00", "lw": 0.9, "ls": (0, (3, 1, 1, 1, 1, 1))},
    "band": {"color": "#0072B2", "alpha": 0.2, "lw": 0},
}


@dataclasses.dataclass(frozen=True)
class Curve:
    """y against x, named `label` ("": not in the legend). `kind`: "measured", "measured2"
    (lines), "points", "points2", "faint", "faint2" (dots, for single samples), "theory",
    "theory2", "theory3", "theory4" (dashed), "band" between `y` and `upper`, or "interval",
    "interval2": a dot in the middle of a bar from `y` to `upper` at each x; `color` instead of
    that of the kind, for families of curves (`shades`)."""

    x: Any
    y: Any
    label: str
    kind: str
    upper: Any = None
    color: Any = None

    def __post_init__(self):
        if self.kind not in _KINDS:
            hint = nearest(self.kind, _KINDS)
            raise ValueError(f"Argument `kind` is {self.kind!r}. {hint}")


def shades(count: int) -> list[Any]:
    """Colours of a family of curves, from dark to light, distinct in grey too."""
    return [plotting.shade(0.85 * i / max(1, count - 1)) for i in range(count)]


@dataclasses.dataclass(frozen=True)
class Panel:
    """One pair of axes. `bars`: (edges, heights) of a histogram below the curves; `spans`:
    (from, to, label) of shaded ranges of x; `angles`: ticks of [−π, π]."""

    xlabel: str
    ylabel: str
    curves: Sequence[Curve]
    xscale: str = "linear"
    yscale: str = "linear"
    ylim: tuple[Any, Any] | None = None
    title: str = ""
    bars: tuple[Any, Any] | None = None
    bars_label: str = "tokens"
    spans: Sequence[tuple[Any, Any, str]] = ()
    angles: bool = False


def panels(
    rows: Sequence[Panel], title: str = "", *, shared: bool = False
) -> plotting.Picture:
    """A picture of panels side by side: up to three in a row, four as two by two.

    `shared`: the panels show the same curves: one scale of y and one legend for all;
    otherwise each panel has its legend below it."""
    columns = 2 if len(rows) == 4 else min(len(rows), 3)
    lines = -(-len(rows) // columns)
    width = plotting.PAGE if len(rows) > 1 else plotting.COLUMN
    height = 2.0 if shared else 3.0
    with plotting.blank(width, height * lines, title) as figure:
        grid = figure.subplots(lines, columns, squeeze=False, sharey=shared)
        for ax, panel in zip(grid.ravel(), rows):
            _draw(ax, panel)
            handles, labels = ax.get_legend_handles_labels()
            if handles and not shared:
                below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2)}
                # A tall legend would leave the axes less height than their label needs.
                short = len(labels) > 4 and max(map(len, labels)) <= 20
                below["ncols"] = 2 if short else 1
                ax.legend(handles, labels, **below, frameon=False, fontsize=7)
        for ax in grid.ravel()[len(rows) :]:
            ax.set_axis_off()
        if shared:
            for ax in grid[:, 1:].ravel():
                ax.set_ylabel("")
            for ax in grid[:-1].ravel():
                ax.set_xlabel("")
            handles, labels = grid[0, 0].get_legend_handles_labels()
            figure.legend(
                handles,
                labels,
                loc="outside upper center",
                ncols=len(labels),
                frameon=False,
            )
    return figure


def _draw(ax: Any, panel: Panel) -> None:
    if panel.bars is not None:
        edges, heights = panel.bars
        color = _KINDS["measured"]["color"]
        ax.stairs(
            heights,
            edges,
            fill=True,
            color=color,
            alpha=0.4,
            lw=0,
            label=panel.bars_label,
        )
    for c in panel.curves:
        style = _KINDS[c.kind] | ({} if c.color is None else {"color": c.color})
        if c.kind == "band":
            ax.fill_between(c.x, c.y, c.upper, label=c.label, **style)
        elif c.kind.startswith("interval"):
            low, high = np.asarray(c.y, float), np.asarray(c.upper, float)
            half = (high - low) / 2
            ax.errorbar(c.x, low + half, half, label=c.label, zorder=4, **style)
        else:
            ax.plot(
                c.x, c.y, label=c.label, zorder=3 if "theory" in c.kind else 2, **style
            )
    for left, right, label in panel.spans:
        ax.axvspan(left, right, color="#999999", alpha=0.2, lw=0, label=label)
    ax.set(
        xlabel=panel.xlabel,
        ylabel=panel.ylabel,
        xscale=panel.xscale,
        yscale=panel.yscale,
        title=panel.title,
    )
    if panel.ylim is not None:
        ax.set_ylim(panel.ylim)
    if panel.angles:
        ax.set_xlim(-np.pi, np.pi)
        ax.set_xticks(
            [-np.pi, -np.pi / 2, 0, np.pi / 2, np.pi], ["−π", "−π/2", "0", "π/2", "π"]
        )
        ax.set_ylim(bottom=0)
    elif panel.xscale == "linear":
        ax.margins(x=0)
