"""Equispaced grids on S¹ and S² that carry functions of few modes: from scattered tokens to
weights of the nodes, through a zonal kernel, and from nodes to scattered points.

On S¹ the P nodes are φⱼ = 2πj/P. On S² they are θᵢ = (i + ½)2π/P, i < P/2, and φⱼ: a
polynomial of degree ≤ P/2 − 1 on the sphere is a trigonometric polynomial of that degree on
the torus (θ, φ), by f(−θ, φ) = f(θ, φ + π). Arrays of values have the shape (P, c) or
(P/2, P, c)."""

import abc
import dataclasses
import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from ..matrices import matmul
from .sums import in_blocks
from .windows import Window, refine, refinement

_BLOCK = 2**16  # points at a time: O(1) memory for their windows
_PIECE = 2**12


@dataclasses.dataclass(frozen=True)
class AbstractChart(abc.ABC):
    """A sphere with grids of P nodes to a circle (P even), and the window that reads them.

    Tables, which are read around scattered points, are flat: those of different P can be
    cut to one length. `read` and `spread` accept a P that is known only while running."""

    window: Window

    @abc.abstractmethod
    def shape(self, P: int) -> tuple[int, ...]:
        """Of the nodes."""

    @abc.abstractmethod
    def nodes(self, P: int) -> np.ndarray:
        """Unit vectors, `shape` + (d,)."""

    @abc.abstractmethod
    def table(self, f: Array) -> Array:
        """What is read around points (entries, c), from values at the nodes: linear."""

    @abc.abstractmethod
    def read(self, table: Array, x: Array, P: int | Array) -> Array:
        """Σ ψ table at unit vectors x (m, d): (m, c)."""

    @abc.abstractmethod
    def spread(
        self, total: "_Total", x: Array, values: Array, P: int | Array
    ) -> "_Total":
        """`total` plus the transpose of `read` at x, applied to values (m,)."""

    @abc.abstractmethod
    def zonal(self, kernel: Callable[[Array], Array], v: Array) -> Array:
        """Σ_s k(1 − ⟨x, y_s⟩) v_s at all nodes x, for v of shape `shape` + (c,)."""

    @abc.abstractmethod
    def entries(self, P: int) -> int:
        """Length of a table."""

    def interpolate(self, table: Array, x: Array, P: int | Array) -> Array:
        """`read` in blocks."""
        if x.shape[0] <= _BLOCK:
            return self.read(table, x, P)
        read = jax.checkpoint(lambda rows: self.read(table, rows, P))
        blocks = lax.map(read, in_blocks(x, _BLOCK))
        return blocks.reshape(-1, table.shape[-1])[: x.shape[0]]

    def gather(self, y: Array, w: Array, P: int | Array, entries: int) -> Array:
        """The tokens y of weights w, spread: the transpose of `interpolate`, in blocks.
        Differentiable in y and w."""
        sizes = (_BLOCK,) if y.dtype == jnp.float64 else (_BLOCK, _PIECE)
        zero = _Total.zero(entries, w)

        def spread(y, w, sizes):
            if not sizes:
                return self.spread(zero, y, w, P)
            size, *rest = sizes
            if y.shape[0] <= size:
                return spread(y, w, rest)
            part = jax.checkpoint(lambda y, w: spread(y, w, rest))
            rows = in_blocks(y, size), in_blocks(w, size)
            return lax.scan(lambda t, r: (t.plus(part(*r)), None), zero, rows)[0]

        return spread(y, w, sizes).value()

    def weights(self, spread: Array, P: int) -> Array:
        """Weights of the nodes that integrate like what was spread: the transpose of
        `table`."""
        one = jax.ShapeDtypeStruct((*self.shape(P), 1), spread.dtype)
        return jax.linear_transpose(self.table, one)(spread[:, None])[0][..., 0]


def _from_minus(f: Array, before: int, after: int) -> Array:
    """Rows −before … after − 1 of a periodic f."""
    return jnp.concatenate([f[f.shape[0] - before :], f[:after]])


def _taken(table: Array, first: Array, width: int) -> Array:
    """Rows first … first + width − 1 of the table (r, c), for each entry of `first`."""
    numbers = lax.GatherDimensionNumbers((1, 2), (), (0,))
    sizes = (width, table.shape[1])
    return lax.gather(
        table,
        first[:, None],
        numbers,
        sizes,
        mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )


class _Total(eqx.Module):
    """A table of sums of many terms. In float32 long sums of equal terms drift by n ε/4, so
    terms are split: multiples of `quantum`, whose sums are exact as long as all of them
    together are at most 2²³ of it, and the small rests, summed in short pieces."""

    table: Array
    rests: Array | None
    quantum: Array | None

    @classmethod
    def zero(cls, entries: int, w: Array) -> "_Total":
        """No sum yet, of terms that are parts of the weights w ≥ 0."""
        zero = jnp.zeros(entries, w.dtype)
        if w.dtype == jnp.float64:
            return cls(zero, None, None)
        mass = lax.stop_gradient(jnp.sum(w))
        power = jnp.ceil(jnp.log2(jnp.where(mass > 0, mass, 1))) - 22
        return cls(zero, zero, jnp.exp2(power))

    def add(self, first: Array, rows: Array) -> "_Total":
        """With `rows` (m, w) added from the entries `first` on."""
        if self.rests is None or self.quantum is None:
            return _Total(_added(self.table, first, rows), None, None)
        whole = jnp.round(rows / self.quantum) * self.quantum
        rests = _added(self.rests, first, rows - whole)
        return _Total(_added(self.table, first, whole), rests, self.quantum)

    def plus(self, other: "_Total") -> "_Total":
        tables = (self.table, self.rests), (other.table, other.rests)
        table, rests = jax.tree.map(jnp.add, *tables)
        return _Total(table, rests, self.quantum)

    def value(self) -> Array:
        return self.table if self.rests is None else self.table + self.rests


def _added(table: Array, first: Array, rows: Array) -> Array:
    """The table (r,) with `rows` (m, w) added from entry `first` on."""
    numbers = lax.ScatterDimensionNumbers((1,), (), (0,))
    return lax.scatter_add(
        table,
        first[:, None],
        rows,
        numbers,
        mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )


def _angle(east: Array, north: Array) -> Array:
    """atan2 in [−π, π], of derivative 0 at the origin."""
    origin = (east == 0) & (north == 0)
    return jnp.arctan2(jnp.where(origin, 0, north), jnp.where(origin, 1, east))


def _scale(P: int | Array, x: Array) -> Array:
    """Angles to positions on the refined grid, in the dtype of x."""
    return jnp.asarray(P, x.dtype) / math.pi


class Circle(AbstractChart):
    """S¹."""

    def shape(self, P: int) -> tuple[int, ...]:
        return (P,)

    def nodes(self, P: int) -> np.ndarray:
        phi = 2 * math.pi / P * np.arange(P)
        return np.stack([np.cos(phi), np.sin(phi)], axis=-1)

    def table(self, f: Array) -> Array:
        margin = f.shape[0] + self.window.width
        return _from_minus(refine(f, self.window), margin, margin)

    def entries(self, P: int) -> int:
        return 2 * (P + self.window.width)

    def _position(self, x: Array, P: int | Array) -> tuple[Array, Array]:
        """Where the window begins in the table, which begins at φ = −π − wπ/P; its values."""
        first, psi = self.window.weights(_angle(x[:, 0], x[:, 1]) * _scale(P, x))
        return first + (P + self.window.width), psi

    def read(self, table: Array, x: Array, P: int | Array) -> Array:
        first, psi = self._position(x, P)

        def add(total, entry):
            k, factor = entry
            return total + factor[:, None] * _taken(table, first + k, 1)[:, 0], None

        zero = jnp.zeros((x.shape[0], table.shape[1]), table.dtype)
        steps = jnp.arange(self.window.width, dtype=first.dtype), psi.T
        return lax.scan(add, zero, steps)[0]

    def spread(self, total: _Total, x: Array, values: Array, P: int | Array) -> _Total:
        first, psi = self._position(x, P)
        return total.add(first, psi * values[:, None])

    def zonal(self, kernel: Callable[[Array], Array], v: Array) -> Array:
        P = v.shape[0]
        gap = 2 * np.sin(math.pi / P * np.arange(P)) ** 2
        modes = jnp.fft.rfft(kernel(jnp.asarray(gap, v.dtype)))[:, None]
        return jnp.fft.irfft(modes * jnp.fft.rfft(v, axis=0), n=P, axis=0)


class Sphere(AbstractChart):
    """S²."""

    def shape(self, P: int) -> tuple[int, ...]:
        return (P // 2, P)

    def nodes(self, P: int) -> np.ndarray:
        theta = np.broadcast_to(_latitudes(P)[:, None], self.shape(P))
        phi = np.broadcast_to(2 * math.pi / P * np.arange(P), self.shape(P))
        east, north = np.sin(theta) * np.cos(phi), np.sin(theta) * np.sin(phi)
        return np.stack([east, north, np.cos(theta)], axis=-1)

    def table(self, f: Array) -> Array:
        P, w = f.shape[1], self.window.width
        torus = jnp.concatenate([f, jnp.roll(f[::-1], P // 2, axis=1)])
        down = jnp.asarray(refinement(P, self.window, w + 1, P + w), f.dtype)
        along = jnp.asarray(refinement(P, self.window, P + w, P + w), f.dtype)
        rows = jnp.einsum("ri,ijc->rjc", down, torus, precision="highest")
        table = jnp.einsum("sj,rjc->rsc", along, rows, precision="highest")
        return table.reshape(-1, f.shape[-1])

    def entries(self, P: int) -> int:
        w = self.window.width
        return (P + 2 * w + 1) * 2 * (P + w)

    def _position(
        self, x: Array, P: int | Array
    ) -> tuple[Array, int | Array, Array, Array]:
        """Where the window begins in the table, how far its rows are apart, its factors. The
        table begins at θ = −wπ/P and φ = −π − wπ/P."""
        w = self.window.width
        square = x[:, 0] ** 2 + x[:, 1] ** 2
        radius = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
        row, down = self.window.weights(_angle(x[:, 2], radius) * _scale(P, x) + w)
        column, along = self.window.weights(_angle(x[:, 0], x[:, 1]) * _scale(P, x))
        stride = 2 * (P + w)
        return row * stride + column + (P + w), stride, down, along

    def read(self, table: Array, x: Array, P: int | Array) -> Array:
        first, stride, down, along = self._position(x, P)

        def add(total, entry):
            k, factor = entry
            values = _taken(table, first + k * stride, self.window.width)
            line = jnp.sum(values * along[..., None], axis=1)
            return total + factor[:, None] * line, None

        zero = jnp.zeros((x.shape[0], table.shape[1]), table.dtype)
        steps = jnp.arange(self.window.width, dtype=first.dtype), down.T
        return lax.scan(add, zero, steps)[0]

    def spread(self, total: _Total, x: Array, values: Array, P: int | Array) -> _Total:
        first, stride, down, along = self._position(x, P)
        along = along * values[:, None]

        def add(total, entry):
            k, factor = entry
            return total.add(first + k * stride, factor[:, None] * along), None

        steps = jnp.arange(self.window.width, dtype=first.dtype), down.T
        return lax.scan(add, total, steps)[0]

    def zonal(self, kernel: Callable[[Array], Array], v: Array) -> Array:
        # 1 − ⟨x, y⟩ = 2 sin²((θ − θ')/2) + 2 sin θ sin θ' sin²((φ − φ')/2), without cancellation.
        # Northern x only: the kernel is the same for x and y mirrored at the equator.
        P = v.shape[1]
        theta = _latitudes(P)
        north = theta[: (P // 2 + 1) // 2]
        apart = 2 * np.sin((north[:, None] - theta) / 2) ** 2
        both = np.sin(north)[:, None] * np.sin(theta)
        around = 2 * np.sin(math.pi / P * np.arange(P)) ** 2
        apart, both, around = (jnp.asarray(a, v.dtype) for a in (apart, both, around))
        modes = jnp.fft.rfft(kernel(apart[..., None] + both[..., None] * around)).real
        waves = jnp.fft.rfft(jnp.concatenate([v, v[::-1]], axis=-1), axis=1)
        parts = jnp.stack([waves.real, waves.imag], axis=-1)
        sums = jnp.einsum("abm,bmcr->amcr", modes, parts, precision="highest")
        f = jnp.fft.irfft(lax.complex(sums[..., 0], sums[..., 1]), n=P, axis=1)
        upper, lower = jnp.split(f, 2, axis=-1)
        return jnp.concatenate([upper, lower[: P // 4][::-1]])


def _latitudes(P: int) -> np.ndarray:
    return 2 * math.pi / P * (np.arange(P // 2) + 0.5)


# Axes in general position: tokens are seldom near any, and never near all.
_AXES = np.array(
    [
        [
            math.sqrt(1 - z * z) * math.cos(2.4 * i + 0.3),
            math.sqrt(1 - z * z) * math.sin(2.4 * i + 0.3),
            z,
        ]
        for i, z in enumerate(np.linspace(0.03, 0.97, 12))
    ]
)


def away_from_poles(*points: Array) -> Array:
    """A rotation (y @ turn are the new coordinates) whose third axis stays away from the
    points: at a pole of the grid derivatives in a token lose digits."""
    axes = jnp.asarray(_AXES.T, points[0].dtype)

    def nearest(near, rows):
        return jnp.maximum(near, jnp.max(jnp.abs(matmul(rows, axes)), axis=0)), None

    near = jnp.zeros(axes.shape[1], axes.dtype)
    for y in lax.stop_gradient(points):
        near = lax.scan(nearest, near, in_blocks(y, _BLOCK))[0]
    frames = []
    for axis in _AXES:
        first = np.cross(axis, np.eye(3)[int(np.argmin(np.abs(axis)))])
        first /= np.linalg.norm(first)
        frames.append(np.stack([first, np.cross(axis, first), axis], axis=1))
    return jnp.asarray(np.stack(frames), axes.dtype)[jnp.argmin(near)]
