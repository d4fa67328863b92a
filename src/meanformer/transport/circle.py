"""Optimal transport on the circle, exact.

Positions are turns u = θ/2π, distributions are their quantile functions F⁻¹, G⁻¹, lifted
to the line by F⁻¹(q + 1) = F⁻¹(q) + 1. For a convex cost c of the arc,

    W = min over α of h(α) = ∫₀¹ c(F⁻¹(q) − G⁻¹(q − α)) dq,

and h is convex: bisection on the sign of its slope, a sum over atoms, finds the minimum to
rounding. **Source:** Delon, Salomon & Sobolevski, *Fast transport optimization for Monge
costs on the circle*, SIAM J. Appl. Math. 70 (2010).

The functions return the p-th power of the distance, in turns. They are differentiable in
positions and weights: the optimal pairing is held fixed (Danskin). Where it is not unique
(ties, coincident tokens, the cut locus) this gives one of the one-sided derivatives.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .. import sphere
from .ground import power, total

_fixed = jax.lax.stop_gradient


def turns(x: Float[Array, "n 2"]) -> Float[Array, " n"]:
    """Angles of the tokens in turns, in [0, 1]."""
    return jnp.mod(sphere.angles(x) / (2 * jnp.pi), 1)


def _bisect(
    below: Callable, low: Array, high: Array, middle: Callable, steps: int
) -> Array:
    """The upper end of [low, high] after `steps` halvings that keep what is not `below`."""

    def halve(_, ends):
        low, high = ends
        centre = middle(low, high)
        left = below(centre)
        return jnp.where(left, centre, low), jnp.where(left, high, centre)

    return jax.lax.fori_loop(0, steps, halve, (low, high))[1]


# ------------------------------------------------------------------- equal weights


@functools.partial(jax.jit, static_argnames="p")
def equal(u: Float[Array, " n"], v: Float[Array, " n"], p: float) -> Float[Array, ""]:
    """n tokens against n, of equal weights, any p ≥ 1. The best α is a multiple of 1/n: a
    cyclic shift of the sorted tokens. O(n log n): two sorts and log₂ 2n sums."""
    n = u.shape[0]
    u, v = jnp.sort(u), jnp.sort(v)
    lifted = jnp.concatenate([v - 2, v - 1, v, v + 1])
    u0, lifted0 = _fixed((u, lifted))

    def falls(k):  # from shift k to k + 1; `window` is v[i − k − 1] for i = 0 … n
        window = jax.lax.dynamic_slice(lifted0, (2 * n - k - 1,), (n + 1,))
        return total(power(u0 - window[:-1], p) - power(u0 - window[1:], p)) < 0

    ends = jnp.asarray(-n - 1), jnp.asarray(n)
    steps = (2 * n + 1).bit_length()  # g → ⌈g/2⌉ from g = 2n + 1 to 1
    k = _bisect(falls, *ends, lambda low, high: (low + high + 1) // 2, steps)
    return total(power(u - jax.lax.dynamic_slice(lifted, (2 * n - k,), (n,)), p)) / n


# --------------------------------------------------------------------- any weights


def cumulated(weights: Float[Array, " n"]) -> Float[Array, " n"]:
    """A_i = w_1 + … + w_i, with A_n = 1 exactly."""
    sums = jnp.cumsum(weights)
    return (sums / sums[-1]).at[-1].set(1)


def by_position(
    u: Float[Array, " n"], weights: Float[Array, " n"]
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """Sorted positions and cumulated weights."""
    order = jnp.argsort(u)
    return u[order], cumulated(weights[order])


def _quantile(u: Array, A: Array, q: Array) -> Array:
    """F⁻¹(q), for any real q."""
    whole = jnp.floor(q)
    index = jnp.searchsorted(A, q - whole)
    return u[jnp.minimum(index, u.shape[0] - 1)] + whole


def _difference(
    u: Array, A: Array, v: Array, B: Array, alpha: Array
) -> tuple[Float[Array, " k"], Float[Array, " k"]]:
    """r(q) = F⁻¹(q) − G⁻¹(q − α) on (0, 1): its n + m values and the lengths of the
    intervals where it takes them."""
    n, m = u.shape[0], v.shape[0]
    q = B + alpha
    turn = jnp.round(_fixed(jnp.floor(q)))
    q, v = q - turn, v - turn  # for q below B_j + α, down to the break before: v_j
    around = jnp.argsort(q)
    q, v = q[around], v[around]
    v = jnp.append(v, v[0] + 1)  # beyond the last break the first atom comes again
    breaks = jnp.concatenate([A, q])
    order = jnp.argsort(breaks)
    breaks = breaks[order]
    first = (order < n).astype(int)
    i = jnp.cumsum(first) - first  # breaks of F below this one
    j = jnp.arange(n + m) - i
    lengths = jnp.diff(breaks, prepend=0)
    return lengths, u[jnp.minimum(i, n - 1)] - v[j]


def _pinned(A: Array, B: Array, alpha: Array) -> Array:
    """`alpha` as the difference A_i − B_j nearest to it, which moves with the weights: at
    the minimum a break of F meets one of G."""
    n = A.shape[0]
    ends = jnp.concatenate([jnp.zeros_like(A[:1]), A])
    q = _fixed(B) + _fixed(alpha)
    whole = jnp.floor(q)
    i = jnp.clip(jnp.searchsorted(_fixed(A), q - whole), 0, n - 1)
    below = q - whole - _fixed(ends)[i] < _fixed(ends)[i + 1] - (q - whole)
    i = jnp.where(below, i, i + 1)
    gaps = jnp.abs(_fixed(ends)[i] + whole - q)
    j = jnp.argmin(gaps)
    return ends[i[j]] + whole[j] - B[j]


@functools.partial(jax.jit, static_argnames="p")
def weighted(
    u: Float[Array, " n"],
    a: Float[Array, " n"],
    v: Float[Array, " m"],
    b: Float[Array, " m"],
    p: float,
) -> Float[Array, ""]:
    """Any weights, any p ≥ 1. O((n + m) log(n + m)): three sorts, and bisection of
    [−1, 1] down to rounding, each step m look-ups by bisection (54 steps in float64)."""
    (u, A), (v, B) = by_position(u, a), by_position(v, b)
    u0, A0, v0, B0 = _fixed((u, A, v, B))
    after = jnp.append(v0[1:], v0[0] + 1)

    def falls(alpha):  # where α grows, v_j takes over from its successor at B_j + α
        x = _quantile(u0, A0, B0 + alpha)
        return total(power(x - v0, p) - power(x - after, p)) < 0

    ends = jnp.asarray(-1, u.dtype), jnp.asarray(1, u.dtype)
    steps = jnp.finfo(u.dtype).nmant + 2
    alpha = _bisect(falls, *ends, lambda low, high: (low + high) / 2, steps)
    lengths, r = _difference(u, A, v, B, _pinned(A, B, alpha))
    return total(lengths * power(r, p))


def _median(values: Array, lengths: Array) -> Array:
    """A weighted median: one of the values."""
    order = jnp.argsort(_fixed(values))
    below = jnp.cumsum(_fixed(lengths)[order])
    return values[order[jnp.argmax(below >= below[-1] / 2)]]


@jax.jit
def weighted_one(
    u: Float[Array, " n"],
    a: Float[Array, " n"],
    v: Float[Array, " m"],
    b: Float[Array, " m"],
) -> Float[Array, ""]:
    """Any weights, p = 1: ∫ |F − G − c| over the circle, c the median of F − G. Two sorts
    of n + m numbers."""
    places = jnp.concatenate([u, v])
    order = jnp.argsort(_fixed(places))
    places = places[order]
    flow = jnp.cumsum(jnp.concatenate([a, -b])[order])
    lengths = jnp.diff(places, append=places[0] + 1)
    return total(lengths * jnp.abs(flow - _median(flow, lengths)))


def line(
    u: Float[Array, " n"],
    a: Float[Array, " n"],
    v: Float[Array, " m"],
    b: Float[Array, " m"],
    p: float,
) -> Float[Array, ""]:
    """∫ |F⁻¹ − G⁻¹|^p of numbers on the line, where α = 0."""
    (u, A), (v, B) = by_position(u, a), by_position(v, b)
    lengths, r = _difference(u, A, v, B, jnp.zeros((), u.dtype))
    return total(lengths * power(r, p))


# ----------------------------------------------------------- against the uniform law


@functools.partial(jax.jit, static_argnames="p")
def uniform(u: Float[Array, " n"], a: Float[Array, " n"], p: float) -> Float[Array, ""]:
    """Against the uniform law, p = 1 or 2. F⁻¹(q) − q falls by a_i along the atom i, from
    e_i = u_i − A_{i−1}: closed forms, about the median (by bisection) and the mean."""
    u, A = by_position(u, a)
    a = jnp.diff(A, prepend=0)
    if p == 2:
        middle = u - A + a / 2
        middle = middle - total(a * middle)
        return total(a * (middle**2 + a**2 / 12))
    start = u - A + a
    start0, a0 = _fixed((start, a))

    def more_above(c):
        return total(jnp.clip(start0 - c, 0, a0)) > 0.5

    ends = jnp.asarray(-1, u.dtype), jnp.asarray(1, u.dtype)
    steps = jnp.finfo(u.dtype).nmant + 2
    c = _bisect(more_above, *ends, lambda low, high: (low + high) / 2, steps)
    e = start - c  # ∫ |e − s| ds over 0 < s < a, by whether e − s changes sign
    crosses = (e > 0) & (e < a)
    return total(jnp.where(crosses, (e**2 + (a - e) ** 2) / 2, a * jnp.abs(e - a / 2)))


# ------------------------------------------------------------- up to a rotation of G


def _spread(lengths: Array, r: Array, p: float) -> tuple[Array, Array]:
    """min over s of ∫ |r − s|^p, for p = 1 or 2, and the s where it is taken."""
    s = total(lengths * r) if p == 2 else _median(r, lengths)
    return total(lengths * power(r - s, p)), s


@functools.partial(jax.jit, static_argnames="p")
def equal_up_to_rotation(
    u: Float[Array, " n"], v: Float[Array, " n"], p: float
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """min over s of W_p^p(µ, ν + s) and s, equal weights, p = 1 or 2, over all n shifts k:
    r_i = k/n + ρ_i − σ_{i−k} with ρ_i = u_i − i/n, σ_i = v_i − i/n of period n. For p = 2
    the variances of r come from one FFT, O(n log n), and the best eight are computed
    again without its rounding; p = 1: n medians, O(n² log n)."""
    n = u.shape[0]
    grid = jnp.arange(n) / n
    grid = grid.astype(u.dtype)
    rho, sigma = jnp.sort(u) - grid, jnp.sort(v) - grid
    even = jnp.full(n, 1 / n, u.dtype)

    def at(k, rho, sigma):
        value, s = _spread(even, rho - jnp.roll(sigma, k), p)
        return value, s + k / n

    rho0, sigma0 = _fixed((rho, sigma))
    if p == 2:
        spectrum = jnp.fft.rfft(rho0 - jnp.mean(rho0))
        spectrum *= jnp.conj(jnp.fft.rfft(sigma0 - jnp.mean(sigma0)))
        shifts = jax.lax.top_k(jnp.fft.irfft(spectrum, n), min(8, n))[1]
    else:
        shifts = jnp.arange(n)
    values = jax.lax.map(lambda k: at(k, rho0, sigma0)[0], shifts)
    return at(shifts[jnp.argmin(values)], rho, sigma)


@functools.partial(jax.jit, static_argnames="p")
def weighted_up_to_rotation(
    u: Float[Array, " n"],
    a: Float[Array, " n"],
    v: Float[Array, " m"],
    b: Float[Array, " m"],
    p: float,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The same for any weights. At the best s and α a break of F meets one of G: all
    α = A_i − B_j are tried, O(n m (n + m) log(n + m))."""
    (u, A), (v, B) = by_position(u, a), by_position(v, b)
    n, m = u.shape[0], v.shape[0]
    fixed = _fixed((u, A, v, B))

    def at(pair, u, A, v, B):
        return _spread(*_difference(u, A, v, B, A[pair // m] - B[pair % m]), p)

    values = jax.lax.map(lambda pair: at(pair, *fixed)[0], jnp.arange(n * m))
    return at(jnp.argmin(values), u, A, v, B)
