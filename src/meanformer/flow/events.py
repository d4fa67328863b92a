"""Where a run stops early: a function of the measure that crosses 0."""

from collections.abc import Callable
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
from jaxtyping import Array

from .. import sphere
from ..checks import is_traced
from ..measures import Empirical
from ..trajectory import Trajectory


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


def as_event(event: Any) -> dfx.Event | None:
    if event is None or isinstance(event, dfx.Event):
        return event
    if not callable(event):
        raise ValueError(
            f"Argument `event` must be a function of the measure or a `diffrax.Event`, but "
            f"is {event!r}."
        )
    crossing = _Crossing(event)  # pyright: ignore[reportArgumentType]
    return dfx.Event(crossing, root_finder=_Bisection())


def cut_at_event(run: Trajectory) -> Trajectory:
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
