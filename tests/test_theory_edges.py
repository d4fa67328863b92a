"""Edges of the theory's functions: ends of ranges, ties, dtypes, and arguments that only just
make sense. Numbers by hand or by mpmath, given in each docstring."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

import meanformer as mf
from meanformer import theory

I2, I3 = np.eye(2), np.eye(3)


def on_circle(*angles):
    return mf.sphere.from_angles(np.array(angles, float))


def test_gradients_at_ties_are_those_of_the_formula():
    """dρ̇/dρ = 4/(1 + e²) at the simplex of two tokens, β = 1; dT/dρ₁ = 1/ρ̇ = 2.70321 at
    ρ₁ = ρ₀ = .3 (n = 3, β = 2); d log(speed)/dφ = ∞ at φ = 0; defects have derivative 0 at 0."""
    rate = jax.grad(lambda r: theory.equiangular_rate(r, 2, 1.0))(-1.0)
    np.testing.assert_allclose(rate, 4 / (1 + math.e**2), rtol=1e-12)
    time = jax.grad(lambda r: theory.equiangular_time(0.3, r, 3, 2.0))(0.3)
    np.testing.assert_allclose(time, 1 / theory.equiangular_rate(0.3, 3, 2.0), rtol=1e-12)
    assert jax.grad(lambda a: theory.pair_speed(a, 1.0, log=True))(0.0) == np.inf

    def defect(V):
        return theory.gradient_flow(I2, I2, V).value_defect

    np.testing.assert_array_equal(jax.grad(defect)(jnp.eye(2)), 0)


def test_python_integers_follow_the_dtype_of_arrays():
    """β = 10 is the number 10, not a float64."""
    one = jnp.float32(1)
    for value in (
        theory.heat_variance(one, 1, 10, -1),
        theory.closure_variance(one, 1, 10, 1),
        theory.pair_speed(one, 10),
        theory.equiangular_rate(jnp.float32(0.1), 3, 10),
        theory.noise_time(1000, jnp.float32(50)),
        theory.height_variance(one, 1, 10),
    ):
        assert value.dtype == np.float32


def test_laws_at_beta_or_time_zero():
    """β = 0: heights keep their variance, the mean grows like e^t. t = 0: slopes of bounds are
    one-sided limits: d log bound/dt = L, d(decay)/dt = −p·gap/σ₁ = −1."""
    np.testing.assert_allclose(theory.height_variance(0.3, 1.0, 0.0), 0.3)
    np.testing.assert_allclose(theory.height_amplification(0.3, 1.0, 0.0), math.e)
    slope = jax.grad(lambda t: theory.log_dobrushin_bound(t, 0.1, I3, I3, I3, 1.0))(0.0)
    rate = theory.dobrushin_constants(I3, I3, I3, 1.0).log_rate
    np.testing.assert_allclose(slope, jnp.exp(rate), rtol=1e-12)
    V = np.diag([2.0, 1, 1])
    decay = jax.grad(lambda t: theory.lyapunov_decay(t, 1, I3, I3, V, dim=1))(0.0)
    np.testing.assert_allclose(decay, -1, rtol=1e-12)
    np.testing.assert_array_equal(theory.lyapunov_decay([0.0, 1], 1, I3, I3, I3), [1, 0])


def test_share_near_an_axis_neither_overflows_nor_divides():
    """0 at angle 0, 1 at any other after a long time; gradient 0 there."""
    assert theory.axis_fraction(0.0, 800.0, 1.0) == 0
    np.testing.assert_allclose(theory.axis_fraction(0.1, 800.0, 1.0), 1)
    assert jax.grad(lambda t: theory.axis_fraction(0.1, t, 1.0))(800.0) == 0


def test_pair_angle_keeps_its_accuracy_long_after_the_merge():
    """At small angles φ' = −sin φ: two clusters decay by e^{−250} from t = 151 to 401."""
    late = [float(theory.pair_angle(t, 1.0, 3.0)) for t in (151.0, 401.0)]
    np.testing.assert_allclose(math.log(late[0] / late[1]), 250, rtol=1e-11)


def test_mass_of_wrapped_mixtures_counts_turns():
    """A mean of 40 rad is one of 40 − 12π; variances above 10 are refused."""
    edges = jnp.linspace(-math.pi, math.pi, 9)
    far = theory.wrapped_mixture_mass(edges, [40.0], [0.1], [1.0])
    near = theory.wrapped_mixture_mass(edges, [40 - 12 * math.pi], [0.1], [1.0])
    np.testing.assert_allclose(far, near, atol=1e-13)
    with pytest.raises(ValueError, match=r"`variances` must be at most 10, but is 400"):
        theory.wrapped_mixture_mass(edges, [0.0], [400.0], [1.0])


def test_barenblatt_in_many_dimensions():
    """Finite where |B_n| and powers overflow, and of mass 1: ∫u|S^{n−1}|r^{n−1}dr, in logs."""
    n = 63
    r = np.linspace(0, 14, 200_001)[1:]
    u = np.asarray(theory.barenblatt_density(r, 1.0, 1.0, n))
    log_area = math.log(2) + n / 2 * math.log(math.pi) - math.lgamma(n / 2)
    mass = np.sum(u * np.exp(log_area + (n - 1) * np.log(r))) * (r[1] - r[0])
    np.testing.assert_allclose(mass, 1, rtol=1e-6)
    assert theory.barenblatt_density(jnp.float32(0.1), 1, 1, n).dtype == np.float32
    assert 0 < theory.barenblatt_density(0.1, 1.0, 1.0, 300) < 1


def test_second_eigenvalue_of_a_jordan_block_is_no_gap():
    """J₃(2) ⊕ diag(1, .5) in a random basis: E has dimension 3, which rounding hides or not;
    never is another dimension returned. `tol` above the splitting gives 3 always."""
    J = scipy.linalg.block_diag([[2, 1, 0], [0, 2, 1], [0, 0, 2]], [[1.0]], [[0.5]])
    eye, split = np.eye(5), 0
    for seed in range(6):
        G = np.random.default_rng(seed).normal(size=(5, 5))
        M = G @ J @ np.linalg.inv(G)
        assert theory.dominant_eigenspace(eye, eye, M, tol=1e-3).dim == 3
        real = np.sort(np.linalg.eigvals(M).real)
        if real[-1] - real[-3] > 1e-6 * np.linalg.norm(M):
            split += 1
            with pytest.raises(ValueError, match="rounding alone can open one"):
                theory.dominant_eigenspace(eye, eye, M)
        else:
            assert theory.dominant_eigenspace(eye, eye, M).dim == 3
    assert split > 0


def test_prediction_follows_clusters_where_the_flow_takes_them():
    """V = [[1,0,5],[0,1,0],[0,0,.1]]: not symmetric, so the limit on E is that of the spectral
    projector; the angle between two clusters as in `zero_temperature_flow` at t = 40."""
    V = np.array([[1.0, 0, 5], [0, 1, 0], [0, 0, 0.1]])
    x = np.array([[0, math.cos(0.8), s * math.sin(0.8)] for s in (1, -1)])
    phase = theory.predict(I3, I3, V, 20.0, mf.Empirical(x), 2).pairing
    end = theory.zero_temperature_flow(x, 40.0, I3, I3, V)
    angle = mf.sphere.distance(end[0], end[1])
    np.testing.assert_allclose(phase.angles, [angle], rtol=1e-9)


def test_prediction_takes_weight_zero_antipodes_and_large_beta():
    """Clusters without mass are none; clusters that end antipodal merge until then; contact is
    closer than the waves at β = 3e5; few tokens in many dimensions are no density."""
    three = mf.Empirical(on_circle(0, 0.5, 2), [0.5, 0.5, 0])
    assert theory.predict(I2, I2, I2, 5.0, three, 3).pairing.clusters == 2
    pairs = mf.Empirical(on_circle(0.2, -0.2, math.pi + 0.3, math.pi - 0.3))
    phase = theory.predict(I2, I2, I2, 5.0, pairs, 4).pairing
    assert phase.log_times.shape == (2,)
    assert "in the end two are antipodal" in phase.reason
    opposite = mf.Empirical(on_circle(0, math.pi))
    assert not theory.predict(I2, I2, I2, 5.0, opposite, 2).pairing.occurs
    assert theory.predict(I2, I2, I2, 3e5, mf.Uniform(2), 10**6).pairing.occurs
    eye = np.eye(16)
    heat = theory.predict(eye, eye, eye, 50.0, mf.Uniform(16), 1000).heat
    assert not heat.occurs
    assert "fewer than the waves" in heat.reason


def test_sampling_noise_is_that_of_samples():
    """The relative fluctuation of W_β*µ at one point over 400 samples of 500 uniform tokens on
    S¹, β = 50, against the sum over modes."""
    beta, n = 50.0, 500
    theta = np.random.default_rng(0).uniform(0, 2 * np.pi, (400, n))
    smooth = np.mean(np.exp(beta * (np.cos(theta) - 1)), axis=1)
    fluctuation = smooth.std() / smooth.mean()
    # The standard error of a standard deviation from 400 samples is 3.5 %.
    np.testing.assert_allclose(theory.sampling_noise(n, beta), fluctuation, rtol=0.12)


def test_two_clusters_part_and_tilt_at_different_rates():
    """V = diag(1, .4, .4), B = I, β = 1 at ½(δ_z + δ_{−z}), z = e₁: the axis tilts at t(.4 − 1),
    the angle between the clusters changes at .4 − t, t = tanh 1; by differences of the field."""
    V, h = np.diag([1.0, 0.4, 0.4]), 1e-6
    field, t = mf.SelfAttention(I3, I3, V, 1.0), math.tanh(1.0)
    rates = theory.bipartite_rates(I3[0], I3, I3, V, 1.0)
    for sign, found, exact in (
        (-1, rates.together, t * (0.4 - 1)),
        (1, rates.apart, 0.4 - t),
    ):
        x = mf.sphere.normalise(jnp.array([[1.0, h, 0], [-1, sign * h, 0]]))
        v = field.velocity(x, mf.Empirical(x))
        np.testing.assert_allclose(v[0, 1] / h, exact, rtol=1e-6)
        np.testing.assert_allclose(found.real, exact, rtol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: theory.heat_variance(-1.0, 1.0, 10.0, -1), "`variance` must be ≥ 0"),
        (lambda: theory.height_variance(1.0, 1.0, -1.0), "`beta` must be finite and ≥ 0"),
        (lambda: theory.noise_time(1000.0, 50.0, 64), "`n` must be large enough"),
        (lambda: theory.pairing_limit(on_circle(0, 0, 1), 1.0), "coincident"),
        (lambda: theory.alignment_constant(3.0), r"`p` must lie in \(0, 2\]"),
        (lambda: theory.w2_bound(0.0, 0.0, 1, 1, 1, 1), "`beta` must be > 0"),
        (lambda: theory.barycentre_error_bound(3, 1.0, 0.5), "`ratio` must be ≥ 1"),
        (
            lambda: theory.rescaled_field_limit(
                [[math.cos(2.5), math.sin(2.5), 0]], mf.HeatKernel([1.0, 0, 0], 0.05), 1
            ),
            "so far from the mean",
        ),
        (
            lambda: theory.density_range(mf.HeatKernel([1.0, 0, 0], 0.02)),
            "so far from the mean",
        ),
        (
            lambda: theory.grenier_expansion(
                theory.growth_rates(5.0, 2, 3 * np.arange(1, 5)), 3
            ).modes(60.0, 1e-3),
            "`t` must be small enough",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
