"""The heat phase against independent computations: SciPy's ODE solver and quadrature."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

import meanformer as mf
from meanformer import theory


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
