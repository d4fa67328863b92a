"""The zero-temperature flow and its push-forward against SciPy's ODE solver, quadrature and
autodiff of the flow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

import meanformer as mf
from meanformer import theory

I3 = np.eye(3)


def from_M(M):
    """Q, K, V with VKᵀQ = M."""
    d = len(M)
    return np.eye(d), np.eye(d), np.asarray(M, float)


# ------------------------------------------------------------------ zero temperature


def reference_flow(x0, t, Q, K, V):
    M, Bt = V @ K.T @ Q, K.T @ Q

    def rhs(_, y):
        x = y.reshape(x0.shape)
        v = (x @ M.T) / np.linalg.norm(x @ Bt.T, axis=1, keepdims=True)
        return (v - np.sum(v * x, 1, keepdims=True) * x).ravel()

    out = scipy.integrate.solve_ivp(
        rhs, (0, t), x0.ravel(), method="DOP853", rtol=1e-12, atol=1e-13
    )
    return out.y[:, -1].reshape(x0.shape)


@pytest.mark.parametrize("d", [2, 3, 5])
@pytest.mark.parametrize("t", [0.3, 4.0])
def test_closed_form_is_the_zero_temperature_flow(d, t):
    """x = e^{Mτ}x₀/|·| with dt = |Bᵀx|dτ against SciPy's ẋ = P_x Mx/|Bᵀx|, general Q, K, V."""
    rng = np.random.default_rng(d)
    Q, K, V = rng.normal(size=(3, d, d))
    x0 = np.asarray(mf.Uniform(d).sample(jax.random.key(d), 8))
    x = theory.zero_temperature_flow(x0, t, Q, K, V)
    np.testing.assert_allclose(x, reference_flow(x0, t, Q, K, V), atol=1e-10)


def test_closed_form_is_a_flow():
    """Φ_{s+t} = Φ_s ∘ Φ_t, Φ_0 = id."""
    rng = np.random.default_rng(5)
    Q, K, V = rng.normal(size=(3, 3, 3))
    x0 = mf.Uniform(3).sample(jax.random.key(1), 8)
    flow = theory.zero_temperature_flow
    np.testing.assert_allclose(flow(x0, 0.0, Q, K, V), x0, atol=1e-15)
    twice = flow(flow(x0, 0.7, Q, K, V), 1.1, Q, K, V)
    np.testing.assert_allclose(flow(x0, 1.8, Q, K, V), twice, atol=1e-12)


def test_closed_form_has_the_right_gradient():
    """∂/∂V, ∂/∂Q, ∂/∂t and the second derivative in t against differences."""
    rng = np.random.default_rng(7)
    Q, K, V, C = rng.normal(size=(4, 3, 3))
    x0 = mf.Uniform(3).sample(jax.random.key(2), 8)

    @jax.jit
    def f(Q, V, t):
        return jnp.sum(C[0] * theory.zero_temperature_flow(x0, t, Q, K, V))

    h, E = 1e-5, np.zeros((3, 3))
    E[1, 2] = 1
    gQ, gV, gt = jax.jit(jax.grad(f, argnums=(0, 1, 2)))(Q, V, 1.3)
    np.testing.assert_allclose(
        gQ[1, 2], (f(Q + h * E, V, 1.3) - f(Q - h * E, V, 1.3)) / (2 * h), rtol=1e-7
    )
    np.testing.assert_allclose(
        gV[1, 2], (f(Q, V + h * E, 1.3) - f(Q, V - h * E, 1.3)) / (2 * h), rtol=1e-7
    )
    np.testing.assert_allclose(
        gt, (f(Q, V, 1.3 + h) - f(Q, V, 1.3 - h)) / (2 * h), rtol=1e-7
    )
    second = jax.jit(jax.jacfwd(jax.jacfwd(f, 2), 2))(Q, V, 1.3)
    h = 1e-3  # error h²f⁗/12 and rounding 4·eps·f/h²
    bend = (f(Q, V, 1.3 + h) - 2 * f(Q, V, 1.3) + f(Q, V, 1.3 - h)) / h**2
    np.testing.assert_allclose(second, bend, rtol=1e-4)


def test_zero_temperature_refuses_singular_and_backward():
    with pytest.raises(ValueError, match="QᵀK invertible"):
        theory.zero_temperature_flow(I3, 1.0, np.diag([1.0, 1, 0]), I3, I3)
    with pytest.raises(ValueError, match=r"`t` must be finite and ≥ 0, but is -1"):
        theory.zero_temperature_flow(I3, -1.0, I3, I3, I3)
    space = theory.dominant_eigenspace(*from_M(np.diag([1.0, 0, 0])))
    with pytest.raises(ValueError, match="orthogonal to it"):
        theory.project_to_dominant([[0.0, 1, 0]], space)


def test_too_few_panels_are_refused():
    """A rotation needs panels in proportion to time; half a turn too few is an error."""
    J = np.array([[0.0, -1], [1, 0]])
    B = np.diag([1.0, 0.5])
    x0 = np.eye(2)
    with pytest.raises(ValueError, match=r"`panels` must be large enough.*8 panels"):
        theory.zero_temperature_flow(
            x0, 100.0, B, np.eye(2), J @ np.linalg.inv(B), panels=8
        )


# ------------------------------------------------------------------ the push-forward


def mild_matrices(seed, d):
    """General Q, K, V that do not squeeze the sphere too hard."""
    return np.eye(d) + 0.3 * np.random.default_rng(seed).normal(size=(3, d, d))


def test_pushforward_has_the_density_of_the_change_of_variables():
    """ρ_t(x) = ρ₀(y)|det DΦ_{−t}(x)| on tangent spaces, with the Jacobian by autodiff of
    the flow."""
    Q, K, V = mild_matrices(11, 3)
    law = mf.VonMisesFisher([0.0, 0.6, 0.8], 2.0)
    moved = theory.zero_temperature_pushforward(law, 0.8, Q, K, V)
    x = mf.Uniform(3).sample(jax.random.key(3), 8)

    @jax.jit
    def reference(x):
        def back(x):
            return theory.zero_temperature_flow(x[None], 0.8, Q, K, -V)[0]

        y = back(x)
        frame, after = (jnp.linalg.svd(p[None])[2][1:] for p in (x, y))
        J = after @ jax.jacfwd(lambda v: back(mf.sphere.exp(x, v @ frame)))(jnp.zeros(2))
        return law.density(y) * jnp.abs(jnp.linalg.det(J))

    exact = jnp.stack([reference(row) for row in x])
    np.testing.assert_allclose(moved.density(x), exact, rtol=1e-10)
    np.testing.assert_allclose(moved.log_density(x), np.log(exact), atol=1e-10)


@pytest.mark.parametrize("d", [2, 3])
def test_pushforward_density_has_mass_one_and_the_moments_of_moved_tokens(d):
    """∫ρ_t = 1 and ∫f ρ_t = ∫f(Φ_t)dµ₀ for f = x and (x⊗x); to the error 1e-8 of
    the product rule on either side (1e-12 with twice the points per axis)."""
    Q, K, V = mild_matrices(d, d)
    law = mf.VonMisesFisher(np.eye(d)[0], 1.5)
    moved = theory.zero_temperature_pushforward(law, 0.3, Q, K, V)
    n = 400 if d == 2 else 40_000
    grid = mf.Uniform(d).nodes(n)
    density = moved.density(grid.points) * mf.sphere.area(d) * grid.weights
    start = grid.points  # the same rule for ∫ f(Φ_t) ρ₀: no law's own nodes
    end = theory.zero_temperature_flow(start, 0.3, Q, K, V)
    mass = law.density(start) * mf.sphere.area(d) * grid.weights
    np.testing.assert_allclose(density.sum(), 1, atol=1e-7)
    np.testing.assert_allclose(density @ grid.points, mass @ end, atol=1e-7)
    np.testing.assert_allclose(
        (density[:, None] * grid.points).T @ grid.points,
        (mass[:, None] * end).T @ end,
        atol=1e-7,
    )
    if d == 3:
        nodes = moved.nodes(n)  # mid-quantiles: second order
        np.testing.assert_allclose(nodes.mean(nodes.points), mass @ end, atol=2e-3)


def test_pushforward_of_tokens_moves_points_and_keeps_weights():
    Q, K, V = from_M(np.diag([-1.0, 1, 2]))
    law = mf.Uniform(3)
    moved = theory.zero_temperature_pushforward(law, 0.5, Q, K, V)
    x = law.sample(jax.random.key(0), 8)
    end = theory.zero_temperature_flow(x, 0.5, Q, K, V)
    np.testing.assert_array_equal(moved.sample(jax.random.key(0), 8), end)
    mu = mf.Empirical(x, np.arange(8.0))
    after = theory.zero_temperature_pushforward(mu, 0.5, Q, K, V)
    np.testing.assert_array_equal(after.points, end)
    np.testing.assert_array_equal(after.weights, mu.weights)
    with pytest.raises(ValueError, match="`mu` must be a law or an `Empirical`"):
        theory.zero_temperature_pushforward(x, 0.5, Q, K, V)
    with pytest.raises(ValueError, match=r"`mu` must be a law on S\^\(d−1\) with d = 3"):
        theory.zero_temperature_pushforward(mf.Uniform(2), 0.5, Q, K, V)
