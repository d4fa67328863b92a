"""Continuous time: `solve` integrates a field on the sphere. The only module that imports
diffrax."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import tqdm
from jaxtyping import Array

from . import sphere
from .attention import AbstractField, LayerStack
from .checks import (
    ArrayLike,
    as_float,
    check_count,
    check_scalar,
    check_times,
    is_traced,
    refuse,
    shown,
)
from .measures import Empirical
from .trajectory import Observable, Trajectory, kept_indices, starting_measure


class Projected(dfx.AbstractWrappedSolver):
    """Any diffrax solver, with each step ended on the sphere: y ← y/|y|.

    With a field that normalises its argument (as `solve` sees to) the last stage of a
    first-same-as-last method stays exact, and the order of the solver is kept."""

    solver: dfx.AbstractSolver

    @property
    def term_structure(self):
        return self.solver.term_structure

    @property
    def interpolation_cls(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.solver.interpolation_cls

    @property
    def term_compatible_contr_kwargs(self):
        return self.solver.term_compatible_contr_kwargs

    @property
    def scan_kind(self):  # read by ForwardMode and DirectAdjoint
        return getattr(self.solver, "scan_kind", "lax")

    @property
    def root_finder(self):  # read by PIDController
        return self.solver.root_finder  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def root_find_max_steps(self):
        return self.solver.root_find_max_steps  # pyright: ignore

    def order(self, terms):
        return self.solver.order(terms)

    def strong_order(self, terms):
        return self.solver.strong_order(terms)

    def error_order(self, terms):
        return self.solver.error_order(terms)

    def init(self, terms, t0, t1, y0, args):
        return self.solver.init(terms, t0, t1, y0, args)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        if isinstance(args, tuple) and isinstance(args[0], LayerStack):
            # All stages belong to this layer, also where the next begins at t1; a stage
            # kept from the step before may not.
            args, made_jump = (
                (args[0].at(jnp.asarray(t0 + (t1 - t0) / 2)), *args[1:]),
                True,
            )
        y1, error, dense, state, result = self.solver.step(
            terms, t0, t1, y0, args, solver_state, made_jump
        )
        return sphere.normalise(y1), error, dense, state, result

    def func(self, terms, t0, y0, args):
        return self.solver.func(terms, t0, y0, args)


def _velocity(t: Array, y: Array, args: tuple[AbstractField, Array]) -> Array:
    """χ at y/|y|: constant along rays, so that rounding off the sphere cannot grow."""
    field, weights = args
    x = sphere.normalise(y)
    return field.at(t).tangent(x, Empirical(x, weights, check=False))


def solve(
    field: AbstractField,
    x0: ArrayLike | Empirical,
    ts: ArrayLike,
    *,
    rtol: ArrayLike | None = None,
    atol: ArrayLike | None = None,
    step: ArrayLike | None = None,
    solver: dfx.AbstractSolver | None = None,
    observables: Mapping[str, Observable] | None = None,
    save: str | Sequence[int] = "all",
    event: Callable[[Empirical], Array] | dfx.Event | None = None,
    adjoint: dfx.AbstractAdjoint | None = None,
    max_steps: int = 100_000,
    throw: bool = True,
    progress: bool = False,
) -> Trajectory:
    """Integrate ẋᵢ = χ[µ_t](xᵢ), µ_t = Σ wⱼ δ_{xⱼ}, from `ts[0]` to `ts[-1]`.

    **Arguments:**

    - `field`: any field; its arrays are differentiable inputs and new values compile
        nothing anew (nor do new `x0`, `ts`; define observables and events once, since a new
        function is a new program).
    - `x0`: tokens (n, d) of equal weight, or an `Empirical`. Its dtype is that of the run.
    - `ts`: strictly increasing times; the run starts at `ts[0]`.
    - `rtol`, `atol`: adaptive steps keep the error of *every* token per step below
        atol + rtol (default 1e-7 in float64, 1e-4 in float32).
    - `step`: a fixed step instead (then no tolerances; choose `ts` on its grid).
    - `solver`: any diffrax solver (default `Tsit5()`); each step ends on the sphere.
        The papers' scheme is `solver=diffrax.Euler(), step=1e-2`. An implicit solver with a
        fixed step needs its own root finder, `Kvaerno3(root_finder=optimistix.Newton(…))`.
    - `observables`: name → function of the measure µ_t, evaluated at every time in `ts`
        while integrating (interpolated between steps), nothing else stored.
    - `save`: tokens to keep: "all" times, "last", or indices into `ts`. Adaptive runs step
        exactly onto these.
    - `event`: a function of µ_t; the run stops where it crosses 0, at a time that is
        differentiable, and the state there is appended to what is saved (under `jit` and
        `vmap` shapes are fixed: read `event_time`, `event_x`; times not reached are
        infinite). Or a `diffrax.Event` with conditions of (t, y, args, **kwargs).
    - `adjoint`: default `RecursiveCheckpointAdjoint()` (reverse mode); use
        `diffrax.ForwardMode()` for `jax.jvp` and few parameters. Never back-solve:
        clustering contracts, so the backward flow explodes.
    - `max_steps`: refusal beyond. `throw=False` returns the unfinished run instead, with
        `stats["failed"]` set and the times not reached infinite.
    - `progress`: a bar (on a terminal), and Ctrl-C between saved times: the run is then
        integrated from one to the next (equal to the one-shot run up to the tolerance;
        `max_steps` counts for each interval; not with an `event`).

    **Returns:** a `Trajectory`. Works under `jit`, `vmap` (a batch of β, of matrices, of
    seeds: adaptive steps per member) and `grad`. Cost: one field evaluation per stage.

    **Raises:** `ValueError` for bad arguments, `RuntimeError` (under `jit`, at run time) if
    steps run out or a token is not finite.
    """
    mu0 = starting_measure(field, x0)
    x, weights = mu0.points, mu0.weights
    ts = check_times(ts, "ts").astype(x.dtype)
    if not is_traced(ts):
        check_times(ts, "ts")  # again: float32 may have merged some
    keep = kept_indices(save, ts.shape[0], "ts")
    fixed = step is not None
    if fixed:
        if rtol is not None or atol is not None:
            raise ValueError(
                "Arguments `rtol` and `atol` must be left out with a fixed `step`."
            )
        dt0 = check_scalar(step, "step", minimum=0.0, strict=True).astype(x.dtype)
        tolerances = None
    else:
        dt0, tolerances = None, _tolerances(rtol, atol, x.dtype)
    inner = dfx.Tsit5() if solver is None else solver
    if not isinstance(inner, dfx.AbstractSolver):
        raise ValueError(
            f"Argument `solver` must be a diffrax solver, but is {inner!r}. For example "
            "`diffrax.Tsit5()`."
        )
    if isinstance(adjoint, dfx.BacksolveAdjoint):
        raise ValueError(
            "Argument `adjoint` must not be `BacksolveAdjoint`: clustering contracts, so "
            "the backward flow explodes and the gradient is wrong. Use "
            "`RecursiveCheckpointAdjoint()` or `ForwardMode()`."
        )
    if not fixed and not isinstance(inner, dfx.AbstractAdaptiveSolver):
        raise ValueError(
            f"Argument `step` must be given for {type(inner).__name__}, which has no error "
            "estimate for adaptive steps. For example `step=1e-2`."
        )
    if ts.shape[0] == 1:
        return _standing(mu0, ts, observables)
    options = _Options(
        Projected(inner),
        dfx.RecursiveCheckpointAdjoint() if adjoint is None else adjoint,
        check_count(max_steps, "max_steps"),
        tolerances,
        _as_event(event),
        tuple((observables or {}).items()),
    )
    pieces = progress and event is None and not is_traced(field, x, weights, ts)
    if pieces:
        run = _in_pieces(field, x, weights, ts, dt0, keep, options)
    else:
        run = _integrate(field, x, weights, ts, dt0, keep, options)
    run = _judged(run, options.max_steps) if throw else run
    return _cut_at_event(run)


class _Options(eqx.Module):
    """What is fixed at compile time, but for arrays inside of it."""

    solver: Projected
    adjoint: dfx.AbstractAdjoint
    max_steps: int = eqx.field(static=True)
    tolerances: tuple[Array, Array] | None
    event: dfx.Event | None
    observables: tuple[tuple[str, Observable], ...]

    @property
    def words(self) -> str:
        name = type(self.solver.solver).__name__
        if self.tolerances is None:
            return f"solve: projected {name}, fixed steps"
        return f"solve: projected {name}, adaptive steps"


def _tolerances(rtol: Any, atol: Any, dtype: Any) -> tuple[Array, Array]:
    default = 1e-7 if dtype == jnp.float64 else 1e-4
    least = 4 * float(jnp.finfo(dtype).eps)

    def checked(name: str, value: Any) -> Array:
        value = as_float(default if value is None else value, name)
        return refuse(
            value.astype(dtype),
            ~((value >= least) & (value < 1)),
            f"Argument `{name}` must lie between {least:.1e} (rounding in {dtype}) and 1, but "
            f"is {shown(value)}. For smaller errors use float64 tokens.",
        )

    return checked("rtol", rtol), checked("atol", atol)


class _Crossing(eqx.Module):
    """An event as diffrax wants it; equal for equal functions, so that nothing compiles
    anew."""

    event: Callable[[Empirical], Array]

    def __call__(self, t, y, args, **kwargs):
        del t, kwargs
        value = jnp.asarray(
            self.event(Empirical(sphere.normalise(y), args[1], check=False))
        )
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(
                "Argument `event` must return a real number that crosses 0, but returns "
                f"{value.dtype}. Return a difference, or give a `diffrax.Event`."
            )
        return value.astype(jnp.result_type(float))  # diffrax compares it with 0.0


class _Bisection(optx.AbstractRootFinder):
    """Halves the step in which the event happened until its ends are neighbours. Values
    are read by their sign alone: they may have any unit, and rounding."""

    rtol: float = 0.0
    atol: float = 0.0
    norm: Callable = optx.max_norm

    def init(self, fn, y, args, options, f_struct, aux_struct, tags):
        del y, f_struct, aux_struct, tags
        lower, upper = options["lower"], options["upper"]
        return lower, upper, fn(lower, args)[0] > fn(upper, args)[0]

    def step(self, fn, y, args, options, state, tags):
        del options, tags
        lower, upper, falls = state
        value, aux = fn(y, args)
        early = jnp.where(falls, value > 0, value < 0)
        lower, upper = jnp.where(early, y, lower), jnp.where(early, upper, y)
        return lower + (upper - lower) / 2, (lower, upper, falls), aux

    def terminate(self, fn, y, args, options, state, tags):
        lower, upper, _ = state
        middle = lower + (upper - lower) / 2
        return (middle <= lower) | (middle >= upper), optx.RESULTS.successful

    def postprocess(self, fn, y, aux, args, options, state, tags, result):
        return y, aux, {}


def _as_event(event: Any) -> dfx.Event | None:
    if event is None or isinstance(event, dfx.Event):
        return event
    if not callable(event):
        raise ValueError(
            f"Argument `event` must be a function of the measure or a `diffrax.Event`, but "
            f"is {event!r}."
        )
    crossing = _Crossing(event)  # pyright: ignore[reportArgumentType]
    return dfx.Event(crossing, root_finder=_Bisection())


def _controller(options: _Options, onto: Array, field: AbstractField):
    if options.tolerances is None:
        return dfx.ConstantStepSize()
    rtol, atol = options.tolerances
    pid = dfx.PIDController(rtol=rtol, atol=atol, norm=optx.max_norm)
    jumps = field.times.astype(onto.dtype) if isinstance(field, LayerStack) else None
    return dfx.ClipStepSizeController(pid, step_ts=onto, jump_ts=jumps)


@eqx.filter_jit
def _integrate(
    field: AbstractField,
    x0: Array,
    weights: Array,
    ts: Array,
    dt0: Array | None,
    keep: tuple[int, ...],
    options: _Options,
) -> Trajectory:
    saved_ts = ts[np.array(keep)]

    def observe(t, y, args):
        del t
        mu = Empirical(sphere.normalise(y), args[1], check=False)
        return {name: f(mu) for name, f in options.observables}

    subs = {"x": dfx.SubSaveAt(ts=saved_ts, fn=lambda t, y, args: sphere.normalise(y))}
    if options.observables:
        subs["observed"] = dfx.SubSaveAt(ts=ts, fn=observe)
    if options.event is not None:
        subs["end"] = dfx.SubSaveAt(t1=True, fn=lambda t, y, args: sphere.normalise(y))
    solution = dfx.diffeqsolve(
        dfx.ODETerm(_velocity),  # pyright: ignore[reportArgumentType]
        options.solver,
        ts[0],
        ts[-1],
        dt0,
        x0,
        (field, weights),
        saveat=dfx.SaveAt(subs=subs),
        stepsize_controller=_controller(options, saved_ts, field),
        adjoint=options.adjoint,
        event=options.event,
        max_steps=options.max_steps,
        throw=False,
    )
    assert solution.ys is not None
    assert solution.ts is not None
    xs = solution.ys["x"]
    stopped = dfx.is_event(solution.result)
    failed = ~(dfx.is_okay(solution.result) | stopped)
    reached = jnp.isfinite(solution.ts["x"])
    broken = jnp.any(jnp.isnan(xs)) | jnp.any(~jnp.isfinite(xs) & reached[:, None, None])
    stats = {
        "steps": solution.stats["num_steps"],
        "accepted": solution.stats["num_accepted_steps"],
        "rejected": solution.stats["num_rejected_steps"],
        "failed": failed | broken,
        "out_of_steps": solution.result == dfx.RESULTS.max_steps_reached,
    }
    extra = {}
    if options.event is not None:
        extra = {
            "event_time": solution.ts["end"][0],
            "event_x": solution.ys["end"][0],
            "stopped": stopped,
        }
    return Trajectory(
        solution.ts["x"],
        xs,
        weights,
        solution.ts["observed"] if options.observables else ts[:0],
        solution.ys["observed"] if options.observables else {},
        stats,
        **extra,
        method=options.words,
    )


def _in_pieces(field, x, weights, ts, dt0, keep, options) -> Trajectory:
    """One compiled call per interval between kept times, so that a bar can move."""
    ends = sorted({0, *keep, ts.shape[0] - 1})
    parts = []
    with tqdm.tqdm(
        total=round(float(ts[-1] - ts[0]), 6),
        unit="t",
        disable=None,
        bar_format="{l_bar}{bar}| t = {n:.4g} of {total:.4g} [{elapsed}<{remaining}]",
    ) as bar:
        for i, j in itertools.pairwise(ends):
            part = _integrate(field, x, weights, ts[i : j + 1], dt0, (0, j - i), options)
            x = jax.block_until_ready(part.xs[-1])
            parts.append((i, j, part))
            bar.update(float(ts[j] - ts[i]))
            if bool(part.stats["failed"]):
                break
    first = parts[0][2]
    rows = {i: part.xs[0] for i, _, part in parts} | {
        j: part.xs[1] for _, j, part in parts
    }
    times = {i: part.ts[0] for i, _, part in parts} | {
        j: part.ts[1] for _, j, part in parts
    }
    reached = [i for i in keep if i in rows]
    observed = jax.tree.map(
        lambda *v: jnp.concatenate([v[0][:1], *[a[1:] for a in v]]),
        *[part.observed for _, _, part in parts],
    )
    observed_ts = jnp.concatenate(
        [first.observed_ts[:1], *[part.observed_ts[1:] for *_, part in parts]]
    )
    stats = jax.tree.map(
        lambda *v: jnp.sum(jnp.stack(v), 0), *[p.stats for *_, p in parts]
    )
    stats |= {k: stats[k] > 0 for k in ("failed", "out_of_steps")}
    return Trajectory(
        jnp.stack([times[i] for i in reached]),
        jnp.stack([rows[i] for i in reached]),
        weights,
        observed_ts,
        observed,
        stats,
        method=options.words,
    )


def _judged(run: Trajectory, max_steps: int) -> Trajectory:
    """The run, or a `RuntimeError` that says how far it came and what helps."""
    failed = run.stats["failed"]
    cure = (
        "Use larger tolerances, float64 tokens, or a larger `max_steps`; long plateaus "
        "between merging clusters need an implicit solver such as `diffrax.Kvaerno3()`."
    )
    if is_traced(failed):
        xs = eqx.error_if(
            run.xs,
            failed,
            f"`solve` failed: max_steps = {max_steps} used up, or a token not finite. {cure}",
        )
        return eqx.tree_at(lambda r: r.xs, run, xs)
    if bool(failed):
        reached = np.asarray(run.ts)[np.isfinite(np.asarray(run.ts))]
        last = f"{reached[-1]:g}" if reached.size else "the start"
        if bool(run.stats["out_of_steps"]):
            why = f"used up max_steps = {max_steps}"
        else:
            why = "met a value that is not finite, or a step too small to take"
        raise RuntimeError(
            f"`solve` {why} after {int(run.stats['steps'])} steps; the last saved time "
            f"reached is {last}. {cure}"
        )
    return run


def _cut_at_event(run: Trajectory) -> Trajectory:
    """Without the times after the event, and with its own, if they can be read."""
    if run.stopped is None or is_traced(run.ts):
        return run
    n, m = (int(np.isfinite(np.asarray(t)).sum()) for t in (run.ts, run.observed_ts))
    observed = jax.tree.map(lambda v: v[:m], run.observed)
    ts, xs = run.ts[:n], run.xs[:n]
    if bool(run.stopped) and run.event_time is not None and run.event_x is not None:
        ts = jnp.append(ts, run.event_time)
        xs = jnp.concatenate([xs, run.event_x[None]])
    return eqx.tree_at(
        lambda r: (r.ts, r.xs, r.observed_ts, r.observed),
        run,
        (ts, xs, run.observed_ts[:m], observed),
    )


def _standing(mu: Empirical, ts: Array, observables) -> Trajectory:
    """The run of no duration."""
    observed = {
        name: jax.tree.map(lambda v: jnp.asarray(v)[None], f(mu))
        for name, f in (observables or {}).items()
    }
    stats = {k: jnp.asarray(0) for k in ("steps", "accepted", "rejected")}
    stats |= {k: jnp.asarray(False) for k in ("failed", "out_of_steps")}
    where = ts if observed else ts[:0]
    return Trajectory(ts, mu.points[None], mu.weights, where, observed, stats)
