"""Coefficients, norms and times of perturbations of the uniform law, from their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import meanformer as mf
from meanformer import harmonics
from meanformer.theory import perturbations as pt


def test_fourier_coefficients_and_their_clusters():
    """µ̂_k = Σ w e^{−ikθ}; three tight clusters are found where they are."""
    rng = np.random.default_rng(0)
    theta, w = rng.uniform(-9, 9, 50), rng.uniform(0, 1, 50)
    found = pt.fourier_coefficients(theta, 6, w)
    k = np.arange(7)
    expected = (w / w.sum()) @ np.exp(-1j * k * theta[:, None])
    np.testing.assert_allclose(found, expected, atol=1e-14)
    centres = np.array([-2.5, -2.5 + 2 * np.pi / 3, -2.5 + 4 * np.pi / 3])
    c = pt.fourier_coefficients(centres + 0.01 * rng.normal(size=3), 3)[3]
    np.testing.assert_allclose(np.sort(pt.cluster_positions(c, 3)), centres, atol=0.02)
    # The maxima of the mode it stands for: density 1/2π + |µ̂| cos(kθ + arg µ̂)/π.
    c, grid = 0.3 * np.exp(0.7j), np.linspace(-np.pi, np.pi, 20_001)
    density = np.real(np.conj(np.exp(-1j * 5 * grid)) * c)
    positions = np.asarray(pt.cluster_positions(c, 5))
    assert positions.shape == (5,)
    np.testing.assert_allclose(np.interp(positions, grid, density), 0.3, rtol=1e-6)
    with pytest.raises(ValueError, match="`coefficient` must not be 0"):
        pt.cluster_positions(0.0, 3)


def test_linear_flow_multiplies_by_the_growth():
    """e^{γ_k t}, for Fourier coefficients, for all harmonics of S², and backwards."""
    c = np.array([1.0, 0.1j, 0.2, 0.3 - 0.1j])
    rates = np.array([0, *(k**2 * scipy.special.iv(k, 3) / 3 for k in (1, 2, 3))])
    moved = pt.linear_flow(c, 0.4, 3.0)
    np.testing.assert_allclose(moved, c * np.exp(0.4 * rates), rtol=1e-13)
    np.testing.assert_allclose(pt.linear_flow(moved, -0.4, 3.0), c, rtol=1e-13)
    l = np.floor(np.sqrt(np.arange(9))).astype(int)
    moved = pt.linear_flow(np.ones(9), 1.0, 3.0, 3, model="sa", degrees=l)
    ratio = [scipy.special.iv(l + 0.5, 3) / scipy.special.iv(0.5, 3) for l in (1, 2)]
    rates = np.array([2, 6]) / 3 * ratio
    np.testing.assert_allclose(moved, np.exp([0.0, *rates])[l], rtol=1e-13)
    with pytest.raises(ValueError, match=r"`t` must be such that e\^\{γt\}"):
        pt.linear_flow(c, 1e4, 3.0)


def test_sobolev_norm_is_the_sum_over_the_green_function():
    """Σ_{k≠0} |µ̂_k|²/(1+k²) = Σᵢⱼ wᵢwⱼ G(θᵢ−θⱼ), G(θ) = π cosh(π−|θ|)/sinh π − 1, up to the
    tail 2/K; its mean over n uniform tokens is G(0)/n = (π coth π − 1)/n = 2.1533/n."""
    assert abs(np.pi / np.tanh(np.pi) - 1 - 2.1533) < 5e-5
    rng = np.random.default_rng(1)
    theta, w = rng.uniform(0, 2 * np.pi, 20), rng.dirichlet(np.ones(20))
    K = 4000
    c = pt.fourier_coefficients(theta, K, w)
    apart = np.abs(theta[:, None] - theta)
    green = np.pi * np.cosh(np.pi - apart) / np.sinh(np.pi) - 1
    norm = float(pt.sobolev_norm(c))
    exact = w @ green @ w
    assert exact - 2 / K < norm**2 <= exact * (1 + 1e-12)
    dual = float(pt.sobolev_norm(c, definition="dual"))
    np.testing.assert_allclose(dual * np.sqrt(2 * np.pi), norm, rtol=1e-14)
    homogeneous = float(pt.sobolev_norm(c, definition="homogeneous"))
    bernoulli = np.pi**2 / 3 - np.pi * apart + apart**2 / 2  # Σ e^{ikθ}/k²
    np.testing.assert_allclose(homogeneous**2, w @ bernoulli @ w, atol=2 / K)


def test_the_dual_norm_is_a_supremum():
    """‖ρ‖ = max ∫v dρ/‖v‖_{H¹}, ‖v‖² = ∫v² + v'² (14), reached by v = (1−∂²)⁻¹ρ."""
    theta = 2 * np.pi * np.arange(512) / 512
    density = (1 + 0.3 * np.cos(theta + 1) + 0.2 * np.sin(4 * theta)) / (2 * np.pi)
    c = pt.fourier_coefficients(theta, 40, density)
    norm = float(pt.sobolev_norm(c, definition="dual"))
    k = np.arange(-40, 41)
    full = np.concatenate([np.conj(np.asarray(c)[:0:-1]), np.asarray(c)])
    full[40] = 0

    def quotient(v):  # Fourier coefficients of v, −40 … 40
        waves = np.exp(1j * k * theta[:, None])
        values, slopes = np.real(waves @ v), np.real(waves @ (1j * k * v))
        measure = 2 * np.pi / 512
        size = np.sqrt(measure * np.sum(values**2 + slopes**2))
        return measure * np.sum(values * (density - 1 / (2 * np.pi))) / size

    np.testing.assert_allclose(quotient(full / (1 + k**2)), norm, rtol=1e-12)
    rng = np.random.default_rng(0)
    for _ in range(20):
        v = full / (1 + k**2) + 0.01 * rng.normal(size=81)
        assert quotient((v + np.conj(v[::-1])) / 2) < norm


def test_sobolev_norm_on_the_sphere():
    """d = 3, s = 2: the dual norm is Σᵢⱼ wᵢwⱼ Σ_l (2l+1)/(4π) (1+l(l+1))⁻² P_l(⟨xᵢ,xⱼ⟩)."""
    x = np.asarray(mf.Uniform(3).sample(jax.random.key(0), 7))
    c = harmonics.real_harmonics(x, 12).mean(axis=0)
    l = np.arange(1, 13)[:, None, None]
    kernel = (2 * l + 1) / (4 * np.pi) / (1 + l * (l + 1)) ** 2
    total = np.sum(kernel * scipy.special.eval_legendre(l, x @ x.T)) / 49
    dual = pt.sobolev_norm(c, 2.0, 3, definition="dual")
    np.testing.assert_allclose(dual**2, total, rtol=1e-12)
    fourier = pt.sobolev_norm(c, 2.0, 3)
    np.testing.assert_allclose(fourier, dual * np.sqrt(4 * np.pi), rtol=1e-14)
    slope = jax.grad(lambda c: pt.sobolev_norm(c, 2.0, 3))(jnp.zeros(9))
    np.testing.assert_array_equal(slope, np.zeros(9))


def test_exit_times_follow_their_definition():
    """T₁ = ln(n^{−1/4}/‖ρ‖)/γ, T₂ = ln(δ/|α|)/γ (21), (24) with a complex coefficient (E22):
    at T₁ + T₂ the linear flow has amplitude δ, whatever ε and the norm."""
    beta, n, delta = 5.0, 10_000, 0.05
    theta = np.asarray(mf.sphere.angles(mf.Uniform(2).sample(jax.random.key(3), n)))
    c = pt.fourier_coefficients(theta, 200)
    gamma = 9 * scipy.special.iv(3, beta) / beta
    out = pt.exit_times(c, beta, delta, n=n)
    norm = np.sqrt(np.sum(2 * np.abs(c[1:]) ** 2 / (1 + np.arange(1, 201) ** 2)))
    assert int(out.k_max) == 3
    np.testing.assert_allclose(out.norm, norm, rtol=1e-12)
    np.testing.assert_allclose(out.T1, np.log(n**-0.25 / norm) / gamma, rtol=1e-10)
    np.testing.assert_allclose(out.T2, np.log(delta / out.alpha) / gamma, rtol=1e-10)
    for t, amplitude in ((out.T1, out.alpha), (out.total, delta)):
        mode = pt.linear_flow(c, t, beta)[3]
        np.testing.assert_allclose(np.abs(mode) / np.pi, amplitude, rtol=1e-9)
    for definition, epsilon in (("dual", 0.05), ("homogeneous", 0.2)):
        other = pt.exit_times(c, beta, delta, epsilon=epsilon, definition=definition)
        np.testing.assert_allclose(other.total, out.total, rtol=1e-12)
        assert abs(float(other.T1 - out.T1)) > 1e-3


def test_exit_times_refuse_what_is_not_small():
    c = np.array([1.0, 0.01, 0.02, 0.03])
    with pytest.raises(ValueError, match="within ε of the uniform one"):
        pt.exit_times(c, 2.0, 0.1, epsilon=1e-3)
    with pytest.raises(ValueError, match=r"`delta` must exceed the amplitude"):
        pt.exit_times(c, 2.0, 1e-3, epsilon=0.1)
    with pytest.raises(ValueError, match="Exactly one of `n` and `epsilon`"):
        pt.exit_times(c, 2.0, 0.1)
    with pytest.raises(ValueError, match=r"`coefficients` must have shape \(c,\)"):
        pt.exit_times(c[:2], 2.0, 0.1, n=10)
    with pytest.raises(ValueError, match="rates still rise at 3"):
        pt.exit_times(c, 50.0, 0.1, n=10)


def test_refusals():
    with pytest.raises(ValueError, match="`definition` must be one of"):
        pt.sobolev_norm(np.ones(3), definition="Dual")
    with pytest.raises(ValueError, match="`degrees` must be given for d = 4"):
        pt.sobolev_norm(np.ones(3), 2.0, 4)
    with pytest.raises(ValueError, match=r"`degrees` must have shape \(3,\)"):
        pt.linear_flow(np.ones(3), 1.0, 1.0, degrees=[1])
    with pytest.raises(ValueError, match=r"`coefficients` must be finite"):
        pt.linear_flow(np.array([1.0, np.nan]), 1.0, 1.0)
