"""For B = QᵀK symmetric and V = cB attention is the gradient flow of the interaction energy
E = (1/2β)∬e^{β⟨x,By⟩}dµdµ, in the metric Σwᵢ|vᵢ|² for (USA) and ΣwᵢZᵢ|vᵢ|² for (SA), with
Zᵢ = ∫e^{β⟨xᵢ,By⟩}dµ(y) (*multiscale*, Remark 3.8; *concentration*, App. C.3)."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

import meanformer as mf
from helpers import random_tokens
from meanformer.observables import Energy

BETA, N, D = 3.0, 20, 3
I3 = np.eye(D)
MODELS = {"SA": mf.SelfAttention, "USA": mf.UnnormalizedSelfAttention}
SCALES = [1.0, -1.0, 0.4]
both_models = pytest.mark.parametrize("model", MODELS)
all_scales = pytest.mark.parametrize("c", SCALES)


def symmetric(seed):
    """A symmetric B with eigenvalues of both signs, not diagonal."""
    R = np.linalg.qr(np.random.default_rng(seed).normal(size=(D, D)))[0]
    return R @ np.diag([1.0, 0.5, -0.6]) @ R.T


def tokens_and_weights(seed=0):
    rng = np.random.default_rng(seed)
    w = rng.uniform(0.2, 1, size=N)
    return jnp.asarray(random_tokens(rng, N, D)), w / w.sum()


def metric(model, x, w, B):
    """The factor of |vᵢ|² in the metric, written out: wᵢZᵢ or wᵢ."""
    x = np.asarray(x)
    return w * (np.exp(BETA * x @ B @ x.T) @ w) if model == "SA" else w


def energy_of_points(B, w):
    energy = Energy(I3, B, BETA)
    return lambda x: energy(mf.Empirical(x, w, check=False))


@both_models
@all_scales
def test_the_field_is_the_riemannian_gradient_of_the_energy(model, c):
    """χ(xᵢ) = c P_{xᵢ} ∂E/∂xᵢ / gᵢ, gᵢ = wᵢZᵢ (SA), wᵢ (USA), ∂E/∂x by autodiff of E."""
    (x, w), B = tokens_and_weights(), symmetric(1)
    slope = mf.sphere.project(x, jax.grad(energy_of_points(B, w))(x))
    exact = c * slope / metric(model, x, w, B)[:, None]
    field = MODELS[model](I3, B, c * B, BETA)
    np.testing.assert_allclose(field.velocity(x, mf.Empirical(x, w)), exact, atol=1e-12)


@both_models
@all_scales
def test_the_energy_changes_at_the_rate_of_the_squared_speed(model, c):
    """dE/dt = Σgᵢ|χᵢ|²/c, the derivative of E along the velocity."""
    (x, w), B = tokens_and_weights(1), symmetric(2)
    v = MODELS[model](I3, B, c * B, BETA).velocity(x, mf.Empirical(x, w))
    rate = jax.jvp(energy_of_points(B, w), (x,), (v,))[1]
    exact = np.sum(metric(model, x, w, B) * np.sum(np.asarray(v) ** 2, 1)) / c
    np.testing.assert_allclose(rate, exact, rtol=1e-12)
    assert abs(exact) > 1e-2


class Dissipation(eqx.Module):
    """Σgᵢ|χᵢ|²/c as an observable."""

    field: mf.SelfAttention | mf.UnnormalizedSelfAttention
    c: Array

    def __call__(self, mu):
        x, w = mu.points, mu.weights
        square = w * jnp.sum(self.field.velocity(x, mu) ** 2, axis=-1)
        if isinstance(self.field, mf.SelfAttention):
            square = square * (jnp.exp(BETA * x @ self.field.B @ x.T) @ w)
        return jnp.sum(square) / self.c


@both_models
def test_the_energy_is_monotone_along_runs_and_gains_what_is_dissipated(model):
    """E(t) − E(0) = ∫₀ᵗ Σgᵢ|χᵢ|²/c ds along `solve`, by Simpson's rule in 64 steps (error
    ~h⁴ = 6·10⁻⁸ relative, the run's 10⁻⁸): c > 0 increases, c < 0 decreases."""
    (x, w), B = tokens_and_weights(2), symmetric(3)
    ts = np.linspace(0, 1, 65)
    simpson = np.r_[1, np.tile([4, 2], 31), 4, 1] / (3 * 64)
    for c in SCALES:
        field = MODELS[model](I3, B, c * B, BETA)
        seen = {
            "E": Energy(I3, B, BETA),
            "rate": Dissipation(field, jnp.asarray(c)),
        }
        run = mf.solve(
            field, mf.Empirical(x, w), ts, observables=seen, rtol=1e-9, atol=1e-9
        )
        E = np.asarray(run.observed["E"])
        assert np.all(np.sign(c) * np.diff(E) > 0)
        gained = simpson @ np.asarray(run.observed["rate"])
        np.testing.assert_allclose(gained, E[-1] - E[0], rtol=3e-6)


def test_layers_of_small_step_are_monotone_too_and_dissipate_up_to_the_step():
    """`unroll` with h = 0.02: E increases (c > 0) or decreases (c < 0) layer by layer; the gain
    of one layer over h differs from Σgᵢ|χᵢ|²/c by O(h), not less."""
    (x, w), B = tokens_and_weights(3), symmetric(4)
    mu, energy = mf.Empirical(x, w), Energy(I3, B, BETA)
    for c in SCALES[:2]:
        field = mf.SelfAttention(I3, B, c * B, BETA)
        run = mf.unroll(field, mu, 100, 0.02, observables={"E": energy}, save="all")
        assert np.all(c * np.diff(run.observed["E"]) > 0)
        rate, steps = Dissipation(field, jnp.asarray(c))(mu), [0.02, 0.01, 0.005]
        errors = []
        for h in steps:
            after = mf.unroll(field, mu, 1, h).measure(0)
            errors.append(abs((energy(after) - energy(mu)) / h - rate))
        order = np.polyfit(np.log(steps), np.log(errors), 1)[0]
        assert 0.9 < order < 1.1


@both_models
def test_other_values_are_no_gradient_of_this_energy(model):
    """V ≠ cB: no c makes the field the gradient, and E can fall though V and B are positive
    definite. One token drifts to the largest eigenvalue of V, where B is smaller:
    dE/dt = e^{β⟨x,Bx⟩}⟨Bx, P_x ẋ⟩ < 0."""
    (x, w), B = tokens_and_weights(4), np.diag([1.0, 0.5, 0.2])
    V = np.diag([0.2, 1.0, 0.5])
    mu = mf.Empirical(x, w)
    slope = mf.sphere.project(x, jax.grad(energy_of_points(B, w))(x))
    gradient = np.asarray(slope) / metric(model, x, w, B)[:, None]

    def cosine(V):
        """Of the field to the gradient: ±1 if one is a multiple of the other."""
        v = np.asarray(MODELS[model](I3, B, V, BETA).velocity(x, mu))
        return np.sum(v * gradient) / np.linalg.norm(v) / np.linalg.norm(gradient)

    np.testing.assert_allclose(cosine(-2 * B), -1, atol=1e-12)
    assert abs(cosine(V)) < 0.95
    token = np.array([[1.0, 1.0, 0.3]]) / np.linalg.norm([1.0, 1.0, 0.3])
    rates = []
    for values in (V, B):
        field = MODELS[model](I3, B, values, BETA)
        v = field.velocity(token, mf.Empirical(token))
        energy = energy_of_points(B, np.ones(1))
        rates.append(jax.jvp(energy, (jnp.asarray(token),), (v,))[1])
    assert rates[0] < -1e-2
    assert rates[1] > 1e-2


@both_models
def test_for_B_not_symmetric_the_field_is_no_gradient(model):
    """B = V = I + sJ with a rotation J: one token turns at speed s|Jx| while E does not change
    (E sees the symmetric part alone), so that nothing is dissipated."""
    B = np.eye(3) + 0.5 * np.array([[0.0, 1, 0], [-1, 0, 0], [0, 0, 0]])
    token = np.array([[0.6, 0.0, 0.8]])
    v = MODELS[model](I3, B, B, BETA).velocity(token, mf.Empirical(token))
    energy = energy_of_points(B, np.ones(1))
    rate = jax.jvp(energy, (jnp.asarray(token),), (v,))[1]
    speed = 0.3 if model == "SA" else 0.3 * np.exp(BETA)
    np.testing.assert_allclose(np.linalg.norm(v), speed, rtol=1e-13)
    np.testing.assert_allclose(rate, 0, atol=1e-12 * speed * np.exp(BETA))
