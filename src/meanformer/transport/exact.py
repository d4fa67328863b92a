"""Optimal plans of small problems, on the host and off the gradient path.

Tokens of equal weight are assigned one to one (SciPy). Other weights need the network
simplex of POT (optional extra `exact`); without it SciPy's HiGHS solves the linear
programme while it is small. A plan is at most n + m − 1 triples (i, j, mass), and

    W_p^p = Σ mass · c(x_i, y_j)^p,

whose derivative in the positions is that with the plan held fixed (Danskin), and in the
weights the dual potentials φ, ψ: dW_p^p = Σ φ_i da_i + Σ ψ_j db_j.
"""

import functools
import importlib
import importlib.util
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy import sparse
from scipy.optimize import linear_sum_assignment, linprog

from ..checks import is_traced
from . import ground

PROGRAMME_LIMIT = 40_000  # pairs: HiGHS takes seconds
_PIVOTS = 100_000_000  # POT's own default stops long before the optimum at n = 5000


def has_network_simplex() -> bool:
    """Whether POT is installed."""
    return importlib.util.find_spec("ot") is not None


@functools.cache
def _pot():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own, at the first import
        return importlib.import_module("ot")


class Plan(NamedTuple):
    """Mass `mass[k]` goes from token `i[k]` to `j[k]`; φ, ψ solve the dual programme up to
    `gap`, an upper bound of the plan's distance from the optimum."""

    i: Any
    j: Any
    mass: Any
    phi: Any
    psi: Any
    gap: Any


def _solve_assignment(x, y, *, cost: str, p: float) -> np.ndarray:
    c = ground.table(np.asarray(x, float), np.asarray(y, float), cost, p)
    return linear_sum_assignment(c)[1].astype(np.int32)


def _network_simplex(a, b, c):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it warns about is measured by the gap
        plan, log = _pot().emd(a, b, c, numItermax=_PIVOTS, log=True)
    return plan, log["u"], log["v"]


def _linear_programme(a, b, c):
    n, m = c.shape
    rows = sparse.kron(sparse.eye_array(n), np.ones((1, m)))
    columns = sparse.kron(np.ones((1, n)), sparse.eye_array(m))
    done = linprog(
        c.ravel(),
        A_eq=sparse.vstack([rows, columns]).tocsr(),
        b_eq=np.concatenate([a, b]),
        method="highs-ds",
    )
    if done.x is None:
        raise RuntimeError(f"The linear programme found no plan: {done.message}")
    return done.x.reshape(n, m), done.eqlin.marginals[:n], done.eqlin.marginals[n:]


def _solve_plan(x, y, a, b, *, cost: str, p: float) -> Plan:
    dtype = np.asarray(a).dtype
    x, y, a, b = (np.asarray(z, float) for z in (x, y, a, b))
    a, b = a / a.sum(), b / b.sum()
    n, m = len(a), len(b)
    c = ground.table(x, y, cost, p)
    used = np.ix_(a > 0, b > 0)
    solve = _network_simplex if has_network_simplex() else _linear_programme
    some, phi, _ = solve(a[a > 0], b[b > 0], np.ascontiguousarray(c[used]))
    plan = np.zeros((n, m))
    plan[used] = some
    # The largest ψ that φ allows, then the largest φ: a solution of the dual programme.
    psi = np.min(c[a > 0] - phi[:, None], axis=0)
    phi = np.min(c - psi, axis=1)
    i, j = np.nonzero(plan)
    if len(i) > n + m - 1:
        raise RuntimeError(
            f"The solver of the transport of {n} to {m} tokens returned a plan of "
            f"{len(i)} pairs, which is no vertex. Update POT or SciPy."
        )
    mass = plan[i, j]
    astray = np.abs(plan.sum(1) - a).sum() + np.abs(plan.sum(0) - b).sum()
    gap = abs(mass @ c[i, j] - a @ phi - b @ psi) + astray * c.max()
    spare = (0, n + m - 1 - len(i))
    middle = (a @ phi - b @ psi) / 2  # half of the cost to either side
    return Plan(
        np.pad(i, spare).astype(np.int32),
        np.pad(j, spare).astype(np.int32),
        np.pad(mass, spare).astype(dtype),
        (phi - middle).astype(dtype),
        (psi + middle).astype(dtype),
        np.asarray(gap, dtype),
    )


def _on_host(solve, shapes, *arrays):
    """`solve(*arrays)` in NumPy; under `jit`, `vmap` and `grad` when the program runs."""
    arrays = jax.lax.stop_gradient(arrays)
    if is_traced(arrays):
        return jax.pure_callback(solve, shapes, *arrays, vmap_method="sequential")
    return jax.tree.map(jnp.asarray, solve(*arrays))


def assignment(
    x: Float[Array, "n d"], y: Float[Array, "n d"], cost: str, p: float
) -> Float[Array, ""]:
    """W_p^p of n tokens of equal weight each: O(n³) time, one n × n table in float64."""
    solve = functools.partial(_solve_assignment, cost=cost, p=p)
    shape = jax.ShapeDtypeStruct(x.shape[:1], jnp.int32)
    j = _on_host(solve, shape, x, y)
    return jnp.mean(ground.power(ground.distance(x, y[j], cost), p))


def transport(
    x: Float[Array, "n d"],
    y: Float[Array, "m d"],
    a: Float[Array, " n"],
    b: Float[Array, " m"],
    cost: str,
    p: float,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """W_p^p of weighted tokens, and a bound of its error from the dual programme."""
    n, m = a.shape[0], b.shape[0]
    dtype = a.dtype
    pairs = jax.ShapeDtypeStruct((n + m - 1,), jnp.int32)
    shapes = Plan(
        pairs,
        pairs,
        jax.ShapeDtypeStruct((n + m - 1,), dtype),
        jax.ShapeDtypeStruct((n,), dtype),
        jax.ShapeDtypeStruct((m,), dtype),
        jax.ShapeDtypeStruct((), dtype),
    )
    solve = functools.partial(_solve_plan, cost=cost, p=p)
    plan = _on_host(solve, shapes, x, y, a, b)
    costs = ground.power(ground.distance(x[plan.i], y[plan.j], cost), p)
    fixed = jax.lax.stop_gradient
    by_weights = (a - fixed(a)) @ plan.phi + (b - fixed(b)) @ plan.psi  # 0
    return plan.mass @ costs + by_weights, plan.gap
