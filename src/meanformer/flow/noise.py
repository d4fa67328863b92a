"""`diffuse` integrates a field with noise on the sphere."""

from collections.abc import Mapping, Sequence
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from .. import sphere
from ..attention import AbstractField
from ..checks import ArrayLike, check_count, check_scalar, is_traced
from ..consensus import AbstractNoisyField
from ..measures import Empirical
from ..trajectory import Observable, Trajectory
from .projected import Projected
from .run import AbstractPace, Options, judged, run_through, standing, starting


def diffuse(
    field: AbstractField,
    x0: ArrayLike | Empirical,
    ts: ArrayLike,
    *,
    noise: ArrayLike,
    key: PRNGKeyArray | None = None,
    step: ArrayLike,
    path: dfx.AbstractBrownianPath | None = None,
    solver: dfx.AbstractSolver | None = None,
    observables: Mapping[str, Observable] | None = None,
    save: str | Sequence[int] = "all",
    adjoint: dfx.AbstractAdjoint | None = None,
    max_steps: int = 100_000,
    throw: bool = True,
    progress: bool = False,
) -> Trajectory:
    """Integrate a field with noise, from `ts[0]` to `ts[-1]`:

        dxᵢ = χ[µ_t](xᵢ) dt + a(xᵢ) P_{xᵢ} dBᵢ − a(xᵢ)² (d−1)/2 xᵢ dt,

    in Itô's sense, Bᵢ independent Brownian motions of R^d; the last term is the curvature
    of the sphere. a = σ for all fields but those with an amplitude of their own (for
    `PolarizedConsensus` a(x) = σ|x − c(x)|). Where a = σ this is also Stratonovich's
    dxᵢ = χ dt + σ P_{xᵢ} ∘ dBᵢ, whose density obeys ∂_t µ + div(µ χ) = (σ²/2) Δµ; where a
    varies the two differ by the drift ¼ P∇(a²).

    **Arguments:** as `solve` where not said.

    - `noise`: σ ≥ 0. Differentiable, as the field and `x0` are, at a fixed path.
    - `key`: the random key; the same key and arguments give the same numbers, with
        `progress` or without.
    - `step`: the longest step. Each interval of `ts` is divided into equal steps, so that
        every time in `ts` is one of them: nothing is interpolated.
    - `path`: instead of `key`, a Brownian path of diffrax of shape (n, d) and the dtype of
        the tokens: `VirtualBrownianTree(t0, t1, tol, shape, key)` is one path for all step
        sizes.
    - `solver`: default `GeodesicEuler()`. For fields without an amplitude of their own also
        a Runge–Kutta method that converges to Stratonovich's solution, `diffrax.Heun()`
        (second order in the drift).
    - `adjoint`: default `RecursiveCheckpointAdjoint()` (reverse mode); `ForwardMode()` for
        `jax.jvp`.

    **Returns:** a `Trajectory`. Works under `jit`, `vmap` (of keys, of σ) and `grad`. Weak
    order 1 in the step (exact in law for d = 2 without drift), strong order ½. Cost: one
    field evaluation and n·d normal numbers per step.

    **Raises:** `ValueError` for bad arguments, `RuntimeError` (under `jit`, at run time) if
    steps run out or a token is not finite.

    **Source:** *multiscale*, Remark 3.7; *concentration*, Eq. (5).
    """
    mu0, ts, keep = starting(field, x0, ts, save)
    x, weights = mu0.points, mu0.weights
    sigma = check_scalar(
        noise, "noise", minimum=0.0, cure="For no noise give 0, or use `solve`."
    ).astype(x.dtype)
    dt0 = check_scalar(step, "step", minimum=0.0, strict=True).astype(x.dtype)
    own = isinstance(field.at(ts[0]), AbstractNoisyField)
    inner = GeodesicEuler() if solver is None else _check_solver(solver, own)
    if isinstance(adjoint, dfx.BacksolveAdjoint):
        raise ValueError(
            "Argument `adjoint` must not be `BacksolveAdjoint`, whose gradient is wrong "
            "where the flow contracts. Use `RecursiveCheckpointAdjoint()`."
        )
    options = Options(
        TangentNoise(sigma, _check_path(path, key, x)),
        Projected(inner),
        _EqualSteps(),
        dfx.RecursiveCheckpointAdjoint() if adjoint is None else adjoint,
        check_count(max_steps, "max_steps"),
        tuple((observables or {}).items()),
        f"diffuse: {type(inner).__name__}, fixed steps",
    )
    if ts.shape[0] == 1:
        return standing(mu0, ts, observables)
    pieces = progress and not is_traced(field, x, weights, ts, options)
    run = run_through(field, mu0, ts, dt0, keep, options, pieces)
    cure = "Use a smaller `step`, or a larger `max_steps`."
    return judged(run, options.max_steps, "diffuse", cure) if throw else run


class GeodesicEuler(dfx.AbstractItoSolver):
    """Euler's method on the sphere: x ← exp_x(h χ(x) + a(x) P_x ΔB).

    Since exp_x(v) = x + v − |v|²x/2 + O(|v|³) and E|a P_x ΔB|² = a² h (d − 1), the curvature
    term of Itô's equation comes by itself, also where a depends on x. Order 1; with noise
    weak order 1, strong order ½."""

    term_structure = dfx.AbstractTerm
    interpolation_cls = dfx.LocalLinearInterpolation

    def order(self, terms):
        return 1

    def strong_order(self, terms):
        return 0.5

    def init(self, terms, t0, t1, y0, args):
        return None

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        del solver_state, made_jump
        y1 = sphere.exp(y0, terms.vf_prod(t0, y0, args, terms.contr(t0, t1)))
        return y1, None, {"y0": y0, "y1": y1}, None, dfx.RESULTS.successful

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)


class TangentNoise(dfx.AbstractTerm):
    """χ dt + a P_x dB, with one evaluation of the field for the two."""

    sigma: Float[Array, ""]
    path: dfx.AbstractBrownianPath

    def vf(self, t, y, args) -> tuple[Array, Array, Array]:
        field, weights = args
        x = sphere.normalise(y)
        mu, now = Empirical(x, weights, check=False), field.at(t)
        if not isinstance(now, AbstractNoisyField):
            return x, now.tangent(x, mu), jnp.full((x.shape[0], 1), self.sigma)
        drive, amplitude = now.drive_and_amplitude(x, mu)
        tangent = sphere.project(x, sphere.project(x, drive))
        return x, tangent, self.sigma * amplitude[:, None]

    def contr(self, t0, t1, **kwargs) -> tuple[Array, Array]:
        return t1 - t0, self.path.evaluate(t0, t1)  # pyright: ignore[reportReturnType]

    def prod(self, vf, control) -> Array:
        (x, tangent, amplitude), (dt, dw) = vf, control
        return dt * tangent + amplitude * sphere.project(x, dw)


class FreshNoise(dfx.AbstractBrownianPath):
    """Increments drawn anew for each step, numbered by the bits of its beginning: for
    fixed steps. The same in the backward pass, unlike those of `UnsafeBrownianPath`."""

    key: PRNGKeyArray
    shape: tuple[int, ...] = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)
    levy_area: type = eqx.field(static=True, default=dfx.BrownianIncrement)

    @property
    def t0(self):
        return -jnp.inf

    @property
    def t1(self):
        return jnp.inf

    def evaluate(self, t0, t1=None, left=True, use_levy=False):
        del left
        if t1 is None or use_levy:
            raise NotImplementedError("Only increments.")
        key = self.key
        bits = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(t0), jnp.uint32)
        for word in jnp.atleast_1d(bits):
            key = jr.fold_in(key, word)
        return jnp.sqrt(t1 - t0) * jr.normal(key, self.shape, self.dtype)


class _EqualSteps(AbstractPace):
    """Equal steps in each interval of `ts`, of at most dt0."""

    def controller(self, ts, saved_ts, field):
        del saved_ts, field
        return EqualSteps(ts)


class EqualSteps(dfx.AbstractStepSizeController):
    """Equal steps of at most dt0 from each of `ts` to the next, exactly onto it: the steps
    of one interval do not depend on the others."""

    ts: Array

    def wrap(self, direction):
        return self

    def _end(self, i: Array, k: Array, dt0: Array) -> tuple[Array, Array]:
        """Where step k of interval i ends, and how many steps the interval has."""
        a, b = self.ts[i], self.ts[i + 1]
        count = jnp.maximum(jnp.ceil((b - a) / dt0 * (1 - 8 * jnp.finfo(a.dtype).eps)), 1)
        return jnp.where(k + 1 >= count, b, a + (b - a) * ((k + 1) / count)), count

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        del terms, t1, y0, args, func, error_order
        zero = jnp.zeros((), jnp.int32)
        return self._end(zero, zero, dt0)[0], (zero, zero, dt0)

    def adapt_step_size(
        self, t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state
    ):
        del t0, y0, y1_candidate, args, y_error, error_order
        i, k, dt0 = controller_state
        last = k + 1 >= self._end(i, k, dt0)[1]
        i, k = jnp.where(last, i + 1, i), jnp.where(last, 0, k + 1)
        i = jnp.minimum(i, self.ts.shape[0] - 2)
        state = (i, k, dt0)
        return True, t1, self._end(*state)[0], False, state, dfx.RESULTS.successful


def _check_solver(solver: Any, own: bool) -> dfx.AbstractSolver:
    """`solver` as one that converges to the equation of `diffuse`."""
    known = (dfx.Heun, dfx.Midpoint, dfx.Ralston)
    if not isinstance(solver, (GeodesicEuler, *known)):
        raise ValueError(
            "Argument `solver` must be `GeodesicEuler()`, or `Heun()`, `Midpoint()` or "
            f"`Ralston()` of diffrax, but is {solver!r}. Leave it out for the first."
        )
    if own and isinstance(solver, known):
        raise ValueError(
            f"Argument `solver` must not be {type(solver).__name__} for a field with an "
            "amplitude of its own: it converges to Stratonovich's solution, which is "
            "another. Leave it out."
        )
    return solver


def _check_path(path: Any, key: Any, x: Array) -> dfx.AbstractBrownianPath:
    """The Brownian path of the tokens `x`."""
    if (path is None) == (key is None):
        raise ValueError(
            "Arguments `key` and `path` must be given one of them, but "
            f"{'none is' if path is None else 'both are'}. For example "
            "`key=jax.random.key(0)`."
        )
    if path is None:
        return FreshNoise(key=key, shape=x.shape, dtype=x.dtype)
    want = jax.ShapeDtypeStruct(x.shape, x.dtype)
    have = getattr(path, "shape", None)
    if not isinstance(path, dfx.AbstractBrownianPath) or have != want:
        raise ValueError(
            f"Argument `path` must be a Brownian path of diffrax of shape {x.shape} and "
            f"dtype {x.dtype}, but is {path!r}. Use "
            f"`diffrax.VirtualBrownianTree(t0, t1, tol, jax.ShapeDtypeStruct({x.shape}, "
            f"jnp.{x.dtype}), key)`."
        )
    return path
