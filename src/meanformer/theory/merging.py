"""Many clusters that merge pair by pair (V = QᵀK = I): the closest pair, the limit β → ∞ and
its window of validity, and the predicted sequence of all merges down to one cluster."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .. import sphere
from ..checks import ArrayLike, check_entries, check_scalar, refuse, shown
from ..measures import check_weights
from .pairing import (
    MASS_RATIO,
    NO_MASS,
    along,
    balance,
    limit_angle,
    log_merge_time,
    meeting_point,
    share_of_way,
)


class ClosestPair(eqx.Module):
    """The closest two of m clusters.

    - `pair` (2,): their indices, the smaller first.
    - `angle`: between them.
    - `second` (2,), `second_angle`: the next closest pair (m = 2: none, ∞).
    - `gap`: α = second_angle − angle ≥ 0, the α of *multiscale*, Lemma C.1.
    """

    pair: Int[Array, " 2"]
    angle: Float[Array, ""]
    second: Int[Array, " 2"]
    second_angle: Float[Array, ""]

    @property
    def gap(self) -> Float[Array, ""]:
        return self.second_angle - self.angle


def closest_pair(x: ArrayLike) -> ClosestPair:
    """The pair of clusters that merges first for β → ∞, and how unique it is.

    **Arguments:** positions `x` (m, d) of m ≥ 2 clusters. Of pairs at one angle the first
    in lexicographic order is taken, and the gap is 0 up to rounding. O(m² d) time and
    memory. **Raises:** `ValueError` for m = 1. **Source:** *multiscale*, Sec. 3.4."""
    return _closest(_check_clusters(x, 2))


@jax.jit
def _closest(x: Array) -> ClosestPair:
    i, j = np.triu_indices(x.shape[0], 1)
    angles = sphere.distance(x[i], x[j])
    pairs = jnp.asarray(np.stack([i, j], 1))
    first = jnp.argmin(angles)
    others = jnp.where(jnp.arange(i.size) == first, jnp.inf, angles)
    second = jnp.argmin(others)
    return ClosestPair(pairs[first], angles[first], pairs[second], others[second])


def pairing_limit(
    x: ArrayLike, s: ArrayLike, weights: ArrayLike | None = None
) -> Float[Array, "m d"]:
    """Positions of m clusters at rescaled time s in the limit β → ∞: the closest pair (i, j)
    moves along its geodesic (`pairing_limit_angle`), the others rest:

        ẏ_i = (α_j/α_i) P_{y_i} y_j,   ẏ_j = (α_i/α_j) P_{y_j} y_i,   dt = e^{β(1−⟨y_i,y_j⟩)} ds.

    **Arguments:** `x` (m, d); a scalar `s` ≥ 0; `weights` (m,) > 0 (default: equal).
    **Raises:** `ValueError` if the closest pair is not unique (gap α ≤ 16 roundings) or
    antipodal. **Source:** *multiscale*, Prop. 3.11 and C.3, for equal weights; the factors
    α_j/α_i are derived (`pair_speed`)."""
    x = _check_clusters(x, 2)
    weights = _check_masses(weights, x)
    near = _check_unique(closest_pair(x))
    s = check_scalar(s, "s", minimum=0.0).astype(x.dtype)
    near = refuse(
        near,
        ~((near.angle > 0) & (near.angle < math.pi * (1 - 1e-7))),
        "Argument `x` must hold clusters that are neither coincident nor antipodal, but the "
        f"closest pair is at the angle {shown(near.angle)}. Merge coincident clusters first.",
    )
    angle = near.angle
    return _limit(x, s, weights, near.pair, angle)


@jax.jit
def _limit(x: Array, s: Array, weights: Array, pair: Array, angle: Array) -> Array:
    i, j = pair
    ratio = weights[i] / weights[j]
    travelled = angle - limit_angle(angle, s, balance(ratio))
    way = share_of_way(jnp.zeros_like(ratio), ratio, balance(ratio)) * travelled
    x_i = along(x[i], x[j], angle, way)
    x_j = along(x[j], x[i], angle, travelled - way)
    return x.at[i].set(x_i).at[j].set(x_j)


class PairingWindow(eqx.Module):
    """How long the closest pair is sure to remain the closest (`pairing_window`).

    - `level`: 1 − cos(α/4), the proven lower bound of d_t − m_t.
    - `constant`: C.
    - `log_time`: log of the largest rescaled time T of validity.
    """

    level: Float[Array, ""]
    constant: Float[Array, ""]
    log_time: Float[Array, ""]


def pairing_window(
    x: ArrayLike, beta: ArrayLike, weights: ArrayLike | None = None
) -> PairingWindow:
    """Lemma C.1 with its constant: with d_t = ⟨x_i, x_j⟩ of the pair that is closest at time
    0, m_t = max ⟨x_k, x_l⟩ over all other pairs and α = arccos m₀ − arccos d₀ > 0,

        d_t − m_t ≥ 1 − cos(α/4)  on [0, T],  if  C e^{−β(1−cos(α/4))} T ≤ α/2,

    t the rescaled time, dt = e^{−β(1−⟨x_i,x_j⟩)} d(time). For weights α_k with sum 1,

        C = R_i + R_j + max(max(R_i, R_j) + max_k R_k, max_{k≠l} (R_k + R_l)),

    k, l other than i, j; R_k = (1 − α_k)/α_k; R_i = (1 − α_i − α_j)/α_i, R_j likewise
    (m ≥ 4 equal weights: C = 4m − 6). (Derived, the paper leaves C open: the pull of l on k
    is at most (α_l/α_k)e^{β(⟨x_k,x_l⟩ − d_t)} ≤ (α_l/α_k)e^{β(m_t − d_t)} in rescaled time;
    so every other angle shrinks, against that of (i, j), by at most C e^{β(m_t − d_t)} per
    unit of time.)

    **Arguments:** positions `x` (m, d) of m ≥ 3 clusters; a scalar `beta` ≥ 0; `weights`
    (m,) > 0 (default: equal). **Raises:** `ValueError` for a gap of 0 (≤ 16 roundings).
    **Source:** *multiscale*, Lemma C.1."""
    x = _check_clusters(x, 3)
    weights = _check_masses(weights, x)
    beta = check_scalar(beta, "beta", minimum=0.0).astype(x.dtype)
    return _window(x, weights, beta, _check_unique(closest_pair(x)))


@jax.jit
def _window(x: Array, weights: Array, beta: Array, near: ClosestPair) -> PairingWindow:
    own = (1 - jnp.sum(weights[near.pair])) / weights[near.pair]
    free = ~jnp.isin(jnp.arange(x.shape[0]), near.pair)
    outer = jnp.sort(jnp.where(free, (1 - weights) / weights, 0))
    pulls = jnp.maximum(jnp.max(own) + outer[-1], outer[-1] + outer[-2])
    constant = jnp.sum(own) + pulls
    level = 2 * jnp.sin(near.gap / 8) ** 2
    log_time = jnp.log(near.gap / (2 * constant)) + beta * level
    return PairingWindow(level, constant, log_time)


# ------------------------------------------------------------------ all merges


class MergeSequence(eqx.Module):
    """The m − 1 merges of m clusters, in the order in which they happen.

    - `pairs` (m−1, 2): indices of the merging clusters, the smaller first; 0 … m−1 are the
        clusters at the start, m + k the one that merge k makes (as in the linkage matrices
        of `scipy.cluster.hierarchy`).
    - `angles` (m−1,): between the two when they began to approach each other.
    - `log_waits` (m−1,): log of the time since the merge before (−∞: at once).
    - `log_times` (m−1,): log of the time since the start.
    - `points` (m−1, d), `masses` (m−1,): of the clusters that the merges make.
    """

    pairs: Int[Array, "k 2"]
    angles: Float[Array, " k"]
    log_waits: Float[Array, " k"]
    log_times: Float[Array, " k"]
    points: Float[Array, "k d"]
    masses: Float[Array, " k"]


def merge_sequence(
    x: ArrayLike,
    weights: ArrayLike | None,
    beta: ArrayLike,
    contact: ArrayLike = 1e-3,
) -> MergeSequence:
    """The predicted merges of m weighted clusters under (SA) with V = QᵀK = I.

    Each two clusters approach each other as if they were alone, from where they are when
    the younger of them comes to be; the clocks of all pairs run side by side. The pair that
    is first at the angle `contact` merges into one cluster of mass a + c at
    `merge_point`, and so on. For equal masses the first is the closest pair.

    Neglected is the pull of third clusters: the others rest while a pair merges (their
    clocks go on). In time e^{β(1−cos φ)}, that of the pair, they move by O(e^{−β(cos φ − m)})
    with m the next largest ⟨x_k, x_l⟩, and log T of a later merge changes by β sin φ times
    that. A new cluster starts its clocks at contact, which puts its next merge late by at
    most the time of the one before. So for β(cos φ − m) ≫ 1 at each merge, order and places
    are right and times too, to leading order (four clusters at β = 15, angles from 0.7:
    places to 0.001, log T to 0.11). Nearly tied pairs (differences of log T below 1) may
    merge in another order; where angles are ≲ 1/√β nothing is separated, and neither is the
    prediction good; take `contact` ≈ 0.1/√β if times are not long compared with 1.

    **Arguments:** positions `x` (m, d) of m ≥ 2 clusters; `weights` (m,) > 0 or None
    (equal); scalars `beta` ≥ 0 and 0 < `contact` < π/2, the angle at which clusters count
    as one (clusters closer than that merge at once, and log T = −∞).

    Works under `jit`, `vmap` (over seeds, β) and `grad` (the order held fixed; in reverse
    O(m³) memory). O(m³) time for the bookkeeping plus 2m² integrals (m = 100: about 1 s);
    O(m²) memory. **Raises:** `ValueError` (traced:
    at run time) for arguments out of range, and if all clusters left are antipodal.
    **Source:** *multiscale*, Sec. 3.4, "the sequential merging of the closest token
    clusters"; the times are derived (`merge_time`)."""
    x = _check_clusters(x, 2)
    weights = _check_masses(weights, x)
    beta = check_scalar(beta, "beta", minimum=0.0).astype(x.dtype)
    contact = check_scalar(contact, "contact", minimum=0.0, strict=True).astype(x.dtype)
    contact = check_entries(
        contact, contact < math.pi / 2, "contact", "be below π/2", "Give a small angle."
    )
    merges = all_merges(x, weights, beta, contact)
    return refuse(
        merges,
        jnp.isposinf(merges.log_times),
        "Argument `x` must hold clusters that attract each other, but some two that are left "
        "in the end are antipodal and rest for ever. Move one of them.",
    )


@jax.jit
def all_merges(x: Array, weights: Array, beta: Array, contact: Array) -> MergeSequence:
    m, d = x.shape
    indices = jnp.arange(2 * m - 1)
    points = jnp.zeros((2 * m - 1, d), x.dtype).at[:m].set(x).at[m:, 0].set(1)
    masses = jnp.ones(2 * m - 1, x.dtype).at[:m].set(weights)

    def times_alone(i, points, masses):  # log times in which i meets each of the others
        angle = sphere.distance(points[i], points)
        apart = angle > contact
        moving = apart & (angle < jnp.asarray(math.pi, x.dtype))
        safe = jnp.where(moving, angle, (contact + math.pi) / 2)
        time = log_merge_time(safe, contact, beta, balance(masses[i] / masses))
        return jnp.where(moving, time, jnp.where(apart, jnp.inf, -jnp.inf))

    def first_times(i):  # each pair once, at its smaller and its larger index
        return jnp.where(indices[:m] > i, times_alone(i, x, weights), jnp.inf)

    def merge(state, new):
        points, masses, times, alive, now = state
        i, j = jnp.unravel_index(jnp.argmin(times), times.shape)
        then = times[i, j]
        angle = sphere.distance(points[i], points[j])
        point = meeting_point(points[i], points[j], contact, beta, masses[i] / masses[j])
        mass = masses[i] + masses[j]
        points, masses = points.at[new].set(point), masses.at[new].set(mass)
        gone = (indices == i) | (indices == j)
        alive = alive & ~gone
        column = jnp.logaddexp(then, times_alone(new, points, masses))
        times = times.at[:, new].set(jnp.where(alive, column, jnp.inf))
        times = jnp.where(gone[:, None] | gone, jnp.inf, times)
        merged = jnp.stack([i, j]), angle, _log_difference(then, now), then, point, mass
        return (points, masses, times, alive.at[new].set(True), then), merged

    times = jnp.full((2 * m - 1, 2 * m - 1), jnp.inf, x.dtype)
    times = times.at[:m, :m].set(jax.lax.map(first_times, indices[:m]))
    start = (points, masses, times, indices < m, jnp.asarray(-jnp.inf, x.dtype))
    return MergeSequence(*jax.lax.scan(merge, start, indices[m:])[1])


def _log_difference(later: Array, earlier: Array) -> Array:
    """log(e^later − e^earlier), −∞ where they agree."""
    differ = later > earlier
    gap = jnp.where(differ & jnp.isfinite(later), later - earlier, 1)
    return jnp.where(differ, later + jnp.log(-jnp.expm1(-gap)), -jnp.inf)


# ------------------------------------------------------------------ arguments


def _check_clusters(x: ArrayLike, least: int) -> Float[Array, "m d"]:
    x = sphere.check_tokens(x, "x")
    if x.shape[0] < least:
        raise ValueError(
            f"Argument `x` must hold at least {least} clusters, but holds {x.shape[0]}."
        )
    return x


def _check_masses(weights: ArrayLike | None, x: Array) -> Float[Array, " m"]:
    """The masses of the clusters `x`, all positive, with sum 1."""
    m = x.shape[0]
    if weights is None:
        return jnp.full(m, 1 / m, x.dtype)
    weights = check_weights(weights, "weights", m).astype(x.dtype)
    return check_entries(
        weights,
        weights * MASS_RATIO >= jnp.max(weights),
        "weights",
        f"be > 0 and within a factor {MASS_RATIO:g} of each other",
        NO_MASS,
    )


def _check_unique(near: ClosestPair) -> ClosestPair:
    gap = near.gap
    return refuse(
        near,
        ~(gap > 16 * jnp.finfo(gap.dtype).eps),
        "Argument `x` must have a unique closest pair, but the gap to the second closest is "
        f"{shown(gap)}. Tied pairs move at the same time: see `merge_sequence`.",
    )
