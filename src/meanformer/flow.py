"""Time: `solve` integrates a field in continuous time, `unroll` runs the discrete
transformer layer by layer. The only module that imports diffrax."""

import itertools
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import tqdm
from jaxtyping import Array, Bool, Float

from . import files, sphere
from .attention import AbstractField, LayerStack
from .checks import ArrayLike, check_count, check_scalar, check_times, is_traced
from .measures import Empirical

Observable = Callable[[Empirical], Any]


class Trajectory(eqx.Module):
    """What `solve` and `unroll` return: tokens at times.

    - `ts` (t,): the times at which tokens were saved; for `unroll`, layer × step.
    - `xs` (t, n, d): the tokens, of norm 1. `weights` (n,): their masses, of sum 1.
    - `observed`: by name, the values of the observables, first axis along `observed_ts`.
    - `stats`: numbers of the run (steps taken, accepted, rejected; or layers).
    - `event_time`, `event_x`: where the event stopped the run, if one was given; `stopped`
        says whether it did.
    - `method`: in words, what computed it.
    """

    ts: Float[Array, " t"]
    xs: Float[Array, "t n d"]
    weights: Float[Array, " n"]
    observed_ts: Float[Array, " s"]
    observed: dict[str, Any]
    stats: dict[str, Array]
    event_time: Float[Array, ""] | None = None
    event_x: Float[Array, "n d"] | None = None
    stopped: Bool[Array, ""] | None = None
    method: str = eqx.field(static=True, default="")

    def measure(self, i: int) -> Empirical:
        """µ at the time `ts[i]`."""
        return Empirical(self.xs[i], self.weights, check=False)

    def save(self, path: str | os.PathLike) -> Path:
        """Write one `.npz` file (arrays, and a JSON header under `meta`; no pickle) that
        `load` reads and NumPy opens. Written whole or not at all. Observables must be
        arrays, or nested dicts of arrays."""
        path = Path(path)
        if path.suffix != ".npz":
            raise ValueError(f"Argument `path` must end in .npz, but is {str(path)!r}.")
        files.check_folder(path.parent, "path")
        arrays = {"ts": self.ts, "xs": self.xs, "weights": self.weights}
        arrays["observed_ts"] = self.observed_ts
        arrays |= _flat("observed", self.observed) | _flat("stats", self.stats)
        for name in ("event_time", "event_x", "stopped"):
            if getattr(self, name) is not None:
                arrays[name] = getattr(self, name)
        meta = {"format": "meanformer trajectory", "version": 1, "method": self.method}
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.atomic(path) as draft, open(draft, "wb") as file:
            named = {k: np.asarray(v) for k, v in arrays.items()}
            named["meta"] = np.array(json.dumps(meta))
            np.savez_compressed(file, **named)  # pyright: ignore[reportArgumentType]
        return path


def _flat(prefix: str, tree: Mapping[str, Any]) -> dict[str, Any]:
    out = {}
    for key, value in tree.items():
        if "/" in key:
            raise ValueError(f"Argument `observables` has a name with a slash: {key!r}.")
        name = f"{prefix}/{key}"
        out |= _flat(name, value) if isinstance(value, Mapping) else {name: value}
    return out


# What NumPy, zipfile, zlib and json answer to files that are foreign, cut or damaged.
_UNREADABLE = (
    AttributeError,
    EOFError,
    KeyError,
    OSError,
    TypeError,
    ValueError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
)


def load(path: str | os.PathLike) -> Trajectory:
    """The trajectory that `Trajectory.save` wrote, in the dtypes it was saved in (float64
    needs jax's x64 mode, else an error says so).

    **Raises:** `ValueError` if the file is not such a file, with the reason."""
    path = Path(path)
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        meta = json.loads(str(arrays.pop("meta")))
        kind = meta["format"], meta["version"]
        missing = {"ts", "xs", "weights", "observed_ts"} - arrays.keys()
    except FileNotFoundError:
        raise ValueError(f"Argument `path` must exist, but {path} does not.") from None
    except _UNREADABLE as error:
        raise ValueError(
            f"Argument `path` must be a file written by `Trajectory.save`, but {path} is "
            f"not: {type(error).__name__}: {error}."
        ) from error
    if kind != ("meanformer trajectory", 1) or missing:
        raise ValueError(
            f"Argument `path` must be a meanformer trajectory of version 1, but {path} "
            f"says {meta}" + (f" and lacks {sorted(missing)}." if missing else ".")
        )
    wide = arrays["xs"].dtype == np.float64
    if wide and jnp.result_type(float) != jnp.float64:
        raise ValueError(
            "Argument `path` holds float64 tokens, but jax runs in float32. Call "
            '`jax.config.update("jax_enable_x64", True)` first.'
        )
    trees: dict[str, Any] = {"observed": {}, "stats": {}}
    fields: dict[str, Any] = {"method": meta["method"]}
    for name, value in arrays.items():
        head, *rest = name.split("/")
        if not rest:
            fields[head] = jnp.asarray(value)
            continue
        node = trees[head]
        for part in rest[:-1]:
            node = node.setdefault(part, {})
        node[rest[-1]] = jnp.asarray(value)
    return Trajectory(**fields, **trees)


# --------------------------------------------------------------- continuous time


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
    rtol: float | None = None,
    atol: float | None = None,
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
        nothing anew.
    - `x0`: tokens (n, d) of equal weight, or an `Empirical`. Its dtype is that of the run.
    - `ts`: strictly increasing times; the run starts at `ts[0]`.
    - `rtol`, `atol`: adaptive steps keep the error of *every* token per step below
        atol + rtol (default 1e-7 in float64, 1e-4 in float32).
    - `step`: a fixed step instead (then no tolerances; choose `ts` on its grid).
    - `solver`: any diffrax solver (default `Tsit5()`); each step ends on the sphere.
        The papers' scheme is `solver=diffrax.Euler(), step=1e-2`.
    - `observables`: name → function of the measure µ_t, evaluated at every time in `ts`
        while integrating (interpolated between steps), nothing else stored.
    - `save`: tokens to keep: "all" times, "last", or indices into `ts`. Adaptive runs step
        exactly onto these.
    - `event`: a function of µ_t; the run stops where it crosses 0, at a time that is
        differentiable. Or a `diffrax.Event` with conditions of (t, y, args, **kwargs).
    - `adjoint`: default `RecursiveCheckpointAdjoint()` (reverse mode); use
        `diffrax.ForwardMode()` for `jax.jvp` and few parameters. Never back-solve:
        clustering contracts, so the backward flow explodes.
    - `max_steps`: refusal beyond. `throw=False` returns the unfinished run instead, with
        `stats["failed"]` set and the times not reached infinite.
    - `progress`: a bar (on a terminal), and Ctrl-C between saved times: the run is then
        integrated from one to the next (equal to the one-shot run up to the tolerance).

    **Returns:** a `Trajectory`. Works under `jit`, `vmap` (a batch of β, of matrices, of
    seeds: adaptive steps per member) and `grad`. Cost: one field evaluation per stage.

    **Raises:** `ValueError` for bad arguments, `RuntimeError` (under `jit`, at run time) if
    steps run out or a token is not finite.
    """
    mu0 = _start(field, x0)
    x, weights = mu0.points, mu0.weights
    ts = check_times(ts, "ts").astype(x.dtype)
    if not is_traced(ts):
        check_times(ts, "ts")  # again: float32 may have merged some
    keep = _kept(save, ts.shape[0], "ts")
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


def _start(field: AbstractField, x0: ArrayLike | Empirical) -> Empirical:
    if not isinstance(field, AbstractField):
        raise ValueError(
            f"Argument `field` must be a field such as `SelfAttention`, but is {field!r}."
        )
    if isinstance(x0, Empirical):
        if x0.d != field.d:
            raise ValueError(
                f"Argument `x0` must be a measure on S^(d−1) with d = {field.d} to fit "
                f"the matrices, but has d = {x0.d}."
            )
        return x0
    return Empirical(sphere.check_tokens(x0, "x0", field.d), check=False)


def _kept(save: str | Sequence[int], count: int, name: str) -> tuple[int, ...]:
    """Indices to keep out of 0 … count − 1, increasing."""
    if isinstance(save, str):
        if save == "all":
            return tuple(range(count))
        if save == "last":
            return (count - 1,)
        raise ValueError(
            f'Argument `save` must be "all", "last" or a list of indices, but is {save!r}.'
        )
    kept = [int(i) for i in save]
    wrong = [i for i in kept if not 0 <= i < count]
    if not kept or wrong or kept != sorted(set(kept)):
        raise ValueError(
            f"Argument `save` must list increasing indices from 0 to {count - 1} (of "
            f"`{name}`), at least one, but is {kept}."
        )
    return tuple(kept)


def _tolerances(
    rtol: float | None, atol: float | None, dtype: Any
) -> tuple[Array, Array]:
    default = 1e-7 if dtype == jnp.float64 else 1e-4
    rtol = default if rtol is None else rtol
    atol = default if atol is None else atol
    least = 4 * float(jnp.finfo(dtype).eps)
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not least <= value < 1:
            raise ValueError(
                f"Argument `{name}` must lie between {least:.1e} (rounding in {dtype}) and "
                f"1, but is {value}. For smaller errors use float64 tokens."
            )
    return jnp.asarray(rtol, dtype), jnp.asarray(atol, dtype)


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
    stats = jax.tree.map(
        lambda *v: jnp.sum(jnp.stack(v), 0), *[p.stats for *_, p in parts]
    )
    stats |= {k: stats[k] > 0 for k in ("failed", "out_of_steps")}
    return Trajectory(
        jnp.stack([times[i] for i in reached]),
        jnp.stack([rows[i] for i in reached]),
        weights,
        ts[: parts[-1][1] + 1] if options.observables else first.observed_ts,
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
    """Without the times after the event, if they can be read."""
    if run.stopped is None or is_traced(run.ts):
        return run
    n, m = (int(np.isfinite(np.asarray(t)).sum()) for t in (run.ts, run.observed_ts))
    observed = jax.tree.map(lambda v: v[:m], run.observed)
    return eqx.tree_at(
        lambda r: (r.ts, r.xs, r.observed_ts, r.observed),
        run,
        (run.ts[:n], run.xs[:n], run.observed_ts[:m], observed),
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


# --------------------------------------------------------------- discrete layers


def unroll(
    field: AbstractField,
    x0: ArrayLike | Empirical,
    layers: int | None = None,
    step: ArrayLike = 1.0,
    *,
    save: str | Sequence[int] = "last",
    observables: Mapping[str, Observable] | None = None,
    progress: bool = False,
) -> Trajectory:
    """The discrete transformer, *multiscale* Eq. (1) with a residual step h:

        x(l+1) = N(x(l) + h F(x(l), µ(l))),   N(x) = x/|x|,

    F the field before projection. h = 1 is the paper's equation; as h → 0 with l·h = t
    fixed, the layers follow `solve` with error O(h).

    **Arguments:**

    - `field`: any field. A `LayerStack` gives layer l its own parameters; a field that
        depends on time is taken at time l·h.
    - `x0`: tokens (n, d) of equal weight, or an `Empirical`.
    - `layers`: number of layers (default: those of the `LayerStack`). `step`: h > 0.
    - `save`: "last", "all" (`layers` + 1 of them: the start is number 0), or a list of
        layer numbers.
    - `observables`: name → function of the measure, evaluated at each saved layer.
    - `progress`: a bar (on a terminal), and Ctrl-C between chunks of layers; not under a
        transformation.

    **Returns:** a `Trajectory` with `ts` = layer number × h. Works under `jit`, `vmap` and
    `grad` (reverse mode recomputes inside each layer: memory O(layers · n d)).

    **Raises:** `ValueError` for bad arguments, `RuntimeError` if a token is not finite.
    """
    mu0 = _start(field, x0)
    x, weights = mu0.points, mu0.weights
    if layers is None:
        if not isinstance(field, LayerStack):
            raise ValueError(
                "Argument `layers` must be given, unless `field` is a `LayerStack`."
            )
        layers = field.layers
    layers = check_count(layers, "layers")
    if isinstance(field, LayerStack) and layers > field.layers:
        raise ValueError(
            f"Argument `layers` must be at most {field.layers}, the layers of the stack, "
            f"but is {layers}."
        )
    step = check_scalar(step, "step", minimum=0.0, strict=True).astype(x.dtype)
    keep = _kept(save, layers + 1, "layers, 0 the start")
    named = tuple((observables or {}).items())
    if progress and not is_traced(field, x, weights, step):
        xs, observed = _unroll_with_bar(field, x, weights, step, keep, named)
    else:
        xs, observed = _unroll(field, x, weights, step, keep, named)
    bad = ~jnp.all(jnp.isfinite(xs))
    message = (
        "`unroll` met a token that is not finite: a layer moved a token onto the origin or "
        "overflowed. Use a smaller `step`."
    )
    if is_traced(bad):
        xs = eqx.error_if(xs, bad, message)
    elif bool(bad):
        raise RuntimeError(message)
    ts = step * jnp.asarray(keep, x.dtype)
    return Trajectory(
        ts,
        xs,
        weights,
        ts if named else ts[:0],
        observed,
        {"layers": jnp.asarray(keep[-1])},
        method="unroll: layers x <- normalise(x + step F)",
    )


def _layer(field: AbstractField, x: Array, weights: Array, step: Array) -> Array:
    return sphere.normalise(x + step * field.drive(x, Empirical(x, weights, check=False)))


def _observe(named, x: Array, weights: Array) -> dict[str, Any]:
    mu = Empirical(x, weights, check=False)
    return {name: f(mu) for name, f in named}


def _runs_of_gaps(keep: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """(first layer, gap, how many times that gap) that lead through the kept layers."""
    runs: list[tuple[int, int, int]] = []
    for a, b in zip((0, *keep), keep):
        if runs and runs[-1][1] == b - a:
            first, gap, count = runs[-1]
            runs[-1] = (first, gap, count + 1)
        elif b > a:
            runs.append((a, b - a, 1))
    return runs


@eqx.filter_jit
def _unroll(field, x, weights, step, keep, named):
    stack = isinstance(field, LayerStack)

    @jax.checkpoint  # keep x(l) only
    def one(x, entry):
        if stack:
            return _layer(entry, x, weights, step), None
        return _layer(field.at(entry.astype(x.dtype) * step), x, weights, step), None

    def entries(first, gap, count):
        l = np.arange(first, first + gap * count)
        tree = (
            jax.tree.map(lambda leaf: leaf[l], field.stacked) if stack else jnp.array(l)
        )
        return jax.tree.map(lambda a: a.reshape(count, gap, *a.shape[1:]), tree)

    def across(x, gap_entries):
        x, _ = jax.lax.scan(one, x, gap_entries)
        return x, (x, _observe(named, x, weights))

    rows = []
    if keep[0] == 0:
        rows.append(
            jax.tree.map(lambda a: jnp.asarray(a)[None], (x, _observe(named, x, weights)))
        )
    for first, gap, count in _runs_of_gaps(keep):
        x, out = jax.lax.scan(across, x, entries(first, gap, count))
        rows.append(out)
    return jax.tree.map(lambda *r: jnp.concatenate(r), *rows)


@eqx.filter_jit
def _advance(field, x, weights, step, first, last):
    """Layers `first` … `last` − 1, numbers that need not be known to the compiler."""

    def body(l, x):
        if isinstance(field, LayerStack):
            return _layer(field.layer(l), x, weights, step)
        return _layer(field.at(l.astype(x.dtype) * step), x, weights, step)

    return jax.lax.fori_loop(first, last, body, x)


_observe_jit = eqx.filter_jit(_observe)


def _unroll_with_bar(field, x, weights, step, keep, named):
    chunk = max(1, 2**27 // x.shape[0] ** 2)  # about a second of pairs
    rows, done = [], 0
    with tqdm.tqdm(total=keep[-1], unit="layer", disable=None) as bar:
        for stop in keep:
            while done < stop:
                last = min(done + chunk, stop)
                ends = jnp.asarray(done), jnp.asarray(last)
                x = jax.block_until_ready(_advance(field, x, weights, step, *ends))
                bar.update(last - done)
                done = last
            rows.append((x, _observe_jit(named, x, weights)))
    return jax.tree.map(lambda *r: jnp.stack(r), *rows)
