"""Metastability around the uniform law µ_∞ (QᵀK = V = I): which perturbations grow, and how
fast.

A law µ = µ_∞(1 + ρ) is split into spherical harmonics. For the flow ∂ₜµ + div(µ∇(W*µ)) = 0,
(W*µ)(x) = ∫W(⟨x,y⟩)dµ(y), the part of degree k obeys, to first order in ρ,

    ρ̇_k = −|S^{d−1}|⁻¹ Δ(W*ρ)_k = γ_k ρ_k,    γ_k = k(k+d−2) λ_k/|S^{d−1}|,

with λ_k the Funk–Hecke coefficient of W. Attention without normaliser (USA) is W = e^{βq}/β.
With normaliser (SA) the velocity is ∇ log(e^{β·}*µ)/β, which divides γ_k by the partition
function of µ_∞ and changes nothing else, so that both select the same degree.

Rates are products of the ratios I_{ν+j+1}/I_{ν+j}, ν = d/2 − 1, all positive: no cancellation."""

import functools
import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jaxtyping import Array, Float, Int

from .. import harmonics, special, sphere
from ..checks import (
    ArrayLike,
    check_count,
    check_nonnegative,
    check_scalar,
    is_traced,
    nearest,
    refuse,
    shown,
)
from .bounds import dobrushin_of_norms

_nonnegative = functools.partial(
    check_nonnegative, cure="For V = −I growth rates change their sign."
)

# ------------------------------------------------------------------------ growth rates


def growth_rates(
    beta: ArrayLike,
    d: int,
    k: ArrayLike,
    model: str = "usa",
    log: bool = False,
    *,
    normalisation: str = "rate",
) -> Float[Array, "..."]:
    """γ_k: a perturbation of degree k of the uniform law on S^{d−1} grows like e^{γ_k t}.

        USA:  γ_k = k(k+d−2) (2π)^{d/2} β^{−d/2} I_{k+d/2−1}(β) / |S^{d−1}|
              (d = 2: k² I_k(β)/β; β → 0: γ_1 = (d−1)/d, the others 0),
        SA:   γ_k = k(k+d−2) I_{k+d/2−1}(β) / (β I_{d/2−1}(β)).

    **Arguments:**

    - `beta` ≥ 0: scalar or array. `d` ≥ 2.
    - `k` ≥ 0: an integer or an array of integers (γ_0 = 0: mass is conserved).
    - `model`: "usa" or "sa".
    - `log`: return log γ_k, finite where γ_k overflows (USA from β ≈ 700 on, 88 in float32)
        or underflows; −∞ where γ_k = 0.
    - `normalisation` of (USA): "rate", the true rate; or a number that *metastable* calls
        γ_k: "funk-hecke" (its Thm C.2, |S^{d−1}| times the rate) and, on S¹, "cosine" (its
        C.3, twice the rate) and "figure" (its Fig. 2, the rate over π). Remark 4.1,
        k²I_k/β, is the true rate.

    **Returns:** shape beta.shape + k.shape. Cost O(max k) per β. All derivatives in β.

    **Source:** *metastable*, Assumption 2 and Remarks 4.1, C.3, C.6; for d > 2 and for (SA)
    derived (see the module)."""
    d = sphere.check_dimension(d)
    k = check_degrees(k)
    beta = _nonnegative(beta, "beta")
    factor = _normalisation(normalisation, d, check_model(model))
    count = max(1, int(k.max(initial=0)))
    rates = _rates(beta, d, count, model == "usa")[int(log)]
    nothing = jnp.full_like(rates[..., :1], -jnp.inf if log else 0)
    rates = jnp.concatenate([nothing, rates], axis=-1)[..., k]
    return rates + math.log(factor) if log else rates * factor


@functools.partial(jax.jit, static_argnames=("d", "count", "usa"))
def _rates(beta: Array, d: int, count: int, usa: bool) -> tuple[Array, Array]:
    """γ_k and log γ_k for k = 1 … count, along a new last axis."""
    nu = d / 2 - 1
    k = np.arange(1, count + 1)
    weight = k * (k + d - 2.0)
    # γ_k = weight · F · β⁻¹I_{ν+k}/I_ν with F = 1 (SA) or the partition function (USA).
    ratios = special.bessel_ratio_sequence(nu, max(count, 2), beta)
    small = beta < 1  # I_{ν+1}/(βI_ν) = (1 − I_{ν+2}/I_ν)/d holds at β = 0 too
    low, high = 1 - ratios[..., 0] * ratios[..., 1], jnp.where(small, 1, beta)
    first = (d - 1) * jnp.where(small, low / d, ratios[..., 0] / high)[..., None]
    ratios = jnp.asarray(weight[1:] / weight[:-1], beta.dtype) * ratios[..., 1:count]
    log_f = _log_partition(beta, d)[..., None] if usa else jnp.zeros_like(first)
    positive = jnp.where(ratios > 0, ratios, 1)
    steps = jnp.where(ratios > 0, jnp.log(positive), -jnp.inf)
    logs = jnp.concatenate([jnp.log(first), steps], axis=-1)
    logs = jnp.cumsum(logs, axis=-1) + log_f
    # The product of the ratios is more accurate than the exponential of their logs.
    huge = log_f > math.log(jnp.finfo(beta.dtype).max) - 1
    seed = jnp.exp(jnp.where(huge, 0, log_f)) * first
    product = jnp.cumprod(jnp.concatenate([seed, ratios], axis=-1), axis=-1)
    return jnp.where(huge, jnp.exp(jnp.where(huge, logs, 0)), product), logs


def _log_partition(beta: Array, d: int) -> Array:
    """log of the mean of e^{β⟨x,y⟩} over the sphere: what (USA) has more than (SA)."""
    return beta + special.log_bessel(d / 2 - 1, beta)


def growth_rate_curve(
    beta: float | int, d: int, k: ArrayLike, model: str = "usa"
) -> Float[np.ndarray, "..."]:
    """γ_k of `growth_rates` with k real (> 0), for curves through the integers. NumPy, from
    SciPy's Bessel functions of real order; one number `beta` > 0, for (USA) up to 700.

    **Source:** *metastable*, Fig. 2 (left, dashed)."""
    nu = sphere.check_dimension(d) / 2 - 1
    beta = float(check_scalar(beta, "beta", minimum=0.0, strict=True))
    k = np.asarray(k, float)
    k = np.asarray(refuse(k, ~(k > 0), f"Argument `k` must be > 0, but is {shown(k)}."))
    quotient = scipy.special.ive(nu + k, beta) / scipy.special.ive(nu, beta)
    rates = k * (k + d - 2) / beta * quotient
    if check_model(model) == "sa":
        return rates
    refuse(beta, beta > 700, f"Argument `beta` must be ≤ 700 here, but is {beta:g}.")
    return rates * float(
        scipy.special.hyp0f1(d / 2, beta * beta / 4)
    )  # ∫e^{β⟨x,y⟩}dµ_∞(y)


def kernel_growth_rates(
    W: Callable[[Array], Array], d: int, degree: int, nodes: int | None = None
) -> Float[Array, " k"]:
    """γ_k = k(k+d−2) λ_k/|S^{d−1}| for k = 0 … `degree`, of any smooth kernel W on [−1, 1]:
    growth rates of ∂ₜµ + div(µ∇(W*µ)) = 0 around the uniform law.

    W = e^{βq}/β gives `growth_rates(beta, d, k)`. λ_k is computed by `harmonics.funk_hecke`
    with so many `nodes`. **Source:** *metastable*, Eq. (3) and Assumption 2, in the
    normalisation of its Remark C.6."""
    d, degree = sphere.check_dimension(d), check_count(degree, "degree", 0)
    coefficients = harmonics.funk_hecke(W, d, degree, nodes)
    k = np.arange(degree + 1)
    return coefficients * jnp.asarray(k * (k + d - 2.0) / sphere.area(d))


class MostUnstable(eqx.Module):
    """The degrees that grow fastest; every field has the shape of β.

    - `k_max`, `gamma_max`: the degree of largest rate, and that rate.
    - `log_gamma_max`: its logarithm, finite where it overflows.
    - `k_second`, `gamma_second`: the next.
    - `ratio`: γ_second/γ_max ≤ 1. While noise of size n^{−1/2} grows to 1, degree k_max gains
        on the second by a factor of n^{(1−ratio)/2} only: near 1, samples differ in k_max.
    """

    k_max: Int[Array, "..."]
    gamma_max: Float[Array, "..."]
    log_gamma_max: Float[Array, "..."]
    k_second: Int[Array, "..."]
    gamma_second: Float[Array, "..."]
    ratio: Float[Array, "..."]


def most_unstable(
    beta: ArrayLike, d: int, model: str = "usa", *, degree: int | None = None
) -> MostUnstable:
    """k_max, γ_max and the second degree, for a scalar or an array of β ≥ 0.

    k_max is the same for (SA) and (USA). For β → ∞ it solves k(k+d−2) ≈ 2β, hence
    k_max ≈ √(2β) for fixed d, and γ_max → 2/e for (SA): I_{k+ν}/I_ν ≈ e^{−k(k+d−2)/(2β)}.

    **Arguments:** `degree`, the largest degree looked at (default: enough; needed under
    `jit`). **Raises:** `ValueError` (traced: at run time) if the rates still rise there.

    **Source:** *metastable*, Assumption 2; its Remark 4.1 has k_max ≈ √β, without the 2."""
    d = sphere.check_dimension(d)
    beta = _nonnegative(beta, "beta")
    usa = check_model(model) == "usa"
    if degree is None:
        if is_traced(beta):
            raise ValueError(
                "Argument `degree` must be given under `jit` and `vmap`, because shapes "
                "depend on it. √(2β) + 4 is enough."
            )
        degree = math.ceil(math.sqrt(2 * float(jnp.max(beta, initial=0)))) + 4
    degree = check_count(degree, "degree", 2)
    found = _most_unstable(beta, d, degree, usa)
    return refuse(
        found,
        found.k_max >= degree,
        f"Argument `degree` must exceed the most unstable degree, but the rates still rise "
        f"at {degree}. Give √(2β) + 4.",
    )


@functools.partial(jax.jit, static_argnames=("d", "degree", "usa"))
def _most_unstable(beta: Array, d: int, degree: int, usa: bool) -> MostUnstable:
    rates, logs = _rates(beta, d, degree, False)  # bounded: no overflow
    log_f = _log_partition(beta, d) if usa else jnp.zeros_like(beta)
    first = jnp.argmax(rates, axis=-1, keepdims=True)
    others = jnp.where(jnp.arange(degree) == first, -1, rates)
    second = jnp.argmax(others, axis=-1, keepdims=True)

    def at(values, index):
        return jnp.take_along_axis(values, index, axis=-1)[..., 0]

    top, next_top = at(rates, first), at(rates, second)
    return MostUnstable(
        k_max=first[..., 0] + 1,
        gamma_max=top * jnp.exp(log_f),
        log_gamma_max=at(logs, first) + log_f,
        k_second=second[..., 0] + 1,
        gamma_second=next_top * jnp.exp(log_f),
        ratio=next_top / top,
    )


def mode_jumps(d: int, count: int) -> Float[Array, " count"]:
    """The β at which k_max jumps from k to k + 1, for k = 1 … `count` (both models): where
    *metastable* needs its Assumption 2 and it fails.

    γ_k = γ_{k+1} says I_{ν+k+1}/I_{ν+k} = k(k+d−2)/((k+1)(k+d−1)) with ν = d/2 − 1. The left
    side rises from 0 to 1 and is concave in β, so that there is one root, which Newton's
    method reaches from below. **Source:** *metastable*, Remark 4.1; the equation derived."""
    return _mode_jumps(sphere.check_dimension(d), check_count(count, "count"))


@functools.partial(jax.jit, static_argnames=("d", "count"))
def _mode_jumps(d: int, count: int) -> Array:
    k = np.arange(1, count + 1)
    order = k + d / 2 - 1
    target = jnp.asarray(k * (k + d - 2) / ((k + 1) * (k + d - 1)))
    a = jnp.asarray(order + 0.5)
    beta = 2 * a * target / (1 - target**2)  # I_{ν+1}/I_ν < β/(a + √(a²+β²)), a = ν + ½

    def newton(beta, _):
        ratio = jnp.diagonal(special.bessel_ratio_sequence(d / 2, count, beta))
        slope = 1 - ratio**2 - (2 * order + 1) * ratio / beta
        return beta + (target - ratio) / slope, None

    return jax.lax.scan(newton, beta, None, length=8)[0]


# ------------------------------------------------------------- stability, and its limit


def dobrushin_rate(
    beta: ArrayLike, model: str = "usa", *, log: bool = False
) -> Float[Array, "..."]:
    """L in W₁(µ_t, ν_t) ≤ e^{Lt} W₁(µ_0, ν_0), on the sphere of any dimension, QᵀK = V = I.

        USA:  L = 2e^β;   SA:  L = `dobrushin_constants` of σ₁ = ‖V‖ = 1.

    L is the largest derivative of the velocity in x plus that in the measure. For (USA) both
    are sup‖Hess e^{β⟨x,y⟩}/β‖ = max_q e^{βq} max(|q|, |β(1−q²) − q|) = e^β, as on S¹, where it
    is sup|h''|.

    With `log` = True returns log L. **Source:** *metastable*, Thms A.1, A.4; Thm A.4 names
    the constant of (USA) for (SA)."""
    beta = _nonnegative(beta, "beta")
    return _dobrushin(beta, check_model(model) == "usa", log)


@functools.partial(jax.jit, static_argnames=("usa", "log"))
def _dobrushin(beta: Array, usa: bool, log: bool) -> Array:
    one = jnp.ones_like(beta)
    log_rate = math.log(2) + beta if usa else dobrushin_of_norms(one, beta).log_rate
    return log_rate if log else jnp.exp(log_rate)


def antipodal_growth(beta: ArrayLike) -> Float[Array, "..."]:
    """2/(1 + e^{2β}): rate at which two antipodal tokens of (SA) leave each other's antipode.

    The defect η = π − ω of their angle obeys η̇ = 2 sin η/(1 + e^{β(1+cos η)}), so that
    tan(η(t)/2) ≥ e^{rt} tan(η_0/2) with this r, with equality for η → 0: no bound W₁(t) ≤
    f(t) W₁(0) has f(t) < e^{rt}. *metastable*, Eq. (13), has e^{2t/e²} for β = 1, from
    1/e² ≤ e^{cos ω}/Z, which fails at ω = π, where the right side is 1/(1+e²)."""
    return 2 * jax.nn.sigmoid(-2 * _nonnegative(beta, "beta"))


# ------------------------------------------------------------------------------- checks


def check_model(model: str) -> str:
    if model not in ("usa", "sa"):
        raise ValueError(
            f'Argument `model` must be "usa" or "sa", but is {model!r}. '
            + nearest(str(model), ("usa", "sa"))
        )
    return model


def check_degrees(k: ArrayLike, name: str = "k") -> np.ndarray:
    """`k` as concrete integers ≥ 0: they are orders of Bessel functions."""
    if is_traced(k):
        raise ValueError(
            f"Argument `{name}` must be concrete integers, but is traced. Close over it."
        )
    degrees = np.asarray(k)
    if not np.issubdtype(degrees.dtype, np.integer) or np.any(degrees < 0):
        raise ValueError(
            f"Argument `{name}` must be integers ≥ 0, but is {shown(degrees)}. For real k use "
            "`growth_rate_curve`."
        )
    return degrees


def _normalisation(name: str, d: int, model: str) -> float:
    known = {
        "rate": 1.0,
        "funk-hecke": sphere.area(d),
        "cosine": 2.0,
        "figure": 1 / math.pi,
    }
    if name not in known:
        raise ValueError(
            f"Argument `normalisation` must be one of {list(known)}, but is {name!r}. "
            + nearest(str(name), known)
        )
    if name != "rate" and (model != "usa" or (d != 2 and name != "funk-hecke")):
        raise ValueError(
            f'Argument `normalisation` must be "rate" for model {model!r} and d = {d}, but is '
            f"{name!r}: the paper has it for (USA) only"
            + (" on S¹." if name in ("cosine", "figure") else ".")
        )
    return known[name]
