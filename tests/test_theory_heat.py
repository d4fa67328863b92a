"""The heat phase against independent computations: SciPy's ODE solver and quadrature."""

import itertools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import scipy.integrate

import helpers
import meanformer as mf
from meanformer import theory
from meanformer.theory import heat


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("beta", [0.5, 50.0, 1e4])
def test_closure_variance_solves_its_equation(sign, beta):
    """ṡ = −sign·2s/(1 + βs) against SciPy, also where e^{βs} overflows."""
    s0, t = 0.2, 1.5
    out = scipy.integrate.solve_ivp(
        lambda _, s: -sign * 2 * s / (1 + beta * s), (0, t), [s0], rtol=1e-12, atol=1e-14
    )
    s = theory.closure_variance(s0, t, beta, sign)
    np.testing.assert_allclose(s, out.y[0, -1], rtol=1e-9)
    np.testing.assert_allclose(
        theory.closure_variance(s0, 0.0, beta, sign), s0, rtol=1e-12
    )


def test_closure_tends_to_heat_and_to_contraction():
    """βs ≫ 1: s₀ ∓ 2t/β up to relative O(1/βs); βs ≪ 1: s ∝ e^{∓2t}."""
    beta = 1e6
    heat = theory.heat_variance(0.04, 1e3, beta, -1)
    closure = theory.closure_variance(0.04, 1e3, beta, -1)
    np.testing.assert_allclose(closure - 0.04, heat - 0.04, rtol=2 / (beta * 0.04))
    s = theory.closure_variance(1e-9, jnp.array([0.0, 1.0]), 1.0, 1)
    np.testing.assert_allclose(s[1] / s[0], np.exp(-2), rtol=1e-8)


def test_closure_is_the_field_of_a_gaussian_cluster():
    """On S¹ a narrow wrapped normal of variance s moves with speed −θ/(1 + βs) near its
    centre when V = I: the barycentre of the field itself."""
    beta, sigma = 50.0, 0.05
    law = mf.WrappedNormal([1.0, 0.0], sigma)
    field = mf.SelfAttention(np.eye(2), np.eye(2), np.eye(2), beta)
    theta = 1e-3
    x = mf.sphere.from_angles([theta])
    v = field.velocity(x, law.nodes(4001))[0] @ jnp.array([-np.sin(theta), np.cos(theta)])
    # The circle is not the line: 1/β → (1 − σ²)/β … corrections of relative size σ².
    np.testing.assert_allclose(v / theta, -1 / (1 + beta * sigma**2), rtol=3 * sigma**2)


def test_blow_up_is_where_backward_heat_ends():
    """s₀ − 2t/β = 0 at t = βs₀/2; .2 in the paper's Figure 2."""
    t = float(theory.blow_up_time(0.04, 10.0))
    np.testing.assert_allclose(t, 0.2, rtol=1e-15)
    assert float(theory.heat_variance(0.04, 0.999 * t, 10.0, 1)) > 0
    with pytest.raises(ValueError, match="before the blow-up"):
        theory.heat_variance(0.04, 1.001 * t, 10.0, 1)
    with pytest.raises(ValueError, match=r"`sign` must be \+1 .* or −1"):
        theory.heat_variance(0.04, 0.1, 10.0, 0)


def test_mixture_mass_is_the_integral_of_its_density():
    """Bin masses against SciPy's quadrature of the density; total mass 1."""
    means, variances, weights = [0.5, 3.0, -2.0], [0.04, 0.5, 3.0], [0.2, 0.3, 0.5]
    edges = np.linspace(-np.pi, np.pi, 8)
    mass = theory.wrapped_mixture_mass(jnp.asarray(edges), means, variances, weights)

    def density(a):
        return float(
            theory.wrapped_mixture_density(jnp.array([a]), means, variances, weights)[0]
        )

    exact = [
        scipy.integrate.quad(density, a, b, epsabs=1e-12)[0]
        for a, b in itertools.pairwise(edges)
    ]
    np.testing.assert_allclose(mass, exact, atol=1e-10)
    np.testing.assert_allclose(jnp.sum(mass), 1, rtol=1e-12)


# ------------------------------------------------------------------ λ₁ and λ₂


def test_rates_rescale_beta_and_time():
    """QᵀK = λ₁I, V = ±λ₂I at (β, t) is the flow of λ₁ = λ₂ = 1 at (βλ₁, λ₂t)."""
    s0, t, beta, l1, l2 = 0.3, 0.7, 8.0, 2.5, 0.4
    for law in (heat.heat_variance, heat.closure_variance):
        for sign in (1, -1):
            np.testing.assert_allclose(
                law(s0, t, beta, sign, l1, l2), law(s0, l2 * t, beta * l1, sign)
            )
    end = heat.blow_up_time(s0, beta, l1, l2)
    np.testing.assert_allclose(l2 * end, heat.blow_up_time(s0, beta * l1))
    np.testing.assert_allclose(heat.heat_time(end, beta, l1, l2), s0 / 2)


def test_rates_are_those_of_the_field():
    """Q = 2I, K = I/2·λ₁, V = −λ₂I: near the centre of a narrow cluster of variance s the
    field is +λ₂θ/(1 + βλ₁s), and ṡ/s of the closure is twice that."""
    beta, s, l1, l2, theta = 20.0, 0.0025, 3.0, 0.7, 1e-3
    law = mf.WrappedNormal([1.0, 0.0], np.sqrt(s))
    field = mf.SelfAttention(2 * np.eye(2), l1 / 2 * np.eye(2), -l2 * np.eye(2), beta)
    x = mf.sphere.from_angles([theta])
    v = field.velocity(x, law.nodes(4001))[0] @ jnp.array([-np.sin(theta), np.cos(theta)])

    rate = jax.grad(lambda t: jnp.log(heat.closure_variance(s, t, beta, -1, l1, l2)))(0.0)
    np.testing.assert_allclose(v / theta, rate / 2, rtol=3 * s)
    np.testing.assert_allclose(rate, 2 * l2 / (1 + beta * l1 * s), rtol=1e-12)


@pytest.mark.parametrize("name", ["lambda1", "lambda2"])
def test_rates_must_be_positive(name):
    with pytest.raises(ValueError, match=f"`{name}` must be finite and > 0, but is -1"):
        heat.blow_up_time(0.1, 1.0, **{name: -1.0})


# ------------------------------------------------------------------ harmonics


@pytest.mark.parametrize("d", [2, 3, 5])
def test_multipliers_are_the_moments_of_heat_kernels(d):
    """∫P_l(⟨m,x⟩) d(e^{sΔ}δ_m) = e^{−l(l+d−2)s}, by quadrature of the density with SciPy's
    polynomials; e^{+…} undoes it; derivative in s."""
    s, l = 0.1, np.arange(6)
    mean = np.eye(d)[0]
    kernel = mf.HeatKernel(mean, s)
    density = jax.jit(lambda x: kernel.density(x))

    def moment(k):
        def f(theta):
            q = np.cos(theta)
            if d == 2:
                zonal = np.cos(k * theta)
            else:
                zonal = scipy.special.eval_gegenbauer(k, d / 2 - 1, q)
                zonal = zonal / scipy.special.eval_gegenbauer(k, d / 2 - 1, 1.0)
            return zonal * np.asarray(density(helpers.at_angle(mean, theta)))

        return helpers.zonal_integral(f, d)

    found = heat.heat_multiplier(l, s, d)
    np.testing.assert_allclose(found, [moment(k) for k in l], atol=1e-12)
    np.testing.assert_allclose(found * heat.heat_multiplier(l, -s, d), 1, rtol=1e-14)
    slope = jax.grad(lambda s: heat.heat_multiplier(3, s, d))(s)
    np.testing.assert_allclose(
        slope,
        helpers.central_difference(lambda s: heat.heat_multiplier(3, s, d), s, 1e-3),
        rtol=1e-8,
    )


def test_smoothing_multipliers_against_mpmath():
    """log(I_{l+d/2−1}/I_{d/2−1}) and its derivative in β; absolute error O(ε) per degree."""
    betas = np.array([1e-3, 0.7, 30.0, 1e4])
    l = [0, 1, 2, 7, 40]
    for d in (2, 3, 8):
        nu = mpmath.mpf(d) / 2 - 1
        values, slopes = jax.jvp(
            lambda b, d=d: heat.log_smoothing_multipliers(41, b, d),
            (jnp.asarray(betas),),
            (jnp.ones(4),),
        )
        with mpmath.workdps(40):
            for i, b in enumerate(map(mpmath.mpf, betas)):
                r = [mpmath.besseli(nu + k + 1, b) / mpmath.besseli(nu + k, b) for k in l]
                exact = [
                    mpmath.log(mpmath.besseli(nu + k, b) / mpmath.besseli(nu, b))
                    for k in l
                ]
                # (log I_ν)' = I_{ν+1}/I_ν + ν/β
                slope = [float(r[j] - r[0] + k / b) for j, k in enumerate(l)]
                np.testing.assert_allclose(
                    values[i, l], np.array(exact, float), rtol=1e-15 * 10, atol=41 * 3e-16
                )
                np.testing.assert_allclose(slopes[i, l], slope, rtol=1e-11, atol=1e-16)


def test_smoothing_is_heat_flow_of_time_one_over_two_beta():
    """log multiplier = −l(l+d−2)/(2β)·(1 + O(l²/β))."""
    l, beta = np.arange(1, 6), 1e5
    for d in (2, 3, 8):
        log = heat.log_smoothing_multipliers(6, beta, d)[1:]
        heat_log = np.log(heat.heat_multiplier(l, 1 / (2 * beta), d))
        np.testing.assert_allclose(log, heat_log, rtol=(l[-1] + d) ** 2 / beta)


def test_harmonics_refuse_what_they_cannot():
    with pytest.raises(ValueError, match="`degree` must be ≥ 0, but is -1"):
        heat.heat_multiplier(-1, 0.1, 3)
    with pytest.raises(ValueError, match=r"`beta` must be > 0, but is 0\.0"):
        heat.log_smoothing_multipliers(3, 0.0, 3)


# ------------------------------------------------------------------ mixtures

MEANS3 = np.array([[1.0, 0, 0], [0, 0.6, 0.8], [0, 0, -1]])
MIXTURE = ([0.08, 0.2, 0.05], [1.0, 2, 1])


def moments(law, degrees=4):
    """∫P_l(⟨a,x⟩)dµ for a fixed direction a and l = 0 … degrees − 1, by quadrature."""
    nodes = mf.Uniform(law.d).nodes(2 * 60 ** (law.d - 1))
    a = np.ones(law.d) / np.sqrt(law.d)
    q = np.clip(np.asarray(nodes.points) @ a, -1, 1)
    density = jax.jit(lambda x: law.density(x))(nodes.points)
    weights = np.asarray(nodes.weights * density)
    weights = weights * helpers.sphere_area(law.d)
    if law.d == 2:
        return [weights @ np.cos(l * np.arccos(q)) for l in range(degrees)]
    return [weights @ scipy.special.eval_legendre(l, q) for l in range(degrees)]


@pytest.mark.parametrize("d", [2, 3])
def test_mixture_evolves_by_the_heat_semigroup(d):
    """Moments of degree l are multiplied by e^{∓l(l+d−2)λ₂t/(βλ₁)}; mass stays 1."""
    means = mf.sphere.normalise(jnp.asarray(MEANS3[:, -d:] + 0.1))
    mixture = heat.HeatMixture(means, *MIXTURE)
    beta, t, l1, l2 = 20.0, 1.5, 3.0, 1.2
    s = l2 * t / (beta * l1)
    l = np.arange(4)
    start = np.array(moments(mixture.law()))
    np.testing.assert_allclose(start[0], 1, rtol=1e-12)
    for sign in (1, -1):
        moved = mixture.evolve(t, beta, sign, l1, l2)
        factor = np.exp(sign * l * (l + d - 2) * s)
        np.testing.assert_allclose(moments(moved.law()), factor * start, atol=1e-12)
        back = moved.evolve(t, beta, -sign, l1, l2)
        np.testing.assert_allclose(back.s, mixture.s, rtol=1e-13)


def test_mixture_refuses_times_past_its_blow_up_and_says_by_how_much():
    mixture = heat.HeatMixture(MEANS3, *MIXTURE)
    end = mixture.blow_up_time(40.0)
    np.testing.assert_allclose(end, 40 * 0.05)
    assert float(mixture.evolve(1.999, 40.0, 1).s.min()) > 0
    with pytest.raises(ValueError, match=r"before the blow-up .* but is 0\.5 past it"):
        mixture.evolve(2.5, 40.0, 1)
    with pytest.raises(ValueError, match=r"`s` must be > 0, but is \[0\.0, 1\.0\]"):
        heat.HeatMixture(MEANS3[:2], [0.0, 1.0])
    with pytest.raises(ValueError, match=r"`s` must have shape \(3\)"):
        heat.HeatMixture(MEANS3, [0.1])


def test_collapsed_components_stay_and_the_others_go_on():
    """max(s − t/β, 0) component by component; the two parts weigh 1 together."""
    mixture = heat.HeatMixture(MEANS3, *MIXTURE)
    before = heat.continue_past_collapse(mixture, 1.0, 40.0)
    np.testing.assert_allclose(before.s, mixture.evolve(1.0, 40.0, 1).s, rtol=1e-14)
    assert before.frozen is None
    assert float(before.frozen_mass) == 0

    after = jax.jit(heat.continue_past_collapse)(mixture, 4.0, 40.0)
    assert after.remaining is not None
    assert after.frozen is not None
    np.testing.assert_allclose(after.remaining.s, [0.1])
    np.testing.assert_allclose(after.remaining.means, MEANS3[1:2])
    np.testing.assert_allclose(after.frozen.points, MEANS3[[0, 2]])
    np.testing.assert_allclose(after.frozen_mass, 0.5)
    np.testing.assert_allclose(after.frozen.weights * after.frozen_mass, [0.25, 0.25])
    assert heat.continue_past_collapse(mixture, 40.0, 40.0).remaining is None
    with pytest.raises(ValueError, match="`t` must be finite and ≥ 0, but is -1"):
        heat.continue_past_collapse(mixture, -1.0, 40.0)
    with pytest.raises(ValueError, match="must be read where values are known"):
        jax.jit(lambda m: heat.continue_past_collapse(m, 1.0, 40.0).frozen)(mixture)


def test_heat_functions_keep_float32():
    f = jnp.float32
    mixture = heat.HeatMixture(jnp.asarray(MEANS3, f), jnp.asarray(MIXTURE[0], f))
    for value in (
        heat.closure_variance(f(0.2), f(1.0), f(50), 1, f(2), f(0.5)),
        heat.heat_multiplier(jnp.arange(3, dtype=f), f(0.1), 3),
        heat.log_smoothing_multipliers(5, f(20), 3),
        mixture.evolve(0.1, 10.0, 1).s,
        mixture.law().density(mixture.means),
    ):
        assert value.dtype == f
