"""Tilted measures, von Mises–Fisher laws and Laplace integrals against mpmath, quadrature
and the fields themselves."""

import functools
import math

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

import meanformer as mf
from helpers import (
    EPS,
    random_rotation,
    random_tokens,
    relative_errors,
    sphere_area,
    zonal_integral,
)
from meanformer import theory

KAPPAS = [0, 1e-12, 1e-6, 1e-3, 0.1, 0.5, 0.999, 1, 1.001, 1.7, 3, 4.001, 10, 16.49]
KAPPAS += [16.51, 33, 100, 1e3, 1e4, 1e6]
BETAS = [0, 1e-6, 0.01, 0.5, 1, 3, 10, 20, 33, 100, 1e3, 1e4, 1e6]
TOLERANCE = {np.float64: 1e-12, np.float32: 1e-5}  # promised over the whole range


def weighted_tokens(rng, n, d):
    """A measure with one token of weight 0."""
    weights = rng.uniform(size=n)
    weights[1] = 0
    return mf.Empirical(random_tokens(rng, n, d), weights)


def scaled_errors(values, exact):
    """|value − exact|/max(1, |exact|): what a logarithm can promise near 0."""
    return max(
        float(abs(mpmath.mpf(float(v)) - e) / max(1, abs(e)))
        for v, e in zip(np.asarray(values).ravel(), exact)
    )


# --------------------------------------------------------------- tilted measures


def exact_tilt(mu, u):
    """Weights of the tilted measure and L, with 60 digits."""
    with mpmath.workdps(60):
        points = [[mpmath.mpf(float(c)) for c in y] for y in np.asarray(mu.points)]
        dots = [sum(a * mpmath.mpf(float(b)) for a, b in zip(y, u)) for y in points]
        mass = [mpmath.mpf(float(w)) * mpmath.exp(s) for w, s in zip(mu.weights, dots)]
        total = sum(mass)
        return [m / total for m in mass], mpmath.log(total), points


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_tilted_weights_are_exact_for_any_length_of_u(dtype):
    """wⱼe^{⟨u,yⱼ⟩}/Σ… for |u| from 0 to 1e6: an exponent e in front of a difference
    ⟨u, y − y*⟩ that is rounded to eps·|u||y − y*|. A weight 0 stays 0, the sum is 1."""
    rng = np.random.default_rng(0)
    base = weighted_tokens(rng, 8, 3)
    # Close tokens, so that several keep weight at the largest |u|.
    near = np.asarray(base.points)[2] + 1e-3 * rng.normal(size=(4, 3))
    points = np.concatenate([base.points, near / np.linalg.norm(near, axis=1)[:, None]])
    weights = np.concatenate([base.weights, np.full(4, 0.1)])
    mu = mf.Empirical(points.astype(dtype), weights.astype(dtype))
    direction = np.asarray(mu.points)[2]
    for length in (0.0, 1.0, 50.0, 1e4, 1e6):
        u = (length * direction).astype(dtype)
        nu = theory.tilted_measure(mu, u)
        exact, _, _ = exact_tilt(mu, u)
        eps = float(np.finfo(dtype).eps)
        spread = max(1.0, math.sqrt(8 * 60 * length))  # |u||y − y*| where e^{−60} is left
        assert nu.weights.dtype == dtype
        assert float(nu.weights[1]) == 0
        np.testing.assert_allclose(
            np.asarray(nu.weights, float),
            [float(w) for w in exact],
            atol=4 * eps * spread,
        )
        np.testing.assert_allclose(float(jnp.sum(nu.weights)), 1, atol=20 * eps)


def test_tilted_measure_is_what_attention_averages():
    """χ_β[µ](x) = P_x V E_ν[Y] with ν = ν_u, u = βBᵀx, for a B that is not symmetric."""
    rng = np.random.default_rng(1)
    Q, K, V = rng.normal(size=(3, 3, 3))
    mu, x, beta = weighted_tokens(rng, 20, 3), random_tokens(rng, 5, 3), 4.0
    u = beta * x @ Q.T @ K
    mean = jax.vmap(lambda v: (nu := theory.tilted_measure(mu, v)).mean(nu.points))(u)
    moved = np.asarray(mean) @ V.T
    expected = moved - np.sum(moved * x, axis=1, keepdims=True) * x
    velocity = mf.SelfAttention(Q, K, V, beta).velocity(x, mu)
    np.testing.assert_allclose(velocity, expected, rtol=0, atol=50 * EPS)


def test_rescaled_attention_is_the_gradient_of_the_log_convolution():
    """β χ_β[µ] = ∇_S log(W_β * µ) for Q = K = V = I, with W_β * µ(x) = e^{L_µ(βx)}; the
    factor β is missing in the paper's text."""
    rng = np.random.default_rng(2)
    mu, x, beta = weighted_tokens(rng, 20, 3), random_tokens(rng, 5, 3), 7.0
    eye = np.eye(3)

    def log_convolution(y):
        return theory.cumulants(mu, beta * y).log_partition

    gradient = mf.sphere.project(jnp.asarray(x), jax.vmap(jax.grad(log_convolution))(x))
    velocity = mf.SelfAttention(eye, eye, eye, beta).velocity(x, mu)
    np.testing.assert_allclose(gradient, beta * velocity, rtol=0, atol=200 * EPS)


def test_cumulants_are_the_derivatives_of_the_log_partition():
    """Mean, covariance and third cumulant of ν_u are derivatives at v = 0 of
    v ↦ log E_ν e^{⟨v,Y⟩}, which is L(u+v) − L(u)."""
    rng = np.random.default_rng(3)
    mu, u = weighted_tokens(rng, 12, 3), jnp.asarray([0.7, -2.0, 1.1])

    def log_mean(v):
        return jnp.log(jnp.sum(mu.weights * jnp.exp(mu.points @ (u + v))))

    @jax.jit
    def derivatives(v):
        hessian = jax.hessian(log_mean)
        return log_mean(v), jax.grad(log_mean)(v), hessian(v), jax.jacfwd(hessian)(v)

    for have, want in zip(
        jax.tree.leaves(theory.cumulants(mu, u)), derivatives(jnp.zeros(3))
    ):
        np.testing.assert_allclose(have, want, rtol=0, atol=100 * EPS)


def test_cumulants_have_derivatives_of_their_own():
    """∂/∂u of L, mean and covariance are mean, covariance and third cumulant; finite in the
    weights too, where one is 0."""
    rng = np.random.default_rng(4)
    mu, u = weighted_tokens(rng, 12, 3), jnp.asarray([0.7, -2.0, 1.1])
    c = theory.cumulants(mu, u)
    slope = jax.jacrev(lambda v: theory.cumulants(mu, v))(u)
    np.testing.assert_allclose(slope.log_partition, c.mean, rtol=0, atol=100 * EPS)
    np.testing.assert_allclose(slope.mean, c.covariance, rtol=0, atol=100 * EPS)
    np.testing.assert_allclose(slope.covariance, c.third, rtol=0, atol=100 * EPS)
    by_measure = jax.grad(lambda m: theory.cumulants(m, u).third.sum())(mu)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(by_measure))


@pytest.mark.parametrize("length", [0.0, 3.0, 1e4])
def test_cumulants_of_few_tokens_agree_with_mpmath(length):
    """Centred moments of four tokens on S¹ with 60 digits."""
    rng = np.random.default_rng(5)
    angle = np.array([0.3, 0.31, 0.33, 2.0])
    points = np.stack([np.cos(angle), np.sin(angle)], 1)
    mu = mf.Empirical(points, rng.uniform(size=4))
    u = length * np.array([math.cos(0.315), math.sin(0.315)])
    c = theory.cumulants(mu, u)
    weights, log_total, y = exact_tilt(mu, u)
    with mpmath.workdps(60):
        mean = [sum(w * p[i] for w, p in zip(weights, y)) for i in range(2)]
        z = [[p[i] - mean[i] for i in range(2)] for p in y]

        def moment(*axes):
            return sum(w * math.prod(p[i] for i in axes) for w, p in zip(weights, z))

        second = [moment(i, j) for i in range(2) for j in range(2)]
        third = [moment(i, j, k) for i in range(2) for j in range(2) for k in range(2)]
    size = max(1, length)
    np.testing.assert_allclose(c.log_partition, float(log_total), atol=4 * EPS * size)
    np.testing.assert_allclose(c.mean, [float(m) for m in mean], rtol=0, atol=4 * EPS)
    for have, want in ((c.covariance, second), (c.third, third)):
        want = np.array([float(v) for v in want])
        # |u| 0.03² is the error of an exponent in units of eps: at most 10.
        tol = 100 * EPS * np.abs(want).max()
        np.testing.assert_allclose(np.ravel(have), want, rtol=0, atol=tol)


# ------------------------------------------------------- von Mises–Fisher laws


def exact_coefficients(d, kappa):
    """α₁, α₂, β₂, α₃, β₃ of Eqs. (12), (13) from A, A', A'' with 90 digits."""
    with mpmath.workdps(90):
        nu, k = mpmath.mpf(d) / 2 - 1, mpmath.mpf(kappa)
        if k == 0:
            zero = mpmath.mpf(0)
            return zero, zero, 1 / mpmath.mpf(d), zero, zero
        A = mpmath.besseli(nu + 1, k) / mpmath.besseli(nu, k)
        slope = 1 - A**2 - (d - 1) * A / k
        bend = -2 * A * slope - (d - 1) * (slope / k - A / k**2)
        beta2 = (1 - slope - A**2) / (d - 1)
        beta3 = (-bend - 2 * A * slope) / (d - 1)
        return A, slope - beta2, beta2, bend - 3 * beta3, beta3


def in_order(c):
    return c.alpha1, c.alpha2, c.beta2, c.alpha3, c.beta3


@pytest.mark.parametrize(
    ("d", "dtype"),
    [
        (2, np.float64),
        (33, np.float64),
        (2, np.float32),
        (66, np.float32),
    ],
)
def test_vmf_coefficients_are_exact(d, dtype):
    """Small *relative* errors of all five for κ from 0 to 1e6 (where they are normal
    numbers)."""
    kappa = np.asarray(KAPPAS, dtype)
    have = in_order(theory.vmf_coefficients(d, kappa))
    exact = list(zip(*[exact_coefficients(d, float(k)) for k in kappa]))
    tiny = float(np.finfo(dtype).tiny)
    for value, want in zip(have, exact):
        assert value.dtype == dtype
        normal = np.array([w == 0 or abs(w) > tiny for w in want])
        assert relative_errors(value, want)[normal].max() <= TOLERANCE[dtype]
        assert np.abs(np.asarray(value)[~normal]).max(initial=0) <= tiny


@pytest.mark.parametrize("kappa", [0.3, 40.0])
def test_vmf_coefficients_are_moments_of_the_density(kappa):
    """With t = ⟨x,Y⟩ of density ∝ e^{κt}(1−t²)^{(d−3)/2}, d = 5: the cumulants of t are α₁,
    α₂ + β₂, α₃ + 3β₃; across, (d−1)β₂ = E[1−t²] and (d−1)β₃ = E[(1−t²)(t−Et)]."""
    with mpmath.workdps(30):

        def integral(f):
            def weighted(t):
                return f(t) * mpmath.exp(kappa * (t - 1)) * (1 - t * t)

            return mpmath.mpf(mpmath.quad(weighted, [-1, 0, 0.8, 0.95, 1]))

        total = integral(lambda t: 1)
        m = integral(lambda t: t) / total
        second = integral(lambda t: (t - m) ** 2) / total
        third = integral(lambda t: (t - m) ** 3) / total
        beta2 = integral(lambda t: 1 - t * t) / total / 4
        beta3 = integral(lambda t: (1 - t * t) * (t - m)) / total / 4
        exact = [m, second - beta2, beta2, third - 3 * beta3, beta3]
    have = in_order(theory.vmf_coefficients(5, kappa))
    assert relative_errors(np.stack(have), exact).max() <= 1e-12


@pytest.mark.parametrize("d", [2, 33])
def test_vmf_coefficients_at_large_kappa(d):
    """κ(1−α₁) → (d−1)/2, κα₂ → −1, κβ₂ → 1, κ²α₃ → 3, κ²β₃ → −1, with errors ≤ d²/κ."""
    kappa = KAPPAS[-1]
    c = theory.vmf_coefficients(d, np.asarray(KAPPAS, float))
    a1, a2, b2, a3, b3 = (float(v[-1]) for v in in_order(c))
    scaled = [kappa * (1 - a1), kappa * a2, kappa * b2, kappa**2 * a3, kappa**2 * b3]
    np.testing.assert_allclose(scaled, [(d - 1) / 2, -1, 1, 3, -1], atol=d**2 / kappa)


def test_each_coefficient_has_the_next_as_its_slope():
    """Along the ray u = κx, ∇L, ∇²L, ∇³L give α₁' = α₂ + β₂, β₂' = β₃ and α₂' = α₃ + 2β₃; no
    NaN at κ = 0, where α₃' = 0 and β₃' = −2/(d²(d+2)). α₂ + β₂ cancels by a factor 2κ/d."""
    d = 5
    kappa = jnp.asarray([0.0, 0.3, 2.4, 2.6, 7.0, 300.0])

    @jax.jit
    def with_slopes(k):
        f = functools.partial(theory.vmf_coefficients, d)
        return jax.jvp(f, (k,), (jnp.ones_like(k),))

    c, slope = with_slopes(kappa)
    slack = 10 * EPS * np.maximum(kappa, 1)
    assert np.all(np.abs(slope.alpha1 / (c.alpha2 + c.beta2) - 1) <= slack)
    np.testing.assert_allclose(slope.beta2, c.beta3, rtol=20 * EPS)
    np.testing.assert_allclose(slope.alpha2, c.alpha3 + 2 * c.beta3, rtol=50 * EPS)
    assert float(slope.alpha3[0]) == 0
    np.testing.assert_allclose(slope.beta3[0], -2 / (d * d * (d + 2)), rtol=10 * EPS)
    for i in (2, 4):
        with mpmath.workdps(40):
            k = mpmath.mpf(float(kappa[i]))
            want = [
                mpmath.diff(lambda t, j=j: exact_coefficients(d, t)[j], k) for j in (3, 4)
            ]
        have = np.stack([slope.alpha3[i], slope.beta3[i]])
        assert relative_errors(have, want).max() <= 1e-12


tilted_uniform = jax.jit(jax.vmap(theory.vmf_cumulants))  # always three points


def test_vmf_cumulants_agree_with_quadrature():
    """The uniform nodes integrate e^{⟨u,y⟩} times cubics to rounding for |u| ≤ 4: degree 40
    leaves 4⁴⁰/40! < 1e−23 of the series. Also at u = 0: I/d, and no third cumulant."""
    d, n = 4, 16_000
    nodes = mf.Uniform(d).nodes(n)
    u = np.array([[0], [0.1], [4]]) * random_tokens(np.random.default_rng(d), 3, d)
    have = tilted_uniform(u)
    for i in range(3):
        want = theory.cumulants(nodes, u[i])
        for a, b in zip(jax.tree.leaves(have), jax.tree.leaves(want)):
            np.testing.assert_allclose(a[i], b, rtol=0, atol=200 * EPS)
    np.testing.assert_allclose(have.covariance[0], np.eye(d) / d, rtol=0, atol=EPS)


def test_vmf_cumulants_are_invariant_under_rotations_that_fix_u():
    """T(Ru) = R·T(u) for the tensors of order 2 and 3, so that R·T = T for orthogonal R with
    Ru = u; they are symmetric."""
    rng, d = np.random.default_rng(7), 4
    u = 3 * random_tokens(rng, 1, d)[0]
    frame = np.linalg.qr(np.concatenate([u[:, None], np.eye(d)[:, :3]], 1))[0]
    inner = np.eye(d)
    inner[1:, 1:] = random_rotation(rng, d - 1)
    fixing, moving = frame @ inner @ frame.T, random_rotation(rng, d)
    np.testing.assert_allclose(fixing @ u, u, atol=10 * EPS)
    c = tilted_uniform(np.stack([u, u, moving @ u]))
    for R, i in ((fixing, 0), (moving, 2)):
        second, third = c.covariance[0], c.third[0]
        np.testing.assert_allclose(R @ second @ R.T, c.covariance[i], atol=20 * EPS)
        third = np.einsum("ia,jb,kc,abc->ijk", R, R, R, third)
        np.testing.assert_allclose(third, c.third[i], atol=20 * EPS)
    for axes in ((1, 0, 2), (0, 2, 1), (2, 1, 0)):
        same = np.transpose(c.third[0], axes)
        np.testing.assert_allclose(same, c.third[0], rtol=0, atol=EPS)


def test_vmf_cumulants_are_smooth():
    """Derivatives of L, mean and covariance in u are the next cumulants: at 0, near 0 and
    where the branches change (|u| = d/2, √(8d))."""
    d = 3
    x = np.array([2.0, -1.0, 2.0]) / 3
    u = np.stack([0 * x, 1e-9 * x, 1.4999 * x, 1.5001 * x, 4.898 * x, 4.9 * x, 40 * x])

    @jax.jit
    @jax.vmap
    def with_slopes(v):
        def along(e):
            c, slope = jax.jvp(theory.vmf_cumulants, (v,), (e,))
            return c, (slope.log_partition, slope.mean, slope.covariance)

        return jax.vmap(along, out_axes=(None, -1))(jnp.eye(d))

    c, slopes = with_slopes(u)
    for have, want in zip(slopes, (c.mean, c.covariance, c.third)):
        np.testing.assert_allclose(have, want, rtol=0, atol=20 * EPS)


def test_vmf_cumulants_keep_float32_and_never_overflow():
    """S², |u| = 1e6: the largest entries of the tensors are 1/κ and −1/κ²; along u, 1/κ² is
    left of g₀ + g₁κ², up to roundings of 1/κ."""
    kappa = 1e6
    c = theory.vmf_cumulants(np.array([kappa, 0, 0], np.float32))
    assert {leaf.dtype for leaf in jax.tree.leaves(c)} == {np.dtype(np.float32)}
    log_total = kappa - math.log(2 * kappa)  # log(sinh κ/κ)
    np.testing.assert_allclose(float(c.log_partition), log_total, rtol=1e-6)
    np.testing.assert_allclose(kappa * float(c.covariance[1, 1]), 1, rtol=2e-6)
    np.testing.assert_allclose(kappa**2 * float(c.third[0, 1, 1]), -1, rtol=4e-6)
    along = float(c.covariance[0, 0]) - kappa**-2
    assert abs(along) <= 2 * np.finfo(np.float32).eps / kappa


# -------------------------------------------------------------- normalisation


def exact_log_normaliser(d, beta):
    """log((2π)^{d/2} β^{1−d/2} I_{d/2−1}(β)), and log|S^{d−1}| at 0, with 60 digits."""
    with mpmath.workdps(60):
        half, beta = mpmath.mpf(d) / 2, mpmath.mpf(float(beta))
        if beta == 0:
            return mpmath.log(2 * mpmath.pi**half / mpmath.gamma(half))
        bessel = mpmath.besseli(half - 1, beta)
        return mpmath.log((2 * mpmath.pi) ** half * beta ** (1 - half) * bessel)


@pytest.mark.parametrize(("d", "dtype"), [(2, np.float64), (33, np.float32)])
def test_log_normaliser_and_its_slope_are_exact(d, dtype):
    """log Z_β against mpmath; (log Z_β)' = A_d(β), with the relative error of A."""
    beta = np.asarray(KAPPAS, dtype)
    function = functools.partial(theory.log_normaliser, d)
    value, slope = jax.jit(jax.vmap(jax.value_and_grad(function)))(beta)
    assert value.dtype == slope.dtype == dtype
    exact = [exact_log_normaliser(d, b) for b in beta]
    assert scaled_errors(value, exact) <= TOLERANCE[dtype]
    ratio = [exact_coefficients(d, float(b))[0] for b in beta]
    assert relative_errors(slope, ratio).max() <= TOLERANCE[dtype]


@pytest.mark.parametrize("d", [2, 3, 5])
def test_log_normaliser_is_the_integral_over_the_sphere(d):
    """∫ e^{β⟨x,y⟩} dσ(y) by quadrature in the angle; log|S^{d−1}| at β = 0."""
    beta = 30.0
    total = zonal_integral(lambda t: np.exp(beta * (np.cos(t) - 1)), d, scale=0.2)
    value = float(theory.log_normaliser(d, beta))
    np.testing.assert_allclose(value, beta + math.log(total), rtol=20 * EPS)
    zero = float(theory.log_normaliser(d, 0.0))
    np.testing.assert_allclose(zero, math.log(sphere_area(d)), rtol=4 * EPS)


# -------------------------------------------------------------- Laplace integrals


def exact_log_laplace(d, k, beta):
    """log(|S^{d−2}| 2^{k/2+d−2} B(a, b) e^{−β} M(b, a+b, 2β)) with 60 digits."""
    with mpmath.workdps(60):
        k, beta = mpmath.mpf(float(k)), mpmath.mpf(float(beta))
        b = mpmath.mpf(d - 1) / 2
        a = b + k / 2
        around = 2 * mpmath.pi**b / mpmath.gamma(b)
        kummer = mpmath.log(mpmath.hyp1f1(b, a + b, 2 * beta)) - beta
        scale = around * mpmath.mpf(2) ** (k / 2 + d - 2) * mpmath.beta(a, b)
        return mpmath.log(scale) + kummer


@pytest.mark.parametrize(
    ("d", "dtype"),
    [
        (2, np.float64),
        (66, np.float64),
        (2, np.float32),
    ],
)
def test_laplace_integral_is_exact(d, dtype):
    """Kummer's function by mpmath, for k from almost −(d−1) to 300 and β from 0 to 1e6."""
    k = np.asarray([1e-3 - (d - 1), -0.9, 0, 1, 2, 7.3, 40, 300], dtype)[:, None]
    beta = np.asarray(BETAS, dtype)
    value = theory.log_laplace_integral(d, k, beta)
    assert value.dtype == dtype
    exact = [exact_log_laplace(d, p, b) for p in k[:, 0] for b in beta]
    assert scaled_errors(value, exact) <= TOLERANCE[dtype]


@pytest.mark.parametrize(("d", "k"), [(2, 3.0), (3, 1.0), (5, -2.0)])
def test_laplace_integral_is_the_integral_over_the_sphere(d, k):
    """∫ (1−⟨x,y⟩)^{k/2} e^{β⟨x,y⟩} dσ(y) by quadrature in the angle θ, 1−cos θ = 2sin²(θ/2);
    for k = 0 it is Z_β."""

    def integrand(theta):
        gap = 2 * np.sin(theta / 2) ** 2
        return gap ** (k / 2) * np.exp(-beta * gap)

    for beta in (0.0, 25.0):
        total = zonal_integral(integrand, d, scale=1e-3)
        value = float(theory.log_laplace_integral(d, k, beta))
        np.testing.assert_allclose(value, beta + math.log(total), rtol=0, atol=1e-12)
        none = float(theory.log_laplace_integral(d, 0.0, beta))
        zero = float(theory.log_normaliser(d, beta))
        np.testing.assert_allclose(none, zero, rtol=1e-14)


def test_laplace_integral_has_the_right_slopes():
    """∂/∂β = E⟨x,Y⟩ and ∂/∂k = ½ E log(1−⟨x,Y⟩) are those of differences; at β = 0 the first
    two derivatives are mean and variance of t = 1 − 2v, v ~ Beta(a, b)."""

    def f(k, beta):
        return theory.log_laplace_integral(4, k, beta)

    @jax.jit
    @jax.vmap
    def derivatives(k, beta):
        slope = jax.grad(f, argnums=1)
        bend = jax.grad(slope, argnums=1)
        return f(k, beta), jax.grad(f)(k, beta), slope(k, beta), bend(k, beta)

    h = 1e-2  # rounding 1e−14/h, next term h⁴/30
    steps = h * np.array([0, -2, -1, 1, 2])
    points = np.concatenate(
        [
            [[1.5, 0.0]],
            [1.5, 6.0] + steps[:, None] * [1, 0],
            [1.5, 6.0] + steps[:, None] * [0, 1],
        ]
    )
    values, by_k, by_beta, bend = derivatives(*points.T)
    weights = np.array([0, 1, -8, 8, -1]) / (12 * h)
    np.testing.assert_allclose(by_k[1], weights @ values[1:6], rtol=0, atol=1e-9)
    np.testing.assert_allclose(by_beta[1], weights @ values[6:], rtol=0, atol=1e-9)
    a, b = 2.25, 1.5
    np.testing.assert_allclose(by_beta[0], 1 - 2 * a / (a + b), rtol=0, atol=1e-14)
    variance = 4 * a * b / ((a + b) ** 2 * (a + b + 1))
    np.testing.assert_allclose(bend[0], variance, rtol=1e-13)


@pytest.mark.parametrize(("d", "k"), [(2, 1.0), (4, 0.0), (5, 2.0)])
def test_laplace_asymptotic_has_the_exact_constant(d, k):
    """integral/asymptotic − 1 → 0 at order 1 in 1/β: a(3−d)/(4β) with a = (d−1+k)/2."""
    beta = np.array([50.0, 100, 200, 400, 800])
    ratio = theory.log_laplace_integral(d, k, beta) - theory.log_laplace_asymptotic(
        d, k, beta
    )
    error = np.abs(np.expm1(ratio))
    order = -np.polyfit(np.log(beta), np.log(error), 1)[0]
    assert 0.95 < order < 1.05
    a = (d - 1 + k) / 2
    np.testing.assert_allclose(beta * ratio, a * (3 - d) / 4, atol=(a * d) ** 2 / 50)
    np.testing.assert_allclose((beta * ratio)[-1], a * (3 - d) / 4, rtol=0.02)


def test_laplace_asymptotic_is_exact_but_for_exponentials_on_the_two_sphere():
    """d = 3: the integral is 2π Γ(a) β^{−a} 2^{…} e^β up to e^{−2β}; in float32."""
    dtype = np.float32
    k, beta = np.asarray([-1.5, 0, 3], dtype)[:, None], np.asarray([40.0, 1e5], dtype)
    exact = theory.log_laplace_integral(3, k, beta)
    limit = theory.log_laplace_asymptotic(3, k, beta)
    assert exact.dtype == limit.dtype == dtype
    np.testing.assert_allclose(exact, limit, rtol=4 * 2.0**-23)


# ------------------------------------------------------------- the field at large β


@functools.cache
def smooth_case(d):
    """Matrices that are neither symmetric nor orthogonal, a smooth law, eight tokens, and
    the law as a quadrature that is exact for degree ≈ 9√κ, κ ≤ 1000."""
    rng = np.random.default_rng(d)
    Q, K, V = np.eye(d) + 0.3 * rng.normal(size=(3, d, d))
    m = random_tokens(rng, 1, d)[0]
    law = mf.WrappedNormal(m, 1.0) if d == 2 else mf.VonMisesFisher(m, 2.0)
    nodes = mf.Uniform(d).nodes(2000 if d == 2 else 2 * 150**2)
    density = jax.jit(lambda y: law.density(y))(nodes.points)
    mu = mf.Empirical(nodes.points, nodes.weights * density)
    return (Q, K, V), law, jnp.asarray(random_tokens(rng, 8, d)), mu


@jax.jit
def field_and_terms(x, matrices, beta, law, mu):
    """χ_β[µ](x) by quadrature, (I) and (II)."""
    Q, K, V = matrices
    velocity = mf.SelfAttention(Q, K, V, beta).velocity(x, mu)
    one, two = theory.field_terms(x, Q, K, V, beta, law)
    return velocity, one, two


def fitted_order(betas, errors):
    return -np.polyfit(np.log(betas), np.log(errors), 1)[0]


@pytest.mark.parametrize("d", [2, 3])
def test_two_terms_give_the_field_to_second_order(d):
    """|χ_β − (I)| = O(1/β) and |χ_β − (I) − (II)| = O(1/β²), orders fitted (the next order
    moves them by O(1/β)); (I) tends to P_x V û."""
    matrices, law, x, mu = smooth_case(d)
    betas, errors = [100.0, 200.0, 400.0], []
    for beta in betas:
        field, one, two = field_and_terms(x, matrices, beta, law, mu)
        errors.append(
            [float(jnp.max(jnp.abs(e))) for e in (field - one, field - one - two)]
        )
    first, both = np.transpose(errors)
    assert 0.95 < fitted_order(betas, first) < 1.05
    assert 1.9 < fitted_order(betas, both) < 2.1
    Q, K, V = matrices
    u = np.asarray(x) @ Q.T @ K
    u = u / np.linalg.norm(u, axis=1, keepdims=True)
    limit = mf.sphere.project(x, jnp.asarray(u @ V.T))
    _, one, _ = field_and_terms(x, matrices, 1e6, law, mu)
    np.testing.assert_allclose(one, limit, atol=d / 1e6)  # 1 − A ≈ (d−1)/(2β|u|)
    assert float(jnp.max(jnp.abs(limit))) > 0.1


@pytest.mark.parametrize("d", [2, 3])
def test_first_term_vanishes_in_the_heat_phase(d):
    """QᵀK = λ₁I, V = ±λ₂I: (I) = 0, (II) = ±λ₂A_d(βλ₁)/(βλ₁) ∇log µ(x) = O(1/β), and it is
    the field up to O(1/β²)."""
    _, law, x, mu = smooth_case(d)
    eye, (l1, l2) = np.eye(d), (1.5, 0.7)
    h, far = 1e-4, 1e6
    aside = np.linalg.svd(np.asarray(x[:1]))[2][1]
    ends = jnp.stack([jnp.cos(h) * x[0] + s * jnp.sin(h) * aside for s in (-1, 1)])
    score = float(jnp.diff(law.log_density(ends))[0]) / (2 * h)
    for sign in (1, -1):
        matrices = (l1 * eye, eye, sign * l2 * eye)
        betas, errors = [100.0, 200.0, 400.0], []
        for beta in betas:
            field, one, two = field_and_terms(x, matrices, beta, law, mu)
            assert float(jnp.max(jnp.abs(one))) <= 4 * EPS
            errors.append(float(jnp.max(jnp.abs(field - two))))
        assert 1.9 < fitted_order(betas, errors) < 2.1
        _, _, two = field_and_terms(x, matrices, far, law, mu)
        have = sign * far * l1 / l2 * float(two[0] @ aside)
        np.testing.assert_allclose(have, score, rtol=1e-5)  # h²; 1 − A ≈ 1e−6


def test_uniform_law_has_only_the_first_term():
    """χ_β[σ](x) = A_d(β|u|) P_x V û exactly, (II) = 0; at β = 0, ∂(I)/∂β = P_x V u/d."""
    rng = np.random.default_rng(9)
    Q, K, V = rng.normal(size=(3, 3, 3))
    x, nodes = random_tokens(rng, 8, 3), mf.Uniform(3).nodes(5000)

    @jax.jit
    def with_slopes(beta):
        def terms(b):
            return theory.field_terms(x, Q, K, V, b, mf.Uniform(3))

        field = mf.SelfAttention(Q, K, V, beta).velocity(x, nodes)
        return field, *jax.jvp(terms, (beta,), (jnp.ones_like(beta),))

    field, (one, two), _ = with_slopes(2.0)
    np.testing.assert_allclose(one, field, rtol=0, atol=100 * EPS)
    np.testing.assert_array_equal(two, 0)
    _, (one, two), (slope, none) = with_slopes(0.0)
    expected = mf.sphere.project(jnp.asarray(x), jnp.asarray(x @ Q.T @ K @ V.T)) / 3
    np.testing.assert_allclose(slope, expected, rtol=0, atol=50 * EPS)
    for zero in (one, two, none):
        np.testing.assert_array_equal(zero, 0)


def test_terms_depend_on_beta_times_u_and_the_direction_of_u():
    """K → cK, β → β/c changes nothing, because µ is taken at u/|u| and not at u."""
    matrices, law, x, mu = smooth_case(3)
    Q, K, V = matrices
    _, *want = field_and_terms(x, matrices, 6.0, law, mu)
    _, *have = field_and_terms(x, (Q, 3 * K, V), 2.0, law, mu)
    np.testing.assert_allclose(have, want, rtol=0, atol=20 * EPS)


def test_terms_are_finite_at_beta_zero():
    """β = 0: (I) = 0 and (II) = P_x V ∇log µ(û)/d, with an error that is even in β."""
    matrices, law, x, mu = smooth_case(3)
    _, one, two = field_and_terms(x, matrices, 0.0, law, mu)
    _, _, near = field_and_terms(x, matrices, 1e-6, law, mu)
    np.testing.assert_array_equal(one, 0)
    np.testing.assert_allclose(two, near, rtol=0, atol=1e-11)
    assert float(jnp.max(jnp.abs(two))) > 0.01


# -------------------------------------------------------------------- refusals


def test_bad_measures_and_points_are_refused():
    mu = mf.Empirical(np.eye(3))
    with pytest.raises(
        ValueError, match=r"`mu` must be an `Empirical`, but is a Uniform"
    ):
        theory.tilted_measure(mf.Uniform(3), np.zeros(3))
    with pytest.raises(ValueError, match=r"`u` must have shape .*3.* but has shape \(2,"):
        theory.cumulants(mu, np.zeros(2))
    with pytest.raises(
        ValueError, match=r"`u` must be finite, but an entry at index \(1,"
    ):
        theory.tilted_measure(mu, [0.0, np.nan, 1.0])
    with pytest.raises(ValueError, match=r"`d = u.shape\[0\]` must be an integer ≥ 2"):
        theory.vmf_cumulants([1.0])


@pytest.mark.parametrize(
    "function",
    [
        theory.vmf_coefficients,
        theory.log_normaliser,
        lambda d, b: theory.log_laplace_integral(d, 1.0, b),
        lambda d, b: theory.log_laplace_asymptotic(d, 1.0, b),
    ],
)
def test_bad_concentrations_and_dimensions_are_refused(function):
    with pytest.raises(ValueError, match=r"must be finite and [≥>] 0, but is -1.0"):
        function(3, -1.0)
    with pytest.raises(ValueError, match=r"must be finite and [≥>] 0, but is inf"):
        function(3, math.inf)
    with pytest.raises(ValueError, match="`d` must be an integer ≥ 2"):
        function(1, 1.0)


def test_divergent_laplace_integrals_are_refused():
    with pytest.raises(ValueError, match=r"`k` must be finite and > −\(d−1\) = -2"):
        theory.log_laplace_integral(3, -2.0, 1.0)
    with pytest.raises(ValueError, match=r"`beta` must be finite and > 0, but is 0.0"):
        theory.log_laplace_asymptotic(3, 1.0, 0.0)
    with pytest.raises(Exception, match="The integral diverges"):
        jax.jit(lambda k: theory.log_laplace_integral(3, k, 1.0))(-2.5)


def test_terms_without_a_direction_or_a_density_are_refused():
    x, eye = np.eye(3), np.eye(3)
    with pytest.raises(ValueError, match="KᵀQx ≠ 0"):
        theory.field_terms(x, eye, np.diag([1.0, 1, 0]), eye, 1.0, mf.Uniform(3))
    with pytest.raises(ValueError, match=r"`law` must be a law on S\^2 .*d = 2"):
        theory.field_terms(x, eye, eye, eye, 1.0, mf.Uniform(2))
    with pytest.raises(ValueError, match=r"`law` must be a law on S\^2 .*Empirical"):
        theory.field_terms(x, eye, eye, eye, 1.0, mf.Empirical(x))
