"""Assumptions as predicates: examples for which they hold and fail, and the numbers against
NumPy, SciPy quadrature and mpmath."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import scipy.integrate

import meanformer as mf
from helpers import EPS, random_rotation, random_tokens
from meanformer.theory import alignment, assumptions

I3 = np.eye(3)


def rotated(seed, values):
    """A symmetric matrix with the given eigenvalues, and its eigenvectors as columns."""
    R = random_rotation(np.random.default_rng(seed), len(values))
    return R @ np.diag(values) @ R.T, R


# ------------------------------------------------------------------------ matrices


@pytest.mark.parametrize("which", range(3))
def test_assumption_1_rests_on_the_largest_condition_number(which):
    """max cond(Q), cond(K), cond(V), by NumPy; a singular one of the three fails."""
    matrices = np.random.default_rng(0).normal(size=(3, 4, 4))
    verdict = assumptions.invertible_matrices(*matrices)
    assert bool(verdict)
    np.testing.assert_allclose(
        verdict.measured, max(np.linalg.cond(A) for A in matrices), rtol=1e-12
    )
    np.testing.assert_allclose(verdict.threshold, 1 / (4 * EPS), rtol=1e-12)
    matrices[which] = np.diag([1.0, 2, 3, 0])
    verdict = assumptions.invertible_matrices(*matrices)
    assert not verdict
    assert np.isinf(verdict.measured)


def test_assumption_1_wants_square_matrices_and_A1_does_not():
    """Q, K of shape (5, 3): QᵀK is invertible, Q is not; of shape (2, 3) neither."""
    Q, K = np.random.default_rng(1).normal(size=(2, 5, 3))
    assert not assumptions.invertible_matrices(Q, K, I3)
    verdict = assumptions.invertible_product(Q, K)
    assert bool(verdict)
    np.testing.assert_allclose(verdict.measured, np.linalg.cond(Q.T @ K), rtol=1e-12)
    verdict = assumptions.invertible_product(Q[:2], K[:2])
    assert not verdict
    assert float(verdict.measured) > 1 / EPS


def test_single_precision_has_its_own_limit():
    """A condition number of 1e8 is invertible in float64 and not in float32."""
    V = np.diag([1.0, 1, 1e-8])
    assert assumptions.invertible_matrices(I3, I3, V)
    single = (np.asarray(A, np.float32) for A in (I3, I3, V))
    verdict = assumptions.invertible_matrices(*single)
    assert not verdict
    assert verdict.measured.dtype == jnp.float32


@pytest.mark.parametrize("c", [1.0, -1.0, 2.5])
@pytest.mark.parametrize("values", [[3.0, 2, 1], [-3.0, -2, -1], [2.0, -1, 0.5]])
def test_gradient_flow_holds_for_multiples_of_a_symmetric_product(c, values):
    """QᵀK = S, V = cS, with Q and K not symmetric: c and the spectrum are found."""
    S, _ = rotated(2, values)
    Q = np.random.default_rng(3).normal(size=(3, 3))
    flow = assumptions.gradient_flow(Q, np.linalg.solve(Q.T, S), c * S)
    assert bool(flow)
    np.testing.assert_allclose(flow.scale, c, rtol=1e-12)
    np.testing.assert_allclose(flow.eigenvalues, np.sort(values), rtol=1e-11)


def test_gradient_flow_defects_are_the_distance_to_the_nearest_one():
    """B = S + εA, A skew: |B − Bᵀ|/(2|B|) = ε|A|/|B|; V = cS + W, W ⊥ S: |W|/|V|."""
    S, _ = rotated(2, [3.0, 2, 1])
    A = np.array([[0, 1.0, -2], [-1, 0, 0.5], [2, -0.5, 0]])
    flow = assumptions.gradient_flow(I3, S + 0.1 * A, S)
    assert not flow
    expected = 0.1 * np.linalg.norm(A) / np.linalg.norm(S + 0.1 * A)
    np.testing.assert_allclose(flow.symmetry_defect, expected, rtol=1e-12)
    V = -2 * S + A  # ⟨A, S⟩ = 0
    flow = assumptions.gradient_flow(I3, S, V)
    assert not flow
    np.testing.assert_allclose(flow.scale, -2, rtol=1e-12)
    np.testing.assert_allclose(
        flow.value_defect, np.linalg.norm(A) / np.linalg.norm(V), rtol=1e-12
    )
    assert float(flow.verdict.measured) == float(flow.value_defect)
    assert not assumptions.gradient_flow(I3, S, 0 * S)  # V = 0 moves nothing


def test_A2_holds_for_symmetric_M_with_its_gap_and_multiplicity():
    """M = VBᵀ symmetric with eigenvalues (2, 2, ½): m = 2, gap 3/2; and a rotation fails
    with defect 1/√2."""
    M, _ = rotated(4, [2.0, 2, 0.5])
    Q = np.random.default_rng(5).normal(size=(3, 3))
    found = assumptions.symmetric_dominance(Q, I3, M @ np.linalg.inv(Q))
    assert bool(found)
    np.testing.assert_allclose([found.eigenvalue, found.gap], [2, 1.5], rtol=1e-10)
    assert found.multiplicity == 2
    found = assumptions.symmetric_dominance(
        I3, I3, np.array([[1.0, -1, 0], [1, 1, 0], [0, 0, 0]])
    )
    assert not found
    np.testing.assert_allclose(found.verdict.measured, np.sqrt(0.5), rtol=1e-12)
    np.testing.assert_allclose([found.eigenvalue, found.gap], [1, 1], rtol=1e-10)


@pytest.mark.parametrize(("sign", "value", "dim"), [(1, 2.0, 2), (-1, 0.5, 1)])
def test_assumption_4_follows_from_the_gradient_flow_condition(sign, value, dim):
    """Remark 3.8: QᵀK = S > 0 and V = ±S give QᵀK|_E = λI, V|_E = ±λI with the largest
    eigenvalue λ of S for +, the smallest for −."""
    S, _ = rotated(6, [2.0, 2, 0.5])
    found = assumptions.scalar_on_dominant(I3, S, sign * S)
    assert bool(found)
    np.testing.assert_allclose([found.lambda1, found.lambda2], value, rtol=1e-10)
    assert float(found.sign) == sign
    assert float(found.defect) < 1e-9
    assert alignment.dominant_eigenspace(I3, S, sign * S).dim == dim


def test_assumption_4_measures_how_far_it_is_missed():
    """On E = span(e₁, e₂), V = diag(1, 3): λ₂ = 2 and the defect is |(−1, 1)|/|(1, 3)|;
    λ₁ < 0 has defect 1; a coupling out of E counts too."""
    space = alignment.dominant_eigenspace(I3, I3, np.diag([1.0, 1, 0]))
    found = assumptions.scalar_on_dominant(I3, I3, np.diag([1.0, 3, 7]), space)
    assert not found
    np.testing.assert_allclose([found.lambda1, found.lambda2], [1, 2], rtol=1e-12)
    np.testing.assert_allclose(found.defect, np.sqrt(2 / 10), rtol=1e-12)
    found = assumptions.scalar_on_dominant(I3, np.diag([-1.0, -1, 5]), I3, space)
    assert not found
    np.testing.assert_allclose([found.lambda1, found.defect], [-1, 1], atol=1e-12)
    leak = np.eye(3)
    leak[2, 0] = 1.0
    found = assumptions.scalar_on_dominant(I3, leak, I3, space)
    assert not found
    np.testing.assert_allclose(found.defect, np.sqrt(1 / 3), rtol=1e-12)
    assert not assumptions.scalar_on_dominant(I3, np.diag([0.0, 0, 1]), I3, space)


# ------------------------------------------------------------------------ densities


def test_assumption_2_holds_for_von_mises_fisher_with_its_bounds():
    """κ = 5 on S²: f = κe^{κq}/(4π sinh κ), its values at q = ±1 and max κ sinθ f, to the
    distance of the nodes (h ≈ 0.05: the slope is flat to h² at its maximum; the extremes to
    κh²/2)."""
    kappa = 5.0
    found = assumptions.regular_density(mf.VonMisesFisher([0.6, 0, 0.8], kappa), 2000)
    assert bool(found)

    def density(q):
        return kappa * np.exp(kappa * q) / (4 * np.pi * np.sinh(kappa))

    def steepness(a):
        return -kappa * np.sin(a) * density(np.cos(a))

    steepest = -np.min(steepness(np.linspace(0, np.pi, 10_001)))
    np.testing.assert_allclose(found.minimum, density(-1.0), rtol=0.01)
    np.testing.assert_allclose(found.maximum, density(1.0), rtol=0.01)
    np.testing.assert_allclose(found.lipschitz, steepest, rtol=0.01)
    relative = density(-1.0) * 4 * np.pi
    np.testing.assert_allclose(found.verdict.measured, relative, rtol=0.01)


def test_assumption_2_is_exact_for_the_uniform_law():
    found = assumptions.regular_density(mf.Uniform(5))
    assert bool(found)
    area = 8 * np.pi**2 / 3
    np.testing.assert_allclose([found.minimum, found.maximum], 1 / area, rtol=1e-13)
    np.testing.assert_allclose(found.verdict.measured, 1, rtol=1e-13)
    assert float(found.lipschitz) == 0


def test_assumption_2_fails_for_unbounded_and_vanishing_densities_and_for_tokens():
    """g(θ)/(π cos ψ) of scenario 2a diverges at the poles; e^{−2κ} underflows."""
    found = assumptions.regular_density(mf.AzimuthElevation(mf.Uniform(2)))
    assert not found
    assert float(found.minimum) > 0  # it is the refinement that says no
    found = assumptions.regular_density(mf.VonMisesFisher([0.0, 0, 1], 2000.0))
    assert not found
    assert float(found.verdict.measured) == 0
    found = assumptions.regular_density(mf.Empirical(I3))
    assert not found
    assert "tokens have no density" in str(found)


# -------------------------------------------------------------------------- support


def test_assumption_3_measures_the_farthest_token_that_counts():
    """|x − P_E x| = sin(angle to E), the largest over tokens of positive weight."""
    space = alignment.dominant_eigenspace(I3, I3, np.diag([1.0, 1, 0]))
    angle = np.array([0.0, 0.02, 0.3])
    x = np.stack([np.cos(angle), 0 * angle, np.sin(angle)], 1)
    for weights, far in [([1, 0, 0], 0.0), ([1, 1, 0], 0.02), ([1, 1, 1], 0.3)]:
        mu = mf.Empirical(x, np.array(weights, float))
        verdict = assumptions.supported_on_dominant(mu, space)
        np.testing.assert_allclose(verdict.measured, np.sin(far), atol=1e-15)
        assert bool(verdict) == (far == 0)
        assert assumptions.supported_on_dominant(mu, space, tol=0.31)


def test_assumption_5_compares_the_closest_angle_with_the_width_of_the_kernel():
    """Clusters 0.2 apart: separated for 1/√β < 0.2, that is β > 25. Equal tokens, tokens
    within `radius` and tokens of weight 0 are no clusters of their own."""
    theta = np.array([0.0, 0.0, 0.2, 1.5, 1.501, 0.1])
    mu = mf.Empirical(mf.sphere.from_angles(theta), np.array([1.0, 1, 1, 1, 1, 0]))
    verdict = assumptions.separated_clusters(mu, 26.0, radius=0.01)
    assert bool(verdict)
    np.testing.assert_allclose(verdict.measured, 0.2, rtol=1e-12)
    np.testing.assert_allclose(verdict.threshold, 1 / np.sqrt(26), rtol=1e-15)
    assert not assumptions.separated_clusters(mu, 24.0, radius=0.01)
    verdict = assumptions.separated_clusters(mu, 1e4)
    assert not verdict
    np.testing.assert_allclose(verdict.measured, 0.001, rtol=1e-10)
    one = assumptions.separated_clusters(mf.Empirical(I3[:1]), 1.0)
    assert bool(one)
    assert np.isinf(one.measured)


# ------------------------------------------------------------------------- moments


def coordinate_space(d, m):
    """E = span(e₁, …, e_m) in R^d."""
    return alignment.dominant_eigenspace(
        np.eye(d), np.eye(d), np.diag([1.0] * m + [0] * (d - m))
    )


@pytest.mark.parametrize(("d", "m"), [(2, 1), (3, 1), (3, 2), (5, 3), (64, 4)])
def test_moment_of_the_uniform_law_is_a_quotient_of_gamma_functions(d, m):
    """∫|P_E x|^{−p} = Γ((m−p)/2)Γ(d/2)/(Γ(m/2)Γ((d−p)/2)), finite for p < m only."""
    space = coordinate_space(d, m)
    for p in (0.5, m - 0.01):
        found = assumptions.concentration_moment(mf.Uniform(d), space, p)
        assert bool(found)
        with mpmath.workdps(30):
            half = mpmath.mpf(1) / 2
            exact = mpmath.gammaprod(
                [half * (m - p), half * d], [half * m, half * (d - p)]
            )
        np.testing.assert_allclose(found.value, float(exact), rtol=1e-12)
    found = assumptions.concentration_moment(mf.Uniform(d), space, m)
    assert not found
    assert np.isinf(found.value)


def test_moment_of_a_law_off_the_axes_is_its_integral():
    """von Mises–Fisher on S², mean at 40° to the plane E: ∫|P_E x|^{−p}f in polar angles by
    nested Gauss rules, and on S¹ by SciPy's quad with the singularity at its ends."""
    mean = np.array([np.cos(0.7), 0, np.sin(0.7)])
    law = mf.VonMisesFisher(mean, 4.0)
    q, w = np.polynomial.legendre.leggauss(60)
    phi = 2 * np.pi * np.arange(64) / 64
    for p in (0.5, 1.5):
        # t = |sin latitude| = 1 − v⁴: (1 − t²)^{−p/2}dt is smooth in v for these p.
        v = (1 + q) / 2
        t, jacobian = 1 - v**4, 4 * v**3 * w / 2
        c = v**2 * np.sqrt(1 + t)  # = √(1 − t²)
        total = 0.0
        for sign in (1, -1):
            x0 = c[:, None] * np.cos(phi)
            logs = 4 * (mean[0] * x0 + mean[2] * sign * t[:, None])
            inner = np.mean(np.exp(logs), 1) * 2 * np.pi
            total += np.sum(jacobian * c**-p * inner)
        exact = total * 4 / (4 * np.pi * np.sinh(4))
        found = assumptions.concentration_moment(law, coordinate_space(3, 2), p)
        np.testing.assert_allclose(found.value, exact, rtol=1e-9)
    circle = mf.VonMisesFisher(mean[[0, 2]], 2.0)
    exact = 0.0
    for left in (-np.pi / 2, np.pi / 2):
        for side in (1, -1):  # singular where cos θ = 0: at both ends of each half
            end, middle = (
                (left, left + np.pi / 2) if side == 1 else (left, left - np.pi / 2)
            )
            exact += scipy.integrate.quad(
                lambda s, end=end, side=side: (
                    2
                    * s
                    * np.sin(s * s) ** -0.5
                    * np.exp(2 * np.cos(end + side * s * s - 0.7))
                ),
                0,
                np.sqrt(abs(middle - end)),
                epsabs=1e-13,
            )[0]
    exact /= 2 * np.pi * float(mpmath.besseli(0, 2))
    found = assumptions.concentration_moment(circle, coordinate_space(2, 1), 0.5)
    np.testing.assert_allclose(found.value, exact, rtol=1e-9)


def test_moment_of_tokens_is_their_sum_and_ends_on_the_complement():
    """Σ wⱼ|P_E xⱼ|^{−p}; one token on E^⊥ makes it infinite unless it has weight 0; for
    E = R^d it is 1 for any p."""
    x = random_tokens(np.random.default_rng(7), 6, 3)
    w = np.arange(1.0, 7)
    space = coordinate_space(3, 2)
    found = assumptions.concentration_moment(mf.Empirical(x, w), space, 2)
    length = np.linalg.norm(x[:, :2], axis=1)
    np.testing.assert_allclose(found.value, np.sum(w * length**-2.0) / 21, rtol=1e-12)
    assert bool(found)
    with_pole = np.concatenate([x, I3[2:]])
    found = assumptions.concentration_moment(mf.Empirical(with_pole), space, 2)
    assert not found
    assert np.isinf(found.value)
    mu = mf.Empirical(with_pole, np.append(w, 0))
    assert assumptions.concentration_moment(mu, space, 2)
    found = assumptions.concentration_moment(mf.Uniform(3), coordinate_space(3, 3), 7)
    assert bool(found)
    assert float(found.value) == 1


# ------------------------------------------------------------------ verdicts as such


def test_a_verdict_reads_as_one_line():
    verdict = assumptions.invertible_matrices(np.diag([1.0, 1, 3.2]), I3, I3)
    assert str(verdict) == (
        "Assumption 1 (Q, K, V square and invertible) holds: condition number 3.2, at most "
        "1.5e+15"
    )
    found = assumptions.gradient_flow(I3, I3, np.diag([1.0, 2, 3]))
    assert str(found).startswith(
        "Gradient flow (QᵀK = S symmetric, V = cS) fails: relative"
    )


def test_predicates_run_under_jit_and_vmap():
    """The numbers of the eager calls; `bool` waits for concrete values."""
    rng = np.random.default_rng(8)
    V = rng.normal(size=(4, 3, 3))
    mu = mf.Empirical(random_tokens(rng, 5, 3))
    space = coordinate_space(3, 2)

    @jax.jit
    def all_of_them(V):
        return (
            assumptions.invertible_matrices(I3, I3, V),
            assumptions.invertible_product(V, I3),
            assumptions.gradient_flow(I3, I3, V).verdict,
            assumptions.symmetric_dominance(I3, I3, V, space).verdict,
            assumptions.scalar_on_dominant(I3, I3, V, space).verdict,
            assumptions.supported_on_dominant(mu, space),
            assumptions.separated_clusters(mu, V[0, 0] ** 2),
            assumptions.concentration_moment(mu, space, 1).verdict,
        )

    batched = jax.vmap(all_of_them)(V)
    assert "batched" in str(batched[0])
    np.testing.assert_allclose(
        batched[0].measured, [np.linalg.cond(A) for A in V], rtol=1e-12
    )
    with jax.disable_jit():
        eager = all_of_them(V[1])
    for one, many in zip(eager, batched):
        np.testing.assert_allclose(one.measured, many.measured[1], rtol=1e-12)
        assert bool(one) == bool(many.holds[1])


def test_what_cannot_be_judged_is_refused():
    space = coordinate_space(3, 2)
    with pytest.raises(
        ValueError, match=r"`mu` must be an `Empirical`, but is a Uniform"
    ):
        assumptions.supported_on_dominant(mf.Uniform(3), space)  # pyright: ignore
    with pytest.raises(
        ValueError, match=r"`space` must be a subspace of R\^d with d = 2"
    ):
        assumptions.supported_on_dominant(mf.Empirical(np.eye(2)), space)
    with pytest.raises(ValueError, match=r"`space` must be a `DominantSpace`"):
        assumptions.scalar_on_dominant(I3, I3, I3, I3)  # pyright: ignore
    with pytest.raises(ValueError, match=r"`beta` must be finite and > 0, but is 0"):
        assumptions.separated_clusters(mf.Empirical(I3), 0.0)
    with pytest.raises(ValueError, match=r"`mu` must be a law or an `Empirical`"):
        assumptions.regular_density(I3)  # pyright: ignore
    with pytest.raises(ValueError, match=r"`p` must be finite and ≥ 0, but is -1"):
        assumptions.concentration_moment(mf.Uniform(3), space, -1)
