"""Figures from arrays and trajectories; runs nothing. The only module that imports
matplotlib.

Figures are made without pyplot: no backend is chosen, no window opens, no global setting
stays changed. A notebook shows the returned `Picture` when it ends a cell (or by
`display(picture)`); a script writes it with `save`. The functions that take `ax` draw into
any matplotlib axes, also those of pyplot.

Angles are in radians but for the camera: `view` = (azimuth, elevation) in degrees. Times
and densities have no unit. Colours are those of Okabe and Ito, told apart by the
colour-blind: tokens blue, theory vermillion.
"""

import contextlib
import io
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.animation import PillowWriter
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection, PolyCollection
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure, FigureBase
from matplotlib.patches import Circle, StepPatch
from matplotlib.ticker import NullFormatter

from . import files
from .checks import ArrayLike, check_count, check_finite, check_scalar, check_times
from .measures import AbstractLaw, Empirical, check_weights
from .sphere import check_tokens, from_angles
from .trajectory import Trajectory

BLUE, VERMILLION = "#0072B2", "#D55E00"
VIEW = (-60.0, 20.0)
COLUMN, PAGE = 3.25, 6.75  # widths in inches of one column and of two
MAX_TOKENS = 20_000  # drawn in one panel
CLUSTER = 150.0  # area in square points of a dot that holds all mass
TEXT = ("font.size", "axes.titlesize", "axes.labelsize", "xtick.labelsize")
TEXT += ("ytick.labelsize", "legend.fontsize", "figure.titlesize")
LINES = ("axes.linewidth", "xtick.major.width", "ytick.major.width")
STYLE: dict[Any, Any] = dict.fromkeys(TEXT, 8) | dict.fromkeys(LINES, 0.6)
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 150}
STYLE |= {"savefig.bbox": None, "pdf.fonttype": 42}  # in a PDF text stays text

Values = ArrayLike | Sequence[Any]
Density = Callable[[np.ndarray], Any] | AbstractLaw | tuple[ArrayLike, ArrayLike]
Theory = Callable[[float, np.ndarray], Any]


class Picture(Figure):
    """A matplotlib figure, outside of pyplot, that notebooks show."""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=200)
        width, height = (round(100 * inches) for inches in self.get_size_inches())
        return file.getvalue(), {"width": width, "height": height}


# ------------------------------------------------------------------- the sphere S²


def to_screen(x: ArrayLike, view: Values = VIEW) -> np.ndarray:
    """Orthographic projection of points (..., 3): horizontal, vertical, and the depth
    ⟨x, c⟩ towards the camera c = (cos e cos a, cos e sin a, sin e), as (..., 3).

    `view` = (a, e), azimuth and elevation in degrees. Depth > 0 is the near side."""
    a, e = np.deg2rad(_view(view))
    right = [-np.sin(a), np.cos(a), 0]
    up = [-np.sin(e) * np.cos(a), -np.sin(e) * np.sin(a), np.cos(e)]
    camera = [np.cos(e) * np.cos(a), np.cos(e) * np.sin(a), np.sin(e)]
    return np.asarray(x, float) @ np.array([right, up, camera]).T


def sphere_axes(ax: Axes, view: Values = VIEW, label: str = "x") -> Axes:
    """Make `ax` a view of S²: disc, graticule of 30° (far side fainter and dashed), and the
    coordinate axes that point towards the camera, named x₁, x₂, x₃ (or by another `label`;
    `""` for none). Returns `ax`."""
    ax.set_axis_off()
    ax.set_aspect("equal")
    ax.set(xlim=(-1.25, 1.25), ylim=(-1.04, 1.3))
    grey = "#777777"
    ax.add_patch(Circle((0, 0), 1, facecolor="#f7f7f7", edgecolor="none", zorder=0))
    ax.add_patch(Circle((0, 0), 1, facecolor="none", edgecolor=grey, lw=0.7, zorder=3))
    for circle in _graticule():
        near, far = _near_far(to_screen(circle, view))
        ax.plot(*far, color="#d5d5d5", lw=0.4, ls=(0, (3, 3)), zorder=1)
        ax.plot(*near, color="#b5b5b5", lw=0.4, zorder=1.5)
    for i, (h, v, depth) in enumerate(to_screen(np.eye(3), view)):
        if label and depth > 0.05:
            end = min(1.5, 1.1 / math.hypot(h, v, 0.1))  # outside of the disc, if it can
            ax.plot([h, end * h], [v, end * v], color=grey, lw=0.7, zorder=4.5)
            end += 0.09 / math.hypot(h, v, 0.1)
            text = f"${label}_{i + 1}$"
            ax.text(end * h, end * v, text, size=7, ha="center", va="center", zorder=6)
    return ax


def _graticule() -> list[np.ndarray]:
    s = np.linspace(0, 2 * math.pi, 241)
    heights, turns = np.deg2rad([-60, -30, 0, 30, 60]), np.deg2rad(np.arange(0, 180, 30))
    parallels = [
        (np.cos(h) * np.cos(s), np.cos(h) * np.sin(s), 0 * s + np.sin(h)) for h in heights
    ]
    meridians = [(np.cos(s) * np.cos(a), np.cos(s) * np.sin(a), np.sin(s)) for a in turns]
    return [np.stack(circle, axis=1) for circle in (*parallels, *meridians)]


def _near_far(p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The seen and the hidden part of a projected curve (m, 3), as (2, m) with gaps. Hidden
    is what lies behind the disc: points off the sphere may be seen beside it."""
    hidden = (p[:, 2] < 0) & (np.hypot(p[:, 0], p[:, 1]) < 1)
    before, after = np.roll(hidden, 1), np.roll(hidden, -1)
    before[0], after[-1] = hidden[0], hidden[-1]
    far = hidden | before | after  # overlap by a segment, so that no gap opens
    return np.where(hidden, np.nan, p[:, :2].T), np.where(far, p[:, :2].T, np.nan)


def scatter_sphere(
    ax: Axes,
    x: ArrayLike,
    weights: ArrayLike | None = None,
    color: ArrayLike | str | None = None,
    view: Values = VIEW,
    size: ArrayLike | None = None,
    cmap: str = "cividis",
) -> tuple[PathCollection, PathCollection]:
    """Tokens on S², or points inside the ball, in orthographic projection.

    The far side is drawn first, smaller and fainter. Tokens in one cell of side 0.01 are
    drawn as one; the area of a dot is proportional to its mass, but at least `size`.

    **Arguments:** `x` (n, 3), finite; `weights` (n,), default equal; `color`: a colour, or
    numbers (n,) shown by the colour map `cmap` (`"twilight"` suits angles); `size`: area of
    the smallest dot in square points, by default less for more tokens; `view` in degrees.
    All tokens are drawn; `plot` thins.

    **Returns:** the dots of the far side and those of the near side. Call `sphere_axes`
    first for the sphere itself."""
    x = np.asarray(check_finite(x, "x", (None, 3)), float)
    n = x.shape[0]
    first, mass = _merged(x, _weights(weights, n))
    values = _colours(color, n)
    p = to_screen(x[first], view)
    order = np.argsort(p[:, 2], kind="stable")  # nearer ones are painted later
    p, mass, first = p[order], mass[order], first[order]
    area = np.maximum(CLUSTER * mass, _dot(n) if size is None else size)
    opacity = 0.8 if n < 5000 else 0.5
    near = p[:, 2] >= 0
    drawn = []
    for side, zorder, shrink, fade in ((~near, 2, 0.55, 0.3), (near, 4, 1, 1)):
        paint: dict[str, Any] = {"color": values}
        if isinstance(values, np.ndarray):
            paint = {"c": values[first][side], "cmap": cmap}
            paint |= {"vmin": values.min(), "vmax": values.max()}
        dots = ax.scatter(*p[side, :2].T, s=shrink * area[side], lw=0, **paint)
        dots.set(alpha=fade * opacity, zorder=zorder, rasterized=n > 2000)
        drawn.append(dots)
    return drawn[0], drawn[1]


def curve_sphere(
    ax: Axes,
    x: ArrayLike,
    view: Values = VIEW,
    *,
    color: str = VERMILLION,
    label: str | None = None,
) -> None:
    """A curve through points of R³ on, around or inside the sphere: solid where seen,
    dashed and thinner behind the disc.

    **Arguments:** `x` (m, 3), in order; close a curve by repeating its first point."""
    p = to_screen(np.asarray(check_finite(x, "x", (None, 3)), float), view)
    near, far = _near_far(p)
    ax.plot(*far, color=color, lw=0.7, ls=(0, (2, 1.5)), alpha=0.7, zorder=2.5)
    ax.plot(*near, color=color, lw=1.2, zorder=5, label=label)


def snapshots(
    xs: ArrayLike,
    ts: Values,
    weights: ArrayLike | None = None,
    *,
    view: Values = VIEW,
    color: ArrayLike | str | None = None,
    cmap: str = "cividis",
    curves: Sequence[ArrayLike | None] | None = None,
    title: str = "",
) -> Picture:
    """A row of spheres, titled «t = …», four in a row at most; a second row follows.

    **Arguments:** `xs` (k, n, 3), k states; `ts` (k,), their times; `weights`, `color`,
    `cmap`, `view` as in `scatter_sphere`; `curves`: for each sphere points (m, 3) of a
    theory curve, or None (then the coordinate axes are left out); `title` of the whole. All
    tokens are drawn."""
    xs = np.asarray(check_finite(xs, "xs", (None, None, 3)), float)
    ts = np.asarray(check_finite(_array(ts), "ts", (xs.shape[0],)), float)
    if xs.shape[0] == 0:
        raise ValueError("Argument `xs` must hold at least one state, but holds none.")
    label = "x" if curves is None else ""  # a curve may run over the labels
    return _spheres(
        xs, _time_titles(ts), weights, view, color, cmap, curves, title, label
    )


def _spheres(xs, titles, weights, view, color, cmap, curves, title, label="x") -> Picture:
    k = len(titles)
    columns, rows = min(k, 4), -(-k // 4)
    curves = [None] * k if curves is None else [_curve(c) for c in curves]
    seen = [to_screen(c, view)[:, :2] for c in curves if c is not None]
    wide, high = np.abs(np.concatenate([*seen, np.zeros((1, 2))])).max(axis=0) + 0.03
    xlim, ylim = max(1.25, wide), (-max(1.04, high), max(1.3, high))
    width = _width(columns)
    panel = width / columns  # in inches
    height = rows * (panel * (ylim[1] - ylim[0]) / (2 * xlim) + 0.22)
    dot = _dot(xs.shape[1]) * (panel / (PAGE / 4)) ** 2
    with matplotlib.rc_context(STYLE):
        figure = _picture(width, height, title)
        for i in range(k):
            ax = figure.add_subplot(rows, columns, i + 1)
            sphere_axes(ax, view, label).set(xlim=(-xlim, xlim), ylim=ylim)
            scatter_sphere(ax, xs[i], weights, color, view, dot, cmap)
            if (curve := curves[i]) is not None:
                curve_sphere(ax, curve, view)
            ax.set_title(titles[i], pad=2)
    return figure


def _curve(x: ArrayLike | None) -> np.ndarray | None:
    return None if x is None else np.asarray(check_finite(x, "curves", (None, 3)), float)


# ------------------------------------------------------------------- the circle S¹


def scatter_circle(
    ax: Axes, x: ArrayLike, weights: ArrayLike | None = None, bins: int = 72
) -> tuple[PathCollection, PolyCollection]:
    """Tokens on S¹ as dots on a ring, and outside of it a histogram of the angle: the
    length of a bar is its density, the longest is 0.6.

    **Arguments:** `x` (n, 2); `weights` (n,), default equal.

    **Returns:** the dots (merged as in `scatter_sphere`) and the bars."""
    x = np.asarray(check_finite(x, "x", (None, 2)), float)
    w = _weights(weights, x.shape[0])
    height, edges = _angle_histogram(x, w, bins)
    ax.set_axis_off()
    ax.set_aspect("equal")
    ax.set(xlim=(-1.72, 1.72), ylim=(-1.72, 1.72))
    ax.add_patch(Circle((0, 0), 1, facecolor="none", edgecolor="#777777", lw=0.7))
    for h, v, text in ((1, 0, "0"), (0, 1, "π/2"), (-1, 0, "π"), (0, -1, "−π/2")):
        ax.text(0.78 * h, 0.78 * v, text, size=7, ha="center", va="center")
    outer = 1.06 + 0.6 * height / height.max()
    sectors = [_sector(a, b, r) for a, b, r in zip(edges, edges[1:], outer) if r > 1.06]
    bars = PolyCollection(sectors, facecolor=BLUE, alpha=0.45, lw=0)
    ax.add_collection(bars, autolim=False)
    first, mass = _merged(x, w)
    area = np.maximum(CLUSTER * mass, _dot(x.shape[0]))
    dots = ax.scatter(*x[first].T, s=area, color=BLUE, alpha=0.6, lw=0, zorder=3)
    dots.set_rasterized(x.shape[0] > 2000)
    return dots, bars


def _sector(left: float, right: float, outer: float) -> np.ndarray:
    s = np.linspace(left, right, 5)
    arc = np.stack([np.cos(s), np.sin(s)], 1)
    return np.concatenate([1.06 * arc, outer * arc[::-1]])


def histogram_circle(
    ax: Axes,
    x: ArrayLike,
    weights: ArrayLike | None = None,
    bins: int = 72,
    density: Density | None = None,
    density_label: str = "theory",
) -> StepPatch:
    """Histogram of the angle θ = atan2(x₂, x₁) ∈ [−π, π), as a density with respect to θ:
    the bars have total area 1.

    **Arguments:** `x` (n, d), of which the first two coordinates count (d > 2: the azimuth);
    `weights` (n,), default equal; `density`: the theory, a function of θ (m,), a law on S¹,
    or arrays (θ, values), drawn as a line named `density_label` in `ax.legend()`.

    **Returns:** the bars; their heights and edges are `bars.get_data()`."""
    x = np.asarray(check_finite(x, "x", (None, None)), float)
    if x.shape[1] < 2:
        raise ValueError(
            f"Argument `x` must have d ≥ 2 columns, but has shape {x.shape}. Make points "
            "of angles by `sphere.from_angles`."
        )
    height, edges = _angle_histogram(x, _weights(weights, x.shape[0]), bins)
    bars = ax.stairs(height, edges, fill=True, color=BLUE, alpha=0.45, lw=0)
    top = height.max()
    if density is not None:
        theta, values = _evaluated(density)
        ax.plot(theta, values, color=VERMILLION, lw=1.1, label=density_label)
        top = max(top, values.max())
    ax.set_xlim(-math.pi, math.pi)
    ax.set_ylim(0, 1.08 * top)
    ax.set_xticks([-math.pi, 0, math.pi], ["−π", "0", "π"])
    ax.set_xticks([-math.pi / 2, math.pi / 2], minor=True)
    ax.locator_params(axis="y", nbins=4)
    ax.set_xlabel("angle θ (rad)")
    ax.set_ylabel("density")
    return bars


def _angle_histogram(
    x: np.ndarray, weights: np.ndarray, bins: int
) -> tuple[np.ndarray, np.ndarray]:
    edges = np.linspace(-math.pi, math.pi, check_count(bins, "bins") + 1)
    theta = np.arctan2(x[:, 1], x[:, 0])
    theta = np.where(theta >= math.pi, -math.pi, theta)  # π is −π
    return np.histogram(theta, edges, weights=weights, density=True)


def _evaluated(density: Density) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(density, tuple):
        theta = np.asarray(check_finite(density[0], "density[0]", (None,)), float)
        return theta, np.asarray(check_finite(density[1], "density[1]", theta.shape))
    theta = np.linspace(-math.pi, math.pi, 721)
    if isinstance(density, AbstractLaw):
        values = density.density(from_angles(theta))
    else:
        values = density(theta)
    values = np.broadcast_to(np.asarray(values, float), np.shape(values) or theta.shape)
    return theta, np.asarray(check_finite(values, "density", theta.shape), float)


# ------------------------------------------------------------------- whole pictures


class _States(NamedTuple):
    xs: np.ndarray  # (t, n, d)
    ts: np.ndarray  # (t,)
    titles: list[str]
    weights: np.ndarray  # (n,)


def plot(
    run: Trajectory | Empirical | ArrayLike,
    times: Values | None = None,
    *,
    ts: Values | None = None,
    view: Values = VIEW,
    theory: Theory | None = None,
    color: ArrayLike | str | None = None,
    cmap: str = "cividis",
) -> Picture:
    """The general picture of a run, or of one state.

    - d = 2: up to four rings with histograms of the angle; below, if several times are
      given, the density in the plane of time and angle.
    - d = 3: up to four spheres.
    - d > 3: the same after projection on the three principal axes of the last state, those
      of its second moment Σ wᵢ xᵢxᵢᵀ; the title says so. Points lie inside the ball.

    **Arguments:**

    - `run`: a `Trajectory`, an `Empirical`, or an array (n, d) or (t, n, d) of tokens.
    - `times`: up to four times to show; the saved ones nearest to them are. Default: four
        evenly spaced.
    - `ts`: the times (t,) of an array (t, n, d); without them its states are numbered.
    - `theory`: function (t, θ) ↦ density of the angle (d = 2), or of the azimuth (d = 3:
        drawn as the curve (1 + c·density)(cos θ, sin θ, 0) around the sphere, with one c for
        all times), for θ (m,).
    - `color`, `cmap`, `view`: as in `scatter_sphere`, for d ≥ 3.

    More than 20000 tokens are thinned at random (always in the same way) on rings and
    spheres, which the title says; histograms count all."""
    states = _read(run, ts)
    shown = _chosen(states, times)
    n, d = states.xs.shape[1:]
    if theory is not None and d > 3:
        raise ValueError(
            f"Argument `theory` must be left out for d > 3, but d = {d}: the picture is a "
            "projection."
        )
    keep, colours = _thinned(n, color)
    notes = [f"{len(keep)} of {n} tokens drawn"] if len(keep) < n else []
    if d == 2:
        return _rings(states, shown, keep, theory, ", ".join(notes))
    space, note = _principal(states)
    xs, w = space[shown][:, keep], states.weights[keep]
    titles = [states.titles[i] for i in shown]
    curves = None if theory is None else _lifted(theory, states.ts[shown])
    note += ["red: theory, density of the azimuth"] * (theory is not None)
    title = ", ".join(note + notes)
    label = "p" if d > 3 else "x" if theory is None else ""  # the curve needs the room
    return _spheres(xs, titles, w, view, colours, cmap, curves, title, label)


def _rings(states: _States, shown, keep, theory, title) -> Picture:
    k, raster = len(shown), len(states.ts) > 1
    width = _width(k)
    heights = [min(width / k, 2.2) + 1.5, 1.9 * raster]
    with matplotlib.rc_context(STYLE):
        figure = _picture(width, sum(heights), title)
        upper = lower = figure
        if raster:
            upper, lower = figure.subfigures(2, 1, height_ratios=heights)  # pyright: ignore
        grid = upper.add_gridspec(2, k, height_ratios=[heights[0] - 1.5, 1.2])
        for column, i in enumerate(shown):
            ax = upper.add_subplot(grid[0, column])
            scatter_circle(ax, states.xs[i, keep], states.weights[keep])
            ax.set_title(states.titles[i], pad=2)
            ax = upper.add_subplot(grid[1, column])
            density = None if theory is None else _at(theory, float(states.ts[i]))
            histogram_circle(ax, states.xs[i], states.weights, density=density)
            if column:
                ax.set_ylabel("")
            elif theory is not None:
                spot: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 0.97)}
                ax.legend(frameon=False, handlelength=1, borderpad=0, **spot)
        if raster:
            _space_time(lower, states, shown)
    return figure


def _space_time(figure: FigureBase, states: _States, shown: np.ndarray) -> None:
    """Density of the angle at all saved times (at most 800), on a logarithmic scale; marks
    on top at the times shown."""
    ax = figure.add_subplot()
    pick = np.unique(np.linspace(0, len(states.ts) - 1, 800).round().astype(int))
    ts = states.ts[pick]
    columns = [_angle_histogram(states.xs[i], states.weights, 144) for i in pick]
    height = np.stack([h for h, _ in columns], axis=1)
    borders = np.concatenate([ts[:1], (ts[1:] + ts[:-1]) / 2, ts[-1:]])
    low = max(0.1 / (2 * math.pi), height.max() / 1e4)
    mesh = ax.pcolormesh(borders, columns[0][1], np.maximum(height, low), cmap="Blues")
    mesh.set(norm=LogNorm(low, height.max()), rasterized=True)
    top: dict[str, Any] = {"transform": ax.get_xaxis_transform(), "clip_on": False}
    times = states.ts[shown]
    ax.plot(times, np.full(len(times), 1.05), "v", color="#333333", ms=3.5, **top)
    ax.set_yticks([-math.pi, 0, math.pi], ["−π", "0", "π"])
    ax.set_ylabel("angle θ (rad)")
    ax.set_xlabel("frame" if states.titles[0].startswith("frame") else "t")
    bar = figure.colorbar(mesh, ax=ax, label="density", pad=0.01, aspect=12)
    bar.ax.yaxis.set_minor_formatter(NullFormatter())


def animate(
    run: Trajectory | Empirical | ArrayLike,
    path: str | os.PathLike,
    fps: ArrayLike = 20,
    view: Values = VIEW,
    spin: ArrayLike = 0.0,
    *,
    color: ArrayLike | str | None = None,
    cmap: str = "cividis",
) -> Path:
    """Write a GIF with one frame for each saved time, the time in its title: a ring with
    its histogram for d = 2, a sphere otherwise (for d > 3 projected as in `plot`).

    **Arguments:** `run`, `view`, `color`, `cmap` as in `plot`; `path` ends in .gif and is
    written whole or not at all; `fps`: frames a second; `spin`: degrees by which the camera
    moves east per frame (d ≥ 3). **Returns:** the path."""
    path = Path(path)
    if path.suffix != ".gif":
        raise ValueError(f"Argument `path` must end in .gif, but is {str(path)!r}.")
    fps = float(check_scalar(fps, "fps", minimum=0.0, strict=True))
    turn = np.array([float(check_scalar(spin, "spin")), 0.0])
    view = _view(view)
    states = _read(run, None)
    n, d = states.xs.shape[1:]
    keep, colours = _thinned(n, color)
    xs, w = _principal(states)[0][:, keep], states.weights[keep]
    files.check_folder(path.parent, "path")
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE), files.atomic(path) as draft:
        figure = Picture(figsize=(COLUMN, COLUMN))
        writer = PillowWriter(fps=fps)  # pyright: ignore[reportArgumentType]
        writer.setup(figure, str(draft), dpi=120)
        for i, title in enumerate(states.titles):
            figure.clear()
            ax = figure.add_axes((0.0, 0.0, 1.0, 0.93))
            ax.set_title(title, pad=2)
            if d == 2:
                scatter_circle(ax, xs[i], w)
            else:
                sphere_axes(ax, view + i * turn, "x" if d == 3 else "p")
                dot = 2 * _dot(len(keep))
                scatter_sphere(ax, xs[i], w, colours, view + i * turn, dot, cmap)
            writer.grab_frame()
        writer.finish()
    return path


def save(figure: Figure, path: str | os.PathLike) -> tuple[Path, Path]:
    """Write `figure` as `path`.png (300 dpi) and `path`.pdf, both whole or not at all, and
    without dates: the same picture made again gives the same bytes.

    **Arguments:** `path` without suffix. **Returns:** the two paths."""
    path = Path(path)
    if path.suffix in (".png", ".pdf"):
        raise ValueError(
            f"Argument `path` must come without suffix, but is {str(path)!r}: .png and .pdf "
            "are both written."
        )
    files.check_folder(path.parent, "path")
    path.parent.mkdir(parents=True, exist_ok=True)
    png, pdf = (path.parent / (path.name + suffix) for suffix in (".png", ".pdf"))
    with (
        matplotlib.rc_context(STYLE),
        files.atomic(png) as draft_png,
        files.atomic(pdf) as draft_pdf,
    ):
        figure.savefig(draft_png, dpi=300)
        figure.savefig(draft_pdf, dpi=300, metadata={"CreationDate": None})
    return png, pdf


# ------------------------------------------------------------------- parts


def shade(value: float) -> Any:
    """A colour of the scale cividis, 0 (dark blue) to 1 (yellow)."""
    return matplotlib.colormaps["cividis"](value)


def _width(panels: int) -> float:
    return COLUMN if panels <= 2 else PAGE * panels / 4


def _picture(width: float, height: float, title: str) -> Picture:
    height += 0.2 * bool(title)
    figure = Picture(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02)  # pyright: ignore
    if title:
        figure.suptitle(title)
    return figure


def _array(values: Any) -> Any:
    return np.asarray(values) if isinstance(values, (list, tuple)) else values


def _view(view: Values) -> np.ndarray:
    return np.asarray(check_finite(_array(view), "view", (2,)), float)


def _weights(weights: ArrayLike | None, n: int) -> np.ndarray:
    if n == 0:
        raise ValueError("Argument `x` must hold at least one token, but holds none.")
    if weights is None:
        return np.full(n, 1 / n)
    return np.asarray(check_weights(weights, "weights", n), float)


def _colours(color: ArrayLike | str | None, n: int) -> np.ndarray | str:
    """One colour, or finite numbers (n,)."""
    if color is None or isinstance(color, str):
        return BLUE if color is None else color
    return np.asarray(check_finite(color, "color", (n,)), float)


def _dot(n: int) -> float:
    """Area of a dot in square points: n of them cover a quarter of a sphere of 1.7 inches."""
    return min(6.0, max(0.3, 3000 / n))


def _merged(x: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens in one cell of side 0.01 taken together: the first of each and their mass."""
    cells = np.round(x / 0.01).astype(int)
    _, first, inverse = np.unique(cells, axis=0, return_index=True, return_inverse=True)
    return first, np.bincount(inverse.ravel(), weights, len(first))


def _thinned(n: int, color: ArrayLike | str | None) -> tuple[np.ndarray, Any]:
    """Indices of the tokens to draw, and their colours."""
    keep, values = np.arange(n), _colours(color, n)
    if n > MAX_TOKENS:
        keep = np.sort(np.random.default_rng(0).choice(n, MAX_TOKENS, replace=False))
    return keep, values[keep] if isinstance(values, np.ndarray) else values


def _time_titles(ts: np.ndarray) -> list[str]:
    return [f"t = {t:.4g}".replace("-", "−") for t in ts]


def _read(run: Any, ts: Any) -> _States:
    """Tokens, times, titles and weights of whatever `plot` accepts."""
    weights, single = None, False
    if isinstance(run, Trajectory):
        if ts is not None:
            raise ValueError("Argument `ts` must be left out for a `Trajectory`.")
        xs, ts, weights = (np.asarray(v) for v in (run.xs, run.ts, run.weights))
        if ts.ndim == 1:  # an unfinished run has times at infinity
            xs, ts = xs[np.isfinite(ts)], ts[np.isfinite(ts)]
    elif isinstance(run, Empirical):
        xs, weights, single = np.asarray(run.points)[None], run.weights, True
    else:
        xs = np.asarray(run)
        single = xs.ndim == 2
        xs = xs[None] if single else xs
    if xs.ndim != 3 or len(xs) == 0:
        raise ValueError(
            "Argument `run` must be one `Trajectory`, an `Empirical`, or tokens of shape "
            f"(n, d) or (t, n, d), but has tokens of shape {xs.shape}."
        )
    check_tokens(xs.reshape(-1, xs.shape[2]), "run", tol=1e-3)
    weights = _weights(weights, xs.shape[1])
    if ts is None:
        titles = [""] if single else [f"frame {i}" for i in range(len(xs))]
        return _States(xs.astype(float), np.arange(float(len(xs))), titles, weights)
    ts = np.asarray(check_times(_array(ts), "ts"), float)
    if ts.shape != xs.shape[:1]:
        raise ValueError(
            f"Argument `ts` must have shape ({len(xs)},), one time for each state, but has "
            f"shape {ts.shape}."
        )
    return _States(xs.astype(float), ts, _time_titles(ts), weights)


def _chosen(states: _States, times: Any) -> np.ndarray:
    """Indices of the saved states nearest to `times`, without repetition."""
    ts = states.ts
    if times is None:
        times = np.linspace(ts[0], ts[-1], 4) if len(ts) > 4 else ts
    times = np.asarray(check_times(_array(times), "times"), float)
    if len(times) > 4:
        raise ValueError(
            f"Argument `times` must hold 1 to 4 times, but holds {len(times)}. Use "
            "`snapshots` for more."
        )
    slack = 1e-6 * max(1.0, abs(ts[0]), abs(ts[-1]))
    for t in times:
        if not ts[0] - slack <= t <= ts[-1] + slack:
            raise ValueError(
                f"Argument `times` must lie within [{ts[0]:g}, {ts[-1]:g}], the times of the "
                f"run, but holds {t:g}."
            )
    return np.unique(np.argmin(np.abs(ts[None] - times[:, None]), axis=1))


def _principal(states: _States) -> tuple[np.ndarray, list[str]]:
    """States as they are for d ≤ 3, else on the principal axes of the last one."""
    xs, d = states.xs, states.xs.shape[2]
    if d <= 3:
        return xs, []
    last = xs[-1]
    moments, axes = np.linalg.eigh(last.T @ (states.weights[:, None] * last))
    axes = axes[:, :-4:-1]
    axes = axes * np.sign(axes[np.argmax(np.abs(axes), axis=0), range(3)])
    share = 100 * moments[-3:].sum() / moments.sum()
    axes_of = f"d = {d}: principal axes p₁, p₂, p₃ of the last state"
    note = f"{axes_of}, {share:.0f} % of its second moment"
    return xs @ axes, [note]


def _at(theory: Theory, t: float) -> Callable[[np.ndarray], Any]:
    return lambda theta: theory(t, theta)


def _lifted(theory: Theory, ts: np.ndarray) -> list[np.ndarray]:
    """The theory as curves around the equator, the highest reaching 1.4."""
    pairs = [_evaluated(_at(theory, float(t))) for t in ts]
    top = max(values.max() for _, values in pairs)
    curves = []
    for theta, values in pairs:
        r = 1.0 + 0.4 * values / top
        curves.append(np.stack([r * np.cos(theta), r * np.sin(theta), 0 * r], 1))
    return curves


@contextlib.contextmanager
def blank(width: float | int, height: float | int, title: str = "") -> Iterator[Picture]:
    """An empty picture of the given size in inches, in the library's style while the block
    draws into it."""
    with matplotlib.rc_context(STYLE):
        yield _picture(width, height, title)
