"""The heat phase, of time O(β): clusters narrow (V = I, backward) or spread (V = −I)."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .. import special
from ..checks import ArrayLike, as_float, check_finite, check_scalar, refuse, shown
from ..measures import check_weights, log_wrapped_normal


def _check_sign(sign: float | int, name: str = "sign") -> float:
    if sign not in (1, -1):
        raise ValueError(
            f"Argument `{name}` must be +1 (V = +I: backward heat, clusters form) or −1 "
            f"(V = −I: forward heat), but is {sign!r}."
        )
    return float(sign)


def heat_variance(
    variance: ArrayLike, t: ArrayLike, beta: ArrayLike, sign: int
) -> Float[Array, "..."]:
    """Variance of a heat kernel of S^{d−1} in the limit β → ∞, t/β fixed:

        s(t) = s₀ − sign·2t/β,    sign = +1 for V = I, −1 for V = −I, and QᵀK = I.

    `variance` s₀ is σ₀², twice the heat time. A backward flow ends at its blow-up time
    t = βs₀/2.

    **Raises:** `ValueError` for a backward time past the blow-up of a component (traced: at
    run time). **Source:** *multiscale*, Eqs. (6), (7)."""
    gamma = _check_sign(sign)
    s0, t = as_float(variance, "variance"), as_float(t, "t")
    s = s0 - gamma * 2 * t / check_scalar(beta, "beta", minimum=0.0, strict=True)
    return refuse(
        s,
        ~(s > 0),
        "Argument `t` must lie before the blow-up β·variance/2 of every component of a "
        "backward heat flow, but does not. See `blow_up_time`.",
    )


def blow_up_time(variance: ArrayLike, beta: ArrayLike) -> Float[Array, "..."]:
    """t = βσ₀²/2, when a component of variance σ₀² collapses in the backward heat flow
    (QᵀK = V = I). **Source:** *multiscale*, after Eq. (7), in units of the flow."""
    beta = check_scalar(beta, "beta", minimum=0.0, strict=True)
    return beta * as_float(variance, "variance") / 2


def closure_variance(
    variance: ArrayLike, t: ArrayLike, beta: ArrayLike, sign: int
) -> Float[Array, "..."]:
    """Variance of a Gaussian cluster of (SA) with QᵀK = I, V = sign·I on a tangent line:

        ṡ = −sign·2s/(1 + βs),    s(t) = W₀(βs₀ e^{βs₀ − 2·sign·t})/β.

    For βs ≫ 1 it is the heat law, for βs ≪ 1 s ∝ e^{∓2t}: there is no blow-up at finite
    β. W₀ is Lambert's function, evaluated in logs. (Derived: the barycentre of N(0, s)
    tilted by βx is βs·x/(1 + βs), so that ẋ = −sign·x/(1 + βs).)"""
    gamma = _check_sign(sign)
    s0, t = as_float(variance, "variance"), as_float(t, "t")
    beta = check_scalar(beta, "beta", minimum=0.0, strict=True)
    s0 = refuse(
        s0,
        ~(s0 > 0),
        f"Argument `variance` must be > 0, but is {shown(s0)}. A cluster of no width has none "
        "at any time.",
    )
    a = beta * s0
    return special.wright_omega(a + jnp.log(a) - 2 * gamma * t) / beta


def wrapped_mixture_density(
    theta: Float[Array, " g"],
    means: ArrayLike,
    variances: ArrayLike,
    weights: ArrayLike,
) -> Float[Array, " g"]:
    """Σⱼ αⱼ N(θ; mⱼ, sⱼ) wrapped on S¹: heat-kernel mixtures, whose exact heat flow only
    moves the variances (`heat_variance`). **Source:** *multiscale*, Eq. (7)."""
    return _density(jnp.asarray(theta), *_mixture(means, variances, weights))


@jax.jit
def _density(theta: Array, m: Array, s: Array, a: Array) -> Array:
    logs = jax.vmap(log_wrapped_normal)(theta[None] - m[:, None], s)
    return a @ jnp.exp(logs)


def wrapped_mixture_mass(
    edges: Float[Array, " g"],
    means: ArrayLike,
    variances: ArrayLike,
    weights: ArrayLike,
) -> Float[Array, " g-1"]:
    """Mass of the wrapped mixture between consecutive angles `edges`: what a histogram
    counts, without the error of taking the density at mid-bin. For variances up to 10."""
    return _bin_mass(jnp.asarray(edges), *_mixture(means, variances, weights))


@jax.jit
def _bin_mass(edges: Array, m: Array, s: Array, a: Array) -> Array:
    turns = 2 * math.pi * jnp.arange(-4, 5, dtype=edges.dtype)
    z = (edges[None, None] + turns[None, :, None] - m[:, None, None]) / jnp.sqrt(s)[
        :, None, None
    ]
    cdf = jnp.sum(jax.scipy.special.ndtr(z), axis=1)
    return a @ jnp.diff(cdf, axis=-1)


def _mixture(means, variances, weights) -> tuple[Array, Array, Array]:
    m = check_finite(means, "means", (None,))
    s = check_finite(variances, "variances", m.shape)
    s = refuse(
        s,
        ~(s > 0),
        f"Argument `variances` must be > 0, but is {shown(s)}. Use σ², not 0.",
    )
    return m, s, check_weights(weights, "weights", m.shape[0])
