"""Wasserstein distances on the circle, of exact plans and sliced: closed forms, POT's
network simplex, linear programmes, metric axioms, derivatives, refusals."""

import functools
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy.optimize import linprog

from helpers import random_rotation, random_tokens
from meanformer import Empirical, HeatKernel, Uniform, sphere
from meanformer.transport import exact, wasserstein
from meanformer.transport.distance import METHODS

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ot

COSTS = ["geodesic", "chordal"]
SEEDS = st.integers(0, 2**32 - 1)


def table(x, y, cost, p):
    """c^p from inner products alone, for tokens that neither meet nor oppose."""
    q = np.clip(np.asarray(x) @ np.asarray(y).T, -1, 1)
    return (np.arccos(q) if cost == "geodesic" else np.sqrt(2 - 2 * q)) ** p


def arcs(t, s, p):
    """The p-th powers of the arcs between angles."""
    gap = np.abs(np.asarray(t)[:, None] - np.asarray(s)) % (2 * np.pi)
    return np.minimum(gap, 2 * np.pi - gap) ** p


def programme(a, b, c):
    """The least cost of a plan: the linear programme, written out."""
    n, m = c.shape
    rows = np.kron(np.eye(n), np.ones(m))
    columns = np.kron(np.ones(n), np.eye(m))
    done = linprog(
        c.ravel(), A_eq=np.vstack([rows, columns]), b_eq=np.concatenate([a, b])
    )
    return done.fun


@functools.partial(jax.jit, static_argnames=("p", "cost", "method"))
def compiled(a, b, p=2, cost="geodesic", method="auto"):
    return wasserstein(a, b, p, cost, method)


def on_circle(theta, weights=None):
    return Empirical(sphere.from_angles(theta), weights)


def slope(f, h=1e-6):
    """f'(0), central: error O(h²) and rounding 1e−16/h."""
    return float(f(h) - f(-h)) / (2 * h)


# ------------------------------------------------------------------------ the circle


@pytest.mark.parametrize("p", [1, 2, 3.5])
@pytest.mark.parametrize(("n", "m"), [(1, 6), (50, 50), (200, 150)])
@given(seed=SEEDS)
def test_circle_is_the_network_simplex(seed, n, m, p):
    """W_p of random weighted sets, some of them with weight 0, some in both sets."""
    rng = np.random.default_rng(seed)
    t, s = rng.uniform(-4, 4, n), rng.uniform(-4, 4, m)
    s[: min(n, m) // 3] = t[: min(n, m) // 3]
    a, b = rng.exponential(size=n), rng.exponential(size=m)
    a[1 : n // 4] = 0
    a, b = a / a.sum(), b / b.sum()
    best = ot.emd2(a, b, arcs(t, s, p), numItermax=10**7) ** (1 / p)
    found = compiled(on_circle(t, a), on_circle(s, b), p)
    assert abs(found.value - best) <= 1e-12
    assert abs(found.value - best) <= found.error + 1e-13


@pytest.mark.parametrize("p", [1, 2, 1.5])
@pytest.mark.parametrize(("n", "m"), [(60, 60), (60, 20), (20, 60), (30, 45)])
def test_equal_weights_take_a_shift(n, m, p):
    """Arrays are tokens of equal weight; also where one number divides the other."""
    rng = np.random.default_rng(n + m)
    for spread in (0.1, 3.0):
        t, s = spread * rng.normal(size=n), 2 + rng.normal(size=m)
        best = ot.emd2(np.full(n, 1 / n), np.full(m, 1 / m), arcs(t, s, p)) ** (1 / p)
        found = compiled(sphere.from_angles(t), sphere.from_angles(s), p)
        assert found.method == "circle"
        assert abs(found.value - best) <= 1e-12


@pytest.mark.parametrize("k", [1, 2, 3, 8, 100])
def test_equal_clusters_against_the_uniform_law(k):
    """W1 = π/2k and W2 = π/(k√3): each cluster takes the arc of length 2π/k around it."""
    tokens = sphere.from_angles(0.3 + 2 * np.pi * np.arange(k) / k)
    for p, want in ((1, np.pi / 2 / k), (2, np.pi / k / math.sqrt(3))):
        found = wasserstein(tokens, Uniform(2), p)
        assert abs(found.value - want) <= min(1e-14, float(found.error))
        weighted = Empirical(np.repeat(tokens, 2, 0), np.tile([1.0, 3.0], k))
        assert abs(wasserstein(Uniform(2), weighted, p).value - want) <= 1e-14


@pytest.mark.parametrize("p", [1, 2])
@given(seed=SEEDS)
def test_the_uniform_law_is_that_of_many_nodes(seed, p):
    """|W_p(µ, uniform) − W_p(µ, M nodes)| ≤ W_p(uniform, M nodes) = π/2M or π/(M√3)."""
    rng = np.random.default_rng(seed)
    mu = on_circle(rng.normal(size=30), rng.exponential(size=30))
    M = 1000
    apart = np.pi / M * (0.5 if p == 1 else 3**-0.5)
    closed = compiled_to_uniform(mu, p)
    assert abs(closed - compiled(mu, Uniform(2).nodes(M), p).value) <= apart


@functools.partial(jax.jit, static_argnames="p")
def compiled_to_uniform(mu, p):
    return wasserstein(mu, Uniform(2), p).value


def test_w2_to_the_uniform_law_is_that_of_pot():
    """POT's closed form; it wants sorted positions."""
    rng = np.random.default_rng(0)
    u, a = np.sort(rng.random(40)), rng.exponential(size=40)
    a /= a.sum()
    want = 2 * np.pi * np.sqrt(ot.semidiscrete_wasserstein2_unif_circle(u, a)[0])
    found = wasserstein(on_circle(2 * np.pi * u, a), Uniform(2)).value
    np.testing.assert_allclose(found, want, rtol=1e-12)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize(
    ("n", "m", "even"), [(12, 12, True), (9, 3, True), (7, 5, False)]
)
def test_the_best_rotation_is_the_best_of_all(n, m, even, p):
    """s ↦ W_p(µ, ν turned by s) changes by at most |s|: the least of a grid of width h
    lies within h/2 above the minimum, which is taken at `rotation`."""
    rng = np.random.default_rng(n * m)
    t, s = rng.normal(size=n), rng.normal(size=m)
    a, b = (None, None) if even else (rng.random(n), rng.random(m))
    mu, turned = on_circle(t, a), lambda r: on_circle(s + r, b)
    found = wasserstein(mu, turned(0.0), p, rotations=True)
    angles = np.linspace(0, 2 * np.pi, 500)
    grid = jax.vmap(lambda r: wasserstein(mu, turned(r), p).value)(angles)
    least, h = float(grid.min()), angles[1]
    assert least - h / 2 <= found.value <= least + 1e-13
    at = wasserstein(mu, turned(float(found.rotation)), p).value
    np.testing.assert_allclose(at, found.value, rtol=1e-12)


@pytest.mark.parametrize("p", [1, 2])
def test_a_rotated_copy_is_found(p):
    """The minimum is 0, at the angle turned back."""
    t = np.random.default_rng(5).normal(size=40)
    found = wasserstein(
        sphere.from_angles(t), sphere.from_angles(t - 1.25), p, rotations=True
    )
    assert found.value <= 1e-14
    np.testing.assert_allclose(found.rotation, 1.25, atol=1e-13)


def test_two_tokens_are_as_far_apart_as_their_arc():
    """W_p(δ_x, δ_y) = c(x, y), also across the cut of the angle and at antipodes."""
    for gap in (0.0, 1e-9, 1.0, 3.0, np.pi):
        x, y = sphere.from_angles([3.0]), sphere.from_angles([3.0 + gap])
        for p in (1, 2, 3):
            assert abs(wasserstein(x, y, p).value - gap) <= 1e-15 * 8
            chord = wasserstein(x, y, p, "chordal").value
            assert abs(chord - 2 * np.sin(gap / 2)) <= 1e-15 * 8


# ------------------------------------------------------------------- plans on spheres


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("p", [1, 2])
def test_exact_is_the_linear_programme(cost, p):
    """On S², for equal weights and for others, of which two are 0."""
    rng = np.random.default_rng(11)
    x, y, z = (
        random_tokens(rng, 20, 3),
        random_tokens(rng, 20, 3),
        random_tokens(rng, 15, 3),
    )
    even = np.full(20, 1 / 20)
    best = programme(even, even, table(x, y, cost, p)) ** (1 / p)
    found = wasserstein(x, y, p, cost, "exact")
    assert found.method == "assignment"
    assert abs(found.value - best) <= 1e-12
    a, b = rng.exponential(size=20), rng.exponential(size=15)
    a[:2] = 0
    mu, nu = Empirical(x, a), Empirical(z, b)
    best = programme(mu.weights, nu.weights, table(x, z, cost, p)) ** (1 / p)
    found = wasserstein(mu, nu, p, cost, "exact")
    assert found.method == "network simplex"
    assert abs(found.value - best) <= 1e-12
    assert found.error <= 1e-12


def test_without_pot_the_linear_programme_answers(monkeypatch):
    """SciPy's plan costs the same; many pairs are refused, with the cure."""
    rng = np.random.default_rng(3)
    mu = Empirical(random_tokens(rng, 12, 3), rng.random(12))
    nu = Empirical(random_tokens(rng, 9, 3), rng.random(9))
    with_pot = wasserstein(mu, nu)
    monkeypatch.setattr(exact, "has_network_simplex", lambda: False)
    without = wasserstein(mu, nu)
    assert without.method == "linear programme"
    assert abs(without.value - with_pot.value) <= 1e-12
    many = Empirical(random_tokens(rng, 300, 3), rng.random(300))
    with pytest.raises(ValueError, match=r"pip install 'meanformer\[exact\]'"):
        wasserstein(many, many, method="exact")


def test_circle_and_plans_agree_on_the_circle():
    """The chordal cost has no formula on S¹ and takes a plan; on a common great circle of
    S² the plan has the arc's cost and the circle's value."""
    rng = np.random.default_rng(4)
    t, s = rng.normal(size=30), rng.normal(size=30)
    x, y = sphere.from_angles(t), sphere.from_angles(s)
    chordal = wasserstein(x, y, cost="chordal")
    best = ot.emd2([], [], table(x, y, "chordal", 2))
    assert (chordal.method, chordal.cost) == ("assignment", "chordal")
    np.testing.assert_allclose(chordal.power, best, rtol=1e-12)
    lift = random_rotation(rng, 3)[:2]
    np.testing.assert_allclose(
        wasserstein(x @ lift, y @ lift).value, wasserstein(x, y).value, rtol=1e-12
    )


# ------------------------------------------------------------------------ laws of metrics


@pytest.mark.parametrize("d", [2, 3])
@given(seed=SEEDS, p=st.sampled_from([1, 2]))
def test_metric_axioms_and_rotation_invariance(seed, p, d):
    """W_p(µ, µ) = 0, symmetry, triangle inequality, W_p(Rµ, Rν) = W_p(µ, ν)."""
    rng = np.random.default_rng(seed)
    mu, nu, xi = (
        Empirical(random_tokens(rng, 15, d), rng.exponential(size=15)) for _ in range(3)
    )
    W = functools.partial(compiled, p=p)
    ab, bc, ac = W(mu, nu).value, W(nu, xi).value, W(mu, xi).value
    assert ac <= ab + bc + 1e-12
    assert ab > 0
    np.testing.assert_allclose(W(nu, mu).value, ab, rtol=1e-10)
    assert W(mu, mu).value <= W(mu, mu).error
    assert W(mu, mu).error <= 1e-6  # the rounding of 16 digits under a square root
    R = random_rotation(rng, d)
    rotated = (Empirical(m.points @ R.T, m.weights) for m in (mu, nu))
    np.testing.assert_allclose(W(*rotated).value, ab, rtol=1e-10)


@pytest.mark.parametrize("d", [2, 3])
@given(seed=SEEDS)
def test_orders_of_p_and_of_costs(seed, d):
    """W1 ≤ W_p ≤ diam^{(p−1)/p} W1^{1/p} and W_chord ≤ W_geo ≤ (π/2) W_chord."""
    rng = np.random.default_rng(seed)
    x, y = random_tokens(rng, 15, d), random_tokens(rng, 15, d)
    W = {(p, c): float(compiled(x, y, p, c).value) for p in (1, 2, 3) for c in COSTS}
    for cost, diameter in (("geodesic", np.pi), ("chordal", 2.0)):
        for p in (2, 3):
            least, most = W[1, cost], diameter ** (1 - 1 / p) * W[1, cost] ** (1 / p)
            assert least - 1e-12 <= W[p, cost] <= most + 1e-12
    for p in (1, 2, 3):
        assert W[p, "chordal"] - 1e-12 <= W[p, "geodesic"]
        assert W[p, "geodesic"] <= np.pi / 2 * W[p, "chordal"] + 1e-12


# ------------------------------------------------------------------------- derivatives


def moved(x, v, s):
    """The tokens after time s on great circles of velocity v."""
    x = jnp.asarray(x)
    return sphere.exp(x, s * sphere.project(x, jnp.asarray(v)))


@pytest.mark.parametrize(("d", "p"), [(2, 1), (2, 2), (2, 3), (3, 1), (3, 2)])
def test_gradients_are_finite_differences(d, p):
    """In positions and weights of both measures, on S¹ and for plans on S²."""
    rng = np.random.default_rng(10 * d + p)
    x, y = random_tokens(rng, 12, d), random_tokens(rng, 9, d)
    a, b = rng.random(12) + 0.1, rng.random(9) + 0.1
    v, w = rng.normal(size=x.shape), rng.normal(size=y.shape)
    da, db = rng.normal(size=12), rng.normal(size=9)

    @jax.jit
    def W(x, a, y, b):
        return wasserstein(Empirical(x, a), Empirical(y, b), p).value

    gx, ga, gy, gb = jax.jit(jax.grad(W, (0, 1, 2, 3)))(x, a, y, b)
    found = [
        jnp.sum(gx * sphere.project(jnp.asarray(x), jnp.asarray(v))),
        ga @ da,
        jnp.sum(gy * sphere.project(jnp.asarray(y), jnp.asarray(w))),
        gb @ db,
    ]
    want = [
        slope(lambda s: W(moved(x, v, s), a, y, b)),
        slope(lambda s: W(x, a + s * da, y, b)),
        slope(lambda s: W(x, a, moved(y, w, s), b)),
        slope(lambda s: W(x, a, y, b + s * db)),
    ]
    np.testing.assert_allclose(found, want, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("p", [1, 2])
def test_gradients_of_the_other_circle_distances(p):
    """Equal weights; to the uniform law; up to rotations."""
    rng = np.random.default_rng(p)
    t, s, dt = rng.normal(size=12), rng.normal(size=12), rng.normal(size=12)
    a, da = rng.random(12) + 0.1, rng.normal(size=12)
    y, b = sphere.from_angles(s), rng.random(12)
    up = functools.partial(wasserstein, p=p, rotations=True)
    for W in (
        lambda r: wasserstein(sphere.from_angles(t + r * dt), y, p),
        lambda r: wasserstein(on_circle(t + r * dt, a + r * da), Uniform(2), p),
        lambda r: up(sphere.from_angles(t + r * dt), y),
        lambda r: up(on_circle(t + r * dt, a + r * da), Empirical(y, b)),
    ):
        W = jax.jit(lambda r, W=W: W(r).value)
        np.testing.assert_allclose(jax.grad(W)(0.0), slope(W), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("d", [2, 3])
def test_gradients_are_finite_where_none_exists(d, cost, p):
    """Coincident measures (derivative 0), coincident tokens, antipodes, equal distances."""
    e = np.eye(d)
    square = np.stack([e[0], e[1], -e[0], -e[1]])
    grad = jax.jit(
        jax.value_and_grad(lambda x, y: wasserstein(x, y, p, cost, "exact").value)
    )
    for x, y in (
        (square, square),
        (square[[0, 0, 1, 1]], square[[0, 0, 0, 1]]),
        (square, -square),
        (square[[0, 0, 0, 0]], -square[[0, 0, 0, 0]]),
        (square[[0, 2, 0, 2]], square[[1, 3, 1, 3]]),
    ):
        value, g = grad(jnp.asarray(x), jnp.asarray(y))
        assert np.isfinite(g).all()
        if value == 0:
            assert not g.any()
    assert float(grad(jnp.asarray(square[:1]), -jnp.asarray(square[:1]))[0]) > 1.9


# --------------------------------------------------------------- dtypes, jit, vmap, choice


@pytest.mark.parametrize(("d", "p"), [(2, 1), (2, 2), (3, 2)])
def test_float32_stays_and_is_right(d, p):
    """Within the sum of the stated errors of the float64 value of the same tokens."""
    rng = np.random.default_rng(d)
    x, y = (random_tokens(rng, 40, d).astype(np.float32) for _ in range(2))
    a = rng.random(40).astype(np.float32)
    for mu in (x, Empirical(x, a)):
        small = wasserstein(mu, y, p)
        wide = jax.tree.map(lambda z: jnp.asarray(z, jnp.float64), mu)
        large = wasserstein(wide, y.astype(np.float64), p)
        assert {small.value.dtype, small.error.dtype} == {jnp.dtype(jnp.float32)}
        assert small.error <= 1e-3
        assert abs(small.value - large.value) <= small.error + large.error
    if d == 2:
        closed = wasserstein(x, Uniform(2, jnp.float32), p)
        assert closed.value.dtype == jnp.float32


@pytest.mark.parametrize("d", [2, 3])
def test_vmap_and_jit_are_the_loop(d):
    """A batch of configurations against one reference, with and without weights."""
    rng = np.random.default_rng(d)
    xs = jnp.asarray(np.stack([random_tokens(rng, 10, d) for _ in range(3)]))
    ws, y = jnp.asarray(rng.random((3, 10))), random_tokens(rng, 10, d)
    for f in (
        lambda x, w: wasserstein(x, y),
        lambda x, w: wasserstein(Empirical(x, w), y, 1),
    ):
        loop = [f(x, w).value for x, w in zip(xs, ws)]
        batch = jax.jit(jax.vmap(f))(xs, ws)
        np.testing.assert_allclose(batch.value, loop, rtol=1e-12)


def test_auto_says_what_it_picks():
    """The circle for arcs on S¹, plans for few tokens, entropy for many."""
    rng = np.random.default_rng(0)
    two, three = random_tokens(rng, 6, 2), random_tokens(rng, 6, 3)
    assert wasserstein(two, two).method == "circle"
    assert wasserstein(two, two, cost="chordal").method == "assignment"
    assert wasserstein(three, three).method == "assignment"
    assert wasserstein(Empirical(three), three).method == "assignment"
    assert wasserstein(three, three[:4]).method == "network simplex"
    shape = jax.ShapeDtypeStruct((2001, 3), jnp.float32)
    assert jax.eval_shape(wasserstein, shape, shape).method == "sinkhorn"
    shape = jax.ShapeDtypeStruct((10**6, 2), jnp.float32)
    assert jax.eval_shape(wasserstein, shape, shape).method == "circle"


def test_a_distance_reads_as_a_number_and_as_a_sentence():
    x = sphere.from_angles([0.0])
    found = wasserstein(x, sphere.from_angles([0.5]))
    assert float(found) == pytest.approx(0.5)
    assert str(found).startswith("W_2 = 0.5 ± ")
    assert str(found).endswith("(geodesic, circle)")


# ------------------------------------------------------------------------------ sliced


def test_sliced_on_lines():
    """For two tokens SW_2² = |x − y|²/d; SW_p ≤ W_p for any sets; equal and general
    weights agree on the same lines."""
    rng = np.random.default_rng(1)
    key, d = jax.random.key(0), 4
    x, y = random_tokens(rng, 30, d), random_tokens(rng, 30, d)
    S = functools.partial(
        wasserstein, cost="chordal", method="sliced", key=key, projections=1000
    )
    pair = S(x[:1], y[:1])
    want = np.linalg.norm(x[0] - y[0]) / math.sqrt(d)
    assert abs(pair.value - want) <= 5 * pair.error
    assert pair.error <= 0.05 * want
    for p in (1, 2):
        found = S(x, y, p)
        assert (found.method, found.cost) == ("sliced", "chordal")
        assert found.value <= wasserstein(x, y, p, "chordal").value
    twice = S(np.repeat(x, 2, 0), y)  # 60 against 30: the general code
    np.testing.assert_allclose(twice.value, found.value, rtol=1e-12)


def test_sliced_on_great_circles():
    """On S¹ each image is a rotation, SW_p = W_p; on S² one token and its antipode are
    π apart on every great circle."""
    rng = np.random.default_rng(2)
    S = functools.partial(wasserstein, method="sliced", key=jax.random.key(1))
    mu = Empirical(random_tokens(rng, 20, 2), rng.random(20))
    nu = Empirical(random_tokens(rng, 15, 2), rng.random(15))
    for p in (1, 2):
        found = S(mu, nu, p)
        np.testing.assert_allclose(found.value, wasserstein(mu, nu, p).value, rtol=1e-10)
        assert found.error <= 1e-10
    x = random_tokens(rng, 1, 3)
    np.testing.assert_allclose(S(x, -x).value, np.pi, rtol=1e-12)


def test_sliced_has_a_gradient():
    """That of the mean, by finite differences on the same projections."""
    rng = np.random.default_rng(3)
    x, y, v = (random_tokens(rng, 10, 3) for _ in range(3))
    project = functools.partial(wasserstein, method="sliced", key=jax.random.key(0))
    W = jax.jit(lambda s: project(moved(x, v, s), y, projections=20).value)
    np.testing.assert_allclose(jax.grad(W)(0.0), slope(W), rtol=1e-6)


# ----------------------------------------------------------------------------- refusals

X2, X3 = np.eye(2), np.eye(3)
HEAVY = Empirical(X3, [1.0, 1.0, 2.0], check=False)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((X2, X3), {}, r"`a` and `b` must be measures on one sphere.*d = 2 and d = 3"),
        ((X3, Uniform(2)), {}, r"one sphere.*d = 3 and d = 2"),
        ((HEAVY, X3), {}, r"`a` must have total mass 1.*has 4.0.*divides by the sum"),
        ((X3, HEAVY), {}, r"`b` must have total mass 1"),
        ((np.zeros((0, 3)), X3), {}, r"`a` must hold at least one token"),
        (
            (X3, Empirical(np.zeros((0, 3)), np.zeros(0), check=False)),
            {},
            r"`b` must hold at least one",
        ),
        ((X3, 2 * X3), {}, r"`b` must have rows of norm 1"),
        ((X3, np.full((2, 3), np.nan)), {}, r"`b` must have rows of norm 1"),
        ((X3, X3), {"p": 0.5}, r"`p` must be a finite number ≥ 1, but is 0.5"),
        ((X3, X3), {"p": math.inf}, r"`p` must be a finite number ≥ 1, but is inf"),
        ((X3, X3), {"p": "two"}, r"`p` must be a finite number"),
        ((X3, X3), {"cost": "geodesique"}, r"`cost` must be .*Did you mean `geodesic`"),
        ((X3, X3), {"method": "sinkhorne"}, r"`method` must be .*mean `sinkhorn`"),
        ((X3, X3), {"method": "circle"}, r'is "circle", which is for the arc on S¹'),
        ((X2, X2), {"method": "circle", "cost": "chordal"}, r"for the arc on S¹"),
        ((X3, Uniform(3)), {}, r"to `Uniform\(2\)`.*d = 3.*`law.nodes\(n\)`"),
        ((X2, Uniform(2)), {"p": 3}, r"p = 3.*`law.nodes\(n\)`"),
        ((X2, Uniform(2)), {"cost": "chordal"}, r"cost chordal.*`law.nodes\(n\)`"),
        ((X2, HeatKernel([1.0, 0.0], 0.1)), {}, r"law is HeatKernel"),
        ((Uniform(2), Uniform(2)), {}, r"must not both be laws"),
        ((X3, X3), {"rotations": True}, r"`rotations` must be False.*d = 3"),
        ((X2, X2), {"rotations": True, "p": 3}, r"`rotations` must be False.*p = 3"),
        ((X3, X3), {"method": "sliced"}, r"`key` must be a random key"),
        (
            (X3, X3),
            {"method": "sliced", "key": jax.random.key(0), "projections": 1},
            r"`projections` must be an integer ≥ 2",
        ),
        (
            (X3, X3),
            {"method": "sinkhorn", "epsilon": 0.0},
            r"`epsilon` must be finite and >",
        ),
        ((X3, X3), {"method": "sinkhorn", "tol": -1.0}, r"`tol` must be finite and > 0"),
        ((X3, X3), {"method": "sinkhorn", "block": 0}, r"`block` must be an integer ≥ 1"),
    ],
)
def test_refusals_name_the_argument_and_the_cure(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        wasserstein(*arguments, **options)


def test_too_many_rotations_are_refused():
    rng = np.random.default_rng(0)
    many = Empirical(random_tokens(rng, 1000, 2), rng.random(1000))
    with pytest.raises(ValueError, match=r"`rotations` must be False for so many tokens"):
        wasserstein(many, many, rotations=True)


def test_wrong_total_mass_is_refused_under_jit():
    with pytest.raises(Exception, match="`a` must have total mass 1"):
        jax.block_until_ready(compiled(HEAVY, X3).value)


def test_every_method_is_documented():
    """The table of the package names each of them."""
    from meanformer import transport

    for method in METHODS[1:]:
        assert f"\n{method} " in transport.__doc__
