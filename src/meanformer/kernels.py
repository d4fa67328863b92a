"""Interaction through a kernel W of the angle, without normaliser."""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from . import harmonics, sphere
from .attention import AbstractField, check_partition
from .checks import check_kernel, refuse
from .matrices import matmul
from .measures import Empirical
from .partition import AbstractPartition, Auto, Blockwise, Dense, Harmonic, in_blocks
from .partition.grids import Circle, Sphere, away_from_poles
from .partition.windows import window


class KernelInteraction(AbstractField):
    """The gradient flow of the interaction energy ½∬W(⟨x,y⟩) dµ dµ:

        χ[µ](x) = ∇(W∗µ)(x) = P_x ∫ W'(⟨x,y⟩) y dµ(y),

    tokens climb W∗µ. W(q) = e^{βq}/β is `UnnormalizedSelfAttention` with Q = K = V = I.

    **Arguments:**

    - `W`: a jax function of an array of cosines, elementwise, differentiable on [−1, 1]; −W for
        repulsion. Arrays of a W that is a module are leaves.
    - `d`: dimension of the tokens, or None (default) for any.
    - `partition`: `Dense()`, `Blockwise()`: O(m n d) time, exact to rounding. `Harmonic(tol)`,
        d = 2, 3: W' through its Funk–Hecke eigenvalues λ_l, O(m + n) time and memory, error of
        ∫W'y dµ at most tol · max|W'|; refused (at run time) where the eigenvalues have not
        fallen that far at degree 511 (d = 2) or 127 (d = 3), or `max_modes`. `Auto()`
        (default): `Harmonic` from 2048 (d = 2) or 8192 (d = 3) tokens on for a W that is so
        smooth, else all pairs.

    Derivatives of any order in tokens (tangential), weights and arrays of W. **Raises:**
    `ValueError` for a W that is no function, or a bad partition. **Source:** *metastable*,
    Eq. (3) and Sec. 4."""

    W: Callable[[Array], Array]
    partition: AbstractPartition
    dim: int | None = eqx.field(static=True)

    def __init__(
        self,
        W: Callable[[Array], Array],
        d: int | None = None,
        partition: AbstractPartition | None = None,
    ):
        self.W = check_kernel(W)
        self.dim = None if d is None else sphere.check_dimension(d)
        self.partition = check_partition(partition)

    @property
    def d(self) -> int | None:
        return self.dim

    @eqx.filter_jit
    def drive(self, x: Float[Array, "m d"], mu: Empirical) -> Float[Array, "m d"]:
        how, (m, d) = self.partition, x.shape
        if isinstance(how, Auto):
            many = min(m, mu.n) >= {2: 2048, 3: 8192}.get(d, np.inf)
            if not many or how.exact:
                return _pairs(self.W, x, mu, 1024)
            series = _Series(self.W, Harmonic(how.tol), d, x.dtype)
            return jax.lax.cond(
                series.short,
                lambda x, mu: _pairs(self.W, x, mu, 1024),
                lambda x, mu: series.sums(x, mu),
                x,
                mu,
            )
        if isinstance(how, Harmonic):
            series = _Series(self.W, how, d, x.dtype)
            return refuse(series.sums(x, mu), series.short, _NOT_SMOOTH)
        if isinstance(how, (Dense, Blockwise)):
            return _pairs(self.W, x, mu, how.block if isinstance(how, Blockwise) else m)
        raise ValueError(
            "Argument `partition` must be `Auto()`, `Dense()`, `Blockwise()` or `Harmonic()` "
            f"for a kernel, but is {how!r}. Leave it out."
        )


_NOT_SMOOTH = (
    "Argument `W` must be so smooth that the eigenvalues of W' have fallen to `tol` at the last "
    "degree that `Harmonic` may use, but they have not. Use `Blockwise()`, a larger `tol` or "
    "`max_modes`, or a smoother W."
)


def _slope(W: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """W', elementwise."""
    return lambda q: jax.jvp(W, (q,), (jnp.ones_like(q),))[1]


def _pairs(W: Callable, x: Array, mu: Empirical, block: int) -> Array:
    """∫ W'(⟨x,y⟩) y dµ(y) over all pairs, in tiles; reverse mode recomputes them."""
    slope = _slope(W)
    tiles = in_blocks(mu.points, block), in_blocks(mu.weights, block)

    @jax.checkpoint
    def tile(x, y, w):
        return matmul(slope(matmul(x, y.T)), w[:, None] * y)

    def row(x):
        add = lambda total, other: (total + tile(x, *other), None)  # noqa: E731
        return jax.lax.scan(add, jnp.zeros_like(x), tiles)[0]

    rows = jax.lax.map(row, in_blocks(x, block))
    return rows.reshape(-1, x.shape[1])[: x.shape[0]]


class _Series:
    """∫ W'(⟨x,y⟩) y dµ(y) on S¹ or S² by the harmonics of W', as many as `tol` asks for;
    `short`, whether there are too few."""

    def __init__(self, W: Callable, how: Harmonic, d: int, dtype: Any):
        self.slope, tol = _slope(W), how.tolerance(dtype)
        self.ladder = tuple(P for P in how.ladder(d) if P <= 1024)
        self.chart = (Circle if d == 2 else Sphere)(window(1e-3 * tol))
        top = self.ladder[-1]
        # Σ |λ_l| dim_l/|S^{d−1}| bounds W' on [−1, 1], and beyond a degree what is cut off.
        sizes = harmonics.harmonic_dimension(d, top + 1) / sphere.area(d)
        terms = harmonics.funk_hecke(self.slope, d, top) * sizes
        beyond = jnp.cumsum(jnp.abs(terms)[::-1])[::-1]
        values = self.slope(jnp.linspace(-1, 1, 257))
        largest = jnp.max(jnp.abs(values))
        # A spike between the nodes of the quadrature shows at its ends: P_l(±1) = (±1)^l.
        parity = (-1.0) ** np.arange(top + 1)
        ends = jnp.stack([jnp.sum(terms * parity), jnp.sum(terms)])
        missed = jnp.max(jnp.abs(ends - values[jnp.array([0, -1])]))
        # One degree fewer: the harmonics are those of W' times y.
        short = jnp.stack([beyond[P // 2 - 1] > tol / 8 * largest for P in self.ladder])
        self.short = jax.lax.stop_gradient(short[-1] | ~(missed <= 4 * tol * largest))
        self.rung = jnp.minimum(jnp.sum(short), len(self.ladder) - 1)

    def sums(self, x: Array, mu: Empirical) -> Array:
        chart, ladder, d = self.chart, self.ladder, x.shape[1]
        turn = jnp.eye(d, dtype=x.dtype) if d == 2 else away_from_poles(mu.points, x)
        P = jnp.asarray(ladder, jnp.int32)[self.rung]
        y = matmul(mu.points, turn)
        spread = chart.gather(y, mu.weights, P, chart.entries(ladder[-1]))

        def on_grid(P, spread):
            W = chart.weights(spread[: chart.entries(P)], P)
            v = W[..., None] * jnp.asarray(chart.nodes(P), W.dtype)
            table = chart.table(chart.zonal(lambda gap: self.slope(1 - gap), v))
            return jnp.pad(
                table, ((0, chart.entries(ladder[-1]) - table.shape[0]), (0, 0))
            )

        branches = [functools.partial(on_grid, P) for P in ladder]
        table = jax.lax.switch(self.rung, branches, spread)
        return matmul(chart.interpolate(table, matmul(x, turn), P), turn.T)
