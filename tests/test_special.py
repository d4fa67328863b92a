"""Special functions against mpmath (40 digits and more) and SciPy."""

import math

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from scipy import special as scipy_special

from helpers import EPS, relative_errors
from meanformer import special, sphere

DIMENSIONS = [2, 3, 4, 8, 33, 66]
KAPPAS = [0, 1e-12, 1e-6, 1e-3, 0.1, 0.5, 0.999, 1, 1.7, 3, 10, 16.5, 17.5, 33, 34]
KAPPAS += [100, 1e3, 1e4, 1e6]


def exact_ratio(d, kappa):
    """A = f/g with f = I_{d/2}, g = I_{d/2−1}, and A', A'', all with 60 digits, from
    g' = f + νg/κ and f' = g − (ν+1)f/κ; at κ = 0 from A = κ/d − κ³/(d²(d+2)) + …"""
    with mpmath.workdps(60):
        nu, k = mpmath.mpf(d) / 2 - 1, mpmath.mpf(float(kappa))
        if k == 0:
            return mpmath.mpf(0), 1 / mpmath.mpf(d), mpmath.mpf(0)
        f, g = mpmath.besseli(nu + 1, k), mpmath.besseli(nu, k)
        f1, g1 = g - (nu + 1) * f / k, f + nu * g / k
        f2 = g1 - (nu + 1) * (f1 / k - f / k**2)
        g2 = f1 + nu * (g1 / k - g / k**2)
        ratio = f / g
        slope = (f1 - ratio * g1) / g
        bend = (f2 - ratio * g2 - 2 * slope * g1) / g
        return ratio, slope, bend


def derivatives(f, x):
    """f, f', f'' at each entry of x, for an elementwise f."""

    def slope(y):
        return jax.jvp(f, (y,), (jnp.ones_like(y),))[1]

    return f(x), slope(x), jax.jvp(slope, (x,), (jnp.ones_like(x),))[1]


# -------------------------------------------------------------------- Bessel ratios


FLOAT32_SLOPE = 30**2 * 2.0**-24  # roundings of size 30 (the first order), 30 times


@pytest.mark.parametrize(
    ("d", "dtype", "tol", "tol_slope"),
    [(d, np.float64, 1e-12, 1e-12) for d in DIMENSIONS]
    + [(d, np.float32, 1e-5, FLOAT32_SLOPE) for d in (2, 66)],
)
def test_mean_resultant_and_its_derivatives_are_exact(d, dtype, tol, tol_slope):
    """A_d = I_{d/2}/I_{d/2−1}, A_d', A_d'', 1 − A_d and its derivative have small
    *relative* errors for κ from 0 to 1e6 (A_d'' < 0 for κ > 0: it has no zero there)."""
    kappa = jnp.asarray(KAPPAS, dtype)
    have = derivatives(lambda k: special.mean_resultant(d, k), kappa)
    exact = list(zip(*[exact_ratio(d, k) for k in np.asarray(KAPPAS, dtype)]))
    gap = special.mean_resultant_complement(d, kappa)
    with mpmath.workdps(60):
        exact_gap = [1 - a for a in exact[0]]
    assert {v.dtype for v in (*have, gap)} == {np.dtype(dtype)}
    assert relative_errors(have[0], exact[0]).max() <= tol
    assert relative_errors(gap, exact_gap).max() <= tol
    assert relative_errors(have[1], exact[1]).max() <= tol_slope
    assert relative_errors(have[2], exact[2]).max() <= tol_slope


def test_complement_has_its_own_exact_slope():
    """(1 − A_2)' = −A_2' to all digits, also where both are 1e−13."""
    kappa = jnp.asarray(KAPPAS, float)
    _, slope = jax.jvp(
        lambda k: special.mean_resultant_complement(2, k),
        (kappa,),
        (jnp.ones(len(kappa)),),
    )
    with mpmath.workdps(60):
        exact = [-exact_ratio(2, k)[1] for k in KAPPAS]
        assert relative_errors(slope, exact).max() <= 1e-12


@pytest.mark.parametrize("d", [5])
def test_reverse_mode_under_jit_and_vmap_obeys_riccati(d):
    """A' = 1 − A² − (d−1)A/κ, with (1 − A)(1 + A) for 1 − A²: what cancels is ≤ 1."""
    kappa = jnp.asarray([0.3, 1.0, 4.0, 40.0])
    slope = jax.jit(jax.vmap(jax.grad(lambda k: special.mean_resultant(d, k))))(kappa)
    ratio, gap = (
        f(d, kappa) for f in (special.mean_resultant, special.mean_resultant_complement)
    )
    riccati = gap * (1 + ratio) - (d - 1) * ratio / kappa
    np.testing.assert_allclose(slope, riccati, rtol=0, atol=(d + 30) * EPS)


def test_gradient_of_gradient_is_the_second_derivative():
    """grad(grad A_3) for A_3 = coth κ − 1/κ is 2 coth κ/sinh²κ − 2/κ³; 0 at κ = 0."""
    kappa = jnp.asarray([0.0, 0.7, 6.0])
    second = jax.vmap(jax.grad(jax.grad(lambda k: special.mean_resultant(3, k))))(kappa)
    with mpmath.workdps(40):
        points = [mpmath.mpf(float(k)) for k in kappa[1:]]
        exact = [2 * mpmath.coth(k) / mpmath.sinh(k) ** 2 - 2 / k**3 for k in points]
    assert second[0] == 0
    assert relative_errors(second[1:], exact).max() <= 1e-12


@pytest.mark.parametrize("nu", [0.0, 0.5, 3.25, 40.0])
def test_bessel_ratio_is_the_quotient_of_neighbours(nu):
    """I_{ν+1}(κ)/I_ν(κ), also for orders that belong to no dimension."""
    with mpmath.workdps(40):
        exact = [mpmath.besseli(nu + 1, k) / mpmath.besseli(nu, k) for k in KAPPAS[1:]]
    value = special.bessel_ratio(nu, jnp.asarray(KAPPAS[1:]))
    assert relative_errors(value, exact).max() <= 4 * EPS


def test_complement_keeps_digits_where_the_ratio_rounds_to_one():
    """κ(1 − A_d) → (d−1)/2, with remainder (d−1)(d−3)/(8κ) + O(κ⁻²)."""
    for d in (2, 3, 6):
        kappa = 1e12
        limit = kappa * special.mean_resultant_complement(d, kappa)
        np.testing.assert_allclose(limit, (d - 1) / 2, rtol=1e-11)


@pytest.mark.parametrize("k", [0, 1, 2, 5, 12])
def test_bessel_quotient_is_i_k_over_i_0(k):
    """I_k(κ)/I_0(κ) to k + 2 roundings, κ from 0 to 1e6."""
    with mpmath.workdps(40):
        exact = [mpmath.besseli(k, x) / mpmath.besseli(0, x) for x in KAPPAS]
    value = special.bessel_quotient(k, jnp.asarray(KAPPAS, float))
    assert relative_errors(value, exact).max() <= (k + 2) * EPS


def test_bessel_quotient_has_the_right_slope():
    """(I_k/I_0)' = (I_{k−1} + I_{k+1})/(2I_0) − I_k I_1/I_0²."""
    kappa, k, exact = [0.0, 0.2, 3.0, 50.0], 2, []
    for x in kappa:
        with mpmath.workdps(40):
            orders = (k - 1, k, k + 1, 1, 0)
            below, here, above, one, zero = (mpmath.besseli(j, x) for j in orders)
            exact.append((below + above) / (2 * zero) - here * one / zero**2)
    kappa = jnp.asarray(kappa)
    _, slope = jax.jvp(
        lambda q: special.bessel_quotient(k, q), (kappa,), (jnp.ones_like(kappa),)
    )
    assert relative_errors(slope, exact).max() <= 1e-12


# ---------------------------------------------------------------------- Wright omega


def exact_omega(y):
    """W₀(e^y) with 45 digits; for large y the root of w + log w = y."""
    with mpmath.workdps(45):
        y = mpmath.mpf(float(y))
        if y < 30:
            return mpmath.lambertw(mpmath.exp(y)).real
        return mpmath.findroot(lambda w: w + mpmath.log(w) - y, y - mpmath.log(y))


ARGUMENTS = [
    -700,
    -300,
    -100,
    -36,
    -20,
    -5,
    -2,
    -1,
    -0.5,
    0,
    0.3,
    0.9,
    np.nextafter(1, 0),
]
ARGUMENTS += [1, 1.1, 2, math.e + 1, 10, 50, 300, 700, 1e4, 1e8]


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_wright_omega_is_lambert_w_of_the_exponential(dtype):
    """ω(y) = W₀(e^y) to a few roundings wherever e^y or y is a normal number, and
    ω' = ω/(1 + ω), under jit and vmap."""
    y = np.array([v for v in ARGUMENTS if dtype == np.float64 or v > -80], dtype)
    exact = [exact_omega(v) for v in y]
    tol = 4 * np.finfo(dtype).eps
    value = special.wright_omega(y)
    assert value.dtype == dtype
    assert relative_errors(value, exact).max() <= tol
    slope = jax.jit(jax.vmap(jax.grad(special.wright_omega)))(jnp.asarray(y))
    with mpmath.workdps(45):
        assert relative_errors(slope, [w / (1 + w) for w in exact]).max() <= 2 * tol


def test_wright_omega_has_a_second_derivative():
    """ω'' = ω/(1 + ω)³, left over when two terms 1 + ω times as large cancel."""
    second = jax.vmap(jax.grad(jax.grad(special.wright_omega)))
    y = np.array([-3.0, 0.5, 1.0, 4.0, 100.0])
    w = np.array([float(exact_omega(v)) for v in y])
    errors = np.abs(second(jnp.asarray(y)) * (1 + w) ** 3 / w - 1)
    assert np.all(errors <= 4 * EPS * (1 + w))


# ---------------------------------------------------------------------- zonal sums


@pytest.mark.parametrize("d", [3, 4, 7, 33])
def test_gegenbauer_sum_agrees_with_scipy(d):
    """P_l(q) = C_l^{(α)}(q)/C_l^{(α)}(1), α = d/2 − 1, one degree at a time."""
    q = np.linspace(-1, 1, 21)
    alpha = d / 2 - 1
    for l in (0, 1, 2, 5, 17):
        value = special.gegenbauer_sum(d, jnp.zeros(l + 1).at[l].set(1.0), jnp.asarray(q))
        exact = scipy_special.eval_gegenbauer(l, alpha, q)
        exact = exact / scipy_special.eval_gegenbauer(l, alpha, 1.0)
        np.testing.assert_allclose(value, exact, rtol=0, atol=1e-14 * (l + 1))


def test_gegenbauer_sum_is_a_cosine_series_on_the_circle():
    """d = 2: Σ c_l cos(l θ) at q = cos θ."""
    theta = np.linspace(0, math.pi, 33)
    c = np.random.default_rng(1).normal(size=9)
    value = special.gegenbauer_sum(2, jnp.asarray(c), jnp.cos(jnp.asarray(theta)))
    exact = np.cos(theta[:, None] * np.arange(9)) @ c
    np.testing.assert_allclose(value, exact, rtol=0, atol=200 * EPS)


def test_gegenbauer_sum_of_one_coefficient_is_constant():
    """Degree 0 alone: c₀, with the shape of q."""
    q = jnp.zeros((2, 3))
    np.testing.assert_array_equal(special.gegenbauer_sum(5, jnp.array([2.5]), q), q + 2.5)


def test_harmonic_dimension_counts_harmonics():
    """1, 2, 2, … on S¹; 2l + 1 on S²; (l + 1)² on S³; in general
    C(l+d−1, d−1) − C(l+d−3, d−1), homogeneous minus |x|² times homogeneous."""
    l = np.arange(40)
    np.testing.assert_array_equal(special.harmonic_dimension(2, 3), [1, 2, 2])
    np.testing.assert_allclose(special.harmonic_dimension(3, 40), 2 * l + 1, rtol=1e-13)
    np.testing.assert_allclose(
        special.harmonic_dimension(4, 40), (l + 1) ** 2, rtol=1e-13
    )
    for d in (5, 16):
        exact = [
            math.comb(i + d - 1, d - 1) - (math.comb(i + d - 3, d - 1) if i > 1 else 0)
            for i in range(40)
        ]
        np.testing.assert_allclose(special.harmonic_dimension(d, 40), exact, rtol=1e-12)


# -------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-1.0, "`kappa` must be finite and ≥ 0, but is -1.0"),
        (math.nan, "`kappa` must be finite and ≥ 0, but is nan"),
        (math.inf, "`kappa` must be finite and ≥ 0, but is inf"),
        (np.ones(2), r"`kappa` must be a scalar, but has shape \(2,\).*jax.vmap"),
    ],
)
def test_bad_concentrations_are_refused(value, message):
    """κ is a finite scalar ≥ 0."""
    with pytest.raises(ValueError, match=message):
        special.check_kappa(value)


@pytest.mark.parametrize("d", [1, 0, -3, 2.0, True, "3"])
def test_dimensions_below_two_are_refused(d):
    """d is an integer ≥ 2: not a float, not a bool."""
    with pytest.raises(ValueError, match=r"`d` must be an integer ≥ 2 .* but is"):
        sphere.check_dimension(d)
