"""The rotating ring of *multiscale*, scenario 1b (V = I, QᵀK = [[0,1,0],[−1,0,0],[0,0,−2]]):
the circle on which tokens align is left at finite β, by two instabilities."""

import functools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .. import special
from ..checks import (
    ArrayLike,
    as_float,
    check_count,
    check_nonnegative,
    is_traced,
    refuse,
    shown,
)

_nonnegative = functools.partial(check_nonnegative, cure="β and variances have no sign.")


def height_growth_rate(beta: ArrayLike, variance: ArrayLike) -> Float[Array, "..."]:
    """(1 − 2βσ²)/(1 + βσ²): growth rate of the mean height x̄₃ of tokens near the equator in
    scenario 1b (V = I, QᵀK = [[0,1,0],[−1,0,0],[0,0,−2]]), σ² the variance of the heights.

    (Derived, for small Gaussian heights and large β: a token at height z weighs those at z'
    by e^{−βz'²/2} e^{−2βzz'}, of which the first factor is the distance to the equator. They
    have the mean (x̄₃ − 2βσ²z)/(1 + βσ²), to which the token is drawn. Hence the rate, and
    (σ²)' = −4βσ⁴/(1 + βσ²): heights shrink, and the plane is left once σ² < 1/(2β).)"""
    b = _nonnegative(beta, "beta") * _nonnegative(variance, "variance")
    return (1 - 2 * b) / (1 + b)


def height_variance(
    variance: ArrayLike, t: ArrayLike, beta: ArrayLike
) -> Float[Array, "..."]:
    """σ²(t) = 1/(β ω(y₀ + ln y₀ + 4t)), y₀ = 1/(βσ₀²), with Wright's ω: the variance of the
    heights in scenario 1b after it was σ₀²; 1/(4βt) in the end.

    (Derived: y = 1/(βσ²) has y' = 4y/(1 + y) by `height_growth_rate`.)"""
    s0 = _nonnegative(variance, "variance")
    return s0 * _shrinkage(s0, as_float(t, "t"), _nonnegative(beta, "beta"))


def _shrinkage(s0: Array, t: Array, beta: Array) -> Array:
    """σ²(t)/σ₀² = y₀/ω(y₀ + ln y₀ + 4t), 1 where βσ₀² = 0."""
    moves = beta * s0 > 0
    y = 1 / jnp.where(moves, beta * s0, 1)
    return jnp.where(moves, y / special.wright_omega(y + jnp.log(y) + 4 * t), 1)


def height_amplification(
    variance: ArrayLike, t: ArrayLike, beta: ArrayLike
) -> Float[Array, "..."]:
    """x̄₃(t)/x̄₃(0) = e^t (σ²(t)/σ₀²)^{3/4}, the growth of the mean height in scenario 1b when
    the heights had variance σ₀² at time 0: `height_growth_rate` integrated along
    `height_variance`. (Derived: the rate is 1 + ¾ (ln σ²)'.)"""
    s0, t = _nonnegative(variance, "variance"), as_float(t, "t")
    return jnp.exp(t) * _shrinkage(s0, t, _nonnegative(beta, "beta")) ** 0.75


def plane_instability_time(variance: ArrayLike, beta: ArrayLike) -> Float[Array, "..."]:
    """When the variance of the heights in scenario 1b, σ₀² at time 0, falls to 1/(2β) and the
    mean height begins to grow:

        t = ½ − 1/(4βσ₀²) + ¼ ln(2βσ₀²) if 2βσ₀² > 1, else 0.

    It grows like ¼ ln β only: the plane is stable for a moment, and what delays its loss is
    that growth starts from the small mean height of a sample. (Derived: `height_variance` solved
    for t.) At β or σ₀ = 0 the plane is unstable from the
    start."""
    a = 2 * _nonnegative(beta, "beta") * _nonnegative(variance, "variance")
    late = a > 1
    a = jnp.where(late, a, 1)
    return jnp.where(late, 0.5 - 0.5 / a + jnp.log(a) / 4, 0)


def ring_growth_rate(k: ArrayLike, beta: ArrayLike) -> Float[Array, "..."]:
    """k sin(kπ/2) d/dκ(I_k/I_0)(β): growth rate of mode k of a uniform ring that rotates
    because QᵀK turns by 90° and V = I (scenario 1b on S¹).

    With µ = (1 + ε cos kθ)/2π the speed is A(β) + ε (I_k/I_0)'(β) cos k(θ + π/2), whose
    divergence is in phase with the mode as sin(kπ/2). Odd k with k ≡ 1 mod 4 grow.

    `k` ≥ 1, an integer or an array of integers; shape beta.shape + k.shape. Cost O(max k)
    for each β. (Derived.)"""
    k = _check_modes(k)
    return _ring_rates(as_float(beta, "beta"), int(k.max()))[..., k - 1]


@functools.partial(jax.jit, static_argnums=1)
def _ring_rates(beta: Array, count: int) -> Array:
    """The rates of k = 1 … count, along a new last axis."""

    def quotients(b):  # I_k/I_0
        return jnp.cumprod(special.bessel_ratio_sequence(0.0, count, b), axis=-1)

    _, slopes = jax.jvp(quotients, (beta,), (jnp.ones_like(beta),))
    k = np.arange(1, count + 1)
    return jnp.asarray(k * np.array([0, 1, 0, -1])[k % 4], beta.dtype) * slopes


class RingMode(eqx.Module):
    """The mode of the rotating ring that grows fastest: `k`, and its `rate`; fields have the
    shape of β."""

    k: Int[Array, "..."]
    rate: Float[Array, "..."]


def most_unstable_ring_mode(beta: ArrayLike, *, degree: int | None = None) -> RingMode:
    """The largest `ring_growth_rate` over all modes: k = 9 at rate .105 for β = 30.

    For β → ∞ the rate of mode k ≡ 1 mod 4 is k³e^{−k²/(2β)}/(2β²): k ≈ √(3β) grows fastest,
    at (27/4β)^{1/2}e^{−3/2} = .58/√β. Into that many clusters a perfect ring breaks.

    **Arguments:** `beta` > 0, any shape; `degree`, the largest mode looked at (default:
    enough; needed under `jit`: √(3β) + 6). **Raises:** `ValueError` if the rates still rise
    there. (Derived: I_k/I_0 ≈ e^{−k²/(2β)}.)"""
    beta = _nonnegative(beta, "beta")
    beta = refuse(
        beta,
        ~(beta > 0),
        f"Argument `beta` must be > 0, but is {shown(beta)}. At β = 0 no mode is told from "
        "another.",
    )
    if degree is None:
        if is_traced(beta):
            raise ValueError(
                "Argument `degree` must be given under `jit` and `vmap`, because shapes "
                "depend on it. √(3β) + 6 is enough."
            )
        degree = math.ceil(math.sqrt(3 * float(jnp.max(beta)))) + 6
    rates = _ring_rates(beta, check_count(degree, "degree"))
    k = jnp.argmax(rates, axis=-1)
    best = RingMode(k + 1, jnp.take_along_axis(rates, k[..., None], axis=-1)[..., 0])
    return refuse(
        best,
        best.k + 4 > degree,
        f"Argument `degree` must exceed the fastest mode by 4, but is {degree} and the "
        f"fastest of these is {shown(best.k)}. Give √(3β) + 6.",
    )


def _check_modes(k: ArrayLike) -> np.ndarray:
    if is_traced(k):
        raise ValueError(
            "Argument `k` must hold known integers, because shapes depend on them. Use "
            "`functools.partial(ring_growth_rate, k)` under `jit`."
        )
    k = np.asarray(k)
    if not np.issubdtype(k.dtype, np.integer) or k.size == 0 or k.min() < 1:
        raise ValueError(
            f"Argument `k` must be an integer ≥ 1, or an array of such, but is {k.tolist()!r}. "
            "Modes are counted from 1."
        )
    return k
