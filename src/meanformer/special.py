"""Special functions of the theory, safe under `jit`, `vmap` and repeated derivatives.

The Bessel functions come from one positive quantity. Write I_{ν+1}(κ)/I_ν(κ) = κ/(κ + m_ν);
the three-term recurrence of I_ν becomes

    m_ν = 2(ν+1) − κ m_{ν+1} / (κ + m_{ν+1}),

so that A = κ/(κ+m) and 1 − A = m/(κ+m) are both free of cancellation, from κ = 0
(m = 2(ν+1)) to κ → ∞ (m → ν + 1/2). What is computed is the rest r_ν = m_ν − ν − 1/2 ≥ 0,

    r_ν = m_{ν+1}²/(κ + m_{ν+1}) − r_{ν+1},

whose roundings are as small as r is: downwards the recurrence contracts by (κ/(κ+m))² only,
so that for κ ≫ ν² the roundings of all steps add up. It starts from Debye's uniform
expansion at a high order.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .checks import ArrayLike, as_float, check_count, check_scalar, is_traced
from .sphere import check_dimension

_START = 30  # least order at which Debye's expansion is used
_TERMS = 14


def _debye_polynomials(terms: int) -> np.ndarray:
    """u_k(p) and g_k(p) = (v_k − u_k)/(1 − p²) of DLMF 10.41.10–11, each p^k times a
    polynomial in p². Axes: k = terms − 1 … 1, descending powers, (u, g)."""
    P = np.polynomial.polynomial
    u, g = [np.array([1.0])], [np.array([0.0])]
    half = np.array([0.0, 0.0, 0.5, 0.0, -0.5])  # p²(1−p²)/2
    for _ in range(terms - 1):
        slope = P.polyder(u[-1])
        integral = P.polyint(P.polymul(np.array([1.0, 0.0, -5.0]), u[-1])) / 8
        g.append(-P.polyadd(P.polymulx(u[-1]) / 2, P.polymulx(P.polymulx(slope))))
        u.append(P.polyadd(P.polymul(half, slope), integral))
    table = np.zeros((terms, terms, 2))
    for k in range(terms):
        for column, c in zip(table[k].T, (u[k][k::2], g[k][k::2])):
            column[terms - len(c) :] = c[::-1]
    return table[:0:-1]


_DEBYE = _debye_polynomials(_TERMS)


def _debye_sums(order: float, p: Array) -> Array:
    """Σ_{k≥1} u_k(p)/ν^k and Σ_{k≥1} g_k(p)/ν^k, along a new first axis."""

    def step(total, polynomials):
        return (p / order) * (jnp.polyval(polynomials, p * p) + total), None

    table = jnp.asarray(_DEBYE, p.dtype).reshape(*_DEBYE.shape, *(1,) * p.ndim)
    return jax.lax.scan(step, jnp.zeros((2, *p.shape), p.dtype), table)[0]


def log_gamma_rest(nu: float) -> float:
    """log Γ(ν+1) − ν log ν + ν, by Stirling's series where log Γ has lost digits."""
    if nu == 0:
        return 0.0
    if nu < _START:
        return math.lgamma(nu + 1) - nu * math.log(nu) + nu
    series = 1 / 12 - (1 / 360 - (1 / 1260 - 1 / (1680 * nu**2)) / nu**2) / nu**2
    return 0.5 * math.log(2 * math.pi * nu) + series / nu


def _debye(order: float, kappa: Array) -> Array:
    """r_ν(κ) at a high order ν."""
    root = jnp.sqrt(kappa * kappa + order**2)
    p = order / root
    # I'_ν/I_ν = (root/κ)(1 + gap) with gap = (1−p²) Σ g_k/ν^k / Σ u_k/ν^k, 1−p² = κ²/root²,
    # and I_{ν+1}/I_ν = I'_ν/I_ν − ν/κ = κ/(κ+m), hence
    # κ + m = (root + ν)/(1 + relative) with relative = root·gap/(root − ν).
    u_sum, g_sum = _debye_sums(order, p)
    relative = (1 + p) * g_sum / (1 + u_sum)
    excess = order**2 / (root + kappa)  # root − κ
    return (excess - 0.5 - (kappa + order + 0.5) * relative) / (1 + relative)


def _debye_logs(order: float, kappa: Array) -> tuple[Array, Array]:
    """log((2/κ)^ν Γ(ν+1) I_ν(κ)) and log(e^{−κ} I_ν(κ)) at a high order ν."""
    root = jnp.sqrt(kappa * kappa + order**2)
    h = kappa * kappa / (order * (root + order))  # root/ν − 1
    stretch = 0.5 * math.log(2 * math.pi * order)
    both = jnp.log1p(_debye_sums(order, order / root)[0]) - 0.5 * jnp.log1p(h)
    mean = order * (h - jnp.log1p(h / 2)) + both + (log_gamma_rest(order) - stretch)
    # For κ → 0 the last two cancel: z/(ν+1) − z²/(2(ν+1)²(ν+2)), z = κ²/4, takes over.
    z = kappa * kappa / (4 * (order + 1))
    mean = jnp.where(kappa < 0.05, z - z * z / (2 * (order + 2)), mean)
    turn = order * jnp.arcsinh(order / jnp.where(kappa > 0, kappa, 1))
    return mean, order**2 / (root + kappa) - turn + both - stretch


def _ladder(nu: float, count: int, kappa: Array) -> tuple[Array, Array]:
    """The orders ν, …, ν + count − 1 along a new first axis, and their m."""
    last = nu + count - 1
    above = max(0, math.ceil(_START - last))

    def step(rest, order):
        m = order + 1.5 + rest
        rest = m * (m / (kappa + m)) - rest
        return rest, rest

    def descend(rest, first, count):
        orders = jnp.asarray(first + np.arange(count), kappa.dtype)
        return jax.lax.scan(step, rest, orders, reverse=True)

    rests = _debye(last + above, kappa)
    if above:
        rests = descend(rests, last, above)[0]
    rests = rests[None]
    if count > 1:
        rests = jnp.concatenate([descend(rests[0], nu, count - 1)[1], rests])
    orders = jnp.asarray(nu + np.arange(count), kappa.dtype)
    orders = orders.reshape(-1, *(1,) * kappa.ndim)
    return orders, orders + 0.5 + rests


def _small_sum(nu: float, kappa: Array) -> Array:
    """S_ν = κ + m_ν for κ ≤ ν + 1, by S_ν = 2(ν+1) + κ²/S_{ν+1}: even in κ, so that all
    derivatives of the odd function A = κ/S vanish at 0 where they must."""
    square = kappa * kappa

    def step(total, twice):
        return twice + square / total, None

    start = 2 * (nu + 25) * jnp.ones_like(kappa)
    twice = 2 * (nu + np.arange(24, 0, -1))
    return jax.lax.scan(step, start, jnp.asarray(twice, kappa.dtype))[0]


def _pair(nu: float, kappa: Array) -> tuple[Array, Array]:
    """A = I_{ν+1}/I_ν and 1 − A, by formulas whose derivatives do not cancel either."""
    small = kappa < nu + 1
    low = jnp.where(small, kappa, 0)
    high = jnp.where(small, nu + 1, kappa)
    ratio = low / _small_sum(nu, low)
    m = _ladder(nu, 1, high)[1][0]
    complement = m / (high + m)
    return jnp.where(small, ratio, 1 - complement), jnp.where(
        small, 1 - ratio, complement
    )


def _derivative(f, kappa: Array) -> Array:
    return jax.jvp(f, (kappa,), (jnp.ones_like(kappa),))[1]


# Forward mode through the recurrence, whatever mode the caller is in: reverse mode through
# loops is slow to compile, twice so for A''.


@functools.partial(jax.jit, static_argnums=0)
def _curvature(nu: float, kappa: Array) -> Array:
    return _derivative(lambda x: _derivative(lambda y: _pair(nu, y)[0], x), kappa)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0)
def _slope(nu: float, kappa: Array) -> Array:
    return _derivative(lambda x: _pair(nu, x)[0], kappa)


@_slope.defjvp
def _slope_jvp(nu, primals, tangents):
    return _slope(nu, *primals), _curvature(nu, *primals) * tangents[0]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0)
def _ratio_and_complement(nu: float, kappa: Array) -> tuple[Array, Array]:
    return _pair(nu, kappa)


@_ratio_and_complement.defjvp
def _ratio_and_complement_jvp(nu, primals, tangents):
    change = _slope(nu, *primals) * tangents[0]
    return _ratio_and_complement(nu, *primals), (change, -change)


def _log_terms(nu: float, kappa: Array) -> tuple[Array, Array]:
    """Whether κ is small, and log((2/κ)^ν Γ(ν+1) I_ν(κ)) where it is, else
    log(e^{−κ} I_ν(κ)): the sums over the orders above ν in which nothing cancels."""
    small = kappa < max(20.0, nu + 1)
    steps = max(0, math.ceil(_START - nu))
    total = jnp.where(small, *_debye_logs(nu + steps, kappa))
    orders, m = _ladder(nu, steps + 1, kappa)
    twice = 2 * (orders[:-1] + 1)
    growth = kappa * (kappa / (twice * (kappa + m[1:])))  # (κ + m_ν)/(2(ν+1)) − 1
    terms = jnp.where(small, growth, m[:-1] / jnp.where(small, 1, kappa))
    return small, total + jnp.sum(jnp.log1p(terms), axis=0)


def _log_power(nu: float, kappa: Array) -> Array:
    """log((κ/2)^ν/Γ(ν+1)), the factor of I_ν(κ) that vanishes at κ = 0."""
    if nu == 0:
        return jnp.zeros_like(kappa)
    return nu * jnp.log(kappa * (math.e / (2 * nu))) - log_gamma_rest(nu)


@jax.custom_jvp
def _with_slope(value: Array, kappa: Array, slope: Array) -> Array:
    return value


@_with_slope.defjvp
def _with_slope_jvp(primals, tangents):
    slope = primals[2]
    return _with_slope(*primals), slope * tangents[1]


def _log_scaled(nu: float, kappa: Array) -> Array:
    small, value = _log_terms(nu, kappa)
    fall = jnp.where(small, kappa, _log_power(nu, jnp.where(small, 1, kappa)))
    return jax.lax.stop_gradient(value - fall)


@functools.partial(jax.jit, static_argnums=0)
def _log_bessel(nu: float, kappa: Array) -> Array:
    _, complement = _ratio_and_complement(nu, kappa)
    return _with_slope(_log_scaled(nu, kappa), kappa, -complement)


@functools.partial(jax.jit, static_argnums=0)
def _log_bessel_i(nu: float, kappa: Array) -> Array:
    small, value = _log_terms(nu, kappa)
    value = jnp.where(small, value + _log_power(nu, kappa), value + kappa)
    slope, _ = _ratio_and_complement(nu, kappa)
    if nu > 0:
        slope = slope + nu / kappa
    return _with_slope(jax.lax.stop_gradient(value), kappa, slope)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _log_bessel_sequence(nu: float, count: int, kappa: Array) -> Array:
    orders, m = _ladder(nu, count, kappa)
    total = kappa + m
    growth = kappa * (kappa / (2 * orders[1:] * total[1:]))
    falls = jnp.cumsum(jnp.log1p(growth), axis=0)
    value = _log_scaled(nu, kappa) - jnp.concatenate([jnp.zeros_like(m[:1]), falls])
    value = jax.lax.stop_gradient(value)
    value = _with_slope(value, jnp.broadcast_to(kappa, m.shape), -m / total)
    return jnp.moveaxis(value, 0, -1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _bessel_ratio_sequence(nu: float, count: int, kappa: Array) -> Array:
    orders, m = _ladder(nu, count, kappa)
    total = kappa + m
    # Of equal values, those whose derivatives do not cancel.
    ratios = jnp.where(kappa < orders + 1, kappa / total, 1 - m / total)
    return jnp.moveaxis(ratios, 0, -1)


# ------------------------------------------------------------------- what is public


def _check_order(nu: float | int) -> float:
    if not (math.isfinite(nu) and nu >= 0):
        raise ValueError(
            f"Argument `nu` must be finite and ≥ 0, but is {nu!r}. For integer orders "
            "I_{−k} = I_k."
        )
    return float(nu)


def _concentrations(kappa: ArrayLike) -> Array:
    """`kappa` as an array, refused if a value that is known is negative or not finite."""
    kappa = as_float(kappa, "kappa")
    if not is_traced(kappa):
        values = np.asarray(kappa)
        bad = ~(np.isfinite(values) & (values >= 0))
        if bad.any():
            raise ValueError(
                "Argument `kappa` must be finite and ≥ 0, but an entry is "
                f"{values[bad][0]}. Use |κ| and turn the mean direction."
            )
    return kappa


def bessel_ratio(nu: float | int, kappa: ArrayLike) -> Float[Array, "..."]:
    """I_{ν+1}(κ)/I_ν(κ) = κ/(κ + m_ν), for a fixed order ν ≥ 0 and κ ≥ 0 (κ² must not overflow).

    Values in [0, 1). A traced κ is not checked. Works in float32 and float64, under `jit`,
    `vmap` and all derivatives; cost O(30 − ν). **Source:** the downward recurrence,
    DLMF 10.29.1, started by 10.41.
    """
    return _ratio_and_complement(_check_order(nu), _concentrations(kappa))[0]


def bessel_ratio_sequence(
    nu: float | int, count: int, kappa: ArrayLike
) -> Float[Array, "... j"]:
    """I_{ν+j+1}(κ)/I_{ν+j}(κ) for j = 0 … count − 1, along a new last axis, by one run of
    the recurrence: O(count) for each κ. As `bessel_ratio` otherwise, but for κ → 0 the
    second derivative, which vanishes there, is exact to roundings of the first only."""
    count = check_count(count, "count")
    return _bessel_ratio_sequence(_check_order(nu), count, _concentrations(kappa))


def mean_resultant(d: int, kappa: ArrayLike) -> Float[Array, "..."]:
    """A_d(κ) = I_{d/2}(κ)/I_{d/2−1}(κ), the mean resultant length of the von Mises–Fisher
    law on S^{d−1}; for κ → ∞, 1 − A_d ≈ (d−1)/(2κ).

    **Arguments:** `d` ≥ 2, an integer; `kappa` ≥ 0, an array. **Source:** *multiscale*,
    (14). Every derivative is the derivative of the same recurrence: the first two are
    `mean_resultant_slope` and `mean_resultant_curvature`."""
    return bessel_ratio(check_dimension(d) / 2 - 1, kappa)


def mean_resultant_slope(d: int, kappa: ArrayLike) -> Float[Array, "..."]:
    """A_d'(κ) = 1 − A² − (d−1)A/κ to full relative precision: from 1/d at κ = 0 down to
    (d−1)/(2κ²) for κ → ∞, where the right-hand side would cancel.

    **Source:** *multiscale*, (15), whose last expression (d−1)²/(4κ²) holds for d = 3
    only."""
    return _slope(check_dimension(d) / 2 - 1, _concentrations(kappa))


def mean_resultant_curvature(d: int, kappa: ArrayLike) -> Float[Array, "..."]:
    """A_d''(κ) = −2AA' − (d−1)A'/κ + (d−1)A/κ² to full relative precision: from
    −6κ/(d²(d+2)) for κ → 0 to −(d−1)/κ³ for κ → ∞.

    **Source:** *multiscale*, after (15), where the last term is missing."""
    return _curvature(check_dimension(d) / 2 - 1, _concentrations(kappa))


def mean_resultant_complement(d: int, kappa: ArrayLike) -> Float[Array, "..."]:
    """1 − A_d(κ) to full relative precision, also where A_d rounds to 1."""
    nu = check_dimension(d) / 2 - 1
    return _ratio_and_complement(nu, _concentrations(kappa))[1]


def bessel_quotient(k: int, kappa: ArrayLike) -> Float[Array, "..."]:
    """I_k(κ)/I_0(κ) for an integer k ≥ 0, as the product of the ratios below k."""
    kappa = _concentrations(kappa)
    if check_count(k, "k", 0) == 0:
        return jnp.ones_like(kappa)
    return jnp.prod(_bessel_ratio_sequence(0.0, k, kappa), axis=-1)


def log_bessel(nu: float | int, kappa: ArrayLike) -> Float[Array, "..."]:
    """log(e^{−κ} (2/κ)^ν Γ(ν+1) I_ν(κ)): 0 at κ = 0, smooth, no overflow while κ² has none.

    The factors make it the log-mean of e^{κ(q−1)} over the sphere S^{2ν+1}, which is what
    normalises a von Mises–Fisher law. Fixed order ν ≥ 0; its derivative in κ is
    I_{ν+1}/I_ν − 1, from the same recurrence. Exact to a few roundings of its own size,
    also for κ → 0. A traced κ is not checked."""
    return _log_bessel(_check_order(nu), _concentrations(kappa))


def log_bessel_sequence(
    nu: float | int, count: int, kappa: ArrayLike
) -> Float[Array, "... j"]:
    """`log_bessel` of the orders ν + j, j = 0 … count − 1, along a new last axis:

        L_j = log(e^{−κ} (2/κ)^{ν+j} Γ(ν+j+1) I_{ν+j}(κ)),    L_j' = I_{ν+j+1}/I_{ν+j} − 1,

    for an array κ ≥ 0 of any shape, by one run of the recurrence: O(count) for each κ.
    L_j falls from L_0 with j, L_j − L_{j+1} = log((κ + m)/(2(ν+j+1))), so that no sum
    cancels. Values and two derivatives from κ = 0 on; a traced κ is not checked."""
    count = check_count(count, "count")
    return _log_bessel_sequence(_check_order(nu), count, _concentrations(kappa))


def log_bessel_i(nu: float | int, kappa: ArrayLike) -> Float[Array, "..."]:
    """log I_ν(κ) for a fixed order ν ≥ 0 and κ ≥ 0, without overflow: about
    κ − ½ log 2πκ for large κ; −∞ at κ = 0 if ν > 0, where its derivative
    I_{ν+1}/I_ν + ν/κ is infinite (`log_bessel` has the factor κ^ν taken out). The error is
    some roundings of ν + κ + |log I_ν|. A traced κ is not checked. (jax.scipy.special has
    the orders 0 and 1 only.)"""
    return _log_bessel_i(_check_order(nu), _concentrations(kappa))


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


def check_kappa(kappa: ArrayLike, name: str = "kappa") -> Float[Array, ""]:
    """`kappa` as a concentration: a finite scalar ≥ 0."""
    return check_scalar(kappa, name, minimum=0.0)
