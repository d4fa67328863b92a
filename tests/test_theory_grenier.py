"""Grenier's expansion against a Fourier–Galerkin solution of the PDE by SciPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special

from meanformer.theory import grenier, metastability

N = 128
THETA = 2 * np.pi * np.arange(N) / N
WAVES = np.fft.fftfreq(N, 1 / N)


def rates(beta, k, order=4):
    """γ_{jk} of (USA), by SciPy."""
    j = k * np.arange(1, order + 1)
    return j**2 * scipy.special.iv(j, beta) / beta


@functools.cache
def solved(beta, k, alpha, T):
    """f(T, THETA) for f(0) = 1/2π + α cos kθ: ∂ₜf = −∂_θ(f ∂_θ(W*f)) on a grid, with W*f from
    the samples of W = e^{β cos}/β and 2/3 dealiasing."""
    W = np.fft.fft(np.exp(beta * np.cos(THETA)) / beta) * 2 * np.pi / N

    def rhs(_, f):
        flux = np.fft.fft(f * np.fft.ifft(1j * WAVES * W * np.fft.fft(f)).real)
        return -np.fft.ifft(1j * WAVES * flux * (np.abs(WAVES) < N / 3)).real

    f0 = 1 / (2 * np.pi) + alpha * np.cos(k * THETA)
    run = scipy.integrate.solve_ivp(
        rhs, (0, T), f0, method="DOP853", rtol=1e-12, atol=1e-15
    )
    return run.y[:, -1]


@pytest.mark.parametrize(("beta", "k"), [(5.0, 3), (2.0, 2)])
def test_the_expansion_is_exact_to_its_order(beta, k):
    """|f^α − f^{α,K}| = O((αe^{γt})^{K+1}) for K = 1, 2, 3, 4: slopes in α at a fixed time,
    bounded on both sides."""
    gamma = rates(beta, k)
    expansion = grenier.grenier_expansion(gamma, k)
    waves = np.cos(k * np.arange(1, 5) * THETA[:, None])
    for T in (0.5 / gamma[0], 3 / gamma[0]):
        sizes = np.array([0.004, 0.008, 0.016])
        errors = np.zeros((4, 3))
        for i, alpha in enumerate(sizes * np.exp(-gamma[0] * T)):
            f = solved(beta, k, alpha, T)
            for K in (1, 2, 3, 4):
                wave = waves @ expansion.modes(T, alpha, K)
                errors[K - 1, i] = np.max(np.abs(1 / (2 * np.pi) + wave - f))
        slopes = np.diff(np.log2(errors), axis=1)
        np.testing.assert_allclose(slopes, np.arange(2, 6)[:, None] * [1, 1], atol=0.06)
        assert np.all(errors[:, 1] < 0.008 * (8 * 0.008) ** np.arange(1, 5) * 4)


def test_the_error_is_uniform_until_the_mode_is_seen():
    """The same bound with one constant for all times up to T₂ at fixed α (Lemma C.14)."""
    beta, k = 5.0, 3
    gamma, alpha = rates(beta, k), 1e-4
    expansion = grenier.grenier_expansion(gamma, k)
    ratios = []
    for size in (0.001, 0.003, 0.01, 0.02):
        T = np.log(size / alpha) / gamma[0]
        error = np.abs(expansion.density(THETA, T, alpha, 2) - solved(beta, k, alpha, T))
        ratios.append(np.max(error) / size**3)
    assert max(ratios) < 2 * min(ratios[1:]) < 40


def test_the_terms_solve_their_equations():
    """(∂ₜ − L)g_j = −Σ ∂_θ(g_i ∂_θ(W*g_{j−i})), g_1 = e^{γt}cos kθ, g_j(0) = 0 (25): on a grid,
    with the derivative in time by autodiff."""
    beta, k, t = 5.0, 3, 0.13
    gamma = rates(beta, k)
    expansion = grenier.grenier_expansion(gamma, k)
    m = np.arange(1, 5)
    waves = np.cos(k * m * THETA[:, None])

    def terms(t):  # (order, N)
        growth = jnp.exp(expansion.exponents * t)
        return (expansion.coefficients @ growth) @ waves.T

    g, slope = jax.jvp(terms, (t,), (1.0,))
    W = np.fft.fft(np.exp(beta * np.cos(THETA)) / beta) * 2 * np.pi / N

    def derivative(f):
        return np.fft.ifft(1j * WAVES * np.fft.fft(f)).real

    velocity = [derivative(np.fft.ifft(W * np.fft.fft(f)).real) for f in np.asarray(g)]
    np.testing.assert_allclose(g[0], np.exp(gamma[0] * t) * waves[:, 0], rtol=1e-13)
    for j in range(4):
        linear = -derivative(velocity[j]) / (2 * np.pi)
        force = sum(-derivative(g[i] * velocity[j - 1 - i]) for i in range(j))
        size = float(np.max(np.abs(slope[j])))
        np.testing.assert_allclose(slope[j], linear + force, atol=1e-12 * size)
        if j:
            size = np.max(np.abs(expansion.coefficients[j]))
            np.testing.assert_allclose(terms(0.0)[j], 0, atol=1e-14 * size)
    start = expansion.density(THETA, 0.0, 0.01)
    np.testing.assert_allclose(start, 1 / (2 * np.pi) + 0.01 * waves[:, 0], rtol=1e-12)


def test_the_leading_terms_are_the_limit_and_know_parity():
    """e^{−jγt}g_j → Σ_m G_jm cos mkθ; G_jm = 0 unless m ≤ j and m ≡ j mod 2. By hand
    G_22 = 2πγ_k/(2γ_k − γ_2k)."""
    gamma = rates(5.0, 3)
    expansion = grenier.grenier_expansion(gamma, 3)
    G = np.asarray(expansion.leading)
    j, m = np.ogrid[1:5, 1:5]
    assert np.all((G == 0) == ((m > j) | ((m + j) % 2 == 1)))
    np.testing.assert_allclose(
        G[1, 1], 2 * np.pi * gamma[0] / (2 * gamma[0] - gamma[1]), rtol=1e-13
    )
    t = 40 / gamma[0]
    scaled = expansion.exponents - np.arange(1, 5)[:, None] * gamma[0]
    terms = np.einsum("jmn,jn->jm", expansion.coefficients, np.exp(scaled * t))
    np.testing.assert_allclose(terms, G, rtol=1e-10)
    np.testing.assert_allclose(expansion.exponents[:4], np.arange(1, 5) * gamma[0])


def test_the_expansion_is_differentiable_and_follows_the_dtype():
    """d/dβ of a density against central differences; float32 in, float32 out."""

    def f(beta):
        gamma = metastability.growth_rates(beta, 2, np.array([3, 6, 9]))
        return grenier.grenier_expansion(gamma, 3).density(0.2, 0.1, 0.01)

    h = 1e-4
    slope = jax.jit(jax.grad(f))(5.0)
    np.testing.assert_allclose(slope, (f(5 + h) - f(5 - h)) / (2 * h), rtol=1e-6)
    small = grenier.grenier_expansion(rates(5.0, 3).astype(np.float32), 3)
    large = grenier.grenier_expansion(rates(5.0, 3), 3)
    assert small.coefficients.dtype == small.modes(0.1, 0.01).dtype == np.float32
    np.testing.assert_allclose(
        small.coefficients, large.coefficients, rtol=1e-5, atol=1e-5
    )


def test_refusals():
    with pytest.raises(ValueError, match="must have no resonance"):
        grenier.grenier_expansion([1.0, 2.0], 1)
    with pytest.raises(ValueError, match="1 to 6 rates, one per order, but holds 7"):
        grenier.grenier_expansion(np.ones(7), 1)
    expansion = grenier.grenier_expansion([1.0, 0.5], 1)
    with pytest.raises(ValueError, match="`order` must be at most 2"):
        expansion.density(0.0, 1.0, 0.1, 3)
