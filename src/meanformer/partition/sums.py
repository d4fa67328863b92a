"""Sums over all pairs, exact to rounding: `Dense` (all pairs at once) and `Blockwise` (tile by
tile, in constant memory); and what every partition is.

**Stability.** Exponents are shifted by |u|, an upper bound of ⟨u,y⟩ that needs no pass
over the pairs. Only where a shifted sum would underflow (no token near the direction of
u) are the maxima of the rows taken. No overflow and no NaN, for |u| up to 1e6 in float32.

**Derivatives.** Forward, reverse, and of any order: no custom rules; `Blockwise`
recomputes its tiles instead of storing n² numbers.
"""

import abc
import math
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..checks import check_count
from ..matrices import matmul
from ..measures import Empirical


class AbstractPartition(eqx.Module):
    """A way to compute L_µ and ∇L_µ at the points u = x A."""

    @abc.abstractmethod
    def __call__(
        self, x: Float[Array, "m d"], A: Float[Array, "d d"], mu: Empirical
    ) -> tuple[Float[Array, " m"], Float[Array, "m d"]]:
        """L_µ(uᵢ) and ∇L_µ(uᵢ) at the rows uᵢ of `x @ A`, for x and points of µ on the
        sphere; for attention A = β QᵀK. x, A and µ share one dtype, which is kept."""

    def at(
        self, u: Float[Array, "m d"], mu: Empirical
    ) -> tuple[Float[Array, " m"], Float[Array, "m d"]]:
        """L_µ and ∇L_µ at given points u."""
        return self(u, jnp.eye(u.shape[-1], dtype=u.dtype), mu)

    def report(
        self, x: Float[Array, "m d"], A: Float[Array, "d d"], mu: Empirical
    ) -> dict[str, Array]:
        """How these sums are taken: `modes`, the degrees of harmonics (0: none), and
        `dense_points`, at how many points all tokens are summed one by one."""
        del A, mu
        return {"modes": jnp.asarray(0), "dense_points": jnp.asarray(x.shape[0])}

    def prepared(self, A: np.ndarray, m: int, n: int, dtype: Any) -> "AbstractPartition":
        """What this partition comes to for m points and n tokens, of this dtype, and any
        known matrix no larger than A: a program with fewer branches."""
        del A, m, n, dtype
        return self

    def off_sphere(self) -> "AbstractPartition":
        """The same for measures whose points have norm ≤ 1 only."""
        return self


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


def log_sums(u: Array, y: Array, w: Array) -> tuple[Array, Array]:
    """L and ∇L at the rows of u; tokens in tiles y (t, b, d), w (t, b)."""
    fixed = jax.lax.stop_gradient
    bound = fixed(jnp.linalg.norm(u, axis=-1, keepdims=True))
    sums = _add_tiles(_tile_sum, u, bound, y, w)

    @jax.checkpoint  # the branch not taken leaves nothing to be stored
    def with_maxima(u, y, w):
        u0, y0, w0 = fixed((u, y, w))
        top = jax.lax.map(lambda tile: _tile_maximum(u0, *tile), (y0, w0)).max(0)
        return _add_tiles(_tile_log_sum, u, top, y, w), top

    # One branch for a whole batch: under `vmap` a condition of its own would run both.
    enough = eqxi.unvmap_all(jnp.all(sums[:, 0] >= _lowest(u.dtype)))
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
        return log_sums(matmul(x, A), mu.points[None], mu.weights[None])


class Blockwise(AbstractPartition):
    """Tiles of `block` × `block` pairs: O(m n d) time, O((m + n) d + block²) memory
    (reverse mode: up to 32 times the tokens more). Exact to rounding; the fastest exact sum
    for large n.

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
            log_z, mean = log_sums(u[0], y, w)
        else:

            def rows(u):
                return log_sums(u, y, w)

            # The reverse mode keeps the tokens once per block of rows. For many blocks it
            # keeps the rows only and takes a third longer.
            many = u.shape[0] > 32
            log_z, mean = jax.lax.map(jax.checkpoint(rows) if many else rows, u)
        return log_z.reshape(-1)[:m], mean.reshape(-1, d)[:m]


def in_blocks(a: Array, block: int) -> Array:
    """Rows of `a` in the fewest equal blocks of at most `block`, padded with zeros."""
    count = math.ceil(a.shape[0] / block)
    size = math.ceil(a.shape[0] / count)
    padding = [(0, count * size - a.shape[0])] + [(0, 0)] * (a.ndim - 1)
    return jnp.pad(a, padding).reshape(count, size, *a.shape[1:])
