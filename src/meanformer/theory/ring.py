"""The rotating ring of *multiscale*, scenario 1b (V = I, QᵀK = [[0,1,0],[−1,0,0],[0,0,−2]]):
the circle on which tokens align is left at finite β, by two instabilities."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .. import special
from ..checks import ArrayLike, as_float, check_count


def height_growth_rate(beta: ArrayLike, variance: ArrayLike) -> Float[Array, "..."]:
    """1 − 2βσ²: growth rate of the mean height x̄₃ of tokens near the equator in scenario
    1b (V = I, QᵀK = [[0,1,0],[−1,0,0],[0,0,−2]]), with σ² the variance of the heights.

    A token at height z is drawn to the barycentre of tokens tilted by e^{−2βz·z'}, which
    lies at x̄₃ − 2βσ²z; the mean obeys x̄₃' = x̄₃(1 − 2βσ²), and σ² shrinks, so that the
    plane is left once σ² < 1/(2β). (Derived, to leading order in the heights.)"""
    return 1 - 2 * as_float(beta, "beta") * as_float(variance, "variance")


def height_variance(
    variance: ArrayLike, t: ArrayLike, beta: ArrayLike
) -> Float[Array, "..."]:
    """σ²(t) = σ₀²/(1 + 4βσ₀²t), the variance of the heights in scenario 1b after it was
    σ₀² (derived with `height_growth_rate`: (σ²)' = −4βσ⁴)."""
    s0 = as_float(variance, "variance")
    return s0 / (1 + 4 * as_float(beta, "beta") * s0 * as_float(t, "t"))


def ring_growth_rate(k: int, beta: ArrayLike) -> Float[Array, "..."]:
    """k sin(kπ/2) d/dκ(I_k/I_0)(β): growth rate of mode k of a uniform ring that rotates
    because QᵀK turns by 90° and V = I (scenario 1b on S¹).

    With µ = (1 + ε cos kθ)/2π the speed is A(β) + ε (I_k/I_0)'(β) cos k(θ + π/2), whose
    divergence is in phase with the mode as sin(kπ/2). Odd k with k ≡ 1 mod 4 grow.
    (Derived.)"""
    k = check_count(k, "k")
    beta = as_float(beta, "beta")
    slope = jax.grad(lambda b: jnp.sum(special.bessel_quotient(k, b)))(beta)
    return k * (0, 1, 0, -1)[k % 4] * slope


def height_amplification(
    variance: ArrayLike, t: ArrayLike, beta: ArrayLike
) -> Float[Array, "..."]:
    """x̄₃(t)/x̄₃(0) = e^t/√(1 + 4βσ₀²t), the growth of the mean height in scenario 1b when
    the heights had variance σ₀² at time 0: `height_growth_rate` integrated along
    `height_variance`. (Derived.)"""
    t = as_float(t, "t")
    widening = 4 * as_float(beta, "beta") * as_float(variance, "variance") * t
    return jnp.exp(t) / jnp.sqrt(1 + widening)
