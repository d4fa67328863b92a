"""Pairing, the phase of time e^{cβ}: clusters merge two by two (V = QᵀK = I).

Two clusters of masses a and c at angle φ are a closed system. With E = β(1 − cos φ) and
g = 2ac/(a² + c²), each moves along the geodesic that joins them,

    speed of a = sin φ/(1 + (a/c)e^E),    speed of c = sin φ/(1 + (c/a)e^E),

so that φ' = −sin φ · S with S = 2z(1 + gz)/(g + 2z + gz²), z = e^{−E}: at contact (E = 0)
S = 1, far apart S ≈ (a/c + c/a)e^{−E}. Times are integrals of dφ/(sin φ · S). In the
coordinate δ = log tan(φ₀/2) − log tan(φ/2), which has dδ = −dφ/sin φ,

    T = ∫₀^D dδ/S,    sin²(φ/2) = p₀e^{−2δ}/(e^{−2δ} + q₀(1 − e^{−2δ})),

p₀ = sin²(φ₀/2), q₀ = cos²(φ₀/2): both ends are smooth and nothing cancels. All is taken
relative to the integrand at δ = 0, its maximum, of size e^{E₀}, which enters as a logarithm.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .. import sphere
from ..checks import ArrayLike, as_float, check_entries, shown

_GAUSS_X, _GAUSS_W = np.polynomial.legendre.leggauss(16)
_PANELS = 16  # of equal length in δ, at most 1.9 for angles in [1e-6, π − 1e-6]
_FALLS = np.arange(4.0, 49.0, 4.0)  # and cuts where E has fallen by so much
MASS_RATIO = 1e30  # masses further apart are refused
NO_MASS = "Leave out clusters without mass."
_RADIANS = "Angles are in radians."

# ------------------------------------------------------------------ two clusters


def pair_speed(
    angle: ArrayLike, beta: ArrayLike, masses: ArrayLike = (0.5, 0.5), log: bool = False
) -> Float[Array, "..."]:
    """−φ', the speed at which two clusters of (SA) with V = QᵀK = I approach each other:

        −φ' = sin φ [1/(1 + (a/c)e^{β(1−cos φ)}) + 1/(1 + (c/a)e^{β(1−cos φ)})].

    **Arguments:** `angle` φ in [0, π] (radians), `beta` ≥ 0 and `masses` (a, c) > 0, of
    which only the ratio counts, 1e±30 at most; arrays are broadcast. `log=True` gives the
    logarithm, which does not underflow at any β (−∞ at φ = 0).

    **Raises:** `ValueError` for arguments out of range. (Derived: with weights a, c the
    field at x is P_x y·c e^{β cos φ}/(a e^β + c e^{β cos φ}), and |P_x y| = sin φ. Equal
    masses give −φ' = 2 sin φ/(1 + e^{β(1−cos φ)}).) **Source:** *multiscale*, (SA) in
    Sec. 3.4."""
    angle, beta, ratio = _pair(angle, beta, masses)
    top = jnp.asarray(math.pi, angle.dtype)
    angle = check_entries(
        angle, (angle >= 0) & (angle <= top), "angle", "lie in [0, π]", _RADIANS
    )
    return _speed(angle, beta, balance(ratio), log)


@functools.partial(jax.jit, static_argnames="log")
def _speed(angle: Array, beta: Array, g: Array, log: bool) -> Array:
    sine, cosine = _half_angle(angle)
    E = 2 * beta * sine**2
    if log:
        cosine = jnp.where(cosine >= 0, cosine, -cosine)  # the rounding of π
        return math.log(2) + jnp.log(sine) + jnp.log(cosine) - _log_slowness(E, g)
    return 2 * sine * cosine * jnp.exp(-_log_slowness(E, g))


def merge_time(
    angle: ArrayLike,
    end: ArrayLike,
    beta: ArrayLike,
    masses: ArrayLike = (0.5, 0.5),
    log: bool = False,
) -> Float[Array, "..."]:
    """Time in which two clusters of (SA) with V = QᵀK = I come from one angle to another:

        T = ∫_end^angle dφ/(−φ'),    −φ' = `pair_speed`(φ, β, masses).

    For β → ∞, log T ≈ β(1 − cos φ₀) + log(ac/(a² + c²)) − log(β sin² φ₀): the third scale
    of time, O(e^{cβ}) with c = 1 − cos φ₀. T → ∞ as end → 0 (like −log end: clusters merge
    at exponential rate) and as φ₀ → π (antipodal clusters rest for ever, and are refused).

    **Arguments:** `angle` φ₀ in (0, π) and `end` in (0, φ₀), in radians; `beta` ≥ 0;
    `masses` (a, c) > 0, of which only the ratio counts. Arrays are broadcast. `log=True`
    gives log T, finite at any β.

    Gauss rules in the coordinate log tan(φ/2), 448 nodes; relative error 1e-12 (absolute
    1e-12·max(1, |log T|) for the logarithm) for angles in [1e-6, π − 1e-6], β ≤ 1e6 and
    mass ratios in [1e-6, 1e6]; float32: 1e-5. Derivatives are those of the integral:
    −1/speed at `end`, 1/speed at `angle`; all orders.

    **Raises:** `ValueError` for arguments out of range, and if T overflows without
    `log=True`. **Source:** *multiscale*, Prop. 3.11, whose limit has
    −φ' = (a/c + c/a) sin φ e^{−β(1−cos φ)}; here without a limit (Derived: `pair_speed`)."""
    angle, end, beta, ratio = _opposed(angle, end, beta, masses)
    log_time = log_merge_time(angle, end, beta, balance(ratio))
    return log_time if log else _unlog(log_time)


def pair_angle(
    t: ArrayLike,
    angle: ArrayLike,
    beta: ArrayLike,
    masses: ArrayLike = (0.5, 0.5),
    log: bool = False,
) -> Float[Array, "..."]:
    """The angle of two clusters after time `t`, the inverse of `merge_time` in `end`.

    **Arguments:** `t` ≥ 0, or with `log=True` the logarithm of the time; the others as for
    `merge_time`. Arrays are broadcast. Bisection, 64 evaluations of `merge_time`;
    derivatives by the implicit function theorem. Near the collapse the angle depends on t
    as dφ/d(log t) = T·φ', which is large: errors of t grow accordingly.

    **Raises:** `ValueError` for arguments out of range. (Derived: `pair_speed`.)"""
    t = as_float(t, "t")
    angle, beta, ratio = _pair(angle, beta, masses)
    t, angle, beta, ratio = _common(t, check_open(angle), beta, ratio)
    if log:
        t = check_entries(t, jnp.isfinite(t), "t", "be finite", "It is a logarithm.")
        return _angle_after(t, angle, beta, balance(ratio))
    t = check_entries(
        t,
        (t >= 0) & jnp.isfinite(t),
        "t",
        "be finite and ≥ 0",
        "Give log t with `log=True` where t overflows.",
    )
    later = t > 0
    moved = _angle_after(jnp.log(jnp.where(later, t, 1)), angle, beta, balance(ratio))
    start = angle - t * _speed(angle, beta, balance(ratio), False)
    return jnp.where(later, moved, start)


def merge_point(
    x: ArrayLike,
    y: ArrayLike,
    end: ArrayLike,
    beta: ArrayLike,
    masses: ArrayLike = (0.5, 0.5),
) -> Float[Array, " d"]:
    """Where two clusters at x (mass a) and y (mass c) meet, a unit vector on the geodesic.

    From angle φ₀ to `end` the first travels

        ∫_end^φ₀ (speed of a)/(−φ') dφ = ∫_end^φ₀ (z + c/a)/(2z + a/c + c/a) dφ,  z = e^{−E}:

    each in proportion to the other's mass for β(1 − cos φ) → 0, in proportion to its square
    for β → ∞. The rest, of length `end`, is divided as at contact, c : a; the error of this
    is O(β end³).

    **Arguments:** unit vectors `x`, `y` (d,), at an angle in (`end`, π); the others as for
    `merge_time`, as scalars. **Raises:** `ValueError` otherwise. (Derived from the two
    speeds of `pair_speed`.)"""
    x, y = sphere.check_unit(x, "x"), sphere.check_unit(y, "y")
    if x.shape != y.shape:
        raise ValueError(
            "Arguments `x` and `y` must have one shape (d,), but their shapes are "
            f"{x.shape} and {y.shape}."
        )
    x, y = _common(x, y)
    _, end, beta, ratio = _opposed(sphere.distance(x, y), end, beta, masses)
    return meeting_point(x, y, *(v.astype(x.dtype) for v in (end, beta, ratio)))


# ------------------------------------------------------------------ their integrals


def _half_angle(angle: Array) -> tuple[Array, Array]:
    """sin(φ/2) and cos(φ/2)."""
    return jnp.sin(angle / 2), jnp.cos(angle / 2)


def balance(ratio: Array) -> Array:
    """g = 2ac/(a² + c²) of the ratio a/c."""
    return 2 / (ratio + 1 / ratio)


def _factor(E: Array, g: Array) -> Array:
    """e^{−E}/S: 1 for E = 0, and g/2 for E → ∞."""
    z = jnp.exp(-E)
    return (g + z * (2 + g * z)) / (2 * (1 + g * z))


def _log_slowness(E: Array, g: Array) -> Array:
    """log(1/S)."""
    return E + jnp.log(_factor(E, g))


def _length(angle: Array, end: Array) -> Array:
    """D = log(tan(angle/2)/tan(end/2)), without cancellation for close angles."""
    return jnp.log1p(
        jnp.sin((angle - end) / 2) / (_half_angle(angle)[1] * jnp.sin(end / 2))
    )


def _angle_at(angle: Array, delta: Array) -> Array:
    """φ at δ: tan(φ/2) = tan(φ₀/2)e^{−δ}."""
    sine, cosine = _half_angle(angle)
    return 2 * jnp.arctan2(sine * jnp.exp(-delta), cosine)


def _positions(angle: Array, delta: Array) -> tuple[Array, Array, Array]:
    """p/p₀, q/q₀ and 1 − p/p₀ with p = sin²(φ/2), q = cos²(φ/2) at δ."""
    q0 = _half_angle(angle)[1] ** 2
    near, far = jnp.exp(-2 * delta), -jnp.expm1(-2 * delta)
    total = near + q0 * far
    return near / total, 1 / total, q0 * far / total


def _nodes(angle: Array, D: Array, beta: Array) -> tuple[Array, Array]:
    """Nodes δ in (0, D) and weights of a composite Gauss rule, with panels no longer than
    D/16 (30/16, and one beyond δ = 30, where nothing changes any more) on which E varies by
    at most 4, as long as it matters. They move with D, and with
    nothing else that is differentiated: a rule for every derivative of the integrand."""
    fixed = jax.lax.stop_gradient
    sine, cosine = _half_angle(fixed(angle))
    E0 = 2 * fixed(beta) * sine**2
    rest = E0 - jnp.asarray(_FALLS, D.dtype)
    reached = rest > 0
    m = jnp.asarray(_FALLS, D.dtype) / (cosine**2 * jnp.where(reached, rest, 1))
    cuts = jnp.where(reached, jnp.log1p(m) / (2 * fixed(D)), 1)
    even = jnp.linspace(0, 1, _PANELS + 1, dtype=D.dtype)
    even = jnp.append(even * jnp.minimum(1, 30 / fixed(D)), 1)
    edges = jnp.sort(jnp.concatenate([even, jnp.minimum(cuts, 1)]))
    half = jnp.diff(edges)[:, None] / 2
    nodes = (edges[:-1, None] + half * (1 + jnp.asarray(_GAUSS_X, D.dtype))).ravel()
    weights = (half * jnp.asarray(_GAUSS_W, D.dtype)).ravel()
    return D * nodes, D * weights


def _quadrature(angle: Array, D: Array, beta: Array, g: Array) -> Array:
    delta, weights = _nodes(angle, D, beta)
    E0 = 2 * beta * _half_angle(angle)[0] ** 2
    share, _, fallen = _positions(angle, delta)
    terms = jnp.exp(-E0 * fallen) * (_factor(E0 * share, g) / _factor(E0, g))
    return _log_slowness(E0, g) + jnp.log(jnp.sum(weights * terms))


@jax.custom_jvp
def _log_time(angle: Array, D: Array, beta: Array, g: Array) -> Array:
    """log ∫₀^D dδ/S. The rule for D is exact: a quadrature loses 1/S at D to cancellation
    where it is e^{−E₀} of the maximum."""
    return _quadrature(angle, D, beta, g)


@_log_time.defjvp
def _log_time_jvp(primals, tangents):
    angle, D, beta, g = primals
    value = _log_time(*primals)
    _, slope = jax.jvp(
        lambda angle, beta, g: _quadrature(angle, D, beta, g),
        (angle, beta, g),
        (tangents[0], *tangents[2:]),
    )
    return value, slope + jnp.exp(_log_last(*primals) - value) * tangents[1]


def _log_last(angle: Array, D: Array, beta: Array, g: Array) -> Array:
    """log(1/S) at δ = D."""
    return _log_slowness(
        2 * beta * _half_angle(angle)[0] ** 2 * _positions(angle, D)[0], g
    )


@jax.jit
@jnp.vectorize
def log_merge_time(angle: Array, end: Array, beta: Array, g: Array) -> Array:
    return _log_time(angle, _length(angle, end), beta, g)


@jax.custom_jvp
def _length_after(log_t: Array, angle: Array, beta: Array, g: Array) -> Array:
    """The D that is passed in the time e^{log_t}, at most what leaves an angle > 0; by
    bisection in log D between t·S(φ₀) and t: 1/S falls from 1/S(φ₀) to 1 or more."""
    floor = math.log(float(jnp.finfo(log_t.dtype).tiny)) + 10
    first = _log_slowness(2 * beta * _half_angle(angle)[0] ** 2, g)
    low = jnp.clip(log_t - first, floor, math.log(-floor))
    high = jnp.clip(log_t, floor, math.log(-floor))

    def halve(_, bracket):
        low, high = bracket
        middle = (low + high) / 2
        late = _quadrature(angle, jnp.exp(middle), beta, g) > log_t
        return jnp.where(late, low, middle), jnp.where(late, middle, high)

    low, high = jax.lax.fori_loop(0, 64, halve, (low, high))
    return jnp.exp((low + high) / 2)


@_length_after.defjvp
def _length_after_jvp(primals, tangents):
    log_t, *rest = primals
    D = _length_after(*primals)
    angle, beta, g = rest
    _, slope = jax.jvp(
        lambda angle, beta, g: _log_time(angle, D, beta, g), tuple(rest), tangents[1:]
    )
    rate = jnp.exp(log_t - _log_last(angle, D, beta, g))  # dD/d(log t)
    return D, rate * (tangents[0] - slope)


@jax.jit
@jnp.vectorize
def _angle_after(log_t: Array, angle: Array, beta: Array, g: Array) -> Array:
    return _angle_at(angle, _length_after(log_t, angle, beta, g))


def _travel(angle: Array, end: Array, beta: Array, ratio: Array) -> Array:
    """The way of the first cluster (mass ratio a/c) down to `end`, and as at contact to 0."""
    D, g = _length(angle, end), balance(ratio)
    delta, weights = _nodes(angle, D, beta)
    sine, cosine = _half_angle(angle)
    p_share, q_share, _ = _positions(angle, delta)
    z = jnp.exp(-2 * beta * sine**2 * p_share)
    sin_phi = 2 * sine * cosine * jnp.sqrt(p_share * q_share)
    return jnp.sum(weights * sin_phi * share_of_way(z, ratio, g)) + end / (1 + ratio)


def share_of_way(z: Array, ratio: Array, g: Array) -> Array:
    """(speed of a)/(−φ') = (z + c/a)/(2z + a/c + c/a)."""
    return g * (z + 1 / ratio) / (2 * (1 + g * z))


@jax.jit
def meeting_point(x: Array, y: Array, end: Array, beta: Array, ratio: Array) -> Array:
    """`merge_point`; clusters in contact already meet in proportion to their masses."""
    angle = sphere.distance(x, y)
    apart = angle > end
    way = jnp.where(
        apart,
        _travel(jnp.where(apart, angle, (end + math.pi) / 2), end, beta, ratio),
        angle / (1 + ratio),
    )
    return along(x, y, angle, way)


def along(x: Array, y: Array, angle: Array, way: Array) -> Array:
    """The point of the geodesic from x to y at the distance `way` from x."""
    fraction = way / jnp.where(angle > 0, angle, 1)
    return sphere.normalise(sphere.exp(x, fraction * sphere.log(x, y)))


# ------------------------------------------------------------------ the limit β → ∞


def pairing_limit_angle(
    angle: ArrayLike, s: ArrayLike, masses: ArrayLike = (0.5, 0.5)
) -> Float[Array, "..."]:
    """The angle of the closest pair in the limit β → ∞, after rescaled time s ≥ 0:

        tan(φ/2)(s) = tan(φ₀/2) e^{−(a/c + c/a)s},    dt = e^{β(1−cos φ)} ds.

    The rate is 2 for equal masses. Arrays are broadcast. **Source:** *multiscale*,
    Prop. 3.11; for unequal masses (Derived: in time s, φ' = −sin φ · S e^E, and
    S e^E → 2/g = a/c + c/a.)"""
    angle, _, ratio = _pair(angle, 0.0, masses)
    angle, s, ratio = _common(check_open(angle), _check_rescaled(s), ratio)
    return limit_angle(angle, s, balance(ratio))


@jax.jit
def limit_angle(angle: Array, s: Array, g: Array) -> Array:
    return _angle_at(angle, 2 * s / g)


def pairing_limit_time(
    angle: ArrayLike,
    s: ArrayLike,
    beta: ArrayLike,
    masses: ArrayLike = (0.5, 0.5),
    log: bool = False,
) -> Float[Array, "..."]:
    """The time t of the flow at rescaled time s > 0 of the limit:

        t = ∫₀^s e^{β(1−cos φ(σ))} dσ,    φ = `pairing_limit_angle`.

    `log=True` gives log t. It is what is left of `merge_time` for β → ∞: the first term of
    1/S = (g/2)e^E + 1 − g²/2 + O(e^{−E}), g = 2ac/(a² + c²). Arguments and errors as there.
    **Source:** *multiscale*, Prop. 3.11."""
    angle, beta, ratio = _pair(angle, beta, masses)
    s = _check_rescaled(s, strict=True)
    angle, s, beta, ratio = _common(check_open(angle), s, beta, ratio)
    log_time = _limit_time(angle, s, beta, balance(ratio))
    return log_time if log else _unlog(log_time)


@jax.jit
@jnp.vectorize
def _limit_time(angle: Array, s: Array, beta: Array, g: Array) -> Array:
    D = 2 * s / g
    delta, weights = _nodes(angle, D, beta)
    E0 = 2 * beta * _half_angle(angle)[0] ** 2
    fallen = _positions(angle, delta)[2]
    return E0 + jnp.log(g / 2) + jnp.log(jnp.sum(weights * jnp.exp(-E0 * fallen)))


# ------------------------------------------------------------------ arguments


def _common(*values: Array) -> tuple[Array, ...]:
    """The values in one dtype."""
    dtype = jnp.result_type(*values)
    return tuple(v.astype(dtype) for v in values)


def _pair(
    angle: ArrayLike, beta: ArrayLike, masses: ArrayLike
) -> tuple[Array, Array, Array]:
    """angle, β and the ratio a/c in one dtype, the last two checked."""
    try:
        a, c = masses  # type: ignore
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Argument `masses` must be a pair (a, c), but is {masses!r}."
        ) from error
    angle, beta = as_float(angle, "angle"), as_float(beta, "beta")
    a, c = as_float(a, "masses"), as_float(c, "masses")
    angle, beta, a, c = _common(angle, beta, a, c)
    beta = check_entries(
        beta,
        (beta >= 0) & jnp.isfinite(beta),
        "beta",
        "be finite and ≥ 0",
        "For the limit β → ∞ see `pairing_limit_angle`.",
    )
    a, c = (
        check_entries(
            v, (v > 0) & jnp.isfinite(v), "masses", "be finite and > 0", NO_MASS
        )
        for v in (a, c)
    )
    ratio = check_entries(
        a / c,
        (a / c <= MASS_RATIO) & (c / a <= MASS_RATIO),
        "masses",
        f"have a ratio a/c in [{1 / MASS_RATIO:g}, {MASS_RATIO:g}]",
        NO_MASS,
    )
    return angle, beta, ratio


def check_open(angle: Array) -> Array:
    """`angle` in (0, π)."""
    return check_entries(
        angle,
        (angle > 0) & (angle < jnp.asarray(math.pi, angle.dtype)),
        "angle",
        "lie in (0, π)",
        f"Antipodal clusters rest for ever, coincident ones are one. {_RADIANS}",
    )


def _opposed(
    angle: ArrayLike, end: ArrayLike, beta: ArrayLike, masses: ArrayLike
) -> tuple[Array, Array, Array, Array]:
    """angle, end, β and a/c in one dtype, checked, with 0 < end < angle < π."""
    angle, beta, ratio = _pair(angle, beta, masses)
    angle, end, beta, ratio = _common(angle, as_float(end, "end"), beta, ratio)
    angle = check_open(angle)
    end = check_entries(
        end,
        (end > 0) & (end < angle),
        "end",
        "lie strictly between 0 and the angle at the start",
        f"Clusters approach each other and never touch. {_RADIANS}",
    )
    return angle, end, beta, ratio


def _check_rescaled(s: ArrayLike, strict: bool = False) -> Array:
    s = as_float(s, "s")
    good = (s > 0 if strict else s >= 0) & jnp.isfinite(s)
    rule = "be finite and > 0" if strict else "be finite and ≥ 0"
    return check_entries(s, good, "s", rule, "The limit runs forward in time.")


def _unlog(log_time: Array) -> Array:
    """T of log T, unless it overflows."""
    time = jnp.exp(log_time)
    return check_entries(
        time,
        jnp.isfinite(time),
        "log",
        f"be True where the time overflows {time.dtype}",
        f"The largest log T is {shown(jnp.max(log_time))}.",
    )
