"""Distances of µ to a reference: Wasserstein, and total variation to the uniform law."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .. import sphere
from ..attention import check_measure
from ..checks import ArrayLike, as_float, check_count, refuse, shown
from ..measures import AbstractMeasure, Empirical
from ..transport import wasserstein


class Wasserstein(eqx.Module):
    """`wasserstein(mu, reference, …)` as an observable, a dict of its `value`, `error` and
    `converged`: `Wasserstein(reference, p, cost, method)(mu)`.

    **Arguments:** `reference`, an `Empirical` or tokens of equal weight (leaves), or
    `Uniform(2)`; `equal_weights`, a promise, checked at run time, that lets exact plans be
    assignments (inside of a run weights cannot be read); `options` of `wasserstein`, handed on.
    **Raises:** as `wasserstein`, when it is called."""

    reference: AbstractMeasure
    p: float = eqx.field(static=True)
    cost: str = eqx.field(static=True)
    method: str = eqx.field(static=True)
    equal_weights: bool = eqx.field(static=True)
    options: dict[str, Any]

    def __init__(
        self,
        reference: Any,
        p: Any = 2.0,
        cost: str = "geodesic",
        method: str = "auto",
        *,
        equal_weights: bool = False,
        **options: Any,
    ):
        is_measure = isinstance(reference, AbstractMeasure)
        self.reference = reference if is_measure else Empirical(reference)
        self.p = float(p) if isinstance(p, int) else p
        self.cost, self.method = cost, method
        self.equal_weights, self.options = equal_weights, options

    def __call__(self, mu: Empirical) -> dict[str, Array]:
        a = check_measure(mu)
        b = jax.tree.map(lambda leaf: leaf.astype(a.points.dtype), self.reference)
        if self.equal_weights:
            a, b = (_without_weights(m) for m in (a, b))
        distance = wasserstein(a, b, self.p, self.cost, self.method, **self.options)
        return {name: getattr(distance, name) for name in ("value", "error", "converged")}


def _without_weights(mu: AbstractMeasure) -> Any:
    if not isinstance(mu, Empirical):
        return mu
    slack = 8 * jnp.finfo(mu.weights.dtype).eps / mu.n
    return refuse(
        mu.points,
        ~(jnp.abs(mu.weights - 1 / mu.n) <= slack),
        "Argument `equal_weights` must be false for measures whose weights differ. Leave it "
        "out.",
    )


# ---------------------------------------------------------------------- histograms


def angle_histogram(
    mu: Empirical, bins: int = 100
) -> tuple[Float[Array, " bins"], Float[Array, " edges"]]:
    """Mass of µ in `bins` equal bins of the azimuth on [−π, π), and the bin edges.

    The masses sum to 1; divide by the bin width for a density. On S¹ the azimuth is the
    angle; on S² that of the first two coordinates."""
    bins = check_count(bins, "bins")
    mu = check_measure(mu)
    cell = _azimuth_cell(mu.points, bins)
    mass = jnp.zeros(bins, mu.weights.dtype).at[cell].add(mu.weights)
    return mass, jnp.linspace(-math.pi, math.pi, bins + 1, dtype=mu.points.dtype)


def _azimuth_cell(x: Array, bins: int) -> Array:
    theta = sphere.angles(x)
    theta = jnp.where(theta >= math.pi, -math.pi, theta)  # π is −π
    cell = jnp.floor((theta + math.pi) * (bins / (2 * math.pi))).astype(int)
    return jnp.minimum(cell, bins - 1)


def equal_area_histogram(
    mu: Empirical, bands: int = 10, sectors: int = 20
) -> Float[Array, "bands sectors"]:
    """Mass of µ on S² in cells of one area: `bands` equal intervals of x₃ ∈ [−1, 1] (from the
    south up) times `sectors` of the azimuth on [−π, π). (Archimedes: x₃ of the uniform law is
    uniform.)"""
    bands, sectors = check_count(bands, "bands"), check_count(sectors, "sectors")
    mu = check_measure(mu)
    if mu.d != 3:
        raise ValueError(
            f"Argument `mu` must be a measure on S² (d = 3), but has d = {mu.d}. On S¹ use "
            "`angle_histogram`."
        )
    band = jnp.floor((mu.points[:, 2] + 1) * (bands / 2)).astype(int)
    band = jnp.clip(band, 0, bands - 1)
    cell = band, _azimuth_cell(mu.points, sectors)
    return jnp.zeros((bands, sectors), mu.weights.dtype).at[cell].add(mu.weights)


# ------------------------------------------------------------------ total variation

# ψ(z) = (a − bz²)e^{−z²/2}, with E ψ(Z) = E|Z| and ∫ψ = ∫(E|Z+δ| − |δ|)dδ = 1, Z normal.
_A = (8 - math.sqrt(2)) / (2 * math.sqrt(math.pi))
_B = (4 - math.sqrt(2)) / math.sqrt(math.pi)


def _psi(z: Array) -> Array:
    return (_A - _B * z**2) * jnp.exp(-(z**2) / 2)


def _null_means(n: Array, cells: int) -> tuple[Array, Array]:
    """E|z| and E ψ(z) of z = (N − n/c)/√(n(1 − 1/c)/c) for N binomial (n, 1/c), c = `cells`."""
    p = 1 / cells
    mean = n * p
    k = jnp.arange(192, dtype=n.dtype)  # holds all of a mean ≤ 64, to rounding
    odds = jnp.maximum(n - k[:-1], 0) / (k[:-1] + 1) * (p / (1 - p))
    log_odds = jnp.log(jnp.maximum(odds, jnp.finfo(n.dtype).tiny))
    steps = jnp.concatenate([n[None] * math.log1p(-p), log_odds])
    mass = jnp.exp(jnp.cumsum(steps))
    z = (k - mean) / jnp.sqrt(mean * (1 - p))
    normal = math.sqrt(2 / math.pi)
    few = mean <= 64
    return (
        jnp.where(few, jnp.sum(mass * jnp.abs(z)), normal),
        jnp.where(few, jnp.sum(mass * _psi(z)), normal),
    )


def total_variation_noise(n: ArrayLike, cells: int) -> Float[Array, ""]:
    """Mean total variation between the uniform law and the histogram of n independent uniform
    tokens in `cells` cells of one measure c⁻¹: ½ c E|N/n − 1/c| with N binomial (n, 1/c),
    ≈ √((c − 1)/(2πn)): for c = 100 cells 0.124 for n = 1000, 0.031 for n = 16000.

    **Arguments:** `n` ≥ 1, also an effective number 1/Σw² of weighted tokens; `cells` ≥ 2. The
    binomial sum up to n/c = 64, its normal limit (error < 0.2 %) above. **Source:** *metastable*,
    Fig. 3, which stops runs at a threshold of this distance; derived."""
    n = as_float(n, "n")
    n = refuse(
        n,
        ~(jnp.isfinite(n) & (n >= 1)),
        f"Argument `n` must be finite and ≥ 1, but is {shown(n)}.",
    )
    cells = check_count(cells, "cells", 2)
    n = n.astype(jnp.result_type(n, float))
    return math.sqrt(cells - 1) / 2 * _null_means(n, cells)[0] / jnp.sqrt(n)


class TotalVariation(eqx.Module):
    """`total_variation` as an observable: `TotalVariation(bins, debias)(mu)`."""

    bins: int | tuple[int, int] = eqx.field(static=True)
    debias: bool = eqx.field(static=True)

    def __init__(self, bins: int | tuple[int, int] = 100, debias: bool = True):
        if isinstance(bins, tuple):
            if len(bins) != 2 or bins == (1, 1):
                raise ValueError(
                    "Argument `bins` must be a number, or a pair (bands, sectors) with more "
                    f"than one cell, but is {bins!r}. For example (10, 20)."
                )
            self.bins = check_count(bins[0], "bins[0]"), check_count(bins[1], "bins[1]")
        else:
            self.bins = check_count(bins, "bins", 2)
        self.debias = debias

    def __call__(self, mu: Empirical) -> Float[Array, ""]:
        mu = check_measure(mu)
        return _total_variation(mu, self.bins, self.debias)


@eqx.filter_jit
def _total_variation(mu: Empirical, bins: Any, debias: bool) -> Array:
    mass = _cell_masses(mu, bins)
    cells = mass.shape[0]
    offset = mass - 1 / cells
    raw = jnp.sum(jnp.abs(offset)) / 2
    if not debias:
        return raw
    n = 1 / jnp.sum(mu.weights**2)
    sigma = math.sqrt(cells - 1) / cells / jnp.sqrt(n)
    noise, fitted = _null_means(n, cells)
    return raw - sigma / 2 * noise / fitted * jnp.sum(_psi(offset / sigma))


def _cell_masses(mu: Empirical, bins: int | tuple[int, int]) -> Float[Array, " cells"]:
    if mu.d == 2 and isinstance(bins, int):
        return angle_histogram(mu, bins)[0]
    if mu.d == 3:
        if isinstance(bins, int):
            bands = max(1, round(math.sqrt(bins / 2)))
            bins = bands, 2 * bands
        return equal_area_histogram(mu, *bins).ravel()
    raise ValueError(
        f"Argument `mu` must be a measure on S¹ (with a number `bins`) or S², but has d = "
        f"{mu.d} and `bins` is {bins!r}."
    )


def total_variation(
    mu: Empirical, bins: int | tuple[int, int] = 100, debias: bool = True
) -> Float[Array, ""]:
    """Total variation ½Σ_j|m_j − 1/c| between µ and the uniform law, both in c cells of one
    measure, without the bias that sampling gives it (`total_variation_noise`).

    m_j is the mass in cell j, σ = √((1/c)(1 − 1/c)Σw²) the standard deviation of m_j for
    independent uniform tokens, z_j = (m_j − 1/c)/σ. With `debias` the value is

        ½Σ_j (|m_j − 1/c| − σ s ψ(z_j)),    ψ(z) = (a − bz²)e^{−z²/2},

    a = (8−√2)/√(4π), b = (4−√2)/√π, and s (≈ 1) such that its mean is 0 for n = 1/Σw²
    independent uniform tokens. For other laws its bias is exponentially small where all
    |m_j − 1/c| ≫ σ; a cell within ±5σ of uniform adds at most 0.31σ/2, of either sign, and these
    sum to 0 over a density that passes through the uniform one smoothly (to first order in σ).
    A mean of 0 needs values below 0; for tokens more regular than independent ones, down to
    −2.3 times the noise for a lattice.

    **Arguments:** `bins`: on S¹ their number; on S² (bands, sectors) of
    `equal_area_histogram`, or their approximate product. Weights must not depend on the
    positions: a cell's mass must have the mean 1/c. Differentiable in the weights only
    (positions count by cell). O(n). **Source:** *metastable*, Fig. 3; the estimator is derived
    (a two-term solution of ψ∗φ ≈ E|Z+δ| − |δ|, φ the normal density)."""
    return TotalVariation(bins, debias)(mu)
