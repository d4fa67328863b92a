"""Tokens at equal angles, a family of one parameter that self-attention keeps (V = I,
QᵀK = I): the exact equation of the common inner product ρ, and its times."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..checks import ArrayLike, as_float, check_count, check_nonnegative, refuse, shown
from ..matrices import matmul
from .metastability import check_model


def _check_equiangular(
    n: int, beta: ArrayLike, model: str, **rho: ArrayLike
) -> tuple[int, Array, list[Array]]:
    n = check_count(n, "n", 2)
    model = check_model(model)
    beta = check_nonnegative(
        beta, "beta", cure="For repulsion reverse the sign of the result."
    )
    values = []
    for name, value in rho.items():
        r = as_float(value, name)
        # One rounding of slack at the simplex, ρ = −1/(n−1).
        inside = (r <= 1) & (1 + (n - 1) * r >= -2 * jnp.finfo(r.dtype).eps)
        message = (
            f"Argument `{name}` must lie in [−1/(n−1), 1] = [{-1 / (n - 1):g}, 1], but is "
            f"{shown(r)}. n = {n} unit vectors have no other common inner product."
        )
        values.append(refuse(r, ~inside, message))
    return n, beta, values


def equiangular_rate(
    rho: ArrayLike, n: int, beta: ArrayLike, model: str = "sa", *, log: bool = False
) -> Float[Array, "..."]:
    """ρ̇ = 2w(ρ)(1−ρ)(1+(n−1)ρ), the exact law of n tokens of equal weight whose pairwise
    inner products are all ρ, for QᵀK = V = I (V = vI: times v; QᵀK = bI: β is bβ), with

        w = e^{βρ}/(e^β + (n−1)e^{βρ})  for "sa",     w = e^{βρ}/n  for "usa".

    ẋ_i = w Σ_{j≠i}(x_j − ρx_i) keeps all angles equal, and ρ̇ = 2⟨ẋ_i, x_k⟩. Needs n ≤ d
    dimensions. **Arguments:** `rho` ∈ [−1/(n−1), 1] and `beta` ≥ 0, arrays that broadcast;
    `log`: return log ρ̇ (finite for every β; −∞ at the ends of the range). (Derived.)"""
    n, beta, (rho,) = _check_equiangular(n, beta, model, rho=rho)
    return _equiangular_rate(rho, beta, n, model, log)


@functools.partial(jax.jit, static_argnames=("n", "model", "log"))
def _equiangular_rate(rho: Array, beta: Array, n: int, model: str, log: bool) -> Array:
    if model == "sa":
        log_w = -jnp.logaddexp(beta * (1 - rho), math.log(n - 1))
    else:
        log_w = beta * rho - math.log(n)
    simplex = 1 + (n - 1) * rho
    open_ends = (1 - rho) * jnp.where(simplex < 0, 0, simplex)
    if log:
        return math.log(2) + log_w + jnp.log(open_ends)
    return 2 * jnp.exp(log_w) * open_ends


def _panel_rule() -> tuple[np.ndarray, ...]:
    """Gauss rules on panels of [0, 1] that grow from 0 by powers of 2, and on equal ones."""
    q, w = np.polynomial.legendre.leggauss(12)
    rules = []
    for edges in (np.append(0, 2.0 ** np.arange(-24, 1)), np.linspace(0, 1, 49)):
        width = np.diff(edges)[:, None]
        rules += [
            (edges[:-1, None] + width * (q + 1) / 2).ravel(),
            (width * w / 2).ravel(),
        ]
    return tuple(rules)


_GRADED, _GRADED_W, _EQUAL, _EQUAL_W = _panel_rule()


def equiangular_time(
    rho0: ArrayLike,
    rho1: ArrayLike,
    n: int,
    beta: ArrayLike,
    model: str = "sa",
    *,
    log: bool = False,
) -> Float[Array, "..."]:
    """The time from ρ0 to ρ1 under `equiangular_rate`, ∫dρ/ρ̇ (V = vI: over v).

    With u = log((1+(n−1)ρ)/(1−ρ)), in which du = n dρ/((1−ρ)(1+(n−1)ρ)),

        T = ∫(e^{β(1−ρ)} + n − 1)du/(2n) for "sa",    T = ½∫e^{−βρ}du for "usa",

    by Gauss rules on 72 panels, relative to the largest exponential. For β → ∞
    T ≈ e^{β(1−ρ0)}/(2β(1−ρ0)(1+(n−1)ρ0)) for "sa": leaving ρ0 = 0 takes e^β/2β.

    **Arguments:** `rho0`, `rho1` inside (−1/(n−1), 1), where T is finite, and `beta` from 0
    to 1e6, arrays that broadcast; T < 0 for ρ1 < ρ0. `log`: log|T|, which does not overflow.
    Relative error of T a few eps·(1 + β + log n) and eps/(1+(n−1)ρ); 860 exponentials each.
    (Derived.)"""
    n, beta, (rho0, rho1) = _check_equiangular(n, beta, model, rho0=rho0, rho1=rho1)
    ends = jnp.stack(jnp.broadcast_arrays(rho0, rho1))
    rho0 = refuse(
        rho0,
        ~((1 + (n - 1) * ends > 0) & (ends < 1)),
        "Arguments `rho0` and `rho1` must lie strictly between −1/(n−1) and 1, but do not: "
        "these two are reached in infinite time. Stop short of them.",
    )
    return _equiangular_time(rho0, rho1, beta, n, model, log)


@functools.partial(jax.jit, static_argnames=("n", "model", "log"))
def _equiangular_time(
    rho0: Array, rho1: Array, beta: Array, n: int, model: str, log: bool
) -> Array:
    rho0, rho1, beta = jnp.broadcast_arrays(rho0, rho1, beta)
    back = rho1 < rho0
    low, high = jnp.where(back, rho1, rho0), jnp.where(back, rho0, rho1)
    s, r = 1 - low, (1 + (n - 1) * low) / (n - 1)
    length = jnp.log1p((high - low) / r) + jnp.log1p((high - low) / (1 - high))  # in u
    # β(ρ(u) − ρ(low)) with ρ(u) − ρ(low) = s r (1 − e^{−δ})/(r + s e^{−δ}), δ = u − u(low).
    near = jnp.minimum(length, 1)

    def panel_mean(fraction, weight, start, span):  # weights add up to 1
        delta = start[..., None] + span[..., None] * jnp.asarray(fraction, span.dtype)
        scaled = beta[..., None] * s[..., None] * r[..., None]
        fall = -jnp.expm1(-delta) / (r[..., None] + s[..., None] * jnp.exp(-delta))
        return matmul(jnp.exp(-scaled * fall), jnp.asarray(weight, span.dtype))

    share = near / jnp.where(length > 0, length, 1)
    share = jnp.where(length > 0, share, 1)
    mean = share * panel_mean(_GRADED, _GRADED_W, 0 * near, near)
    mean += (1 - share) * panel_mean(_EQUAL, _EQUAL_W, near, length - near)
    if model == "sa":
        log_mean = jnp.logaddexp(beta * s + jnp.log(mean), math.log(n - 1))
        log_mean -= math.log(2 * n)
    else:
        log_mean = jnp.log(mean) - beta * low - math.log(2)
    if log:
        return jnp.log(length) + log_mean
    sign = jnp.where(back, -1, 1)
    return sign * length * jnp.exp(log_mean)
