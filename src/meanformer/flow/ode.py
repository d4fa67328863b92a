"""`solve` integrates a field on the sphere."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import diffrax as dfx
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array

from .. import sphere
from ..attention import AbstractField, LayerStack
from ..checks import (
    ArrayLike,
    as_float,
    check_count,
    check_scalar,
    is_traced,
    refuse,
    shown,
)
from ..measures import Empirical
from ..trajectory import Observable, Trajectory
from .events import as_event, cut_at_event
from .projected import Projected
from .run import AbstractPace, Options, judged, run_through, standing, starting


def velocity(t: Array, y: Array, args: tuple[AbstractField, Array]) -> Array:
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
        while integrating (interpolated between steps), nothing else stored. Counts and truth
        values are kept as real numbers.
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
    mu0, ts, keep = starting(field, x0, ts, save)
    x, weights = mu0.points, mu0.weights
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
        return standing(mu0, ts, observables)
    inner_name = type(inner).__name__
    options = Options(
        dfx.ODETerm(velocity),  # pyright: ignore[reportArgumentType]
        Projected(inner),
        _Constant() if tolerances is None else _Adaptive(*tolerances),
        dfx.RecursiveCheckpointAdjoint() if adjoint is None else adjoint,
        check_count(max_steps, "max_steps"),
        tuple((observables or {}).items()),
        f"solve: projected {inner_name}, {'fixed' if fixed else 'adaptive'} steps",
        as_event(event),
    )
    pieces = progress and event is None and not is_traced(field, x, weights, ts)
    run = run_through(field, mu0, ts, dt0, keep, options, pieces)
    run = judged(run, options.max_steps, "solve", _CURE) if throw else run
    return cut_at_event(run)


_CURE = (
    "Use larger tolerances, float64 tokens, or a larger `max_steps`; long plateaus "
    "between merging clusters need an implicit solver such as `diffrax.Kvaerno3()`."
)


class _Constant(AbstractPace):
    """Steps of one length."""

    def controller(self, ts, saved_ts, field):
        del ts, saved_ts, field
        return dfx.ConstantStepSize()


class _Adaptive(AbstractPace):
    """Steps by the error of each token, onto the times that are kept."""

    rtol: Array
    atol: Array

    def controller(self, ts, saved_ts, field):
        del ts
        pid = dfx.PIDController(rtol=self.rtol, atol=self.atol, norm=optx.max_norm)
        stack = isinstance(field, LayerStack)
        jumps = field.times.astype(saved_ts.dtype) if stack else None
        return dfx.ClipStepSizeController(pid, step_ts=saved_ts, jump_ts=jumps)


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
