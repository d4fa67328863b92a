"""The experiments of *metastable*: their checks hold in the quick version, and what they
expect is right."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import run_quick_version
from meanformer import Uniform, charts, experiments, observables, theory
from meanformer.experiments import metastable_remainder as remainder
from meanformer.measures import Empirical
from meanformer.sphere import from_angles

NAMES = [n for n in experiments.REGISTRY if n.startswith("metastable/")]


@pytest.mark.parametrize("name", NAMES)
def test_quick_version_holds_and_writes_what_the_command_promises(name, tmp_path):
    run_quick_version(name, tmp_path)


# ------------------------------------------------------------------ what is expected


def test_second_mode_falls_as_the_paper_has_it():
    """B8: k_max = 2 and 3. B14: ×.59 at β = 2, ×.81 at β = 5, from 10⁴ to 10⁷."""
    rates = [remainder._Rates.of(beta) for beta in remainder.BETAS]
    assert [(r.k, r.second) for r in rates] == [(2, 3), (3, 4)]
    falls = [1000**r.exponent for r in rates]
    np.testing.assert_allclose(falls, [0.59, 0.81], atol=0.005)


@pytest.mark.parametrize("beta", [2.0, 5.0])
def test_mean_field_of_modes_is_grenier_s_expansion(beta):
    """From cos θ at 0 all modes are fed; orders beyond 6 are below (αe^{γt})⁷. Halving the
    step leaves 1/16 of the error: order 4."""
    gamma = remainder._Rates.of(beta).gamma
    expansion = theory.grenier_expansion(gamma[1:7], 1)
    alpha, t = 2e-3, 2 / gamma.max()
    c = np.zeros((1, remainder.MODES + 1), complex)
    c[0, 1] = math.pi * alpha  # density (1/2π)(1 + 2c₁ cos θ)
    exact = math.pi * np.asarray(expansion.modes(t, alpha))
    found = [
        remainder._mean_field(c, gamma, np.array([t]), steps)[0] for steps in (8, 16, 64)
    ]
    assert found[0][0] == 1
    np.testing.assert_allclose(found[2][1:7], exact, atol=1e-10, rtol=1e-6)
    errors = [np.abs(f[1:7] - exact).max() for f in found[:2]]
    assert 12 < errors[0] / errors[1] < 20
    linear = remainder._linear(c, gamma, np.array([t]))[0]
    np.testing.assert_allclose(linear[1], exact[0], rtol=1e-3)


def test_mean_field_of_modes_turns_and_reflects_with_its_start():
    """Turning the law by φ multiplies mode m by e^{−imφ}; reflecting conjugates."""
    rng = np.random.default_rng(0)
    rates = remainder._Rates.of(5.0)
    c = rng.normal(size=(3, remainder.MODES + 1, 2)) @ [0.02, 0.02j]
    t = np.array([0.02, 0.05, 0.1])
    turn = np.exp(-1j * 0.7 * np.arange(remainder.MODES + 1))
    end = remainder._mean_field(c, rates.gamma, t)
    for start, there in ((c * turn, end * turn), (c.conj(), end.conj())):
        np.testing.assert_allclose(
            remainder._mean_field(start, rates.gamma, t), there, atol=1e-14
        )
    assert np.abs(end - remainder._linear(c, rates.gamma, t))[:, 1:].max() > 1e-3


def test_end_of_the_linear_phase_is_that_of_the_library():
    """T₁ and |α|, the amplitude of the density, from `theory.exit_times`."""
    n = 3000
    rates = remainder._Rates.of(5.0)
    mu = Empirical(Uniform(2).sample(jax.random.key(4), n))
    c = np.asarray(observables.fourier_spectrum(mu, 60))
    cut, rest = c[: remainder.MODES + 1], c[remainder.MODES + 1 :]
    above = remainder._square(rest, remainder.MODES + 1)
    T1, lead = rates.end(cut[None], np.array([above]), n)
    wanted = theory.exit_times(c, 5.0, 1 / (2 * math.pi), n=n)
    np.testing.assert_allclose(T1, [wanted.T1], rtol=1e-12)
    np.testing.assert_allclose(np.abs(lead) / math.pi, [wanted.alpha], rtol=1e-12)
    # What is left of µ_∞ + the dominant mode is nothing.
    alone = np.zeros((1, remainder.MODES + 1), complex)
    alone[0, 0], alone[0, rates.k] = 1, lead[0]
    assert remainder._square(rates.remainder(alone, lead)) == 0


# ------------------------------------------------------------------ what is measured


def test_modes_are_those_of_the_tokens():
    """Direct sums; tokens at the seams too. Aliasing is at most 2(m/CELLS)²."""
    theta = np.random.default_rng(1).uniform(-np.pi, np.pi, 500)
    theta[:4] = 0, np.pi, -np.pi, np.nextafter(0, -1)
    found = remainder._modes(np.asarray(from_angles(jnp.asarray(theta))))
    m = np.arange(remainder.DEGREE + 1)
    exact = np.exp(-1j * m[:, None] * theta).mean(axis=1)
    bound = 2 * (m / remainder.CELLS) ** 2 + 1e-13
    assert np.all(np.abs(found - exact) < bound)


def test_tokens_of_no_mass_do_not_count():
    """A sample smaller than the program's width is the sample alone."""
    mu = remainder._start(jax.random.key(0), 700)
    assert mu.n == remainder.WIDTH
    np.testing.assert_allclose(np.asarray(mu.weights[:700]), 1 / 700, rtol=1e-12)
    assert not np.asarray(mu.weights[700:]).any()


def test_means_are_unbiased_whatever_the_prediction_is_worth():
    """Exact predictions leave the expected ratio, with no error of the seeds; predictions
    of 0 leave plain means. A prediction that errs by a constant changes nothing."""
    rng = np.random.default_rng(2)
    seen = rng.normal(5, 1, size=(2, 40)) / [[1], [2]]
    draws = np.array([[5.0, 5, 5], [2.0, 2, 2]])
    exact = remainder._Estimate(seen, seen, draws)
    np.testing.assert_allclose(exact.fall(0, 1), [0.4, 0], atol=1e-14)
    blind = remainder._Estimate(seen, 0 * seen, 0 * draws)
    mean, half = blind.plain
    value, width = blind.fall(0, 1)
    np.testing.assert_allclose(value, mean[1] / mean[0], rtol=1e-12)
    np.testing.assert_allclose(width, value * np.hypot(*(half / mean)), rtol=1e-12)
    shifted = remainder._Estimate(seen, seen + 3, draws + 3)
    np.testing.assert_allclose(shifted.means, exact.means, rtol=1e-12)
    # 95 % of such intervals hold the true mean (binomial error .7 %).
    many = rng.exponential(size=(1000, 32)) ** 0.5
    off = np.abs(many.mean(axis=1) - math.sqrt(math.pi) / 2)
    assert 0.93 < np.mean(off < remainder._half_width(many)) < 0.97


# ------------------------------------------------------------------ the rest


def test_sizes_are_powers_below_the_largest():
    full, quick = experiments.Settings(), experiments.Settings(quick=True)
    assert remainder._sizes(full) == [10**4, 10**5, 10**6, 10**7]
    assert remainder._sizes(quick) == [500, 2000, 8000]
    few = experiments.Settings(tokens=5000)
    assert remainder._sizes(few) == [500, 5000]
    with pytest.raises(experiments.BadArgument, match="`tokens` must be at least 5000"):
        remainder._sizes(experiments.Settings(tokens=4999))


def test_float32_is_refused():
    with (
        jax.enable_x64(False),
        pytest.raises(experiments.BadArgument, match="precision"),
    ):
        remainder.remainder(experiments.Settings(quick=True))


def test_intervals_are_drawn_from_y_to_upper():
    curve = charts.Curve([1, 2], [0.5, 1.0], "mean", "interval", upper=[1.5, 3.0])
    (axes,) = charts.panels([charts.Panel("x", "y", [curve])]).axes
    ((dots, _, (bars,)),) = axes.containers
    np.testing.assert_allclose(dots.get_ydata(), [1.0, 2.0])
    ends = np.array([segment[:, 1] for segment in bars.get_segments()])
    np.testing.assert_allclose(ends, [[0.5, 1.5], [1.0, 3.0]])
    assert axes.get_legend_handles_labels()[1] == ["mean"]
