"""Reduced tokens of symmetric laws on S³, against the rings written out."""

import jax
import numpy as np

import meanformer as mf
from meanformer.experiments.rings import Rings, tilted_nodes


def rings(x, count=96):
    """The two rings of each reduced token, with `count` points each: (n · 2 · count, 4)."""
    phi = 2 * np.pi * (np.arange(count) + 0.5) / count
    x = x[:, None, None]
    up = np.array([1.0, -1.0])[:, None]
    parts = x[..., 0], x[..., 1] * np.cos(phi), x[..., 1] * np.sin(phi), x[..., 2] * up
    return np.stack(np.broadcast_arrays(*parts), -1).reshape(-1, 4)


def test_reduced_attention_is_attention_over_the_rings():
    """Velocities of (x₁, r, x₄) are those on S³ at (x₁, r, 0, x₄), whose third part is 0."""
    x, w = tilted_nodes(0.5, 8)
    reduced = mf.SelfAttention(
        np.eye(3), np.diag([1.0, 1.5, 2]), np.diag([1.0, -0.5, 0.3]), 9.0, Rings(block=5)
    )
    full = mf.SelfAttention(
        np.eye(4), np.diag([1.0, 1.5, 1.5, 2]), np.diag([1.0, -0.5, -0.5, 0.3]), 9.0
    )
    at = np.insert(x, 2, 0.0, axis=1)
    v = full.velocity(at, mf.Empirical(rings(x), np.repeat(w, 2 * 96)))
    np.testing.assert_allclose(v[:, 2], 0, atol=1e-14)
    mu = mf.Empirical(x, w)
    np.testing.assert_allclose(reduced.velocity(x, mu), v[:, [0, 1, 3]], atol=1e-13)


def test_nodes_integrate_polynomials_of_the_tilted_law():
    """Moments on S³ under (1 + a x₁): ∫x₁ = a/4, ∫x₁² = ∫x₄² = 1/4, ∫r² = 1/2, ∫x₁x₄² = a/24."""
    a = 0.5
    x, w = tilted_nodes(a, 24)
    x1, r, x4 = x.T
    np.testing.assert_allclose(w.sum(), 1, rtol=1e-14)
    moments = [w @ x1, w @ x1**2, w @ x4**2, w @ r**2, w @ (x1 * x4**2)]
    np.testing.assert_allclose(moments, [a / 4, 1 / 4, 1 / 4, 1 / 2, a / 24], rtol=1e-13)


def test_distances_of_symmetric_laws_are_those_of_reduced_tokens():
    """W₂ between rings on S³ by assignment equals that of their reduced tokens."""
    rng = np.random.default_rng(0)
    a, b = np.abs(rng.normal(size=(2, 3, 3)))
    a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (a, b))
    full = mf.wasserstein(rings(a, 16), rings(b, 16), p=2, cost="chordal", method="exact")
    reduced = mf.wasserstein(a, b, p=2, cost="chordal", method="exact")
    np.testing.assert_allclose(full.value, reduced.value, rtol=1e-12)


def test_reduced_attention_is_differentiable():
    """The derivative of a speed in β against central differences."""
    x, w = tilted_nodes(0.5, 6)
    mu = mf.Empirical(x, w)

    def speed(beta):
        field = mf.SelfAttention(np.eye(3), np.eye(3), np.eye(3), beta, Rings())
        return field.velocity(x, mu)[3, 0]

    h = 1e-4
    slope = (speed(4 + h) - speed(4 - h)) / (2 * h)
    np.testing.assert_allclose(jax.grad(speed)(4.0), slope, rtol=1e-6)
