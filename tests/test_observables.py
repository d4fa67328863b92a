"""Numbers read off tokens, against sums written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, strategies as st

import meanformer as mf
from meanformer import observables


def tokens(seed, n, d):
    x = np.random.default_rng(seed).normal(size=(n, d))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("d", [2, 3, 6])
def test_energy_is_the_double_sum(d):
    """E = (1/2β) Σᵢⱼ wᵢwⱼ e^{β⟨Qxᵢ,Kxⱼ⟩} with weights and rectangular Q, K."""
    rng = np.random.default_rng(d)
    Q, K = rng.normal(size=(2, 2, d))
    x, w, beta = tokens(d, 30, d), rng.uniform(size=30), 1.7
    exact = 0.0
    for i in range(30):
        for j in range(30):
            exact += w[i] * w[j] * np.exp(beta * (Q @ x[i]) @ (K @ x[j]))
    exact /= 2 * beta * w.sum() ** 2
    np.testing.assert_allclose(
        observables.energy(mf.Empirical(x, w), Q, K, beta), exact, rtol=1e-13
    )


def test_log_energy_survives_any_temperature():
    """One cluster: log E = β − log 2β; E itself overflows."""
    mu = mf.Empirical([[0.0, 1.0]])
    eye = np.eye(2)
    for beta in (1.0, 1e3, 1e6):
        np.testing.assert_allclose(
            observables.log_energy(mu, eye, eye, beta),
            beta - np.log(2 * beta),
            rtol=1e-14,
        )
    with pytest.raises(ValueError, match=r"`beta` must be finite and > 0, but is 0"):
        observables.energy(mu, eye, eye, 0.0)


@given(st.integers(1, 4), st.integers(0, 10**6))
def test_alignment_is_the_mean_square_of_the_projection(k, seed):
    """∫|P_E x|²dµ = Σ wᵢ|Eᵀxᵢ|², is 1 for E = R^d, and does not depend on the basis of E."""
    rng = np.random.default_rng(seed)
    x, w = tokens(seed, 12, 4), rng.uniform(0.1, 1, size=12)
    E = np.linalg.qr(rng.normal(size=(4, k)))[0]
    turn = np.linalg.qr(rng.normal(size=(k, k)))[0]
    mu = mf.Empirical(x, w)
    exact = sum(wi * np.sum((E.T @ xi) ** 2) for wi, xi in zip(w / w.sum(), x))
    np.testing.assert_allclose(observables.alignment(mu, E), exact, rtol=1e-12)
    np.testing.assert_allclose(observables.alignment(mu, E @ turn), exact, rtol=1e-12)
    np.testing.assert_allclose(observables.alignment(mu, np.eye(4)), 1, rtol=1e-14)


def test_alignment_of_the_uniform_law_is_dim_over_d():
    """∫|P_E x|² = dim E/d, by the quadrature of the law; E as `dominant_eigenspace` gives it."""
    space = mf.theory.dominant_eigenspace(np.eye(3), np.eye(3), np.diag([1.0, 1, 0]))
    mu = mf.Uniform(3).nodes(200)
    np.testing.assert_allclose(observables.alignment(mu, space), 2 / 3, rtol=1e-13)


def test_alignment_refuses_what_is_not_a_basis():
    mu = mf.Empirical(np.eye(3))
    with pytest.raises(ValueError, match=r"`E` must have orthonormal columns.*qr"):
        observables.alignment(mu, 2 * np.eye(3))
    with pytest.raises(ValueError, match=r"`E` must have shape \(d, k\) with d = 3"):
        observables.alignment(mu, np.eye(2))


@given(st.integers(1, 3), st.integers(0, 10**6))
def test_lyapunov_functional_is_the_mean_power_of_the_tangent_of_the_angle_to_E(k, seed):
    """E_p^ε = Σ wᵢ (|xᵢ − P xᵢ|/(|P xᵢ| + ε))^p, any basis of E; ε = 0: tan^p of the angle."""
    rng = np.random.default_rng(seed)
    x, w = tokens(seed, 12, 4), rng.uniform(0.1, 1, size=12)
    E = np.linalg.qr(rng.normal(size=(4, k)))[0]
    P, mu = E @ E.T, mf.Empirical(x, w)
    p, eps = rng.uniform(0.3, 4), rng.uniform(0, 1)
    out, ins = np.linalg.norm(x - x @ P, axis=1), np.linalg.norm(x @ P, axis=1)
    exact = np.sum(w / w.sum() * (out / (ins + eps)) ** p)
    np.testing.assert_allclose(observables.lyapunov(mu, E, p, eps), exact, rtol=1e-11)
    angle = np.array([scipy.linalg.subspace_angles(row[:, None], E)[0] for row in x])
    exact = np.sum(w / w.sum() * np.tan(angle) ** p)
    np.testing.assert_allclose(observables.lyapunov(mu, E, p), exact, rtol=1e-11)


def test_lyapunov_functional_is_0_on_E_and_infinite_across_without_NaN_gradients():
    """0 on E, ∞ for tokens of positive weight in E^⊥, finite with ε or weight 0."""
    E = np.eye(3)[:, :2]
    x = np.array([[1.0, 0, 0], [0.6, 0, 0.8], [0, 0, 1]])
    for p in (0.5, 1.0, 2.0):
        on = mf.Empirical(x[:1])
        np.testing.assert_array_equal(observables.lyapunov(on, E, p), 0)
        np.testing.assert_array_equal(observables.lyapunov(mf.Empirical(x), E, p), np.inf)
        light = mf.Empirical(x, [1, 1, 0])
        np.testing.assert_allclose(observables.lyapunov(light, E, p), 0.5 * (4 / 3) ** p)
        soft = observables.lyapunov(mf.Empirical(x), E, p, 0.1)
        np.testing.assert_allclose(soft, ((0.8 / 0.7) ** p + 10**p) / 3)

        def value(x, eps, p=p):
            return observables.lyapunov(mf.Empirical(x, check=False), E, p, eps)

        for eps in (0.0, 0.1):
            assert np.isfinite(jax.grad(value)(jnp.asarray(x), eps)).all()
    # A tilted E^⊥ is met up to rounding only, which counts as met.
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    np.testing.assert_array_equal(
        observables.lyapunov(mf.Empirical(turn[:, 2:].T), turn[:, :2], 2.0), np.inf
    )


def test_regularised_lyapunov_functional_decreases_along_the_zero_temperature_flow():
    """dE_p^ε/dt ≤ −p(λ₁−λ₂)/σ_max ∫(|P_E x|/(|P_E x|+ε))(…)^p ≤ 0 for symmetric VKᵀQ, and
    E_p^ε ↑ E_p as ε ↓ 0."""
    B = np.diag([1.0, 2.0, 0.7])
    Q, K, V = np.eye(3), B, np.diag([2.0, 1.0, -1.0]) @ np.linalg.inv(B)
    x0 = mf.Uniform(3).sample(jax.random.key(2), 8)
    E, values = np.eye(3)[:, :1], []
    for t in np.linspace(0, 2, 9):
        mu = mf.Empirical(mf.theory.zero_temperature_flow(x0, t, Q, K, V))
        values.append(
            [observables.lyapunov(mu, E, 1.5, e) for e in (1.0, 0.1, 1e-3, 0.0)]
        )
    values = np.array(values)
    assert np.all(np.diff(values, axis=0) < 0)
    assert np.all(np.diff(values, axis=1) > 0)


def test_lyapunov_functional_refuses_bad_input():
    mu = mf.Empirical(np.eye(3))
    with pytest.raises(ValueError, match="`p` must be finite and > 0, but is 0"):
        observables.lyapunov(mu, np.eye(3)[:, :1], 0.0)
    with pytest.raises(ValueError, match="`epsilon` must be finite and ≥ 0, but is -1"):
        observables.lyapunov(mu, np.eye(3)[:, :1], 1.0, -1.0)
    with pytest.raises(ValueError, match="orthonormal columns"):
        observables.lyapunov(mu, 2 * np.eye(3), 1.0)


@given(st.sampled_from([1, 7, 60]), st.integers(0, 10**6))
def test_histogram_counts_each_token_once(bins, seed):
    """Bin masses are those of np.histogram and sum to 1, the angle π included."""
    rng = np.random.default_rng(seed)
    x, w = tokens(seed, 40, 2), rng.uniform(size=40)
    x[0] = [-1.0, 0.0]
    mass, edges = observables.angle_histogram(mf.Empirical(x, w), bins)
    np.testing.assert_allclose(jnp.sum(mass), 1, rtol=1e-13)
    inside = slice(1, None)  # np.histogram puts π in the last bin, we identify it with −π
    theta = np.arctan2(x[inside, 1], x[inside, 0])
    count, _ = np.histogram(theta, np.asarray(edges), weights=(w / w.sum())[inside])
    count[0] += (w / w.sum())[0]
    np.testing.assert_allclose(mass, count, atol=1e-12)


# -------------------------------------------------------------- energies, normalised


GRADIENT_CASES = {
    "max, one Dirac": ([1.0, 0.7, 0.4], 1.0),
    "max, two Diracs": ([-0.2, -0.5, -1.0], 1.0),
    "min, one Dirac": ([-0.2, -0.5, -1.0], -1.0),
}


@pytest.mark.parametrize("case", GRADIENT_CASES)
def test_normalised_energy_is_at_most_1_and_1_at_the_optimum(case):
    """E/E_opt (V = B) or E_opt/E (V = −B), E_opt from the extreme eigenvalue: e^{βλ}/2β for
    one Dirac, cosh(βλ)/2β for two. At β = 1000 the logarithm is finite and never above 0."""
    values, c = GRADIENT_CASES[case]
    B, top = np.diag(values), values[0] if case == "max, one Dirac" else values[2]
    axis = np.eye(3)[:1] if case == "max, one Dirac" else np.eye(3)[2:]
    best = np.concatenate([axis, -axis]) if "two" in case else axis
    x = mf.Uniform(3).sample(jax.random.key(0), 50)
    for beta in (0.5, 3.0, 1e3):
        ratio = observables.NormalisedEnergy(np.eye(3), B, c * B, beta)
        np.testing.assert_allclose(ratio(mf.Empirical(best)), 1, rtol=1e-11)
        other = observables.normalised_energy(
            mf.Empirical(x), np.eye(3), B, c * B, beta, log=True
        )
        assert np.isfinite(other)
        assert other < 0
    q = np.asarray(x) @ B @ np.asarray(x).T
    best_log = np.log(np.cosh(3 * top)) if "two" in case else 3 * top
    exact = c * (np.log(np.mean(np.exp(3 * q))) - best_log)
    found = observables.normalised_energy(
        mf.Empirical(x), np.eye(3), B, c * B, 3.0, log=True
    )
    np.testing.assert_allclose(found, exact, rtol=1e-12)


def test_normalised_energy_where_the_optimum_is_not_known_takes_a_given_one():
    """For B = I, V = −I the uniform law is optimal: 2βE = sinh β/β on S²."""
    eye, beta = np.eye(3), 2.0
    with pytest.raises(ValueError, match="known optimum"):
        observables.NormalisedEnergy(eye, eye, -eye, beta)
    best = np.log(np.sinh(beta) / beta) - np.log(2 * beta)
    ratio = observables.NormalisedEnergy(eye, eye, -eye, beta, best)
    np.testing.assert_allclose(ratio(mf.Uniform(3).nodes(400)), 1, rtol=1e-13)
    assert ratio(mf.Empirical(eye)) < 0.9


def test_interaction_is_the_energy_without_its_factor():
    """∬e^{β⟨Qx,Ky⟩} = 2βE; 1 at β = 0."""
    rng = np.random.default_rng(0)
    (Q, K), mu = rng.normal(size=(2, 2, 3)), mf.Empirical(tokens(0, 9, 3))
    E = observables.energy(mu, Q, K, 1.3)
    np.testing.assert_allclose(
        observables.interaction(mu, Q, K, 1.3), 2.6 * E, rtol=1e-13
    )
    np.testing.assert_allclose(observables.interaction(mu, Q, K, 0.0), 1, rtol=1e-14)
    with pytest.raises(ValueError, match=r"`mu` must be a measure .* d = 3 .* has d = 2"):
        observables.energy(mf.Empirical(np.eye(2)), Q, K, 1.0)


@pytest.mark.parametrize("n", [7, 1500])
def test_kernel_energy_is_the_double_integral_and_its_speed_the_residual(n):
    """½ΣᵢⱼwᵢwⱼW(⟨xᵢ,xⱼ⟩), in one tile and in several; along v = ∇(W∗µ) it grows at the rate
    ∫|v|²dµ."""
    x, w = tokens(n, n, 3), np.random.default_rng(n).uniform(0.1, 1, size=n)
    mu, eye, beta = mf.Empirical(x, w), np.eye(3), 2.0

    def W(q):
        return jnp.exp(beta * q) / beta

    found = observables.kernel_energy(mu, W)
    w = w / w.sum()
    np.testing.assert_allclose(found, w @ np.exp(2 * x @ x.T) @ w / 4, rtol=1e-12)
    v = mf.UnnormalizedSelfAttention(eye, eye, eye, beta).velocity(x, mu)

    def value(x):
        return observables.kernel_energy(mf.Empirical(x, w, check=False), W)

    rate = jax.jvp(value, (mu.points,), (v,))[1]
    np.testing.assert_allclose(rate, mf.theory.equilibrium_residual(W, mu), rtol=1e-12)


# ------------------------------------------------------------------ order parameters


@given(st.sampled_from([2, 4]), st.integers(0, 10**6))
def test_order_parameters_are_0_to_1_and_turn_with_the_sphere(d, seed):
    """Polar |m|; nematic from the largest eigenvalue of Σwxxᵀ, by NumPy; both invariant."""
    rng = np.random.default_rng(seed)
    x, w = tokens(seed, 12, d), rng.uniform(0.1, 1, size=12)
    w, R = w / w.sum(), np.linalg.qr(rng.normal(size=(d, d)))[0]
    top = np.linalg.eigvalsh((x.T * w) @ x)[-1]
    for y in (x, x @ R.T):
        mu = mf.Empirical(y, w)
        np.testing.assert_allclose(
            observables.polar_order(mu), np.linalg.norm(w @ x), rtol=1e-12
        )
        nematic = observables.nematic_order(mu)
        np.testing.assert_allclose(nematic, (d * top - 1) / (d - 1), rtol=1e-11)
        assert 0 <= nematic <= 1


def test_order_parameters_of_ordered_states():
    """One point: all 1. Two antipodes: nematic only. The corners of a k-gon of any masses:
    |µ̂_k| = 1. The frame ±e₁, ±e₂, ±e₃: none, with finite derivatives."""
    point = mf.Empirical([[0.6, 0.8]])
    values = observables.polar_order(point), observables.nematic_order(point)
    np.testing.assert_allclose(values, 1, rtol=1e-15)
    pair = mf.Empirical([[0.0, 1, 0], [0, -1, 0]])
    values = observables.polar_order(pair), observables.nematic_order(pair)
    np.testing.assert_allclose(values, [0, 1], atol=1e-15)
    corners = mf.sphere.from_angles(0.3 + 2 * np.pi * np.arange(5) / 5)
    gon = mf.Empirical(corners, [1, 2, 3, 4, 5])
    np.testing.assert_allclose(observables.fold_order(gon, 5), 1, rtol=1e-14)
    frame = np.concatenate([np.eye(3), -np.eye(3)])
    for f in (observables.polar_order, observables.nematic_order):
        np.testing.assert_allclose(f(mf.Empirical(frame)), 0, atol=1e-15)
        slope = jax.grad(lambda x, f=f: f(mf.Empirical(x, check=False)))(frame)
        assert np.isfinite(slope).all()


# ------------------------------------------------------------- ranks and Gram matrices


@given(st.sampled_from([1, 3]), st.integers(0, 10**6))
def test_ranks_are_those_of_the_singular_values(k, seed):
    """Tokens in a k-dimensional subspace of R⁵: rank k; e^entropy and 1/Σp² of p = σ²/Σσ² by
    NumPy's SVD; 1 ≤ participation ratio ≤ effective rank ≤ k."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(5, k)))[0]
    x, w = tokens(seed, 12, k + 1)[:, :k], rng.uniform(0.1, 1, size=12)
    x = x / np.linalg.norm(x, axis=1, keepdims=True) @ basis.T
    mu, w = mf.Empirical(x, w), w / w.sum()
    p = np.linalg.svd(np.sqrt(w)[:, None] * x, compute_uv=False)[:k] ** 2
    p = p / p.sum()
    assert observables.rank(mu) == k
    effective, ratio = observables.effective_rank(mu), observables.participation_ratio(mu)
    np.testing.assert_allclose(effective, np.exp(-np.sum(p * np.log(p))), rtol=1e-10)
    np.testing.assert_allclose(ratio, 1 / np.sum(p**2), rtol=1e-11)
    assert 1 - 1e-12 <= ratio <= effective * (1 + 1e-12) <= k * (1 + 1e-11)


def test_rank_counts_down_to_its_tolerance():
    """Tokens within 10⁻⁴ of an axis: rank 3, or 1 at a tolerance of 10⁻³. Few tokens too."""
    x = np.eye(3)[:1] + 1e-4 * np.random.default_rng(0).normal(size=(9, 3))
    mu = mf.Empirical(x / np.linalg.norm(x, axis=1, keepdims=True))
    assert (observables.rank(mu), observables.rank(mu, 1e-3)) == (3, 1)
    assert observables.rank(mf.Empirical(np.eye(5)[:2])) == 2
    mu = mf.Uniform(4).nodes(500)
    for f in (observables.effective_rank, observables.participation_ratio):
        np.testing.assert_allclose(f(mu), 4, rtol=1e-12)


@pytest.mark.parametrize(("n", "distinct"), [(9, True), (9, False), (1300, True)])
def test_gram_statistics_are_those_of_the_gram_matrix(n, distinct):
    """Mean, variance, extremes of ⟨xᵢ,xⱼ⟩ under wᵢwⱼ, with or without the diagonal, against the
    Gram matrix; a token of weight 0 does not count."""
    x, w = tokens(n, n, 3), np.random.default_rng(n).uniform(0.1, 1, size=n)
    w[1] = 0
    x[1] = -x[0]  # would be the minimum
    mu, w = mf.Empirical(x, w), w / w.sum()
    G, counts = x @ x.T, np.outer(w, w)
    if distinct:
        np.fill_diagonal(counts, 0)
    counts /= counts.sum()
    mean = np.sum(counts * G)
    found = observables.gram_statistics(mu, distinct)
    np.testing.assert_allclose(found["mean"], mean, rtol=1e-10)
    np.testing.assert_allclose(found["gap"], 1 - mean, rtol=1e-12)
    np.testing.assert_allclose(found["variance"], np.sum(counts * (G - mean) ** 2))
    np.testing.assert_allclose(found["minimum"], G[counts > 0].min(), rtol=1e-13)
    np.testing.assert_allclose(found["maximum"], G[counts > 0].max(), rtol=1e-13)


def test_gram_statistics_of_collapsed_tokens_keep_their_digits():
    """Tokens at angles ~10⁻⁷: the mean of 1 − ⟨x,y⟩ = |x−y|²/2 is exact, though ⟨x,y⟩ rounds
    to 1."""
    theta = 1e-7 * np.random.default_rng(0).normal(size=20)
    mu = mf.Empirical(mf.sphere.from_angles(theta))
    gaps = 2 * np.sin((theta[:, None] - theta) / 2) ** 2
    exact = gaps.sum() / (20 * 19)
    found = observables.gram_statistics(mu, extremes=False)
    np.testing.assert_allclose(found["gap"], exact, rtol=1e-7)
    assert set(found) == {"gap", "mean", "variance"}
    with pytest.raises(ValueError, match=r"two tokens .* Use `distinct=False`"):
        observables.gram_statistics(mf.Empirical(np.eye(2), [1, 0]))
