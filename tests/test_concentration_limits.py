"""Parts of the experiments `concentration/fig1`, `fig2`, `fig5`, `fig10`: what they are checked
against, by other means."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import expm

from meanformer import (
    Empirical,
    Mixture,
    SelfAttention,
    Uniform,
    VonMisesFisher,
    theory,
    unroll,
)
from meanformer.experiments import (
    concentration_nonsymmetric as nonsymmetric,
    concentration_pushforward as pushforward,
    concentration_terminal as terminal,
)
from meanformer.experiments.instances import (
    alignments,
    first_ahead,
    uniform_starts,
    unroll_all,
)
from meanformer.transport import wasserstein

# ------------------------------------------------------------------ many runs at once


def test_runs_of_a_batch_are_those_of_unroll():
    """Row by row, with other V, B, β in each, and what `read` makes of them."""
    rng = np.random.default_rng(0)
    V, B, beta = rng.normal(size=(3, 3, 3)), rng.normal(size=(3, 3, 3)), [0.5, 3.0, 9.0]
    x0 = uniform_starts(jax.random.key(0), 3, 20)
    ts, xs = unroll_all(x0, V, B, np.array(beta), 12, 0.1, 4)
    for i in range(3):
        field = SelfAttention(np.eye(3), B[i], V[i], beta[i])
        run = unroll(field, x0[i], 12, 0.1, save=range(0, 13, 4))
        np.testing.assert_allclose(xs[i], run.xs, atol=1e-12)
        np.testing.assert_allclose(ts, run.ts, rtol=1e-12)
    _, means = unroll_all(x0, V, B, np.array(beta), 12, 0.1, 4, _mean)
    np.testing.assert_allclose(means, xs.mean(axis=2), atol=1e-14)


def _mean(xs):
    return xs.mean(axis=1)


def test_alignment_is_one_inside_and_sums_to_one_over_a_basis():
    x = np.asarray(uniform_starts(jax.random.key(1), 2, 50))
    parts = [alignments(x, np.eye(3)[:, [k]]) for k in range(3)]
    np.testing.assert_allclose(np.sum(parts, axis=0), 1, rtol=1e-12)
    np.testing.assert_allclose(alignments(x, np.eye(3)), 1, rtol=1e-12)


def test_first_ahead_is_the_time_after_the_last_loss():
    ts = np.arange(5.0)
    lead = np.array([[1, -1, 1, -1, 1], [1, 1, 1, 1, 1], [-1, -1, -1, -1, -1]])
    np.testing.assert_array_equal(first_ahead(ts, lead), [4, 0, 4])


# ------------------------------------------------------------------ push-forward (fig1)


def test_the_law_of_fig1_is_a_probability_and_the_one_that_is_sampled():
    """Cells sum to one before they are normalised, and agree with `Mixture.density`."""
    nodes = Uniform(3).nodes(20_000)
    x = np.asarray(nodes.points)
    mine = pushforward.initial_density(x)
    total = 4 * np.pi * float(np.asarray(nodes.weights) @ mine)
    np.testing.assert_allclose(total, 1, rtol=1e-10)
    laws = [VonMisesFisher(m, k) for m, k in zip(pushforward.MEANS, pushforward.KAPPAS)]
    law = Mixture(laws, pushforward.WEIGHTS)
    np.testing.assert_allclose(mine[:50], law.density(nodes.points[:50]), rtol=1e-10)


def test_pushed_forward_masses_are_those_of_many_nodes():
    """Against the azimuths φ of weighted nodes of the sphere, by means of e^{ikφ}."""
    theta, mass = pushforward.push_forward(512)
    nodes = Uniform(3).nodes(200_000)
    x = np.asarray(nodes.points)
    w = np.asarray(nodes.weights) * pushforward.initial_density(x)
    azimuth = np.arctan2(x[:, 1], x[:, 0])
    for k in range(5):
        expected = np.exp(1j * k * azimuth) @ w / w.sum()
        np.testing.assert_allclose(mass @ np.exp(1j * k * theta), expected, atol=1e-5)


def test_circle_w1_is_the_exact_distance():
    """Against `wasserstein`, and rotation of a narrow law by a few cells."""
    rng = np.random.default_rng(0)
    theta = 2 * np.pi * (np.arange(64) + 0.5) / 64 - np.pi
    p, q = rng.dirichlet(np.ones(64), 2)
    points = jnp.asarray(np.stack([np.cos(theta), np.sin(theta)], axis=1))
    exact = wasserstein(Empirical(points, p), Empirical(points, q), p=1).value
    np.testing.assert_allclose(pushforward.circle_w1(theta, p, q), exact, rtol=1e-10)
    narrow = np.zeros(64)
    narrow[[0, 1, 63]] = 1 / 3
    turned = pushforward.circle_w1(theta, narrow, np.roll(narrow, 5))
    np.testing.assert_allclose(turned, 5 * 2 * np.pi / 64, rtol=1e-10)


def test_cells_have_equal_area_and_chi_square_its_mean():
    """A constant density; multinomial counts give one per degree of freedom, other laws more."""
    p = pushforward.cell_masses(lambda x: np.ones(len(x)))
    np.testing.assert_allclose(p, 1 / p.size, rtol=1e-10)
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(p.size))
    draws = rng.multinomial(5_000, p, size=400)
    values, degrees = zip(*[pushforward.chi_square(c, p) for c in draws])
    assert len(set(degrees)) == 1
    assert degrees[0] < p.size - 1  # small cells count as one
    spread = np.sqrt(2 / degrees[0] / 400)
    assert abs(np.mean(values) - 1) < 5 * spread
    wrong = pushforward.chi_square(rng.multinomial(5_000, np.roll(p, 1)), p)[0]
    assert wrong > 10


# ------------------------------------------------------------------ no symmetry (fig5)


def test_period_of_a_rotation_is_its_own():
    """V = a + ωJ, B = I: the speed is ω, 2π/ω a turn."""
    V = np.array([[0.3, -0.7, 0], [0.7, 0.3, 0], [0, 0, 0]])
    period = nonsymmetric.zero_temperature_period(V, np.eye(3))
    np.testing.assert_allclose(period, 2 * np.pi / 0.7, rtol=1e-12)


def test_period_of_the_experiment_returns_tokens():
    """Against the closed form of the zero-temperature flow: back after a period, not before."""
    V, B = nonsymmetric.COMPLEX_V, nonsymmetric.COMPLEX_B
    period = nonsymmetric.zero_temperature_period(V, B)
    x0 = jnp.array([[1.0, 0, 0], [0, 1, 0], [0.6, -0.8, 0]])
    flow = theory.zero_temperature_flow
    np.testing.assert_allclose(flow(x0, period, np.eye(3), B, V), x0, atol=1e-8)
    half = np.asarray(flow(x0, period / 2, np.eye(3), B, V))
    np.testing.assert_allclose(half, -np.asarray(x0), atol=1e-8)  # x → −x is a symmetry


def test_share_at_the_opposite_pole_by_matrix_exponentials():
    """e^{Mτ}x for many x; 0 for symmetric M; the angle between e₁ and (1, c) over π."""
    V, B = nonsymmetric.REAL_V, nonsymmetric.REAL_B
    share = nonsymmetric.opposite_pole_share(V, B)
    assert nonsymmetric.opposite_pole_share(V, nonsymmetric.SYMMETRIC_B) < 1e-7
    np.testing.assert_allclose(share, np.arctan(0.4) / np.pi, rtol=1e-10)
    n = 200_000
    x = np.random.default_rng(0).normal(size=(n, 3))
    end = x @ expm(60 * (V @ B.T)).T
    pole = np.array([0.4, 1, 0])
    np.testing.assert_allclose(
        np.mean((end @ pole > 0) != (x @ pole > 0)), share, atol=4 * np.sqrt(share / n)
    )


# ------------------------------------------------------------------ limits (fig2, fig10)


def test_forecast_knows_the_critical_temperature():
    """The bipartite state on E_|V| is stable beyond it and not before; E_V always is."""
    v, b = terminal.SWITCHING
    critical = terminal.switching_beta(v, b)
    beta = critical * np.array([0.999, 1.001])
    found = terminal.forecast(np.array([v] * 2), np.array([b] * 2), beta)
    np.testing.assert_array_equal(found.E_A, [1, 1])
    np.testing.assert_array_equal(found.E_V, [0, 0])
    assert found.at(found.E_A)[0] > 0 > found.at(found.E_A)[1]
    assert (found.at(found.E_V) < 0).all()
    assert np.isinf(found.at(np.array([-1, 0]))[0])


def test_only_the_two_spaces_of_the_conjecture_can_be_stable():
    """200 random diagonal instances at three β: no other axis has a stable state, and names of
    axes do not matter."""
    rng = np.random.default_rng(0)
    v, b = rng.uniform(-1, 1, (2, 200, 3))
    beta = np.repeat([1.0, 3.0, 20.0], [67, 67, 66])
    found = terminal.forecast(v, b, beta)
    for k in range(3):
        other = ~((k == found.E_V) | (k == found.E_A))
        assert (found.growth[other, k] > 0).all()
    turned = terminal.forecast(np.roll(v, 1, axis=1), np.roll(b, 1, axis=1), beta)
    np.testing.assert_allclose(
        turned.growth, np.roll(found.growth, 1, axis=1), atol=1e-12
    )


@pytest.mark.parametrize("case", terminal.CASES, ids=lambda c: c.name)
def test_the_cases_of_fig2_are_what_their_names_say(case):
    """E_V ≠ E_|V| only where the name says so; which of the two states is stable."""
    V = np.diag(case.v)
    same = np.argmax(case.v) == np.argmax(np.abs(case.v))
    assert same != case.modulus
    z = np.eye(3)[np.argmax(np.abs(case.v) if case.modulus else case.v)]
    pair = theory.bipartite_rates(z, np.eye(3), np.diag(case.b), V, case.beta)
    assert (float(pair.growth) < 0) == case.bipartite


def test_limit_axis_needs_almost_all_mass():
    squares = np.array([[0.995, 0.005, 0], [0.98, 0.02, 0], [0, 0, 1.0]])
    np.testing.assert_array_equal(terminal.limit_axis(squares), [0, -1, 2])
