"""The rotating ring against independent computations: SciPy's ODE solver and quadrature."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import scipy.integrate
import scipy.special

import helpers
import meanformer as mf
from meanformer import theory


@pytest.mark.parametrize("k", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("beta", [0.5, 30.0, 400.0])
def test_ring_rate_against_mpmath(k, beta):
    """k sin(kπ/2) d/dκ(I_k/I_0) with mpmath's Bessel functions and derivative."""
    with mpmath.workdps(40):
        slope = mpmath.diff(lambda b: mpmath.besseli(k, b) / mpmath.besseli(0, b), beta)
        exact = float(k * mpmath.sin(k * mpmath.pi / 2) * slope)
    np.testing.assert_allclose(
        theory.ring_growth_rate(k, beta), exact, rtol=1e-10, atol=1e-17
    )


@pytest.mark.parametrize("s0", [1e-3, 0.005, 0.2])
def test_height_law_is_the_solution_of_its_equations(s0):
    """x̄' = x̄(1 − 2βσ²)/(1 + βσ²) and (σ²)' = −4βσ⁴/(1 + βσ²) against SciPy."""
    beta, t = 30.0, 3.0

    def slope(_, y):
        b = beta * y[1]
        return [(1 - 2 * b) / (1 + b) * y[0], -4 * b * y[1] / (1 + b)]

    out = scipy.integrate.solve_ivp(slope, (0, t), [1.0, s0], rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(
        theory.height_amplification(s0, t, beta), out.y[0, -1], rtol=1e-9
    )
    np.testing.assert_allclose(
        theory.height_variance(s0, t, beta), out.y[1, -1], rtol=1e-9
    )


def test_plane_is_lost_when_heights_fall_to_the_threshold():
    """(σ²)' = −4βσ⁴/(1 + βσ²) reaches 1/(2β) at that time, with SciPy; 0 if σ₀² is below."""
    beta, s0 = 30.0, np.array([0.02, 0.1, 3.0])
    for start, t in zip(s0, theory.plane_instability_time(s0, beta)):
        out = scipy.integrate.solve_ivp(
            lambda _, s: -4 * beta * s**2 / (1 + beta * s),
            (0, float(t)),
            [start],
            rtol=1e-11,
            atol=1e-14,
        )
        np.testing.assert_allclose(out.y[0, -1], 1 / (2 * beta), rtol=1e-9)
    early = jnp.array([0.0, 0.01, 1 / 60])
    np.testing.assert_array_equal(theory.plane_instability_time(early, beta), 0)
    slope = jax.vmap(jax.grad(theory.plane_instability_time), (0, None))(early, beta)
    np.testing.assert_array_equal(slope, 0)


def test_heights_obey_their_laws_in_the_field_itself():
    """In `SelfAttention` of scenario 1b, for a thin belt with Gaussian heights around x̄₃, the
    mean height moves at `height_growth_rate`, (1 − 2βσ²)x̄₃/(1 + βσ²), and σ² at
    −4βσ⁴/(1 + βσ²), on both sides of σ² = 1/(2β)."""
    beta, shift = 30.0, 1e-4
    B = np.array([[0.0, 1, 0], [-1, 0, 0], [0, 0, -2]])
    field = mf.SelfAttention(np.eye(3), B, np.eye(3), beta)
    a = 2 * np.pi * (np.arange(60) + 0.5) / 60
    z, w = np.polynomial.hermite_e.hermegauss(9)
    weights = np.repeat(w / w.sum() / 60, 60)
    for s0 in (1e-4, 0.002, 1 / 60, 0.03):
        psi = np.repeat(shift + np.sqrt(s0) * z, 60)
        azimuth = np.tile(a, 9)
        flat = np.cos(psi)
        x = np.stack([flat * np.cos(azimuth), flat * np.sin(azimuth), np.sin(psi)], 1)
        v = np.asarray(field.velocity(x, mf.Empirical(x, weights)))[:, 2]
        mean = weights @ x[:, 2]
        rate = weights @ v / mean
        spread = 2 * weights @ (v * (x[:, 2] - mean))
        b = beta * s0
        # P_x takes z² of the heights (3σ² in a fourth moment), sin ψ and cos ψ the rest.
        error = 4 * s0 + 0.1 * b / beta
        np.testing.assert_allclose(rate, theory.height_growth_rate(beta, s0), atol=error)
        np.testing.assert_allclose(spread, -4 * b * s0 / (1 + b), rtol=0.01 + 6 * s0)


def test_fastest_mode_is_the_largest_of_all_rates():
    """Against SciPy's Bessel functions over all k, for an array of β: 9 and .105 at β = 30;
    k ≈ √(3β), .58/√β for large β."""
    betas = np.array([0.1, 3.0, 10.0, 30.0, 400.0])
    found = theory.most_unstable_ring_mode(betas)
    k = np.arange(1, 80)[:, None]
    quotient = scipy.special.ive(k, betas) / scipy.special.ive(0, betas)
    slope = scipy.special.ivp(k, betas) / scipy.special.iv(0, betas)
    slope = slope - quotient * scipy.special.ive(1, betas) / scipy.special.ive(0, betas)
    rates = k * np.sin(k * np.pi / 2) * slope
    np.testing.assert_array_equal(found.k, np.argmax(rates, axis=0) + 1)
    np.testing.assert_allclose(found.rate, np.max(rates, axis=0), rtol=1e-9)
    assert int(found.k[3]) == 9
    np.testing.assert_allclose(found.rate[3], 0.105, atol=5e-4)
    large = theory.most_unstable_ring_mode(1e6)
    assert abs(int(large.k) - np.sqrt(3e6)) <= 2
    np.testing.assert_allclose(large.rate, np.sqrt(6.75e-6) * np.exp(-1.5), rtol=1e-3)


def test_ring_rates_take_arrays_of_modes():
    """Shape beta.shape + k.shape, entry by entry those of one mode; gradients in β."""
    k, betas = np.array([[1, 2, 3], [5, 9, 16]]), jnp.array([0.0, 2.0, 30.0])
    rates = theory.ring_growth_rate(k, betas)
    assert rates.shape == (3, 2, 3)
    single = theory.ring_growth_rate(9, betas)
    np.testing.assert_allclose(rates[:, 1, 1], single, rtol=1e-13, atol=1e-18)
    np.testing.assert_allclose(rates[0].ravel(), [0.5, 0, 0, 0, 0, 0], atol=1e-15)

    def f(beta):
        return theory.ring_growth_rate(9, beta)

    np.testing.assert_allclose(
        jax.grad(f)(30.0), helpers.central_difference(f, 30.0, 1e-2), rtol=1e-7
    )
    assert f(jnp.float32(30)).dtype == jnp.float32


def test_ring_grows_as_predicted():
    """A ring with 1 % of mode 9 under (SA) on S¹, QᵀK a quarter turn, V = I, β = 30: the mode
    grows at .105 for a time 4, to 1 %."""
    beta, n, k = 30.0, 360, 9
    base = 2 * np.pi * (np.arange(n) + 0.5) / n
    x0 = mf.sphere.from_angles(base - 0.01 / k * np.sin(k * base))
    B = np.array([[0.0, 1], [-1, 0]])
    run = mf.solve(mf.SelfAttention(B, np.eye(2), np.eye(2), beta), x0, [0.0, 4.0])
    theta = np.asarray(mf.sphere.angles(run.xs))
    size = np.abs(np.exp(1j * k * theta).mean(axis=1))
    rate = np.log(size[1] / size[0]) / 4
    np.testing.assert_allclose(rate, theory.most_unstable_ring_mode(beta).rate, rtol=0.01)


def test_ring_functions_refuse():
    with pytest.raises(ValueError, match=r"`k` must be an integer ≥ 1, .* is \[0, 1\]"):
        theory.ring_growth_rate([0, 1], 3.0)
    with pytest.raises(ValueError, match=r"`k` must be an integer ≥ 1, .* is 1\.5"):
        theory.ring_growth_rate(1.5, 3.0)
    with pytest.raises(ValueError, match=r"`beta` must be > 0, but is 0\.0"):
        theory.most_unstable_ring_mode(0.0)
    with pytest.raises(ValueError, match="`degree` must exceed the fastest mode"):
        theory.most_unstable_ring_mode(400.0, degree=9)
    with pytest.raises(ValueError, match="`degree` must be given under `jit`"):
        jax.jit(theory.most_unstable_ring_mode)(3.0)
