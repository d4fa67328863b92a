"""Laws and weighted tokens: densities, moments, quantiles and samples against SciPy, mpmath
and closed forms."""

import itertools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import mpmath
import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy import integrate, interpolate, special as scipy_special, stats

from helpers import (
    EPS,
    at_angle,
    central_difference,
    random_tokens,
    sphere_area,
    zonal_integral,
)
from meanformer import (
    AzimuthElevation,
    Empirical,
    HeatKernel,
    Mixture,
    Uniform,
    VonMisesFisher,
    WrappedNormal,
)
from meanformer.measures import log_wrapped_normal

N = 20_000
KAPPAS = [0.0, 1e-3, 1.0, 50.0, 1e4, 1e6]


def mean_of(d):
    """A unit vector of R^d in no special position."""
    return random_tokens(np.random.default_rng(d), 1, d)[0]


def angle_to(mean, x):
    """Angles of the rows of x to `mean`, to all digits."""
    x, mean = np.asarray(x, float), np.asarray(mean, float)
    apart, along = (np.linalg.norm(v, axis=-1) for v in (x - mean, x + mean))
    return 2 * np.arctan2(apart, along)


# Compiled once per kind of law and dimension: parameters are leaves of the pytree.
@eqx.filter_jit
def sample(law, key, n=N):
    return law.sample(key, n)


@eqx.filter_jit
def nodes_of(law, n):
    return law.nodes(n)


@eqx.filter_jit
def density(law, x):
    return law.density(x)


@eqx.filter_jit
def log_density(law, x):
    return law.log_density(x)


@eqx.filter_jit
def quantile(law, p):
    return law.angle_quantile(p)


def along(law, theta, f=density):
    """The density (or `f`) of a zonal law at angles θ to its mean."""
    return np.asarray(f(law, jnp.asarray(at_angle(law.mean, theta))))


# ------------------------------------------- independent distributions of the angle


def tabulated(density, end):
    """The distribution function on [0, end] of an unnormalised density."""
    theta = np.linspace(0, end, 40_001)
    f = density(theta)
    total = integrate.cumulative_simpson(f, x=theta, initial=0)
    curve = interpolate.CubicHermiteSpline(theta, total / total[-1], f / total[-1])
    return lambda t: curve(np.minimum(t, end))


def von_mises_fisher_cdf(d, kappa):
    """∝ ∫ e^{κ(cos θ − 1)} sin^{d−2}θ dθ."""

    def weight(theta):
        return np.exp(-2 * kappa * np.sin(theta / 2) ** 2) * np.sin(theta) ** (d - 2)

    return tabulated(weight, min(math.pi, 14 / math.sqrt(kappa)) if kappa else math.pi)


def wrapped_normal_cdf(d, sigma):
    """|σg| is σ times a chi variable with d − 1 degrees of freedom, folded into [0, π]."""

    def cdf(theta):
        chi, turns = stats.chi(d - 1), 2 * np.pi * np.arange(1, 12)[:, None]
        flat = np.ravel(theta)
        images = chi.cdf((turns + flat) / sigma) - chi.cdf((turns - flat) / sigma)
        return (chi.cdf(flat / sigma) + images.sum(0)).reshape(np.shape(theta))

    return cdf


def heat_kernel_cdf(d, s):
    """d = 2: the wrapped normal law of variance 2s. d = 3: Σ e^{−l(l+1)s} times
    ∫ (2l+1)/2 P_l = (P_{l−1} − P_{l+1})/2. d = 4: the images of Poisson's summation,
    p = e^s (4πs)^{−3/2} Σ_k (θ + 2πk)/sin θ e^{−(θ + 2πk)²/4s}."""
    if d == 2:
        return wrapped_normal_cdf(2, math.sqrt(2 * s))
    if d == 3:
        l = np.arange(1, 2 + math.ceil(math.sqrt(40 / s)))[:, None]

        def legendre(theta):
            q = np.cos(np.ravel(theta))
            P = scipy_special.eval_legendre
            terms = np.exp(-l * (l + 1) * s) * (P(l - 1, q) - P(l + 1, q)) / 2
            return ((1 - q) / 2 + terms.sum(0)).reshape(np.shape(theta))

        return legendre
    return tabulated(lambda t: 4 * np.pi * np.sin(t) ** 2 * heat_on_s3(t, s), math.pi)


def heat_on_s3(theta, s):
    """The heat kernel of S³ by images; at θ = 0 and π the limit is not taken."""
    image = np.asarray(theta)[..., None] + 2 * np.pi * np.arange(-9, 10)
    sine = np.maximum(np.sin(theta), 1e-300)
    total = np.sum(image * np.exp(-(image**2) / (4 * s)), -1) / sine
    return math.exp(s) * (4 * math.pi * s) ** -1.5 * total


ZONAL = [
    *[
        pytest.param(
            VonMisesFisher, von_mises_fisher_cdf, d, kappa, id=f"vmf-{d}-{kappa:g}"
        )
        for d in (2, 3, 5)
        for kappa in KAPPAS
    ],
    *[
        pytest.param(
            WrappedNormal, wrapped_normal_cdf, d, sigma, id=f"wrapped-{d}-{sigma}"
        )
        for d in (2, 3, 5)
        for sigma in (0.05, 2.0)
    ],
    *[
        pytest.param(HeatKernel, heat_kernel_cdf, d, s, id=f"heat-{d}-{s}")
        for d in (2, 3, 4)
        for s in (5e-3, 0.3)
    ],
]


def zonal_moments(cdf):
    """E cos θ and E cos²θ by parts: 1 − ∫ (1 − F) sin θ, 1 − ∫ (1 − F) sin 2θ."""
    theta = np.linspace(0, math.pi, 20_001)
    rest = 1 - cdf(theta)
    return tuple(1 - integrate.simpson(rest * np.sin(j * theta), x=theta) for j in (1, 2))


def assert_moments(x, mean, second):
    """The empirical E x and E xxᵀ lie within five standard errors of `mean`, `second`
    (plus the rounding of the samples)."""
    x = np.asarray(x, float)
    products = x[:, :, None] * x[:, None, :]
    for values, exact in ((x, mean), (products, second)):
        error = np.abs(values.mean(0) - exact)
        assert np.all(error <= 5 * values.std(0) / math.sqrt(len(x)) + 1e-7)


@pytest.mark.parametrize(("law", "cdf", "d", "parameter"), ZONAL)
def test_samples_follow_the_law(law, cdf, d, parameter):
    """The angle of N samples passes Kolmogorov's test against the exact distribution, and
    E x = E cos θ · m, E xxᵀ = a mmᵀ + (1 − a)/(d − 1)(I − mmᵀ) with a = E cos²θ."""
    m, cdf = mean_of(d), cdf(d, parameter)
    x = sample(law(m, parameter), jr.key(7))
    assert x.shape == (N, d)
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, rtol=4 * EPS)
    assert stats.kstest(angle_to(m, x), cdf).pvalue > 1e-3
    cosine, square = zonal_moments(cdf)
    mm = np.outer(m, m)
    assert_moments(x, cosine * m, square * mm + (1 - square) / (d - 1) * (np.eye(d) - mm))


@pytest.mark.parametrize(
    "law",
    [
        VonMisesFisher(mean_of(5).astype(np.float32), 1e4),
        WrappedNormal(mean_of(2).astype(np.float32), 0.5),
        HeatKernel(mean_of(3).astype(np.float32), 0.1),
    ],
    ids=lambda law: type(law).__name__,
)
def test_float32_laws_give_float32_samples_of_the_same_law(law):
    """The dtype is that of the mean; Kolmogorov's test passes as in float64."""
    x = law.sample(jr.key(1), N)
    assert (
        x.dtype == law.density(x[:3]).dtype == law.nodes(50).points.dtype == jnp.float32
    )
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, rtol=3e-7)
    cdf = {
        VonMisesFisher: lambda: von_mises_fisher_cdf(law.d, float(law.kappa)),
        WrappedNormal: lambda: wrapped_normal_cdf(2, 0.5),
        HeatKernel: lambda: heat_kernel_cdf(3, 0.1),
    }[type(law)]()
    assert stats.kstest(angle_to(law.mean, x), cdf).pvalue > 1e-3


@pytest.mark.parametrize(
    ("law", "tol"),
    [
        *[(VonMisesFisher(mean_of(d), k), 2e-11) for d in (2, 3, 5) for k in (0, 1e6)],
        (WrappedNormal(mean_of(3), 0.05), 2e-11),
        (WrappedNormal(mean_of(5), 0.5), 2e-11),
        (HeatKernel(mean_of(3), 0.02), 2e-11),
        (HeatKernel(mean_of(4), 0.02), 2e-11),
    ],
    ids=lambda v: f"{type(v).__name__}-{v.d}" if hasattr(v, "d") else "",
)
def test_angle_quantiles_invert_the_distribution_function(law, tol):
    """F(angle_quantile(p)) = p to about 1e−12 in probability, F by adaptive quadrature or
    in closed form."""
    p = np.array([1e-9, 1e-4, 0.1, 0.37, 0.5, 0.9, 1 - 1e-6])
    theta = np.asarray(quantile(law, jnp.asarray(p)))
    assert np.all(np.diff(theta) > 0)
    d = law.d
    if isinstance(law, VonMisesFisher):
        kappa = float(law.kappa)

        def weight(t):
            return math.exp(-2 * kappa * math.sin(t / 2) ** 2) * math.sin(t) ** (d - 2)

        def mass(a, b):
            return integrate.quad(weight, a, b, epsabs=0, epsrel=1e-13, limit=200)[0]

        last = theta[-1]
        edges = [0, *theta, last + 0.1 * (math.pi - last), math.pi]
        pieces = np.cumsum([mass(a, b) for a, b in itertools.pairwise(edges)])
        computed = np.interp(theta, edges[1:], pieces) / pieces[-1]
    elif isinstance(law, WrappedNormal):
        computed = wrapped_normal_cdf(d, float(law.sigma))(theta)
    else:
        computed = heat_kernel_cdf(d, float(law.s))(theta)
    np.testing.assert_allclose(computed, p, rtol=0, atol=tol)


# --------------------------------------------------------------------- densities


@pytest.mark.parametrize(
    ("law", "scale"),
    [
        (VonMisesFisher(mean_of(5), 0.0), 1.0),
        *[(VonMisesFisher(mean_of(d), k), k**-0.5) for d in (2, 9) for k in (1, 1e6)],
        *[
            (WrappedNormal(mean_of(d), s), min(s, 1))
            for d in (2, 3, 5)
            for s in (0.05, 1)
        ],
        *[(HeatKernel(mean_of(d), s), s**0.5) for d in (3, 6) for s in (1e-3, 0.1, 2)],
    ],
    ids=lambda v: f"{type(v).__name__}-{v.d}" if hasattr(v, "d") else f"{v:.3g}",
)
def test_densities_integrate_to_one(law, scale):
    """∫ p dσ = 1 over the sphere."""
    total = zonal_integral(lambda t: along(law, t), law.d, scale)
    np.testing.assert_allclose(total, 1, rtol=1e-11)


@pytest.mark.parametrize("d", [2, 3, 5])
@pytest.mark.parametrize("kappa", KAPPAS)
def test_von_mises_fisher_density_has_the_bessel_normaliser(d, kappa):
    """log p = κ⟨m, x⟩ − log((2π)^{d/2} κ^{1−d/2} I_{d/2−1}(κ)), by mpmath with 40 digits; a
    rounding of the unit vectors enters times κ."""
    m = mean_of(d)
    x = random_tokens(np.random.default_rng(11), 5, d)
    exact = []
    with mpmath.workdps(40):
        k, nu = mpmath.mpf(kappa), mpmath.mpf(d) / 2 - 1
        small = 1 / (2**nu * mpmath.gamma(nu + 1))  # the limit of I_ν(κ)/κ^ν
        bessel = mpmath.besseli(nu, k) / k**nu if kappa else small
        for row in x:
            a, b = [[mpmath.mpf(float(c)) for c in v] for v in (row, m)]
            q = mpmath.fdot(a, b) / (mpmath.norm(a) * mpmath.norm(b))
            exact.append(float(k * q - mpmath.log((2 * mpmath.pi) ** (nu + 1) * bessel)))
    value = log_density(VonMisesFisher(m, kappa), jnp.asarray(x))
    np.testing.assert_allclose(value, exact, rtol=1e-14, atol=50 * EPS + 4 * EPS * kappa)


@pytest.mark.parametrize("d", [3, 5])
@pytest.mark.parametrize("sigma", [0.1, 1.0, 2.5])
def test_wrapped_normal_density_is_the_folded_chi_density(d, sigma):
    """p(θ) |S^{d−2}| sin^{d−2}θ is the density of σ·chi_{d−1} summed over its images."""
    theta = np.array([0.05, 0.4, 1.3, 3.0])
    turns = 2 * np.pi * np.arange(0, 15)[:, None]
    pdf = stats.chi(d - 1).pdf
    folded = (pdf((turns + theta) / sigma) + pdf((turns - theta) / sigma)).sum(0) / sigma
    exact = folded / (sphere_area(d - 1) * np.sin(theta) ** (d - 2))
    # An exponent r²/2σ² of size up to 450 keeps its rounding.
    np.testing.assert_allclose(
        along(WrappedNormal(mean_of(d), sigma), theta), exact, rtol=2e-13, atol=1e-300
    )


@pytest.mark.parametrize("variance", [1e-4, 0.1, 1.0, 1.999, 2.0, 10.0, 100.0])
def test_log_of_the_wrapped_normal_density_is_exact_in_the_far_tail(variance):
    """log Σ_k (2πv)^{−1/2} e^{−(θ+2πk)²/2v} with 60 digits, at angles up to π, where the
    density may be e^{−50000}, and beyond π, where it repeats."""
    theta = np.array([0.0, 1e-3, 0.5, 2.0, 3.1, math.pi])
    exact = []
    with mpmath.workdps(60):
        v = mpmath.mpf(variance)
        for t in theta:
            images = [
                mpmath.exp(-((mpmath.mpf(t) + 2 * mpmath.pi * k) ** 2) / (2 * v))
                for k in range(-40, 41)
            ]
            exact.append(float(mpmath.log(sum(images) / mpmath.sqrt(2 * mpmath.pi * v))))
    value = log_wrapped_normal(jnp.asarray(theta), variance)
    np.testing.assert_allclose(value, exact, rtol=8 * EPS, atol=8 * EPS)
    again = log_wrapped_normal(jnp.asarray(2 * math.pi - theta), variance)
    # θ + 2π is rounded: 4 EPS in θ, times the slope θ/v
    np.testing.assert_allclose(
        again, exact, rtol=8 * EPS, atol=8 * EPS + 16 * EPS / variance
    )


def test_heat_on_the_circle_is_the_wrapped_normal_law():
    """d = 2: heat time s is variance 2s; same density, and same angles of the same mass."""
    m, s = mean_of(2), 0.3
    heat, normal = HeatKernel(m, s), WrappedNormal(m, math.sqrt(2 * s))
    theta = np.linspace(0, math.pi, 9)
    for f in (density, log_density):
        np.testing.assert_allclose(
            along(heat, theta, f), along(normal, theta, f), rtol=1e-14
        )
    p = jnp.linspace(0.1, 0.9, 5)
    a, b = quantile(heat, p), quantile(normal, p)
    np.testing.assert_allclose(a, b, rtol=1e-14)


@pytest.mark.parametrize("s", [1e-3, 0.05, 1.0])
def test_heat_kernel_density_agrees_with_independent_forms(s):
    """d = 3: Σ (2l+1)/4π e^{−l(l+1)s} P_l with SciPy's Legendre polynomials; d = 4: the
    images on S³. Absolute error ≤ 1e−13 of the peak."""
    theta = np.array([1e-3, 0.05, 0.2, 1.0, 2.5])
    l = np.arange(2 + math.ceil(math.sqrt(40 / s)))[:, None]
    P = scipy_special.eval_legendre(l, np.cos(theta))
    legendre = np.sum((2 * l + 1) / (4 * np.pi) * np.exp(-l * (l + 1) * s) * P, 0)
    for d, exact in ((3, legendre), (4, heat_on_s3(theta, s))):
        value = along(HeatKernel(mean_of(d), s), theta)
        np.testing.assert_allclose(value, exact, rtol=1e-12, atol=1e-13 * exact[0])
        sure = exact > 1e-9 * exact[0]
        logs = along(HeatKernel(mean_of(d), s), theta[sure], log_density)
        error = np.abs(logs - np.log(exact[sure])) * exact[sure] / exact[0]
        assert error.max() <= 1e-12


@pytest.mark.parametrize("d", [2, 3, 4, 8])
@pytest.mark.parametrize("s", [1e-2, 0.2])
def test_heat_decays_by_the_eigenvalues(d, s):
    """E⟨m, x⟩ = e^{−(d−1)s} and E P_2(⟨m, x⟩) = e^{−2ds}, P_2 = (d q² − 1)/(d − 1): for the
    density, and for the samples within five standard errors."""
    law = HeatKernel(mean_of(d), s)
    x = sample(law, jr.key(3))
    harmonics = {
        -(d - 1) * s: lambda q: q,
        -2 * d * s: lambda q: (d * q * q - 1) / (d - 1),
    }
    for exponent, f in harmonics.items():
        value = zonal_integral(
            lambda t, f=f: f(np.cos(t)) * along(law, t), d, math.sqrt(2 * s)
        )
        np.testing.assert_allclose(value, math.exp(exponent), rtol=1e-11)
        sampled = f(np.asarray(x) @ np.asarray(law.mean))
        error = abs(sampled.mean() - math.exp(exponent))
        assert error <= 5 * sampled.std() / math.sqrt(N)


def test_lost_logarithms_of_heat_are_refused():
    """For d ≥ 3 the series cannot give the logarithm of a density below its rounding: an
    error says so, at once or at run time, while `density` stays near 0."""
    law = HeatKernel(mean_of(3), 1e-3)
    x = jnp.asarray(at_angle(law.mean, [0.1, 3.0]))
    assert 0 <= float(law.density(x)[1]) <= 1e-13 * float(law.density(law.mean))
    with pytest.raises(
        ValueError, match=r"`x` must lie where the density .* Use `density`"
    ):
        law.log_density(x)
    with pytest.raises(eqx.EquinoxRuntimeError, match="its log-density is lost"):
        jax.block_until_ready(eqx.filter_jit(lambda x: law.log_density(x))(x))


def test_float32_heat_in_many_dimensions_is_that_of_float64():
    """The peak in d = 33, where a degree has up to 1e39 harmonics; exponents of size 100
    leave 100 roundings."""
    m = np.eye(33)[0]
    single, double = (
        float(density(HeatKernel(m.astype(dtype), 1e-3), jnp.asarray(m, dtype)))
        for dtype in (np.float32, np.float64)
    )
    np.testing.assert_allclose(single, double, rtol=100 * np.finfo(np.float32).eps)


@pytest.mark.parametrize(
    ("d", "s", "dtype"),
    [(24, 1e-4, np.float64), (33, 1e-3, np.float64), (8, 1e-4, np.float32)],
)
def test_narrow_heat_kernels_in_many_dimensions_decay_by_the_eigenvalue(d, s, dtype):
    """1 − E⟨m, x⟩ = 1 − e^{−(d−1)s} for the quantiles of the angle; 4000 mid-quantiles cut
    off a relative 1e−4 of it."""
    law = HeatKernel(np.eye(d, dtype=dtype)[0], s)
    p = jnp.asarray((np.arange(4000) + 0.5) / 4000, dtype)
    gap = np.mean(1 - np.cos(np.asarray(quantile(law, p), float)))
    np.testing.assert_allclose(gap, -math.expm1(-(d - 1) * s), rtol=1e-3)


# ------------------------------------------------------------------- the uniform law


@pytest.mark.parametrize("d", [2, 3, 4, 7])
def test_uniform_samples_are_uniform(d):
    """(1 + x₁)/2 is Beta((d−1)/2, (d−1)/2), E x = 0 and E xxᵀ = I/d; density 1/|S^{d−1}|."""
    law = Uniform(d)
    x = sample(law, jr.key(0))
    half = (d - 1) / 2
    beta = stats.beta(half, half)
    for column in range(d):
        q = (1 + np.asarray(x[:, column])) / 2
        assert stats.kstest(q, beta.cdf).pvalue > 1e-4
    assert_moments(x, np.zeros(d), np.eye(d) / d)
    np.testing.assert_allclose(law.density(x[:2]), 1 / sphere_area(d), rtol=8 * EPS)


@pytest.mark.parametrize(("d", "m"), [(2, 4), (3, 4), (4, 3), (5, 3)])
def test_uniform_nodes_integrate_polynomials_of_degree_2m_minus_1(d, m):
    """Each monomial x^a of degree ≤ 2m − 1 at 2 m^{d−1} nodes: E x^a = 0 if some exponent
    is odd, else Γ(d/2) Π Γ((aᵢ+1)/2)/(π^{d/2} Γ((|a| + d)/2))."""
    nodes = Uniform(d).nodes(2 * m ** (d - 1))
    assert nodes.n == 2 * m ** (d - 1)
    x = np.asarray(nodes.points)
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, rtol=4 * EPS)
    for power in np.ndindex(*(2 * m,) * d):
        if sum(power) > 2 * m - 1:
            continue
        exact = 0.0
        if not any(a % 2 for a in power):
            logs = [math.lgamma((a + 1) / 2) for a in power]
            logs += [math.lgamma(d / 2), -math.lgamma((sum(power) + d) / 2)]
            exact = math.exp(sum(logs)) / math.pi ** (d / 2)
        value = float(nodes.mean(jnp.asarray(np.prod(x ** np.array(power), axis=1))))
        assert abs(value - exact) <= 100 * EPS


def test_uniform_law_has_the_dtype_asked_for():
    """Float32 samples and nodes on request, float64 (jax's default here) otherwise."""
    for dtype in (jnp.float32, jnp.float64):
        law = Uniform(3, dtype)
        assert law.sample(jr.key(0), 4).dtype == law.nodes(8).points.dtype == dtype
    assert Uniform(3).sample(jr.key(0), 4).dtype == jnp.float64


# ------------------------------------------------------------------- nodes


@pytest.mark.parametrize(
    ("law", "cosine"),
    [
        (
            VonMisesFisher(mean_of(2), 4.0),
            scipy_special.ive(1, 4) / scipy_special.ive(0, 4),
        ),
        (VonMisesFisher(mean_of(3), 4.0), 1 / math.tanh(4) - 1 / 4),
        (WrappedNormal(mean_of(2), 0.7), math.exp(-(0.7**2) / 2)),
        (HeatKernel(mean_of(3), 0.2), math.exp(-2 * 0.2)),
        (HeatKernel(mean_of(4), 0.2), math.exp(-3 * 0.2)),
    ],
    ids=lambda v: f"{type(v).__name__}-{v.d}" if hasattr(v, "d") else "",
)
def test_nodes_of_zonal_laws_converge_to_the_mean(law, cosine):
    """Σ wᵢxᵢ → E⟨m, x⟩ m: exactly along m in direction, and with order 1/n² or so for m
    mid-quantiles. Weights sum to 1."""
    errors = []
    for n in (200, 1800):
        nodes = nodes_of(law, n)
        assert 0.5 * n <= nodes.n <= 2 * n
        np.testing.assert_allclose(float(jnp.sum(nodes.weights)), 1, rtol=1e-13)
        mean = np.asarray(nodes.mean(nodes.points))
        m = np.asarray(law.mean)
        np.testing.assert_allclose(mean - (mean @ m) * m, 0, atol=1e-14)
        errors.append(abs(mean @ m - cosine))
    assert errors[1] <= 5e-3
    assert errors[1] <= 0.5 * errors[0] + 1e-14


# ------------------------------------------------------------------- composed laws


def test_mixtures_mix_densities_nodes_and_moments():
    """p = Σ αⱼpⱼ, E f = Σ αⱼEⱼf for samples and nodes, weights up to a factor."""
    m = mean_of(3)
    parts = (VonMisesFisher(m, 5.0), Uniform(3))
    law = Mixture(parts, np.array([6.0, 2.0]))
    np.testing.assert_allclose(law.weights, [0.75, 0.25], rtol=2 * EPS)
    x = jnp.asarray(at_angle(m, [0.1, 0.3, 2.7]))
    exact = 0.75 * np.asarray(density(parts[0], x)) + 0.25 / sphere_area(3)
    np.testing.assert_allclose(density(law, x), exact, rtol=8 * EPS)
    np.testing.assert_allclose(log_density(law, x), np.log(exact), atol=16 * EPS)
    A = 1 / math.tanh(5) - 1 / 5
    square = 0.75 * (1 - 2 * A / 5) + 0.25 / 3  # E q² = 1 − (d − 1)A/κ
    mm = np.outer(m, m)
    second = square * mm + (1 - square) / 2 * (np.eye(3) - mm)
    assert_moments(sample(law, jr.key(2)), 0.75 * A * m, second)
    nodes = law.nodes(4000)
    np.testing.assert_allclose(float(jnp.sum(nodes.weights)), 1, rtol=1e-13)
    np.testing.assert_allclose(nodes.mean(nodes.points), 0.75 * A * m, atol=1e-3)


def test_mixtures_have_a_logarithm_where_one_component_has_none():
    """Far from a narrow heat kernel the other component alone decides log p."""
    m = mean_of(3)
    law = Mixture([HeatKernel(m, 1e-3), Uniform(3)])
    x = jnp.asarray(at_angle(m, [3.0]))
    np.testing.assert_allclose(law.log_density(x), -math.log(8 * math.pi), rtol=1e-12)


def test_a_component_of_weight_zero_does_not_count():
    """Same density as without it, no node and no sample of it."""
    m = mean_of(2)
    law = Mixture([WrappedNormal(m, 1e-3), WrappedNormal(-m, 1e-3)], np.array([1.0, 0.0]))
    x = jnp.asarray(at_angle(m, [0.0, 1e-3]))
    alone = log_density(law.components[0], x)
    np.testing.assert_allclose(log_density(law, x), alone, rtol=4 * EPS)
    for points in (law.nodes(100).points, sample(law, jr.key(0), 500)):
        assert float(jnp.min(points @ m)) > 0.99


def test_mixtures_refuse_what_does_not_fit():
    """No law, laws on different spheres, weights of the wrong number or sign."""
    with pytest.raises(ValueError, match="`components` must hold at least one law"):
        Mixture([])
    with pytest.raises(ValueError, match=r"one sphere, but they have d = \[2, 3\]"):
        Mixture([Uniform(2), Uniform(3)])
    with pytest.raises(ValueError, match=r"`weights` must have shape \(2,\)"):
        Mixture([Uniform(2), Uniform(2)], np.ones(3))
    with pytest.raises(
        ValueError, match=r"`weights` must be finite and ≥ 0, but entry 1"
    ):
        Mixture([Uniform(2), Uniform(2)], np.array([1.0, -1.0]))


def test_azimuth_and_elevation_have_density_one_in_their_coordinates():
    """∫∫ p cos ψ dψ dθ = 1, p cos ψ = g(θ)/π; the density at a pole is infinite or huge,
    not NaN."""
    ring = WrappedNormal(mean_of(2), 0.7)
    law = AzimuthElevation(ring)
    psi = np.linspace(-1.5, 1.5, 7)[:, None]
    theta = 2 * np.pi * np.arange(64) / 64  # the trapezoidal rule: exact to rounding
    flat = np.stack([np.cos(theta), np.sin(theta)], -1)
    x = np.concatenate(
        [
            np.cos(psi)[..., None] * flat,
            np.broadcast_to(np.sin(psi)[..., None], (7, 64, 1)),
        ],
        -1,
    )
    p = np.asarray(density(law, jnp.asarray(x))) * np.cos(psi)
    np.testing.assert_allclose(p.mean(1) * 2 * np.pi * np.pi, 1, rtol=1e-13)
    g = np.asarray(density(ring, jnp.asarray(flat)))
    np.testing.assert_allclose(p, np.broadcast_to(g / np.pi, p.shape), rtol=1e-13)
    assert float(log_density(law, jnp.array([0.0, 0.0, 1.0]))) > 100


def test_azimuth_and_elevation_samples_have_product_moments():
    """E x = (2/π)(E cos θ, E sin θ, 0)ᵀ-wise, E xxᵀ = ½ diag(E uuᵀ, 1) for u on the ring;
    the elevation is uniform. The nodes agree."""
    m = mean_of(2)
    law = AzimuthElevation(WrappedNormal(m, 0.7))
    A = math.exp(-(0.7**2) / 2)
    square = (1 + A**4) / 2  # E cos²θ = (1 + E cos 2θ)/2
    mm = np.outer(m, m)
    second = np.zeros((3, 3))
    second[:2, :2] = (square * mm + (1 - square) * (np.eye(2) - mm)) / 2
    second[2, 2] = 0.5
    mean = np.append(2 / math.pi * A * m, 0)
    x = sample(law, jr.key(4))
    assert_moments(x, mean, second)
    assert (
        stats.kstest(np.arcsin(np.asarray(x[:, 2])) / math.pi + 0.5, "uniform").pvalue
        > 1e-3
    )
    nodes = nodes_of(law, 5000)
    np.testing.assert_allclose(nodes.mean(nodes.points), mean, atol=1e-3)
    outer = nodes.points[:, :, None] * nodes.points[:, None, :]
    np.testing.assert_allclose(nodes.mean(outer), second, atol=1e-3)
    with pytest.raises(ValueError, match=r"`azimuth` must be a law on S¹ .* d = 3"):
        AzimuthElevation(Uniform(3))


# ------------------------------------------------------- keys, transformations, slopes

ALL = [
    Uniform(3),
    VonMisesFisher(mean_of(2), 3.0),
    WrappedNormal(mean_of(3), 0.4),
    HeatKernel(mean_of(3), 0.1),
    Mixture([WrappedNormal(mean_of(2), 0.2), Uniform(2)]),
    AzimuthElevation(WrappedNormal(mean_of(2), 0.3)),
]


@pytest.mark.parametrize("law", ALL, ids=lambda law: f"{type(law).__name__}-{law.d}")
def test_the_key_decides_the_sample(law):
    """Same key, same bits; another key, other tokens; vmap over keys is the loop."""
    keys = jr.split(jr.key(5), 2)
    x, y = (np.asarray(sample(law, key, 16)) for key in keys)
    np.testing.assert_array_equal(sample(law, keys[0], 16), x)
    assert np.linalg.norm(x - y, axis=1).min() > 1e-6
    batch = jax.jit(jax.vmap(lambda key: law.sample(key, 16)))(keys)
    np.testing.assert_allclose(batch, [x, y], atol=1e-12)
    with pytest.raises(ValueError, match="`n` must be an integer ≥ 1, but is 0"):
        law.sample(keys[0], 0)


@pytest.mark.parametrize(
    "law",
    [law for law in ALL if not isinstance(law, VonMisesFisher)],
    ids=lambda law: f"{type(law).__name__}-{law.d}",
)
def test_log_density_acts_on_the_last_axis(law):
    """Points, batches and vmap give the same numbers."""
    x = sample(law, jr.key(5), 4)
    logs = np.asarray(log_density(law, x))
    assert logs.shape == (4,)
    np.testing.assert_allclose(log_density(law, x[1]), logs[1], atol=1e-12)
    mapped = jax.jit(jax.vmap(lambda row: law.log_density(row)))(x)
    np.testing.assert_allclose(mapped, logs, atol=1e-12)


def test_jit_changes_samples_by_roundings_only():
    """The same key with and without jit."""
    law = WrappedNormal(mean_of(3), 0.4)
    x = law.sample(jr.key(5), 16)
    np.testing.assert_allclose(sample(law, jr.key(5), 16), x, atol=8 * EPS)


PARAMETERS = [
    *[(VonMisesFisher, d, k) for d, k in ((2, 0.5), (5, 30.0))],
    *[(WrappedNormal, d, s) for d, s in ((2, 0.4), (3, 1.2))],
    *[(HeatKernel, d, s) for d, s in ((2, 0.7), (3, 0.1))],
]


@pytest.mark.parametrize(("law", "d", "parameter"), PARAMETERS)
def test_log_density_has_the_slope_of_central_differences(law, d, parameter):
    """∂ log p/∂(κ, σ or s), with the law built under jit, vmap and jacobian; differences of
    fourth order with relative steps 1e−3 leave 1e−10 or so of rounding and remainder."""
    m = mean_of(d)
    x = jnp.asarray(at_angle(m, [0.2, 0.6, 1.2]))

    def logs(value):
        return law(m, value).log_density(x)

    slope = jax.jit(jax.vmap(jax.jacfwd(logs)))(jnp.array([parameter]))[0]
    exact = central_difference(
        lambda value: log_density(law(m, value), x), parameter, 1e-3 * parameter
    )
    np.testing.assert_allclose(slope, exact, rtol=1e-8, atol=1e-9 / parameter)


def test_slope_of_log_density_at_kappa_zero_is_the_centred_cosine():
    """∂/∂κ (κq − log mean e^{κq}) = q − A_d(κ) = q at κ = 0."""
    m, theta = mean_of(3), np.array([0.0, 1.0, 3.0])
    x = jnp.asarray(at_angle(m, theta))
    slope = jax.jit(jax.jacfwd(lambda k: VonMisesFisher(m, k).log_density(x)))(0.0)
    np.testing.assert_allclose(slope, np.cos(theta), atol=8 * EPS)


@pytest.mark.parametrize(
    ("law", "d", "parameter"),
    [
        (VonMisesFisher, 3, 3.0),
        (WrappedNormal, 2, 0.5),
        (HeatKernel, 2, 0.5),
        (VonMisesFisher, 3, 0.0),
        (VonMisesFisher, 2, 0.5),
        (VonMisesFisher, 2, 50.0),
        (VonMisesFisher, 5, 4.0),
        (WrappedNormal, 3, 0.5),
        (HeatKernel, 3, 0.1),
    ],
)
def test_quantiles_move_with_the_parameter_as_central_differences_say(law, d, parameter):
    """∂ angle_quantile(p)/∂(κ, σ or s): by it a sample is differentiable in its law."""
    m, p = mean_of(d), jnp.array([0.05, 0.3, 0.6, 0.95])

    def moved(value):
        return quantile(law(m, value), p)

    slope = jax.jacfwd(lambda value: law(m, value).angle_quantile(p))(parameter)
    if parameter:
        exact = central_difference(moved, parameter, 2e-3 * parameter)
    else:  # d = 3: 1 − q = 2p − 2p(1−p)κ + O(κ²)
        q, level = np.cos(np.asarray(moved(0.0))), np.asarray(p)
        exact = -2 * level * (1 - level) / np.sqrt(1 - q**2)
    np.testing.assert_allclose(slope, exact, rtol=1e-6)


# ------------------------------------------------------------------- weighted tokens


def test_empirical_measures_average():
    """Σ wⱼ f(yⱼ) with weights of sum 1, equal by default, in the dtype of the points."""
    x = random_tokens(np.random.default_rng(0), 4, 3)
    equal = Empirical(x)
    assert (equal.n, equal.d) == (4, 3)
    np.testing.assert_array_equal(equal.weights, np.full(4, 0.25))
    weighted = Empirical(x, np.array([1.0, 0.0, 2.0, 1.0]))
    np.testing.assert_array_equal(weighted.weights, [0.25, 0, 0.5, 0.25])
    exact = 0.25 * x[0] + 0.5 * x[2] + 0.25 * x[3]
    np.testing.assert_allclose(weighted.mean(jnp.asarray(x)), exact, atol=4 * EPS)
    assert weighted.mean(jnp.asarray(x[:, 0])).shape == ()
    single = Empirical(x.astype(np.float32), np.ones(4))
    assert single.weights.dtype == single.points.dtype == jnp.float32


@given(
    st.lists(st.floats(0, 1e6).map(lambda w: round(w, 3)), min_size=5, max_size=5),
    st.floats(-30, 30),
)
def test_weights_count_up_to_a_factor(weights, exponent):
    """Empirical(x, c·w) = Empirical(x, w) for c > 0, and Σw = 1."""
    x = random_tokens(np.random.default_rng(1), 5, 2)
    w = np.array(weights)
    if w.sum() == 0:
        with pytest.raises(ValueError, match="`weights` must have a positive finite sum"):
            Empirical(x, w)
        return
    once, scaled = (np.asarray(Empirical(x, c * w).weights) for c in (1, 10**exponent))
    np.testing.assert_allclose(scaled, once, rtol=16 * EPS)
    np.testing.assert_allclose(once.sum(), 1, rtol=8 * EPS)
    np.testing.assert_array_equal(once == 0, w == 0)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.ones(3), r"must have shape \(2,\), one weight each, but has shape \(3,\)"),
        (np.ones((2, 1)), r"must have shape \(2,\).*but has shape \(2, 1\)"),
        (np.array([1.0, -0.5]), "must be finite and ≥ 0, but entry 1 is -0.5"),
        (np.array([np.nan, 1.0]), "must be finite and ≥ 0, but entry 0 is nan"),
        (np.array([1.0, np.inf]), "must be finite and ≥ 0, but entry 1 is inf"),
        (
            np.zeros(2),
            "must have a positive finite sum, but it is 0.0. Leave it out for equal",
        ),
        (np.array([1.7e308, 1.7e308]), "must have a positive finite sum, but it is inf"),
        (np.array([1, 1j]), "must be real, but is complex128"),
    ],
)
def test_bad_weights_are_refused(weights, message):
    """The argument, the rule, the entry at fault."""
    with pytest.raises(ValueError, match=f"Argument `weights` {message}"):
        Empirical(np.eye(2), weights)


def test_bad_weights_are_refused_under_jit_too():
    """Traced weights answer when the program runs."""
    build = eqx.filter_jit(lambda w: Empirical(np.eye(2), w).weights)
    np.testing.assert_array_equal(build(np.array([1.0, 3.0])), [0.25, 0.75])
    for bad in ([1.0, -1.0], [0.0, 0.0]):
        with pytest.raises(eqx.EquinoxRuntimeError, match="Argument `weights` must"):
            jax.block_until_ready(build(np.array(bad)))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Empirical(2 * np.eye(2)), "`points` must have rows of norm 1"),
        (
            lambda: VonMisesFisher(np.array([1.0, 1.0]), 1.0),
            "`mean` must have rows of norm",
        ),
        (lambda: VonMisesFisher(np.eye(2), 1.0), "`mean` must be one unit vector"),
        (lambda: VonMisesFisher(np.eye(2)[0], -1.0), "`kappa` must be finite and ≥ 0"),
        (lambda: WrappedNormal(np.eye(2)[0], 0.0), "`sigma` must be finite and > 0"),
        (lambda: HeatKernel(np.eye(2)[0], 0.0), "`s` must be finite and > 0"),
        (lambda: HeatKernel(np.eye(3)[0], 1e-6), "`s` must be finite and ≥ 1e-05"),
        (lambda: Uniform(1), "`d` must be an integer ≥ 2"),
    ],
)
def test_laws_refuse_bad_parameters(build, message):
    """Each names its argument."""
    with pytest.raises(ValueError, match=f"Argument {message}"):
        build()


def test_a_mixture_of_heat_kernels_has_a_log_density_where_one_of_them_is_lost():
    """log Σ αⱼ K_s(x, mⱼ) = log of the near component: the far one is below rounding."""
    e = np.array([0.0, 0, 1])
    near = HeatKernel(e, 0.02)
    both = Mixture([near, HeatKernel(-e, 0.02)])
    expected = near.log_density(jnp.asarray(e)) - np.log(2)
    np.testing.assert_allclose(both.log_density(jnp.asarray(e)), expected, rtol=1e-12)
    with pytest.raises(ValueError, match="its log-density is lost"):
        both.log_density(jnp.array([1.0, 0, 0]))


def test_nodes_of_a_traced_mixture_are_refused():
    def f(w):
        return Mixture([Uniform(2), Uniform(2)], w).nodes(10).points

    with pytest.raises(ValueError, match=r"Make the mixture outside of `jit`"):
        jax.jit(f)(jnp.ones(2))
