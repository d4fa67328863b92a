"""What ends the heat phase, against SciPy's Bessel functions and root finder, sampled tokens,
and data made of known heat kernels."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special

import helpers
import meanformer as mf
from meanformer.theory import heat_end

# ------------------------------------------------------------------ noise


def rates_and_dimensions(beta, d, degrees=400):
    """γ_l of (SA) and the number of harmonics, with SciPy."""
    l = np.arange(1, degrees)
    nu = d / 2 - 1
    rates = l * (l + d - 2) / beta * scipy.special.ive(l + nu, beta)
    dims = scipy.special.binom(l + d - 1, d - 1) - scipy.special.binom(l + d - 3, d - 1)
    return rates / scipy.special.ive(nu, beta), dims


def reference(n, beta, d, density, level, l1=1.0, l2=1.0):
    rates, dims = rates_and_dimensions(beta * l1, d)
    target = n * density * helpers.sphere_area(d) * level**2

    def excess(log_t):
        y = 2 * l2 * rates * np.exp(log_t)
        return np.log(np.sum(dims * np.expm1(y))) - np.log(target)

    root: float = scipy.optimize.brentq(excess, -20, 5, xtol=1e-13)  # pyright: ignore
    return math.exp(root)


@pytest.mark.parametrize("d", [2, 6])
def test_noise_time_is_the_root_of_its_sum(d):
    """Σ dim_l(e^{2γ_l t} − 1) = nµ|S|level² with SciPy, also with λ₁, λ₂."""
    density = 1 / helpers.sphere_area(d)
    for n, beta, level in ((100, 3.0, 1.0), (1e8, 50.0, 0.3), (1e12, 400.0, 1.0)):
        found = heat_end.noise_time(n, beta, d, level=level, degrees=250)
        exact = reference(n, beta, d, density, level)
        np.testing.assert_allclose(found, exact, rtol=1e-11)
    found = heat_end.noise_time(1e4, 10.0, d, density=0.7, lambda1=3.0, lambda2=0.4)
    exact = reference(1e4, 10.0, d, 0.7, 1.0, 3.0, 0.4)
    np.testing.assert_allclose(found, exact, rtol=1e-11)


def test_noise_time_grows_like_e_over_four_times_the_logarithm_of_n():
    """dt/d ln n → 1/(2γ_max) → e/4 from above, and β enters as −(e/8) ln β only: the formula
    of the docstring, whose error is O(1/t) of Laplace's method."""

    def time(n, beta):
        return float(heat_end.noise_time(n, beta, 2, density=1.0, degrees=400))

    beta = 1000.0
    slope = jax.grad(
        lambda log_n: heat_end.noise_time(jnp.exp(log_n), beta, 2, degrees=400)
    )
    slopes = [float(slope(jnp.log(n))) for n in (1e4, 1e9, 1e30)]
    assert slopes[0] > slopes[1] > slopes[2] > np.e / 4
    np.testing.assert_allclose(slopes[2], np.e / 4, rtol=0.01)
    for n in (1e6, 1e12):
        t = time(n, beta)
        law = np.log(n * np.pi) - np.log(beta) / 2 + np.log(4 * t / (np.pi * np.e)) / 2
        np.testing.assert_allclose(t, np.e / 4 * law, atol=1 / t)
    drop = time(1e12, 500.0) - time(1e12, 1000.0)
    np.testing.assert_allclose(drop, np.e / 8 * np.log(2), rtol=0.05)


def test_noise_of_sampled_tokens_reaches_its_level_at_the_noise_time():
    """(SA) on S¹ from independent uniform tokens: the mean square 2Σ_k(|c_k(t)|² − |c_k(0)|²)
    added to the relative fluctuation is level² at that time. About 20 real modes and 16
    seeds leave 8 % of statistical error (1σ), the second order of level = ¼ a few %."""
    n, beta, level, seeds = 500, 30.0, 0.25, 16
    t = float(heat_end.noise_time(n, beta, level=level))
    field = mf.SelfAttention(np.eye(2), np.eye(2), np.eye(2), beta)
    keys = jax.random.split(jax.random.key(0), seeds)
    x0 = jax.vmap(lambda key: mf.Uniform(2).sample(key, n))(keys)
    ts = jnp.array([0.0, t])
    x = jax.vmap(lambda x: mf.solve(field, x, ts, rtol=1e-4, atol=1e-5).xs)(x0)
    k = np.arange(1, 40)
    angles = np.asarray(mf.sphere.angles(x))  # (seeds, 2, n)
    c = np.exp(1j * k[:, None, None, None] * angles).mean(axis=-1)
    power = 2 * np.sum(np.abs(c) ** 2, axis=0).mean(axis=0)
    np.testing.assert_allclose(power[1] - power[0], level**2, rtol=0.3)


def test_noise_time_has_derivatives_and_keeps_float32():
    """∂/∂β and ∂²/∂β² by differences; float32 to 1e-5; modes that outnumber tokens are refused."""

    @jax.jit
    def f(beta):
        return heat_end.noise_time(1e4, beta, 3, degrees=90)

    both = jax.jit(jax.value_and_grad(jax.grad(f)))
    slope, second = both(60.0)
    np.testing.assert_allclose(
        slope, helpers.central_difference(f, 60.0, 0.06), rtol=1e-7
    )
    np.testing.assert_allclose(
        second, helpers.central_difference(lambda b: both(b)[0], 60.0, 0.06), rtol=1e-7
    )
    single = heat_end.noise_time(jnp.float32(1e4), jnp.float32(60), 3, degrees=90)
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, f(60.0), rtol=1e-5)
    with pytest.raises(ValueError, match="`n` must be large enough"):
        heat_end.noise_time(1e6, 1e3, 64, degrees=300)


def test_the_phase_ends_with_the_smaller_time_and_says_why():
    """min(βλ₁σ²/(2λ₂), noise); works under `jit`, where `limited_by` is the index."""
    wide = heat_end.heat_phase_end(0.16, 1e4, 400.0)
    narrow = heat_end.heat_phase_end(0.16, 1e4, 50.0)
    assert (wide.reason, narrow.reason) == ("noise", "collapse")
    np.testing.assert_allclose(narrow.time, 4.0)
    np.testing.assert_allclose(wide.collapse, 32.0)
    density = 1 / np.sqrt(2 * np.pi * 0.16)
    np.testing.assert_allclose(
        wide.time, reference(1e4, 400.0, 2, density, 1.0), rtol=1e-11
    )
    scaled = heat_end.heat_phase_end(0.16, 1e4, 100.0, lambda1=4.0, lambda2=2.0)
    np.testing.assert_allclose(scaled.time * 2, wide.time)
    np.testing.assert_allclose(scaled.collapse * 2, wide.collapse)
    traced = jax.jit(lambda s: heat_end.heat_phase_end(s, 1e4, 50.0))(0.16)
    assert int(traced.limited_by) == 0


def test_computed_clusters_form_within_one_unit_of_the_prediction():
    """σ = .4, n = 10⁴: the computed times at which the mean of β·(local variance) falls to ½
    (Fourier sums, RK4, two seeds each) are 0 to 1 after the predicted end, where the heat law
    alone is wrong by 10, 26 and 75."""
    computed = {50.0: 4.73, 200.0: 6.23, 400.0: 6.03, 1000.0: 4.83}
    for beta, t in computed.items():
        end = float(heat_end.heat_phase_end(0.16, 1e4, beta).time)
        assert -0.2 < t - end < 1.0


def test_noise_time_refuses():
    with pytest.raises(ValueError, match="`n` must be finite and ≥ 1, but is 0"):
        heat_end.noise_time(0, 10.0)
    with pytest.raises(ValueError, match="`beta` must be finite and > 0, but is 0"):
        heat_end.noise_time(100, 0.0)
    with pytest.raises(ValueError, match="`density` must be finite and > 0"):
        heat_end.noise_time(100, 1.0, density=0.0)
    with pytest.raises(ValueError, match="`degrees` must be given for a traced `beta`"):
        jax.jit(lambda b: heat_end.noise_time(100, b))(3.0)


# ------------------------------------------------------------------ data


@pytest.mark.parametrize("d", [2, 3, 6])
def test_a_heat_kernel_supports_its_own_heat_time(d):
    """|µ̂_l| = e^{−l(l+d−2)s} gives s, exactly; from logarithms beyond all floors too."""
    l = np.arange(50)
    exact = np.exp(-0.03 * l * (l + d - 2.0))
    found = heat_end.largest_backward_time(exact, d, 1e-12)
    np.testing.assert_allclose(found.time, 0.03, rtol=1e-12)
    assert float(found.uncertainty) < 1e-4
    assert int(found.resolved) == np.sum(exact > 1e-12) - 1
    logs = heat_end.largest_backward_time(-0.9 * l * (l + d - 2.0), d, 0.0, log=True)
    np.testing.assert_allclose(logs.time, 0.9, rtol=1e-12)
    assert int(logs.resolved) == 49


def test_a_mixture_supports_the_heat_time_of_its_narrowest_component():
    """min sⱼ, through the oscillation of |Σ αⱼe^{ilmⱼ}| of components of equal s: the error
    is within the uncertainty, which shrinks with the floor."""
    l = np.arange(60)
    parts = [(0.5, 0.02, 0.0), (0.3, 0.05, 2.0), (0.2, 0.02, 1.0)]
    size = np.abs(sum(a * np.exp(-s * l**2 + 1j * m * l) for a, s, m in parts))
    found = [heat_end.largest_backward_time(size, 2, f) for f in (1e-3, 1e-12)]
    for report in found:
        assert abs(float(report.time) - 0.02) < float(report.uncertainty)
    assert float(found[1].uncertainty) < 5e-4 < float(found[0].uncertainty)


@pytest.mark.parametrize(("n", "resolved"), [(10_000, 3), (300_000, 5)])
def test_sampled_tokens_support_the_heat_time_of_their_law(n, resolved):
    """Fourier coefficients of n tokens with the floor 4/√n: s within the uncertainty."""
    law = mf.WrappedNormal([1.0, 0.0], 0.5)
    theta = np.asarray(mf.sphere.angles(law.sample(jax.random.key(1), n)))
    size = [abs(np.exp(1j * k * theta).mean()) for k in range(30)]
    found = heat_end.largest_backward_time(size, 2, 4 / np.sqrt(n))
    assert int(found.resolved) >= resolved
    assert abs(float(found.time) - 0.125) < max(float(found.uncertainty), 0.03)


def test_data_of_finitely_many_degrees_support_any_time():
    """Uniform, 1 + ½cos5θ, 1 + .9cosθ: ∞, with the last degree; but not where the floor hides
    what would come next."""
    flat, five, one = np.zeros((3, 60))
    flat[0] = five[0] = one[0] = 1
    five[5], one[1] = 0.25, 0.45
    for size, floor, degree in ((flat, 1e-10, 0), (five, 1e-10, 5), (one, 1e-3, 1)):
        found = heat_end.largest_backward_time(size, 2, floor)
        assert float(found.time) == np.inf
        assert int(found.degree) == degree
    found = heat_end.largest_backward_time(one, 2, 0.1)
    np.testing.assert_allclose(found.time, -np.log(0.45), rtol=1e-12)


def test_rough_data_support_none():
    """|µ̂_l| = 1/(1 + l²) and e^{−.3l} have s* = 0: the estimate and what it admits tend to 0
    with the number of degrees."""
    for size in (lambda l: 1 / (1 + l**2), lambda l: np.exp(-0.3 * l)):
        times = []
        for degrees in (30, 120):
            found = heat_end.largest_backward_time(
                size(1.0 * np.arange(degrees)), 2, 1e-200
            )
            times.append(float(found.time))
            assert times[-1] < 3 * float(found.uncertainty)
        assert times[1] < times[0] / 3


def test_largest_backward_time_traces_and_refuses():
    l = np.arange(20)
    size = jnp.exp(-0.1 * l**2)

    @jax.jit
    def f(size):
        return heat_end.largest_backward_time(size, 2, 1e-8).time

    slope = jax.grad(f)(size)
    np.testing.assert_allclose(jnp.sum(slope * size), 0, atol=1e-12)  # scale is free
    assert bool(jnp.all(jnp.isfinite(slope)))
    with pytest.raises(
        ValueError, match="`floor` must lie below the magnitude of degree 0"
    ):
        heat_end.largest_backward_time(size, 2, 2.0)
    with pytest.raises(ValueError, match="`magnitudes` must be finite and ≥ 0"):
        heat_end.largest_backward_time(-size, 2, 0.1)
    with pytest.raises(ValueError, match=r"`magnitudes` must have shape \(l,\)"):
        heat_end.largest_backward_time([1.0], 2, 0.1)
