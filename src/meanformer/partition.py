"""The one primitive: the log-partition of a measure and its gradient, the barycentre.

    L_µ(u) = log ∫ e^{⟨u,y⟩} dµ(y),      ∇L_µ(u) = ∫ y e^{⟨u,y⟩} dµ / ∫ e^{⟨u,y⟩} dµ.

Every vector field of the library is made of these two. A partition is a way to compute
them, exact to rounding here: `Dense` (all pairs at once), `Blockwise` (tile by tile, in
constant memory), `Auto` (chooses by size).

**Stability.** Exponents are shifted by |u|, an upper bound of ⟨u,y⟩ that needs no pass
over the pairs. Only where a shifted sum would underflow (no token near the direction of
u) are the maxima of the rows taken. No overflow and no NaN, for |u| up to 1e6 in float32.

**Derivatives.** Forward, reverse, and of any order: no custom rules; `Blockwise`
recomputes its tiles instead of storing n² numbers.
"""

import abc
import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .checks import check_count
from .matrices import matmul
from .measures import Empirical


class AbstractPartition(eqx.Module):
    """A way to compute L_µ and ∇L_µ at the points u = x A."""

    @abc.abstractmethod
    def __call__(
        self, x: Float[Array, "m d"], A: Float[Array, "d d"], mu: Empirical
    ) -> tuple[Float[Array, " m"], Float[Array, "m d"]]:
        """L_µ(uᵢ) and ∇L_µ(uᵢ) at the rows uᵢ of `x @ A`. For attention x are points of
        the sphere and A = β QᵀK; any x with A = I is allowed. The measure's points must
        have norm ≤ 1. x, A and µ share one dtype, which is kept."""

    def at(
        self, u: Float[Array, "m d"], mu: Empirical
    ) -> tuple[Float[Array, " m"], Float[Array, "m d"]]:
        """L_µ and ∇L_µ at given points u."""
        return self(u, jnp.eye(u.shape[-1], dtype=u.dtype), mu)


def _safe_log(w: Array) -> Array:
    """log w, with −∞ and derivative 0 where w = 0."""
    positive = w > 0
    return jnp.where(positive, jnp.log(jnp.where(positive, w, 1)), -jnp.inf)


def _lowest(dtype: jnp.dtype) -> float:
    """Sums below this may have lost terms to underflow that matter at rounding level."""
    info = jnp.finfo(dtype)
    return float(info.tiny) / float(info.eps) ** 2


# One tile: rows u (m, d) and a shift (m, 1) of their exponents; tokens y (b, d) with
# weights w (b,). The result is Σⱼ wⱼ e^{⟨u,yⱼ⟩−shift} (1, yⱼ), shape (m, 1 + d).


def _with_ones(w: Array, y: Array) -> Array:
    return jnp.concatenate([w[:, None], w[:, None] * y], axis=1)


def _tile_sum(u: Array, shift: Array, y: Array, w: Array) -> Array:
    return matmul(jnp.exp(matmul(u, y.T) - shift), _with_ones(w, y))


def _tile_log_sum(u: Array, shift: Array, y: Array, w: Array) -> Array:
    """The same with the weights in the exponents: for sums that would underflow."""
    s = matmul(u, y.T) + _safe_log(w) - shift
    return matmul(jnp.exp(s), _with_ones(jnp.ones_like(w), y))


def _tile_maximum(u: Array, y: Array, w: Array) -> Array:
    return jnp.max(matmul(u, y.T) + _safe_log(w), axis=-1, keepdims=True)


def _add_tiles(f, u: Array, shift: Array, y: Array, w: Array) -> Array:
    """Σ over tiles of `f(u, shift, y[t], w[t])`; reverse mode recomputes each tile."""
    if y.shape[0] == 1:
        return f(u, shift, y[0], w[0])
    f = jax.checkpoint(f)
    zeros = jnp.zeros((u.shape[0], u.shape[1] + 1), u.dtype)
    return jax.lax.scan(
        lambda total, tile: (total + f(u, shift, *tile), None), zeros, (y, w)
    )[0]


def _rows(u: Array, y: Array, w: Array) -> tuple[Array, Array]:
    """L and ∇L at the rows of u; tokens in tiles y (t, b, d), w (t, b)."""
    fixed = jax.lax.stop_gradient
    bound = fixed(jnp.linalg.norm(u, axis=-1, keepdims=True))
    sums = _add_tiles(_tile_sum, u, bound, y, w)

    @jax.checkpoint  # the branch not taken leaves nothing to be stored
    def with_maxima(u, y, w):
        u0, y0, w0 = fixed((u, y, w))
        top = jax.lax.map(lambda tile: _tile_maximum(u0, *tile), (y0, w0)).max(0)
        return _add_tiles(_tile_log_sum, u, top, y, w), top

    enough = jnp.all(sums[:, 0] >= _lowest(u.dtype))
    sums, shift = jax.lax.cond(enough, lambda *_: (sums, bound), with_maxima, u, y, w)
    # Divide by the value of z first: z² in the derivatives of ·/z would underflow.
    scale = fixed(sums[:, :1])
    sums = sums / scale
    z = sums[:, :1]  # 1, with the derivative of z/scale
    return (shift + jnp.log(scale) + jnp.log(z))[:, 0], sums[:, 1:] / z


class Dense(AbstractPartition):
    """All pairs at once: O(m n d) time, O(m n) memory. Exact to rounding."""

    def __call__(
        self, x: Float[Array, "m d"], A: Float[Array, "d d"], mu: Empirical
    ) -> tuple[Float[Array, " m"], Float[Array, "m d"]]:
        return _rows(matmul(x, A), mu.points[None], mu.weights[None])


class Blockwise(AbstractPartition):
    """Tiles of `block` × `block` pairs: O(m n d) time, O((m + n) d + block²) memory, for
    the reverse mode too. Exact to rounding; the fastest exact sum for large n.

    **Arguments:** `block` ≥ 1, an integer (default 1024: tiles that stay in cache)."""

    block: int = eqx.field(static=True, default=1024)

    def __check_init__(self):
        check_count(self.block, "block")

    def __call__(
        self, x: Float[Array, "m d"], A: Float[Array, "d d"], mu: Empirical
    ) -> tuple[Float[Array, " m"], Float[Array, "m d"]]:
        m, d = x.shape
        y, w = in_blocks(mu.points, self.block), in_blocks(mu.weights, self.block)
        u = in_blocks(matmul(x, A), self.block)
        if u.shape[0] == 1:
            log_z, mean = _rows(u[0], y, w)
        else:
            log_z, mean = jax.lax.map(lambda rows: _rows(rows, y, w), u)
        return log_z.reshape(-1)[:m], mean.reshape(-1, d)[:m]


def in_blocks(a: Array, block: int) -> Array:
    """Rows of `a` in the fewest equal blocks of at most `block`, padded with zeros."""
    count = math.ceil(a.shape[0] / block)
    size = math.ceil(a.shape[0] / count)
    padding = [(0, count * size - a.shape[0])] + [(0, 0)] * (a.ndim - 1)
    return jnp.pad(a, padding).reshape(count, size, *a.shape[1:])


class Auto(AbstractPartition):
    """`Dense` up to 2²⁰ pairs, `Blockwise()` above. The choice depends on shapes only."""

    def choose(self, m: int, n: int) -> AbstractPartition:
        """The partition used for m points and n tokens."""
        return Dense() if m * n <= 2**20 else Blockwise()

    def __call__(
        self, x: Float[Array, "m d"], A: Float[Array, "d d"], mu: Empirical
    ) -> tuple[Float[Array, " m"], Float[Array, "m d"]]:
        return self.choose(x.shape[0], mu.n)(x, A, mu)
