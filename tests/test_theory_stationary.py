"""Stationary states, the Oja flow, optimal energies and tokens at equal angles against SciPy's
ODE solver and optimiser, exponential integrals of mpmath, NumPy loops and simulations."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import scipy.optimize

import meanformer as mf
from helpers import EPS, central_difference, random_rotation, random_tokens
from meanformer import theory
from reference import attention_velocity, equiangular

I3 = np.eye(3)


def model(seed=0):
    """Q, K and V of one model (d = 3), and a unit eigenvector z of V with Vz = 1.3z; the
    other eigenvalues of V are 0.5 ± i, and V is not normal."""
    rng = np.random.default_rng(seed)
    R = random_rotation(rng, 3)
    V = R @ np.array([[1.3, 0.4, 0.2], [0, 0.5, 1], [0, -1, 0.5]]) @ R.T
    Q, K = rng.normal(size=(2, 3, 3))
    return Q, K, V, R[:, 0]


def assert_same_eigenvalues(computed, expected, tol):
    """Two multisets of complex numbers, matched one to one."""
    cost = np.abs(np.asarray(computed)[:, None] - np.asarray(expected)[None])
    rows, columns = scipy.optimize.linear_sum_assignment(cost)
    assert cost.shape[0] == cost.shape[1]
    assert np.max(cost[rows, columns]) < tol


# ------------------------------------------------------------- residuals and spectra


def test_residual_is_the_speed_of_tokens_that_count():
    """max and √∫|χ|²dµ against NumPy's softmax; a token of weight 0 does not count."""
    rng = np.random.default_rng(1)
    Q, K, V, _ = model()
    x, w = random_tokens(rng, 5, 3), np.array([0.1, 0.2, 0.3, 0.4, 0])
    found = theory.stationarity_residual(
        mf.SelfAttention(Q, K, V, 2.0), mf.Empirical(x, w)
    )
    speed = np.linalg.norm(attention_velocity(w, Q, K, V, 2.0)(0, x), axis=1)
    np.testing.assert_allclose(found.largest, np.max(speed[:4]), rtol=1e-12)
    np.testing.assert_allclose(found.rms, np.sqrt(w @ speed**2), rtol=1e-12)


@pytest.mark.parametrize(
    ("field", "factor"),
    [(mf.SelfAttention, 0.0), (mf.UnnormalizedSelfAttention, 1.0)],
)
def test_spectrum_of_the_consensus_is_that_of_the_value_matrix(field, factor):
    """At δ_z, Vz = λz, n tokens: −λ with multiplicity (n−1)(d−1), and λ_k − λ, for any Q, K,
    β; (USA) times e^{β⟨z,Bz⟩}. λ_k are NumPy's other eigenvalues of V."""
    Q, K, V, z = model()
    beta, n = 0.9, 3
    spectrum = theory.jacobian_spectrum(
        field(Q, K, V, beta), theory.consensus(z, V, copies=n)
    )
    unit = np.exp(factor * beta * z @ Q.T @ K @ z)
    expected = np.array([-1.3] * 4 + [0.5 + 1j - 1.3, 0.5 - 1j - 1.3]) * unit
    assert_same_eigenvalues(spectrum.eigenvalues, expected, 1e-12 * unit)
    assert spectrum.stability == "stable"
    assert float(spectrum.residual) < 1e-14 * unit
    np.testing.assert_allclose(spectrum.growth, -0.8 * unit, rtol=1e-12)


def test_consensus_rates_are_the_spectrum_and_tell_stable_from_unstable():
    """Stable only where λ is positive and exceeds the real parts of all others."""
    Q, K, V, z = model()
    rates = theory.consensus_rates(z, V)
    np.testing.assert_allclose(rates.within, -1.3, rtol=1e-12)
    assert_same_eigenvalues(rates.together, [-0.8 + 1j, -0.8 - 1j], 1e-12)
    assert rates.apart.shape == (0,)
    np.testing.assert_allclose(rates.growth, -0.8, rtol=1e-12)
    D = np.diag([2.0, -1, 2])
    cases = [(1, D, "unstable", 3), (0, D, "neutral", 0), (0, -D, "unstable", 3)]
    for axis, V, answer, growth in cases:
        spectrum = theory.jacobian_spectrum(
            mf.SelfAttention(Q, K, V, 1.0), theory.consensus(I3[axis], V, copies=2)
        )
        assert spectrum.stability == answer
        np.testing.assert_allclose(spectrum.growth, growth, atol=1e-12)
        rates = theory.consensus_rates(I3[axis], V)
        np.testing.assert_allclose(rates.growth, growth, atol=1e-12)


@pytest.mark.parametrize("sign", [1, -1])
def test_spectrum_of_the_bipartite_state_has_three_families(sign):
    """At ½(δ_z + δ_{−z}) with t = tanh(β⟨z,Bz⟩): −λt, (n−2)(d−1) times; λ_k − λt; t(λ_k − λ):
    for B and V that are neither symmetric nor commuting."""
    Q, K, V, z = model()
    beta = 0.7
    spectrum = theory.jacobian_spectrum(
        mf.SelfAttention(sign * Q, K, V, beta),
        theory.bipartite_consensus(z, V, copies=2),
    )
    t = np.tanh(beta * sign * z @ Q.T @ K @ z)
    others = np.array([0.5 + 1j, 0.5 - 1j])
    expected = [[-1.3 * t] * 4, others - 1.3 * t, t * (others - 1.3)]
    assert_same_eigenvalues(spectrum.eigenvalues, np.concatenate(expected), 1e-12)
    rates = theory.bipartite_rates(z, sign * Q, K, V, beta)
    families = [[rates.within] * 4, rates.together, rates.apart]
    assert_same_eigenvalues(np.concatenate(families), np.concatenate(expected), 1e-12)
    np.testing.assert_allclose(rates.growth, spectrum.growth, rtol=1e-12)


def test_bipartite_state_attracts_on_the_eigenvalue_of_largest_modulus():
    """V = diag(−2, 1, ½), B = V, β = 2: the consensus at e₁ is unstable, the bipartite state
    is stable (t = tanh(−4) ≈ −1), and a simulation from nearby returns to it."""
    V = np.diag([-2.0, 1, 0.5])
    assert float(theory.consensus_rates(I3[0], V).growth) > 0
    rates = theory.bipartite_rates(I3[0], I3, V, V, 2.0)
    assert float(rates.growth) < 0
    x0 = np.array([[1.0, 0.1, -0.1], [1, 0.2, 0], [-1, 0.1, 0.1], [-1, 0, 0.2]])
    x0 /= np.linalg.norm(x0, axis=1, keepdims=True)
    field = mf.SelfAttention(I3, V, V, 2.0)
    x = mf.solve(field, x0, [0.0, 4.0, 6.0], rtol=1e-10, atol=1e-10).xs
    # The slowest rate, −0.9987, is that of the common tilt towards e₂: λ₂ − λt = 1 + 2t.
    tilt = np.mean(x[:, :, 1], axis=1)
    np.testing.assert_allclose(np.log(tilt[2] / tilt[1]) / 2, rates.growth, rtol=1e-3)


def test_symmetric_mixtures_of_common_eigenvectors_are_stationary():
    """Σ wⱼ½(δ_{zⱼ} + δ_{−zⱼ}): residual 0 for (SA) and (USA) with any weights; without the
    mirror images it is not."""
    R = random_rotation(np.random.default_rng(2), 3)
    B, V = R @ np.diag([1.0, 2, -1]) @ R.T, R @ np.diag([1, -0.5, 2]) @ R.T
    weights = np.array([0.5, 0.2, 0.3])
    mu = theory.eigenvector_mixture(R.T, I3, B, V, weights)
    np.testing.assert_allclose(mu.weights.sum(), 1, rtol=1e-14)
    for field in (mf.SelfAttention, mf.UnnormalizedSelfAttention):
        found = theory.stationarity_residual(field(I3, B, V, 3.0), mu)
        assert float(found.largest) < 100 * EPS * np.exp(3.0 * 2)
    found = theory.stationarity_residual(
        mf.SelfAttention(I3, B, V, 3.0), mf.Empirical(R.T, weights)
    )
    assert float(found.largest) > 0.01
    z = np.array([[1.0, 0, 0], [0.6, 0.8, 0]])  # eigenvectors of V = I, which attract
    with pytest.raises(
        ValueError, match=r"`z` must have rows with .* = 0, but the largest"
    ):
        theory.eigenvector_mixture(z, I3, I3, I3)


def test_what_is_not_stationary_is_refused():
    Q, K, V, _ = model()
    z = np.array([0.6, 0.8, 0])
    for state in (theory.consensus, theory.bipartite_consensus):
        with pytest.raises(
            ValueError, match=r"`z` must be an eigenvector of `V`, but \|P_z"
        ):
            state(z, V)
    with pytest.raises(ValueError, match=r"`z` must be an eigenvector"):
        theory.consensus_rates(z, V)
    field = mf.SelfAttention(Q, K, V, 1.0)
    with pytest.raises(
        ValueError, match=r"stationary state of the field, but the largest"
    ):
        theory.jacobian_spectrum(field, mf.Empirical(I3))
    with pytest.raises(
        ValueError, match=r"`mu` must be an `Empirical`, but is a Uniform"
    ):
        theory.stationarity_residual(field, mf.Uniform(3))


def test_equilibrium_residual_is_the_speed_of_USA_and_vanishes_at_equilibria():
    """W = e^{βq}/β: ∫|∇W∗µ|²dµ = ∫|χ_USA|²dµ; 0 for one point, for a pole pair and for nodes
    of the uniform law; another kernel against a loop with W' by hand."""
    beta = 2.0

    def kernel(q):
        return jnp.exp(beta * q) / beta

    rng = np.random.default_rng(3)
    x, w = random_tokens(rng, 7, 3), rng.uniform(0.1, 1, 7)
    mu = mf.Empirical(x, w)
    speed = mf.UnnormalizedSelfAttention(I3, I3, I3, beta).velocity(x, mu)
    found = theory.equilibrium_residual(kernel, mu)
    np.testing.assert_allclose(found, mu.mean(jnp.sum(speed**2, 1)), rtol=1e-12)
    assert float(found) > 0.1
    nodes = mf.Uniform(3).nodes(2000)
    for state in (mf.Empirical(x[:1]), mf.Empirical(np.stack([x[0], -x[0]])), nodes):
        assert float(theory.equilibrium_residual(kernel, state)) < 1e-24
    w = w / w.sum()
    total = 0.0
    for i in range(7):
        q = x @ x[i]
        gradient = (w * (3 * q**2 - 1)) @ x  # W = q³ − q
        total += w[i] * np.sum((gradient - (gradient @ x[i]) * x[i]) ** 2)
    found = theory.equilibrium_residual(lambda q: q**3 - q, mu)
    np.testing.assert_allclose(found, total, rtol=1e-12)


# --------------------------------------------------------- Oja flow, eigen-directions


def test_oja_flow_solves_its_equation():
    """ẋ = P_x V x by DOP853, forward and backward; a general V."""
    V = np.random.default_rng(4).normal(size=(3, 3))
    x0 = random_tokens(np.random.default_rng(5), 4, 3)

    def rhs(_, y):
        x = y.reshape(4, 3)
        v = x @ V.T
        return (v - np.sum(v * x, 1, keepdims=True) * x).ravel()

    for t in (0.7, 5.0, -2.0):
        end = scipy.integrate.solve_ivp(
            rhs, (0, t), x0.ravel(), method="DOP853", rtol=3e-14, atol=1e-14
        ).y[:, -1]
        np.testing.assert_allclose(
            theory.oja_flow(x0, t, V), end.reshape(4, 3), atol=1e-12
        )


def test_oja_flow_is_the_path_of_a_collapsed_ensemble():
    """Equal tokens under (SA) at β = 5, general Q and K: the solver's tolerance is 1e−9."""
    Q, K, V, _ = model(6)
    x0 = np.tile(random_tokens(np.random.default_rng(6), 1, 3), (4, 1))
    run = mf.solve(mf.SelfAttention(Q, K, V, 5.0), x0, [0.0, 3.0], rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(run.xs[-1], theory.oja_flow(x0, 3.0, V), atol=1e-8)


def test_oja_flow_neither_overflows_nor_underflows():
    """‖V‖t = 10³ in float64 and float32: a generic start ends on the top eigenvector, an
    eigenvector stays where e^{−gap·t} underflows; a rotation by ωt is exact."""
    V = np.diag([1.0, 0.5, -1])
    for dtype in (np.float64, np.float32):
        x0 = np.array([[0.6, 0.0, 0.8], [-0.6, 0.8, 0], [0, 1, 0], [0, 0, 1]], dtype)
        x = theory.oja_flow(x0, 1000.0, V)
        assert x.dtype == dtype
        ends = [[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, 0, 1]]
        np.testing.assert_allclose(x, np.array(ends, dtype), atol=1e-30)
    turn = np.array([[0.0, -1], [1, 0]])
    x = theory.oja_flow([[1.0, 0]], 1000.0, turn)
    exact = [[np.cos(1000), np.sin(1000)]]
    np.testing.assert_allclose(x, exact, atol=EPS * 1000 * np.sqrt(2) * 4)
    with pytest.raises(
        ValueError, match=r"`panels` must be at least ‖V‖t = 1414.2.*, but is 2"
    ):
        theory.oja_flow([[1.0, 0]], 1000.0, turn, panels=2)


def test_oja_flow_has_its_derivatives():
    """∂/∂t = P_xVx, ∂²/∂t², ∂/∂V against differences, under jit."""
    V = np.random.default_rng(7).normal(size=(3, 3))
    x0, C = random_tokens(np.random.default_rng(8), 2, 3), np.arange(6.0).reshape(2, 3)

    def f(t, s):
        W = jnp.asarray(V).at[0, 1].add(s)
        return jnp.sum(C * theory.oja_flow(x0, t, W, panels=3))

    @jax.jit
    def all_of(t, s):
        value, slopes = jax.value_and_grad(f, argnums=(0, 1))(t, s)
        return value, slopes, jax.grad(jax.grad(f))(t, s)

    t, h = 0.8, 1e-3
    _, slopes, second = all_of(t, 0.0)
    along_t = central_difference(lambda u: all_of(u, 0.0)[0], t, h)
    along_V = central_difference(lambda u: all_of(t, u)[0], 0.0, h)
    np.testing.assert_allclose(slopes, [along_t, along_V], rtol=1e-8)
    twice = central_difference(lambda u: all_of(u, 0.0)[1][0], t, h)
    np.testing.assert_allclose(second, twice, rtol=1e-7)


def test_value_eigenspaces_are_those_of_the_ordered_schur_form():
    """E_V: largest real part; E_|V|: largest modulus. SciPy's sorted Schur form spans the
    same, for general V; examples where the two differ."""
    for seed in range(2):
        V = np.random.default_rng(seed).normal(size=(5, 5))
        values = np.linalg.eigvals(V)
        for modulus, size in ((False, values.real), (True, np.abs(values))):
            basis = theory.value_eigenspace(V, modulus=modulus)
            top = np.max(size) * (1 - 1e-9)
            _, Z, k = scipy.linalg.schur(  # pyright: ignore[reportAssignmentType]
                V,
                sort=lambda re, im, m=modulus, top=top: (
                    (np.hypot(re, im) if m else re) >= top
                ),
            )
            assert basis.shape == (5, k)
            np.testing.assert_allclose(basis @ basis.T, Z[:, :k] @ Z[:, :k].T, atol=1e-9)
    R = random_rotation(np.random.default_rng(9), 3)
    V = R @ np.diag([1.0, -2, 0.5]) @ R.T
    found = [theory.value_eigenspace(V, modulus=m)[:, 0] for m in (False, True)]
    np.testing.assert_allclose(np.abs(R.T @ np.stack(found, 1)), I3[:, :2], atol=1e-12)
    assert theory.value_eigenspace(np.diag([2.0, -2, 1]), modulus=True).shape == (
        3,
        2,
    )
    assert theory.value_eigenspace(-I3, modulus=True).shape == (3, 3)
    with pytest.raises(ValueError, match=r"`dim` must end at a gap in the moduli"):
        theory.value_eigenspace(np.diag([2.0, -2, 1]), modulus=True, dim=1)


# ------------------------------------------------------------------- optimal energies


def brute_force(B, beta, sign, seed, n=6):
    """The best of several optimisations of log ΣΣ wᵢwⱼe^{β⟨xᵢ,Bxⱼ⟩} over tokens and weights."""
    d = len(B)

    def objective(y):
        x = y[: n * d].reshape(n, d)
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
        w = np.exp(y[n * d :] - np.max(y[n * d :]))
        w /= w.sum()
        return -sign * np.log(w @ np.exp(beta * x @ B @ x.T) @ w)

    rng = np.random.default_rng(seed)
    runs = [
        scipy.optimize.minimize(objective, rng.normal(size=n * (d + 1)), method="BFGS")
        for _ in range(8)
    ]
    return -sign * min(run.fun for run in runs)


@pytest.mark.parametrize(
    ("values", "c", "poles", "axis"),
    [
        ([0.5, 1.0, 2.0], 1, 1, 2),  # max, B > 0: a Dirac at the top
        ([-0.5, 1.0, 2.0], 1, 1, 2),
        ([-2.0, -1.0, -0.5], 2, 2, 0),  # max, B < 0: two poles at the bottom
        ([-1.5, -1.0, 0.0], 1, 2, 0),
        ([-2.0, -1.0, -0.5], -1, 1, 0),  # min, B < 0: a Dirac at the bottom
        ([-2.0, -0.5, 1.0], -1, 1, 0),
        ([0.0, 1.0, 2.0], -3, 1, 0),  # min, B ≥ 0 with a kernel
    ],
)
def test_optimal_energy_is_that_found_by_brute_force(values, c, poles, axis):
    """log E of the state, as `log_energy` has it; no configuration of 6 weighted tokens is
    better (to rounding), and the best found comes within 1e−4."""
    beta = 1.5
    R = random_rotation(np.random.default_rng(10), 3)
    B = R @ np.diag(values) @ R.T
    best = theory.energy_optimum(I3, B, c * B, beta)
    log_energy = mf.observables.log_energy(best.state, I3, B, beta)
    np.testing.assert_allclose(best.log_energy, log_energy, rtol=1e-12, atol=1e-13)
    assert int((best.state.weights > 0).sum()) == poles
    np.testing.assert_allclose(np.abs(best.state.points @ R[:, axis]), 1, rtol=1e-10)
    found = brute_force(B, beta, np.sign(c), seed=axis) - np.log(2 * beta)
    advantage = np.sign(c) * (float(best.log_energy) - found)
    assert -1e-9 < advantage < 1e-4


def test_optimal_energy_at_large_beta_and_its_derivative():
    """β = 10⁴: log cosh(2β) − log 2β without overflow, and d/dβ = 2 tanh 2β − 1/β."""
    B = np.diag([-2.0, -1, -0.5])

    def value(beta):
        return theory.energy_optimum(I3, B, B, beta).log_energy

    expected = 2e4 - np.log(2) - np.log(2e4)
    np.testing.assert_allclose(value(1e4), expected, rtol=1e-14)
    slope = jax.jit(jax.grad(value))
    np.testing.assert_allclose(slope(0.3), 2 * np.tanh(0.6) - 1 / 0.3, rtol=1e-12)


def test_unknown_optima_and_other_dynamics_are_refused():
    B = np.diag([0.5, 1.0, 2])
    with pytest.raises(ValueError, match=r"c = -1.0 and eigenvalues \[0.5, 1.0, 2.0\]"):
        theory.energy_optimum(I3, B, -B, 1.0)
    with pytest.raises(ValueError, match=r"it is not known. Compare energies"):
        theory.energy_optimum(I3, np.diag([-2.0, 0, 1]), np.diag([-2.0, 0, 1]), 1.0)
    with pytest.raises(ValueError, match=r"must make a gradient flow, but: .* fails"):
        theory.energy_optimum(I3, B, I3, 1.0)
    with pytest.raises(ValueError, match=r"`beta` must be finite and > 0"):
        theory.energy_optimum(I3, B, B, 0.0)


# ------------------------------------------------------------ tokens at equal angles


@pytest.mark.parametrize("name", ["sa", "usa"])
def test_equiangular_tokens_stay_so_and_obey_the_scalar_equation(name):
    """ρ̇ of the field on equiangular tokens is `equiangular_rate` for all pairs; and two times
    of a run differ by `equiangular_time`. β = 1, n = 4, ρ from −0.2 to beyond 0.5."""
    n, beta = 4, 1.0
    eye = np.eye(n)
    make = {"sa": mf.SelfAttention, "usa": mf.UnnormalizedSelfAttention}[name]
    field = make(eye, eye, eye, beta)
    for rho in (-0.2, 0.0, 0.6):
        x = equiangular(n, rho)
        v = np.asarray(field.velocity(x, mf.Empirical(x)))
        rates = (x @ v.T + v @ x.T)[~np.eye(n, dtype=bool)]
        expected = theory.equiangular_rate(rho, n, beta, name)
        np.testing.assert_allclose(rates, expected, rtol=1e-12)
        log_rate = theory.equiangular_rate(rho, n, beta, name, log=True)
        np.testing.assert_allclose(log_rate, np.log(expected), rtol=1e-12)
    ts = [0.0, 1.0, 2.0]
    run = mf.solve(field, equiangular(n, -0.2), ts, rtol=1e-10, atol=1e-10)
    gram = np.einsum("tid,tjd->tij", run.xs, run.xs)
    rho = gram[:, 0, 1]
    off = gram[:, ~np.eye(n, dtype=bool)]
    np.testing.assert_allclose(off, np.repeat(rho[:, None], n * (n - 1), 1), atol=1e-8)
    assert rho[-1] > 0.5
    times = theory.equiangular_time(-0.2, rho[1:], n, beta, name)
    np.testing.assert_allclose(times, ts[1:], rtol=1e-7)
    back = theory.equiangular_time(rho[1:], -0.2, n, beta, name)
    np.testing.assert_allclose(back, -times, rtol=1e-14)


def test_two_tokens_obey_the_angle_equation_of_two_clusters():
    """n = 2, ρ = cos φ: φ' = −2 sin φ/(1 + e^{β(1−cos φ)}) (erratum E9)."""
    phi, beta = np.linspace(0.1, 3.0, 7), np.array([[0.0], [2.0], [300.0]])
    rate = theory.equiangular_rate(np.cos(phi), 2, beta)
    exact = 2 * np.sin(phi) ** 2 / (1 + np.exp(beta * (1 - np.cos(phi))))
    np.testing.assert_allclose(rate, exact, rtol=1e-11)


def log_time_by_exponential_integrals(rho0, rho1, n, beta, name):
    """log T from partial fractions of dρ/((1−ρ)(1+(n−1)ρ)), with Ei and E₁."""
    with mpmath.workdps(60 + int(2 * beta)):
        a, b, beta = (mpmath.mpf(float(v)) for v in (rho0, rho1, beta))
        lowest = mpmath.mpf(1) / (n - 1)
        r0, r1, s0, s1 = a + lowest, b + lowest, 1 - a, 1 - b
        span = mpmath.log(r1 / r0) + mpmath.log(s0 / s1)
        J = span
        if beta:
            J = mpmath.ei(beta * s0) - mpmath.ei(beta * s1)
            J += mpmath.exp(beta * (1 + lowest)) * (
                mpmath.e1(beta * r0) - mpmath.e1(beta * r1)
            )
        if name == "sa":
            return mpmath.log((J + (n - 1) * span) / (2 * n))
        return mpmath.log(J / 2) - beta


@pytest.mark.parametrize(("n", "name"), [(2, "sa"), (50, "sa"), (3, "usa")])
def test_equiangular_time_is_its_integral_at_any_temperature(n, name):
    """T against exponential integrals with 60 digits and more: relative error below
    8 eps(1 + β + log n); log T in float32 to 1e−5 of max(1, |log T|)."""
    rng = np.random.default_rng(n)
    low = -1 / (n - 1)
    share = np.sort(rng.uniform(0.05, 0.95, size=(4, 2)), 1)
    rho0, rho1 = np.float32(low + (1 - low) * share.T).astype(float)
    rho1[0] = rho0[0] + 2.0**-20  # close together
    rho1[1] = 1 - 2.0**-24  # close to 1; all of these are numbers of float32 too
    beta = np.array([0.0, 2.0**-10, 1.0, 30.0, 300.0])[:, None]
    both = []
    for dtype in (np.float64, np.float32):
        a, b, c = (v.astype(dtype) for v in (rho0, rho1, beta))
        both.append(theory.equiangular_time(a, b, n, c, name, log=True))
    assert both[1].dtype == jnp.float32
    for i, b in enumerate(beta[:, 0]):
        for j in range(len(rho0)):
            exact = log_time_by_exponential_integrals(rho0[j], rho1[j], n, b, name)
            double, single = (mpmath.mpf(float(logs[i, j])) - exact for logs in both)
            assert abs(mpmath.expm1(double)) < 8 * EPS * (1 + b + np.log(n))
            assert abs(single) < 1e-5 * max(1, abs(exact))


def test_leaving_orthogonality_takes_exponential_time():
    """log T = β − log 2β + O(1/β) from ρ = 0, whatever n: at β = 10⁶ no overflow; at β = 0
    T = ½ log of the quotient of (1+(n−1)ρ)/(1−ρ)."""
    n = np.array([2, 50])
    for k in n:
        log_time = theory.equiangular_time(0.0, 0.9, int(k), 1e6, log=True)
        np.testing.assert_allclose(float(log_time) - 1e6, -np.log(2e6), atol=1e-3)
        odds = (1 + (k - 1) * 0.9) / (1 - 0.9)
        np.testing.assert_allclose(
            theory.equiangular_time(0.0, 0.9, int(k), 0.0),
            np.log(odds) / 2,
            rtol=1e-13,
        )


def test_equiangular_time_has_its_derivatives_everywhere():
    """∂T/∂ρ1 = 1/ρ̇(ρ1), ∂T/∂ρ0 = −1/ρ̇(ρ0), also at ρ0 = ρ1 and β = 0, where T is 0; ∂T/∂β
    and ∂²T/∂β² against differences."""
    n = 3

    def T(a, b, beta):
        return theory.equiangular_time(a, b, n, beta)

    slopes = jax.jit(jax.grad(T, argnums=(0, 1)))
    for a, b, beta in [
        (-0.1, 0.7, 4.0),
        (0.2, 0.2, 4.0),
        (0.2, 0.2, 0.0),
        (0.7, 0.1, 2.0),
    ]:
        rates = [theory.equiangular_rate(v, n, beta) for v in (a, b)]
        expected = [-1 / rates[0], 1 / rates[1]]
        if a == b:  # the two orders of the limits take half each of a symmetric formula
            found = slopes(a, b + 1e-9, beta)
            assert np.all(np.isfinite(slopes(a, b, beta)))
            np.testing.assert_allclose(found, expected, rtol=1e-6)
            assert float(T(a, b, beta)) == 0
        else:
            np.testing.assert_allclose(slopes(a, b, beta), expected, rtol=1e-10)
    slope = jax.jit(jax.grad(lambda beta: T(-0.1, 0.7, beta)))
    difference = central_difference(lambda beta: T(-0.1, 0.7, beta), 1.0, 1e-3)
    np.testing.assert_allclose(slope(1.0), difference, rtol=1e-9)
    second = jax.grad(slope)(1.0)
    np.testing.assert_allclose(second, central_difference(slope, 1.0, 1e-3), rtol=1e-8)


def test_equiangular_bad_input_is_refused():
    rate, time = theory.equiangular_rate, theory.equiangular_time
    with pytest.raises(
        ValueError, match=r"`rho` must lie in \[−1/\(n−1\), 1\] = \[-0.5, 1\]"
    ):
        rate(-0.6, 3, 1.0)
    with pytest.raises(
        ValueError, match=r"`model` must be \"usa\" or \"sa\", but is 'SA'"
    ):
        rate(0.1, 3, 1.0, "SA")
    with pytest.raises(ValueError, match=r"`n` must be an integer ≥ 2, but is 1"):
        rate(0.1, 1, 1.0)
    with pytest.raises(ValueError, match=r"`beta` must be finite and ≥ 0, but is -1"):
        rate(0.1, 3, -1.0)
    for ends in [(-0.5, 0.3), (0.3, 1.0)]:
        with pytest.raises(ValueError, match=r"reached in infinite time"):
            time(*ends, 3, 1.0)
    ends = rate(np.array([-0.5, 1.0]), 3, 2.0)  # the simplex and one point do not move
    np.testing.assert_allclose(ends, 0, atol=1e-15)
