"""Special functions against mpmath (40 digits and more) and SciPy."""

import math

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

from helpers import EPS, relative_errors
from meanformer import special, sphere

DIMENSIONS = [2, 3, 33, 66, 1000]
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


@pytest.mark.parametrize(
    ("d", "dtype", "tol"),
    [(d, np.float64, 1e-12) for d in DIMENSIONS]
    + [(2, np.float32, 1e-5), (66, np.float32, 1e-5)],
)
def test_mean_resultant_and_its_derivatives_are_exact(d, dtype, tol):
    """A_d = I_{d/2}/I_{d/2−1}, A_d', A_d'', 1 − A_d have small *relative* errors for κ from
    0 to 1e6 (A_d'' < 0 for κ > 0: it has no zero there), and `jax.grad` is as exact as
    the functions named after the derivatives, because it calls them."""
    kappa = jnp.asarray(KAPPAS, dtype)
    have = derivatives(lambda k: special.mean_resultant(d, k), kappa)
    exact = list(zip(*[exact_ratio(d, k) for k in np.asarray(KAPPAS, dtype)]))
    gap = special.mean_resultant_complement(d, kappa)
    with mpmath.workdps(60):
        exact_gap = [1 - a for a in exact[0]]
    assert {v.dtype for v in (*have, gap)} == {np.dtype(dtype)}
    for value, true in zip((*have, gap), (*exact, exact_gap)):
        assert relative_errors(value, true).max() <= tol
    named = special.mean_resultant_slope, special.mean_resultant_curvature
    for value, function in zip(have[1:], named):
        np.testing.assert_array_equal(value, function(d, kappa))


def test_mean_resultant_has_a_third_derivative():
    """The third derivative of A_3 = coth κ − 1/κ, by mpmath; at κ = 0 it is −6/(3²·5) = −2/15."""
    kappa = jnp.asarray([0.0, 0.4, 2.0, 30.0])
    _, third = jax.jvp(
        lambda k: special.mean_resultant_curvature(3, k), (kappa,), (jnp.ones(4),)
    )
    with mpmath.workdps(60):
        points = [mpmath.mpf(float(k)) for k in kappa[1:]]
        exact = [mpmath.diff(lambda k: mpmath.coth(k) - 1 / k, k, 3) for k in points]
        assert relative_errors(third, [-mpmath.mpf(2) / 15, *exact]).max() <= 1e-12


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
    kappa, k, exact = [0.0, 0.2, 3.0, 50.0, 1e6], 2, []
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


# -------------------------------------------------------------------- logs of Bessel


def exact_log_bessel(nu, kappa):
    """log(e^{−κ} (2/κ)^ν Γ(ν+1) I_ν(κ)) and log I_ν(κ), exact to 25 digits of their own."""
    digits = 40 + max(0, round(-2 * math.log10(kappa)))
    with mpmath.workdps(digits):
        k = mpmath.mpf(float(kappa))
        plain = mpmath.log(mpmath.besseli(nu, k))
        return plain - k + nu * mpmath.log(2 / k) + mpmath.loggamma(nu + 1), plain


def own_size_errors(values, exact):
    """|value − exact|/max(1, |exact|)."""
    return np.array(
        [
            float(abs(mpmath.mpf(float(v)) - e) / max(1, abs(e)))
            for v, e in zip(np.asarray(values).ravel(), exact)
        ]
    )


PICKED = [0, 1, 7, 29, 30, 31, 200, 2000]


@pytest.mark.parametrize(
    ("nu", "count", "dtype", "tol"),
    [
        (0.0, 2001, np.float64, 1e-12),
        (0.0, 2001, np.float32, 1e-5),
        (0.5, 3, np.float64, 1e-12),
        (0.5, 3, np.float32, 1e-5),
        (31.0, 201, np.float64, 1e-12),
    ],
)
def test_log_bessel_sequence_is_exact_at_every_order(nu, count, dtype, tol):
    """L_j = log(e^{−κ}(2/κ)^{ν+j} Γ(ν+j+1) I_{ν+j}(κ)) with small *relative* errors, orders
    to 2000 and κ from 1e−12 to 1e4, orders to 31 on to 1e6; L_j' = I_{ν+j+1}/I_{ν+j} − 1
    likewise; both are those of the single order ν."""
    kappa = np.array([1e-12, 1e-3, 0.049, 0.051, 1, 19.9, 20.1, 300, 1e4, 1e6], dtype)
    rows = slice(None) if count <= 3 else slice(0, -1)
    kappa = kappa[rows]

    def f(k):
        return special.log_bessel_sequence(nu, count, k)

    value, slope = jax.jvp(f, (jnp.asarray(kappa),), (jnp.ones_like(kappa),))
    assert value.dtype == dtype
    picked = np.array([j for j in PICKED if j < count])
    exact = [exact_log_bessel(nu + j, k)[0] for k in kappa for j in picked]
    assert relative_errors(value[:, picked], exact).max() <= tol
    ratio = special.bessel_ratio_sequence(nu, count, kappa)
    with mpmath.workdps(60):
        exact = [
            mpmath.besseli(nu + j + 1, k) / mpmath.besseli(nu + j, k)
            for k in [mpmath.mpf(float(k)) for k in kappa]
            for j in [int(j) for j in picked]
        ]
        assert relative_errors(ratio[:, picked], exact).max() <= tol
        gaps = [a - 1 for a in exact]
        assert relative_errors(slope[:, picked], gaps).max() <= tol
    single = special.log_bessel(nu, kappa)
    np.testing.assert_allclose(single, value[:, 0], rtol=4 * np.finfo(dtype).eps)


def test_log_bessel_sequence_is_smooth_at_zero():
    """L_j(0) = 0, L_j'(0) = −1, L_j''(0) = 1/(2(ν+j+1)); L_j'' = A' of
    d = 2(ν+j+1) elsewhere. Any shape of κ; the orders come last."""
    count, j = 12, np.arange(12)

    def f(k):
        return special.log_bessel_sequence(0.5, count, k)

    kappa = jnp.array([[0.0, 0.3], [2.0, 5e4]])
    value, slope, second = derivatives(f, kappa)
    assert value.shape == (2, 2, count)
    np.testing.assert_array_equal(value[0, 0], 0)
    np.testing.assert_allclose(slope[0, 0], -1, rtol=EPS)
    np.testing.assert_allclose(second[0, 0], 1 / (2 * (j + 1.5)), rtol=8 * EPS)
    exact = [exact_ratio(2 * i + 3, k)[1] for k in kappa.ravel() for i in range(count)]
    assert relative_errors(second, exact).max() <= 1e-12


@pytest.mark.parametrize(
    ("nu", "dtype", "tol"),
    [(nu, np.float64, 1e-12) for nu in (0.0, 1.5, 40.0)] + [(1.5, np.float32, 1e-5)],
)
def test_log_bessel_i_is_the_logarithm_of_i(nu, dtype, tol):
    """log I_ν(κ) to `tol` of its own size (or of 1), κ from 1e−12 to 1e6, with derivative
    I_{ν+1}/I_ν + ν/κ."""
    kappa = np.array([1e-12, 1e-3, 1, 19.9, 20.1, 40.9, 41.1, 300, 1e6], dtype)
    value, slope = jax.jvp(
        lambda k: special.log_bessel_i(nu, k), (jnp.asarray(kappa),), (0 * kappa + 1,)
    )
    exact = [exact_log_bessel(nu, k)[1] for k in kappa]
    assert own_size_errors(value, exact).max() <= tol
    with mpmath.workdps(60):
        points = [mpmath.mpf(float(k)) for k in kappa]
        exact = [
            mpmath.besseli(nu + 1, k) / mpmath.besseli(nu, k) + nu / k for k in points
        ]
        assert relative_errors(slope, exact).max() <= tol


def test_log_bessel_i_starts_at_minus_infinity():
    """I_0(0) = 1, with slope 0; I_ν(0) = 0 for ν > 0."""
    zero = jnp.array(0.0)
    assert special.log_bessel_i(0, zero) == 0
    assert jax.grad(lambda k: special.log_bessel_i(0, k))(zero) == 0
    assert special.log_bessel_i(2.5, zero) == -math.inf


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


@pytest.mark.parametrize("nu", [0.0, 1.5])
def test_log_bessel_has_higher_derivatives_through_its_value(nu):
    """g(κ) = exp(log_bessel + κ) is the power series Σ (κ/2)^{2j}Γ(ν+1)/(j!Γ(ν+j+1)): its
    second and third derivatives, in which the value itself takes part."""

    def g(kappa):
        return jnp.exp(special.log_bessel(nu, kappa) + kappa)

    second = jax.grad(jax.grad(g))
    with mpmath.workdps(40):
        for kappa in (0.3, 1.0, 7.0):

            def exact(x):
                return mpmath.hyp0f1(nu + 1, x * x / 4)

            np.testing.assert_allclose(
                second(kappa), float(mpmath.diff(exact, kappa, 2)), rtol=1e-12
            )
            np.testing.assert_allclose(
                jax.grad(second)(kappa), float(mpmath.diff(exact, kappa, 3)), rtol=1e-11
            )


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 3, [1.0, -0.5]), "`kappa` must be finite and ≥ 0, but an entry is -0.5"),
        ((0, 3, math.nan), "`kappa` must be finite and ≥ 0, but an entry is nan"),
        ((-1, 3, 1.0), "`nu` must be finite and ≥ 0, but is -1.*I_k"),
        ((math.inf, 3, 1.0), "`nu` must be finite and ≥ 0, but is inf"),
        ((0, 0, 1.0), "`count` must be an integer ≥ 1, but is 0"),
        ((0, 2, 1j), "`kappa` must be real"),
    ],
)
def test_bad_orders_and_arguments_are_refused(arguments, message):
    """ν ≥ 0, count ≥ 1 and κ ≥ 0, all finite; also where κ is an array."""
    for function in (special.log_bessel_sequence, special.bessel_ratio_sequence):
        with pytest.raises(ValueError, match=message):
            function(*arguments)


@pytest.mark.parametrize("d", [1, 0, -3, 2.0, True, "3"])
def test_dimensions_below_two_are_refused(d):
    """d is an integer ≥ 2: not a float, not a bool."""
    with pytest.raises(ValueError, match=r"`d` must be an integer ≥ 2 .* but is"):
        sphere.check_dimension(d)
