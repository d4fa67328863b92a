"""Entropic transport by ott-jax: the Sinkhorn divergence, in O(n · block) memory.

    OT_ε(µ, ν) = min over π of ∫ c^p dπ + ε KL(π | µ⊗ν),
    S_ε(µ, ν)  = OT_ε(µ, ν) − ½ OT_ε(µ, µ) − ½ OT_ε(ν, ν)  →  W_p^p  as ε → 0.

ott's solver iterates, on a geometry of ours. Its sums Σⱼ e^{(f_i + g_j − c_ij)/ε} are made
in blocks of rows, and without a pass for maxima: near the solution they are the weights.
Only where one leaves the safe range are the maxima of its block taken. ε starts at the
largest cost and decays to its target.

The value is the dual objective at fixed potentials (Danskin): no derivative passes through
the iteration. Bounds of W_p^p come from the potentials, made feasible by a hard
c-transform, and from the plan, rounded to its marginals (Altschuler, Weed & Rigollet,
NeurIPS 2017, algorithm 2).

Only this module imports ott. That takes seconds, so it is imported when first used.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ott.geometry import costs, epsilon_scheduler, pointcloud
from ott.problems.linear import linear_problem
from ott.solvers.linear import acceleration, sinkhorn
from scipy.special import binom

from ..matrices import matmul
from ..partition import in_blocks
from . import ground

_fixed = jax.lax.stop_gradient
_DECAY = 0.8  # of ε per iteration, down to its target
_RELAXATION = 1.6  # of the updates: over-relaxed they need half as many; 1.9 can diverge


# --------------------------------------------------------------------- tables of costs


def _arccos_series(degree: int) -> np.ndarray:
    """Coefficients of arccos(1 − z)/√z on [0, 1], interpolated at Chebyshev nodes."""
    k = np.arange(60)
    taylor = np.sqrt(2) * binom(2 * k, k) / (8.0**k * (2 * k + 1))
    exact = np.polynomial.Polynomial(taylor)
    fit = np.polynomial.Chebyshev.interpolate(exact, degree, [0, 1])
    return fit.convert(kind=np.polynomial.Polynomial).coef


_ARCCOS = {4: _arccos_series(8), 8: _arccos_series(18)}  # by bytes: errors 5e−9, 4e−15


def _squares(x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Float[Array, "n m"]:
    """|xᵢ − yⱼ|² from one product, to the rounding of 2."""
    xx, yy = jnp.sum(x * x, axis=1), jnp.sum(y * y, axis=1)
    return jnp.maximum(xx[:, None] + (yy - 2 * matmul(x, y.T)), 0)


def _exact_squares(x: Array, y: Array) -> Float[Array, "n m"]:
    """The same by differences (in few dimensions), which lose nothing for close tokens."""
    if x.shape[1] > 8:
        return _squares(x, y)
    parts = [(x[:, k, None] - y[None, :, k]) ** 2 for k in range(x.shape[1])]
    return functools.reduce(jnp.add, parts)


def _fast_costs(x: Array, y: Array, cost: str, p: float) -> Float[Array, "n m"]:
    """c(xᵢ, yⱼ)^p without derivatives, and without the arctan that would take 10 times as
    long as all the rest."""
    square = _squares(x, y) if p >= 2 else _exact_squares(x, y)
    if cost == "chordal":
        return square if p == 2 else square ** (p / 2)
    z = jnp.clip(jnp.minimum(square, 4 - square) / 2, 0)
    series = jnp.zeros_like(z)
    for coefficient in _ARCCOS[z.dtype.itemsize][::-1]:
        series = series * z + coefficient.astype(z.dtype)
    angle = jnp.sqrt(z) * series
    return ground.power(jnp.where(square > 2, jnp.pi - angle, angle), p)


def _smooth_costs(x: Array, y: Array, cost: str, p: float) -> Float[Array, "n m"]:
    """c(xᵢ, yⱼ)^p with derivatives, 0 where none exists."""

    def safe_root(square):
        positive = square > 0
        return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0)

    square = _exact_squares(x, y)
    if cost == "chordal":
        return square if p == 2 else ground.power(safe_root(square), p)
    angle = 2 * jnp.arctan2(safe_root(square), safe_root(_exact_squares(x, -y)))
    return ground.power(angle, p)


@jax.tree_util.register_pytree_node_class
class GroundCost(costs.CostFn):
    """c^p as a cost of ott."""

    def __init__(self, cost: str, p: float):
        self.cost, self.p = cost, p

    def __call__(self, x, y):
        return ground.power(ground.distance(x, y, self.cost), self.p)

    def table(self, x: Array, y: Array) -> Array:
        return _fast_costs(x, y, self.cost, self.p)

    def tree_flatten(self):
        return (), (self.cost, self.p)

    @classmethod
    def tree_unflatten(cls, aux_data, children):
        return cls(*aux_data)


# --------------------------------------------------------------------- blocks of rows


def _by_rows(f: Callable, block: int, *arrays: Array):
    """`f` of rows of the arrays, at most `block` of them at a time."""
    n = arrays[0].shape[0]
    blocks = tuple(in_blocks(array, block) for array in arrays)
    if blocks[0].shape[0] == 1:
        return f(*arrays)
    out = jax.lax.map(lambda rows: f(*rows), blocks)
    return jax.tree.map(lambda o: o.reshape(-1, *o.shape[2:])[:n], out)


def _log_sums(
    cost: GroundCost,
    x: Float[Array, "n d"],
    y: Float[Array, "m d"],
    f: Float[Array, " n"],
    g: Float[Array, " m"],
    eps: Array,
    block: int,
) -> Float[Array, " n"]:
    """ε log Σⱼ e^{(g_j − c_ij)/ε}. A finite f_i is only a shift: the better it is, the
    less often maxima are needed."""
    f = jnp.where(jnp.isfinite(f), f, 0)
    info = jnp.finfo(x.dtype)
    low, high = float(info.tiny / info.eps**2), float(info.max * info.eps)
    rate = 1 / eps
    ones = jnp.ones_like(g)  # a product with it is summed faster than rows are

    def rows(x, f):
        def exponents():
            return f[:, None] * rate + (g * rate - cost.table(x, y) * rate)

        def with_maxima():
            e = exponents()
            top = jnp.max(e, axis=1)
            top = jnp.where(jnp.isfinite(top), top, 0)
            return jnp.log(jnp.sum(jnp.exp(e - top[:, None]), axis=1)) + top

        sums = matmul(jnp.exp(exponents()), ones)
        safe = jnp.all((sums >= low) & (sums <= high))
        return jax.lax.cond(safe, lambda: jnp.log(sums), with_maxima) * eps - f

    return _by_rows(rows, block, x, f)


def _minima(
    cost: GroundCost,
    x: Float[Array, "n d"],
    y: Float[Array, "m d"],
    g: Float[Array, " m"],
    block: int,
) -> Float[Array, " n"]:
    """minⱼ (c_ij − g_j), the hard c-transform."""
    return _by_rows(lambda x: jnp.min(cost.table(x, y) - g, axis=1), block, x)


@jax.tree_util.register_pytree_node_class
class Streamed(pointcloud.PointCloud):
    """ott's point cloud, whose only access to the costs is by blocks of rows."""

    @property
    def price(self) -> GroundCost:
        assert isinstance(self.cost_fn, GroundCost)
        return self.cost_fn

    def apply_lse_kernel(self, f, g, eps, vec=None, axis=0):
        if vec is not None or self._batch_size is None:
            raise NotImplementedError(
                "Blocks of rows, and potentials, are what is needed."
            )
        rows = (self.x, self.y, f, g) if axis == 1 else (self.y, self.x, g, f)
        eps = jnp.asarray(eps, self.x.dtype)
        sums = _log_sums(self.price, *rows, eps, self._batch_size)
        return sums, jnp.ones_like(sums)


@jax.tree_util.register_pytree_node_class
class Annealed(epsilon_scheduler.Epsilon):
    """ε falls from `init`, an absolute value, by the factor `decay` per iteration."""

    def __call__(self, it):
        if it is None:
            return self.target
        return jnp.maximum(self.init * self.decay**it, self.target)


# ------------------------------------------------------------------------- potentials


class _Dual(NamedTuple):
    """φ, ψ with Σⱼ b_j e^{(φ_i + ψ_j − c_ij)/ε} = 1 for all i; the iterations."""

    phi: Array
    psi: Array
    iterations: Array | int


def _log(w: Array) -> Array:
    return jnp.log(jnp.where(w > 0, w, 1)) + jnp.where(w > 0, 0, -jnp.inf)


def _solve(cost, x, y, a, b, eps, tol, max_iterations, block, symmetric) -> _Dual:
    largest = ground.DIAMETER[cost.cost] ** cost.p
    geometry = Streamed(
        x,
        y,
        cost_fn=cost,
        epsilon=Annealed(eps, largest, _DECAY),
        batch_size=block,
    )
    # Averaged parallel updates of the symmetric problem converge in a few iterations.
    weight = 0.5 if symmetric else _RELAXATION
    solver = sinkhorn.Sinkhorn(
        threshold=tol,
        max_iterations=max_iterations,
        parallel_dual_updates=symmetric,
        momentum=acceleration.Momentum(start=0, value=weight),
    )
    out = solver(linear_problem.LinearProblem(geometry, a=a, b=b))
    f, g = out.potentials
    psi = -_log_sums(cost, y, x, g, f, eps, block)
    g = psi + eps * _log(b)
    phi = -_log_sums(cost, x, y, f, g, eps, block)
    return _Dual(phi, psi, out.n_iters)


def _objective(
    cost: GroundCost, x, y, a, b, dual: _Dual, eps: Array, block: int
) -> Float[Array, ""]:
    """Σ aφ + Σ bψ − ε(Σ a_i b_j e^{(φ_i + ψ_j − c_ij)/ε} − 1), differentiable in x, y, a, b
    at fixed potentials; equal to OT_ε where they are optimal."""
    phi, psi = dual.phi, dual.psi
    # Pairs of two tokens of weight 0 may be anything: 0 · e^large must not be NaN.
    largest = float(np.log(jnp.finfo(x.dtype).max) / 2)

    @jax.checkpoint
    def rows(x, a, phi):
        e = (phi[:, None] + psi - _smooth_costs(x, y, cost.cost, cost.p)) / eps
        return a * jnp.sum(b * jnp.exp(jnp.minimum(e, largest)), axis=1)

    masses = _by_rows(rows, block, x, a, phi)
    return a @ phi + b @ psi - eps * (ground.total(masses) - 1)


# ---------------------------------------------------------------------------- bounds


def _lower(cost: GroundCost, x, y, a, b, phi: Array, block: int) -> Float[Array, ""]:
    """Σ aφ' + Σ bψ' ≤ W_p^p for ψ' = φᶜ and φ' = ψ'ᶜ, whatever φ is."""
    psi = _minima(cost, y, x, jnp.where(a > 0, phi, -jnp.inf), block)
    phi = _minima(cost, x, y, jnp.where(b > 0, psi, -jnp.inf), block)
    return a @ phi + b @ psi


def _upper(
    cost: GroundCost, x, y, a, b, dual: _Dual, eps: Array, block: int
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The cost of the plan made to fit its marginals, and by how much it did not: columns
    that hold too much are scaled down, and what is then missing goes a ⊗ b."""
    phi, psi = dual.phi, dual.psi
    logs = _log(a), _log(b)
    held = jnp.exp(
        (psi + _log_sums(cost, y, x, psi, phi + eps * logs[0], eps, block)) / eps
    )
    residual = ground.total(b * jnp.abs(held - 1))
    kept = b * jnp.minimum(1, held)
    missing = b - kept
    g = psi + eps * (logs[1] - jnp.log(jnp.maximum(held, 1)))

    def rows(x, a, f):
        c = cost.table(x, y)
        plan = jnp.exp((f[:, None] + g - c) / eps)
        left = jnp.maximum(a - jnp.sum(plan, axis=1), 0)
        return jnp.sum(plan * c, axis=1), left * (c @ missing), left

    costs_kept, costs_moved, left = _by_rows(rows, block, x, a, phi + eps * logs[0])
    lost = jnp.maximum(ground.total(left), jnp.finfo(x.dtype).tiny)
    return ground.total(costs_kept) + ground.total(costs_moved) / lost, residual


class Divergence(NamedTuple):
    """S_ε, which approximates W_p^p; bounds lower ≤ W_p^p ≤ upper; whether every plan's
    marginals are wrong by less than the tolerance; iterations of all three problems."""

    power: Array
    lower: Array
    upper: Array
    converged: Array
    iterations: Array


@functools.partial(jax.jit, static_argnames=("cost", "p", "max_iterations", "block"))
def divergence(
    x: Float[Array, "n d"],
    y: Float[Array, "m d"],
    a: Float[Array, " n"],
    b: Float[Array, " m"],
    eps: Float[Array, ""],
    tol: Float[Array, ""],
    *,
    cost: str,
    p: float,
    max_iterations: int,
    block: int,
) -> Divergence:
    """S_ε between weighted tokens, with bounds of W_p^p. Time O(n m) per iteration."""
    price = GroundCost(cost, p)
    eps0 = _fixed(eps)

    def problem(x, y, a, b, symmetric):
        fixed = _fixed((x, y, a, b))
        dual = _solve(price, *fixed, eps0, tol, max_iterations, block, symmetric)
        dual = _fixed(dual)
        return _objective(price, x, y, a, b, dual, eps0, block), dual

    across, dual = problem(x, y, a, b, False)
    within_x, dual_x = problem(x, x, a, a, True)
    within_y, dual_y = problem(y, y, b, b, True)
    x, y, a, b = _fixed((x, y, a, b))
    upper, residual = _upper(price, x, y, a, b, dual, eps0, block)
    guesses = dual.phi, dual.phi - dual_x.phi  # the latter: φ without entropic bias
    lower = [_lower(price, x, y, a, b, phi, block) for phi in guesses]
    return Divergence(
        across - (within_x + within_y) / 2,
        jnp.maximum(*lower),
        upper,
        residual < tol,
        jnp.asarray(dual.iterations + dual_x.iterations + dual_y.iterations),
    )
