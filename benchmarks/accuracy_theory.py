"""The closed-form functions of `meanformer.theory`, with the references of `accuracy.py`."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
from mpmath import mp, mpf

from errors import (
    Case,
    Entry,
    Number,
    differentiated,
    own_size,
    ratio_derivatives,
)
from meanformer import theory

PI = math.pi


def along(points: np.ndarray, *columns: int) -> np.ndarray:
    """Tangents along these variables, in turn from point to point."""
    axes = np.resize(np.array(columns), len(points))
    return np.eye(points.shape[1])[axes]


def logarithms(exact: Callable) -> Callable:
    return lambda *point: [mpmath.log(e) for e in exact(*point)]


# ------------------------------------------------------------- around the uniform law


def growth(d: int, model: str, log: bool, degrees: list[int], betas) -> Case:
    """γ_k = k(k+d−2) I_{ν+k}/(β I_ν) of (SA), with ν = d/2 − 1, and that times the mean of
    e^{βq} over the sphere of (USA)."""
    nu = mpf(d) / 2 - 1

    def exact(beta):
        low = mpmath.besseli(nu, beta)
        mean = mpmath.gamma(nu + 1) * (2 / beta) ** nu * low if model == "usa" else 1
        rates = [
            k * (k + d - 2) * mpmath.besseli(nu + k, beta) / (beta * low) * mean
            for k in degrees
        ]
        return [mpmath.log(g) for g in rates] if log else rates

    def slope(beta):
        low = 0 if model == "usa" else ratio_derivatives(nu, beta)[0]
        logs = [
            ratio_derivatives(nu + k, beta)[0] - low + (k - 1) / beta for k in degrees
        ]
        return logs if log else [v * e for v, e in zip(logs, exact(beta))]

    return Case(
        lambda b: theory.growth_rates(b, d, np.array(degrees), model, log),
        np.array(betas),
        exact,
        slope,
    )


def smoothing(d: int, points: list[float]) -> Case:
    nu, picked = mpf(d) / 2 - 1, [1, 2, 7, 40]

    def exact(beta):
        low = mpmath.besseli(nu, beta)
        return [mpmath.log(mpmath.besseli(nu + l, beta) / low) for l in picked]

    def slope(beta):
        low = ratio_derivatives(nu, beta)[0]
        return [ratio_derivatives(nu + l, beta)[0] - low + l / beta for l in picked]

    return Case(
        lambda b: theory.log_smoothing_multipliers(41, b, d)[..., np.array(picked)],
        np.array(points),
        exact,
        slope,
    )


def ring(modes: list[int]) -> Case:
    def exact(beta):
        zero, one = (mpmath.besseli(j, beta) for j in (0, 1))
        rates = []
        for k in modes:
            below, here, above = (mpmath.besseli(k + j, beta) for j in (-1, 0, 1))
            quotient_slope = (below + above) / (2 * zero) - here * one / zero**2
            rates.append(k * (-1) ** (k // 2) * quotient_slope)
        return rates

    return Case(
        lambda b: theory.ring_growth_rate(np.array(modes), b),
        np.array([0.1, 2, 30, 1e3, 1e6]),
        exact,
        differentiated(exact),
    )


def antipodal() -> Case:
    def exact(beta):
        return [2 / (1 + mpmath.exp(2 * beta))]

    points = np.array([0, 1e-6, 0.3, 1, 10, 40])
    return Case(theory.antipodal_growth, points, exact, differentiated(exact))


BETAS = [0.1, 2, 20, 80]
UNIFORM = [
    Entry(
        'theory.growth_rates(model="sa")',
        "d = 2, 3, 64, k ≤ 12, β = 0.1 … 10⁶",
        [growth(d, "sa", False, [1, 2, 5, 12], [*BETAS, 1e4, 1e6]) for d in (2, 3, 64)],
    ),
    Entry(
        'theory.growth_rates(model="usa")',
        "d = 2, 3, 64, k ≤ 12, β = 0.1 … 80",
        [growth(d, "usa", False, [1, 2, 5, 12], BETAS) for d in (2, 3, 64)],
    ),
    Entry(
        "theory.growth_rates(log=True)",
        "both models, d = 3, k ≤ 2000, β = 10⁻³ … 10⁶",
        [
            growth(3, model, True, [1, 7, 200, 2000], [1e-3, 1, 30, 1e4, 1e6])
            for model in ("sa", "usa")
        ],
        "itself or 1",
        size=own_size,
        slope_size=own_size,
    ),
    Entry(
        "theory.log_smoothing_multipliers",
        "d = 2, 3, 66, degree ≤ 40, β = 10⁻³ … 10⁶",
        [smoothing(d, [1e-3, 0.7, 30, 1e4, 1e6]) for d in (2, 3, 66)],
        "itself or 1",
        size=own_size,
        slope_size=own_size,
    ),
    Entry(
        "theory.ring_growth_rate",
        "k = 1, 3, 5, 9, 13, β = 0.1 … 10⁶",
        [ring([1, 3, 5, 9, 13])],
    ),
    Entry("theory.antipodal_growth", "β = 0 … 40", [antipodal()]),
]

# ------------------------------------------------------------------------- two clusters


def speed(angle, beta, a, c) -> list[Number]:
    """The speeds of two clusters towards each other, by the softmax of (SA) at each."""
    near, far = mpmath.exp(beta), mpmath.exp(beta * mpmath.cos(angle))
    shares = c * far / (a * near + c * far) + a * far / (c * near + a * far)
    return [mpmath.sin(angle) * shares]


def pair_speeds(log: bool, points: np.ndarray) -> Case:
    exact = logarithms(speed) if log else speed
    return Case(
        lambda x: theory.pair_speed(x[:, 0], x[:, 1], (x[:, 2], x[:, 3]), log),
        points,
        exact,
        differentiated(exact),
        along(points, 0, 1, 2),
    )


@functools.cache
def duration(angle, end, beta, a, c) -> Number:
    """∫ dφ/speed: in u = e^{β(1−cos φ)}, with h = (a/c + c/a)/2, the integrand is

        (u/(2h) + 1 − 1/(2h²) − (1 − 1/h²)/(2(1 + hu)))/sin φ,

    exponential integrals but for the last, bounded term, whose quadrature in log tan(φ/2)
    has its cuts where u grows."""
    h = (a / c + c / a) / 2
    w0, w1 = (mpmath.log(mpmath.tan(phi / 2)) for phi in (angle, end))
    if beta == 0:
        return w0 - w1
    p0, p1 = (2 * beta * mpmath.sin(phi / 2) ** 2 for phi in (angle, end))
    q0, q1 = (2 * beta * mpmath.cos(phi / 2) ** 2 for phi in (angle, end))
    time = (mpmath.ei(p0) - mpmath.ei(p1)) / (4 * h)
    time += mpmath.exp(2 * beta) * (mpmath.e1(q0) - mpmath.e1(q1)) / (4 * h)
    time += (1 - 1 / (2 * h * h)) * (w0 - w1)
    if h == 1:
        return time
    cuts = {w1 + (w0 - w1) * k / 20 for k in range(21)}
    levels = [level for level in range(1, 60, 3) if p1 < level < p0]
    cuts |= {mpmath.log(level / (2 * beta - level)) / 2 for level in levels}

    def rest(w):
        return 1 / (1 + h * mpmath.exp(2 * beta / (1 + mpmath.exp(-2 * w))))

    with mp.workdps(20):
        bounded = mpmath.quad(rest, sorted(cuts), maxdegree=6)
    return time - bounded * (1 - 1 / h**2) / 2


def merging() -> Case:
    points = np.array(
        [
            [3.1415, 1e-6, 0, 0.5, 0.5],
            [1.3, 0.2, 6, 0.5, 0.2],
            [3.1, 1e-3, 0.3, 1, 9],
            [1e-3, 1e-6, 1e6, 0.5, 0.5],
            [1.7, 1e-4, 900, 1, 9],
            [2.5, 2.4, 1e5, 0.5, 0.5],
            [3.1415, 1e-6, 1e6, 0.5, 0.5],
            [1, 1e-2, 30, 1, 1e6],
        ]
    )

    def slope(*point_and_tangent):
        angle, end, *rest = point = point_and_tangent[:5]
        along_angle, along_end = point_and_tangent[5:7]
        rate = along_angle / speed(angle, *rest)[0] - along_end / speed(end, *rest)[0]
        return [rate / duration(*point)]

    def value(x):
        return theory.merge_time(x[:, 0], x[:, 1], x[:, 2], (x[:, 3], x[:, 4]), log=True)

    exact = logarithms(lambda *p: [duration(*p)])
    return Case(value, points, exact, slope, along(points, 0))


def limit_angle() -> Case:
    points = np.array(
        [
            [1e-6, 0, 1, 1],
            [1e-6, 1, 1, 3],
            [1.2, 0.7, 1, 1],
            [3.1415, 5, 1, 2],
            [3.1415, 20, 2, 1],
            [2, 1e-3, 1, 1e3],
        ]
    )

    def exact(angle, s, a, c):
        fall = mpmath.exp(-(a / c + c / a) * s)
        return [2 * mpmath.atan(mpmath.tan(angle / 2) * fall)]

    return Case(
        lambda x: theory.pairing_limit_angle(x[:, 0], x[:, 1], (x[:, 2], x[:, 3])),
        points,
        exact,
        differentiated(exact),
        along(points, 0, 0, 1, 2),
    )


SLOW = np.array(
    [
        [1e-6, 0, 1, 1],
        [1e-3, 1e6, 1, 1],
        [1.5, 30, 1, 1e3],
        [2.5, 2, 1, 9],
        [3.1415, 10, 5, 1],
        [PI / 2, 60, 1, 2],
    ]
)
FAST = np.array(
    [[1e-6, 1e6, 1, 1], [1.5, 1e4, 1, 9], [2.5, 1e6, 3, 1], [3.1415, 300, 1, 1]]
)
PAIRING = [
    Entry(
        "theory.pair_speed",
        "angle = 10⁻⁶ … 3.1415, β(1 − cos) ≤ 60, mass ratio ≤ 10³",
        [pair_speeds(False, SLOW)],
    ),
    Entry(
        "theory.pair_speed(log=True)",
        "angle = 10⁻⁶ … 3.1415, β ≤ 10⁶, mass ratio ≤ 10³",
        [pair_speeds(True, np.concatenate([SLOW, FAST]))],
        "itself or 1",
        size=own_size,
        slope_size=own_size,
    ),
    Entry(
        "theory.merge_time(log=True)",
        "angles 10⁻⁶ … 3.1415, β = 0 … 10⁶, mass ratio ≤ 10⁶",
        [merging()],
        "itself or 1; derivative: itself",
        size=own_size,
    ),
    Entry(
        "theory.pairing_limit_angle",
        "angle = 10⁻⁶ … 3.1415, (a/c + c/a)s ≤ 50",
        [limit_angle()],
    ),
]

# ----------------------------------------------------- tilted laws and Laplace integrals


def coefficients(d: int) -> list[Case]:
    """α₁, α₂, β₂, α₃, β₃ of Eqs. (12), (13) from A, A', A''."""

    def exact(kappa):
        with mp.workdps(120):
            A, slope, bend = ratio_derivatives(mpf(d) / 2 - 1, kappa)
            if kappa == 0:
                return [A, mpf(0), slope, mpf(0), mpf(0)]
            beta2 = (1 - slope - A**2) / (d - 1)
            beta3 = (-bend - 2 * A * slope) / (d - 1)
            return [A, slope - beta2, beta2, bend - 3 * beta3, beta3]

    def value(kappa):
        c = theory.vmf_coefficients(d, kappa)
        return jnp.stack([c.alpha1, c.alpha2, c.beta2, c.alpha3, c.beta3], axis=-1)

    points = np.array([1e-4, 0.5, 3, 40, 1e3, 1e5])
    return [  # beyond κ = 10⁵ the derivative of α₃ underflows in float32
        Case(value, points, exact, differentiated(exact)),
        Case(value, np.array([0, 1e6, 0, 0, 0, 0]), exact),
    ]


def normaliser(d: int) -> Case:
    half = mpf(d) / 2

    def exact(beta):
        if beta == 0:
            return [mpmath.log(2 * mpmath.pi**half / mpmath.gamma(half))]
        bessel = mpmath.besseli(half - 1, beta)
        return [mpmath.log((2 * mpmath.pi) ** half * beta ** (1 - half) * bessel)]

    return Case(
        lambda b: theory.log_normaliser(d, b),
        np.array([0, 1e-6, 0.01, 0.5, 3, 12, 40, 1e3, 1e6]),
        exact,
        lambda beta: [ratio_derivatives(half - 1, beta)[0]],
    )


def laplace(d: int) -> Case:
    powers = [1e-3 - (d - 1), -0.9, 0, 1, 7.3, 300]
    points = np.array([[k, b] for k in powers for b in (1e-3, 1, 40, 1e3, 1e6)])

    def exact(k, beta):
        """By Kummer's transformation of the formula in the docstring."""
        b = mpf(d - 1) / 2
        a = b + k / 2
        around = 2 * mpmath.pi**b / mpmath.gamma(b) * mpmath.beta(a, b)
        kummer = mpmath.hyp1f1(b, a + b, 2 * beta)
        return [mpmath.log(around * mpf(2) ** (k / 2 + d - 2) * kummer) - beta]

    return Case(
        lambda x: theory.log_laplace_integral(d, x[:, 0], x[:, 1]),
        points,
        exact,
        differentiated(exact),
        along(points, 0, 1),
    )


TILTED = [
    Entry(
        "theory.vmf_coefficients",
        "d = 2, 3, 66, κ = 0 … 10⁶; derivative: κ = 10⁻⁴ … 10⁵",
        [case for d in (2, 3, 66) for case in coefficients(d)],
    ),
    Entry(
        "theory.log_normaliser",
        "d = 2, 3, 66, β = 0 … 10⁶",
        [normaliser(d) for d in (2, 3, 66)],
        "itself or 1; derivative: itself",
        size=own_size,
    ),
    Entry(
        "theory.log_laplace_integral",
        "d = 2, 66, k = 10⁻³−(d−1) … 300, β = 10⁻³ … 10⁶",
        [laplace(d) for d in (2, 66)],
        "itself or 1",
        size=own_size,
        slope_size=own_size,
    ),
]

# ------------------------------------------------------------------------ other laws


def closure(sign: int, points: np.ndarray) -> Case:
    def exact(variance, t, beta):
        a = beta * variance
        y = a + mpmath.log(a) - 2 * sign * t
        start = mpmath.log(y) if y > 1 else y
        return [
            mpmath.exp(mpmath.findroot(lambda u: mpmath.exp(u) + u - y, start)) / beta
        ]

    @jax.vmap
    def value(x):
        return theory.closure_variance(x[0], x[1], x[2], sign)

    return Case(
        value,
        points,
        exact,
        differentiated(exact),
        along(points, 0, 1, 2),
    )


def equiangular(n: int, model: str, log: bool, betas: list[float]) -> Case:
    low = -1 / (n - 1)
    shares = [0.02, 0.3, 0.9, 0.9999]
    points = np.array([[low + (1 - low) * s, b] for s in shares for b in betas])

    def exact(rho, beta):
        far = mpmath.exp(beta * rho)
        w = far / (mpmath.exp(beta) + (n - 1) * far) if model == "SA" else far / n
        return [2 * w * (1 - rho) * (1 + (n - 1) * rho)]

    wanted = logarithms(exact) if log else exact
    return Case(
        lambda x: theory.equiangular_rate(x[:, 0], n, x[:, 1], model, log=log),
        points,
        wanted,
        differentiated(wanted),
        along(points, 1, 0, 0),
    )


def moment(d: int, m: int) -> Case:
    """E_p as a quotient of Beta integrals."""

    def exact(p):
        outside, inside = mpf(d - m) / 2, mpf(m) / 2
        moved = mpmath.beta(outside + p / 2, inside - p / 2)
        return [moved / mpmath.beta(outside, inside)]

    def slope(p):
        ends = mpmath.digamma((d - m + p) / 2), mpmath.digamma((m - p) / 2)
        return [exact(p)[0] * (ends[0] - ends[1]) / 2]

    points = np.array([1e-3, 0.1, 0.5, 0.9]) * min(m, 4)
    return Case(lambda p: theory.lyapunov_moment(d, m, p), points, exact, slope)


def cap(d: int, points: list[float], measure_slope: bool = True) -> Case:
    half = mpf(d - 1) / 2

    def exact(angle):
        z = mpmath.sin(angle / 2) ** 2
        return [mpmath.betainc(half, half, 0, z, regularized=True)]

    def slope(angle):
        return [mpmath.sin(angle) ** (d - 2) / mpmath.beta(half, mpf(1) / 2)]

    return Case(
        lambda a: theory.cap_mass(d, a),
        np.array(points),
        exact,
        slope if measure_slope else None,
    )


def barenblatt(n: int) -> Case:
    """C by the mass, n|B_n| ∫ (C − ξ²/(2n+4)) ξ^{n−1} dξ up to the front."""

    def height(mass):
        ball = mpmath.pi ** (mpf(n) / 2) / mpmath.gamma(mpf(n) / 2 + 1)
        of_one = ball * mpf(2 * n + 4) ** (mpf(n) / 2) * (1 - mpf(n) / (n + 2))
        return (mass / of_one) ** (mpf(2) / (n + 2))

    def exact(r, t):
        scale = t ** (-mpf(1) / (n + 2))
        return [scale**n * (height(mpf(3)) - (r * scale) ** 2 / (2 * n + 4))]

    front = math.sqrt((2 * n + 4) * height(mpf(3)))
    points = np.array(
        [
            [share * front * t ** (1 / (n + 2)), t]
            for share in (0.01, 0.5, 0.9)
            for t in (1e-6, 1.0, 1e6)
        ]
    )
    return Case(
        lambda x: theory.barenblatt_density(x[:, 0], x[:, 1], 3.0, n),
        points,
        exact,
        differentiated(exact),
        along(points, 0, 0, 0, 1),
    )


SPREAD = np.array(
    [[1e-3, 0, 0.1], [1e-6, 5, 1], [0.3, 2, 40], [1, 20, 1e3], [1e-2, 1, 1e6]]
)
SMALL_BETAS, ALL_BETAS = [1e-3, 1, 30], [1e-3, 1, 1e3, 1e6]
OTHERS = [
    Entry(
        "theory.closure_variance",
        "both signs, s = 10⁻⁶ … 1, t ≤ 20, β = 0.1 … 10⁶",
        [closure(sign, SPREAD) for sign in (1, -1)],
    ),
    Entry(
        "theory.equiangular_rate",
        "n = 2, 50, both models, 0.02 … 0.9999 of the range of ρ, β ≤ 30",
        [equiangular(n, m, False, SMALL_BETAS) for n in (2, 50) for m in ("SA", "USA")],
    ),
    Entry(
        "theory.equiangular_rate(log=True)",
        "n = 2, 50, both models, 0.02 … 0.9999 of the range of ρ, β ≤ 10⁶",
        [equiangular(n, m, True, ALL_BETAS) for n in (2, 50) for m in ("SA", "USA")],
        "itself or 1",
        size=own_size,
        slope_size=own_size,
    ),
    Entry(
        "theory.lyapunov_moment",
        "d = 2, 3, 32, m = 1, 2, 16, p = 10⁻³ … 3.6",
        [moment(2, 1), moment(3, 2), moment(32, 16)],
        "itself; derivative: itself or 1",
        slope_size=own_size,
    ),
    Entry(
        "theory.lyapunov_moment",
        "d = 1000, m = 500 (float32 is meant for d ≤ 32)",
        [moment(1000, 500)],
        "itself; derivative: itself or 1",
        slope_size=own_size,
    ),
    Entry(
        "theory.cap_mass",
        "d = 2, 3, 33, 200, mass ≥ 10⁻²⁸, angle ≤ 3.1415; derivative: ≤ 3",
        [
            cap(2, [1e-6, 0.1, 1.2, 1.6, 3]),
            cap(3, [1e-6, 0.1, 1.2, 1.6, 3]),
            cap(33, [0.15, 0.5, 1.2, 1.5707, 2]),
            cap(200, [0.9, 1.2, 1.5707, 1.6, 2]),
            *[cap(d, [3, 3.1, 3.14, 3.1415, 2.9], False) for d in (3, 200)],
        ],
    ),
    Entry(
        "theory.barenblatt_density",
        "dim = 1, 2, 10, to 0.9 of the front, t = 10⁻⁶ … 10⁶",
        [barenblatt(n) for n in (1, 2, 10)],
    ),
]

THEORY = [*UNIFORM, *PAIRING, *TILTED, *OTHERS]
