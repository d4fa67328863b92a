"""The one door to the distances: checks, the choice of a method, and its answer."""

import dataclasses
import importlib
import math
import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from .. import sphere
from ..checks import (
    ArrayLike,
    check_count,
    check_scalar,
    is_traced,
    nearest,
    refuse,
    shown,
)
from ..measures import AbstractLaw, AbstractMeasure, Empirical, Uniform, check_weights
from . import circle, exact, ground
from .sliced import sliced

COSTS = ("geodesic", "chordal")
METHODS = ("auto", "circle", "exact", "sinkhorn", "sliced")
_MASS_TOL = 1e-5  # as that of the tokens' norms
_EXACT_LIMIT = 2000**2  # pairs that `auto` gives to an exact solver: seconds
_TILE = 2**19  # costs of a block of rows of Sinkhorn: they stay in cache
_ROTATION_LIMIT = 2**27  # numbers sorted while rotations are tried: seconds to a minute


class Distance(eqx.Module):
    """W_p(µ, ν) and what is known of it.

    - `value`: W_p itself (not its p-th power), differentiable.
    - `error`: of `value` against the W_p named by `cost`, `p` (and `method`, if that is
        "sliced"): a bound for "sinkhorn" and weighted exact plans, an estimate of rounding
        for "circle" and "assignment", one standard error for "sliced".
    - `converged`: whether an iteration met its tolerance; true where there is none.
    - `method`: what computed it: "circle", "assignment", "network simplex", "linear
        programme", "sinkhorn" or "sliced".
    - `lower`, `upper`: rigorous bounds of W_p up to rounding ("sinkhorn").
    - `power`: the estimate of W_p^p before the root; a Sinkhorn divergence may be < 0.
    - `epsilon`, `iterations`: of "sinkhorn", iterations of its three problems together.
    - `rotation`: the angle by which ν is turned, with `rotations=True`.

    `float(distance)` is the value.
    """

    value: Float[Array, ""]
    error: Float[Array, ""]
    converged: Bool[Array, ""]
    power: Float[Array, ""]
    method: str = eqx.field(static=True)
    cost: str = eqx.field(static=True)
    p: float = eqx.field(static=True)
    lower: Float[Array, ""] | None = None
    upper: Float[Array, ""] | None = None
    epsilon: Float[Array, ""] | None = None
    iterations: Int[Array, ""] | None = None
    rotation: Float[Array, ""] | None = None

    def __float__(self) -> float:
        return float(self.value)

    def __str__(self) -> str:
        if is_traced(self.value) or self.value.ndim:
            return repr(self)
        flag = "" if bool(self.converged) else ", not converged"
        return (
            f"W_{self.p:g} = {float(self.value):.6g} ± {float(self.error):.1g} "
            f"({self.cost}, {self.method}{flag})"
        )


@dataclasses.dataclass(frozen=True)
class _Tokens:
    """Checked tokens; `even` if they are known to weigh the same."""

    points: Array
    weights: Array
    even: bool

    @property
    def n(self) -> int:
        return self.points.shape[0]


def wasserstein(
    a: ArrayLike | AbstractMeasure,
    b: ArrayLike | AbstractMeasure,
    p: Any = 2,
    cost: str = "geodesic",
    method: str = "auto",
    *,
    rotations: bool = False,
    epsilon: ArrayLike = 1e-2,
    tol: ArrayLike = 1e-3,
    max_iterations: int = 5000,
    block: int | None = None,
    projections: int = 200,
    key: PRNGKeyArray | None = None,
    throw: bool = True,
) -> Distance:
    """The Wasserstein distance W_p(µ, ν) = (min over couplings π of ∫ c(x, y)^p dπ)^{1/p}.

    **Arguments:**

    - `a`, `b`: µ and ν, `Empirical`s or arrays of shape `(n, d)`, `(m, d)` (equal weights)
        of one d and dtype. One of them may be the law `Uniform(2)` (p = 1 or 2).
    - `p` ≥ 1, a number.
    - `cost`: c, "geodesic" (angles in [0, π]) or "chordal" (|x − y|).
    - `method`: see the table of `meanformer.transport`. "exact" is "circle" where that
        holds. "auto" is exact on S¹ with geodesic cost and up to 2000² pairs, and
        "sinkhorn" above; `Distance.method` says which.
    - `rotations`: the minimum over all rotations of ν; on S¹, geodesic, p = 1 or 2.
    - `epsilon`, `tol`, `max_iterations`, `block`: of "sinkhorn". ε > 0 is absolute, in the
        unit of c^p; the iteration ends when Σ |the plan's marginal − weight| < `tol`;
        `block` rows of the table of costs are in memory at a time.
    - `projections`, `key`: of "sliced", which needs a key.
    - `throw`: whether Sinkhorn that does not converge is an error. With `throw=False`
        it is an answer with `converged` false; its `lower` and `upper` still hold.

    Works under `jit`, `vmap` and `grad`, in float32 and float64. Exact plans are computed
    on the host (`jax.pure_callback`) in float64. Arrays count as tokens of equal weight
    under `jit` too; an `Empirical` does where its weights can be read.

    **Raises:** `ValueError` for measures of different d, n = 0, total masses other than 1,
    p < 1, unknown names, and what a method cannot do. `RuntimeError` (under `jit`, at run
    time) if Sinkhorn does not converge.
    """
    p, cost, method = _check_names(p, cost, method)
    if isinstance(a, AbstractLaw):  # the distance is symmetric
        a, b = b, a
        if isinstance(a, AbstractLaw):
            raise ValueError(
                "Arguments `a` and `b` must not both be laws. Use `law.nodes(n)` or "
                "`law.sample(key, n)` for one of them."
            )
    if isinstance(b, AbstractLaw):
        return _to_law(_tokens(a, "a"), b, p, cost, method)
    x, y = _tokens(a, "a"), _tokens(b, "b")
    d = x.points.shape[1]
    if y.points.shape[1] != d:
        raise ValueError(
            "Arguments `a` and `b` must be measures on one sphere, but they have d = "
            f"{d} and d = {y.points.shape[1]}. Embed both in one R^d."
        )
    dtype = jnp.result_type(x.points, y.points)
    x, y = (
        _Tokens(z.points.astype(dtype), z.weights.astype(dtype), z.even) for z in (x, y)
    )
    on_circle = d == 2 and cost == "geodesic"
    if rotations:
        return _up_to_rotation(x, y, p, on_circle, method)
    method = _chosen(method, on_circle, x, y)
    if method == "circle":
        return _on_circle(x, y, p)
    if method == "exact":
        return _exact(x, y, cost, p)
    if method == "sliced":
        return _sliced(x, y, cost, p, projections, key)
    return _sinkhorn(x, y, cost, p, epsilon, tol, max_iterations, block, throw)


# --------------------------------------------------------------------------- checks


def _check_names(p: Any, cost: Any, method: Any) -> tuple[float, str, str]:
    number = isinstance(p, (int, float, np.number)) and not isinstance(p, bool)
    if not (number and 1 <= p < math.inf):
        raise ValueError(
            f"Argument `p` must be a finite number ≥ 1, but is {p!r}. Costs c^p with p < 1 are "
            "not convex; under `jit` make p a Python number."
        )
    p = float(p)
    for name, value, known in (("cost", cost, COSTS), ("method", method, METHODS)):
        if value not in known:
            raise ValueError(
                f"Argument `{name}` must be one of {', '.join(known)}, but is {value!r}. "
                + nearest(str(value), known)
            )
    return p, cost, method


def _tokens(a: Any, name: str) -> _Tokens:
    if isinstance(a, AbstractMeasure) and not isinstance(a, Empirical):
        raise ValueError(
            f"Argument `{name}` must be tokens or a law, but is a {type(a).__name__}. Use its "
            "nodes."
        )
    if not isinstance(a, Empirical):
        points = sphere.check_tokens(a, name)
        n = points.shape[0]
        # Behind the barrier the compiler does not spend seconds on sums of constants.
        weights = jax.lax.optimization_barrier(jnp.full(n, 1 / n, points.dtype))
        return _Tokens(points, weights, True)
    if a.points.ndim != 2 or a.n == 0:
        raise ValueError(
            f"Argument `{name}` must hold at least one token, in the shape (n, d), but its "
            f"points have shape {a.points.shape}. For a batch use `jax.vmap`."
        )
    weights = check_weights(a.weights, f"{name}.weights", a.n, normalise=False)
    mass = ground.total(weights)
    weights = refuse(
        weights,
        ~(jnp.abs(mass - 1) <= _MASS_TOL),
        f"Argument `{name}` must have total mass 1 to within {_MASS_TOL:g}, as every measure "
        f"here, but it has {shown(mass)}. `Empirical(points, weights)` divides by the sum; "
        "`check=False` does not.",
    )
    even = not is_traced(weights) and bool(np.ptp(np.asarray(weights)) == 0)
    return _Tokens(a.points, weights / mass, even)  # of the rounding of the sum


def _chosen(method: str, on_circle: bool, x: _Tokens, y: _Tokens) -> str:
    """ "circle", "exact", "sinkhorn" or "sliced"."""
    if method == "circle" and not on_circle:
        raise ValueError(
            'Argument `method` must be "exact", "sinkhorn" or "sliced" for d ≥ 3 or the '
            'chordal cost, but is "circle", which is for the arc on S¹ (d = 2). Use "auto".'
        )
    if on_circle and method in ("auto", "exact"):
        return "circle"
    if method != "auto":
        return method
    return "exact" if x.n * y.n <= _exact_limit(x, y) else "sinkhorn"


def _exact_limit(x: _Tokens, y: _Tokens) -> int:
    free = exact.has_network_simplex() or (x.even and y.even and x.n == y.n)
    return _EXACT_LIMIT if free else exact.PROGRAMME_LIMIT


# --------------------------------------------------------------------------- methods


def _answer(
    power: Array,
    error: Array | float,
    scale: float,
    p: float,
    cost: str,
    method: str,
    rotation: Array | None = None,
) -> Distance:
    """The `Distance` of a p-th power and its absolute error, lengths in units `scale`."""
    value = ground.root(power, p) * scale
    further = ground.root(jnp.maximum(power, 0) + error, p) * scale
    rounding = 8 * jnp.finfo(power.dtype).eps * ground.DIAMETER[cost]
    return Distance(
        value=value,
        # W_p moves no more than the positions do, which are rounded.
        error=jax.lax.stop_gradient(further - value) + rounding,
        converged=jnp.asarray(True),
        power=power * scale**p,
        method=method,
        cost=cost,
        p=p,
        rotation=rotation,
    )


def _rounding(x: _Tokens, y: _Tokens, p: float) -> float:
    """Of W_p^p, in turns, by that of cumulated weights: mass × 2^{−p}."""
    eps = float(jnp.finfo(x.points.dtype).eps)
    return 0.0 if x.even and y.even else 8 * eps * math.log2(x.n + y.n + 1) / 2**p


def _refined(x: _Tokens, y: _Tokens, u: Array, v: Array):
    """Positions with the rarer ones repeated, if that makes them equal in number."""
    n, m = x.n, y.n
    if not (x.even and y.even) or max(n, m) % min(n, m):
        return None
    return (u, jnp.repeat(v, n // m)) if n >= m else (jnp.repeat(u, m // n), v)


def _on_circle(x: _Tokens, y: _Tokens, p: float) -> Distance:
    u, v = circle.turns(x.points), circle.turns(y.points)
    even = _refined(x, y, u, v)
    if even is not None:
        power, error = circle.equal(*even, p), 0.0
    else:
        error = _rounding(x, y, p)
        if p == 1:
            power = circle.weighted_one(u, x.weights, v, y.weights)
        else:
            power = circle.weighted(u, x.weights, v, y.weights, p)
    return _answer(
        power,
        error,
        2 * math.pi,
        p,
        "geodesic",
        method="circle",
    )


def _to_law(x: _Tokens, law: AbstractLaw, p: float, cost: str, method: str) -> Distance:
    cure = "Replace it by tokens: `law.nodes(n)`, or `law.sample(key, n)`."
    d = x.points.shape[1]
    if law.d != d:
        raise ValueError(
            f"Arguments `a` and `b` must be measures on one sphere, but they have d = {d} and "
            f"d = {law.d}. Embed both in one R^d."
        )
    closed = isinstance(law, Uniform) and d == 2 and cost == "geodesic" and p in (1, 2)
    if not closed or method not in ("auto", "circle", "exact"):
        raise ValueError(
            "A distance to a law must be that to `Uniform(2)`, geodesic, with p = 1 or 2 and "
            f"method auto, circle or exact, but the law is {type(law).__name__} with d = "
            f"{law.d}, cost {cost}, p = {p:g}, method {method}. {cure}"
        )
    power = circle.uniform(circle.turns(x.points), x.weights, p)
    error = _rounding(x, x, p)
    return _answer(power, error, 2 * math.pi, p, cost, method="circle")


def _up_to_rotation(
    x: _Tokens, y: _Tokens, p: float, on_circle: bool, method: str
) -> Distance:
    if not on_circle or p not in (1, 2) or method not in ("auto", "circle", "exact"):
        raise ValueError(
            "Argument `rotations` must be False but on S¹ (d = 2) with geodesic cost, p = 1 or "
            f"2 and method auto, circle or exact; here d = {x.points.shape[1]}, p = {p:g}, "
            f"method {method}. Minimise over rotations of `b` with `jax.grad` instead."
        )
    u, v = circle.turns(x.points), circle.turns(y.points)
    even = _refined(x, y, u, v)
    n, m = x.n, y.n
    work = n * m * (n + m)
    if even is not None:
        work = 0 if p == 2 else max(n, m) ** 2
    if work > _ROTATION_LIMIT:
        raise ValueError(
            "Argument `rotations` must be False for so many tokens: every alignment of two "
            f"weights is tried, {work:.2g} numbers to sort for n = {n}, m = {m}, p = {p:g}. "
            "Use equal weights (arrays, or weights outside of `jit`) with m dividing n, "
            "p = 2, or fewer tokens."
        )
    if even is not None:
        power, turn = circle.equal_up_to_rotation(*even, p)
        error = 0.0
    else:
        power, turn = circle.weighted_up_to_rotation(u, x.weights, v, y.weights, p)
        error = _rounding(x, y, p)
    return _answer(
        power,
        error,
        2 * math.pi,
        p,
        "geodesic",
        method="circle",
        rotation=2 * math.pi * jnp.mod(turn, 1),
    )


def _exact(x: _Tokens, y: _Tokens, cost: str, p: float) -> Distance:
    if x.even and y.even and x.n == y.n:
        power = exact.assignment(x.points, y.points, cost, p)
        return _answer(power, 0.0, 1.0, p, cost, method="assignment")
    simplex = exact.has_network_simplex()
    if not simplex and x.n * y.n > exact.PROGRAMME_LIMIT:
        raise ValueError(
            'Argument `method` must not be "exact" for weighted tokens without POT when '
            f"there are more than {exact.PROGRAMME_LIMIT} pairs, but n m = {x.n * y.n}. "
            "`pip install 'meanformer[exact]'` installs it; or use method \"sinkhorn\"."
        )
    power, gap = exact.transport(x.points, y.points, x.weights, y.weights, cost, p)
    name = "network simplex" if simplex else "linear programme"
    return _answer(power, gap, 1.0, p, cost, method=name)


def _sliced(
    x: _Tokens, y: _Tokens, cost: str, p: float, projections: int, key: Any
) -> Distance:
    projections = check_count(projections, "projections", 2)
    if key is None:
        raise ValueError(
            'Argument `key` must be a random key for method "sliced", but is None. Give '
            "`jax.random.key(0)`, the same one wherever values are compared."
        )
    power, deviation = sliced(
        x.points,
        y.points,
        x.weights,
        y.weights,
        key,
        even=x.even and y.even and x.n == y.n,
        cost=cost,
        p=p,
        projections=projections,
    )
    value = ground.root(power, p)  # of one standard error: the larger side of the root
    error = value - ground.root(power - deviation, p)
    return Distance(
        value=value,
        error=jax.lax.stop_gradient(error),
        converged=jnp.asarray(True),
        power=power,
        method="sliced",
        cost=cost,
        p=p,
    )


def _sinkhorn_module():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ott's own, at its first import
        return importlib.import_module(".sinkhorn", __package__)


def _sinkhorn(
    x: _Tokens,
    y: _Tokens,
    cost: str,
    p: float,
    epsilon: ArrayLike,
    tol: ArrayLike,
    max_iterations: int,
    block: int | None,
    throw: bool,
) -> Distance:
    dtype = x.points.dtype
    epsilon = check_scalar(epsilon, "epsilon", minimum=0.0, strict=True).astype(dtype)
    tol = check_scalar(tol, "tol", minimum=0.0, strict=True).astype(dtype)
    max_iterations = check_count(max_iterations, "max_iterations")
    if block is None:
        block = min(1024, max(8, _TILE // max(x.n, y.n)))
    found = _sinkhorn_module().divergence(
        x.points,
        y.points,
        x.weights,
        y.weights,
        epsilon,
        tol,
        cost=cost,
        p=p,
        max_iterations=max_iterations,
        block=check_count(block, "block"),
    )
    if throw:
        found = _judged(found, max_iterations)
    value = ground.root(found.power, p)
    lower, upper = (ground.root(bound, p) for bound in (found.lower, found.upper))
    rounding = 64 * jnp.finfo(dtype).eps * ground.DIAMETER[cost]
    error = jnp.maximum(jnp.maximum(value - lower, upper - value), 0) + rounding
    return Distance(
        value=value,
        error=jax.lax.stop_gradient(error),
        converged=found.converged,
        power=found.power,
        method="sinkhorn",
        cost=cost,
        p=p,
        lower=lower,
        upper=upper,
        epsilon=epsilon,
        iterations=found.iterations,
    )


def _judged(found, max_iterations: int):
    message = (
        f"Sinkhorn's plan did not meet its marginals within max_iterations = {max_iterations}. "
        "Use a larger `epsilon`, `tol` or `max_iterations`, or `throw=False` for what was "
        "reached, with `converged` false and `lower` and `upper` still valid."
    )
    if is_traced(found.converged):
        power = eqx.error_if(found.power, ~found.converged, message)
        return found._replace(power=power)
    if not bool(found.converged):
        raise RuntimeError(message)
    return found
