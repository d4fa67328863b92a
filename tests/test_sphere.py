"""Geometry of the sphere against mpmath, and its symmetries."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from hypothesis import given, strategies as st

from helpers import EPS, central_difference, random_rotation, random_tokens
from meanformer import sphere

dimensions = st.sampled_from([2, 3, 8])
seeds = st.integers(0, 2**32 - 1)


def tokens(rng, n, d):
    """Random tokens as a jax array."""
    return jnp.asarray(random_tokens(rng, n, d))


def tangents(rng, x):
    """Random vectors tangent at the rows of x, of norm 1 (projected twice, so that they are
    tangent to rounding although most of a random vector may be normal)."""
    v = jnp.asarray(rng.normal(size=x.shape))
    for _ in range(2):
        v = v - jnp.sum(v * x, axis=1, keepdims=True) * x
        v = v / jnp.linalg.norm(v, axis=1, keepdims=True)
    return v


# ------------------------------------------------------------------- distance


@pytest.mark.parametrize(
    "angle", [1e-150, 1e-20, 1e-9, 1e-3, 0.5, 2.0, 3.1, math.pi - 1e-9]
)
@pytest.mark.parametrize("d", [2, 3, 17])
def test_distance_is_the_arc_cosine_with_all_digits(d, angle):
    """acos of the inner product of the float vectors, taken with 400 digits; they are unit
    to rounding only, which moves the angle by a few roundings of it."""
    x = jnp.eye(d)[0]
    y = jnp.zeros(d).at[0].set(math.cos(angle)).at[-1].set(math.sin(angle))
    with mpmath.workdps(400):
        first, last = mpmath.mpf(float(y[0])), mpmath.mpf(float(y[-1]))
        exact = float(mpmath.acos(first / mpmath.hypot(first, last)))
    np.testing.assert_allclose(sphere.distance(x, y), exact, rtol=4 * EPS)


def test_distance_is_zero_and_pi_without_nan_gradient():
    """d(x, x) = 0 and d(x, −x) = π exactly; the gradient there is defined as 0."""
    x = jnp.asarray(tokens(np.random.default_rng(0), 1, 5)[0])
    for y, value in ((x, 0.0), (-x, math.pi)):
        assert float(sphere.distance(x, y)) == value
        for argument in (0, 1):
            gradient = jax.grad(sphere.distance, argnums=argument)(x, y)
            np.testing.assert_array_equal(gradient, np.zeros(5))


@given(dimensions, seeds)
def test_distance_is_a_metric_invariant_under_rotations(d, seed):
    """Symmetry, triangle inequality, d(Rx, Ry) = d(x, y), and d(x, y) + d(x, −y) = π."""
    rng = np.random.default_rng(seed)
    x, y, z = tokens(rng, 3, d)
    rotation = random_rotation(rng, d)
    gap = float(sphere.distance(x, y))
    tol = 4 * d * EPS * math.pi
    assert float(sphere.distance(y, x)) == gap
    assert gap <= float(sphere.distance(x, z) + sphere.distance(z, y)) + tol
    assert abs(float(sphere.distance(rotation @ x, rotation @ y)) - gap) <= tol
    assert abs(float(sphere.distance(x, -y)) + gap - math.pi) <= tol


def test_slope_of_the_distance_along_a_geodesic_is_one():
    """d/dt distance(x, exp_x(t v)) = |v| for 0 < t|v| < π, by AD in t."""
    rng = np.random.default_rng(3)
    x = tokens(rng, 1, 4)
    v = tangents(rng, x)[0]
    slope = jax.grad(lambda t: sphere.distance(x[0], sphere.exp(x[0], t * v)))
    for t in (1e-6, 0.3, 3.0):
        np.testing.assert_allclose(slope(t), 1, rtol=1e-9)


# ------------------------------------------------------------------- exp and log


@given(dimensions, seeds, st.floats(-8, math.log10(3.1)))
def test_exp_and_log_are_inverse(d, seed, exponent):
    """exp_x(log_x y) = y, and log_x(exp_x v) = v for |v| < π: to rounding of 1, and near
    the antipode of the inverse of sin|v|, by which log_x stretches."""
    rng = np.random.default_rng(seed)
    x, y = tokens(rng, 8, d), tokens(rng, 8, d)
    np.testing.assert_allclose(sphere.exp(x, sphere.log(x, y)), y, rtol=0, atol=1e-13)
    length = 10**exponent
    v = length * tangents(rng, x)
    stretch = length / math.sin(length)
    atol = 16 * EPS * max(1, stretch)
    np.testing.assert_allclose(sphere.log(x, sphere.exp(x, v)), v, rtol=0, atol=atol)


def test_exp_follows_the_great_circle():
    """exp_x(v) = cos|v| x + sin|v| v/|v|: on the sphere, x at v = 0, −x at |v| = π, and
    with derivative the identity on tangent vectors at v = 0."""
    rng = np.random.default_rng(5)
    x = tokens(rng, 6, 4)
    direction = tangents(rng, x)
    v = 2 * direction
    y = sphere.exp(x, v)
    np.testing.assert_allclose(np.linalg.norm(y, axis=1), 1, rtol=4 * EPS)
    np.testing.assert_array_equal(sphere.exp(x, 0 * v), x)
    np.testing.assert_allclose(sphere.exp(x, math.pi * direction), -x, atol=8 * EPS)
    at_rest = jnp.zeros(4)
    _, moved = jax.jvp(lambda w: sphere.exp(x[0], w), (at_rest,), (jnp.asarray(v[0]),))
    np.testing.assert_allclose(moved, v[0], rtol=4 * EPS)


def test_log_points_along_the_geodesic_with_its_length():
    """log_x y is tangent at x and |log_x y| = distance(x, y); log_x x = 0 with a finite
    Jacobian, the projector P_x."""
    rng = np.random.default_rng(6)
    x, y = tokens(rng, 6, 5), tokens(rng, 6, 5)
    v = sphere.log(x, y)
    np.testing.assert_allclose(np.sum(v * x, axis=1), 0, atol=16 * EPS)
    np.testing.assert_allclose(
        np.linalg.norm(v, axis=1), sphere.distance(x, y), rtol=8 * EPS
    )
    e = jnp.asarray([0.6, 0.0, 0.8])
    np.testing.assert_array_equal(sphere.log(e, e), 0)
    jacobian = jax.jacobian(lambda z: sphere.log(e, z))(e)
    np.testing.assert_allclose(jacobian, np.eye(3) - np.outer(e, e), atol=4 * EPS)


def test_log_of_the_antipode_is_zero():
    """Where the shortest tangent vector is not unique, log_x(−x) = 0."""
    x = tokens(np.random.default_rng(0), 20, 5)
    np.testing.assert_array_equal(sphere.log(x, -x), 0)


def test_log_keeps_relative_precision_near_x():
    """log_x(exp_x v) = v to all digits for |v| = 1e−5, where y − x loses eleven of them
    only as data, not in the formula: the exact log of the float point y is the measure."""
    x = jnp.array([0.6, 0.8, 0.0])
    y = sphere.exp(x, jnp.array([0.8e-5, -0.6e-5, 2e-5]))
    with mpmath.workdps(50):
        a, b = [[mpmath.mpf(float(c)) for c in v] for v in (x, y)]
        a, b = [[c / mpmath.norm(v) for c in v] for v in (a, b)]
        inner = mpmath.fdot(a, b)
        flat = [q - inner * p for p, q in zip(a, b)]
        scale = mpmath.acos(inner) / mpmath.norm(flat)
        exact = np.array([float(scale * c) for c in flat])
    error = np.linalg.norm(np.asarray(sphere.log(x, y)) - exact)
    assert error <= 4 * EPS  # the float x and y are unit to rounding only


@given(dimensions, seeds)
def test_everything_turns_with_the_sphere(d, seed):
    """f(xR, yR) = f(x, y)R for normalise, project, exp and log."""
    rng = np.random.default_rng(seed)
    x, g, turn = tokens(rng, 4, d), tokens(rng, 4, d), random_rotation(rng, d)
    v = tangents(rng, x)
    near = sphere.exp(
        x, v
    )  # at distance 1: away from the antipode, where log is singular
    atol = 16 * d * EPS
    for f, y in ((sphere.project, g), (sphere.exp, v), (sphere.log, near)):
        np.testing.assert_allclose(f(x @ turn, y @ turn), f(x, y) @ turn, atol=atol)
    turned = sphere.normalise(3 * g @ turn)
    np.testing.assert_allclose(turned, sphere.normalise(3 * g) @ turn, atol=atol)


# ------------------------------------------------------------------- projections


@given(dimensions, seeds)
def test_project_is_the_orthogonal_projector_onto_the_tangent_space(d, seed):
    """P_x v ⟂ x, P_x P_x = P_x, P_x x = 0, and P_x is symmetric: ⟨u, P_x v⟩ = ⟨P_x u, v⟩."""
    rng = np.random.default_rng(seed)
    x, u, v = tokens(rng, 5, d), *jnp.asarray(rng.normal(size=(2, 5, d)))
    once = sphere.project(x, v)
    atol = 8 * d * EPS * np.abs(v).max() * max(1, np.abs(u).max())
    np.testing.assert_allclose(np.sum(once * x, axis=1), 0, atol=atol)
    np.testing.assert_allclose(sphere.project(x, once), once, atol=atol)
    np.testing.assert_allclose(sphere.project(x, x), 0, atol=atol)
    left, right = np.sum(u * once, 1), np.sum(sphere.project(x, u) * v, 1)
    np.testing.assert_allclose(left, right, atol=atol)


def test_normalise_is_the_nearest_point_and_idempotent():
    """x/|x|; the origin has no nearest point and gives NaN."""
    g = jnp.asarray(np.random.default_rng(8).normal(size=(6, 3)))
    x = sphere.normalise(g)
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, rtol=2 * EPS)
    np.testing.assert_allclose(sphere.normalise(x), x, rtol=2 * EPS)
    np.testing.assert_allclose(np.cross(g, x), 0, atol=8 * EPS)
    assert np.isnan(np.asarray(sphere.normalise(jnp.zeros(3)))).all()


def test_safe_norm_has_slope_zero_at_the_origin():
    """|x| with gradient x/|x|, and 0 instead of NaN at x = 0."""
    np.testing.assert_array_equal(jax.grad(sphere.safe_norm)(jnp.zeros(3)), 0)
    x = jnp.asarray([3.0, 0.0, 4.0])
    assert float(sphere.safe_norm(x)) == 5
    np.testing.assert_allclose(jax.grad(sphere.safe_norm)(x), x / 5, rtol=2 * EPS)


# ------------------------------------------------------------------- numbers, angles


def test_area_matches_what_is_known():
    """|S¹| = 2π, |S²| = 4π, |S³| = 2π², |S⁴| = 8π²/3, and |S^{d+1}| = 2π|S^{d−1}|/d."""
    known = {2: 2 * math.pi, 3: 4 * math.pi, 4: 2 * math.pi**2, 5: 8 * math.pi**2 / 3}
    for d, value in known.items():
        np.testing.assert_allclose(sphere.area(d), value, rtol=8 * EPS)
    for d in range(2, 60):
        np.testing.assert_allclose(
            sphere.area(d + 2), 2 * math.pi * sphere.area(d) / d, rtol=200 * EPS
        )


def test_angles_invert_from_angles():
    """atan2 of (cos θ, sin θ) is θ on (−π, π]; the slope of θ ↦ x is the tangent."""
    theta = np.linspace(-3.1, math.pi, 41)
    x = sphere.from_angles(theta)
    np.testing.assert_allclose(sphere.angles(x), theta, atol=4 * EPS)
    slope = central_difference(sphere.from_angles, 0.7, 1e-3)
    np.testing.assert_allclose(
        jax.jacobian(sphere.from_angles)(0.7), slope, atol=1e-12 / 30 + 1e3 * EPS
    )


# ------------------------------------------------------------------- refusals

GOOD = np.eye(3)[:2]


@pytest.mark.parametrize(
    ("x", "d", "message"),
    [
        (np.ones(3), None, r"must have shape \(n, d\).*has shape \(3,\).*jax\.vmap"),
        (np.ones((1, 2, 3)), None, r"must have shape \(n, d\).*shape \(1, 2, 3\)"),
        (np.ones((0, 3)), None, r"at least one token, but has shape \(0, 3\)"),
        (np.ones((4, 1)), None, r"d ≥ 2 columns, but has shape \(4, 1\)"),
        (GOOD, 4, r"d = 4 columns to fit the matrices, but has shape \(2, 3\)"),
        (1.01 * GOOD, None, r"norm 1 to within 1e-05, but row 0 has norm 1\.01\. Use"),
        (
            np.add(GOOD, [[0, 0, 0], [0, 0, 2]]),
            None,
            r"row 1 has norm 2\.236.*sphere\.normalise",
        ),
        (np.where(GOOD > 0, np.nan, 0), None, r"row 0 has norm nan"),
        (np.where(GOOD > 0, np.inf, 0), None, r"row 0 has norm inf"),
        (np.zeros((1, 2), int), None, r"row 0 has norm 0\. Use `sphere\.normalise"),
        (1j * GOOD, None, r"must be real, but is complex128"),
    ],
)
def test_bad_tokens_are_refused_by_name(x, d, message):
    """The argument, the rule, the value at fault and the cure."""
    with pytest.raises(ValueError, match=f"Argument `x0` .*{message}"):
        sphere.check_tokens(x, "x0", d)


def test_good_tokens_pass_unchanged():
    """Integers become floats; rows within the tolerance are not touched; dtype stays."""
    np.testing.assert_array_equal(
        sphere.check_tokens(np.eye(2, dtype=int), "x"), np.eye(2)
    )
    x = GOOD * (1 + 9e-6)
    np.testing.assert_array_equal(sphere.check_tokens(x, "x", 3), x)
    assert sphere.check_tokens(GOOD.astype(np.float32), "x").dtype == np.float32


def test_traced_tokens_are_refused_when_the_program_runs():
    """Under jit the shape is refused at once, the norm when the program runs."""
    check = eqx.filter_jit(lambda x: sphere.check_tokens(x, "x0"))
    np.testing.assert_array_equal(check(GOOD), GOOD)
    with pytest.raises(ValueError, match="`x0` must have shape"):
        check(np.ones(3))
    with pytest.raises(eqx.EquinoxRuntimeError, match="`x0` must have rows of norm 1"):
        jax.block_until_ready(check(2 * GOOD))


def test_a_unit_vector_is_one_vector_of_norm_one():
    """check_unit takes (d,), not (1, d), and not norm 2."""
    np.testing.assert_array_equal(sphere.check_unit(GOOD[0], "mean"), GOOD[0])
    with pytest.raises(ValueError, match=r"`mean` must be one unit vector .*\(1, 3\)"):
        sphere.check_unit(GOOD[:1], "mean")
    with pytest.raises(ValueError, match="`mean` must have rows of norm 1"):
        sphere.check_unit(2 * GOOD[0], "mean")
