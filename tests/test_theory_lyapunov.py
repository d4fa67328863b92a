"""E_p against simulations, quadrature and the best constants found by search."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

import meanformer as mf
from helpers import random_rotation
from meanformer import observables, theory
from test_theory_zero_temperature import from_M

I3 = np.eye(3)


def symmetric_case(seed, d, spectrum, orthogonal=False):
    """Q, K, V with VKᵀQ symmetric of the given spectrum and QᵀK general or orthogonal."""
    rng = np.random.default_rng(seed)
    R = random_rotation(rng, d)
    M = R @ np.diag(spectrum) @ R.T
    Q, K = (
        random_rotation(rng, d) if orthogonal else rng.normal(size=(d, d)) for _ in "QK"
    )
    V = M @ np.linalg.inv(K.T @ Q)
    return Q, K, V


@pytest.mark.parametrize("d", [3, 4, 5, 6])
def test_lemma_7_and_proposition_8_hold_along_the_flow(d):
    """W₂(ρ_t, π_E#ρ₀)² ≤ ∫|x − π_E x|²dρ_t ≤ E₂(ρ_t) ≤ E₂(ρ₀)e^{−2(λ₁−λ₂)t/σ_max(B)}, for
    p = 1 and 3 alike, along random flows with symmetric M, tokens as they are."""
    x0 = mf.Uniform(d).sample(jax.random.key(d), 64)
    powers = [1.0, 2.0, 3.0]

    @jax.jit
    def numbers(x, space):  # an upper bound of W₂², and E_p
        mu = mf.Empirical(x, check=False)
        cost = mu.mean(jnp.sum((x - theory.project_to_dominant(x, space)) ** 2, -1))
        return cost, jnp.stack([observables.lyapunov(mu, space, p) for p in powers])

    for seed in range(3):
        spectrum = np.sort(np.random.default_rng(seed).normal(size=d))[::-1].copy()
        spectrum[1] = spectrum[0]  # m = 2
        Q, K, V = symmetric_case(seed, d, spectrum)
        space = theory.dominant_eigenspace(Q, K, V)
        assert space.dim == 2
        start = numbers(x0, space)[1]
        for t in (0.0, 0.5, 2.0):
            cost, value = numbers(theory.zero_temperature_flow(x0, t, Q, K, V), space)
            bound = theory.wasserstein_from_lyapunov(value, powers) ** 2
            assert np.all(cost <= bound * (1 + 1e-12))
            decay = theory.lyapunov_decay(t, powers, Q, K, V)
            assert np.all(value <= start * decay * (1 + 1e-9))


def test_proposition_8_and_lemma_7_are_sharp_in_a_simulation():
    """(mf.solve, B orthogonal.) Prop. 8 is an equality for two eigenvalues, and its slack at
    t = 4 is below 10 for three; that of W₂² ≤ ∫|x − π_E x|² ≤ E₂ is below 10 for m = 2."""
    x0 = mf.Uniform(3).sample(jax.random.key(1), 64)
    ts = np.linspace(0, 4, 5)
    for spectrum, most in (([2.0, 2, 1], 1.0), ([2.0, 1, 0.5], 10.0)):
        Q, K, V = symmetric_case(5, 3, spectrum, orthogonal=True)
        space = theory.dominant_eigenspace(Q, K, V)
        field = mf.ZeroTemperature(Q, K, V)
        run = mf.solve(field, x0, ts, rtol=1e-10, atol=1e-10)
        tokens = [mf.Empirical(x) for x in run.xs]
        values = np.array([observables.lyapunov(mu, space, 2.0) for mu in tokens])
        slack = values[0] * theory.lyapunov_decay(ts, 2.0, Q, K, V) / values
        assert np.all(slack >= 1 - 1e-6)
        assert slack[-1] <= most * (1 + 1e-6)
        end = [theory.project_to_dominant(mu.points, space) for mu in tokens]
        cost = [jnp.mean(jnp.sum((mu.points - y) ** 2, -1)) for mu, y in zip(tokens, end)]
        lemma = values / np.array(cost)
        assert np.all(lemma >= 1)
        if space.dim == 2:
            assert lemma[-1] < 10


def test_lyapunov_decay_checks_its_hypotheses():
    Q, K, V = from_M([[1.0, 2], [0, 0]])
    with pytest.raises(
        ValueError, match=r"VKᵀQ symmetric.*‖M − Mᵀ‖ is 2\.828.*‖M‖ = 2\.236"
    ):
        theory.lyapunov_decay(1.0, 2.0, Q, K, V)
    eye = np.eye(2)
    np.testing.assert_array_equal(
        theory.lyapunov_decay([0.0, 1.0], 2.0, eye, eye, 3 * eye), [1, 0]
    )
    with pytest.raises(ValueError, match="QᵀK invertible"):
        theory.lyapunov_decay(1.0, 2.0, np.diag([1.0, 0]), eye, eye)
    with pytest.raises(ValueError, match="`t` must be ≥ 0"):
        theory.lyapunov_decay(-1.0, 2.0, eye, eye, np.diag([2.0, 1]))
    with pytest.raises(ValueError, match="`p` must be > 0"):
        theory.lyapunov_decay(1.0, 0.0, eye, eye, np.diag([2.0, 1]))


@pytest.mark.parametrize("p", [0.5, 1.0, 1.7, 2.0, 2.5, 4.0])
def test_wasserstein_bound_is_the_best_that_E_p_allows(p):
    """The largest ∫|x − π_E x|² over two atoms at angles φ with ∫tan^p φ = E_p, by search over
    a grid of angles, reaches the bound and does not exceed it."""
    values = np.array([1e-3, 0.1, 0.7, 3.0, 50.0])
    bound = np.asarray(theory.wasserstein_from_lyapunov(values, p)) ** 2
    phi = np.geomspace(1e-4, np.pi / 4, 800)
    phi = np.concatenate([[0], phi, np.pi / 2 - phi[-2::-1]])
    s, cost = np.tan(phi) ** p, 2 - 2 * np.cos(phi)
    for value, limit in zip(values, bound):
        low, high = s[:, None], s[None]
        low, high = low[low[:, 0] <= value], high[:, high[0] > value]
        a = (value - low) / (high - low)  # weight of the larger atom
        mixed = (1 - a) * cost[: len(low), None] + a * cost[None, -high.shape[1] :]
        assert limit * (1 - 1e-4) <= np.max(mixed) <= limit * (1 + 1e-12)


def test_wasserstein_bound_is_attained_by_a_point_mass_and_never_exceeds_the_diameter():
    """p ≥ 2: W₂ = |x − π_E x| = 2 sin(φ/2) for one token; √2 at E_p = ∞; 0 at 0."""
    phi = np.geomspace(1e-7, 1.5, 9)
    for p in (2.0, 3.0):
        got = theory.wasserstein_from_lyapunov(np.tan(phi) ** p, p)
        np.testing.assert_allclose(got, 2 * np.sin(phi / 2), rtol=1e-13)
    ends = theory.wasserstein_from_lyapunov([0, np.inf], 1.0)
    np.testing.assert_allclose(ends, [0, np.sqrt(2)])
    for p in (0.5, 2.0, 3.0):
        assert np.isfinite(jax.grad(theory.wasserstein_from_lyapunov)(0.0, p))


def half_line(d, q):
    """∫₀¹ r^{q−1} (1 + r²)^{−d/2} dr, with v = r^q."""
    return mpmath.quad(lambda v: (1 + v ** (2 / q)) ** (-mpmath.mpf(d) / 2) / q, [0, 1])


def test_uniform_law_has_the_moments_of_a_ratio_of_chi_squares():
    """E_p = ∫tan^p φ cos^{m−1}φ sin^{d−m−1}φ dφ/∫(p = 0), by mpmath, with derivative in p;
    ∞ from p = m on; 0 for m = d."""
    for d, m in [(2, 1), (3, 1), (3, 2), (5, 3), (8, 1), (32, 16), (64, 63)]:
        p = np.array([0.1, 0.5, 0.9]) * min(m, 4)

        def integral(p, d=d, m=m):  # r = tan φ up to 1, and 1/r beyond
            return half_line(d, d - m + p) + half_line(d, m - p)

        with mpmath.workdps(25):
            zero = integral(mpmath.mpf(0))
            exact = [integral(mpmath.mpf(q)) / zero for q in p]
            h = mpmath.mpf("1e-8")
            slope = (integral(p[1] + h) - integral(p[1] - h)) / (2 * h) / zero
        got = theory.lyapunov_moment(d, m, p)
        np.testing.assert_allclose(got, np.array(exact, float), rtol=1e-12)
        derivative = jax.grad(lambda q, d=d, m=m: theory.lyapunov_moment(d, m, q))(p[1])
        np.testing.assert_allclose(derivative, float(slope), rtol=1e-10)
    np.testing.assert_array_equal(theory.lyapunov_moment(4, 2, [2.0, 3.0]), np.inf)
    assert jax.grad(lambda q: theory.lyapunov_moment(4, 2, q))(3.0) == 0
    np.testing.assert_array_equal(theory.lyapunov_moment(4, 4, [2.0, 9.0]), 0)
    with pytest.raises(ValueError, match="`m` must be at most d = 3, but is 4"):
        theory.lyapunov_moment(3, 4, 1.0)


def test_moment_of_sampled_uniform_tokens_diverges_from_p_equal_to_dim_E_on():
    """p < m: samples agree; p = m: the mean of n tokens keeps growing, like log n (C16)."""
    mu = mf.Empirical(mf.Uniform(4).sample(jax.random.key(0), 400_000))
    E = np.eye(4)[:, :2]
    low = observables.lyapunov(mu, E, 0.8)
    np.testing.assert_allclose(low, theory.lyapunov_moment(4, 2, 0.8), rtol=1e-2)
    # P(|P_E x|² < s) = s for d = 4, m = 2: E₂ restricted to |P_E x|² > s is log(1/s) − 1 + s.
    inside = jnp.sum(mu.points[:, :2] ** 2, 1)
    for s in (1e-1, 1e-2, 1e-3):
        cut = jnp.mean(jnp.where(inside > s, (1 - inside) / inside, 0))
        np.testing.assert_allclose(cut, np.log(1 / s) - 1 + s, rtol=5e-2)
