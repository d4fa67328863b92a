"""Sums over tokens in nearly linear time on S¹ and S²: `Harmonic`.

With κ = |u| and û = u/κ the shifted sum e^{−κ} Σⱼ wⱼ e^{⟨u,yⱼ⟩} is a zonal kernel
e^{κ(q − 1)}, q = ⟨û, yⱼ⟩, summed over tokens. Its expansion in harmonics is short:
K ≈ √(2κ ln(1/ε)) degrees leave a rest below ε. Three linear steps follow,

    tokens → weights of the nodes of a grid with K degrees      (spreading, FFT)
    weights → sums at the nodes                                 (FFT; a zonal kernel)
    sums at the nodes → sums at the points û                    (FFT, interpolation)

each token and each point is touched once, whatever n is. Where κ varies from point to point
(B = QᵀK not a multiple of a rotation) the last two steps are done for Chebyshev's nodes
in √κ and interpolated.

**Modes.** e^{κ cos φ} = Σ_k I_k(κ) e^{ikφ}, and I_k(κ) = (1/2πi) ∮ e^{κ(z + 1/z)/2} z^{−k−1} dz
is at most the maximum of the integrand on the circle |z| = e^{arcsinh(k/κ)}:

    e^{−κ} I_k(κ) ≤ e^{−ψ(k)},    ψ(k) = κ − √(κ² + k²) + k arcsinh(k/κ).

ψ' = arcsinh(k/κ) increases, so the terms beyond K sum to ≤ e^{−ψ(K+1)}/(1 − e^{−ψ'(K+1)}). On S²
(2l+1) i_l = κ (i_{l−1} − i_{l+1}) telescopes the tail to κ(i_K + i_{K+1}) e^{−κ}, and i_l ≤ I_l
term by term.

**Honesty.** All errors are absolute, relative to e^κ. Where no token is near û the true sum
is far smaller: rows with error > tol · sum are summed densely, see `Harmonic`."""

import functools
import math
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

from ..checks import check_count, check_scalar, is_traced, refuse, shown
from ..matrices import matmul
from ..measures import Empirical
from ..sphere import normalise
from . import costs
from .grids import AbstractChart, Circle, Sphere, away_from_poles
from .sums import AbstractPartition, Blockwise, in_blocks, log_sums
from .windows import Window, window

# Nodes to a circle. The smallest that carries the kernel is chosen while running.
_LADDERS = {2: (64, 256, 1024, 8192), 3: (48, 96, 144, 192, 256)}
_SCREENS = {2: (256, 1024, 4096), 3: (128, 256)}
_RADII = 48  # most Chebyshev nodes in √κ
_FEW = 256  # rows that are summed densely without looking at all of them


# ------------------------------------------------------------------------ sums


@functools.cache
def _monomials(d: int, degree: int) -> tuple[tuple[int, ...], ...]:
    """Exponents of the monomials of y up to a degree, 1 first, then y₁, …, y_d."""
    found: list[tuple[int, ...]] = [(0,) * d]
    layer = found
    for _ in range(degree):
        grown = [
            tuple(np.add(e, np.eye(d, dtype=int)[a])) for e in layer for a in range(d)
        ]
        layer = list(dict.fromkeys(tuple(map(int, e)) for e in grown))
        found = found + layer
    return tuple(found)


@functools.cache
def _raised(d: int, degree: int) -> np.ndarray:
    """Where y_a times monomial i stands among those of one degree more: shape (d, i)."""
    place = {e: i for i, e in enumerate(_monomials(d, degree + 1))}
    one = np.eye(d, dtype=int)
    return np.array(
        [
            [place[tuple(map(int, np.add(e, one[a])))] for e in _monomials(d, degree)]
            for a in range(d)
        ]
    )


def _radii(low: Array, high: Array, error: float) -> Array:
    """How many Chebyshev nodes in t = √κ interpolate e^{−τt²}, 0 ≤ τ ≤ 2, on [√low, √high] with
    the given error (it may exceed `_RADII`); by Bernstein's bound 4M ρ^{1−Q}/(ρ − 1) with M
    the maximum on the ellipse of semi-axes (ρ ± 1/ρ)h/2."""
    middle, half = (
        (jnp.sqrt(high) + jnp.sqrt(low)) / 2,
        (jnp.sqrt(high) - jnp.sqrt(low)) / 2,
    )
    log_rho = np.linspace(0.05, 5, 100)[:, None]
    angle = np.linspace(0, math.pi, 33)
    real = jnp.asarray(np.cosh(log_rho) * np.cos(angle), low.dtype)
    imaginary = jnp.asarray(np.sinh(log_rho) * np.sin(angle), low.dtype)
    growth = 2 * jnp.max(
        jnp.maximum((half * imaginary) ** 2 - (middle + half * real) ** 2, 0), axis=1
    )
    log_rho = jnp.asarray(log_rho[:, 0], low.dtype)
    rest = math.log(4 / error) + growth - jnp.log(jnp.expm1(log_rho))
    count = jnp.ceil(jnp.min(1 + rest / log_rho))
    # Rounding of κ itself needs no second node.
    same = high - low <= 8 * jnp.finfo(low.dtype).eps * high
    return jnp.where(same, 1, jnp.maximum(count, 1))


class _Plan(eqx.Module):
    """How sums are taken; fixed numbers, no derivative passes through them.

    - `rung`: which grid of the ladder (past its end: none, all sums are 0); `short`, whether
        even the largest has too few degrees.
    - `low`, `high`: the range of κ; `used`, how many Chebyshev nodes in √κ.
    - `screen`: 0, sums are interpolated at the points u = xA directly; i > 0, they are taken
        at the nodes x of the i-th of `screens` and interpolated in x.
    - `x`, `A`: unit vectors and the matrix, where screens exist."""

    rung: Array
    short: Array
    low: Array
    high: Array
    used: Array
    screen: Array
    x: Array
    A: Array
    chart: AbstractChart = eqx.field(static=True)
    ladder: tuple[int, ...] = eqx.field(static=True)
    screens: tuple[int, ...] = eqx.field(static=True)

    @property
    def none(self) -> Array:
        """Whether no grid serves."""
        return self.rung == len(self.ladder)

    @property
    def P(self) -> Array:
        """Nodes to a circle (2, of degree 0, where no grid serves)."""
        return jnp.asarray((*self.ladder, 2), jnp.int32)[self.rung]

    @property
    def middle(self) -> Array:
        return (self.low + self.high) / 2

    def excess(self, kappa: Array) -> Array:
        """(κ − a)²/2a ≥ 0, a the middle of the range: see `_screened`."""
        return (kappa - self.middle) ** 2 / (
            2 * jnp.where(self.middle > 0, self.middle, 1)
        )


def _polar(u: Array) -> tuple[Array, Array]:
    """κ = |u|, and û (any unit vector where u = 0, which has no direction and needs none)."""
    kappa = jnp.linalg.norm(u, axis=1)
    somewhere = jnp.eye(u.shape[1], dtype=u.dtype)[0]
    unit = u / jnp.where(kappa > 0, kappa, 1)[:, None]
    return kappa, jnp.where(kappa[:, None] > 0, unit, somewhere)


def _sums(degree: int, u: Array, spread: Array, plan: _Plan) -> Array:
    """e^{−κ} Σⱼ wⱼ yⱼ^α e^{⟨u,yⱼ⟩} at the rows of u for all monomials α to a degree, shape
    (m, α), from the tokens as `spread` on a grid. Linear in `spread`; jax may transpose it,
    but must not differentiate it in u: see `moments`."""
    chart, ladder = plan.chart, plan.ladder
    points = [
        _polar(u),
        *(_polar(matmul(_nodes(chart, P, u), plan.A)) for P in plan.screens),
    ]
    columns = len(_monomials(u.shape[1], degree))
    low, high = jnp.sqrt(plan.low), jnp.sqrt(plan.high)
    middle, half, used = (high + low) / 2, (high - low) / 2, plan.used
    # Chebyshev's nodes in t = √κ and the barycentric formula. Near a node its own term is
    # huge in the sum as in the share, provided that both see the same numbers: t and the
    # nodes are computed once.
    r = jnp.arange(_RADII, dtype=u.dtype)
    place = jnp.cos(math.pi * (2 * r + 1) / (2 * used))
    sign = jnp.where(r % 2 == 0, 1, -1) * jnp.sin(math.pi * (2 * r + 1) / (2 * used))
    ts = [(jnp.sqrt(k) - middle) / jnp.where(half > 0, half, 1) for k, _ in points]
    tiny = float(jnp.finfo(u.dtype).tiny) ** 0.5

    def term(r, t):
        away = t - place[r]
        return sign[r] / jnp.where(jnp.abs(away) > tiny, away, tiny)

    totals = [
        lax.while_loop(
            lambda s: s[0] < used,
            lambda s, t=t: (s[0] + 1, s[1] + term(s[0], t)),
            (0, jnp.zeros_like(t)),
        )[1]
        for t in ts
    ]

    def more(r, sums):
        kappa_r = jnp.square(middle + half * place[r])
        table = _table(chart, ladder, degree, spread, plan.rung, kappa_r)

        def onto(i, sums):
            share = term(r, ts[i]) / totals[i]
            fresh = share[:, None] * chart.interpolate(table, points[i][1], plan.P)
            return (*sums[:i], sums[i] + fresh, *sums[i + 1 :])

        branches = [functools.partial(onto, i) for i in range(len(points))]
        return lax.switch(plan.screen, branches, sums)

    @jax.checkpoint
    def add(sums, r):
        return lax.cond(r < used, more, lambda r, sums: sums, r, sums), None

    start = tuple(jnp.zeros((k.shape[0], columns), u.dtype) for k, _ in points)
    sums, *on_screens = lax.scan(add, start, jnp.arange(_RADII))[0]
    if not plan.screens:
        return sums
    return _screened(plan, [kappa for kappa, _ in points], sums, on_screens)


def _nodes(chart: AbstractChart, P: int, like: Array) -> Array:
    nodes = chart.nodes(P)
    return jnp.asarray(nodes.reshape(-1, nodes.shape[-1]), like.dtype)


def _screened(plan: _Plan, kappas: list, direct: Array, on_screens: list) -> Array:
    """Sums at the points from sums at the nodes x of a screen, through the function of x

        H(x) = e^{−(κ²/a + a)/2} Σⱼ wⱼ e^{⟨xA,yⱼ⟩} = Σⱼ wⱼ e^{−|xA − a yⱼ|²/2a},

    which varies little in size and is as smooth as the kernel."""
    chart = plan.chart
    entries = chart.entries(plan.screens[-1])

    def table(i, f):
        f = f * jnp.exp(-plan.excess(kappas[i + 1]))[:, None]
        table = chart.table(f.reshape(*chart.shape(plan.screens[i]), -1))
        return jnp.pad(table, ((0, entries - table.shape[0]), (0, 0)))

    def read(direct, *on_screens):
        tables = [table(i, f) for i, f in enumerate(on_screens)]
        flat = lax.select_n(plan.screen - 1, *tables) if len(tables) > 1 else tables[0]
        P = jnp.asarray(plan.screens, jnp.int32)[plan.screen - 1]
        smooth = chart.interpolate(flat, plan.x, P)
        return smooth * jnp.exp(plan.excess(kappas[0]))[:, None]

    return lax.cond(plan.screen > 0, read, lambda direct, *_: direct, direct, *on_screens)


def _table(chart, ladder, degree, spread, rung, kappa) -> Array:
    """What is read for one κ, cut to the length of the largest grid."""
    entries = chart.entries(ladder[-1])
    columns = _monomials(len(chart.shape(4)) + 1, degree)

    def on_grid(P, spread, kappa):
        nodes = chart.nodes(P)
        powers = [np.prod(nodes ** np.array(e), axis=-1) for e in columns]
        W = chart.weights(spread[: chart.entries(P)], P)
        v = W[..., None] * jnp.asarray(np.stack(powers, axis=-1), W.dtype)
        table = chart.table(chart.zonal(lambda gap: jnp.exp(-kappa * gap), v))
        return jnp.pad(table, ((0, entries - table.shape[0]), (0, 0)))

    def none(spread, kappa):
        return jnp.zeros((entries, len(columns)), spread.dtype)

    branches = [functools.partial(on_grid, P) for P in ladder]
    return lax.switch(rung, [*branches, none], spread, kappa)


def _largest(plan: _Plan, spread: Array) -> Array:
    """The largest sum, relative to e^κ, at the nodes of the grid."""

    def on_grid(P, spread):
        W = plan.chart.weights(spread[: plan.chart.entries(P)], P)[..., None]
        return jnp.max(plan.chart.zonal(lambda gap: jnp.exp(-plan.low * gap), W))

    branches = [functools.partial(on_grid, P) for P in plan.ladder]
    return lax.switch(
        plan.rung, [*branches, lambda spread: jnp.ones((), spread.dtype)], spread
    )


# `moments` and its transpose as primitives of jax: linear in one argument, with derivatives
# in u that are moments of a degree more. (A `custom_jvp` is forgotten where jax transposes,
# so that second derivatives by forward over reverse would go through the grid's angles.)


def _static(plan: _Plan) -> tuple[list, dict]:
    leaves, structure = jax.tree.flatten(plan)
    return leaves, {"structure": structure}


def moments(degree: int, u: Array, spread: Array, plan: _Plan) -> Array:
    """`_sums`, with all derivatives."""
    leaves, static = _static(plan)
    return _moments_p.bind(u, spread, *leaves, degree=degree, **static)


def _spread_back(degree: int, u: Array, g: Array, plan: _Plan) -> Array:
    """The transpose of `moments`, at g (m, α): linear in g, with all derivatives."""
    leaves, static = _static(plan)
    return _spread_back_p.bind(u, g, *leaves, degree=degree, **static)


def _compute_moments(u, spread, *leaves, degree, structure):
    return _sums(degree, u, spread, jax.tree.unflatten(structure, leaves))


def _compute_spread_back(u, g, *leaves, degree, structure):
    plan = jax.tree.unflatten(structure, leaves)
    like = jax.ShapeDtypeStruct((plan.chart.entries(plan.ladder[-1]),), u.dtype)
    return jax.linear_transpose(lambda s: _sums(degree, u, s, plan), like)(g)[0]


def _shape_of_moments(u, *, degree, structure):
    del structure
    return u.shape[0], len(_monomials(u.shape[1], degree))


def _shape_of_spread(u, *, degree, structure):
    del u, degree
    plan = jax.tree.unflatten(structure, [0] * structure.num_leaves)
    return (plan.chart.entries(plan.ladder[-1]),)


def _slope_of_moments(degree, u, spread, plan, du):
    d = u.shape[1]
    raised = moments(degree + 1, u, spread, plan)
    return sum(du[:, a, None] * raised[:, at] for a, at in enumerate(_raised(d, degree)))


def _slope_of_spread_back(degree, u, g, plan, du):
    d = u.shape[1]
    raised = jnp.zeros((u.shape[0], len(_monomials(d, degree + 1))), u.dtype)
    for a, at in enumerate(_raised(d, degree)):
        raised = raised.at[:, at].add(du[:, a, None] * g)
    return _spread_back(degree + 1, u, raised, plan)


def _primitive(name: str, compute, shape, apply, slope) -> Primitive:
    """A primitive computed by `compute`, applied by `apply`, linear in its second argument,
    with `slope`, its derivative in u along du. Batches are taken one by one."""
    primitive = Primitive(name)
    jitted = jax.jit(compute, static_argnames=("degree", "structure"))
    primitive.def_impl(jitted)

    primitive.def_abstract_eval(
        lambda u, _, *leaves, **static: ShapedArray(shape(u, **static), u.dtype)
    )
    mlir.register_lowering(primitive, mlir.lower_fun(compute, multiple_results=False))

    def jvp(primals, tangents, *, degree, structure):
        (u, linear, *leaves), (du, dlinear, *_) = primals, tangents
        plan = jax.tree.unflatten(structure, leaves)
        value, terms = apply(degree, u, linear, plan), []
        if type(du) is not ad.Zero:
            terms.append(slope(degree, u, linear, plan, du))
        if type(dlinear) is not ad.Zero:
            terms.append(apply(degree, u, dlinear, plan))
        return value, sum(terms, jnp.zeros_like(value))

    ad.primitive_jvps[primitive] = jvp

    def one_by_one(args, axes, **static):
        moved = [a if k is None else jnp.moveaxis(a, k, 0) for a, k in zip(args, axes)]

        def one(batched):
            rest = iter(batched)
            full = [a if k is None else next(rest) for a, k in zip(moved, axes)]
            return primitive.bind(*full, **static)

        return lax.map(one, [a for a, k in zip(moved, axes) if k is not None]), 0

    batching.primitive_batchers[primitive] = one_by_one
    return primitive


_moments_p = _primitive(
    "harmonic_moments", _compute_moments, _shape_of_moments, moments, _slope_of_moments
)
_spread_back_p = _primitive(
    "harmonic_spread_back",
    _compute_spread_back,
    _shape_of_spread,
    _spread_back,
    _slope_of_spread_back,
)


def _transpose_by(apply):
    def rule(g, u, _, *leaves, degree, structure):
        plan = jax.tree.unflatten(structure, leaves)
        return [None, apply(degree, u, g, plan), *(None for _ in leaves)]

    return rule


ad.primitive_transposes[_moments_p] = _transpose_by(_spread_back)
ad.primitive_transposes[_spread_back_p] = _transpose_by(moments)


# ------------------------------------------------------------------------ errors


def _exponent(kappa: Array, k: Array | int) -> Array:
    """ψ(k), so that e^{−κ} I_k(κ) ≤ e^{−ψ(k)}."""
    tiny = jnp.finfo(kappa.dtype).tiny
    return k * jnp.arcsinh(k / jnp.maximum(kappa, tiny)) - k**2 / (
        kappa + jnp.sqrt(kappa * kappa + k**2)
    )


def tail(d: int, kappa: Array, degree: Array | int) -> Array:
    """A bound of what the degrees above `degree` ≥ 1 add to e^{κ(q−1)} on S^{d−1}, d = 2, 3."""
    if d == 3:
        return 2 * kappa * jnp.exp(-_exponent(kappa, degree))
    slope = jnp.arcsinh((degree + 1) / jnp.maximum(kappa, jnp.finfo(kappa.dtype).tiny))
    return 2 * jnp.exp(-_exponent(kappa, degree + 1)) / -jnp.expm1(-slope)


def _truncation(d: int, P: int, kappa: Array) -> Array:
    """Bound of the error of a sum, relative to e^κ and the mass: on both sides the kernel
    loses the degrees that a grid does not carry, each times (1 + the norm of trigonometric
    interpolation); two degrees fewer, since moments multiply by y twice."""
    norm = (1 + 2 / math.pi * math.log(P)) ** (d - 1)
    return (1 + norm) ** 2 * tail(d, kappa, P // 2 - 3)


def _screen_truncation(d: int, P: int, most: Array, a: Array) -> Array:
    """The same for H of `_screened`. At x turned by an imaginary angle iη its terms are at most
    e^{|Im xA|²/2a}, |Im xA| ≤ κ sinh η, so that its modes fall like e^{b(cosh 2η − 1) − kη} with
    b = κ²/4a, for every η: as e^{−ψ(k/2)} does for b."""
    b = most**2 / (4 * jnp.where(a > 0, a, 1))
    half = P // 4 - 1
    slope = jnp.arcsinh(half / jnp.maximum(b, jnp.finfo(b.dtype).tiny)) / 2
    norm = (1 + 2 / math.pi * math.log(P)) ** (d - 1)
    return 2 * (d - 1) * (1 + norm) * jnp.exp(-_exponent(b, half)) / -jnp.expm1(-slope)


def _aliasing(d: int, P: Array, kappa: Array, window: Window) -> Array:
    """The same for the windows, of d − 1 angles on both sides; on the torus the kernel has its
    mirror image too."""
    outer = (window.outer_error - window.error) * tail(d, kappa, P // 4 - 2)
    return 2 * (d - 1) ** 2 * (window.error + outer)


# ------------------------------------------------------------------- the partition


class Harmonic(AbstractPartition):
    """Sums over all tokens through harmonics of S¹ (d = 2) and S² (d = 3), in O((m + n) w^{d−1})
    time for m points and n tokens, w ≤ 16, whatever β, Q, K and V are; O(m + n) memory.

    **Arguments:**

    - `tol`: bound of the error of L_µ (that is, relative error of the sum) and of ∇L_µ, beside
        the rounding κ·ε of the exponents, which all sums have. Default 1e-10 in float64, 1e-5
        in float32; at least 8 units of rounding.
    - `max_modes`: the most degrees K to use; a κ that needs more is refused. Default: K ≤
        4095 (d = 2), 127 (d = 3), and if the largest κ needs more all points are summed
        densely.

    The number of modes follows from the largest κ = |βBᵀx| and `tol` by a proved bound,
    K ≈ √(2κ ln(1/ε)), while running: a new β compiles nothing. Weights, κ that varies from
    point to point (at full accuracy: up to 48 Chebyshev nodes in √κ, each the cost of one
    evaluation; all pairs where κ varies more, from 0 to beyond 30 say, and points are few), and
    points u that belong to no token are all allowed.

    **No wrong answer without notice.** The series is exact relative to e^κ; where no token is
    near the direction of u the sum is far smaller. Rows whose error bound exceeds tol times
    their sum (tail + windows + 4 units of rounding of the largest sum) are collected and summed
    densely, as many as there are. `report` counts them; `solve` and `unroll`
    put the counts at the times that they keep in `stats`.

    **Derivatives** in both modes and of any order, also of A = βB at an orthogonal B and at
    u = 0: those in u are moments of one degree more. Those in the tokens are tangential
    (y/|y| enters) and lose a digit or two against `tol` with each order. Under `vmap` members
    are taken one by one, each with its own modes; dense rows are summed for all if for one.

    A non-uniform FFT of a compiled library (FINUFFT 2.5) was measured in the place of the
    spreading and reading done here in plain jax: on two cores .6 to 2 times the time of
    the two together for 10⁵ and 10⁶ tokens, and no gain in float32 for d = 2; it is not used.

    **Raises:** `ValueError` for d > 3, for a `tol` that the dtype of the tokens cannot deliver,
    and for a κ beyond `max_modes`, if given."""

    tol: float | None = eqx.field(static=True, default=None)
    max_modes: int | None = eqx.field(static=True, default=None)
    # Set by `prepared` and by `Auto`: the only grid to use; whether dense sums are to be taken
    # where they are faster.
    nodes: int | None = eqx.field(static=True, default=None)
    thrifty: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        if self.tol is not None:
            check_scalar(
                self.tol, "tol", minimum=0.0, strict=True, cure="1e-10 is the default."
            )
        if self.max_modes is not None:
            check_count(self.max_modes, "max_modes", 4)

    def __call__(
        self, x: Float[Array, "m d"], A: Float[Array, "d d"], mu: Empirical
    ) -> tuple[Float[Array, " m"], Float[Array, "m d"]]:
        return _harmonic_sums(self, x, A, matmul(x, A), mu)

    def at(
        self, u: Float[Array, "m d"], mu: Empirical
    ) -> tuple[Float[Array, " m"], Float[Array, "m d"]]:
        return _harmonic_sums(self, None, None, u, mu)

    def report(
        self, x: Float[Array, "m d"], A: Float[Array, "d d"], mu: Empirical
    ) -> dict[str, Array]:
        return _report(self, x, A, mu)

    def prepared(self, A: np.ndarray, m: int, n: int, dtype: Any) -> AbstractPartition:
        ladder, error = self.ladder(A.shape[0]), self.error(dtype)
        P = smallest_grid(A.shape[0], ladder, error, float(np.linalg.norm(A, 2)))
        if P is None:  # refuse, or sum densely, as the whole ladder does
            return self if self.max_modes is not None else Blockwise()
        if self.thrifty and _slower(A, P, error, m, n, dtype):
            return Blockwise()
        return Harmonic(self.tol, self.max_modes, P)

    def off_sphere(self) -> AbstractPartition:
        raise ValueError(
            "Argument `partition` must not be `Harmonic` here: the sums are over points inside "
            "of the ball, which have no harmonics. Use `Auto()` or `Blockwise()`."
        )

    def tolerance(self, dtype: Any) -> float:
        """`tol`, or its default for tokens of this dtype."""
        dtype = jnp.dtype(dtype)
        least = 8 * float(jnp.finfo(dtype).eps)
        if self.tol is None:
            return 1e-10 if least < 1e-10 else 1e-5
        if self.tol < least:
            raise ValueError(
                f"Argument `tol` must be at least {least:.1e} for {dtype} tokens, but is "
                f"{self.tol:g}. Use float64 tokens, or `Blockwise()`."
            )
        return float(self.tol)

    def ladder(self, d: int) -> tuple[int, ...]:
        """Nodes to a circle of the grids to choose from; P nodes carry P/2 − 1 degrees."""
        if d not in _LADDERS:
            raise ValueError(
                f"Argument `partition` must not be `Harmonic` for tokens of d = {d}: harmonics "
                "are short on S¹ and S² only. Use `Auto()` or `Blockwise()`."
            )
        if self.nodes is not None:
            return (self.nodes,)
        if self.max_modes is None:
            return _LADDERS[d]
        last = 2 * (self.max_modes + 1)
        return (*(P for P in _LADDERS[d] if last > P), last)

    def error(self, dtype: Any) -> float:
        """What tails of series may add, relative to e^κ."""
        return max(1e-6 * self.tolerance(dtype), float(jnp.finfo(dtype).eps) / 8, 1e-15)


@eqx.filter_jit
def _harmonic_sums(how: Harmonic, x, A, u: Array, mu: Empirical) -> tuple[Array, Array]:
    """L and ∇L at the rows of u, = x A for unit vectors x if they are given."""
    plan, turn = _plan(how, x, A, u, mu)
    if how.max_modes is not None:
        u = refuse(u, plan.short, _too_many(how, plan))

    def by_series(u, mu):
        sums, bad = _series(how, 1, plan, turn, u, mu)
        z = jnp.where(bad, 1, sums[:, 0])
        mean = jnp.where(bad[:, None], 0, sums[:, 1:]) / z[:, None]
        mean = mean if u.shape[1] == 2 else matmul(mean, turn.T)
        kappa = jnp.linalg.norm(lax.stop_gradient(u), axis=1)
        return _repaired(u, mu, bad, (kappa + jnp.log(z), mean))

    @jax.checkpoint  # the branch not taken leaves nothing to be stored
    def by_pairs(u, mu):
        return Blockwise().at(u, Empirical(normalise(mu.points), mu.weights, check=False))

    return lax.cond(eqxi.unvmap_all(plan.none), by_pairs, by_series, u, mu)


@eqx.filter_jit
def _report(how: Harmonic, x, A, mu: Empirical) -> dict[str, Array]:
    u = matmul(x, A)
    plan, turn = _plan(how, x, A, u, mu)
    bad = _series(how, 0, plan, turn, u, mu)[1]
    return {"modes": plan.P // 2 - 1, "dense_points": jnp.sum(bad)}


def _series(
    how: Harmonic, degree: int, plan: _Plan, turn, u: Array, mu: Empirical
) -> tuple[Array, Array]:
    """Moments to a degree at the rows of u in the turned frame, relative to e^κ, and which
    rows are not good enough."""
    d, dtype = u.shape[1], u.dtype
    y, turned = (mu.points, u) if d == 2 else (matmul(mu.points, turn), matmul(u, turn))
    entries = plan.chart.entries(plan.ladder[-1])
    spread = plan.chart.gather(y, mu.weights, plan.P, entries)
    sums = moments(degree, turned, spread, plan)
    z, scale = lax.stop_gradient((sums[:, 0], _largest(plan, lax.stop_gradient(spread))))
    mass = lax.stop_gradient(jnp.sum(mu.weights))
    kappa = jnp.linalg.norm(lax.stop_gradient(u), axis=1)
    bound = _bound(plan, how.error(dtype), kappa, mass, scale)
    # Twice: the barycentre has the error of its numerator and of z. NaN fails too.
    return sums, plan.none | ~(2 * bound <= how.tolerance(dtype) * z)


def _slower(A: np.ndarray, P: int, error: float, m: int, n: int, dtype: Any) -> bool:
    """Whether harmonics cost more than all pairs, for points xA everywhere on the sphere."""
    d = A.shape[0]
    sizes = np.linalg.svd(A, compute_uv=False)
    low, high = jnp.asarray(sizes[-1]), jnp.asarray(sizes[0])
    count = _radii(low, high, error)
    chart = Circle if d == 2 else Sphere
    screens = [math.prod(chart(window(error)).shape(P)) for P in _SCREENS[d]]
    read = min([m, *(nodes for nodes in screens[:1] if count > 1 and 2 * nodes <= m)])
    cost = costs.harmonic(
        d, jnp.dtype(dtype), jnp.asarray(P), count, jnp.asarray(read), m, n
    )
    return bool(cost >= costs.dense(jnp.dtype(dtype), m, n) or count > _RADII)


def smallest_grid(
    d: int, ladder: tuple[int, ...], error: float, kappa: float
) -> int | None:
    """The first of the ladder that carries e^{κ(q−1)} with that error."""
    high = jnp.asarray(kappa * (1 + 1e-5))
    return next((P for P in ladder if bool(_truncation(d, P, high) <= error)), None)


def _plan(how: Harmonic, x, A, u: Array, mu: Empirical) -> tuple[_Plan, Array]:
    """The plan for points u = x A, and the rotation (y @ turn) into the frame of the grid."""
    u, points = lax.stop_gradient((u, mu.points))
    (m, d), dtype = u.shape, u.dtype
    ladder, tol, error = how.ladder(d), how.tolerance(dtype), how.error(dtype)
    chart = (Circle if d == 2 else Sphere)(window(error / (2 * (d - 1))))
    turn = jnp.eye(d, dtype=dtype) if d == 2 else away_from_poles(points)
    screens: tuple[int, ...] = ()
    if x is None or A is None:
        x = A = jnp.zeros((), dtype)
    else:
        x, A = lax.stop_gradient((x, matmul(A, turn)))
        screens = tuple(P for P in _SCREENS[d] if 2 * math.prod(chart.shape(P)) <= m)
    kappa = jnp.linalg.norm(u, axis=1)
    low, high = jnp.min(kappa), jnp.max(kappa)
    screen = jnp.zeros((), jnp.int32)
    varies = high - low > 8 * jnp.finfo(dtype).eps * high
    if screens:
        everywhere = jnp.linalg.norm(matmul(_nodes(chart, screens[-1], u), A), axis=1)
        least, most = jnp.min(everywhere), jnp.max(everywhere)
        middle = (least + most) / 2
        serves = jnp.stack(
            [_screen_truncation(d, P, most, middle) <= error for P in screens]
        )
        # What is amplified at the ends of the range must leave room for sums far below e^κ.
        loss = jnp.exp((most - middle) ** 2 / (2 * jnp.where(middle > 0, middle, 1)))
        noise = 2 * (d - 1) * chart.window.error + error + 4 * jnp.finfo(dtype).eps
        useful = varies & serves.any() & (loss * noise <= tol / 200)
        screen = jnp.where(useful, 1 + jnp.argmax(serves), 0).astype(jnp.int32)
        low = jnp.where(screen > 0, jnp.minimum(low, least), low)
        high = jnp.where(screen > 0, jnp.maximum(high, most), high)
    count = _radii(low, high, error)
    short = jnp.stack([_truncation(d, P, high) > error for P in ladder])
    rung = jnp.where(count > _RADII, len(ladder), jnp.sum(short))
    if how.thrifty:
        sizes = (0, *(math.prod(chart.shape(P)) for P in screens))
        read = jnp.where(screen > 0, jnp.asarray(sizes)[screen], m)
        P = jnp.asarray((*ladder, ladder[-1]))[rung]
        cost = costs.harmonic(d, dtype, P, count, read, m, mu.n)
        rung = jnp.where(cost < costs.dense(dtype, m, mu.n), rung, len(ladder))
    count = jnp.where(count > _RADII, 1, count)
    fixed = rung, short[-1], low, high, count, screen, x, A
    return _Plan(*fixed, chart, ladder, screens), turn


def _bound(plan: _Plan, error: float, kappa: Array, mass: Array, scale: Array) -> Array:
    """Bound of the error of the sums, relative to e^κ: tails, windows, and rounding by the
    largest sum at a node. Through a screen an estimate: errors at its nodes pass once more."""
    d = len(plan.chart.shape(4)) + 1
    eps = jnp.finfo(kappa.dtype).eps
    windows = _aliasing(d, plan.P, plan.high, plan.chart.window)
    bound = mass * (2 * error + windows) + 2 * eps * scale
    amplified = mass * (error + windows) + 2 * eps * scale
    through = 2 * bound + amplified * jnp.exp(plan.excess(kappa))
    return jnp.where(plan.screen > 0, through, bound)


def _too_many(how: Harmonic, plan: _Plan) -> str:
    d, have = len(plan.chart.shape(4)) + 1, plan.ladder[-1] // 2 - 1
    need, error = "more", how.error(plan.high.dtype)
    if not is_traced(plan.high):
        P = np.unique(np.geomspace(8, 2**24, 400).astype(int))
        enough = [bool(_truncation(d, p, plan.high) <= error) for p in P]
        need = f"about {P[int(np.argmax(enough))] // 2}"
    return (
        "Argument `max_modes` must be large enough for κ = |βBᵀx|"
        f"{'' if is_traced(plan.high) else f' = {shown(plan.high)}'}, which needs {need} modes, "
        f"but is {have}. Leave `max_modes` out (all pairs are then summed), or "
        "use `Blockwise()`."
    )


def _repaired(
    u: Array, mu: Empirical, bad: Array, result: tuple[Array, Array]
) -> tuple[Array, Array]:
    """`result` with its bad rows summed densely: as many as there are, a few at a time."""
    (m, d), count = u.shape, jnp.sum(bad)

    def redo(most, rows, u, y, w, result):
        chunks = -(-most // rows)
        index = jnp.nonzero(bad, size=chunks * rows, fill_value=m)[0]
        tiles = in_blocks(y, 4096), in_blocks(w, 4096)

        @jax.checkpoint
        def chunk(carry, i):
            here = lax.dynamic_slice(index, (i * rows,), (rows,))

            def dense():
                return log_sums(u[jnp.minimum(here, m - 1)], *tiles)

            def skip():
                return jnp.zeros(rows, u.dtype), jnp.zeros((rows, d), u.dtype)

            return carry, lax.cond(eqxi.unvmap_any(i * rows < count), dense, skip)

        log_z, mean = lax.scan(chunk, None, jnp.arange(chunks))[1]
        fresh = log_z.reshape(-1), mean.reshape(-1, d)
        return tuple(a.at[index].set(b, mode="drop") for a, b in zip(result, fresh))

    branches = [
        lambda u, y, w, result: result,
        jax.checkpoint(functools.partial(redo, min(m, _FEW), 16)),
        jax.checkpoint(functools.partial(redo, m, 64)),
    ]
    case = (count > 0).astype(int) + (count > _FEW)
    case = eqxi.unvmap_max(case)
    return lax.switch(case, branches, u, normalise(mu.points), mu.weights, result)
