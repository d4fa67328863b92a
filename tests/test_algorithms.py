"""The algorithms of *concentration*, App. C.1, written out in NumPy, against `unroll`.

The pseudocode is missing from the text; what it says of it: explicit Euler steps of (1),
softmax, projection on the tangent space, normalisation; Algorithm 2 has the zero-temperature
field in place of the softmax, and a hardmax is not the same."""

import diffrax
import numpy as np
import pytest

import meanformer as mf
from helpers import random_tokens

D, N, STEP = 3, 40, 0.1
RNG = np.random.default_rng(5)
Q, K, V = RNG.normal(size=(3, D, D))
X = random_tokens(RNG, N, D)


def normalised(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def euler(x, F, project):
    """N(x + h P_x F), or without P_x."""
    if project:
        F = F - np.sum(x * F, axis=1, keepdims=True) * x
    return normalised(x + STEP * F)


def softmax_step(x, beta, project=True):
    """Algorithm 1: lines 2–3 softmax, then V, projection and normalisation."""
    scores = beta * (x @ Q.T) @ (x @ K.T).T
    A = np.exp(scores - scores.max(axis=1, keepdims=True))
    A /= A.sum(axis=1, keepdims=True)
    return euler(x, A @ x @ V.T, project)


def hardmax_step(x, project=True):
    """Algorithm 1 with the hardmax: the whole attention on the best token."""
    best = ((x @ Q.T) @ (x @ K.T).T).argmax(axis=1)
    return euler(x, x[best] @ V.T, project)


def cold_step(x, project=True):
    """Algorithm 2: direction KᵀQx/|KᵀQx|."""
    return euler(x, normalised(x @ (Q.T @ K)) @ V.T, project)


FIELDS = {
    "Algorithm 1": (mf.SelfAttention(Q, K, V, 4.0), lambda x, p: softmax_step(x, 4.0, p)),
    "Algorithm 2": (mf.ZeroTemperature(Q, K, V), cold_step),
    "hardmax": (mf.Hardmax(Q, K, V), hardmax_step),
}


@pytest.mark.parametrize("name", list(FIELDS))
@pytest.mark.parametrize("project", [True, False])
def test_unroll_is_the_algorithm_step_by_step(name, project):
    """Three layers, to rounding; `project=False` is *multiscale*, Eq. (1)."""
    field, step = FIELDS[name]
    run = mf.unroll(field, X, 3, STEP, save="all", project=project)
    x = X
    for layer in range(1, 4):
        x = step(x, project)
        np.testing.assert_allclose(run.xs[layer], x, atol=1e-14)


@pytest.mark.parametrize("name", ["Algorithm 1", "Algorithm 2"])
def test_projected_layers_are_euler_steps_of_solve(name):
    field, _ = FIELDS[name]
    layers = mf.unroll(field, X, 20, STEP, project=True)
    steps = mf.solve(field, X, [0.0, 2.0], step=STEP, solver=diffrax.Euler(), save="last")
    np.testing.assert_allclose(layers.xs[-1], steps.xs[-1], atol=1e-13)


def test_three_different_infinities():
    """E17: the hardmax is the limit of Algorithm 1 for these tokens, and not Algorithm 2."""
    run = {
        name: mf.unroll(field, X, 1, STEP).xs[-1] for name, (field, _) in FIELDS.items()
    }
    large = mf.unroll(mf.SelfAttention(Q, K, V, 1e5), X, 1, STEP).xs[-1]
    np.testing.assert_allclose(large, run["hardmax"], atol=1e-6)
    apart = np.linalg.norm(np.asarray(run["hardmax"] - run["Algorithm 2"]), axis=1)
    assert np.median(apart) > 0.1 * STEP
    assert np.linalg.norm(np.asarray(run["hardmax"] - run["Algorithm 1"])) > STEP
