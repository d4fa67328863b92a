"""What the gradient-flow experiments (*concentration*, Figs. 6–9) measure and expect."""

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from scipy.special import ndtri

from meanformer import SelfAttention
from meanformer.experiments.concentration_energy import FIG6, FIG7, FIG8, FIG9
from meanformer.experiments.energy_cases import (
    least_energy,
    mode_variances,
    pole_energy,
    rate,
    token_energy,
    two_pole_distance,
)
from meanformer.measures import Empirical
from meanformer.observables import energy

CASES = {"6": FIG6, "7": FIG7, "8": FIG8, "9": FIG9}


def sphere(seed: int, n: int, d: int = 3) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(n, d))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("axis", [0, 2])
def test_distance_to_two_poles_is_that_of_the_best_assignment(axis):
    """SciPy's assignment of tokens to the poles that π_E gives the start."""
    x0, xs = sphere(0, 40), np.stack([sphere(s, 40) for s in (1, 2, 3)])
    poles = np.sign(x0[:, axis])[:, None] * np.eye(3)[axis]
    expected = []
    for x in xs:
        cost = np.arccos(np.clip(x @ poles.T, -1, 1)) ** 2
        expected.append(np.sqrt(cost[linear_sum_assignment(cost)].mean()))
    np.testing.assert_allclose(two_pole_distance(xs, x0, axis), expected, rtol=1e-12)


def test_energies_are_those_of_the_library():
    """Tokens summed directly, and two poles of unequal mass."""
    x, b, beta = sphere(0, 30), np.array([-1.0, 0.5, 0.3]), 1.7
    expected = 2 * beta * energy(Empirical(x), np.eye(3), np.diag(b), beta)
    np.testing.assert_allclose(token_energy(x, b, beta), expected, rtol=1e-12)
    poles = Empirical(np.eye(3)[[0, 0]] * [[1], [-1]], [0.3, 0.7])
    expected = 2 * beta * energy(poles, np.eye(3), np.diag(b), beta)
    np.testing.assert_allclose(
        pole_energy(np.array([0.3]), -1.0, beta), expected, rtol=1e-12
    )


@pytest.mark.parametrize("beta", [1.0, 4.0])
def test_least_energy_of_a_multiple_of_the_identity_is_that_of_the_uniform_law(beta):
    """2βE = sinh β/β, by Jensen's inequality for a kernel that rotations leave."""
    least, moments = least_energy((1.0, 1.0, 1.0), beta)
    np.testing.assert_allclose(least, np.sinh(beta) / beta, rtol=1e-6)
    np.testing.assert_allclose(moments, 1 / 3, atol=1e-4)


def test_least_energy_is_below_that_of_tokens_and_tends_to_both_limits():
    """No cloud is lower, however stretched; moments ∝ B^{−2} for small β, normal modes for
    large β; a finer grid changes nothing."""
    b = np.array([1.0, 0.8, 0.5])
    least, moments = least_energy((1.0, 0.8, 0.5), 4.0)
    finer, _ = least_energy((1.0, 0.8, 0.5), 4.0, rows=16)
    np.testing.assert_allclose(least, finer, rtol=1e-6)
    for stretch in (1, 1.5, 2, 4):
        x = sphere(0, 600) * [1, 1, stretch]
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        assert token_energy(x, b, 4.0) > least
    flat = least_energy((1.0, 0.8, 0.5), 0.5)[1]
    np.testing.assert_allclose(flat, b**-2 / (b**-2).sum(), atol=2e-3)
    assert flat[2] < moments[2]
    for beta in (16.0, 32.0):
        sharp = least_energy((1.0, 0.8, 0.5), beta)[1]
        law = mode_variances(b, beta)
        np.testing.assert_allclose(sharp[:2], law, rtol=4 / beta)


def velocity(x: np.ndarray, b: np.ndarray, sign: int, beta: float) -> np.ndarray:
    """The field at the tokens themselves, V = sign·B."""
    B = np.diag(b)
    field = SelfAttention(np.eye(len(b)), B, sign * B, beta)
    return np.asarray(field.velocity(x, Empirical(x)))


def test_even_laws_do_not_tell_the_signs_of_b_and_v():
    """(B, V) and (−B, −V) have one field on even tokens: Figures 6 and 7 are one, 8 and 9
    are one. Others tell them apart."""
    x, b = sphere(0, 25), np.array([1.0, 0.7, 0.2])
    even = np.concatenate([x, -x])
    for sign in (1, -1):
        one, other = velocity(even, b, sign, 3.0), velocity(even, -b, sign, 3.0)
        np.testing.assert_allclose(one, other, atol=1e-14)
        np.testing.assert_allclose(one[:25], -one[25:], atol=1e-14)
    assert np.abs(velocity(x, b, 1, 3.0) - velocity(x, -b, 1, 3.0)).max() > 0.1


def modes(b: np.ndarray, beta: float, scale: float, push: float = 0.0) -> np.ndarray:
    """Even tokens at ±z on S¹, normal with `scale` times the predicted variance, all pushed
    along the other axis."""
    width = np.sqrt(scale * mode_variances(b, beta)[0])
    n = 400
    a = width * ndtri((np.arange(n) + 0.5) / n)
    upper = np.stack([a, np.ones(n)], axis=1)
    x = np.concatenate([upper, -upper]) + np.array([push, 0])
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_normal_modes_stand_still():
    """Speeds over those of modes of twice the variance: 0 to first order in 1/β, so that
    four times β is at least three times better."""
    b, quotients = np.array([1.0, 0.4]), []
    for beta in (50.0, 200.0):
        rms = [
            np.sqrt((velocity(modes(b, beta, s), b, -1, beta) ** 2).mean())
            for s in (1, 2)
        ]
        quotients.append(rms[0] / rms[1])
    assert quotients[0] < 0.1
    assert quotients[1] < quotients[0] / 3


def test_a_push_of_normal_modes_grows_as_stated():
    """Mean velocity along the push over the push, for V = −B, B < 0: (λ² − λ_z²)/λ to
    O(1/β); not the rate λ + λ_z of two Diracs."""
    b, push, errors = np.array([1.0, 0.4]), 1e-6, []
    for beta in (25.0, 100.0):
        x = modes(b, beta, 1.0, push)
        mean = x[:, 0].mean()
        growth = velocity(x, -b, -1, beta)[:, 0].mean() / mean
        errors.append(abs(growth - (1 - 0.4**2)))
    assert errors[0] < 0.05
    assert errors[1] < errors[0] / 2


def test_rate_is_the_median_slope_where_it_is_seen():
    ts = np.linspace(0, 5, 21)
    y = np.exp(-np.array([[1.0], [2.0], [7.0]]) * ts)
    np.testing.assert_allclose(rate(ts, y, ts + 0 * y > 1), -2, rtol=1e-9)
    seen = np.zeros_like(y, bool)
    assert np.isnan(rate(ts, y, seen))
    seen[2, :4] = True
    np.testing.assert_allclose(rate(ts, y, seen), -7, rtol=1e-9)


@pytest.mark.parametrize(
    ("name", "spaces"),
    [("6", (0, 0, 0)), ("7", (0, 2, 0)), ("8", (2, 2, 0)), ("9", (2, 0, 0))],
)
def test_each_case_has_the_spaces_that_the_paper_names(name, spaces):
    """E, E_V, E_|V| by the definition: eigenvalues of diagonal matrices, in NumPy."""
    case = CASES[name]
    b, v = np.array(case.b), case.sign * np.array(case.b)
    assert spaces == (np.argmax(v * b), np.argmax(v), np.argmax(np.abs(v)))
    assert tuple(case.axis(s) for s in ("E", "E_V", "E_|V|")) == spaces
