"""What all runs in continuous time share: one compiled integration, or one for each interval
between kept times; the judgement of how it went."""

import abc
import dataclasses
import itertools
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jaxtyping import Array

from .. import sphere
from ..attention import AbstractField, prepared, sums_in_words
from ..checks import check_times, is_traced
from ..measures import Empirical
from ..trajectory import (
    Observable,
    Trajectory,
    kept_indices,
    starting_measure,
    stats_of_sums,
)
from .projected import Projected


class AbstractPace(eqx.Module):
    """How long the steps are."""

    @abc.abstractmethod
    def controller(
        self, ts: Array, saved_ts: Array, field: AbstractField
    ) -> dfx.AbstractStepSizeController:
        """The controller of a run through `ts` that keeps tokens at `saved_ts`."""


class Options(eqx.Module):
    """What is fixed at compile time, but for arrays inside of it. `term` and `solver` see
    (field, weights) as their `args`."""

    term: dfx.AbstractTerm
    solver: Projected
    pace: AbstractPace
    adjoint: dfx.AbstractAdjoint
    max_steps: int = eqx.field(static=True)
    observables: tuple[tuple[str, Observable], ...]
    words: str = eqx.field(static=True)
    event: dfx.Event | None = None


def starting(
    field: AbstractField, x0: Any, ts: Any, save: Any
) -> tuple[Empirical, Array, tuple[int, ...]]:
    """Checked: the measure at the start, the times in the dtype of its tokens, and which of
    them to keep tokens at."""
    mu0 = starting_measure(field, x0)
    ts = check_times(ts, "ts").astype(mu0.points.dtype)
    if not is_traced(ts):
        check_times(ts, "ts")  # again: float32 may have merged some
    return mu0, ts, kept_indices(save, ts.shape[0], "ts")


def _as_real(value: Any, dtype: Any) -> Array:
    """Counts and truth values as numbers of `dtype`: times not reached are infinite."""
    value = jnp.asarray(value)
    return value if jnp.issubdtype(value.dtype, jnp.inexact) else value.astype(dtype)


@eqx.filter_jit
def integrate(
    field: AbstractField,
    x0: Array,
    weights: Array,
    ts: Array,
    dt0: Array | None,
    keep: tuple[int, ...],
    options: Options,
) -> Trajectory:
    saved_ts = ts[np.array(keep)]

    def observe(t, y, args):
        del t
        mu = Empirical(sphere.normalise(y), args[1], check=False)
        seen = {name: f(mu) for name, f in options.observables}
        return jax.tree.map(lambda v: _as_real(v, y.dtype), seen)

    subs = {"x": dfx.SubSaveAt(ts=saved_ts, fn=lambda t, y, args: sphere.normalise(y))}
    if options.observables:
        subs["observed"] = dfx.SubSaveAt(ts=ts, fn=observe)
    if options.event is not None:
        subs["end"] = dfx.SubSaveAt(t1=True, fn=lambda t, y, args: sphere.normalise(y))
    solution = dfx.diffeqsolve(
        options.term,
        options.solver,
        ts[0],
        ts[-1],
        dt0,
        x0,
        (field, weights),
        saveat=dfx.SaveAt(subs=subs),
        stepsize_controller=options.pace.controller(ts, saved_ts, field),
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


def in_pieces(field, x, weights, ts, dt0, keep, options) -> Trajectory:
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
            part = integrate(field, x, weights, ts[i : j + 1], dt0, (0, j - i), options)
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


def judged(run: Trajectory, max_steps: int, caller: str, cure: str) -> Trajectory:
    """The run, or a `RuntimeError` that says how far it came and what helps."""
    failed = run.stats["failed"]
    if is_traced(failed):
        xs = eqx.error_if(
            run.xs,
            failed,
            f"`{caller}` failed: max_steps = {max_steps} used up, or a token not finite. {cure}",
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
            f"`{caller}` {why} after {int(run.stats['steps'])} steps; the last saved time "
            f"reached is {last}. {cure}"
        )
    return run


def run_through(
    field: AbstractField,
    mu0: Empirical,
    ts: Array,
    dt0: Array | None,
    keep: tuple[int, ...],
    options: Options,
    pieces: bool,
) -> Trajectory:
    """The run, with sums prepared for what is known of them and counted at the saved times."""
    x, weights = mu0.points, mu0.weights
    field, seen = prepared((field, options.observables), mu0.n, mu0.n, x.dtype)
    words = options.words + sums_in_words(field)
    options = dataclasses.replace(options, observables=seen, words=words)
    run = (in_pieces if pieces else integrate)(field, x, weights, ts, dt0, keep, options)
    counts = stats_of_sums(field, run.ts, run.xs, weights)
    return eqx.tree_at(lambda r: r.stats, run, run.stats | counts)


def standing(mu: Empirical, ts: Array, observables) -> Trajectory:
    """The run of no duration."""
    observed = {
        name: jax.tree.map(lambda v: jnp.asarray(v)[None], f(mu))
        for name, f in (observables or {}).items()
    }
    stats = {k: jnp.asarray(0) for k in ("steps", "accepted", "rejected")}
    stats |= {k: jnp.asarray(False) for k in ("failed", "out_of_steps")}
    where = ts if observed else ts[:0]
    return Trajectory(ts, mu.points[None], mu.weights, where, observed, stats)
