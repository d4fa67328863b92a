"""Polarised consensus-based dynamics: attention as a special case, sums in NumPy, limits of
the kernel, and where the particles go."""

import functools

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reference as ref
from meanformer import Blockwise, Empirical, SelfAttention, solve
from meanformer.consensus import PolarizedConsensus

N, D = 12, 3
X, W = ref.tokens(0, N, D), ref.weights(0, N, zeros=2)
MU = Empirical(X, W)
EYE = np.eye(D)


@functools.cache
def symmetric(seed, d=D):
    """A symmetric matrix of norm 1, with eigenvalues of both signs."""
    A = np.random.default_rng(seed).normal(size=(d, d))
    A = A + A.T
    return A / np.linalg.norm(A, 2)


class Quadratic(eqx.Module):
    """x ↦ −½⟨x, Ax⟩, or another multiple."""

    A: jax.Array
    factor: float = eqx.field(static=True, default=-0.5)

    def __call__(self, x):
        return self.factor * (x @ self.A @ x)


def bumps(x):
    """No polynomial, with several minima."""
    return jnp.sin(3 * x[0]) + jnp.cos(4 * x[1]) * x[2]


def bumps_numpy(y):
    return np.sin(3 * y[:, 0]) + np.cos(4 * y[:, 1]) * y[:, 2]


def consensus_sums(x, y, w, f, B, beta):
    """c(x) by its definition, all terms with their exponents relative to the largest."""
    r = x[:, None] - y
    s = -beta * np.einsum("mni,ij,mnj->mn", r, B, r) / 2 - beta * f
    s = np.where(w > 0, s, -np.inf)
    a = w * np.exp(s - s.max(axis=1, keepdims=True))
    return (a / a.sum(axis=1, keepdims=True)) @ y


@eqx.filter_jit
def evaluate(field, x, points, weights):
    return field.drive_and_amplitude(x, Empirical(points, weights, check=False))


@eqx.filter_jit
def velocity(field, x, mu):
    return field.velocity(x, mu)


def consensus(field, x=X, y=X, w=W):
    return np.asarray(evaluate(field, *map(jnp.asarray, (x, y, w)))[0])


# ------------------------------------------------------------------------- values


@pytest.mark.parametrize("beta", [0.0, 1.0, 30.0, 1e4])
def test_for_a_quadratic_objective_it_is_self_attention(beta):
    """f = −½⟨x,Bx⟩ with the kernel of B: QᵀK = B, V = I, at tokens and elsewhere, to
    16(1 + β‖B‖) units of rounding, for B of either sign."""
    x = np.concatenate([X, ref.tokens(9, 3, D)])
    for B in (symmetric(1), EYE, -EYE):
        field = PolarizedConsensus(Quadratic(jnp.asarray(B)), B, beta)
        attention = SelfAttention(EYE, B, EYE, beta)
        got, expected = (velocity(f, jnp.asarray(x), MU) for f in (field, attention))
        error = np.abs(got - expected).max()
        assert error <= 16 * (1 + beta) * ref.EPS64


def test_without_noise_the_runs_are_those_of_self_attention():
    """With the same steps, to rounding."""
    B = symmetric(2)
    field = PolarizedConsensus(Quadratic(jnp.asarray(B)), B, 5.0)
    attention = SelfAttention(EYE, B, EYE, 5.0)
    runs = [
        solve(f, MU, [0.0, 2.0], step=0.1, solver=dfx.Heun()) for f in (field, attention)
    ]
    np.testing.assert_allclose(runs[0].xs, runs[1].xs, rtol=0, atol=1e-13)


@pytest.mark.parametrize("beta", [0.0, 2.0, 50.0])
@pytest.mark.parametrize("kernel", ["none", "width", "indefinite"])
def test_consensus_points_are_their_sums(beta, kernel):
    """Any objective: Σ y k e^{−βf}/Σ k e^{−βf}, term by term in NumPy; the amplitude of the
    noise is |x − c|."""
    B = {"none": 0 * EYE, "width": EYE / 0.3**2, "indefinite": symmetric(3)}[kernel]
    field = PolarizedConsensus(bumps, B, beta, Blockwise(5))
    exact = consensus_sums(X, X, W, bumps_numpy(X), B, beta)
    arrays = map(jnp.asarray, (X, X, W))
    c, amplitude = evaluate(field, *arrays)
    units = 16 * (1 + beta * (np.linalg.norm(B, 2) + 4)) * ref.EPS64
    np.testing.assert_allclose(c, exact, rtol=0, atol=units)
    distance = np.linalg.norm(X - exact, axis=1)
    np.testing.assert_allclose(amplitude, distance, rtol=0, atol=2 * units)


def test_a_wide_kernel_is_standard_consensus_based_optimisation():
    """κ → ∞: all particles see one point, at rate κ⁻²; with B = 0 exactly."""
    beta = 4.0
    whole = W * np.exp(-beta * bumps_numpy(X))
    one = whole @ X / whole.sum()
    errors = []
    for kappa in (10.0, 100.0):
        field = PolarizedConsensus(bumps, EYE / (beta * kappa**2), beta)
        errors.append(np.abs(consensus(field) - one).max())
    assert 90 < errors[0] / errors[1] < 110
    exact = consensus(PolarizedConsensus(bumps, 0 * EYE, beta))
    np.testing.assert_allclose(exact, np.tile(one, (N, 1)), rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_particle_sees_its_neighbours_however_much_better_the_others_are(dtype):
    """Two groups at right angles, B = I, β = 2000: e^{−βΔf} = e^{−1000} underflows in both
    precisions, but the kernel e^{−β|x−y|²/2} = e^{−2000} outweighs it: each group's
    consensus point is its own. With Δf = 3 all go to the better one."""
    y = np.asarray([[1, 0, 0], [1, 0, 0], [0, 1, 0]], dtype)
    beta = np.asarray(2000.0, dtype)
    for gap, homes in ((0.5, y), (3.0, y[[2, 2, 2]])):
        height = np.asarray(gap, dtype)
        field = PolarizedConsensus(lambda x, h=height: h * x[0], EYE.astype(dtype), beta)
        c = consensus(field, y, y, np.full(3, 1 / 3, dtype))
        assert c.dtype == dtype
        np.testing.assert_allclose(c, homes, rtol=0, atol=4 * np.finfo(dtype).eps)


# ---------------------------------------------------------------------- symmetries


def test_only_differences_of_the_objective_count():
    """f + constant, f·s with β/s and B·s, and rotations of everything."""
    B, R = symmetric(4), ref.rotation(0, D)
    field = PolarizedConsensus(bumps, B, 6.0)
    c = consensus(field)
    shifted = PolarizedConsensus(lambda x: bumps(x) + 100, B, 6.0)
    np.testing.assert_allclose(consensus(shifted), c, rtol=0, atol=1e-12)
    scaled = PolarizedConsensus(lambda x: 3 * bumps(x), 3 * B, 2.0)
    np.testing.assert_allclose(consensus(scaled), c, rtol=0, atol=1e-14)
    turned = PolarizedConsensus(lambda x: bumps(R.T @ x), R @ B @ R.T, 6.0)
    y = X @ R.T
    np.testing.assert_allclose(consensus(turned, y, y), c @ R.T, rtol=0, atol=1e-13)


def test_particles_find_the_minimum_which_polarisation_keeps_apart():
    """f = −⟨x,a⟩² has two minima ±a. One consensus point for all: all end in one point, next
    to the better placed. A narrow kernel: each half-sphere keeps its own."""
    x0 = ref.tokens(3, 60, D)
    a = EYE[0]
    beta = 30.0

    def end(B):
        field = PolarizedConsensus(Quadratic(jnp.outer(a, a), -1.0), B, beta)
        return np.asarray(solve(field, x0, [0.0, 40.0], save="last").xs[-1])

    one = end(0 * EYE)
    assert np.abs(one - one[0]).max() < 1e-3  # one point
    assert abs(one[0] @ a) > 0.9  # near a minimum
    two = end(EYE / (beta * 0.5**2)) @ a
    assert np.all(np.abs(two) > 0.9)
    assert 0.2 < np.mean(two > 0) < 0.8


# ----------------------------------------------------------------- transformations


def test_gradients_reach_objective_kernel_and_temperature():
    """Along random directions of A in f = −½⟨x,Ax⟩, of B and β, and of the tokens: central
    differences."""
    A, B = jnp.asarray(symmetric(5)), jnp.asarray(symmetric(6))
    weight = np.random.default_rng(0).normal(size=(N, D))

    @jax.jit
    def loss(A, B, beta, x):
        field = PolarizedConsensus(Quadratic(A), B, beta)
        c, amplitude = field.drive_and_amplitude(x, Empirical(x, W, check=False))
        return jnp.sum(weight * c) + jnp.sum(weight[:, 0] * amplitude)

    at = [A, B, jnp.asarray(3.0), jnp.asarray(X)]
    gradients = jax.grad(loss, argnums=(0, 1, 2, 3))(*at)
    for i, g in enumerate(gradients):
        v = np.random.default_rng(i).normal(size=g.shape)
        v = v + v.T if i < 2 else v  # symmetric matrices stay symmetric
        slope = ref.slope(
            lambda s, i=i, v=v: float(loss(*at[:i], at[i] + s * v, *at[i + 1 :])), 1e-3
        )
        assert abs(slope) > 1e-4
        assert abs(np.sum(g * v) - slope) <= 1e-8 * (1 + abs(slope))


def test_batches_of_beta_are_runs_one_by_one():
    B = jnp.asarray(symmetric(7))

    @jax.jit
    def c(beta):
        return PolarizedConsensus(bumps, B, beta).drive(jnp.asarray(X), MU)

    betas = jnp.asarray([0.0, 3.0, 100.0])
    for one, beta in zip(jax.jit(jax.vmap(c))(betas), betas):
        np.testing.assert_allclose(one, c(beta), rtol=0, atol=1e-13)


# ------------------------------------------------------------------------- refusals

BAD = {
    "no function": (
        lambda: PolarizedConsensus(EYE, EYE, 1.0),
        "`objective` must be a fun",
    ),
    "B not symmetric": (
        lambda: PolarizedConsensus(bumps, np.tri(3), 1.0),
        r"`B` must be symmetric.*Use \(B \+ B.T\)/2",
    ),
    "B not square": (lambda: PolarizedConsensus(bumps, EYE[:2], 1.0), r"shape \(d, d\)"),
    "B not finite": (
        lambda: PolarizedConsensus(bumps, np.full((3, 3), np.inf), 1.0),
        "finite",
    ),
    "beta < 0": (lambda: PolarizedConsensus(bumps, EYE, -1.0), "`beta` .* give −f"),
    "a vector of values": (
        lambda: PolarizedConsensus(lambda x: x, EYE, 1.0).velocity(X, MU),
        r"`objective` must return a scalar .* \(3,\)",
    ),
    "infinite values": (
        lambda: PolarizedConsensus(lambda x: jnp.inf * x[0], EYE, 1.0).velocity(X, MU),
        "`objective` must be finite",
    ),
    "tokens of another d": (
        lambda: PolarizedConsensus(bumps, EYE, 1.0).velocity(np.eye(2), MU),
        "d = 3 columns",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused(name):
    """A `ValueError` that names the argument, and says how it should be."""
    make, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        make()
