"""Predictions against independent computations: SciPy's ODE solver, quadrature and Schur
form, mpmath, and sampling."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import scipy.stats

import meanformer as mf
from meanformer import theory
from test_theory_zero_temperature import from_M, reference_flow

I3 = np.eye(3)


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


def test_projection_on_E_is_conserved_for_symmetric_M_and_is_the_limit():
    """π_E(Φ_t x) = π_E(x) (C15) and Φ_t x → π_E(x), at rate e^{−gap t} for B = I."""
    rng = np.random.default_rng(3)
    R = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    Q, K, V = from_M(R @ np.diag([1.5, 1.5, 0.2, -1]) @ R.T)
    space = theory.dominant_eigenspace(Q, K, V)
    x0 = mf.Uniform(4).sample(jax.random.key(4), 64)
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
    x0 = mf.Uniform(3).sample(jax.random.key(4), 8)
    moved = theory.zero_temperature_flow(x0, 1.0, Q, K, V)
    shift = theory.project_to_dominant(moved, space) - theory.project_to_dominant(
        x0, space
    )
    assert float(jnp.max(jnp.abs(shift))) > 0.1


def test_non_symmetric_M_with_real_spectrum_may_end_at_the_pole_opposite_to_the_projection():
    """x(t) → P x/|P x| with the spectral projector P, by the sign of the left eigenvector;
    π_E(x) has the sign of the right one, and lies opposite for some tokens (E26)."""
    Q, K, V = from_M([[1.0, 3.0], [0.0, 0.0]])  # E = span e₁, left eigenvector (1, 3)
    space = theory.dominant_eigenspace(Q, K, V)
    x0 = mf.Uniform(2).nodes(8).points
    end = theory.zero_temperature_flow(x0, 40.0, Q, K, V)
    limit = mf.sphere.normalise(x0 @ space.spectral.T)
    np.testing.assert_allclose(end, limit, atol=1e-12)
    opposite = jnp.sum(end * theory.project_to_dominant(x0, space), 1) < -0.999
    assert opposite.any()
    assert not opposite.all()


# ------------------------------------------------------------------ rates and times


def angle_to(projector, x):
    x, P = np.array(x), np.array(projector)
    return np.arctan2(
        np.linalg.norm(x - x @ P.T, axis=-1), np.linalg.norm(x @ P.T, axis=-1)
    )


def test_gap_is_differentiable():
    """d gap/dV by perturbation theory against central differences, non-symmetric M."""
    rng = np.random.default_rng(2)
    Q, K, V, H = rng.normal(size=(4, 4, 4))
    dim = theory.dominant_eigenspace(Q, K, V).dim

    def gap(s):
        return theory.dominant_eigenspace(Q, K, V + s * H, dim=dim).gap

    h = 1e-5
    difference = (gap(h) - gap(-h)) / (2 * h)
    np.testing.assert_allclose(jax.grad(gap)(0.0), difference, rtol=1e-7)


@pytest.mark.parametrize("turning", [False, True])
def test_angle_to_E_decays_at_a_rate_between_the_two(turning):
    """−d log tan angle(x, E)/dt → gap/|Bᵀz|: between slowest and fastest for all tokens,
    also where z turns in E; both are reached at eigenvectors of BBᵀ on E."""
    rng = np.random.default_rng(4)
    block = [[1.0, -2], [2, 1]] if turning else np.eye(2)
    M = scipy.linalg.block_diag(block, [[0.3]])
    S = np.eye(3) + 0.3 * rng.normal(size=(3, 3))
    B = np.diag([1.0, 2.0, 1.5])
    if turning:
        M = S @ M @ np.linalg.inv(S)
    Q, K, V = np.eye(3), B, M @ np.linalg.inv(B.T)
    rates = theory.alignment_rates(Q, K, V)
    space = theory.dominant_eigenspace(Q, K, V)
    x0 = mf.Uniform(3).nodes(64).points
    early, late = (
        np.log(
            np.tan(
                angle_to(space.projector, theory.zero_temperature_flow(x0, t, Q, K, V))
            )
        )
        for t in (6.0, 16.0)
    )
    measured = (early - late) / 10
    assert np.all(measured > rates.slowest * (1 - 1e-3))
    assert np.all(measured < rates.fastest * (1 + 1e-3))
    if not turning:
        np.testing.assert_allclose(
            [rates.slowest, rates.fastest], [0.35, 0.7], rtol=1e-12
        )
        z = np.array([[1.0, 0, 1e-3], [0, 1.0, 1e-3]])  # tan angle is 1e-3
        slow = theory.alignment_time(mf.sphere.normalise(jnp.asarray(z)), 1e-6, Q, K, V)
        np.testing.assert_allclose(
            slow, np.log(1e3) / np.array([rates.fastest, rates.slowest]), rtol=1e-6
        )


@pytest.mark.parametrize("seed", range(4))
def test_alignment_time_is_the_first_time_within_the_angle(seed):
    """On SciPy's solution of ẋ = P_x Mx/|Bᵀx| the angle to E is first equal to the given
    one at that time, for general Q, K, V (of E and F not orthogonal)."""
    rng = np.random.default_rng(seed)
    Q, K, V = rng.normal(size=(3, 3, 3))
    space = theory.dominant_eigenspace(Q, K, V)
    if space.dim == 3:
        pytest.fail("choose another seed")
    x0 = np.asarray(mf.Uniform(3).sample(jax.random.key(seed), 8))
    for level in (0.4, 1e-3):
        times = np.asarray(theory.alignment_time(x0, level, Q, K, V))
        for x, t in zip(x0, times):
            if t == 0:
                assert angle_to(space.projector, x) <= level
                continue
            end = reference_flow(x[None], t, Q, K, V)
            np.testing.assert_allclose(angle_to(space.projector, end), level, rtol=1e-7)
        before = times.min() * 0.98
        if before > 0:
            x = reference_flow(x0, before, Q, K, V)
            assert np.all(angle_to(space.projector, x) > level)


def test_alignment_time_for_orthogonal_B_and_one_gap_is_a_logarithm():
    """M = diag(1, −1, −1), B = I: tan angle = e^{−2t} tan angle₀, from angle π/2 − 1e-8 down
    to 1e-12, in float64 and (to 1e-5) in float32."""
    Q, K, V = from_M(np.diag([1.0, -1, -1]))
    start = np.array([math.pi / 2 - 1e-8, 1.5, 1.0, 0.5, 0.3, 1e-2, 1e-3, 1e-9])
    x0 = np.stack([np.cos(start), np.sin(start), 0 * start], 1)
    for level in (1.4, 0.1, 1e-4, 1e-12):
        exact = np.maximum(np.log(np.tan(start) / np.tan(level)) / 2, 0)
        times = theory.alignment_time(x0, level, Q, K, V)
        np.testing.assert_allclose(times, exact, rtol=1e-9, atol=1e-12)
    small = [np.asarray(a, np.float32) for a in (x0[1:7], Q, K, V)]
    times = theory.alignment_time(small[0], np.float32(1e-4), *small[1:])
    assert times.dtype == np.float32
    exact = np.log(np.tan(start[1:7]) / np.tan(1e-4)) / 2
    np.testing.assert_allclose(times, exact, rtol=1e-5)


def test_tokens_on_E_need_no_time_and_those_without_part_in_it_never_come():
    """0 and ∞, with derivatives 0 and no NaN beside them."""
    Q, K, V = from_M(np.diag([2.0, 1, -1]))
    x0 = jnp.asarray([[1.0, 0, 0], [0, 1, 0], [0, 0.6, 0.8], [0.6, 0.8, 0]])

    def total(x0, V):
        t = theory.alignment_time(x0, 0.1, Q, K, V, dim=1)
        return jnp.sum(jnp.where(jnp.isfinite(t), t, 0)), t

    (gx, gV), t = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(x0, V)
    np.testing.assert_array_equal(t[:3], [0, np.inf, np.inf])
    np.testing.assert_allclose(t[3], np.log(0.8 / 0.6 / np.tan(0.1)), rtol=1e-12)
    np.testing.assert_array_equal(gx[:3], 0)
    np.testing.assert_allclose(
        gx[3] @ np.array([0.8, -0.6, 0]), -1 / (0.6 * 0.8), rtol=1e-10
    )
    assert np.isfinite(gV).all()
    # t = log(tan angle₀/tan 0.1)/(λ₁ − λ₂), and E does not move with λ.
    np.testing.assert_allclose(jnp.diag(gV), [-t[3], t[3], 0], atol=1e-10)
    np.testing.assert_array_equal(theory.alignment_time(x0, 0.1, *from_M(2 * I3)), 0)


@pytest.mark.parametrize("moving", [True, False])
def test_alignment_time_has_the_derivatives_of_the_implicit_function(moving):
    """In x₀ (along the sphere), the angle and V; E moves with V or is held, against times
    found by bisection on the flow."""
    rng = np.random.default_rng(1)
    Q, K, V, H = rng.normal(size=(4, 3, 3))
    x0 = mf.Uniform(3).sample(jax.random.key(5), 8)
    space = theory.dominant_eigenspace(Q, K, V)
    side = mf.sphere.project(x0, jnp.asarray(rng.normal(size=(8, 3))))

    def times(a, b, c):
        x = mf.sphere.normalise(x0 + a * side)
        return theory.alignment_time(
            x, 0.05 + b, Q, K, V + c * H, moving=moving, dim=space.dim
        )

    slopes = jax.jit(jax.jacfwd(times, argnums=(0, 1, 2)))(0.0, 0.0, 0.0)

    def found(shift, i):
        a, b, c = shift
        held = space if not moving else theory.dominant_eigenspace(Q, K, V + c * H)
        x = np.asarray(mf.sphere.normalise(x0 + a * side))

        def excess(t):
            end = theory.zero_temperature_flow(x, t, Q, K, V + c * H)
            return angle_to(held.projector, end)[i] - 0.05 - b

        guess = float(start[i])
        return scipy.optimize.brentq(excess, guess - 0.01, guess + 0.01, xtol=1e-13)

    start = times(0.0, 0.0, 0.0)
    h = 1e-4
    for which, slope in enumerate(slopes):
        for i in (0, 3):
            assert start[i] > 0
            ends = [found(s * h * np.eye(3)[which], i) for s in (1, -1)]
            exact = (ends[0] - ends[1]) / (2 * h)
            np.testing.assert_allclose(slope[i], exact, rtol=1e-5, atol=1e-6)


def test_quantiles_of_uniform_tokens_invert_the_share_near_the_axis():
    """`axis_fraction` at the p-quantile is p, to the error n^{−1/2} of shares of nodes."""
    Q, K, V = from_M(np.diag([-1.0, 1, 2]))
    p = np.array([0.1, 0.5, 0.9, 0.967])
    t = theory.alignment_quantiles(mf.Uniform(3), 0.01, Q, K, V, p)
    np.testing.assert_allclose(theory.axis_fraction(0.01, t, 1.0), p, atol=1e-2)

    def median(second):
        V = jnp.diag(jnp.stack([-1.0, second, 2.0]))
        law = mf.Uniform(3)
        return theory.alignment_quantiles(
            law, 0.01, Q, K, V, [0.5], n=2000, dim=1, panels=64
        )[0]

    # t = log(tan(πp/2)/tan a)/gap, so dt/dλ₂ = t/gap.
    np.testing.assert_allclose(jax.jit(jax.jacfwd(median))(1.0), t[1], rtol=5e-2)


def test_quantiles_of_tokens_are_those_of_their_weighted_times():
    """inf{t: µ(T ≤ t) ≥ p} by counting; ∞ if too few align; weight 0 does not count."""
    Q, K, V = from_M(np.diag([2.0, 1, -1]))
    rng = np.random.default_rng(0)
    x0 = np.array(mf.Uniform(3).sample(jax.random.key(6), 8))
    x0[:2] = [0, 1, 0]
    w = rng.uniform(size=8)
    w[3:5] = 0
    w /= w.sum()
    T = np.asarray(theory.alignment_time(x0, 0.1, Q, K, V))
    p = np.array([0.0, 0.2, 0.5, 1 - w[:2].sum(), 1.0])
    t = theory.alignment_quantiles(mf.Empirical(x0, w), 0.1, Q, K, V, p)
    exact = [min(s for s in T[w > 0] if w[s >= T].sum() >= q - 1e-12) for q in p]
    np.testing.assert_array_equal(t, exact)
    assert np.isinf(t[4])
    assert np.isfinite(t[3])
    with pytest.raises(ValueError, match=r"`probabilities` must lie in \[0, 1\]"):
        theory.alignment_quantiles(mf.Uniform(3), 0.1, Q, K, V, [1.5])
    with pytest.raises(ValueError, match="`mu` must be a law or an `Empirical`"):
        theory.alignment_quantiles(x0, 0.1, Q, K, V, [0.5])
    with pytest.raises(ValueError, match="`angle` must be below π/2"):
        theory.alignment_time(x0, 1.6, Q, K, V)
    with pytest.raises(ValueError, match="`angle` must be finite and > 0, but is 0"):
        theory.alignment_time(x0, 0.0, Q, K, V)


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
