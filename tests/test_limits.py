"""The two limits β → ∞: the zero-temperature field and the hardmax over tokens."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reference as ref
from meanformer import Empirical, Hardmax, ZeroTemperature

I3 = np.eye(3)
E = np.eye(4)  # tokens along the axes: exact ties


# -------------------------------------------------------------- zero temperature


@pytest.mark.parametrize("d", [2, 3, 5, 16])
def test_zero_temperature_is_exact_to_rounding(d):
    """χ_∞(x) = P_x V KᵀQx/|KᵀQx| within 8‖V‖ cond(KᵀQ) units of rounding, whatever the
    measure."""
    Q, K, V = ref.matrices(d, d)
    x = ref.tokens(0, 6, d)
    field = ZeroTemperature(Q, K, V)
    v = field.velocity(x, Empirical(ref.tokens(1, 3, d)))
    allowed = 8 * ref.EPS64 * np.linalg.cond(Q.T @ K)
    assert ref.error_norms(v, ref.zero_temperature(x, Q, K, V)).max() <= allowed
    np.testing.assert_array_equal(v, field.velocity(x, Empirical(x)))
    assert np.abs(np.sum(x * v, axis=1)).max() <= 1e-14


def test_zero_temperature_takes_rectangular_queries():
    """Q, K of shape (k, d) with k > d."""
    Q, K, V = ref.matrices(1, 3, 7)
    x = ref.tokens(0, 6, 3)
    v = ZeroTemperature(Q, K, V).velocity(x, Empirical(x))
    allowed = 8 * ref.EPS64 * np.linalg.cond(Q.T @ K)
    assert ref.error_norms(v, ref.zero_temperature(x, Q, K, V)).max() <= allowed


def test_zero_temperature_does_not_confuse_queries_and_keys():
    """The direction is KᵀQx = Bᵀx, not Bx."""
    Q, K, V = ref.matrices(1, 3)
    x = ref.tokens(0, 6, 3)
    v = ZeroTemperature(Q, K, V).velocity(x, Empirical(x))
    w = ZeroTemperature(K, Q, V).velocity(x, Empirical(x))
    assert np.abs(v - w).max() > 0.1


def test_zero_temperature_ignores_the_size_of_queries_and_keys():
    """χ_∞ is of degree 0 in B: 10⁶ B gives the same field."""
    Q, K, V = ref.matrices(1, 3)
    x = ref.tokens(0, 6, 3)
    mu = Empirical(x)
    np.testing.assert_allclose(
        ZeroTemperature(1e6 * Q, K, V).velocity(x, mu),
        ZeroTemperature(Q, K, V).velocity(x, mu),
        rtol=0,
        atol=1e-14 * np.linalg.cond(Q.T @ K),
    )


@pytest.mark.parametrize(
    ("Q", "K"),
    [
        (np.diag([1.0, 1.0, 0.0]), I3),
        (I3[:2], I3[:2]),
        (np.zeros((3, 3)), I3),
        (np.outer([1, 2, 3], [3.0, 2.0, 1.0]), I3),
    ],
)
def test_singular_matrices_are_refused_at_zero_temperature(Q, K):
    message = r"`Q` and `K` must have QᵀK invertible .* singular values are .* finite β"
    with pytest.raises(ValueError, match=message):
        ZeroTemperature(Q, K, np.eye(3))


def test_singular_matrices_under_jit_are_refused_at_run_time():
    build = eqx.filter_jit(lambda Q: ZeroTemperature(Q, I3, I3).Q)
    np.testing.assert_array_equal(build(jnp.asarray(I3)), I3)
    with pytest.raises(RuntimeError, match="must have QᵀK invertible"):
        jax.block_until_ready(build(jnp.zeros((3, 3))))


# ----------------------------------------------------------------------- hardmax


def hardmax_loop(x, y, w, Q, K, V):
    """For each point: the mean of the tokens of largest score, weight 0 left out."""
    out = []
    for point in x:
        scores = {j: (Q @ point) @ (K @ y[j]) for j in range(len(y)) if w[j] > 0}
        top = max(scores.values())
        winners = [j for j, s in scores.items() if s >= top - 1e-14]
        v = V @ sum(w[j] * y[j] for j in winners) / sum(w[j] for j in winners)
        out.append(v - (point @ v) * point)
    return np.array(out)


@pytest.mark.parametrize("d", [2, 3, 16])
def test_hardmax_takes_the_token_of_largest_score(d):
    """Two loops in NumPy; 300 points fill more than one block of 256."""
    Q, K, V = ref.matrices(d, d)
    x, y, w = ref.tokens(0, 300, d), ref.tokens(1, 20, d), ref.weights(0, 20, zeros=5)
    v = Hardmax(Q, K, V).velocity(x, Empirical(y, w))
    np.testing.assert_allclose(
        v, hardmax_loop(x, y, w, Q, K, V), rtol=0, atol=8 * ref.EPS64
    )


def test_ties_are_split_in_proportion_to_the_weights():
    """x at 45° between tokens of weights 1 and 3: P_x (e₀ + 3e₁)/4."""
    x = (E[:1] + E[1:2]) / np.sqrt(2)
    v = Hardmax(E, E, E).velocity(x, Empirical(E[:3], np.array([1.0, 3.0, 9.0])))
    drive = np.array([0.25, 0.75, 0, 0])
    np.testing.assert_allclose(v[0], drive - (drive @ x[0]) * x[0], rtol=0, atol=1e-15)


def test_tokens_of_weight_zero_never_win():
    """A massless token, however near, draws nothing: the far one wins, exactly."""
    x, y = E[:1], np.stack([E[0], -E[0], E[1]])
    for w, winner in (([0, 1, 0], -E[0]), ([0, 2, 1], E[1]), ([1, 2, 1], E[0])):
        v = Hardmax(E, E, E).drive(jnp.asarray(x), Empirical(y, np.array(w, dtype=float)))
        np.testing.assert_array_equal(v[0], winner)


def test_all_tokens_tie_where_the_query_vanishes():
    """KᵀQx = 0: every score is 0, and the drive is V times the mean token."""
    Q = np.diag([0.0, 1.0, 1.0])
    y, w = ref.tokens(0, 5, 3), ref.weights(0, 5)
    v = Hardmax(Q, I3, I3).drive(jnp.asarray(I3[:1]), Empirical(y, w))
    np.testing.assert_allclose(v[0], w @ y, rtol=0, atol=4 * ref.EPS64)


def test_scores_within_the_given_margin_tie():
    """`tie` = τ: scores within τ|KᵀQx| of the largest share, here 1 and cos 0.1 ≈ 0.995."""
    y = np.array([[1, 0], [np.cos(0.1), np.sin(0.1)], [-1, 0]])
    mu, x, eye = Empirical(y), jnp.asarray(y[:1]), np.eye(2)
    near = Hardmax(eye, eye, eye, tie=0.01).drive(x, mu)
    np.testing.assert_allclose(near[0], y[:2].mean(0), rtol=0, atol=4 * ref.EPS64)
    strict = Hardmax(eye, eye, eye, tie=0.0).drive(x, mu)
    np.testing.assert_array_equal(strict, x)


def test_hardmax_does_not_confuse_queries_and_keys():
    """Scores are ⟨x, By⟩: with B = [[0, 1], [0, 0]] only the second coordinate of tokens
    matters, to points with a first coordinate."""
    Q, K = np.eye(2), np.array([[0.0, 1.0], [0.0, 0.0]])
    mu = Empirical(np.array([[1.0, 0.0], [0.0, 1.0]]))
    v = Hardmax(Q, K, np.eye(2)).drive(jnp.asarray([[1.0, 0.0]]), mu)
    np.testing.assert_array_equal(v[0], [0.0, 1.0])


def test_hardmax_rotates_with_the_tokens():
    """χ with (QRᵀ, KRᵀ, RVRᵀ) at xRᵀ = χ(x)Rᵀ."""
    Q, K, V = ref.matrices(3, 3)
    x, R = ref.tokens(0, 12, 3), ref.rotation(0, 3)
    plain = Hardmax(Q, K, V).velocity(x, Empirical(x))
    turned = Hardmax(Q @ R.T, K @ R.T, R @ V @ R.T).velocity(x @ R.T, Empirical(x @ R.T))
    np.testing.assert_allclose(turned, plain @ R.T, rtol=0, atol=1e-14)


def test_derivative_of_the_hardmax_ignores_that_winners_change():
    """d/dV of ⟨c, χ⟩ is that of the fixed winners; in the point only P_x contributes."""
    Q, K, V = ref.matrices(2, 3)
    y = ref.tokens(0, 6, 3)
    x, c = ref.tokens(1, 1, 3), np.array([1.0, -2.0, 0.5])
    mu = Empirical(y)
    winner = y[np.argmax(x[0] @ Q.T @ K @ y.T)]
    slope = jax.grad(lambda V: c @ Hardmax(Q, K, V).tangent(jnp.asarray(x), mu)[0])(
        jnp.asarray(V)
    )
    tangential = c - (c @ x[0]) * x[0]
    np.testing.assert_allclose(slope, np.outer(tangential, winner), rtol=0, atol=1e-14)


@pytest.mark.parametrize("tie", [-1e-3, float("inf"), float("nan")])
def test_margin_of_ties_must_be_finite_and_not_negative(tie):
    with pytest.raises(ValueError, match=r"`tie` must be finite and ≥ 0, but is"):
        Hardmax(I3, I3, I3, tie=tie)


@pytest.mark.parametrize("make", [ZeroTemperature, Hardmax])
def test_matrices_that_do_not_fit_are_refused(make):
    with pytest.raises(ValueError, match=r"`Q` and `K` must have one shape \(k, d\)"):
        make(I3, I3[:2], I3)
    with pytest.raises(ValueError, match=r"`V` must have shape \(d, d\) = \(3, 3\)"):
        make(I3, I3, np.eye(2))
    with pytest.raises(ValueError, match=r"`K` must be finite, .* \(0, 0\) is nan"):
        make(I3, np.full((3, 3), np.nan), I3)
