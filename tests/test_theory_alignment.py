"""Predictions against independent computations: SciPy's ODE solver, quadrature and Schur
form, mpmath, and sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import scipy.stats

import meanformer as mf
from meanformer import theory

I3 = np.eye(3)


def from_M(M):
    """Q, K, V with VKᵀQ = M."""
    d = len(M)
    return np.eye(d), np.eye(d), np.asarray(M, float)


# ------------------------------------------------------------------ dominant space


@pytest.mark.parametrize(
    ("M", "dim", "gap"),
    [
        (np.diag([-1.0, 1, 2]), 1, 1.0),
        (np.diag([2.0, 2, -1]), 2, 3.0),
        ([[0, -1, 0], [1, 0, 0], [0, 0, -2.0]], 2, 2.0),  # ±i
        ([[1, 1, 0], [0, 1, 0], [0, 0, 0.5]], 2, 0.5),  # a Jordan block
        ([[0, -3, 1, 0], [3, 0, 0, 1], [0, 0, 0, -3], [0, 0, 3, 0]], 4, np.inf),
        (np.eye(3), 3, np.inf),
    ],
)
def test_dominant_space_holds_all_eigenvalues_of_largest_real_part(M, dim, gap):
    """dim E counts complex pairs, Jordan blocks and multiplicities."""
    space = theory.dominant_eigenspace(*from_M(M))
    assert space.dim == dim
    np.testing.assert_allclose(space.gap, gap, rtol=1e-6)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("d", [3, 5, 8])
def test_dominant_space_is_that_of_the_ordered_schur_form(seed, d):
    """The first columns of the real Schur form, sorted by real part, span E; the spectral
    projector commutes with M, both projectors are idempotent."""
    rng = np.random.default_rng(seed)
    Q, K, V = rng.normal(size=(3, d, d))
    M = V @ K.T @ Q
    space = theory.dominant_eigenspace(Q, K, V)
    cut = float(space.eigenvalues[space.dim - 1].real) - float(space.gap) / 2
    _, Z, k = scipy.linalg.schur(M, sort=lambda re, im: re > cut)
    assert k == space.dim
    np.testing.assert_allclose(space.projector, Z[:, :k] @ Z[:, :k].T, atol=1e-10)
    np.testing.assert_allclose(space.basis @ space.basis.T, space.projector, atol=1e-10)
    P = space.spectral
    np.testing.assert_allclose(P @ P, P, atol=1e-8)
    np.testing.assert_allclose(P @ M, M @ P, atol=1e-8 * np.linalg.norm(M))
    np.testing.assert_allclose(space.projector @ P, P, atol=1e-9)


def test_dominant_space_can_tell_B_from_its_transpose():
    """E belongs to VKᵀQ, not to VQᵀK."""
    Q, K, V = np.diag([1.0, 2, 3]), np.array([[1.0, 1, 0], [0, 1, 2], [0, 0, 1]]), I3
    E = theory.dominant_eigenspace(Q, K, V, tol=1e-9)
    M = V @ K.T @ Q
    np.testing.assert_allclose(E.projector @ M @ E.basis, M @ E.basis, atol=1e-9)


def test_projector_is_differentiable_where_the_gap_is_open():
    """dP_E/dV, dP_E/dQ, dP_E/dK against central differences."""
    rng = np.random.default_rng(0)
    Q, K, V, W = rng.normal(size=(4, 4, 4))
    dim = theory.dominant_eigenspace(Q, K, V).dim

    def f(Q, K, V):
        return jnp.sum(W * theory.dominant_eigenspace(Q, K, V, dim=dim).projector)

    slopes = jax.grad(f, argnums=(0, 1, 2))(*map(jnp.asarray, (Q, K, V)))
    h = 1e-6
    for which, slope in enumerate(slopes):
        for index in [(0, 1), (2, 0), (3, 3)]:
            ends = []
            for sign in (1, -1):
                moved = [Q.copy(), K.copy(), V.copy()]
                moved[which][index] += sign * h
                ends.append(float(f(*moved)))
            np.testing.assert_allclose(
                slope[index], (ends[0] - ends[1]) / (2 * h), rtol=1e-6, atol=1e-7
            )


def test_a_closed_gap_is_refused():
    with pytest.raises(ValueError, match=r"`dim` must end at a gap.*Use another `dim`"):
        theory.dominant_eigenspace(*from_M(np.diag([1.0, 1, 0])), dim=1)
    with pytest.raises(ValueError, match=r"`dim` must be given under `jit`"):
        jax.jit(lambda V: theory.dominant_eigenspace(I3, I3, V).basis)(I3)


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
    x0 = np.asarray(mf.Uniform(d).sample(jax.random.key(d), 6))
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
    x0 = mf.Uniform(3).sample(jax.random.key(2), 3)

    def f(Q, V, t):
        return jnp.sum(C * theory.zero_temperature_flow(x0, t, Q, K, V, panels=1024))

    h, E = 1e-5, np.zeros((3, 3))
    E[1, 2] = 1
    args = (jnp.asarray(Q), jnp.asarray(V), 1.3)
    gQ, gV, gt = jax.grad(f, argnums=(0, 1, 2))(*args)
    np.testing.assert_allclose(
        gQ[1, 2], (f(Q + h * E, V, 1.3) - f(Q - h * E, V, 1.3)) / (2 * h), rtol=1e-7
    )
    np.testing.assert_allclose(
        gV[1, 2], (f(Q, V + h * E, 1.3) - f(Q, V - h * E, 1.3)) / (2 * h), rtol=1e-7
    )
    np.testing.assert_allclose(
        gt, (f(Q, V, 1.3 + h) - f(Q, V, 1.3 - h)) / (2 * h), rtol=1e-7
    )
    slope = jax.grad(f, argnums=2)
    second = jax.grad(slope, argnums=2)(*args)
    difference = (slope(Q, V, 1.3 + h) - slope(Q, V, 1.3 - h)) / (2 * h)
    np.testing.assert_allclose(second, difference, rtol=1e-6)


def test_projection_on_E_is_conserved_for_symmetric_M_and_is_the_limit():
    """π_E(Φ_t x) = π_E(x) (C15) and Φ_t x → π_E(x), at rate e^{−gap t} for B = I."""
    rng = np.random.default_rng(3)
    R = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    Q, K, V = from_M(R @ np.diag([1.5, 1.5, 0.2, -1]) @ R.T)
    space = theory.dominant_eigenspace(Q, K, V)
    x0 = mf.Uniform(4).sample(jax.random.key(4), 50)
    limit = theory.project_to_dominant(x0, space)
    for t in (0.5, 3.0):
        x = theory.zero_temperature_flow(x0, t, Q, K, V)
        np.testing.assert_allclose(
            theory.project_to_dominant(x, space), limit, atol=1e-12
        )
    gaps = [
        np.linalg.norm(theory.zero_temperature_flow(x0, t, Q, K, V) - limit, axis=1)
        for t in (8.0, 9.0)
    ]
    np.testing.assert_allclose(gaps[1] / gaps[0], np.exp(-float(space.gap)), rtol=1e-3)


def test_projection_on_E_is_not_conserved_for_general_M():
    """The negative of C15: a non-symmetric VBᵀ moves π_E(x)."""
    M = np.array([[1.0, 2, 0], [0, 1, 0.5], [0, 0, 0.2]])
    Q, K, V = from_M(M)
    space = theory.dominant_eigenspace(Q, K, V)
    x0 = mf.Uniform(3).sample(jax.random.key(4), 20)
    moved = theory.zero_temperature_flow(x0, 1.0, Q, K, V)
    shift = theory.project_to_dominant(moved, space) - theory.project_to_dominant(
        x0, space
    )
    assert float(jnp.max(jnp.abs(shift))) > 0.1


def test_zero_temperature_refuses_singular_and_backward():
    with pytest.raises(ValueError, match="QᵀK invertible"):
        theory.zero_temperature_flow(I3, 1.0, np.diag([1.0, 1, 0]), I3, I3)
    with pytest.raises(ValueError, match=r"`t` must be finite and ≥ 0, but is -1"):
        theory.zero_temperature_flow(I3, -1.0, I3, I3, I3)
    space = theory.dominant_eigenspace(*from_M(np.diag([1.0, 0, 0])))
    with pytest.raises(ValueError, match="orthogonal to it"):
        theory.project_to_dominant([[0.0, 1, 0]], space)


def test_share_near_the_axis_is_that_of_uniform_samples():
    """(2/π)arctan(e^{gap t} tan a) against uniform samples moved by e^{Mt}."""
    x = np.asarray(mf.Uniform(3).sample(jax.random.key(0), 100_000))
    for t in (3.0, 5.0, 8.0):
        z = x * np.exp(np.array([-1.0, 1, 2]) * t)
        angle = np.arctan2(np.hypot(z[:, 0], z[:, 1]), np.abs(z[:, 2]))
        share = (angle < 0.01).mean()
        law = float(theory.axis_fraction(0.01, t, 1.0))
        assert abs(share - law) < 5 * np.sqrt(law * (1 - law) / 1e5) + 1e-5


def test_contraction_rate_is_the_spectrum_of_the_linearised_field():
    """Deviations within a tight cluster at z decay at rate ⟨z,Vz⟩: Jacobian of the field of
    one token in the field of a heavy cluster at an eigenvector z of V."""
    V = np.diag([1.0, -1, 2])
    mu = mf.Empirical([[0.0, 0, 1]])
    field = mf.SelfAttention(np.diag([-1.0, -1, 1]), I3, V, 5.0)

    def v(h):
        x = mf.sphere.normalise(jnp.array([[h[0], h[1], 1.0]]))
        return field.tangent(x, mu)[0, :2]

    rate = theory.cluster_contraction_rate(V, [0.0, 0, 1])
    np.testing.assert_allclose(
        jax.jacobian(v)(jnp.zeros(2)), -rate * np.eye(2), atol=1e-12
    )
