"""The limits of the fields for β → ∞, against the fields themselves on quadrature nodes, the
flow of tokens, finite differences and mpmath."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

import helpers
import meanformer as mf
from meanformer.theory import diffusion_limits as limits, heat

NODES = {2: 400, 3: 6000}


def a_mixture(d):
    rng = np.random.default_rng(d)
    means = helpers.random_tokens(rng, 2, d)
    return heat.HeatMixture(means, [0.3, 0.45], [0.4, 0.6])


def tokens(law):
    """A law as nodes of a quadrature that is exact to rounding for smooth densities."""
    nodes = mf.Uniform(law.d).nodes(NODES[law.d])
    density = jax.jit(lambda x: law.density(x))(nodes.points)
    return mf.Empirical(nodes.points, nodes.weights * density)


def points(d, n=6):
    return helpers.random_tokens(np.random.default_rng(10 + d), n, d)


def size(v):
    return float(np.max(np.abs(v)))


# ------------------------------------------------------------------ SA


@pytest.mark.parametrize(("d", "sign"), [(2, 1), (3, -1)])
def test_rescaled_field_is_attention(d, sign):
    """sign·∇log(W_β*µ) = β χ_β[µ] of `SelfAttention` on nodes; with λ₁, λ₂ it is βλ₁/λ₂
    times the field, taken at βλ₁."""
    mixture, x, eye = a_mixture(d), points(d), np.eye(d)
    found = limits.rescaled_field(x, mixture, 40.0, sign)
    mu = tokens(mixture.law())
    field = mf.SelfAttention(eye, eye, sign * eye, 40.0)
    np.testing.assert_allclose(found, 40 * field.velocity(x, mu), atol=2e-12)
    field = mf.SelfAttention(eye, 4 * eye, sign * 0.7 * eye, 10.0)
    np.testing.assert_allclose(found, 40 / 0.7 * field.velocity(x, mu), atol=2e-12)


@pytest.mark.parametrize("d", [2, 3])
def test_error_of_the_limit_is_of_order_one_over_beta(d):
    """β(βχ_β − ∇log µ) → ½∇(Δµ/µ), and the rest is O(1/β): slopes −1 and −2, bounded on both
    sides, where the paper's Lemma B.1 has −½."""
    mixture, x = a_mixture(d), points(d)
    limit = limits.rescaled_field_limit(x, mixture, 1)
    correction = limits.rescaled_field_correction(x, mixture, 1)
    first, rest = [], []
    betas = [250.0, 1000.0, 4000.0]
    for beta in betas:
        error = limits.rescaled_field(x, mixture, beta, 1) - limit
        first.append(size(error))
        rest.append(size(error - correction / beta))
    np.testing.assert_allclose(np.diff(np.log(first)) / np.log(4), -1, atol=0.03)
    np.testing.assert_allclose(np.diff(np.log(rest)) / np.log(4), -2, atol=0.06)
    np.testing.assert_allclose(first[-1] * betas[-1], size(correction), rtol=0.01)


@pytest.mark.parametrize("d", [2, 3])
def test_limit_is_the_logarithmic_gradient(d):
    """∇µ/µ by finite differences of the density along great circles, for two laws, also at
    the mean of a law; forward is minus backward."""
    m = np.eye(d)[0]
    laws = [
        mf.WrappedNormal(m, 0.8),
        mf.Mixture([mf.HeatKernel(m, 0.4), mf.Uniform(d)], [0.7, 0.3]),
    ]
    x = np.concatenate([points(d, 3), m[None], -m[None]])
    e = helpers.random_tokens(np.random.default_rng(1), len(x), d)
    e = np.asarray(mf.sphere.normalise(mf.sphere.project(jnp.asarray(x), jnp.asarray(e))))
    for law in laws:

        @jax.jit
        def along(h, law=law):
            return law.density(jnp.cos(h) * x + jnp.sin(h) * e)

        slope = helpers.central_difference(along, 0.0, 1e-3)
        found = limits.rescaled_field_limit(x, law, 1)
        np.testing.assert_allclose(
            np.sum(found * e, 1), slope / along(0.0), rtol=1e-8, atol=1e-9
        )
        np.testing.assert_array_equal(found, -limits.rescaled_field_limit(x, law, -1))


def test_prefactor_is_the_mean_resultant():
    """Near the uniform law, with a perturbation of degree 1, βχ_β = A_d(β)∇log µ exactly
    (Lemma B.1 before its limit), and A_d = (1 − A' − A²)β/(d−1)."""
    d = 3
    law, x = mf.VonMisesFisher(np.eye(d)[0], 1e-7), points(d)
    limit = limits.rescaled_field_limit(x, law, 1)
    for beta in (0.5, 5.0, 50.0):
        with mpmath.workdps(30):
            A = mpmath.besseli(d / 2, beta) / mpmath.besseli(d / 2 - 1, beta)
        field = limits.rescaled_field(x, law, beta, 1, degrees=8)
        np.testing.assert_allclose(field, float(A) * limit, atol=1e-6 * size(limit))


# ------------------------------------------------------------------ the residual


@pytest.mark.parametrize(("d", "sign"), [(2, 1), (3, -1)])
def test_residual_is_the_divergence_of_the_missed_flux(d, sign):
    """R_β = div(µ(βχ_β − sign·∇log µ)): derivatives of `SelfAttention` on nodes and of the
    density by autodiff, in ambient coordinates."""
    mixture, x, beta, eye = a_mixture(d), points(d), 30.0, np.eye(d)
    law = mixture.law()
    mu, field = tokens(law), mf.SelfAttention(eye, eye, sign * eye, beta)

    def flux(z):
        z = mf.sphere.normalise(z)
        slope = jax.grad(lambda y: law.density(mf.sphere.normalise(y)))(z)
        return law.density(z) * beta * field.tangent(z[None], mu)[0] - sign * slope

    divergence = jax.jit(jax.vmap(lambda z: jnp.trace(jax.jacfwd(flux)(z))))
    found = limits.heat_residual(x, mixture, beta, sign)
    np.testing.assert_allclose(found, divergence(jnp.asarray(x)), atol=1e-9)


@pytest.mark.parametrize("d", [2, 3, 8])
def test_residual_vanishes_like_one_over_beta(d):
    """R_β → 0 with slope −1, bounded on both sides, without cancellation up to β = 10⁸."""
    mixture, x = a_mixture(d), points(d)
    sizes = [b * size(limits.heat_residual(x, mixture, b, -1)) for b in (1e3, 1e4, 1e8)]
    np.testing.assert_allclose(sizes[1] / sizes[0], 1, atol=0.02)
    np.testing.assert_allclose(sizes[2] / sizes[1], 1, atol=0.002)
    assert sizes[0] > 1e-3


def test_tokens_follow_the_heat_flow_up_to_one_over_beta():
    """Prop. 3.9 with V = −I on S¹: after heat time s the first moments of the flow of nodes
    miss those of the mixture by O(1/β), slope −1 bounded on both sides."""
    angles = mf.sphere.from_angles([0.0, 2.5])
    mixture = heat.HeatMixture(angles, [0.15, 0.25], [0.6, 0.4])
    s, k = 0.1, np.arange(1, 4)

    def spectrum(points, weights):
        return np.exp(1j * k[:, None] * np.angle(points @ [1, 1j])) @ weights

    start = mixture.law().nodes(300)
    exact = spectrum(np.asarray(start.points), np.asarray(start.weights))
    exact = exact * np.exp(-(k**2) * s)
    misses = []
    for beta in (50.0, 200.0):
        field = mf.SelfAttention(np.eye(2), np.eye(2), -np.eye(2), beta)
        run = mf.solve(field, start, [0.0, s * beta], save="last")
        found = spectrum(np.asarray(run.xs[-1]), np.asarray(start.weights))
        misses.append(size(found - exact))
    slope = np.log(misses[1] / misses[0]) / np.log(4)
    assert -1.15 < slope < -0.8
    assert misses[1] < 0.02


# ------------------------------------------------------------------ laws by quadrature


def test_a_law_and_its_mixture_agree():
    """The quadrature route (any law) and the series of a `HeatMixture` are two roads."""
    mixture, x = heat.HeatMixture([[0.6, 0.8]], [0.3]), points(2)
    kernel = mf.HeatKernel([0.6, 0.8], 0.3)
    a = limits.heat_residual(x, mixture, 100.0, 1)
    b = limits.heat_residual(x, kernel, 100.0, 1, degrees=40)
    np.testing.assert_allclose(a, b, atol=1e-9)


def test_finite_beta_functions_refuse_what_they_cannot_resolve():
    law, x = mf.VonMisesFisher([1.0, 0], 5.0), points(2)
    with pytest.raises(ValueError, match="`degrees` must be given for a law"):
        limits.rescaled_field(x, law, 10.0, 1)
    with pytest.raises(ValueError, match="but 6 degrees miss"):
        limits.heat_residual([[1.0, 0]], law, 10.0, 1, degrees=6)
    with pytest.raises(ValueError, match=r"`law` must be a law .* is a Empirical"):
        limits.rescaled_field_limit(x, mf.Empirical(x), 1)
    with pytest.raises(ValueError, match="`beta` must be finite and > 0, but is 0"):
        limits.rescaled_field(x, a_mixture(2), 0.0, 1)
    narrow = heat.HeatMixture([[1.0, 0]], [0.001])
    with pytest.raises(ValueError, match="density exceeds the rounding"):
        limits.rescaled_field([[-1.0, 0]], narrow, 10.0, 1)
    with pytest.raises(ValueError, match="`degrees` must be given under `jit`"):
        jax.jit(lambda m: limits.heat_residual(x, m, 9.0, 1))(a_mixture(2))


def test_finite_beta_functions_trace():
    """Under `jit` with `degrees`; the derivative in β against a difference."""
    mixture, x = a_mixture(2), points(2)

    @jax.jit
    @jax.value_and_grad
    def f(beta):
        return jnp.sum(limits.rescaled_field(x, mixture, beta, 1, degrees=20) ** 2)

    difference = helpers.central_difference(lambda b: f(b)[0], 30.0, 1e-2)
    np.testing.assert_allclose(f(30.0)[1], difference, rtol=1e-8)


# ------------------------------------------------------------------ USA


@pytest.mark.parametrize(("d", "sign"), [(2, 1), (3, -1)])
def test_usa_tends_to_the_porous_medium_velocity(d, sign):
    """χ_USA/Z_β → sign·∇µ with slope −1, on nodes of a smooth density."""
    law, eye, x = a_mixture(d).law(), np.eye(d), points(d)
    mu = tokens(law)
    velocity = limits.porous_medium_velocity(x, law, sign)
    errors = []
    for beta in (40.0, 80.0):
        field = mf.UnnormalizedSelfAttention(eye, eye, sign * eye, beta, unit="shifted")
        shift = float(limits.log_usa_speed(beta, d)) - beta
        errors.append(size(field.velocity(x, mu) * np.exp(-shift) - velocity))
    slope = np.log2(errors[1] / errors[0])
    assert -1.1 < slope < -0.8
    assert errors[1] < 0.1 * size(velocity)


def test_usa_speed_is_the_integral():
    """Z_β = (1/β)∫e^{βq}dσ against mpmath; also where e^β overflows."""
    for d in (2, 3, 7):
        for beta in (0.1, 3.0, 2000.0):
            with mpmath.workdps(30):
                b, h = mpmath.mpf(beta), mpmath.mpf(d) / 2
                exact = (2 * mpmath.pi / b) ** h * mpmath.besseli(h - 1, b)
                exact = float(mpmath.log(exact))
            found = float(limits.log_usa_speed(beta, d))
            np.testing.assert_allclose(found, exact, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_barenblatt_solves_the_porous_medium_equation(dim):
    """∂_t u = ½ r^{1−n} ∂_r(r^{n−1} ∂_r u²) by differences, inside the front; mass by
    Gauss's rule; 0 beyond the front."""
    t, mass, h = 1.3, 0.8, 1e-3

    def u(r, t):
        return limits.barenblatt_density(r, t, mass, dim)

    r = np.array([0.1, 0.4, 0.7])
    slope = helpers.central_difference

    def flux(r):
        return r ** (dim - 1) * slope(lambda r: np.asarray(u(r, t)) ** 2, r, h)

    right = 0.5 * slope(flux, r, h) / r ** (dim - 1)
    left = slope(lambda t: u(r, t), t, h)
    np.testing.assert_allclose(left, right, rtol=1e-6, atol=1e-9)
    low, high = float(u(0.1, t)), float(u(0.0, t))
    front = 0.1 * np.sqrt(high / (high - low))  # u is a parabola in r
    shell = helpers.sphere_area(dim) if dim > 1 else 2.0
    q, w = np.polynomial.legendre.leggauss(40)
    nodes = front * (1 + q) / 2
    total = shell * front / 2 * w @ (np.asarray(u(nodes, t)) * nodes ** (dim - 1))
    np.testing.assert_allclose(total, mass, rtol=1e-12)
    assert float(u(front * 1.001, t)) == 0
    with pytest.raises(ValueError, match="`t` must be > 0"):
        u(0.1, 0.0)


def test_tokens_of_usa_spread_like_barenblatt():
    """V = −I on S¹, a narrow Barenblatt cluster: its radius grows like t^{1/3}, with the
    factor ½ of E8 (without it 1.14 times further). β = 3000."""
    beta, n = 3000.0, 400
    C = (3 / (4 * np.sqrt(6))) ** (2 / 3)  # 3·mass = 4C√(6C)
    t0 = (0.2 / np.sqrt(6 * C)) ** 3  # the radius √(6C) t^{1/3} is 0.2
    p = (np.arange(n) + 0.5) / n
    # Distribution function of 1 − (x/R)²: ¾(x − x³/3) + ½ = p.
    unit = [np.roots([-0.25, 0, 0.75, 0.5 - a]).real for a in p]
    unit = np.array([float(r[np.argmin(np.abs(r))]) for r in unit])
    x0 = mf.sphere.from_angles(0.2 * unit)
    field = mf.UnnormalizedSelfAttention(
        np.eye(2), np.eye(2), -np.eye(2), beta, unit="shifted"
    )
    speed = np.exp(float(limits.log_usa_speed(beta, 2)) - beta)
    run = mf.solve(field, x0, [0.0, t0 / speed], save="last")
    width = np.std(np.asarray(mf.sphere.angles(run.xs[-1])))
    predicted = 0.2 * 2 ** (1 / 3) / np.sqrt(5)  # variance R²/5
    # Smoothing of variance 1/β, relative to R² = 0.04: 1 %.
    np.testing.assert_allclose(width, predicted, rtol=0.01)
