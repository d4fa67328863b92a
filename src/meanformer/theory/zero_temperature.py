"""The zero-temperature flow ẋ = P_x Mx/|Bᵀx| in closed form, and what it does to measures.

Conventions: B = QᵀK, M = VBᵀ. In the time τ with dt = |Bᵀx| dτ the flow is linear up to
length, x = e^{Mτ}x₀/|e^{Mτ}x₀|. All that is left to compute is the clock t(τ), an integral,
and its inverse: `march` finds the panel of the τ-axis in which a token arrives (at a time, or
at an angle), `land` the point in it."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from .. import sphere
from ..checks import ArrayLike, check_count, check_scalar, is_traced, refuse
from ..matrices import check_invertible, check_matrices, key_query_value, matmul
from ..measures import AbstractLaw, Empirical

T = TypeVar("T")
_fixed = jax.lax.stop_gradient
_X, _W = np.polynomial.legendre.leggauss(16)
NODES = np.append((_X + 1) / 2, 1.0)  # Gauss nodes of [0, 1], and its end
_WEIGHTS = _W / 2
# From values at the nodes to their last two Legendre coefficients, of degrees 14 and 15.
_TAIL = (
    np.polynomial.legendre.legvander(_X, 15) * _W[:, None] * (np.arange(16) + 0.5)
).T[14:]
_TAYLOR = 12  # terms of e^{sN} where |s|‖N‖ ≤ 1/16
_LEVELS = 20
_START = 4  # the level of length 1/‖N‖
_PANELS = 256

# ------------------------------------------------------------------ panels of the τ-axis


class Linear(eqx.Module):
    """The flow of coordinates c ↦ e^{Nτ}c of tokens z = Gc, with the clock dt = |Bᵀz|/|z| dτ.

    `N` is a generator shifted to largest real part 0, which changes lengths by e^{−shift·τ}
    and no direction; `G` (None: the identity) the frame, `dual` = BᵀG. `exponentials`
    (l, c, d, d): e^{N c 2^l h} at the 16 Gauss nodes c of a panel and at its end. Tokens
    are columns, which is faster for small d."""

    N: Float[Array, "d d"]
    G: Float[Array, "d d"] | None
    dual: Float[Array, "d d"]
    shift: Float[Array, ""]
    h: Float[Array, ""]
    exponentials: Float[Array, "l c d d"]

    def __init__(self, N: Array, B: Array, G: Array | None = None):
        eye = jnp.eye(N.shape[0], dtype=N.dtype)
        self.shift = jnp.max(jnp.linalg.eigvals(_fixed(N)).real)
        self.N = N = N - self.shift * eye
        self.G, self.dual = G, B.T if G is None else matmul(B.T, G)
        norm = jnp.linalg.norm(_fixed(N), ord=2)
        self.h = 2.0**-_START / jnp.where(norm > 0, norm, 1)
        A = jnp.asarray(NODES, N.dtype)[:, None, None] * self.h * N

        def horner(total, k):
            return eye + matmul(A, total) / k, None

        def square(S, _):
            return matmul(S, S), S

        terms = jnp.arange(_TAYLOR, 0, -1, dtype=N.dtype)
        first = jax.lax.scan(horner, jnp.broadcast_to(eye, A.shape), terms)[0]
        self.exponentials = jax.lax.scan(square, first, length=_LEVELS)[1]

    def length(self, c: Float[Array, "*c d n"]) -> Float[Array, "*c n"]:
        """|z|."""
        return column_norm(c if self.G is None else matmul(self.G, c))

    def speed(self, c: Float[Array, "*c d n"]) -> Float[Array, "*c n"]:
        """dt/dτ."""
        return column_norm(matmul(self.dual, c)) / self.length(c)


def column_norm(z: Float[Array, "*c d n"]) -> Float[Array, "*c n"]:
    """|z| of each column."""
    return jnp.sqrt(jnp.sum(z * z, axis=-2))


class Walk(eqx.Module):
    """Tokens on their way: coordinates `c` of unit length |Gc|, the times τ and t(τ), and
    log|e^{Nτ}z₀|."""

    c: Float[Array, "d n"]
    tau: Float[Array, " n"]
    clock: Float[Array, " n"]
    log_length: Float[Array, " n"]


def march(
    linear: Linear,
    c: Float[Array, "d n"],
    arrived: Callable,
    panels: int,
    watch: Callable | None = None,
) -> tuple[Walk, Bool[Array, " n"]]:
    """Each token at the start of the panel of length h in which it first arrives, and
    whether it does within `panels` panels.

    `arrived(seen, clock)` is asked after each panel, with the clock at its end and what
    `watch(path)` has seen along it, (c, n). The panels (of length 2^l h, the same for all)
    adapt to speed and `watch`; one in which a token arrives is halved for it down to h."""
    n, dtype = c.shape[-1], c.dtype
    weights = jnp.asarray(_WEIGHTS, dtype)
    tolerance = (
        10 * float(jnp.finfo(dtype).eps) ** 0.5
    )  # the error of Gauss is its square

    def roughness(values):
        return column_norm(jnp.asarray(_TAIL, dtype) @ _fixed(values))

    def advance(walk, level, moving, halving):
        width = linear.h * 2 ** level.astype(dtype)
        path = matmul(linear.exponentials[level], walk.c)
        speeds = linear.speed(path[:-1])
        mean = weights @ speeds
        rough = roughness(speeds) / _fixed(mean)
        seen = None
        if watch is not None:
            seen = watch(path)
            rough = jnp.maximum(rough, tolerance * roughness(seen[:-1]) / 1e-3)
        clock = walk.clock + width * mean
        arrives = arrived(seen, clock)
        length = linear.length(path[-1])
        beyond = Walk(
            path[-1] / length,
            walk.tau + width,
            clock,
            walk.log_length + jnp.log(length),
        )
        rough = jnp.max(jnp.where(moving, rough, 0))
        smooth = (rough <= tolerance) | (level <= 0) | halving  # NaN is rough
        go = moving & ~arrives & smooth
        walk = jax.tree.map(lambda a, b: jnp.where(go, a, b), beyond, walk)
        # Twice the length makes a coefficient of degree 14 up to 2¹⁴ times as large.
        change = jnp.where(smooth, jnp.where(rough < tolerance / 2**14, 1, 0), -1)
        return walk, moving & arrives & smooth, jnp.clip(level + change, 0, _LEVELS - 1)

    @jax.checkpoint
    def panel(carry, _):
        def work(carry):
            walk, found, done, level = carry
            halving = jnp.all(done)
            moving = jnp.where(halving, found > level, ~done)
            walk, arrives, following = advance(walk, level, moving, halving)
            found = jnp.where(arrives & ~halving, level, found)
            done = done | arrives
            # Once all have arrived: down from the longest panel in which one did.
            down = jnp.where(halving, level, jnp.max(found)) - 1
            return walk, found, done, jnp.where(jnp.all(done), down, following)

        return jax.lax.cond(carry[3] < 0, lambda c: c, work, carry), None

    zero = jnp.zeros(n, dtype)
    start = Walk(c, zero, zero, zero)
    found, done = jnp.zeros(n, int), jnp.zeros(n, bool)
    state = (start, found, done, jnp.asarray(_START))
    walk, _, done, level = jax.lax.scan(panel, state, None, length=panels)[0]
    return walk, done & (level < 0)


def land(
    linear: Linear, walk: Walk, residual: Callable, guess: Float[Array, " n"]
) -> Walk:
    """The walk on to the root inside a panel of length h of what `residual(c, clock)` gives
    with its slope in τ, by Newton's method per token from `guess`; the last two steps carry
    derivatives, so that the first and second ones are those of the implicit function."""
    dtype = walk.clock.dtype
    nodes, weights = jnp.asarray(NODES[:-1], dtype), jnp.asarray(_WEIGHTS, dtype)

    def term(z, k):
        return matmul(linear.N, z) / k, z

    terms = jax.lax.scan(term, walk.c, jnp.arange(1, _TAYLOR + 1, dtype=dtype))[1]

    def along(s):  # coordinates after another s, one per token
        def horner(total, term):
            return total * s + term, None

        return jax.lax.scan(horner, jnp.zeros_like(walk.c), terms, reverse=True)[0]

    def clock(s):
        speeds = jax.vmap(lambda c: linear.speed(along(c * s)))(nodes)
        return walk.clock + s * (weights @ speeds)

    def newton(s, live):
        value, slope = residual(along(s), clock(s))
        better = s - value / slope
        return jnp.where(live, better, _fixed(jnp.clip(better, 0, linear.h))), None

    s = jax.lax.scan(newton, _fixed(guess), np.arange(7) >= 5)[0]
    c = along(s)
    length = linear.length(c)
    tau = walk.tau + s
    log_length = walk.log_length + jnp.log(length) + linear.shift * tau
    return Walk(c / length, tau, clock(s), log_length)


def enough_panels(run: Callable[[int], tuple[T, Array]], panels: int | None) -> T:
    """The result of `run(panels)` → (result, arrived). Without `panels`: 256, and eight times
    as many as long as some token does not arrive and its numbers can be read."""
    given = panels is not None
    count = check_count(panels, "panels") if given else _PANELS
    result, done = run(count)
    while not given and not is_traced(done) and count < 10**5 and not bool(done.all()):
        count *= 8
        result, done = run(count)
    return refuse(
        result,
        ~done,
        f"Argument `panels` must be large enough to reach the end, but {count} panels are "
        "not. Give more: up to 2‖M‖τ for a rotation, where τ ≤ t/(smallest singular value "
        "of QᵀK); real spectra need only the logarithm of that.",
    )


# ------------------------------------------------------------------ the flow


@functools.partial(jax.jit, static_argnames="panels")
def _flow(x0, t, B, M, panels):
    linear = Linear(M, B)
    walk, done = march(linear, x0.T, lambda _, clock: clock >= t, panels)
    guess = jnp.clip((t - walk.clock) / linear.speed(walk.c), 0, linear.h)
    return land(linear, walk, lambda c, clock: (clock - t, linear.speed(c)), guess), done


def _walk(x0, t, Q, K, V, panels) -> tuple[Walk, Array, Array]:
    """The flow of checked tokens, B and M."""
    Q, K, V = check_matrices(Q, K, V)
    B, M, _ = key_query_value(*check_invertible(Q, K), V)
    x0 = sphere.check_tokens(x0, "x0", M.shape[0])
    t = check_scalar(t, "t", minimum=0.0).astype(x0.dtype)
    B, M = B.astype(x0.dtype), M.astype(x0.dtype)
    return enough_panels(lambda n: _flow(x0, t, B, M, n), panels), B, M


def zero_temperature_flow(
    x0: ArrayLike,
    t: ArrayLike,
    Q: ArrayLike,
    K: ArrayLike,
    V: ArrayLike,
    *,
    panels: int | None = None,
) -> Float[Array, "n d"]:
    """The flow ẋ = P_x V KᵀQx/|KᵀQx| in closed form:

        x(t) = z/|z|,  z = e^{Mτ} x₀,  where  t = ∫₀^τ |Bᵀz(σ)|/|z(σ)| dσ,

    for any invertible B = QᵀK. The integral is monotone in τ; it is computed by 16-point
    Gauss rules on panels that adapt to the speed, and inverted by Newton's method per token.

    **Arguments:** tokens `x0` (n, d); a time `t` ≥ 0 (reverse the sign of `V` for the flow
    backwards); Q, K, V; `panels`, how many panels at most (default: enough; 256 under `jit`).

    Differentiable in all arguments (twice). Cost O(panels · n d²). **Raises:**
    `ValueError` for singular QᵀK, t < 0 or too few panels. **Source:** *multiscale*, Lemmas
    A.13, A.15.
    """
    return _walk(x0, t, Q, K, V, panels)[0].c.T


class Pushforward(AbstractLaw):
    """The law Φ_t#µ₀ of tokens of law `law` after time `t` of the zero-temperature flow.

    Density, samples and nodes; what `zero_temperature_pushforward` returns. With
    y = Φ_{−t}x = z/|z|, z = e^{−Mτ}x (the flow for −V), on the tangent spaces

        log ρ_t(x) = log ρ₀(y) − τ tr M − d log|z| − log(|Bᵀy|/|Bᵀx|).

    (Derived: x ↦ Ax/|Ax| has Jacobian |det A|/|Ax|^d on S^{d−1}. A change of clock dt = s dτ
    turns the divergence of f into div(f/s) = (div f)/s − d(log s)/dt, hence the last term.)"""

    law: AbstractLaw
    t: Float[Array, ""]
    Q: Float[Array, "k d"]
    K: Float[Array, "k d"]
    V: Float[Array, "d d"]
    panels: int | None = eqx.field(static=True)

    @property
    def d(self) -> int:
        return self.law.d

    def sample(self, key: PRNGKeyArray, n: int) -> Float[Array, "n d"]:
        return self._forward(self.law.sample(key, n))

    def nodes(self, n: int) -> Empirical:
        nodes = self.law.nodes(n)
        return Empirical(self._forward(nodes.points), nodes.weights, check=False)

    def log_density(self, x: Float[Array, "... d"]) -> Float[Array, "..."]:
        y, log_jacobian = self._backward(x)
        return self.law.log_density(y) + log_jacobian

    def density(self, x: Float[Array, "... d"]) -> Float[Array, "..."]:
        y, log_jacobian = self._backward(x)
        return self.law.density(y) * jnp.exp(log_jacobian)

    def _log_density_and_floor(self, x: Array) -> tuple[Array, Array]:
        y, log_jacobian = self._backward(x)
        log, floor = self.law._log_density_and_floor(y)
        return log + log_jacobian, floor + log_jacobian

    def _forward(self, x: Array) -> Array:
        return zero_temperature_flow(
            x, self.t, self.Q, self.K, self.V, panels=self.panels
        )

    def _backward(self, x: Array) -> tuple[Array, Array]:
        """Φ_{−t}x and log|det DΦ_{−t}(x)|."""
        rows = x.reshape(-1, self.d)
        walk, B, M = _walk(rows, self.t, self.Q, self.K, -self.V, self.panels)
        y = walk.c.T
        slowdown = column_norm(matmul(B.T, y.T)) / column_norm(matmul(B.T, rows.T))
        log_jacobian = (  # M is that of −V
            walk.tau * jnp.trace(M) - self.d * walk.log_length - jnp.log(slowdown)
        )
        return y.reshape(x.shape), log_jacobian.reshape(x.shape[:-1])


def zero_temperature_pushforward(
    mu: Any,
    t: ArrayLike,
    Q: ArrayLike,
    K: ArrayLike,
    V: ArrayLike,
    *,
    panels: int | None = None,
) -> Any:
    """Φ_t#µ₀, the solution at time t of ∂_tρ + div(ρ P_x V KᵀQx/|KᵀQx|) = 0 from µ₀.

    **Arguments:** `mu`, a law (then the result is one too, with `density`, `log_density`,
    `sample` and `nodes`) or an `Empirical` (then its tokens are moved and its weights kept);
    `t` ≥ 0; Q, K, V; `panels` as in `zero_temperature_flow`.

    The density is evaluated along the flow backwards, which magnifies the rounding of x by
    e^{gap·t/|Bᵀx|}; it is differentiable in x, t, Q, K, V and the law. **Raises:**
    `ValueError` for singular QᵀK, t < 0, another d. **Source:** *multiscale*, Eq. (5);
    *concentration*, Eq. (3); the density (Derived)."""
    if isinstance(mu, Empirical):
        points = zero_temperature_flow(mu.points, t, Q, K, V, panels=panels)
        return Empirical(points, mu.weights, check=False)
    if not isinstance(mu, AbstractLaw):
        raise ValueError(
            f"Argument `mu` must be a law or an `Empirical`, but is a {type(mu).__name__}. "
            "For example `Uniform(3)`, or `Empirical(points, weights)`."
        )
    Q, K, V = check_matrices(Q, K, V)
    if V.shape[0] != mu.d:
        raise ValueError(
            f"Argument `mu` must be a law on S^(d−1) with d = {V.shape[0]} to fit the "
            f"matrices, but has d = {mu.d}."
        )
    Q, K = check_invertible(Q, K)
    return Pushforward(mu, check_scalar(t, "t", minimum=0.0), Q, K, V, panels)
