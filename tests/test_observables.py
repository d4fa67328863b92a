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


@pytest.mark.parametrize("sign", [1, -1])
def test_energy_is_monotone_where_the_field_is_a_gradient(sign):
    """QᵀK symmetric, V = ±QᵀK: E increases (+) or decreases (−) along (SA) and (USA)."""
    B = np.diag([1.0, 0.7, 0.4])
    x0 = mf.Uniform(3).sample(jax.random.key(0), 60)
    for model in (mf.SelfAttention, mf.UnnormalizedSelfAttention):
        field = model(np.eye(3), B, sign * B, 4.0)
        run = mf.solve(
            field,
            x0,
            np.linspace(0, 1, 6),
            observables={"E": lambda mu: observables.energy(mu, np.eye(3), B, 4.0)},
            save="last",
        )
        assert np.all(sign * np.diff(run.observed["E"]) > 0)


def test_unnormalized_field_is_the_gradient_of_the_energy():
    """(USA) with V = B = Bᵀ: n·∇_{xᵢ}E projected on the sphere, by autodiff of E."""
    B = np.diag([1.0, 0.5, -0.3])
    x = mf.Uniform(3).sample(jax.random.key(1), 20)

    def energy(x):
        return observables.energy(mf.Empirical(x, check=False), np.eye(3), B, 3.0)

    slope = x.shape[0] * mf.sphere.project(x, jax.grad(energy)(x))
    field = mf.UnnormalizedSelfAttention(np.eye(3), B, B, 3.0)
    np.testing.assert_allclose(field.velocity(x, mf.Empirical(x)), slope, atol=1e-12)


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


@given(st.integers(1, 60), st.integers(0, 10**6))
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
