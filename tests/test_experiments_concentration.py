"""The experiments of *concentration*: their checks hold in the quick version, and what they
expect is right."""

import math

import numpy as np
import pytest

from helpers import run_quick_version
from meanformer import experiments
from meanformer.experiments import concentration_phases, concentration_theorem

NAMES = [n for n in experiments.REGISTRY if n.startswith("concentration/")]


@pytest.mark.parametrize("name", NAMES)
def test_quick_version_holds_and_writes_what_the_command_promises(name, tmp_path):
    run_quick_version(name, tmp_path)


def test_drift_speed_is_that_of_the_heat_field_where_heights_do_not_matter(monkeypatch):
    """With B₄ = 0 tokens attend to E itself, where µ₀ ∝ 1 + z/2: with f = z/2 the speed is
    (E|∇f|²/(1+f)²)^{1/2}, the mean over µ₀ with its marginal 1 + z E[cos³]/2E[cos²]."""
    monkeypatch.setattr(concentration_theorem, "B", np.array([1.0, 1, 1, 0]))
    z = (np.arange(200_000) + 0.5) / 100_000 - 1
    law = 1 + 0.5 * z * (4 / 3) / (math.pi / 2)
    square = np.mean(0.25 * (1 - z**2) / (1 + 0.5 * z) ** 2 * law) / np.mean(law)
    np.testing.assert_allclose(
        concentration_theorem._drift_speed(), math.sqrt(square), rtol=1e-8
    )


def test_law_of_the_least_distance_has_its_order():
    """min_t of heights and drift ∝ log β/β: with W₂*β/log β between its limits C and 3C/2·2
    (t* between log β and 1.5 log β), and t* increasing by 1 to 1.5 per e-fold of β."""
    C = concentration_theorem._drift_speed()
    laws = [concentration_theorem._law(b, 0.2) for b in (1e3, 1e4)]
    t, w = np.array([(ts[law.argmin()], law.min()) for ts, law in laws]).T
    ratio = w * np.array([1e3, 1e4]) / np.log([1e3, 1e4]) / C
    assert np.all((ratio > 1) & (ratio < 2))
    assert 1 < (t[1] - t[0]) / math.log(10) < 1.5


def test_lowest_and_window_are_exact_for_parabolas_and_exponentials():
    ts = np.linspace(0, 4, 9)
    t, value = concentration_theorem._lowest(ts, np.exp((ts - 1.7) ** 2 + 0.3))
    np.testing.assert_allclose([t, value], [1.7, math.exp(0.3)], rtol=1e-12)
    begin, end = concentration_theorem._window(ts, np.exp(np.abs(ts - 2)), math.exp(1.2))
    np.testing.assert_allclose([begin, end], [0.8, 3.2], rtol=1e-12)
    assert concentration_theorem._window(ts, ts + 1, 0.5) == (math.inf, math.inf)
    assert concentration_theorem._window(ts, np.exp(-ts), 0.2)[1] == math.inf


def test_crossings_are_sought_after_the_peak():
    """Alignment with E_V may be the larger one at the start; ∞ if it never is later."""
    ts = np.arange(5.0)
    along = np.array([[0.2, 0.6, 0.9, 0.5, 0.1], [0.2, 0.6, 0.7, 0.8, 0.9]])
    a = np.stack([1 - along, along, 0 * along], axis=-1)
    peak, cross = concentration_phases._crossings(ts, a)
    np.testing.assert_array_equal(peak, [2, 4])
    np.testing.assert_array_equal(cross, [4, np.inf])
