"""How many directions tokens span, how close they are to each other, and what a token sees:
ranks, inner products, cumulants."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .. import theory
from ..attention import check_measure
from ..checks import ArrayLike, check_finite, check_scalar, refuse
from ..matrices import matmul
from ..measures import Empirical
from ..partition import in_blocks
from .alignment import second_moment


class Rank(eqx.Module):
    """`rank` as an observable: `Rank(tol)(mu)`. The tolerance is a leaf. The rank is a float
    here: a run that stops early has ∞ at the times not reached."""

    tol: Float[Array, ""] | None

    def __init__(self, tol: ArrayLike | None = None):
        self.tol = None if tol is None else check_scalar(tol, "tol", minimum=0.0)

    def __call__(self, mu: Empirical) -> Float[Array, ""]:
        mu = check_measure(mu)
        x = jax.lax.stop_gradient(jnp.sqrt(mu.weights)[:, None] * mu.points)
        values = jnp.linalg.svd(jnp.linalg.qr(x, mode="r"), compute_uv=False)
        tol = jnp.sqrt(jnp.finfo(x.dtype).eps) if self.tol is None else self.tol
        return jnp.sum(values > tol.astype(x.dtype) * values[0], dtype=x.dtype)


def rank(mu: Empirical, tol: ArrayLike | None = None) -> Int[Array, ""]:
    """Number of singular values of the tokens (rows √wᵢ xᵢ) above `tol` times the largest.

    **Arguments:** `tol` ≥ 0, default √eps (1.5e-8 in float64, 3.5e-4 in float32). An integer:
    no derivative. O(nd²)."""
    return Rank(tol)(mu).astype(int)


def effective_rank(mu: Empirical) -> Float[Array, ""]:
    """e^{−Σ pᵢ log pᵢ} ∈ [1, d], the exponential of the entropy of pᵢ = σᵢ²/Σσⱼ², σ the
    singular values of the tokens (rows √wᵢ xᵢ): pᵢ are the eigenvalues of ∫xxᵀdµ.

    1 on one axis, k if the mass is spread evenly over k orthogonal axes, d for the uniform
    law. (Roy and Vetterli's effective rank takes σ for σ².) pᵢ within rounding of 0 count as 0
    and give no derivative. O(nd²). See `participation_ratio`, which needs no eigenvalues."""
    p = jnp.linalg.eigvalsh(second_moment(mu))
    counts = p > mu.d * jnp.finfo(p.dtype).eps
    p = jnp.where(counts, p, 1)
    return jnp.exp(-jnp.sum(p * jnp.log(p)))


class EffectiveRank(eqx.Module):
    """`effective_rank` as an observable: `EffectiveRank()(mu)`."""

    def __call__(self, mu: Empirical) -> Float[Array, ""]:
        return effective_rank(mu)


def participation_ratio(mu: Empirical) -> Float[Array, ""]:
    """1/Σpᵢ² = 1/∬⟨x,y⟩²dµdµ ∈ [1, d], with the pᵢ of `effective_rank`, which is never less.
    A smooth function of the tokens. O(nd²)."""
    return 1 / jnp.sum(second_moment(mu) ** 2)


class ParticipationRatio(eqx.Module):
    """`participation_ratio` as an observable: `ParticipationRatio()(mu)`."""

    def __call__(self, mu: Empirical) -> Float[Array, ""]:
        return participation_ratio(mu)


class GramStatistics(eqx.Module):
    """`gram_statistics` as an observable: `GramStatistics(distinct, extremes)(mu)`."""

    distinct: bool = eqx.field(static=True, default=True)
    extremes: bool = eqx.field(static=True, default=True)

    def __call__(self, mu: Empirical) -> dict[str, Float[Array, ""]]:
        return gram_statistics(mu, self.distinct, self.extremes)


def gram_statistics(
    mu: Empirical, distinct: bool = True, extremes: bool = True
) -> dict[str, Float[Array, ""]]:
    """Statistics of the inner product ⟨x,y⟩ of two tokens drawn from µ independently.

    - "gap": the mean of 1 − ⟨x,y⟩ = |x−y|²/2, to its own precision when tokens collapse;
        "mean": 1 − gap.
    - "variance".
    - "minimum", "maximum": over pairs of positive weight, if `extremes`.

    **Arguments:** with `distinct` the pairs i ≠ j (weights wᵢwⱼ/(1 − Σw²)); without it all pairs,
    the double integral, the diagonal included. Moments cost O(nd²): with m = ∫x dµ and C the
    covariance, gap = tr C and variance = 2mᵀCm + |C|², before the diagonal is taken out.
    Extremes cost O(n²d) time and O(n) memory; their derivative is that of one extremal pair.

    **Raises:** `ValueError` if `distinct` and fewer than two tokens have weight."""
    mu = check_measure(mu)
    x, w = mu.points, mu.weights
    m = mu.mean(x)
    y = x - m
    C = matmul((w[:, None] * y).T, y)
    gap = jnp.trace(C)
    variance = 2 * m @ matmul(C, m) + jnp.sum(C**2)
    if distinct:
        few = jnp.sum(w > 0) < 2
        w = refuse(
            w,
            few,
            "Argument `mu` must have two tokens of positive weight for pairs i ≠ j, but has "
            "fewer. Use `distinct=False`.",
        )
        diagonal = jnp.sum(w**2)
        gap = gap / (1 - diagonal)
        variance = jnp.maximum(variance / (1 - diagonal) - diagonal * gap**2, 0)
    out = {"gap": gap, "mean": 1 - gap, "variance": variance}
    if extremes:
        low, high = _extremes(x, w, distinct)
        out |= {"minimum": low, "maximum": high}
    return out


@eqx.filter_jit
def _extremes(x: Array, w: Array, distinct: bool) -> tuple[Array, Array]:
    """Least and largest ⟨xᵢ,xⱼ⟩ over pairs of positive weight."""
    n = x.shape[0]
    number = jnp.where(w > 0, jnp.arange(n), -1)
    tiles = in_blocks(x, 1024), in_blocks(number + 1, 1024)  # 0: padding, weight 0

    @jax.checkpoint
    def pairs(x, i, y, j):
        q = matmul(x, y.T)
        counts = (i > 0)[:, None] & (j > 0)
        if distinct:
            counts &= i[:, None] != j
        return jnp.min(jnp.where(counts, q, 2)), jnp.max(jnp.where(counts, q, -2))

    def row(tile):
        low, high = jax.lax.map(lambda other: pairs(*tile, *other), tiles)
        return low.min(), high.max()

    low, high = jax.lax.map(row, tiles)
    return low.min(), high.max()


class Cumulants(eqx.Module):
    """`theory.cumulants` at `u` as an observable, a dict: `Cumulants(u)(mu)`. `u` is a leaf;
    for what a token x attends to take u = βKᵀQx."""

    u: Float[Array, " d"]

    def __init__(self, u: ArrayLike):
        self.u = check_finite(u, "u", (None,))

    def __call__(self, mu: Empirical) -> dict[str, Array]:
        return dict(vars(theory.cumulants(mu, self.u)))
