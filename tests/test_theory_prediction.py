"""The report of all phases: each number is that of an independent computation, and each
phase that cannot occur says why."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

import meanformer as mf
from meanformer.theory import predict

I2, I3 = np.eye(2), np.eye(3)


def ring(*angles, sigma=0.2, weights=None):
    """A mixture of wrapped normals on S¹."""
    return mf.Mixture(
        [mf.WrappedNormal([math.cos(a), math.sin(a)], sigma) for a in angles], weights
    )


@pytest.fixture(scope="module")
def aligned():
    """Scenario 1a of *multiscale*: E is the axis e₃."""
    return predict(
        I3, np.diag([-1.0, -1, 1]), np.diag([1.0, -1, 2]), 30.0, mf.Uniform(3), 10_000
    )


@pytest.fixture(scope="module")
def heated():
    """Scenario 2a of *multiscale*: E is the plane of the first two coordinates."""
    W = np.diag([1.0, 1, 0.1])
    law = mf.AzimuthElevation(
        ring(math.pi / 2, 0.0, 4 * math.pi / 3, weights=[0.2, 0.5, 0.3])
    )
    return predict(I3, W, W, 10.0, law, 10_000)


def test_alignment_times_are_those_at_which_shares_are_aligned(aligned):
    """(2/π)arctan(e^t tan a) of uniform tokens are within a of ±e₃ (up to the third
    coordinate, e^{−2t} smaller): inverted at each probability p. The quantile of 4096 tokens
    has the standard error √(p(1−p)/4096)·dt/dp, dt/dp = π/sin πp."""
    phase = aligned.alignment
    p = np.asarray(phase.probabilities)
    expected = np.log(np.tan(np.pi / 2 * p) / np.tan(0.1))
    error = np.sqrt(p * (1 - p) / 4096) * np.pi / np.sin(np.pi * p)
    assert np.all(np.abs(phase.times - expected) < 3 * error)
    np.testing.assert_allclose(phase.rates.slowest, 1, rtol=1e-12)  # B is orthogonal
    np.testing.assert_allclose(phase.coldness, [30, 30], rtol=1e-12)
    assert all(bool(v) for v in phase.assumes)


def test_a_line_has_neither_heat_nor_pairing(aligned):
    """E ∩ S is two points, which are stable if V's eigenvalue there is the largest."""
    assert aligned.alignment.occurs
    assert not aligned.heat.occurs
    assert "E is a line" in aligned.heat.reason
    assert not aligned.pairing.occurs
    assert "antipodal" in aligned.pairing.reason
    # Deviations from ±e₃: −⟨e₃,Ve₃⟩ = −2 within, 1 − 2 and −1 − 2 for the poles.
    np.testing.assert_allclose(aligned.growth, -1, rtol=1e-12)


def test_clusters_dissolve_where_V_prefers_another_direction():
    """V = diag(1, .5, .1), B = diag(.5, 2, .5): E = e₂, but V's largest eigenvalue is that of
    e₁: the poles ±e₂ lose stability at the rate 1 − .5 (tanh of 40 is 1)."""
    p = predict(
        I3, np.diag([0.5, 2, 0.5]), np.diag([1, 0.5, 0.1]), 20.0, mf.Uniform(3), 300
    )
    np.testing.assert_allclose(p.growth, 0.5, rtol=1e-12)
    assert "dissolve at rate 0.5" in str(p)


def test_heat_phase_is_that_of_the_narrowest_cluster(heated):
    """Collapse at βσ²/2; the width of a Gaussian cluster halves where ṡ = −2s/(1+βs) has
    taken s to s/4, here by SciPy."""
    heat = heated.heat
    assert heat.occurs
    np.testing.assert_allclose(heat.collapse, 0.2, rtol=1e-12)
    assert heat.limited_by == "collapse"
    out = scipy.integrate.solve_ivp(
        lambda _, s: -2 * s / (1 + 10 * s),
        (0, float(heat.halving)),
        [0.04],
        rtol=1e-10,
        atol=1e-13,
    )
    np.testing.assert_allclose(out.y[0, -1], 0.01, rtol=1e-7)
    assert heat.noise > heat.collapse


def test_pairing_follows_the_angle_equation(heated):
    """The first of three clusters to merge is the pair .2, .5 at 90°, after the time of
    φ' = −sin φ [1/(1+(a/c)e) + 1/(1+(c/a)e)], e = e^{β(1−cos φ)}, by SciPy; then the rest."""
    phase = heated.pairing
    assert (phase.occurs, phase.clusters) == (True, 3)

    def slowness(phi):
        e = math.exp(10 * (1 - math.cos(phi)))
        return 1 / (math.sin(phi) * (1 / (1 + 0.4 * e) + 1 / (1 + 2.5 * e)))

    time = scipy.integrate.quad(slowness, 0.01, math.pi / 2, epsrel=1e-10)[0]
    np.testing.assert_allclose(phase.log_times[0], math.log(time), rtol=1e-6)
    assert phase.log_times[1] > phase.log_times[0]
    np.testing.assert_allclose(phase.merges.masses[-1], 1, rtol=1e-12)
    np.testing.assert_allclose(phase.angles[0], math.pi / 2, rtol=1e-9)


def test_eigenvalues_of_both_matrices_set_the_clocks():
    """QᵀK = λ₁I, V = λ₂I is β → λ₁β with time λ₂t, in every phase."""
    law = ring(0.3, 2.0, 4.2)
    one = predict(I2, I2, I2, 60.0, law, 1000)
    two = predict(I2, 3 * I2, 2 * I2, 20.0, law, 1000)
    for name in ("time", "collapse", "halving", "noise"):
        a, b = getattr(one.heat, name), getattr(two.heat, name)
        np.testing.assert_allclose(b, a / 2, rtol=1e-10)
    np.testing.assert_allclose(
        two.pairing.log_times, one.pairing.log_times - math.log(2), rtol=1e-9
    )


def test_repulsion_spreads_and_forms_no_clusters():
    """V = −I: cos θ decays like e^{−t/β} on S¹, e^{−2t/β} on S²."""
    for d, rate in ((2, 1), (3, 2)):
        eye = np.eye(d)
        p = predict(eye, eye, -eye, 50.0, mf.Uniform(d), 100)
        np.testing.assert_allclose(p.heat.time, 50 / rate, rtol=1e-12)
        assert not p.alignment.occurs
        assert not p.pairing.occurs
        assert "repel" in p.pairing.reason
        assert p.growth is None


def test_uniform_tokens_cluster_at_the_wavelength_of_the_fastest_mode():
    """k_max = 14 at β = 100 on S¹; the noise of n tokens takes longer for larger n."""
    few = predict(I2, I2, I2, 100.0, mf.Uniform(2), 10**3)
    many = predict(I2, I2, I2, 100.0, mf.Uniform(2), 10**6)
    assert few.pairing.clusters == 14
    np.testing.assert_allclose(few.pairing.angles, [2 * math.pi / 14], rtol=1e-12)
    slope = float(many.heat.time - few.heat.time) / math.log(1000)
    assert 0.9 * math.e / 4 < slope < 1.1 * math.e / 4
    assert few.heat.limited_by == "noise"


def test_a_rotation_keeps_turning_and_fails_assumption_4():
    """Scenario 1b: eigenvalues ±i on E; QᵀK is a turn there, no multiple of I."""
    B = np.array([[0, 1, 0], [-1, 0, 0], [0, 0, -2.0]])
    p = predict(I3, B, I3, 30.0, mf.Uniform(3), 10_000)
    assert p.space.dim == 2
    np.testing.assert_allclose(p.alignment.rotation, 1, rtol=1e-10)
    assert p.alignment.occurs
    assert not p.heat.occurs
    assert "Assumption 4" in p.heat.reason


def test_singular_matrices_have_no_alignment_and_say_so():
    """QᵀK of rank 2: |Bᵀx| vanishes on an axis."""
    p = predict(I3, np.diag([1.0, 1, 0]), np.diag([1.0, 0, 0]), 5.0, mf.Uniform(3), 10)
    assert not p.alignment.occurs
    assert "QᵀK is singular" in p.alignment.reason


def test_a_few_tokens_are_clusters():
    """An `Empirical` of four tokens has no density to heat, and merges as it stands."""
    points = mf.sphere.from_angles([0.0, 0.7, 2.0, 4.0])
    p = predict(I2, I2, I2, 40.0, mf.Empirical(points, [1.0, 2, 3, 4]), 4)
    assert not p.heat.occurs
    assert p.pairing.clusters == 4
    merges = mf.theory.merge_sequence(points, [1.0, 2, 3, 4], 40.0, 1e-2)
    np.testing.assert_allclose(p.pairing.log_times, merges.log_times, rtol=1e-12)


def test_prediction_is_a_pytree_of_finite_numbers(heated, aligned):
    """Arrays only, no NaN; what does not occur is absent."""
    for p in (heated, aligned):
        for leaf in jax.tree.leaves(p):
            assert isinstance(leaf, jax.Array)
            assert not bool(jnp.any(jnp.isnan(leaf)))


def test_report_reads_well(heated, aligned):
    """The text has the three phases, their times, and what they assume."""
    text = str(heated)
    for words in (
        "1. Alignment",
        "50 % within 0.1 rad of E at t = ",
        "2. Heat",
        "limited by collapse",
        "3. Pairing",
        "Assumption 4",
        "Prop. 3.11",
    ):
        assert words in text or words in str(aligned), words
    assert max(map(len, text.splitlines())) < 130
    assert "does not occur: E is a line" in str(aligned)
    assert repr(aligned) == str(aligned)


def test_prediction_is_differentiable():
    """∂(collapse)/∂β = σ²/2; the derivative of an alignment time in V by differences."""
    W = jnp.diag(jnp.array([1.0, 1, 0.1]))
    law = mf.AzimuthElevation(ring(0.0, 2.0, 4.0))

    def collapse(beta):
        return predict(I3, W, W, beta, law, 1000).heat.collapse

    np.testing.assert_allclose(jax.grad(collapse)(10.0), 0.02, rtol=1e-12)

    x = mf.Uniform(3).sample(jax.random.key(1), 9)

    def median(a):
        V = jnp.diag(jnp.array([1.0, -1.0, 2.0])) + a * jnp.eye(3)[::-1]
        p = predict(I3, I3, V, 30.0, mf.Empirical(x), 9, probabilities=[0.5])
        return p.alignment.times[0]

    h = 1e-5
    slope = (median(0.1 + h) - median(0.1 - h)) / (2 * h)
    np.testing.assert_allclose(jax.grad(median)(0.1), slope, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": 0.0}, r"`beta` must be finite and > 0, but is 0.*phases are those of"),
        ({"law": mf.Uniform(2)}, r"`law` must be a measure on S.* d = 3 .* has d = 2"),
        ({"law": "uniform"}, r"`law` must be a law or an `Empirical`, but is a str"),
        ({"n": 0}, r"`n` must be an integer ≥ 1, but is 0"),
        ({"V": np.eye(2)}, r"`V` must have shape \(d, d\) = \(3, 3\)"),
        ({"angle": 2.0}, r"`angle` must be below π/2"),
        ({"probabilities": [1.5]}, r"`probabilities` must lie in \[0, 1\]"),
    ],
)
def test_bad_input_is_refused(change, message):
    arguments = {
        "Q": I3,
        "K": np.diag([1.0, 1, 2]),
        "V": I3,
        "beta": 10.0,
        "law": mf.Uniform(3),
        "n": 100,
    }
    with pytest.raises(ValueError, match=message):
        predict(**arguments | change)


def test_jit_is_refused_with_the_reason():
    """Which phases occur is decided by values."""
    with pytest.raises(ValueError, match="decide which phases occur"):
        jax.jit(lambda b: predict(I3, I3, I3, b, mf.Uniform(3), 10).heat.time)(3.0)
