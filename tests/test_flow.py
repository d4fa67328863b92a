"""`solve` and `unroll`: orders of convergence, runs against SciPy's DOP853, the sphere,
events, observables, layers, files, transformations and refusals."""

import functools
import io
import sys

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optimistix as optx
import pytest

import meanformer as mf
import reference as ref
from meanformer import (
    Empirical,
    LayerStack,
    SelfAttention,
    TimeDependent,
    Trajectory,
    Uniform,
    ZeroTemperature,
    load,
    solve,
    unroll,
)

BETA = 4.0
EQUAL = np.full(8, 1 / 8)
SPAN = np.array([0.0, 1.0])
GRID = np.linspace(0.0, 2.0, 5)
CASES = {"contracting": (1.0, 3, 0), "repulsive": (-1.5, 2, 2)}


def problem(kind="contracting", beta=BETA):
    """A field with V near ±I, matrices of no symmetry, and 8 tokens on S²."""
    sign, seed, start = CASES[kind]
    Q, K, V = ref.matrices(seed, 3)
    V = sign * (np.eye(3) + V / 2)
    return SelfAttention(Q, K, V, beta), (Q, K, V, beta), ref.tokens(start, 8, 3)


@functools.cache
def reference_run(kind, beta=BETA, t1=1.0, points=2):
    """The tokens at `points` equidistant times from 0 to t1, by DOP853 at 1e−13."""
    _, matrices, x0 = problem(kind, beta)
    velocity = ref.attention_velocity(EQUAL, *matrices)
    return ref.flow(velocity, x0, np.linspace(0, t1, points), 1e-13)


def distance(run, x):
    return np.abs(np.asarray(run.xs[-1]) - x).max()


# --------------------------------------------------------------- convergence, accuracy

# The root finder of an implicit method needs a tolerance of its own with fixed steps.
NEWTON = optx.Newton(rtol=1e-11, atol=1e-11)
SOLVERS = {
    "Euler": (dfx.Euler(), 1, (50, 100, 200)),
    "Heun": (dfx.Heun(), 2, (50, 100, 200)),
    "Kvaerno3": (dfx.Kvaerno3(root_finder=NEWTON), 3, (16, 32, 64)),
    "Tsit5": (dfx.Tsit5(), 5, (16, 24, 32)),
    "Dopri8": (dfx.Dopri8(), 8, (4, 5, 6, 7)),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_projected_solvers_keep_their_order(name):
    """error ≈ C hᵖ for p the order of the method in flat space: the fitted slope of the
    logarithms is p ± 0.2, for attraction and for repulsion."""
    solver, order, counts = SOLVERS[name]
    for kind in CASES:
        field, _, x0 = problem(kind)
        end = reference_run(kind)[-1]
        runs = [solve(field, x0, SPAN, step=1 / n, solver=solver) for n in counts]
        errors = [distance(run, end) for run in runs]
        assert [int(run.stats["steps"]) for run in runs] == list(counts)
        assert abs(ref.fitted_order(1 / np.array(counts), errors) - order) <= 0.2


@pytest.mark.parametrize("kind", CASES)
def test_layers_tend_to_the_flow_with_order_one(kind):
    """unroll(layers, h) with l·h = t fixed: error ≈ C h."""
    field, _, x0 = problem(kind)
    end, counts = reference_run(kind)[-1], (50, 100, 200)
    errors = [distance(unroll(field, x0, n, 1 / n), end) for n in counts]
    assert abs(ref.fitted_order(1 / np.array(counts), errors) - 1) <= 0.2


@pytest.mark.parametrize("rtol", [1e-4, 1e-7, 1e-10])
@pytest.mark.parametrize("kind", CASES)
def test_adaptive_error_follows_the_tolerance(kind, rtol):
    """Largest error of a coordinate ≤ 10 rtol at t = 1, against DOP853."""
    field, _, x0 = problem(kind)
    run = solve(field, x0, SPAN, rtol=rtol, atol=rtol)
    assert distance(run, reference_run(kind)[-1]) <= 10 * rtol
    assert int(run.stats["accepted"]) <= int(run.stats["steps"])
    assert not bool(run.stats["failed"])


def test_implicit_solver_runs_with_adaptive_steps():
    """`Kvaerno3()`, as the errors recommend for plateaus, takes its tolerances from ours."""
    field, _, x0 = problem()
    run = solve(field, x0, SPAN, solver=dfx.Kvaerno3(), rtol=1e-6, atol=1e-6)
    assert distance(run, reference_run("contracting")[-1]) <= 1e-5


def test_zero_temperature_tokens_follow_scipy():
    """ẋ = P_x V KᵀQx/|KᵀQx|, each token alone."""
    Q, K, V = ref.matrices(3, 3)
    x0 = ref.tokens(0, 8, 3)

    def velocity(t, x):
        u = x @ (Q.T @ K)
        v = (u / np.linalg.norm(u, axis=1, keepdims=True)) @ V.T
        return v - np.sum(x * v, axis=1, keepdims=True) * x

    field = ZeroTemperature(Q, K, V)
    run = solve(field, x0, SPAN, rtol=1e-9, atol=1e-9)
    assert distance(run, ref.flow(velocity, x0, SPAN)[-1]) <= 1e-8
    others = np.concatenate([x0[:1], ref.tokens(1, 7, 3)])
    other = solve(field, others, SPAN, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(other.xs[-1, 0], run.xs[-1, 0], rtol=0, atol=1e-8)


@pytest.mark.parametrize("beta", [0.0, 2.0])
def test_equiangular_tokens_follow_their_law(beta):
    """Q = K = V = I and ⟨xᵢ,xⱼ⟩ = γ for i ≠ j: γ̇ = 2 e^{βγ}(1−γ)(1+(n−1)γ)/(e^β + (n−1)
    e^{βγ}). At β = 0 the odds (1+(n−1)γ)/(1−γ) grow as e^{2t}, in value and slope."""
    n, eye = 8, np.eye(8)

    def simulated(gamma0):
        x0 = jnp.linalg.cholesky((1 - gamma0) * eye + gamma0 * np.ones((n, n)))
        field = SelfAttention(eye, eye, eye, beta)
        x = solve(field, x0, np.array([0.0, 1.5]), rtol=1e-10, atol=1e-10).xs[-1]
        return x[0] @ x[1], x

    gamma0 = 0.2
    gamma, x = simulated(gamma0)
    off = np.asarray(x @ x.T)[~np.eye(n, dtype=bool)]
    np.testing.assert_allclose(off, gamma, rtol=1e-9)

    def velocity(t, g):  # as a flow of one number
        own, other = np.exp(beta), np.exp(beta * g)
        return 2 * other * (1 - g) * (1 + (n - 1) * g) / (own + (n - 1) * other)

    expected = ref.scalar_flow(velocity, gamma0, 1.5)
    np.testing.assert_allclose(gamma, expected, rtol=1e-9)
    if beta == 0:
        odds = (1 + (n - 1) * gamma0) / (1 - gamma0) * np.exp(3.0)
        np.testing.assert_allclose(gamma, (odds - 1) / (odds + n - 1), rtol=1e-9)


# -------------------------------------------------------------------------- the sphere


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_tokens_stay_on_the_sphere_for_many_layers(sign):
    """| |x| − 1 | ≤ 4 · 2⁻⁵² after 10⁵ layers, for V = ±I."""
    eye = np.eye(3)
    field = SelfAttention(eye, eye, sign * eye, 1.0)
    run = unroll(field, ref.tokens(0, 4, 3), 100_000, 0.01)
    norms = np.linalg.norm(run.xs[-1], axis=-1)
    np.testing.assert_allclose(norms, 1, rtol=0, atol=8 * ref.EPS64)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_tokens_stay_on_the_sphere_for_many_steps(sign):
    """| |x| − 1 | ≤ 4 · 2⁻⁵² after 10⁵ steps, for V = ±I: in ambient coordinates V = −I
    would let |x|² − 1 grow as e^{2t}, t = 1000."""
    eye = np.eye(3)
    field = SelfAttention(eye, eye, sign * eye, 1.0)
    ts = np.array([0.0, 1000.0])
    run = solve(field, ref.tokens(0, 4, 3), ts, step=0.01, solver=dfx.Heun())
    assert int(run.stats["steps"]) == 100_000
    norms = np.linalg.norm(run.xs, axis=-1)
    np.testing.assert_allclose(norms, 1, rtol=0, atol=8 * ref.EPS64)


# ---------------------------------------------------------------- laws of the runs


def test_permuted_tokens_run_as_permuted():
    field, _, x0 = problem()
    order = np.random.default_rng(0).permutation(8)
    plain, permuted = solve(field, x0, SPAN), solve(field, x0[order], SPAN)
    np.testing.assert_allclose(permuted.xs[-1], plain.xs[-1][order], rtol=0, atol=1e-12)
    plain, permuted = unroll(field, x0, 5, 0.2), unroll(field, x0[order], 5, 0.2)
    np.testing.assert_allclose(permuted.xs[-1], plain.xs[-1][order], rtol=0, atol=1e-12)


def test_weights_count_coincident_tokens():
    """A token of weight 2/3 and one of 1/3 move as three equal tokens, two coincident;
    tokens of weight 0 are moved, and move none."""
    field, _, x0 = problem()
    x = x0[[0, 1, 0, 3, 4, 5, 6, 7]]  # rows 0 and 2 coincide
    merged, split = np.zeros((2, 8))
    merged[:2], split[:3] = [2 / 3, 1 / 3], 1 / 3
    for run in (
        functools.partial(solve, ts=SPAN, rtol=1e-10, atol=1e-10),
        functools.partial(unroll, layers=5, step=0.2),
    ):
        runs = [run(field, Empirical(x, w)) for w in (merged, split)]
        np.testing.assert_allclose(runs[0].xs[-1], runs[1].xs[-1], rtol=0, atol=1e-12)
        np.testing.assert_allclose(runs[0].xs[-1, 0], runs[0].xs[-1, 2], atol=1e-12)
    velocity = ref.attention_velocity(np.array([2, 1]) / 3, *problem()[1])
    exact = ref.flow(velocity, x0[:2], SPAN)[-1]
    end = solve(field, Empirical(x, merged), SPAN, rtol=1e-10, atol=1e-10).xs[-1]
    np.testing.assert_allclose(end[:2], exact, rtol=0, atol=1e-9)


def test_a_time_shift_changes_nothing():
    """The field does not depend on time: from t = 0 to 1 and from −5 to −4 are one run."""
    field, _, x0 = problem()
    here, there = solve(field, x0, SPAN), solve(field, x0, SPAN - 5)
    np.testing.assert_allclose(there.xs, here.xs, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(there.ts, [-5.0, -4.0])


def test_a_run_of_no_duration_is_its_start():
    field, _, x0 = problem()
    run = solve(field, x0, np.array([2.0]), observables={"mean": mean_length})
    np.testing.assert_array_equal(run.xs, x0[None])
    np.testing.assert_array_equal(run.ts, [2.0])
    assert run.observed["mean"].shape == (1,)


# ----------------------------------------------------------- what is saved and observed


def mean_length(mu):
    """|∫ y dµ|², a number."""
    m = mu.mean(mu.points)
    return m @ m


def several(mu):
    return {"mean": mu.mean(mu.points), "each": {"tokens": mu.points}}


SEEN = {"length": mean_length, "more": several}  # values may be nested dictionaries
TIGHT = {"rtol": 1e-8, "atol": 1e-8, "observables": SEEN}


@pytest.mark.parametrize(
    ("save", "rows"), [("all", [0, 1, 2, 3, 4]), ("last", [4]), ([1, 3], [1, 3])]
)
def test_runs_save_and_observe_what_was_asked_for(save, rows):
    """`save` chooses the times whose tokens are kept; observables are those of µ_t at every
    time of `ts`, saved or not (then interpolated, and still on the sphere)."""
    field, _, x0 = problem()
    exact = reference_run("contracting", t1=2.0, points=5)
    run = solve(field, x0, GRID, save=save, **TIGHT)
    np.testing.assert_array_equal(run.ts, GRID[rows])
    np.testing.assert_allclose(run.xs, exact[rows], rtol=0, atol=1e-7)
    np.testing.assert_array_equal(run.observed_ts, GRID)
    check_observed(run, exact, 1e-7)
    tokens = run.observed["more"]["each"]["tokens"]
    np.testing.assert_allclose(tokens[np.array(rows)], run.xs, rtol=0, atol=1e-15)
    norms = np.linalg.norm(tokens, axis=-1)
    np.testing.assert_allclose(norms, 1, rtol=0, atol=8 * ref.EPS64)
    np.testing.assert_array_equal(run.measure(-1).points, run.xs[-1])
    np.testing.assert_array_equal(run.measure(-1).weights, run.weights)


def check_observed(run, x, tol):
    m = np.asarray(x).mean(axis=1)
    np.testing.assert_allclose(
        run.observed["length"], np.sum(m * m, axis=1), rtol=0, atol=tol
    )
    np.testing.assert_allclose(run.observed["more"]["mean"], m, rtol=0, atol=tol)
    np.testing.assert_allclose(
        run.observed["more"]["each"]["tokens"], x, rtol=0, atol=tol
    )


def test_layers_saved_with_gaps_equal_those_of_the_full_run():
    """`save` of `unroll` lists layers, the start included; observables are those of the
    saved layers."""
    field, _, x0 = problem()
    whole = unroll(field, x0, 12, 0.3, save="all")
    rows = np.array([0, 1, 2, 5, 8, 12])
    some = unroll(field, x0, 12, 0.3, save=rows.tolist(), observables=SEEN)
    np.testing.assert_allclose(some.xs, whole.xs[rows], rtol=0, atol=1e-14)
    np.testing.assert_allclose(some.ts, 0.3 * rows, rtol=1e-15)
    np.testing.assert_array_equal(some.observed_ts, some.ts)
    check_observed(some, some.xs, 1e-15)
    np.testing.assert_array_equal(whole.xs[0], x0)
    assert whole.xs.shape == (13, 8, 3)
    assert whole.observed_ts.shape == (0,)
    assert int(some.stats["layers"]) == 12


def terminal(monkeypatch):
    """A standard error that claims to be a terminal; bars are drawn on no other."""
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


@pytest.mark.parametrize("save", ["all", [1, 3]])
def test_progress_bar_does_not_change_the_run(save, monkeypatch):
    """Integrated piece by piece between saved times: equal up to 10 tolerances."""
    field, _, x0 = problem()
    screen = terminal(monkeypatch)
    bar = solve(field, x0, GRID, save=save, progress=True, **TIGHT)
    plain = solve(field, x0, GRID, save=save, **TIGHT)
    assert_close(bar, plain, 1e-7)
    assert "t = 2 of 2" in screen.getvalue()


def test_progress_bar_does_not_change_the_layers(monkeypatch):
    """Taken in chunks of layers: equal to rounding."""
    field, _, x0 = problem()
    rows = [0, 1, 2, 5, 8, 12]
    screen = terminal(monkeypatch)
    bar, plain = (
        unroll(field, x0, 12, 0.3, save=rows, observables=SEEN, progress=p)
        for p in (True, False)
    )
    assert_close(bar, plain, 1e-14)
    assert "12/12" in screen.getvalue()


def assert_close(a, b, tol):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for p, q in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert p.shape == q.shape
        if jnp.issubdtype(p.dtype, jnp.floating):
            np.testing.assert_allclose(p, q, rtol=0, atol=tol)


# ---------------------------------------------------------------------------- events


LEVEL = 0.12  # |mean|² of the contracting problem passes it at t ≈ 2.2
LONG = np.linspace(0.0, 3.0, 7)


def passes_level(mu):
    return mean_length(mu) - LEVEL


def passes_level_in_other_units(mu):
    return -1e8 * passes_level(mu)


@pytest.fixture(scope="module")
def stopped_run():
    field, _, x0 = problem()
    return solve(field, x0, LONG, event=passes_level, **TIGHT)


def test_event_stops_the_run_where_it_crosses_zero(stopped_run):
    """At the event time DOP853 finds the level passed too; its state is the last one kept,
    later times are cut off."""
    run, (_, matrices, x0) = stopped_run, problem()
    t = float(run.event_time)
    assert bool(run.stopped)
    assert 2.0 < t < 2.5
    velocity = ref.attention_velocity(EQUAL, *matrices)
    exact = ref.flow(velocity, x0, np.array([0.0, t]))[-1]
    np.testing.assert_allclose(run.event_x, exact, rtol=0, atol=1e-7)
    np.testing.assert_allclose(np.sum(exact.mean(axis=0) ** 2), LEVEL, rtol=1e-6)
    np.testing.assert_array_equal(run.ts, [*LONG[:5], t])
    np.testing.assert_array_equal(run.observed_ts, LONG[:5])
    assert run.xs.shape == (6, 8, 3)
    np.testing.assert_array_equal(run.xs[-1], run.event_x)
    check_observed(run, run.xs[:5], 1e-14)


def test_the_unit_of_an_event_does_not_matter(stopped_run):
    """−10⁸ f crosses 0 where f does."""
    field, _, x0 = problem()
    run = solve(field, x0, LONG, event=passes_level_in_other_units, **TIGHT)
    assert bool(run.stopped)
    np.testing.assert_allclose(run.event_time, stopped_run.event_time, rtol=1e-12)


def test_events_work_in_float32(stopped_run):
    """The same crossing, to 100 tolerances."""
    field, _, x0 = problem()
    small = x0.astype(np.float32)
    run = solve(field, small, LONG, event=passes_level, rtol=1e-5, atol=1e-5)
    assert run.event_x.dtype == run.event_time.dtype == jnp.float32
    np.testing.assert_allclose(run.event_time, stopped_run.event_time, rtol=1e-3)


def test_event_that_does_not_happen_leaves_the_run_whole():
    """`stopped` is false, `event_x` the end. A second run compiles nothing."""
    field, _, x0 = problem()
    calls = []

    def never(mu):
        calls.append(1)
        return mean_length(mu) + 1

    run = solve(field, x0, LONG, event=never)
    assert not bool(run.stopped)
    assert float(run.event_time) == 3.0
    np.testing.assert_array_equal(run.ts, LONG)
    np.testing.assert_allclose(run.event_x, run.xs[-1], rtol=0, atol=1e-15)
    traced = len(calls)
    solve(field, x0[::-1], LONG, event=never)
    assert len(calls) == traced


def test_event_time_is_differentiable():
    """dT/dβ of the crossing time, by reverse mode, against central differences."""
    _, (Q, K, V, _), x0 = problem()
    tight = TIGHT | {"rtol": 1e-11, "atol": 1e-11}

    def time(beta):
        field = SelfAttention(Q, K, V, beta)
        return solve(field, x0, LONG, event=passes_level, **tight).event_time

    slope = jax.grad(time)(BETA)
    expected = ref.slope(lambda h: float(time(BETA + h)), 2e-3)
    np.testing.assert_allclose(slope, expected, rtol=1e-6)


def test_events_that_cannot_cross_zero_are_refused():
    field, _, x0 = problem()
    with pytest.raises(ValueError, match=r"`event` must return a real number .* bool"):
        solve(field, x0, SPAN, event=lambda mu: mu.points[0, 0] > 2)


# ------------------------------------------------------- parameters that depend on time


def stack_of_layers(times=None):
    return LayerStack(
        [SelfAttention(*ref.matrices(s, 3), BETA + s) for s in range(3)], times
    )


@functools.cache
def end_of_the_stack():
    """DOP853, started anew at each layer: layers begin at 0, 0.5 and 1.25; end at 2."""
    x = ref.tokens(0, 8, 3)
    for s, (a, b) in enumerate([(0, 0.5), (0.5, 1.25), (1.25, 2.0)]):
        velocity = ref.attention_velocity(EQUAL, *ref.matrices(s, 3), BETA + s)
        x = ref.flow(velocity, x, np.array([a, b]))[-1]
    return x


BEGIN = np.array([0.0, 0.5, 1.25])


@pytest.mark.parametrize("rtol", [1e-6, 1e-9])
def test_adaptive_steps_restart_at_each_layer(rtol):
    """A `LayerStack` in `solve` is the piecewise run, to 10 tolerances."""
    run = solve(
        stack_of_layers(BEGIN), ref.tokens(0, 8, 3), 2 * SPAN, rtol=rtol, atol=rtol
    )
    assert distance(run, end_of_the_stack()) <= 10 * rtol


@pytest.mark.parametrize(("name", "counts"), [("Heun", (64, 128)), ("Tsit5", (16, 32))])
def test_fixed_steps_keep_their_order_across_layers(name, counts):
    """Layers that begin on the grid of the steps: the order is that of smooth fields, for
    no stage of a step takes the matrices of the next layer."""
    solver, order, _ = SOLVERS[name]
    errors = [
        distance(
            solve(
                stack_of_layers(BEGIN),
                ref.tokens(0, 8, 3),
                2 * SPAN,
                step=2 / n,
                solver=solver,
            ),
            end_of_the_stack(),
        )
        for n in counts
    ]
    assert np.log2(errors[0] / errors[1]) >= order - 0.3


def test_unrolled_stack_is_the_loop_over_its_layers():
    """x(l+1) = N(x(l) + h F_l(x(l), µ(l))), layer by layer in NumPy."""
    x0 = ref.tokens(0, 8, 3)
    run = unroll(stack_of_layers(), x0, step=0.7, save="all")
    x = x0
    for l in range(3):
        Q, K, V = ref.matrices(l, 3)
        s = (BETA + l) * x @ Q.T @ K @ x.T
        a = np.exp(s - s.max(axis=1, keepdims=True))
        x = x + 0.7 * (a / a.sum(axis=1, keepdims=True)) @ x @ V.T
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        np.testing.assert_allclose(run.xs[l + 1], x, rtol=0, atol=1e-14)
    assert run.xs.shape == (4, 8, 3)
    fewer = unroll(stack_of_layers(), x0, 2, step=0.7)
    np.testing.assert_allclose(fewer.xs[-1], run.xs[2], rtol=0, atol=1e-15)
    bar = unroll(stack_of_layers(), x0, step=0.7, save="all", progress=True)
    np.testing.assert_allclose(bar.xs, run.xs, rtol=0, atol=1e-15)


def growing(t, args):
    Q, K, V = args
    return SelfAttention(Q, K, jnp.cos(t) * V, BETA * (1 + t))


def test_time_dependent_field_follows_scipy():
    """Q, K fixed, V cos t and β(1 + t): `solve` against DOP853 at 10 tolerances."""
    Q, K, V = ref.matrices(1, 3)
    x0 = ref.tokens(0, 8, 3)

    def velocity(t, x):
        field = ref.attention_velocity(EQUAL, Q, K, np.cos(t) * V, BETA * (1 + t))
        return field(t, x)

    field = TimeDependent(growing, tuple(map(jnp.asarray, (Q, K, V))), dim=3)
    run = solve(field, x0, 2 * SPAN, rtol=1e-8, atol=1e-8)
    assert distance(run, ref.flow(velocity, x0, 2 * SPAN)[-1]) <= 1e-7


def test_time_dependent_layers_take_the_time_of_their_number():
    """Layer l of `unroll` uses the parameters of time l·h."""
    arrays = tuple(map(jnp.asarray, ref.matrices(1, 3)))
    field, x = TimeDependent(growing, arrays, dim=3), jnp.asarray(ref.tokens(0, 8, 3))
    run = unroll(field, x, 3, 0.4)
    bar = unroll(field, x, 3, 0.4, progress=True)
    for l in range(3):
        drive = growing(0.4 * l, arrays).drive(x, Empirical(x))
        x = (x + 0.4 * drive) / jnp.linalg.norm(x + 0.4 * drive, axis=1, keepdims=True)
    np.testing.assert_allclose(run.xs[-1], x, rtol=0, atol=1e-14)
    np.testing.assert_allclose(bar.xs[-1], x, rtol=0, atol=1e-14)


# ------------------------------------------------------------------------------- files


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for p, q in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert p.dtype == q.dtype
        np.testing.assert_array_equal(p, q)


def test_loaded_trajectory_is_the_saved_one_bit_by_bit(stopped_run, tmp_path):
    """Tokens, times, nested observables, statistics, event and method."""
    path = stopped_run.save(tmp_path / "deep" / "run.npz")
    assert_same(load(path), stopped_run)
    assert [p.name for p in path.parent.iterdir()] == ["run.npz"]  # no draft is left
    with np.load(path, allow_pickle=False) as file:
        assert "observed/more/each/tokens" in file.files


def test_layers_and_float32_are_saved_as_they_are(tmp_path):
    field, _, x0 = problem()
    run = unroll(field, x0.astype(np.float32), 5, 0.2)
    assert_same(load(run.save(tmp_path / "run.npz")), run)
    assert load(tmp_path / "run.npz").xs.dtype == jnp.float32


def test_files_are_refused_that_are_no_trajectories(stopped_run, tmp_path):
    """Foreign, damaged or missing: `ValueError` that names `path` and the reason."""
    good = stopped_run.save(tmp_path / "good.npz").read_bytes()
    middle = len(good) // 2
    damaged = {
        "text.npz": b"not an archive at all",
        "empty.npz": b"",
        "short.npz": good[:middle],
        "flipped.npz": good[:middle]
        + bytes(255 - b for b in good[middle : middle + 64])
        + good[middle + 64 :],
    }
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
    np.savez(tmp_path / "foreign.npz", xs=np.zeros(3))
    np.savez(tmp_path / "list.npz", meta=np.array("[1]"))
    np.savez(tmp_path / "bare.npz", meta=np.array('{"format": "other", "version": 1}'))
    header = '{"format": "meanformer trajectory", "version": 1, "method": ""}'
    np.savez(tmp_path / "parts.npz", meta=np.array(header), xs=np.zeros((1, 2, 3)))
    np.save(tmp_path / "array.npy", np.zeros(3))
    made = ["foreign.npz", "list.npz", "bare.npz", "parts.npz", "array.npy"]
    names = [*damaged, *made]
    for name in names:
        with pytest.raises(ValueError, match=r"Argument `path` must be a .*") as caught:
            load(tmp_path / name)
        assert name in str(caught.value)
    with pytest.raises(ValueError, match=r"`path` must exist, but .* does not"):
        load(tmp_path / "nowhere.npz")


def test_paths_and_names_that_cannot_be_saved_are_refused(stopped_run, tmp_path):
    with pytest.raises(ValueError, match=r"`path` must end in .npz, but is .*run.txt"):
        stopped_run.save(tmp_path / "run.txt")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"`path` must be a folder that can be written"):
        stopped_run.save(tmp_path / "file" / "run.npz")
    slashed = eqx.tree_at(
        lambda r: r.observed,
        stopped_run,
        {"a/b": stopped_run.ts},
        is_leaf=lambda v: isinstance(v, dict),
    )
    with pytest.raises(ValueError, match=r"`observables` has a name with a slash"):
        slashed.save(tmp_path / "run.npz")


# --------------------------------------------------------------------- transformations


def test_one_compilation_serves_new_numbers():
    """New β, matrices, tokens, weights, times and tolerances run the code at hand."""
    traced = []

    def counting(mu):
        traced.append(1)
        return mean_length(mu)

    def both(beta, seed, t1, rtol):
        field = SelfAttention(*ref.matrices(seed, 3), beta)
        x0 = Uniform(3).sample(jr.key(seed), 8)
        mu = Empirical(x0, ref.weights(seed, 8))
        seen = {"m": counting}
        ts = np.array([0.0, t1])
        run = solve(field, mu, ts, rtol=rtol, atol=rtol, observables=seen)
        layers = unroll(field, mu, 5, t1 / 5, observables=seen)
        return run, layers

    both(1.0, 0, 1.0, 1e-6)
    once = len(traced)
    run, layers = both(7.5, 1, 2.0, 1e-8)
    assert len(traced) == once
    assert float(run.ts[-1]) == 2.0
    np.testing.assert_allclose(layers.ts, [2.0], rtol=1e-15)


BATCHES = {
    "seeds": lambda i: (BETA, ref.tokens(i, 8, 3), ref.matrices(3, 3)),
    "beta": lambda i: (BETA + i, ref.tokens(0, 8, 3), ref.matrices(3, 3)),
    "matrices": lambda i: (BETA, ref.tokens(0, 8, 3), ref.matrices(i, 3)),
}


def one_run(beta, x0, matrices):
    field = SelfAttention(*matrices, beta)
    return solve(field, x0, SPAN).xs[-1], unroll(field, x0, 5, 0.2).xs[-1]


def test_batches_equal_single_runs():
    """`jax.vmap` over tokens, over β and over matrices: each member steps on its own and
    equals its single run to 1e−10."""
    batched = eqx.filter_jit(jax.vmap(one_run))
    for batch in BATCHES.values():
        members = [batch(i) for i in range(3)]
        stacked = jax.tree.map(
            lambda *v: jnp.stack([jnp.asarray(a) for a in v]), *members
        )
        together = batched(*stacked)
        for i, member in enumerate(members):
            for a, b in zip(together, one_run(*member)):
                np.testing.assert_allclose(a[i], b, rtol=0, atol=1e-10)


def test_the_same_run_twice_is_the_same_bit_by_bit():
    field, _, x0 = problem()
    assert_same(solve(field, x0, SPAN), solve(field, x0, SPAN))
    assert_same(unroll(field, x0, 5, 0.2), unroll(field, x0, 5, 0.2))
    law = Uniform(3)
    np.testing.assert_array_equal(law.sample(jr.key(3), 8), law.sample(jr.key(3), 8))


def test_float32_runs_are_as_accurate_as_float32():
    """dtype of the tokens = dtype of the run; error ≤ 10 rtol, and 8(1 + β) units per
    layer."""
    field, _, x0 = problem()
    small = x0.astype(np.float32)
    run = solve(field, small, SPAN, rtol=1e-5, atol=1e-5)
    assert run.xs.dtype == run.ts.dtype == run.weights.dtype == jnp.float32
    assert distance(run, reference_run("contracting")[-1]) <= 1e-4
    layers, wide = unroll(field, small, 5, 0.2), unroll(field, x0, 5, 0.2)
    assert layers.xs.dtype == jnp.float32
    np.testing.assert_allclose(
        layers.xs, wide.xs, rtol=0, atol=5 * 8 * (1 + BETA) * ref.EPS32
    )


# ---------------------------------------------------------------------------- refusals

EYE = np.eye(3)
FIELD = SelfAttention(EYE, EYE, EYE, 1.0)
X = ref.tokens(0, 4, 3)


@pytest.mark.parametrize(
    "run", [lambda x: solve(FIELD, x, SPAN), lambda x: unroll(FIELD, x, 2)]
)
@pytest.mark.parametrize(
    ("x0", "message"),
    [
        (
            1.01 * X,
            r"`x0` must have rows of norm 1 .* row 0 has norm 1.01.*normalise\(x0",
        ),
        (np.where(X[2, 1] == X, np.nan, X), r"`x0` .* row 2 has norm nan.*normalise"),
        (X[0], r"`x0` must have shape \(n, d\).*\(3,\).*jax.vmap"),
        (X[None], r"`x0` must have shape \(n, d\).*\(1, 4, 3\).*jax.vmap"),
        (X[:0], r"`x0` must hold at least one token, .*\(0, 3\)"),
        (ref.tokens(0, 4, 2), r"`x0` must have d = 3 columns to fit .*\(4, 2\)"),
        (Empirical(ref.tokens(0, 4, 2)), r"`x0` .* d = 3 to fit .* has d = 2"),
    ],
)
def test_tokens_off_the_sphere_are_refused(run, x0, message):
    with pytest.raises(ValueError, match=message):
        run(x0)


INF = float("inf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"ts": np.array([1.0, 0.0])},
            r"`ts` must increase strictly, .* 0 after 1. Sort",
        ),
        ({"ts": np.array([0.0, 1, 1])}, r"`ts` must .* entry 2 is 1 after 1. Sort"),
        ({"ts": np.array([0.0, INF])}, r"`ts` must be finite, .* \(1,\) is inf"),
        ({"ts": np.array([0.0, np.nan])}, r"`ts` must be finite, .* \(1,\) is nan"),
        ({"ts": np.array([])}, r"`ts` must have shape \(t,\) with t ≥ 1, .*\(0,\)"),
        ({"ts": np.array(1.0)}, r"`ts` must have shape \(t,\) with t ≥ 1, .*\(\)"),
        ({"step": 0.0}, r"`step` must be finite and > 0, but is 0.0"),
        ({"step": -0.1}, r"`step` must be finite and > 0, but is -0.1"),
        ({"step": INF}, r"`step` must be finite and > 0, but is inf"),
        ({"step": 0.1, "rtol": 1e-3}, r"`rtol` and `atol` must be left out with a fixed"),
        ({"rtol": 1e-16}, r"`rtol` must lie between 8.9e-16 .* is 1e-16.*float64"),
        ({"atol": -1.0}, r"`atol` must lie between .* but is -1.0"),
        ({"rtol": float("nan")}, r"`rtol` must lie between .* but is nan"),
        ({"rtol": 1.0}, r"`rtol` must lie between .* and 1, but is 1.0"),
        ({"save": "some"}, r'`save` must be "all", "last" or a list .* is \'some\''),
        ({"save": [0, 2]}, r"`save` must list increasing indices from 0 to 1 .*\[0, 2\]"),
        ({"save": [1, 0]}, r"`save` must list increasing indices .* but is \[1, 0\]"),
        ({"save": []}, r"`save` must list .* at least one, but is \[\]"),
        ({"max_steps": 0}, r"`max_steps` must be an integer ≥ 1, but is 0"),
        ({"solver": dfx.Euler()}, r"`step` must be given for Euler, .* `step=1e-2`"),
    ],
)
def test_bad_arguments_of_solve_are_refused(change, message):
    arguments = {"field": FIELD, "x0": X, "ts": SPAN} | change
    with pytest.raises(ValueError, match=message):
        solve(**arguments)


def test_tolerances_below_the_rounding_of_float32_are_refused():
    with pytest.raises(
        ValueError, match=r"`rtol` must .* float32.* 1e-08.*float64 tokens"
    ):
        solve(FIELD, X.astype(np.float32), SPAN, rtol=1e-8)


def test_times_that_float32_cannot_tell_apart_are_refused():
    ts = np.array([0.0, 1.0, 1.0 + 1e-9])
    with pytest.raises(ValueError, match=r"`ts` must increase strictly"):
        solve(FIELD, X.astype(np.float32), ts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, r"`layers` must be an integer ≥ 1, but is 0"),
        ({"layers": None}, r"`layers` must be given, unless `field` is a `LayerStack`"),
        ({"step": 0.0}, r"`step` must be finite and > 0, but is 0.0"),
        ({"step": float("nan")}, r"`step` must be finite and > 0, but is nan"),
        ({"save": "first"}, r'`save` must be "all", "last" or .* is \'first\''),
        (
            {"save": [0, 3]},
            r"`save` must list increasing indices from 0 to 2 .*0 the start",
        ),
        (
            {"field": LayerStack([FIELD]), "layers": 2},
            r"`layers` must be at most 1, the layers of the stack, but is 2",
        ),
    ],
)
def test_bad_arguments_of_unroll_are_refused(change, message):
    arguments = {"field": FIELD, "x0": X, "layers": 2} | change
    with pytest.raises(ValueError, match=message):
        unroll(**arguments)


@pytest.mark.parametrize("progress", [False, True])
def test_running_out_of_steps_names_the_cure(progress):
    """`RuntimeError` with the last time reached; `throw=False` returns the unfinished
    run."""
    few = {"max_steps": 3, "progress": progress}
    message = (
        r"`solve` used up max_steps = 3 .* time reached is 0. Use larger tolerances, "
    )
    with pytest.raises(RuntimeError, match=message):
        solve(FIELD, X, GRID, **few)
    if not progress:
        run = solve(FIELD, X, GRID, throw=False, **few)
        assert bool(run.stats["failed"])
        assert bool(run.stats["out_of_steps"])
        assert not np.isfinite(run.ts[-1])


def test_running_out_of_steps_under_jit_is_refused_at_run_time():
    run = eqx.filter_jit(lambda x: solve(FIELD, x, GRID, max_steps=3).xs[-1])
    with pytest.raises(RuntimeError, match=r"max_steps = 3 used up"):
        jax.block_until_ready(run(jnp.asarray(X)))


def test_jitted_runs_equal_plain_runs_and_refuse_at_run_time():
    """Traced numbers give the same run; bad ones are met by the same rules, later."""
    Q, K, V, beta = problem()[1]

    @eqx.filter_jit
    def run(beta, x, ts):
        return solve(SelfAttention(Q, K, V, beta), x, ts).xs

    good = [jnp.asarray(beta), jnp.asarray(problem()[2]), jnp.asarray(SPAN)]
    plain = solve(problem()[0], *good[1:]).xs
    np.testing.assert_allclose(run(*good), plain, rtol=0, atol=1e-13)
    for i, bad, message in (
        (0, -1.0, r"`beta` must be finite and ≥ 0"),
        (1, 2 * good[1], r"`x0` must have rows of norm 1"),
        (2, SPAN[::-1], r"`ts` must increase strictly"),
    ):
        arguments = [*good[:i], jnp.asarray(bad), *good[i + 1 :]]
        with pytest.raises(RuntimeError, match=message):
            jax.block_until_ready(run(*arguments))


def test_a_layer_that_loses_a_token_is_refused():
    """V = −I and h = 1 move a lone token onto the origin, which has no direction."""
    with pytest.raises(RuntimeError, match=r"`unroll` met a token .* smaller `step`"):
        unroll(SelfAttention(EYE, EYE, -EYE, 1.0), EYE[:1], 1)


def test_a_trajectory_is_a_pytree_of_arrays():
    field, _, x0 = problem()
    run = solve(field, x0, SPAN)
    assert isinstance(run, Trajectory)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(run))
    assert run.method == "solve: projected Tsit5, adaptive steps; sums: Dense"
    assert run.event_time is None


def test_the_state_at_the_event_is_the_last_one_saved():
    """ts[-1] is the event time and the event function vanishes there, whatever is saved."""

    def gap(mu):
        return jnp.sum(mu.mean(mu.points) ** 2) - 0.6

    eye = np.eye(3)
    x0 = mf.Uniform(3).sample(jax.random.key(0), 5)
    for save in ("all", "last"):
        field = mf.SelfAttention(eye, eye, eye, 2.0)
        run = mf.solve(field, x0, [0.0, 1.0, 30.0], event=gap, save=save)
        assert bool(run.stopped)
        assert float(run.ts[-1]) == float(run.event_time)
        assert len(run.ts) == len(run.xs)
        np.testing.assert_allclose(gap(run.measure(-1)), 0, atol=1e-9)
