"""Question: how far from the truth is each function of the theory, over its whole range?

python benchmarks/accuracy.py    # three to four minutes; writes docs/accuracy.md

To add a function, append an `Entry` to the list of its module (or a list to `ENTRIES`).
"""

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
from mpmath import mp, mpf

from accuracy_slacks import SECOND, table_of_slacks
from accuracy_theory import THEORY
from errors import Case, Entry, Number, own_size, ratio_derivatives, worst
from meanformer import harmonics, special

PAGE = Path(__file__).parents[1] / "docs" / "accuracy.md"

# ------------------------------------------------------------------------- Bessel

KAPPA = np.array([0, 1e-12, 1e-4, *np.geomspace(1e-2, 1e6, 33), 29.9, 30.1])
POSITIVE = KAPPA[1:]


def resultant(function: Callable, order: int, measure_slope: bool = True) -> list[Case]:
    """`function` is the derivative of A_d of that order."""

    def case(d):
        def exact(kappa, more=0):
            return [ratio_derivatives(mpf(d) / 2 - 1, kappa)[order + more]]

        slope = functools.partial(exact, more=1) if measure_slope else None
        return Case(lambda k: function(d, k), KAPPA, exact, slope)

    return [case(d) for d in (2, 3, 66, 1000)]


def complement() -> list[Case]:
    return [
        Case(
            lambda k, d=d: special.mean_resultant_complement(d, k),
            KAPPA,
            lambda k, d=d: [1 - ratio_derivatives(mpf(d) / 2 - 1, k)[0]],
            lambda k, d=d: [-ratio_derivatives(mpf(d) / 2 - 1, k)[1]],
        )
        for d in (2, 3, 66, 1000)
    ]


@functools.cache
def log_scaled(nu, kappa) -> Number:
    """log(e^{−κ} (2/κ)^ν Γ(ν+1) I_ν(κ))."""
    if kappa == 0:
        return mpf(0)
    with mp.workdps(60 + max(0, int(-2 * mpmath.log10(kappa)))):
        log_i = mpmath.log(mpmath.besseli(nu, kappa))
        return log_i - kappa + nu * mpmath.log(2 / kappa) + mpmath.loggamma(nu + 1)


def ladder(count: int, picked: list[int], points) -> list[Case]:
    orders = np.array(picked)
    return [
        Case(
            lambda k: special.log_bessel_sequence(0, count, k)[..., orders],
            points,
            lambda k: [log_scaled(j, k) for j in picked],
            lambda k: [ratio_derivatives(j, k)[0] - 1 for j in picked],
        )
    ]


def ratios(count: int, picked: list[int], points) -> list[Case]:
    orders = np.array(picked)
    return [
        Case(
            lambda k: special.bessel_ratio_sequence(0, count, k)[..., orders],
            points,
            lambda k: [ratio_derivatives(j, k)[0] for j in picked],
            lambda k: [ratio_derivatives(j, k)[1] for j in picked],
        )
    ]


def quotient(k: int) -> Case:
    def exact(kappa):
        return [mpmath.besseli(k, kappa) / mpmath.besseli(0, kappa)]

    def slope(kappa):
        below, here, above, one, zero = (
            mpmath.besseli(j, kappa) for j in (k - 1, k, k + 1, 1, 0)
        )
        return [(below + above) / (2 * zero) - here * one / zero**2]

    return Case(lambda x: special.bessel_quotient(k, x), POSITIVE[2:], exact, slope)


def single(nu: float) -> Case:
    return Case(
        lambda k: special.log_bessel(nu, k),
        KAPPA,
        lambda k: [log_scaled(nu, k)],
        lambda k: [ratio_derivatives(nu, k)[0] - 1],
    )


def plain(nu: float) -> Case:
    return Case(
        lambda k: special.log_bessel_i(nu, k),
        POSITIVE,
        lambda k: [mpmath.log(mpmath.besseli(nu, k))],
        lambda k: [ratio_derivatives(nu, k)[0] + nu / k],
    )


def omega() -> Case:
    def exact(y):
        if y < 30:
            return [mpmath.lambertw(mpmath.exp(y)).real]
        return [mpmath.findroot(lambda w: w + mpmath.log(w) - y, y - mpmath.log(y))]

    y = np.array([*np.linspace(-80, 80, 81), 1 - 1e-6, 1 + 1e-6, 1e3, 1e8])
    return Case(special.wright_omega, y, exact, lambda y: [(w := exact(y)[0]) / (1 + w)])


FEW = [0, 1, 7, 30, 200]
SPECIAL = [
    Entry(
        "special.mean_resultant, bessel_ratio",
        "d = 2, 3, 66, 1000, κ = 0 … 10⁶",
        resultant(special.mean_resultant, 0),
    ),
    Entry(
        "special.mean_resultant_complement",
        "d = 2, 3, 66, 1000, κ = 0 … 10⁶",
        complement(),
    ),
    Entry(
        "special.mean_resultant_slope",
        "d = 2, 3, 66, 1000, κ = 0 … 10⁶",
        resultant(special.mean_resultant_slope, 1),
    ),
    Entry(
        "special.mean_resultant_curvature",
        "d = 2, 3, 66, 1000, κ = 0 … 10⁶",
        resultant(special.mean_resultant_curvature, 2, False),
    ),
    Entry(
        "special.log_bessel",
        "ν = 0, 1/2, 3.25, 32, κ = 0 … 10⁶",
        [single(nu) for nu in (0, 0.5, 3.25, 32)],
    ),
    Entry(
        "special.log_bessel_sequence",
        "orders to 200, κ = 0 … 10⁶; to 2000, κ ≤ 10⁴",
        [
            *ladder(201, FEW, KAPPA),
            *ladder(2001, [2000], np.array([0, 1e-3, 1, 20, 300, 2000, 1e4])),
        ],
    ),
    Entry(
        "special.bessel_ratio_sequence",
        "orders to 200, κ = 0 … 10⁶; to 2000, κ ≤ 10⁴",
        [
            *ratios(201, FEW, KAPPA),
            *ratios(2001, [2000], np.array([0, 1e-3, 1, 20, 300, 2000, 1e4])),
        ],
    ),
    Entry(
        "special.log_bessel_i",
        "ν = 0, 1/2, 3.25, 32, κ = 10⁻¹² … 10⁶",
        [plain(nu) for nu in (0, 0.5, 3.25, 32)],
        "itself or 1",
        size=own_size,
    ),
    Entry(
        "special.bessel_quotient",
        "k = 1, 2, 5, 12, κ = 10⁻² … 10⁶",
        [quotient(k) for k in (1, 2, 5, 12)],
    ),
    Entry("special.wright_omega", "y = −80 … 10⁸", [omega()]),
]

# ----------------------------------------------------------------------- harmonics


@functools.cache
def zonals(d: int, degree: int, q) -> list[Number]:
    """P_0(q) … P_degree(q) of S^{d−1}, with 100 digits."""
    with mp.workdps(100):
        values = [mpf(1), q]
        for l in range(1, degree):
            old, new = values[-2:]
            values.append(((2 * l + d - 2) * q * new - l * old) / (l + d - 2))
        return values[: degree + 1]


COSINES = np.array([*np.cos(np.linspace(0, math.pi, 25)), 0, 0.9999, -0.9999, 0.9999999])


def gegenbauer(d: int, degree: int = 200) -> Case:
    """P_l' is measured as a part of P_l'(1) = l(l+d−2)/(d−1)."""
    largest = [mpf(l * (l + d - 2)) / (d - 1) for l in range(1, degree + 1)]

    @jax.custom_jvp
    def value(q):
        return harmonics.gegenbauer(d, degree, q)

    @value.defjvp
    def _(primals, tangents):
        p, slope = jax.jvp(
            lambda q: harmonics.gegenbauer(d, degree, q), primals, tangents
        )
        return p, slope / np.array([1, *map(float, largest)], p.dtype)

    return Case(
        value,
        COSINES,
        lambda q: zonals(d, degree, q),
        lambda q: [mpf(0), *zonals(d + 2, degree - 1, q)],
    )


def harmonic(point: Sequence[Number], l: int, m: int) -> Number:
    """Y_lm(x/|x|) from zonal polynomials of dimension 2|m| + 3."""
    x, y, z = point
    r, a = mpmath.sqrt(x * x + y * y + z * z), abs(m)
    wave = mpmath.mpc(x / r, y / r) ** a
    top = zonals(2 * a + 3, max(l - a, 1), z / r)[l - a]
    top *= mpmath.factorial(l + a) / mpmath.factorial(l - a)
    top /= mpf(2) ** a * mpmath.factorial(a)
    square = (2 * l + 1) / (4 * mpmath.pi) * (2 if m else 1)
    square *= mpmath.factorial(l - a) / mpmath.factorial(l + a)
    return mpmath.sqrt(square) * top * (wave.imag if m < 0 else wave.real)


PAIRS = [
    (1, -1),
    (20, 0),
    (20, -7),
    (200, 0),
    (200, 1),
    (200, -40),
    (200, 85),
    (200, 200),
]
PEAKS = [math.sqrt((2 * l + 1) / (4 * math.pi)) for l, _ in PAIRS]


def real_harmonics() -> Case:
    """Values as parts of √((2l+1)/4π), derivatives along a tangent of l times that."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(10, 3))
    x = np.concatenate(
        [x, [[0, 0, 1], [1e-3, 2e-3, 1], [1e-2, -2e-2, -1], [0.2, 0.3, -0.93]]]
    )
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    v = np.cross(x, [0.48, 0.6, 0.64])
    index = np.array([l * l + l + m for l, m in PAIRS])

    def slope(*point_and_tangent):
        point, tangent = point_and_tangent[:3], point_and_tangent[3:]

        def moved(h, l, m):
            return harmonic([c + h * t for c, t in zip(point, tangent)], l, m)

        with mp.workdps(100):
            h = mpf(10) ** -30
            return [(moved(h, l, m) - moved(-h, l, m)) / (2 * h) for l, m in PAIRS]

    return Case(
        lambda x: harmonics.real_harmonics(x, 200)[..., index],
        x,
        lambda *p: [harmonic(p, l, m) for l, m in PAIRS],
        slope,
        v,
    )


BETA = np.array([1e-3, 0.1, 0.5, 2, 5, 20, 80, 700, 1e4, 1e6])


def eigenvalues(d: int, picked: list[int], log: bool, points) -> Case:
    half, orders = mpf(d) / 2, np.array(picked)

    def exact(beta):
        logs = [
            half * mpmath.log(2 * mpmath.pi / beta)
            + mpmath.log(mpmath.besseli(l + half - 1, beta))
            for l in picked
        ]
        return logs if log else [mpmath.exp(v) for v in logs]

    def slope(beta):
        logs = [ratio_derivatives(l + half - 1, beta)[0] + (l - 1) / beta for l in picked]
        return logs if log else [v * e for v, e in zip(exact(beta), logs)]

    return Case(
        lambda b: harmonics.funk_hecke_exponential(b, d, max(picked), log)[..., orders],
        points,
        exact,
        slope,
    )


def quadrature(d: int) -> Case:
    """e^{β(q−1)}: the eigenvalues of e^{βq}/β times βe^{−β}."""
    logs = eigenvalues(d, list(range(11)), True, None)

    def exact(beta):
        return [beta * mpmath.exp(v - beta) for v in logs.exact(beta)]

    def slope(beta):
        assert logs.exact_slope is not None
        rates = [v + 1 / beta - 1 for v in logs.exact_slope(beta)]
        return [v * e for v, e in zip(exact(beta), rates)]

    @jax.vmap
    def value(beta):
        return harmonics.funk_hecke(lambda q: jnp.exp(beta * (q - 1)), d, 10)

    return Case(value, np.array([0.1, 1.0, 5.0, 30.0]), exact, slope)


HARMONICS = [
    Entry(
        "harmonics.gegenbauer, zonal",
        "d = 2, 3, 8, 66, degree ≤ 200, q = −1 … 1",
        [gegenbauer(d) for d in (2, 3, 8, 66)],
        "its maximum",
        size=lambda exact: [1] * len(exact),
        slope_size=lambda exact: [1] * len(exact),
    ),
    Entry(
        "harmonics.real_harmonics",
        "degree ≤ 200, all of S²",
        [real_harmonics()],
        "√((2l+1)/4π); derivative: l times that",
        size=lambda exact: PEAKS,
        slope_size=lambda exact: [l * p for (l, _), p in zip(PAIRS, PEAKS)],
    ),
    Entry(
        "harmonics.funk_hecke_exponential(log=True)",
        "d = 2, 3, 66, degree ≤ 200, β = 10⁻³ … 10⁶",
        [eigenvalues(d, FEW, True, BETA) for d in (2, 3, 66)],
        "itself or 1",
        size=own_size,
        slope_size=own_size,
    ),
    Entry(
        "harmonics.funk_hecke_exponential",
        "d = 2, 3, 66, degree ≤ 3, β = 0.1 … 80",
        [eigenvalues(d, [0, 2, 3], False, BETA[1:7]) for d in (2, 3, 66)],
    ),
    Entry(
        "harmonics.funk_hecke",
        "W = e^{β(q−1)}, d = 2, 3, 66, degree ≤ 10, β = 0.1 … 30",
        [quadrature(d) for d in (2, 3, 66)],
        "λ₀; derivative: λ₀'",
        size=lambda exact: [abs(exact[0])] * len(exact),
        slope_size=lambda exact: [abs(exact[0])] * len(exact),
    ),
]

ENTRIES = [*SPECIAL, *HARMONICS, *THEORY]

TITLE = """# Accuracy

Worst error measured of each function and of its first derivative (by `jax.jvp`), over its range:
the difference from mpmath (60 digits or more, at the very number that the function was given,
rounded to its dtype), divided by what the third column names. Float64 runs with
`jax_enable_x64`, float32 without. Written by `benchmarks/accuracy.py`.

| function | range | relative to | float64 | derivative | float32 | derivative |
|---|---|---|---|---|---|---|
"""


def main() -> None:
    lines = []
    for entry in ENTRIES:
        errors = [e for dtype in (np.float64, np.float32) for e in worst(entry, dtype)]
        shown = ["—" if e is None else f"{e:.1e}" for e in errors]
        lines.append(
            "| "
            + " | ".join([f"`{entry.function}`", entry.where, entry.relative_to, *shown])
            + " |"
        )
        print(lines[-1], flush=True)
    PAGE.write_text(TITLE + "\n".join(lines) + "\n" + SECOND + table_of_slacks())


if __name__ == "__main__":
    main()
