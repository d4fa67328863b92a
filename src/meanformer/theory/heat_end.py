"""What ends the heat phase: collapse, the noise of a finite sample, or data that hold no more.

The limit β → ∞ of the mean-field law says that a backward flow lasts until its blow-up, a time
O(β). Sampled tokens end it earlier, after a time O(log n) that hardly depends on β."""

import functools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .. import harmonics, sphere
from ..checks import (
    ArrayLike,
    as_float,
    check_count,
    check_scalar,
    is_traced,
    refuse,
    shown,
)
from .heat import blow_up_time, check_rates, log_smoothing_multipliers
from .metastability import growth_rates

# ------------------------------------------------------------------ noise


def noise_time(
    n: ArrayLike,
    beta: ArrayLike,
    d: int = 2,
    *,
    density: ArrayLike | None = None,
    level: ArrayLike = 1.0,
    lambda1: ArrayLike = 1.0,
    lambda2: ArrayLike = 1.0,
    degrees: int | None = None,
) -> Float[Array, ""]:
    """The time t at which the noise of n independent tokens has grown to order 1 under (SA)
    with QᵀK = λ₁I, V = +λ₂I: the root of

        Σ_{l≥1} dim_l (e^{2γ_l t} − 1) = n·µ·|S^{d−1}|·level²,
        γ_l = λ₂ l(l+d−2)/κ · I_{l+d/2−1}(κ)/I_{d/2−1}(κ),  κ = βλ₁,

    where the left side over n·µ·|S^{d−1}| is the mean square that the flow has added to the
    relative fluctuation of a density µ. γ_max → 2λ₂/e whatever β, so that

        t = (e/4λ₂)(ln n + ln(πµ·level²) − ½ ln κ + ½ ln(4λ₂t/πe)) for d = 2, κ → ∞:

    (e/4) ln n, with an O(1) that falls like −(e/8) ln β, because fewer tokens share a wave of
    length 2π/√(2β). It is exact in the linear theory on a uniform background; elsewhere it
    takes µ and its width as constant over a time t and a length β^{−1/2}.

    Measured on S¹ (β = 200, uniform, level 1): the sum reaches n at t = 2.09, 3.15, 4.24,
    5.13 for n = 500, 2000, 8000, 32000, and this function says 1.92, 2.97, 4.01, 5.04.
    Clusters are half as wide as their kernel 0.4 later, and tight 2 to 4 later.

    **Arguments:** `n` tokens; `density` µ > 0, at the tokens, with respect to the surface
    (default 1/|S^{d−1}|, the uniform law); `level` > 0, the relative fluctuation to reach;
    `degrees`, how many degrees are summed (default: enough; needed under `jit` for a traced
    β). Differentiable in all but d. **Source:** derived; *multiscale*, Sec. 3.3 has O(β)."""
    d = sphere.check_dimension(d)
    n = check_scalar(n, "n", minimum=1.0)
    kappa, lambda2 = check_rates(beta, lambda1, lambda2)
    level = check_scalar(level, "level", minimum=0.0, strict=True)
    if density is None:
        density = 1 / sphere.area(d)
    density = check_scalar(density, "density", minimum=0.0, strict=True)
    if degrees is None:
        if is_traced(beta, lambda1):
            raise ValueError(
                "Argument `degrees` must be given for a traced `beta`, because shapes depend "
                "on it. 20 + √(2βλ₁(40 + 4d)) is enough."
            )
        known = float(np.asarray(beta)) * float(np.asarray(lambda1))
        degrees = enough_degrees(known, d)
    degrees = check_count(degrees, "degrees")
    seen = sampling_noise(n, kappa, d, density=density, degrees=degrees)
    n = refuse(
        n,
        ~(seen < level),
        "Argument `n` must be large enough for noise that has yet to grow, but attention sees "
        f"relative fluctuations of {shown(seen)} from the start, at least `level`. More "
        "tokens, or a smaller β.",
    )
    log_target = jnp.log(n * density) + sphere.log_area(d) + 2 * jnp.log(level)
    return _noise_time(log_target.astype(kappa.dtype), kappa, d, degrees) / lambda2


def enough_degrees(kappa: float, d: int) -> int:
    """Degrees beyond which e^{−l(l+d−2)/2κ} dim_l is below rounding."""
    return 20 + math.ceil(math.sqrt(2 * kappa * (40 + 4 * d)))


def cluster_density(
    variance: Array, d: int, share: Array | float = 1.0
) -> Float[Array, "..."]:
    """Density at the centre of a Gaussian cluster with this share of the mass, on S^{d−1} at
    least that of the uniform law."""
    peak = share * (2 * math.pi * variance) ** (-(d - 1) / 2)
    return jnp.maximum(peak, 1 / sphere.area(d))


def sampling_noise(
    n: ArrayLike,
    kappa: ArrayLike,
    d: int = 2,
    *,
    density: ArrayLike | None = None,
    degrees: int | None = None,
) -> Float[Array, ""]:
    """The relative fluctuation of the density that attention at κ = βλ₁ sees in n independent
    tokens: the root of Σ_{l≥1} dim_l (I_{l+d/2−1}/I_{d/2−1})²(κ)/(n·µ·|S^{d−1}|), about
    (κ/(4πn²µ²))^{1/4} on S¹. Where it is not small, tokens are no density for attention.

    **Arguments:** as in `noise_time`. (Derived: the noise of degree l has the mean square
    dim_l/(n·µ·|S^{d−1}|) and is smoothed by that ratio.)"""
    d = sphere.check_dimension(d)
    n = check_scalar(n, "n", minimum=1.0)
    kappa = check_scalar(kappa, "kappa", minimum=0.0, strict=True)
    density = 1 / sphere.area(d) if density is None else density
    density = check_scalar(density, "density", minimum=0.0, strict=True)
    if degrees is None:
        if is_traced(kappa):
            raise ValueError(
                "Argument `degrees` must be given for a traced `kappa`, because shapes depend "
                "on it. 20 + √(2κ(40 + 4d)) is enough."
            )
        degrees = enough_degrees(float(kappa), d)
    dims = np.log(harmonics.harmonic_dimension(d, degrees + 1)[1:])
    logs = 2 * log_smoothing_multipliers(degrees + 1, kappa, d)[1:]
    total = jax.nn.logsumexp(logs + jnp.asarray(dims, logs.dtype))
    return jnp.exp((total - jnp.log(n * density * sphere.area(d))) / 2)


@functools.partial(jax.jit, static_argnames=("d", "degrees"))
def _noise_time(log_target: Array, kappa: Array, d: int, degrees: int) -> Array:
    log_rates = growth_rates(kappa, d, np.arange(1, degrees + 1), "sa", log=True)
    log_dims = np.log(harmonics.harmonic_dimension(d, degrees + 1)[1:])
    log_dims = jnp.asarray(log_dims, log_rates.dtype)

    def excess(log_t):  # log Σ dim_l (e^{2γ_l t} − 1) − log_target: convex, rising
        log_y = log_rates + math.log(2) + log_t
        return jax.nn.logsumexp(log_dims + _log_expm1(log_y)) - log_target

    def newton(log_t):
        value, slope = jax.value_and_grad(excess)(log_t)
        return log_t - value / slope

    # The term of γ_max alone reaches the target later: Newton comes down from there.
    alone = log_target - log_dims[jnp.argmax(log_rates)]
    wide = jnp.log(jax.nn.softplus(jnp.maximum(alone, -30)))
    log_t = jnp.where(alone < -30, alone, wide) - math.log(2) - jnp.max(log_rates)
    log_t = jax.lax.stop_gradient(log_t)
    log_t = jax.lax.fori_loop(0, 30, lambda _, u: jax.lax.stop_gradient(newton(u)), log_t)
    # Two steps with derivatives: exact to second order.
    return jnp.exp(newton(newton(log_t)))


def _log_expm1(log_y: Array) -> Array:
    """log(e^y − 1) from log y, for any y > 0."""
    y = jnp.exp(log_y)
    small = y < 1e-3
    large = jnp.where(small, 1, y)
    return jnp.where(
        small, log_y + y / 2 + y * y / 24, large + jnp.log(-jnp.expm1(-large))
    )


class HeatPhaseEnd(eqx.Module):
    """When the heat phase of sampled tokens ends, in time of the flow.

    - `time`: the smaller of the two that follow.
    - `collapse`: βλ₁σ²/(2λ₂), the blow-up of the backward heat equation.
    - `noise`: `noise_time`, when the noise of the sample has grown to order 1.
    - `limited_by`: 0 for collapse, 1 for noise; `reason` is the word."""

    time: Float[Array, ""]
    collapse: Float[Array, ""]
    noise: Float[Array, ""]
    limited_by: Int[Array, ""]

    @property
    def reason(self) -> str:
        """ "collapse" or "noise"; where values are known."""
        return ("collapse", "noise")[int(self.limited_by)]


def heat_phase_end(
    variance: ArrayLike,
    n: ArrayLike,
    beta: ArrayLike,
    d: int = 2,
    *,
    density: ArrayLike | None = None,
    level: ArrayLike = 1.0,
    lambda1: ArrayLike = 1.0,
    lambda2: ArrayLike = 1.0,
    degrees: int | None = None,
) -> HeatPhaseEnd:
    """When n tokens, sampled from a cluster of variance σ² per tangent direction, leave the
    backward heat flow (V = +λ₂I): at its collapse or, for large β, in noise before.

    Arguments as `noise_time`; `density` is by default that of one cluster with all the mass
    at its centre, (2πσ²)^{−(d−1)/2}, or the uniform one if that is more. Both times are
    leading orders: at σ = .4, n = 10⁴ and β = 50/200/400/1000 they give 4.0/5.5/5.3/4.9
    (noise limits the last three), and simulated clusters are half as wide as the kernel at
    4.7/6.2/6.0/4.8, tight from 7.5 on. With V = −λ₂I noise decays and nothing ends the phase
    but uniformity. **Source:** *multiscale*, Sec. 3.3 for the collapse; the noise is derived."""
    variance = check_scalar(variance, "variance", minimum=0.0, strict=True)
    d = sphere.check_dimension(d)
    if density is None:
        density = cluster_density(variance, d)
    collapse = blow_up_time(variance, beta, lambda1, lambda2)
    noise = noise_time(
        n,
        beta,
        d,
        density=density,
        level=level,
        lambda1=lambda1,
        lambda2=lambda2,
        degrees=degrees,
    )
    return HeatPhaseEnd(
        time=jnp.minimum(collapse, noise),
        collapse=collapse,
        noise=noise,
        limited_by=jnp.asarray(noise < collapse, int),
    )


# ------------------------------------------------------------------ data


class BackwardTime(eqx.Module):
    """How far back in heat time given data can be taken, and what this rests on.

    - `time`: the estimate of s* ≥ 0; ∞ if the data end before any heat kernel would.
    - `uncertainty`: the noise of the two degrees that the estimate rests on, plus how far
        −log|µ̂_l|/(l(l+d−2)) at the limiting degree still is from its limit (∞ with `time`).
    - `degree`: the upper of these two degrees, the one that limits.
    - `resolved`: the number of degrees l ≥ 1 above the noise floor."""

    time: Float[Array, ""]
    uncertainty: Float[Array, ""]
    degree: Int[Array, ""]
    resolved: Int[Array, ""]


def largest_backward_time(
    magnitudes: ArrayLike, d: int, floor: ArrayLike, *, log: bool = False
) -> BackwardTime:
    """The largest heat time s for which e^{−sΔ}µ still converges,

        s* = liminf_{l→∞} −log|µ̂_l|/(l(l+d−2)),

    estimated from finitely many degrees above a noise floor. Decay like e^{−cl²} (Gevrey-½)
    is what the backward equation needs; a heat kernel of heat time s has s* = s.

    **Arguments:**

    - `magnitudes`: |µ̂_l| for l = 0, 1, 2, … On S¹ |∫e^{−ilθ}dµ|; for d ≥ 3
        √(Σ_m|µ̂_lm|²/dim_l). Any constant factor cancels. With `log`, their logarithms
        (−∞ for 0).
    - `floor` ≥ 0: magnitudes at or below are ignored (never a logarithm). For n independent
        tokens noise is n^{−1/2} in the mean and exceeds 4n^{−1/2} once in 10⁷.

    −log|µ̂_l| is fitted from below, as a liminf wants, by a line in l(l+d−2) on the upper half
    of the resolved degrees: the line under all points that is highest at their mean. Its slope
    is s*. Where at least as many degrees as the largest gap between resolved ones are lost in
    the floor although the line has them above 10 times the floor, the data are taken as
    band-limited, s* = ∞. No finite data prove a liminf. Memory O(degrees²).

    **Raises:** `ValueError` if degree 0 is not above the floor. **Source:** *multiscale*,
    Sec. 3.3 (Gevrey-½ functions); the estimator is ours."""
    d = sphere.check_dimension(d)
    floor = check_scalar(floor, "floor", minimum=0.0)
    size = as_float(magnitudes, "magnitudes")
    if size.ndim != 1 or size.shape[0] < 2:
        raise ValueError(
            "Argument `magnitudes` must have shape (l,), one entry for each degree from 0 on, "
            f"l ≥ 2, but has shape {size.shape}."
        )
    bad = (
        (jnp.isnan(size) | (size == jnp.inf))
        if log
        else ~(jnp.isfinite(size) & (size >= 0))
    )
    size = refuse(
        size,
        bad,
        "Argument `magnitudes` must be finite and ≥ 0 (or their logarithms, with "
        "`log=True`), but an entry is not. Take absolute values.",
    )
    log_size = size if log else _log_or_minus_infinity(size)
    log_floor = _log_or_minus_infinity(floor.astype(size.dtype))
    log_size = refuse(
        log_size,
        ~(log_size[0] > log_floor),
        "Argument `floor` must lie below the magnitude of degree 0, the mass, but is "
        f"{shown(floor)}. Nothing is resolved otherwise.",
    )
    return _largest_backward_time(log_size, log_floor, d)


def _log_or_minus_infinity(x: Array) -> Array:
    return jnp.where(x > 0, jnp.log(jnp.where(x > 0, x, 1)), -jnp.inf)


@functools.partial(jax.jit, static_argnames="d")
def _largest_backward_time(log_size: Array, log_floor: Array, d: int) -> BackwardTime:
    degree = jnp.arange(log_size.shape[0])
    l = jnp.asarray(degree * (degree + d - 2), log_size.dtype)
    resolved = log_size > log_floor
    a = jnp.where(resolved, log_size[0] - log_size, 0)
    last = jnp.max(jnp.where(resolved, degree, 0))

    tail = resolved & (2 * degree >= last)
    tail = jnp.where(jnp.sum(tail) < 3, resolved, tail)
    centre = jnp.sum(jnp.where(tail, l, 0)) / jnp.sum(tail)
    left, right = tail & (l <= centre), tail & (l > centre)
    pair = left[:, None] & right[None, :]
    width = jnp.where(pair, l[None, :] - l[:, None], 1)
    slope = (a[None, :] - a[:, None]) / width
    height = jnp.where(pair, a[:, None] + slope * (centre - l[:, None]), jnp.inf)
    i, j = jnp.unravel_index(jnp.argmin(height), height.shape)
    s, height = slope[i, j], height[i, j]

    before = jnp.concatenate([jnp.zeros(1, int), degree[:-1]])
    before = jax.lax.cummax(jnp.where(resolved[before], before, 0))
    gap = jnp.max(jnp.where(resolved, degree - before, 0))
    line = log_size[0] - (height + s * (l - centre))  # predicted log|µ̂_l|
    missing = jnp.sum((degree > last) & (line > log_floor + math.log(10)))
    endless = (last == 0) | (missing >= gap)

    noise = jnp.hypot(*(jnp.exp(log_floor - log_size[k]) for k in (i, j))) / width[i, j]
    drift = jnp.abs(a[j] / jnp.where(j > 0, l[j], 1) - s)
    return BackwardTime(
        time=jnp.where(endless, jnp.inf, jnp.maximum(s, 0)),
        uncertainty=jnp.where(endless, jnp.inf, noise + drift),
        degree=jnp.where(endless, last, j),
        resolved=jnp.sum(resolved) - 1,
    )
