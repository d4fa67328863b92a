"""Special functions of the theory, safe under `jit`, `vmap` and repeated derivatives.

The Bessel ratios come from one positive quantity. Write I_{ν+1}(κ)/I_ν(κ) = κ/(κ + m_ν);
the three-term recurrence of I_ν becomes

    m_ν = 2(ν+1) − κ m_{ν+1} / (κ + m_{ν+1}),

so that A = κ/(κ+m) and 1 − A = m/(κ+m) are both free of cancellation, from κ = 0
(m = 2(ν+1)) to κ → ∞ (m → ν + 1/2). The recurrence is run downwards, where it contracts,
from Debye's uniform expansion at a high order.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .checks import ArrayLike, as_float, check_scalar
from .sphere import check_dimension

_START = 30  # order at which Debye's expansion is used
_TERMS = 14


def _debye_polynomials(terms: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """u_k(p) and v_k(p) of DLMF 10.41.10–11, as coefficients in ascending powers."""
    P = np.polynomial.polynomial
    u, v = [np.array([1.0])], [np.array([1.0])]
    half = np.array([0.0, 0.0, 0.5, 0.0, -0.5])  # p²(1−p²)/2
    for _ in range(terms - 1):
        slope = P.polyder(u[-1])
        integral = P.polyint(P.polymul(np.array([1.0, 0.0, -5.0]), u[-1])) / 8
        new = P.polyadd(P.polymul(half, slope), integral)
        ends = P.polyadd(
            P.polymul(np.array([0.0, -0.5, 0.0, 0.5]), u[-1]),
            -P.polymul(np.array([0.0, 0.0, 1.0, 0.0, -1.0]), slope),
        )
        v.append(P.polyadd(new, ends))
        u.append(new)
    return u, v


_U, _V = _debye_polynomials(_TERMS)


def _horner(coefficients: np.ndarray, z: Array) -> Array:
    total = jnp.full_like(z, float(coefficients[-1]))
    for c in coefficients[-2::-1]:
        total = total * z + float(c)
    return total


def _debye(order: float, kappa: Array) -> tuple[Array, Array]:
    """m_ν(κ) and log(e^{−κ} (2/κ)^ν Γ(ν+1) I_ν(κ)) at a high order ν."""
    root = jnp.hypot(kappa, order)
    p = order / root
    u_sum, gap_sum = jnp.zeros_like(p), jnp.zeros_like(p)
    for k in range(_TERMS - 1, 0, -1):  # u_k, v_k: p^k times a polynomial in p²
        u_sum = _horner(_U[k][k::2], p * p) + (p / order) * u_sum
        gap_sum = _horner((_V[k] - _U[k])[k::2], p * p) + (p / order) * gap_sum
    u_sum = 1 + (p / order) * u_sum
    gap_sum = (p / order) * gap_sum
    # I'_ν/I_ν = (root/κ)(1 + gap) and I_{ν+1}/I_ν = I'_ν/I_ν − ν/κ = κ/(κ+m), hence
    # κ + m = κ²/(root − ν + root·gap) = (root + ν)/(1 + root·gap/(root − ν)).
    # gap carries a factor 1−p² = κ²/root²; u_k(1) = v_k(1) makes it exact.
    gap = gap_sum / u_sum
    # For κ ≪ ν that is rounding noise over κ²: the power series takes over.
    small = kappa < 0.1 * order
    relative = jnp.where(
        small,
        _small_argument(order, jnp.where(small, kappa, 0), root),
        root * (root + order) / jnp.where(small, order, kappa) ** 2 * gap,
    )
    excess = order**2 / (root + kappa)  # root − κ
    m = (excess + order - kappa * relative) / (1 + relative)
    log_scaled = (
        excess
        - order
        + order * jnp.log(2 * order / (order + root))
        - 0.5 * jnp.log(root / order)
        + jnp.log(u_sum)
        + (math.lgamma(order + 1) - (order + 0.5) * math.log(order) + order)
        - 0.5 * math.log(2 * math.pi)
    )
    return m, log_scaled


def _small_argument(order: float, kappa: Array, root: Array) -> Array:
    """The factor `relative` of `_debye` from the first terms of the power series."""
    z = kappa * kappa / 4

    def series(nu: float) -> Array:  # Γ(ν+1) (2/κ)^ν I_ν(κ)
        total, term = jnp.ones_like(kappa), jnp.ones_like(kappa)
        for j in range(1, 7):
            term = term * z / (j * (nu + j))
            total = total + term
        return total

    sum_kappa_m = 2 * (order + 1) * series(order) / series(order + 1)
    return (root + order) / sum_kappa_m - 1


def _small_sum(nu: float, kappa: Array) -> Array:
    """S_ν = κ + m_ν for κ ≤ ν + 1, by S_ν = 2(ν+1) + κ²/S_{ν+1}: even in κ, so that all
    derivatives of the odd function A = κ/S vanish at 0 where they must."""
    square = kappa * kappa

    def step(total, twice):
        return twice + square / total, None

    start = 2 * (nu + 25) * jnp.ones_like(kappa)
    twice = 2 * (nu + np.arange(24, 0, -1))
    return jax.lax.scan(step, start, jnp.asarray(twice, kappa.dtype))[0]


def _ratio_and_complement(nu: float, kappa: Array) -> tuple[Array, Array]:
    """A = I_{ν+1}/I_ν and 1 − A."""
    small = kappa < nu + 1
    low = jnp.where(small, kappa, 0)
    high = jnp.where(small, nu + 1, kappa)
    ratio = low / _small_sum(nu, low)
    m, _ = _complement_and_log(nu, high)
    complement = m / (high + m)  # its derivative does not cancel, that of A would
    return jnp.where(small, ratio, 1 - complement), jnp.where(
        small, 1 - ratio, complement
    )


def _complement_and_log(nu: float, kappa: Array) -> tuple[Array, Array]:
    """m_ν(κ) and log(e^{−κ} (2/κ)^ν Γ(ν+1) I_ν(κ)), for a fixed order ν ≥ 0."""
    steps = max(10, math.ceil(_START - nu))
    m, log_scaled = _debye(nu + steps, kappa)

    def step(carry, twice):  # twice = 2(order + 1)
        m, log_scaled = carry
        m = twice - kappa * (m / (kappa + m))
        # I_{ν+1}/I_ν = κ/(κ+m), so each step down adds log((κ+m)/(2(ν+1))).
        return (m, log_scaled + jnp.log((kappa + m) / twice)), None

    twice = jnp.asarray(2 * (nu + np.arange(steps, 0, -1)), kappa.dtype)
    return jax.lax.scan(step, (m, log_scaled), twice)[0]


def bessel_ratio(nu: float, kappa: ArrayLike) -> Float[Array, "..."]:
    """I_{ν+1}(κ)/I_ν(κ) = κ/(κ + m_ν), for a fixed order ν ≥ 0 and any κ ≥ 0.

    Values in [0, 1). κ ≥ 0 is not checked here. Works in float32 and float64, under `jit`,
    `vmap` and all derivatives; cost O(30 − ν). **Source:** the downward recurrence,
    DLMF 10.29.1, started by 10.41.
    """
    kappa = as_float(kappa, "kappa")
    return _ratio_and_complement(float(nu), kappa)[0]


def mean_resultant(d: int, kappa: ArrayLike) -> Float[Array, "..."]:
    """A_d(κ) = I_{d/2}(κ)/I_{d/2−1}(κ), the mean resultant length of the von Mises–Fisher
    law on S^{d−1}; for κ → ∞, 1 − A_d ≈ (d−1)/(2κ).

    **Arguments:** `d` ≥ 2, an integer; `kappa` ≥ 0, an array. **Source:** *multiscale*,
    (14). Every derivative is the derivative of the same recurrence."""
    return bessel_ratio(check_dimension(d) / 2 - 1, kappa)


def mean_resultant_complement(d: int, kappa: ArrayLike) -> Float[Array, "..."]:
    """1 − A_d(κ) to full relative precision, also where A_d rounds to 1."""
    kappa = as_float(kappa, "kappa")
    return _ratio_and_complement(check_dimension(d) / 2 - 1, kappa)[1]


def bessel_quotient(k: int, kappa: ArrayLike) -> Float[Array, "..."]:
    """I_k(κ)/I_0(κ) for an integer k ≥ 0, as the product of the ratios below k."""
    kappa = as_float(kappa, "kappa")
    m, _ = _debye(float(_START + k), kappa)
    product = jnp.ones_like(kappa)
    for order in range(_START + k - 1, -1, -1):
        m = 2 * (order + 1) - kappa * (m / (kappa + m))
        if order < k:
            product = product * (kappa / (kappa + m))
    return product


def log_bessel(nu: float, kappa: ArrayLike) -> Float[Array, "..."]:
    """log(e^{−κ} (2/κ)^ν Γ(ν+1) I_ν(κ)): 0 at κ = 0, smooth, and never an overflow.

    The factors make it the log-mean of e^{κ(q−1)} over the sphere S^{2ν+1}, which is what
    normalises a von Mises–Fisher law. Fixed order ν ≥ 0; its derivative in κ is
    I_{ν+1}/I_ν − 1, from the same recurrence."""
    return _log_bessel(float(nu), as_float(kappa, "kappa"))


@jax.custom_jvp
def _with_slope(value: Array, kappa: Array, slope: Array) -> Array:
    return value


@_with_slope.defjvp
def _with_slope_jvp(primals, tangents):
    value, _, slope = primals
    return value, slope * tangents[1]


def _log_bessel(nu: float, kappa: Array) -> Array:
    _, value = _complement_and_log(nu, kappa)
    _, complement = _ratio_and_complement(nu, kappa)
    return _with_slope(jax.lax.stop_gradient(value), kappa, -complement)


def wright_omega(y: ArrayLike) -> Float[Array, "..."]:
    """ω(y) = W₀(e^y) for real y, the root of ω + log ω = y (Lambert W without overflow).

    Halley's iteration in log ω for y < 1 and in ω above, run to rounding; derivative
    ω/(1+ω). Float32 and float64."""
    return jax.jit(_wright_omega)(as_float(y, "y"))


@jax.custom_jvp
def _wright_omega(y: Array) -> Array:
    low = y < 1
    # Below: l = log ω solves e^l + l = y; starting from y − e^y (Newton, convex).
    y_low = jnp.where(low, y, 0)
    level = y_low - jnp.log1p(jnp.exp(y_low)) * 0.5
    for _ in range(6):
        e = jnp.exp(level)
        level = level - (e + level - y_low) / (e + 1)
    # Above: ω + log ω = y; starting from y − log y.
    y_high = jnp.where(low, 1, y)
    w = y_high - jnp.log(y_high)
    w = jnp.maximum(w, 0.5)
    for _ in range(4):
        r = w + jnp.log(w) - y_high
        w = w * (1 - r / (1 + w) * (1 + r / (2 * (1 + w) ** 2)))
    return jnp.where(low, jnp.exp(level), w)


@_wright_omega.defjvp
def _wright_omega_jvp(primals, tangents):
    w = _wright_omega(primals[0])
    return w, w / (1 + w) * tangents[0]


def gegenbauer_sum(
    d: int, coefficients: Float[Array, " l"], q: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Σ_l c_l P_l(q) with the zonal polynomials of S^{d−1}, P_l(1) = 1 (d = 2: cos of
    l·arccos q; d = 3: Legendre), by their three-term recurrence; O(1) memory in l."""
    d = check_dimension(d)

    def step(carry, row):
        older, old, total = carry  # P_{l−1}, P_l
        l, c = row
        new = ((2 * l + d - 2) * q * old - l * older) / (l + d - 2)
        return (old, new, total + c * older), None

    one = jnp.ones_like(q)
    l = jnp.arange(1, coefficients.shape[0] + 1, dtype=q.dtype)
    (_, _, total), _ = jax.lax.scan(step, (one, q, 0 * q), (l, coefficients))
    return total


def harmonic_dimension(d: int, degrees: int) -> np.ndarray:
    """dim of the spherical harmonics of degree l on S^{d−1}, l = 0 … `degrees` − 1."""
    l = np.arange(degrees)
    if d == 2:
        return np.where(l == 0, 1.0, 2.0)
    choose = np.array([float(math.comb(i + d - 3, d - 3)) for i in range(degrees)])
    return (2 * l + d - 2) / (d - 2) * choose


def check_kappa(kappa: ArrayLike, name: str = "kappa") -> Float[Array, ""]:
    """`kappa` as a concentration: a finite scalar ≥ 0."""
    return check_scalar(kappa, name, minimum=0.0)
