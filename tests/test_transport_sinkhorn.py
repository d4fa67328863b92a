"""Entropic transport: against Sinkhorn written out in NumPy and against exact plans; its
bounds, derivatives, memory, and what it says when it does not converge."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp

from helpers import random_tokens
from meanformer import Empirical, HeatKernel, Uniform, sphere
from meanformer.transport import wasserstein

solve = functools.partial(wasserstein, method="sinkhorn")


def table(x, y, cost, p):
    """c^p from inner products alone, for tokens that do not oppose."""
    q = np.clip(np.asarray(x) @ np.asarray(y).T, -1, 1)
    return (np.arccos(q) if cost == "geodesic" else np.sqrt(2 - 2 * q)) ** p


def entropic(c, a, b, eps):
    """min ⟨π, c⟩ + ε KL(π | ab): its plan by Sinkhorn until nothing changes, then the
    primal objective."""
    f, g, last = np.zeros(len(a)), np.zeros(len(b)), np.inf
    while np.max(np.abs(f - last)) > 1e-14:
        last = f
        g = -eps * logsumexp((f[:, None] - c) / eps, b=a[:, None], axis=0)
        f = -eps * logsumexp((g - c) / eps, b=b, axis=1)
    plan = a[:, None] * b * np.exp((f[:, None] + g - c) / eps)
    return np.sum(plan * c) + np.sum(plan * (f[:, None] + g - c))


def test_value_is_the_sinkhorn_divergence():
    """S_ε = OT(µ, ν) − ½ OT(µ, µ) − ½ OT(ν, ν), also with tokens of weight 0, whose place
    does not matter, in blocks that do not divide n."""
    rng = np.random.default_rng(0)
    x, y = random_tokens(rng, 40, 3), random_tokens(rng, 30, 3)
    a, b = rng.exponential(size=40), rng.exponential(size=30)
    a[:3] = b[:3] = 0
    y[0] = -x[0]
    mu, nu = Empirical(x, a), Empirical(y, b)
    a, b = np.asarray(mu.weights[3:]), np.asarray(nu.weights[3:])
    eps = 0.2
    parts = [
        entropic(table(u[3:], v[3:], "geodesic", 2), s, t, eps)
        for u, s, v, t in ((x, a, y, b), (x, a, x, a), (y, b, y, b))
    ]
    want = parts[0] - (parts[1] + parts[2]) / 2
    found = solve(mu, nu, epsilon=eps, tol=1e-10, block=7)
    assert bool(found.converged)
    np.testing.assert_allclose(found.power, want, rtol=1e-9)
    np.testing.assert_allclose(found.value, np.sqrt(want), rtol=1e-9)


@pytest.mark.parametrize(
    ("cost", "p"), [("chordal", 2), ("geodesic", 2), ("geodesic", 1)]
)
def test_exact_values_lie_within_the_stated_error(cost, p):
    """At n = 500, ε from large to small, near and far measures: lower ≤ W_p ≤ upper, and
    |value − W_p| ≤ error, which shrinks with ε."""
    n = 500
    far = HeatKernel([0.0, 0.0, 1.0], 0.1).sample(jax.random.key(0), n)
    near, uniform = (Uniform(3).sample(jax.random.key(k), n) for k in (1, 2))
    for other in (far, near):
        best = wasserstein(other, uniform, p, cost, "exact").value
        errors = []
        for eps in (0.1, 0.01):
            found = solve(other, uniform, p, cost, epsilon=eps)
            assert bool(found.converged)
            assert found.lower - 1e-12 <= best <= found.upper + 1e-12
            assert abs(found.value - best) <= found.error
            errors.append(found.error)
        assert errors[1] <= 0.6 * errors[0]
    same = solve(far, far, p, cost)
    assert same.value <= 1e-6
    assert same.value <= same.error
    assert same.lower <= 1e-7


def test_float32_has_the_value_and_the_error_of_float64():
    """To the rounding of 1/ε sums in float32."""
    x = HeatKernel([0.0, 0.0, 1.0], 0.1).sample(jax.random.key(0), 500)
    y = Uniform(3).sample(jax.random.key(1), 500)
    wide = solve(x, y, cost="chordal")
    small = solve(x.astype(jnp.float32), y.astype(jnp.float32), cost="chordal")
    for name in ("value", "lower", "upper", "error"):
        assert getattr(small, name).dtype == jnp.float32
        assert abs(getattr(small, name) - getattr(wide, name)) <= 2e-4
    assert small.epsilon == np.float32(0.01)


def test_gradient_is_a_finite_difference():
    """Of the divergence in positions, weights and both measures, through the fixed
    potentials; finite where tokens meet and oppose."""
    rng = np.random.default_rng(1)
    x, y = (jnp.asarray(random_tokens(rng, n, 3)) for n in (12, 9))
    x, y = x.at[0].set(y[0]), y.at[1].set(-x[1])
    a, b = jnp.asarray(rng.random(12) + 0.1), jnp.asarray(rng.random(9) + 0.1)
    v, w = rng.normal(size=x.shape), rng.normal(size=y.shape)
    v[:2] = 0  # at the pairs that meet or oppose no derivative exists
    da, db = jnp.asarray(rng.normal(size=12)), jnp.asarray(rng.normal(size=9))
    dx, dy = sphere.project(x, jnp.asarray(v)), sphere.project(y, jnp.asarray(w))
    dy = dy.at[:2].set(0)

    @jax.jit
    def both(x, a, y, b):
        def W(x, a, y, b):
            mu, nu = Empirical(x, a, check=False), Empirical(y, b / b.sum(), check=False)
            return solve(mu, nu, epsilon=0.2, tol=1e-11).value

        return jax.value_and_grad(W, (0, 1, 2, 3))(x, a / a.sum(), y, b)

    def slope(f, h=1e-5):
        return float(f(h)[0] - f(-h)[0]) / (2 * h)

    gx, ga, gy, gb = both(x, a, y, b)[1]
    mean = a / a.sum()
    found = [
        jnp.sum(gx * dx),
        ga @ (da - mean * da.sum()) / a.sum(),
        jnp.sum(gy * dy),
        gb @ db,
    ]
    want = [
        slope(lambda s: both(sphere.exp(x, s * dx), a, y, b)),
        slope(lambda s: both(x, a + s * da, y, b)),
        slope(lambda s: both(x, a, sphere.exp(y, s * dy), b)),
        slope(lambda s: both(x, a, y, b + s * db)),
    ]
    assert all(np.isfinite(g).all() for g in (gx, ga, gy, gb))
    np.testing.assert_allclose(found, want, rtol=1e-6, atol=1e-8)


def test_no_table_of_all_pairs_is_stored():
    """At n = 4096 the temporary memory of value and gradient is below half of n² numbers:
    some blocks of 128 rows. For the geodesic cost, which needs most."""
    n = 4096
    tokens = jax.ShapeDtypeStruct((n, 3), jnp.float32)
    program = jax.jit(jax.value_and_grad(lambda x, y: solve(x, y, throw=False).value))
    memory = program.lower(tokens, tokens).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 4 * n * n / 2


def test_what_does_not_converge_is_an_error_or_flagged():
    """After 10 iterations ε has not even reached its target. Bounds hold all the same."""
    rng = np.random.default_rng(2)
    x, y = random_tokens(rng, 30, 3), random_tokens(rng, 30, 3)
    few = functools.partial(solve, cost="chordal", epsilon=1e-3, max_iterations=10)
    with pytest.raises(
        RuntimeError, match=r"max_iterations = 10\. Use a larger `epsilon`"
    ):
        few(x, y)
    flagged = few(x, y, throw=False)
    assert not bool(flagged.converged)
    assert "not converged" in str(flagged)
    best = wasserstein(x, y, cost="chordal", method="exact").value
    assert flagged.lower <= best <= flagged.upper
    assert abs(flagged.value - best) <= flagged.error
    with pytest.raises(Exception, match="max_iterations = 10"):
        jax.block_until_ready(jax.jit(lambda x, y: few(x, y).value)(x, y))


def test_a_batch_is_solved_one_by_one():
    """Under `vmap` each configuration has its own divergence and its own iterations."""
    rng = np.random.default_rng(3)
    xs = np.stack([random_tokens(rng, 10, 3) for _ in range(2)])
    xs = np.concatenate([xs, xs[:1]])
    y, eps, w = random_tokens(rng, 10, 3), 0.5, np.full(10, 0.1)
    batch = jax.vmap(lambda x: solve(x, y, epsilon=eps, tol=1e-9))(jnp.asarray(xs))

    def part(u, v):
        return entropic(table(u, v, "geodesic", 2), w, w, eps)

    want = [part(x, y) - (part(x, x) + part(y, y)) / 2 for x in xs]
    np.testing.assert_allclose(batch.power, want, rtol=1e-7)
    assert batch.converged.all()
    assert batch.iterations[0] == batch.iterations[2]
