"""Zonal polynomials, spherical harmonics and Funk–Hecke against mpmath and SciPy."""

import functools
import math

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from scipy import special as scipy_special

from helpers import EPS, random_tokens, relative_errors, sphere_area, zonal_integral
from meanformer import harmonics

PRECISION = [(np.float64, 1e-12), (np.float32, 1e-5)]
HEIGHTS = [-1, -0.99999, -0.7, -1e-3, 0, 0.3, 0.5, 0.999, 0.9999999, 1]


def exact_zonal(d, degree, q):
    """P_0(q) … P_degree(q) of S^{d−1} with 100 digits, by the three-term recurrence."""
    with mpmath.workdps(100):
        q = mpmath.mpf(float(q))
        values = [mpmath.mpf(1), q]
        for l in range(1, degree):
            older, old = values[-2:]
            values.append(((2 * l + d - 2) * q * old - l * older) / (l + d - 2))
        return values[: degree + 1]


# ------------------------------------------------------------------- zonal polynomials


@pytest.mark.parametrize(("dtype", "tol"), PRECISION)
@pytest.mark.parametrize("d", [2, 3, 8, 66])
def test_gegenbauer_is_exact_to_degree_200(d, dtype, tol):
    """P_l(q) with an error small against max |P_l| = 1, and P_l'(q), which is
    l(l+d−2)/(d−1) times P_{l−1} of S^{d+1}, small against max |P_l'| = l(l+d−2)/(d−1),
    at the ends too."""
    q = np.array(HEIGHTS, dtype)
    l = np.arange(201)
    value, slope = jax.jvp(
        lambda q: harmonics.gegenbauer(d, 200, q), (jnp.asarray(q),), (0 * q + 1,)
    )
    assert value.dtype == dtype
    exact = np.array([[float(p) for p in exact_zonal(d, 200, x)] for x in q])
    np.testing.assert_allclose(value, exact, rtol=0, atol=tol)
    scale = l[1:] * (l[1:] + d - 2) / (d - 1)
    exact = np.array([[float(p) for p in exact_zonal(d + 2, 199, x)] for x in q])
    np.testing.assert_allclose(slope[:, 1:] / scale, exact, rtol=0, atol=tol)
    np.testing.assert_array_equal(slope[:, 0], 0)


def test_gegenbauer_obeys_its_differential_equation():
    """(1−q²) P_l'' − (d−1) q P_l' + l(l+d−2) P_l = 0, by autodiff, at q = ±1 and 0 too; each
    term is at most l²(l+d−2)²/(d²−1)-fold."""
    d, l = 5, np.arange(31)
    q = jnp.array([-1.0, -0.4, 0.0, 0.8, 1.0])

    def f(q):
        return harmonics.gegenbauer(d, 30, q)

    first = jax.jacfwd(f)
    second = jax.jit(jax.vmap(jax.jacfwd(first)))(q)
    q, slope, value = q[:, None], jax.jit(jax.vmap(first))(q), f(q)
    residual = (1 - q**2) * second - (d - 1) * q * slope + l * (l + d - 2) * value
    assert np.all(np.abs(residual) <= 30 * EPS * (1 + l * (l + d - 2)))


def test_gegenbauer_takes_arrays_of_any_shape():
    """q of shape (2, 3) gives (2, 3, degree + 1); degree 0 is the constant 1."""
    q = np.linspace(-1, 1, 6).reshape(2, 3)
    np.testing.assert_array_equal(harmonics.gegenbauer(4, 0, q), np.ones((2, 3, 1)))
    value = harmonics.gegenbauer(4, 2, q)
    np.testing.assert_allclose(value[..., 1], q, atol=EPS)
    np.testing.assert_allclose(value[..., 2], (4 * q**2 - 1) / 3, atol=4 * EPS)


def test_zonal_is_the_reproducing_kernel():
    """∫ Z_l(⟨x,y⟩) Z_k(⟨y,x⟩) dy = δ_lk Z_l(1), and Z_l(1) = dim_l/|S^{d−1}|."""
    for d in (2, 3, 6):

        def product(theta, l, k, d=d):
            z = harmonics.zonal(d, 6, np.cos(theta))
            return z[..., l] * z[..., k]

        dims = harmonics.harmonic_dimension(d, 7) / sphere_area(d)
        np.testing.assert_allclose(harmonics.zonal(d, 6, 1.0), dims, rtol=1e-13)
        for l, k in [(0, 0), (2, 2), (6, 6), (5, 2), (3, 6)]:
            integral = zonal_integral(functools.partial(product, l=l, k=k), d)
            exact = dims[l] if l == k else 0
            assert abs(integral - exact) <= 1e-12 * math.sqrt(dims[l] * dims[k])


@pytest.mark.parametrize("d", [3, 4, 7, 33])
def test_gegenbauer_sum_agrees_with_scipy(d):
    """P_l(q) = C_l^{(α)}(q)/C_l^{(α)}(1), α = d/2 − 1, one degree at a time."""
    q = np.linspace(-1, 1, 21)
    alpha = d / 2 - 1
    for l in (0, 1, 2, 5, 17):
        value = harmonics.gegenbauer_sum(
            d, jnp.zeros(l + 1).at[l].set(1.0), jnp.asarray(q)
        )
        exact = scipy_special.eval_gegenbauer(l, alpha, q)
        exact = exact / scipy_special.eval_gegenbauer(l, alpha, 1.0)
        np.testing.assert_allclose(value, exact, rtol=0, atol=1e-14 * (l + 1))


def test_gegenbauer_sum_is_a_cosine_series_on_the_circle():
    """d = 2: Σ c_l cos(l θ) at q = cos θ."""
    theta = np.linspace(0, math.pi, 33)
    c = np.random.default_rng(1).normal(size=9)
    value = harmonics.gegenbauer_sum(2, jnp.asarray(c), jnp.cos(jnp.asarray(theta)))
    exact = np.cos(theta[:, None] * np.arange(9)) @ c
    np.testing.assert_allclose(value, exact, rtol=0, atol=200 * EPS)


def test_gegenbauer_sum_of_one_coefficient_is_constant():
    """Degree 0 alone: c₀, with the shape of q."""
    q = jnp.zeros((2, 3))
    np.testing.assert_array_equal(
        harmonics.gegenbauer_sum(5, jnp.array([2.5]), q), q + 2.5
    )


def test_harmonic_dimension_counts_harmonics():
    """1, 2, 2, … on S¹; 2l + 1 on S²; (l + 1)² on S³; in general
    C(l+d−1, d−1) − C(l+d−3, d−1), homogeneous minus |x|² times homogeneous."""
    l = np.arange(40)
    np.testing.assert_array_equal(harmonics.harmonic_dimension(2, 3), [1, 2, 2])
    np.testing.assert_allclose(harmonics.harmonic_dimension(3, 40), 2 * l + 1, rtol=1e-13)
    np.testing.assert_allclose(
        harmonics.harmonic_dimension(4, 40), (l + 1) ** 2, rtol=1e-13
    )
    for d in (5, 16):
        exact = [
            math.comb(i + d - 1, d - 1) - (math.comb(i + d - 3, d - 1) if i > 1 else 0)
            for i in range(40)
        ]
        np.testing.assert_allclose(harmonics.harmonic_dimension(d, 40), exact, rtol=1e-12)


# ------------------------------------------------------------------ harmonics on S²

DEGREE = 200
POLES = [[0, 0, 1], [0, 0, -1], [1e-3, 2e-3, 1], [1e-3, -2e-2, -1], [1, 0, 0], [0, 1, 0]]
# The last one: where (sin θ)^m underflows in float32, but Y_lm does not.
PICKED = [(0, 0), (1, 0), (10, 3), (50, -20), (150, -40), (200, 0), (200, 1), (200, -3)]
PICKED += [(200, 20), (200, -120), (200, 199), (200, 200), (200, 85)]


def points_on_the_sphere(n=12):
    x = np.concatenate([random_tokens(np.random.default_rng(5), n, 3), POLES])
    x = np.concatenate([x, [[0.19585545, 0.30034668, -0.93350550]]])
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def exact_harmonic(x, l, m):
    """Y_lm(x/|x|) with 60 digits from the series of d^{|m|}P_l/dz^{|m|} about z = 0."""
    with mpmath.workdps(120):
        x = [mpmath.mpf(float(c)) for c in x]
        r = mpmath.sqrt(sum(c * c for c in x))
        x, y, z = (c / r for c in x)
        a = abs(m)
        polynomial = mpmath.mpf(0)
        for k in range((l - a) // 2 + 1):
            top = mpmath.factorial(2 * l - 2 * k) / mpmath.factorial(l - a - 2 * k)
            low = mpmath.factorial(k) * mpmath.factorial(l - k) * mpmath.mpf(2) ** l
            polynomial += (-1) ** k * top / low * z ** (l - a - 2 * k)
        square = (2 * l + 1) / (4 * mpmath.pi) * (2 if m else 1)
        square *= mpmath.factorial(l - a) / mpmath.factorial(l + a)
        wave = mpmath.mpc(x, y) ** a
        return mpmath.sqrt(square) * polynomial * (wave.imag if m < 0 else wave.real)


@pytest.mark.parametrize(("dtype", "tol"), PRECISION)
def test_real_harmonics_are_exact_to_degree_200(dtype, tol):
    """Y_lm with an error small against its largest possible value √((2l+1)/4π); against
    mpmath, and all of them against SciPy's √2 (−1)^m Re or Im Y_l^m, whose cos θ costs
    l² roundings near the poles."""
    x = points_on_the_sphere().astype(dtype)
    value = np.asarray(harmonics.real_harmonics(x, DEGREE), float)
    assert value.shape == (len(x), (DEGREE + 1) ** 2)
    for l, m in PICKED:
        scale = math.sqrt((2 * l + 1) / (4 * math.pi))
        exact = [float(exact_harmonic(row, l, m)) for row in x]
        np.testing.assert_allclose(
            value[:, l * l + l + m] / scale, np.array(exact) / scale, rtol=0, atol=tol
        )
    x = x.astype(float)
    theta = np.arctan2(np.hypot(x[:, 0], x[:, 1]), x[:, 2])
    phi = np.arctan2(x[:, 1], x[:, 0])
    y = scipy_special.sph_harm_y_all(DEGREE, DEGREE, theta, phi)
    l = np.repeat(np.arange(DEGREE + 1), 2 * np.arange(DEGREE + 1) + 1)
    m = np.arange((DEGREE + 1) ** 2) - l * (l + 1)
    y = y[l, np.abs(m)].T
    exact = (
        np.where(m < 0, y.imag, y.real) * np.where(m == 0, 1, math.sqrt(2)) * (-1.0) ** m
    )
    scale = np.sqrt((2 * l + 1) / (4 * math.pi))
    error = np.abs(value - exact) / scale
    assert np.max(error) <= max(tol, DEGREE**2 * EPS)


def test_harmonics_are_orthonormal():
    """∫ Y_lm Y_kn = δ, by Gauss × trapezoidal quadrature that is exact for degree 2·12."""
    q, w = np.polynomial.legendre.leggauss(13)
    phi = 2 * math.pi * np.arange(25) / 25
    ring = np.sqrt(1 - q**2)[:, None]
    x = np.stack(
        [ring * np.cos(phi), ring * np.sin(phi), np.broadcast_to(q[:, None], (13, 25))],
        -1,
    )
    y = np.asarray(harmonics.real_harmonics(x, 12))  # any shape (..., 3)
    gram = np.einsum("q,qpi,qpj->ij", w * 2 * math.pi / 25, y, y)
    np.testing.assert_allclose(gram, np.eye(13**2), rtol=0, atol=100 * EPS)


def test_harmonics_add_up_to_the_zonal_kernel():
    """Σ_m Y_lm(x) Y_lm(y) = dim_l P_l(⟨x,y⟩)/|S²|, to l² roundings of ⟨x,y⟩."""
    x = points_on_the_sphere()
    y = np.asarray(harmonics.real_harmonics(x, 40))
    kernel = harmonics.zonal(3, 40, x @ x.T)
    for l in range(41):
        block = y[:, l * l : (l + 1) ** 2]
        error = np.abs(block @ block.T - kernel[..., l])
        assert error.max() <= (10 + l * l) * EPS * (2 * l + 1) / (4 * math.pi)


def test_harmonics_are_eigenfunctions_of_the_laplacian():
    """ΔY_lm = −l(l+1) Y_lm by autodiff, and the gradient is tangent to the sphere, at poles
    and elsewhere: what is differentiated is Y(x/|x|)."""
    x = jnp.asarray([*POLES[:2], [0.6, 0.0, 0.8], [0.48, -0.64, -0.6], [1.0, 0.0, 0.0]])
    l = np.repeat(np.arange(6), 2 * np.arange(6) + 1)

    def f(x):
        return harmonics.real_harmonics(x, 5)

    first = jax.jacfwd(f)
    slope = jax.jit(jax.vmap(first))(x)
    laplacian = jnp.trace(jax.jit(jax.vmap(jax.jacfwd(first)))(x), axis1=-2, axis2=-1)
    np.testing.assert_allclose(laplacian, -l * (l + 1) * f(x), rtol=0, atol=1e-13)
    np.testing.assert_allclose(jnp.einsum("xid,xd->xi", slope, x), 0, atol=1e-14)


def test_first_harmonics_are_the_coordinates():
    """Y_00 = 1/√4π and (Y_{1,−1}, Y_10, Y_11) = √(3/4π) (x₂, x₃, x₁), also in reverse mode
    at the pole and for one point."""
    x = jnp.asarray([0.0, 0.0, 1.0])
    value = harmonics.real_harmonics(x, 1)
    scale = math.sqrt(3 / (4 * math.pi))
    exact = [math.sqrt(1 / (4 * math.pi)), 0, scale, 0]
    np.testing.assert_allclose(value, exact, atol=EPS)
    slopes = jax.jacrev(lambda x: harmonics.real_harmonics(x, 1))(x)
    exact = [[0, 0, 0], [0, scale, 0], [0, 0, 0], [scale, 0, 0]]  # tangential: no x₃
    np.testing.assert_allclose(slopes, exact, atol=EPS)


# ---------------------------------------------------------------------- Funk–Hecke


def exact_log_eigenvalue(beta, d, l):
    """log((2π)^{d/2} β^{−d/2} I_{l+d/2−1}(β)) with 40 digits."""
    with mpmath.workdps(60):
        beta, half = mpmath.mpf(float(beta)), mpmath.mpf(d) / 2
        bessel = mpmath.log(mpmath.besseli(l + half - 1, beta))
        return half * mpmath.log(2 * mpmath.pi / beta) + bessel


@pytest.mark.parametrize(("dtype", "tol"), PRECISION)
@pytest.mark.parametrize("d", [2, 3, 66])
def test_exponential_kernel_has_bessel_eigenvalues(d, dtype, tol):
    """log λ_l to `tol` of its own size for β from 1e−3 to 1e4 and l to 200; λ_l itself where
    it is a number; d log λ_l/dβ = I_{μ+1}/I_μ + (l−1)/β with μ = l + d/2 − 1."""
    beta = np.array([1e-3, 0.5, 5, 60, 1e4], dtype)
    picked = [0, 1, 2, 30, 200]

    def f(b):
        return harmonics.funk_hecke_exponential(b, d, 200, log=True)

    value, slope = jax.jvp(jax.jit(f), (jnp.asarray(beta),), (0 * beta + 1,))
    assert value.shape == (5, 201)
    assert value.dtype == dtype
    exact = [exact_log_eigenvalue(b, d, l) for b in beta for l in picked]
    errors = [
        abs(float(v) - e) / max(1, abs(e))
        for v, e in zip(value[:, picked].ravel(), exact)
    ]
    assert max(errors) <= tol
    plain = harmonics.funk_hecke_exponential(beta[1:4], d, 3)
    exact = [
        mpmath.exp(exact_log_eigenvalue(b, d, l)) for b in beta[1:4] for l in (0, 1, 3)
    ]
    assert relative_errors(plain[:, [0, 1, 3]], exact).max() <= tol
    with mpmath.workdps(60):
        exact = []
        for b in [mpmath.mpf(float(b)) for b in beta]:
            for l in picked:
                mu = l + mpmath.mpf(d) / 2 - 1
                ratio = mpmath.besseli(mu + 1, b) / mpmath.besseli(mu, b)
                exact.append(ratio + (l - 1) / b)
    # For l = 1 and small β the slope is the small A, known to roundings of 1.
    gap = np.abs(np.asarray(slope)[:, picked].ravel() - np.array(exact, float))
    assert np.all(gap <= tol * np.maximum(1, np.abs(np.array(exact, float))))


@pytest.mark.parametrize("d", [2, 3, 4, 9])
def test_quadrature_agrees_with_the_exponential_kernel(d):
    """Two independent ways to λ_l of e^{β(q−1)}/β, to β roundings of λ_0 (each node q is
    rounded), and their derivatives in β, by reverse mode."""

    def numeric(beta):
        return harmonics.funk_hecke(lambda q: jnp.exp(beta * (q - 1)) / beta, d, 20)

    def exact(beta):
        return jnp.exp(harmonics.funk_hecke_exponential(beta, d, 20, log=True) - beta)

    for beta in (1.0, 300.0):
        have, want = numeric(beta), exact(beta)
        assert jnp.max(jnp.abs(have - want)) <= (20 + 2 * beta) * EPS * want[0]
    have, want = (jax.jacfwd(f)(300.0) for f in (numeric, exact))
    assert jnp.max(jnp.abs(have - want)) <= 1e3 * EPS * jnp.abs(want[0])


@pytest.mark.parametrize("d", [2, 3, 7])
def test_powers_have_exact_eigenvalues(d):
    """λ_l of W = q^4: dense integrals by SciPy-free quadrature in the angle; zero for odd l
    and l > 4, even with the fewest nodes that are exact."""
    have = harmonics.funk_hecke(lambda q: q**4, d, 6, nodes=7)

    def integrand(theta, l):
        q = np.cos(theta)
        return q**4 * np.array([float(exact_zonal(d, l, x)[l]) for x in q])

    for l in range(7):
        exact = zonal_integral(functools.partial(integrand, l=l), d)
        assert abs(have[l] - exact) <= 1e-13 * have[0]


def test_funk_hecke_is_the_integral_operator_on_s2():
    """∫ W(⟨x,y⟩) Y_lm(y) dy = λ_l Y_lm(x) for W = 1/(1.5 − q), by quadrature on S²."""

    def W(q):
        return 1 / (1.5 - q)

    q, w = np.polynomial.legendre.leggauss(60)
    phi = 2 * math.pi * np.arange(120) / 120
    ring = np.sqrt(1 - q**2)[:, None]
    y = [ring * np.cos(phi), ring * np.sin(phi), np.broadcast_to(q[:, None], (60, 120))]
    y = np.stack(y, -1).reshape(-1, 3)
    w = np.repeat(w, 120) * 2 * math.pi / 120
    x = points_on_the_sphere(3)
    integral = (W(x @ y.T) * w) @ np.asarray(harmonics.real_harmonics(y, 5))
    l = np.repeat(np.arange(6), 2 * np.arange(6) + 1)
    exact = harmonics.funk_hecke(W, 3, 5)[l] * harmonics.real_harmonics(x, 5)
    np.testing.assert_allclose(integral, exact, rtol=0, atol=1e-12)


# -------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: harmonics.gegenbauer(1, 3, 0.5), "`d` must be an integer ≥ 2"),
        (lambda: harmonics.gegenbauer(3, -1, 0.5), "`degree` must be an integer ≥ 0"),
        (
            lambda: harmonics.zonal(66, 200, np.float32(0.5)),
            r"`degree` must be ≤ \d+ for d = 66 in float32.*Use `gegenbauer`",
        ),
        (
            lambda: harmonics.real_harmonics([1.0, 0.0], 2),
            r"`x` must be points of S².* has shape \(2,\)",
        ),
        (
            lambda: harmonics.real_harmonics([1.0, 1.0, 0.0], 2),
            "`x` must have rows of norm 1 .* row 0 has norm 1.41421",
        ),
        (
            lambda: harmonics.funk_hecke(lambda q: q[0], 3, 2),
            r"`W` must map an array of cosines .* to \(\)",
        ),
        (
            lambda: harmonics.funk_hecke(lambda q: 1 / (q - q), 3, 2),
            "`W` must be finite",
        ),
        (
            lambda: harmonics.funk_hecke(jnp.exp, 3, 8, nodes=8),
            "`nodes` must be an integer ≥ 9, but is 8",
        ),
        (
            lambda: harmonics.funk_hecke_exponential(0.0, 3, 2),
            "`beta` must be finite and > 0, but is 0.0.*βλ_l",
        ),
        (
            lambda: harmonics.funk_hecke_exponential([1.0, -2.0], 3, 2),
            r"`beta` must be finite and > 0, but is \[1.0, -2.0\]",
        ),
        (
            lambda: harmonics.funk_hecke_exponential(1e3, 3, 2),
            "e\\^β does not overflow, but is 1000.0. Use `log=True`",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    """The error names the argument, the rule, the value and the cure."""
    with pytest.raises(ValueError, match=message):
        call()
