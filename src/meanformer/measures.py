"""Probability measures on S^{d−1}: weighted tokens, and the laws of tokens at time 0.

A law samples (`sample`), has a density with respect to the surface measure
(`density`, `log_density`; the uniform law has 1/|S^{d−1}|) and gives noise-free nodes
(`nodes`): points and weights whose sums are quadratures of integrals against the law.

Sampling draws a fixed number of random numbers and never rejects. Laws that depend on
⟨m, x⟩ only are sampled by inverting the distribution function of the angle, tabulated at
construction to about 1e−12 (float64) in probability.
"""

import abc
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray
from scipy.special import roots_jacobi

from . import harmonics, special, sphere
from .checks import (
    ArrayLike,
    as_float,
    check_count,
    check_scalar,
    is_traced,
    refuse,
    shown,
)


class AbstractMeasure(eqx.Module):
    """A probability measure on S^{d−1}."""

    @property
    @abc.abstractmethod
    def d(self) -> int:
        """Dimension of the ambient space."""


class Empirical(AbstractMeasure):
    """µ = Σⱼ wⱼ δ_{yⱼ}: n weighted tokens on S^{d−1}.

    **Arguments:**

    - `points`: tokens, shape `(n, d)`, rows of norm 1.
    - `weights`: shape `(n,)`, not negative, of positive sum; only their ratios count,
        they are stored with sum 1. Default: equal. Weight 0 is allowed: such a token is
        moved by the others and moves none.

    The weights follow the dtype of the points. **Raises:** `ValueError` for points off
    the sphere or not finite, for n = 0, and for bad weights; `check=False` skips this, and
    takes weights as they are, for inner loops.
    """

    points: Float[Array, "n d"]
    weights: Float[Array, " n"]

    def __init__(
        self,
        points: ArrayLike,
        weights: ArrayLike | None = None,
        *,
        check: bool = True,
    ):
        points = sphere.check_tokens(points, "points") if check else jnp.asarray(points)
        n = points.shape[0]
        if weights is None:
            weights = jnp.full(n, 1 / n, points.dtype)
        elif check:
            weights = check_weights(weights, "weights", n).astype(points.dtype)
        self.points = points
        self.weights = jnp.asarray(weights, self.points.dtype)

    @property
    def d(self) -> int:
        return self.points.shape[1]

    @property
    def n(self) -> int:
        """Number of tokens."""
        return self.points.shape[0]

    def mean(self, values: Float[Array, "n *s"]) -> Float[Array, "*s"]:
        """Σⱼ wⱼ f(yⱼ) for given values f(yⱼ)."""
        return jnp.tensordot(self.weights, values, axes=1)


def check_weights(
    weights: ArrayLike, name: str, n: int, *, normalise: bool = True
) -> Float[Array, " n"]:
    """`weights` as n numbers ≥ 0 of positive finite sum, divided by that sum."""
    weights = as_float(weights, name)
    if weights.shape != (n,):
        raise ValueError(
            f"Argument `{name}` must have shape ({n},), one weight each, but has shape "
            f"{weights.shape}."
        )
    negative = ~(jnp.isfinite(weights) & (weights >= 0))
    found = "some weight is not"
    if not is_traced(negative) and bool(negative.any()):
        i = int(np.argmax(np.asarray(negative)))
        found = f"entry {i} is {float(weights[i]):g}"
    weights = refuse(
        weights,
        negative,
        f"Argument `{name}` must be finite and ≥ 0, but {found}. Leave out tokens that shall "
        "not count, or give them weight 0.",
    )
    total = jnp.sum(weights)
    weights = refuse(
        weights,
        ~((total > 0) & jnp.isfinite(total)),
        f"Argument `{name}` must have a positive finite sum, but it is {shown(total)}. "
        "Leave it out for equal weights.",
    )
    return weights / total if normalise else weights


class AbstractLaw(AbstractMeasure):
    """A law of tokens at time 0."""

    @abc.abstractmethod
    def sample(self, key: PRNGKeyArray, n: int) -> Float[Array, "n d"]:
        """`n` independent tokens. The same key gives the same tokens."""

    @abc.abstractmethod
    def log_density(self, x: Float[Array, "... d"]) -> Float[Array, "..."]:
        """Log-density with respect to the surface measure at unit vectors `x`."""

    def _log_density_and_floor(self, x: Array) -> tuple[Array, Array]:
        """The log-density, and the log of its absolute error: −∞ but for series."""
        log = self.log_density(x)
        return log, jnp.full_like(log, -jnp.inf)

    @abc.abstractmethod
    def nodes(self, n: int) -> Empirical:
        """About `n` weighted nodes without noise: a quadrature of the law."""

    def density(self, x: Float[Array, "... d"]) -> Float[Array, "..."]:
        """Density with respect to the surface measure at unit vectors `x`."""
        return jnp.exp(self.log_density(x))


# ----------------------------------------------------------------- the uniform law


class Uniform(AbstractLaw):
    """The uniform law on S^{d−1}, of density 1/|S^{d−1}|.

    **Arguments:** `d` ≥ 2, an integer; `dtype` of what it returns (default: jax's
    default float). `nodes(n)`: equal angles for d = 2; for d ≥ 3 a Gauss–Jacobi product
    rule of m points per polar and 2m per azimuthal axis, 2 m^{d−1} ≈ n, exact for
    polynomials of degree 2m − 1."""

    dim: int = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)

    def __init__(self, d: int, dtype: Any = None):
        self.dim = sphere.check_dimension(d)
        self.dtype = jnp.result_type(float) if dtype is None else jnp.dtype(dtype)

    @property
    def d(self) -> int:
        return self.dim

    def sample(self, key: PRNGKeyArray, n: int) -> Float[Array, "n d"]:
        n = check_count(n, "n")
        return sphere.normalise(jr.normal(key, (n, self.dim), self.dtype))

    def log_density(self, x: Float[Array, "... d"]) -> Float[Array, "..."]:
        return jnp.full(x.shape[:-1], -sphere.log_area(self.dim), x.dtype)

    def nodes(self, n: int) -> Empirical:
        n = check_count(n, "n")
        points, weights = uniform_nodes(self.dim, n)
        return Empirical(
            jnp.asarray(points, self.dtype), jnp.asarray(weights, self.dtype)
        )


def uniform_nodes(d: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Product rule on S^{d−1}, for every d ≥ 1 (S⁰ = {−1, 1})."""
    if d == 1:
        return np.array([[1.0], [-1.0]]), np.full(2, 0.5)
    if d == 2:
        theta = 2 * np.pi * (np.arange(n) + 0.5) / n
        return np.stack([np.cos(theta), np.sin(theta)], -1), np.full(n, 1 / n)
    m = max(1, round((n / 2) ** (1 / (d - 1))))
    q, w = roots_jacobi(m, (d - 3) / 2, (d - 3) / 2)
    rest, v = uniform_nodes(d - 1, max(1, round(n / m)))
    points = np.concatenate(
        [
            np.sqrt(1 - q**2)[:, None, None] * rest[None],
            np.broadcast_to(q[:, None, None], (m, len(rest), 1)),
        ],
        axis=-1,
    )
    weights = (w / w.sum())[:, None] * v[None]
    points = points.reshape(-1, d)
    return points / np.linalg.norm(points, axis=1, keepdims=True), weights.ravel()


# ------------------------------------------------------ laws around one mean direction


class AbstractZonalLaw(AbstractLaw):
    """A law whose density depends on the angle between x and `mean` only."""

    mean: eqx.AbstractVar[Float[Array, " d"]]

    @property
    def d(self) -> int:
        return self.mean.shape[0]

    @abc.abstractmethod
    def angle_quantile(self, p: Float[Array, " n"]) -> Float[Array, " n"]:
        """The angle ∈ [0, π] below which a fraction `p` of the mass lies."""

    def sample(self, key: PRNGKeyArray, n: int) -> Float[Array, "n d"]:
        n = check_count(n, "n")
        key_angle, key_direction = jr.split(key)
        angle = self.angle_quantile(jr.uniform(key_angle, (n,), self.mean.dtype))
        g = jr.normal(key_direction, (n, self.d), self.mean.dtype)
        tangent = sphere.normalise(sphere.project(self.mean, g))
        return sphere.normalise(sphere.exp(self.mean, angle[:, None] * tangent))

    def nodes(self, n: int) -> Empirical:
        """Mid-quantiles of the angle times a uniform rule for the direction."""
        n = check_count(n, "n")
        d = self.d
        # Keep the direction rule coarse: it is exact for low degrees already.
        around = 2 if d == 2 else max(2 * (d - 1), round(n ** ((d - 2) / (d - 1))))
        directions, v = uniform_nodes(d - 1, around)
        m = max(1, round(n / len(directions)))
        p = (np.arange(m) + 0.5) / m
        angle = self.angle_quantile(jnp.asarray(p, self.mean.dtype))
        basis = sphere.complement_basis(self.mean)  # (d−1, d), orthonormal to the mean
        tangent = jnp.asarray(directions, self.mean.dtype) @ basis
        points = sphere.exp(self.mean, angle[:, None, None] * tangent[None])
        weights = np.broadcast_to(v / m, (m, len(v))).ravel()
        return Empirical(
            sphere.normalise(points.reshape(-1, d)),
            jnp.asarray(weights, self.mean.dtype),
            check=False,
        )


_PANELS = 4096


def _invert_angle_law(
    log_density: Float[Array, " g"], angle: Float[Array, " g"], p: Float[Array, " n"]
) -> Float[Array, " n"]:
    """Quantiles of a law on [0, angle[-1]], given its log-density with respect to the
    angle on 2·panels + 1 equidistant nodes: Simpson's rule per panel, then the cubic
    Hermite interpolant of the distribution function is inverted by bisection."""
    f = jnp.exp(log_density - jnp.max(log_density))
    h = angle[2] - angle[0]
    mass = h / 6 * (f[:-2:2] + 4 * f[1:-1:2] + f[2::2])
    cdf = jnp.concatenate([jnp.zeros(1, f.dtype), jnp.cumsum(mass)])
    total = cdf[-1]
    level = p * total
    i = jnp.clip(jnp.searchsorted(cdf, level, side="right") - 1, 0, mass.shape[0] - 1)
    left, right = h * f[::2][i], h * f[::2][i + 1]
    jump = mass[i]
    rest = level - cdf[i]

    def cubic(s: Array) -> Array:
        return s * (
            left + s * (3 * jump - 2 * left - right + s * (left + right - 2 * jump))
        )

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        below = cubic(middle) < rest
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    steps = 50 if f.dtype == jnp.float64 else 22
    low, high = jax.lax.fori_loop(
        0, steps, halve, (jnp.zeros_like(rest), jnp.ones_like(rest))
    )
    # Bisection has no derivative. The Newton step from its root has that of the implicit
    # function; its value is left out.
    s = jax.lax.stop_gradient((low + high) / 2)
    slope = left + s * (
        6 * jump - 4 * left - 2 * right + 3 * s * (left + right - 2 * jump)
    )
    slope = jax.lax.stop_gradient(slope)
    step = jnp.where(slope > 0, (cubic(s) - rest) / jnp.where(slope > 0, slope, 1), 0)
    s = s - (step - jax.lax.stop_gradient(step))
    return jnp.clip(angle[::2][i] + h * s, 0, math.pi)


def _log_sine(angle: Array) -> Array:
    return jnp.log(jnp.maximum(jnp.sin(angle), jnp.finfo(angle.dtype).tiny))


class VonMisesFisher(AbstractZonalLaw):
    """Density e^{κ⟨m,x⟩} / ((2π)^{d/2} κ^{1−d/2} I_{d/2−1}(κ)) on S^{d−1}.

    **Arguments:** `mean` m, a unit vector `(d,)`; `kappa` κ ≥ 0, a scalar, correct from
    0 (the uniform law) to 1e6. Mean resultant length: `special.mean_resultant`."""

    mean: Float[Array, " d"]
    kappa: Float[Array, ""]

    def __init__(self, mean: ArrayLike, kappa: ArrayLike):
        self.mean = sphere.check_unit(mean, "mean")
        self.kappa = special.check_kappa(kappa).astype(self.mean.dtype)

    def log_density(self, x: Float[Array, "... d"]) -> Float[Array, "..."]:
        gap = jnp.sum((x - self.mean) ** 2, axis=-1) / 2  # 1 − ⟨m, x⟩
        log_mean = special.log_bessel(self.d / 2 - 1, self.kappa)
        return -self.kappa * gap - log_mean - sphere.log_area(self.d)

    def angle_quantile(self, p: Float[Array, " n"]) -> Float[Array, " n"]:
        kappa, d = self.kappa, self.d
        if d == 3:  # closed form: 1 − q = −log(1 − p(1 − e^{−2κ}))/κ
            small = kappa < jnp.finfo(kappa.dtype).eps
            safe = jnp.where(small, 1, kappa)
            gap = -jnp.log1p(p * jnp.expm1(-2 * safe)) / safe
            gap = jnp.clip(jnp.where(small, 2 * p * (1 - kappa * (1 - p)), gap), 0, 2)
            return 2 * jnp.arcsin(jnp.sqrt(gap / 2))
        # 1 − q is below a Gamma((d−1)/2, 1/κ) variable: its far quantile ends the table.
        shape = (d - 1) / 2
        far = (shape + 10 * math.sqrt(shape) + 40) / jnp.where(kappa > 0, kappa, 1e-9)
        end = 2 * jnp.arcsin(jnp.sqrt(jnp.clip(far / 2, 0, 1)))
        end = jax.lax.stop_gradient(end)  # the table's size is no parameter of the law
        angle = end * jnp.linspace(0, 1, 2 * _PANELS + 1, dtype=kappa.dtype)
        log_density = -2 * kappa * jnp.sin(angle / 2) ** 2
        if d > 2:
            log_density = log_density + (d - 2) * _log_sine(angle)
        return _invert_angle_law(log_density, angle, p)


class WrappedNormal(AbstractZonalLaw):
    """exp_m(σ g) for a standard normal tangent vector g at m: the wrapped normal law.

    Density Σ_k (r_k/sin θ)^{d−2} (2πσ²)^{−(d−1)/2} e^{−r_k²/2σ²} with r_k = |θ + 2πk| and θ
    the angle to m. On S¹ it is the heat kernel of variance σ² (heat time σ²/2).

    **Arguments:** `mean` m, a unit vector `(d,)`; `sigma` σ > 0, the standard deviation
    per tangent direction, in radians. **Source:** *multiscale*, Figure 2 (d = 2)."""

    mean: Float[Array, " d"]
    sigma: Float[Array, ""]

    def __init__(self, mean: ArrayLike, sigma: ArrayLike):
        self.mean = sphere.check_unit(mean, "mean")
        sigma = check_scalar(sigma, "sigma", minimum=0.0, strict=True)
        self.sigma = sigma.astype(self.mean.dtype)

    def sample(self, key: PRNGKeyArray, n: int) -> Float[Array, "n d"]:
        n = check_count(n, "n")
        g = jr.normal(key, (n, self.d), self.mean.dtype)
        v = self.sigma * sphere.project(self.mean, g)
        return sphere.normalise(sphere.exp(self.mean, v))

    def log_density(self, x: Float[Array, "... d"]) -> Float[Array, "..."]:
        theta = sphere.distance(x, self.mean)
        if self.d == 2:
            return log_wrapped_normal(theta, self.sigma**2)
        return _log_wrapped_images(theta, self.sigma**2, self.d)

    def angle_quantile(self, p: Float[Array, " n"]) -> Float[Array, " n"]:
        """For d = 2, of the angle before it is wrapped (which may exceed π)."""
        if self.d == 2:
            return self.sigma * jax.scipy.special.ndtri((1 + p) / 2)
        end = jnp.minimum(math.pi, 12 * self.sigma * math.sqrt(self.d))
        end = jax.lax.stop_gradient(end)  # the table's size is no parameter of the law
        angle = end * jnp.linspace(0, 1, 2 * _PANELS + 1, dtype=p.dtype)
        log_density = _log_wrapped_images(angle, self.sigma**2, self.d)
        return _invert_angle_law(log_density + (self.d - 2) * _log_sine(angle), angle, p)


def log_wrapped_normal(
    theta: Float[Array, "..."], variance: ArrayLike
) -> Float[Array, "..."]:
    """Log-density of the normal law of the given variance wrapped on S¹, at angle θ.

    Images for variance < 2, Fourier modes above: every term kept is significant, so that
    the logarithm is exact to rounding in the tails too. It is the heat kernel of S¹ at
    heat time variance/2."""
    variance = jnp.asarray(variance, theta.dtype)
    narrow = variance < 2
    v = jnp.where(narrow, variance, 1)
    k = jnp.arange(-3, 4, dtype=theta.dtype)
    wrapped = theta - 2 * jnp.pi * jnp.round(theta / (2 * jnp.pi))
    images = (wrapped[..., None] + 2 * jnp.pi * k) ** 2 / (-2 * v)[..., None]
    log_narrow = jax.nn.logsumexp(images, axis=-1) - 0.5 * jnp.log(2 * jnp.pi * v)
    v = jnp.where(narrow, 2, variance)
    j = jnp.arange(1, 7, dtype=theta.dtype)
    waves = jnp.exp(-(j**2) * v[..., None] / 2) * jnp.cos(j * theta[..., None])
    log_wide = jnp.log1p(2 * jnp.sum(waves, axis=-1)) - math.log(2 * math.pi)
    return jnp.where(narrow, log_narrow, log_wide)


def _log_wrapped_images(theta: Array, variance: Array, d: int) -> Array:
    sine = jnp.maximum(jnp.sin(theta), jnp.finfo(theta.dtype).tiny ** 0.25)
    reach = 8  # images up to r = 16π: exact for σ ≤ 6
    k = jnp.arange(-reach, reach + 1, dtype=theta.dtype)
    r = jnp.abs(theta[..., None] + 2 * jnp.pi * k)
    # The k = 0 factor θ/sin θ is 1 at θ = 0.
    near = jnp.where(theta > 0, theta / sine, 1)
    factor = jnp.where(k == 0, near[..., None], r / sine[..., None])
    factor = jnp.maximum(factor, jnp.finfo(theta.dtype).tiny)
    terms = (d - 2) * jnp.log(factor) - r**2 / (2 * variance)
    scale = (d - 1) / 2 * jnp.log(2 * jnp.pi * variance)
    return jax.nn.logsumexp(terms, axis=-1) - scale


class HeatKernel(AbstractZonalLaw):
    """e^{sΔ} δ_m, Brownian motion on S^{d−1} started at m, at heat time s: variance 2s per
    tangent direction for small s. The papers' N_{S^{d−1}}(m, s).

    **Arguments:** `mean` m, a unit vector `(d,)`; `s` > 0, the heat time. For d = 2 all is
    exact to rounding. For d ≥ 3 the density is the Gegenbauer series
    Σ_l dim_l e^{−l(l+d−2)s} P_l(⟨m,x⟩)/|S^{d−1}|, cut off at rounding: its error is ≤ 1e−13
    of the peak, so `density` is absolute and `log_density` refuses points where the density
    is lost in that error. s ≥ 1e−5 for d ≥ 3. **Source:** *multiscale*, Eq. (7)."""

    mean: Float[Array, " d"]
    s: Float[Array, ""]
    degrees: int = eqx.field(static=True)

    def __init__(self, mean: ArrayLike, s: ArrayLike):
        self.mean = sphere.check_unit(mean, "mean")
        d = self.mean.shape[0]
        s = check_scalar(s, "s", minimum=0.0 if d == 2 else 1e-5, strict=d == 2)
        self.s = s.astype(self.mean.dtype)
        least = 1e-5 if is_traced(s) else float(s)
        # e^{−l²s} dim_l is below rounding from here on.
        self.degrees = 2 + math.ceil(math.sqrt((40 + 4 * d) / least)) if d > 2 else 0

    def density(self, x: Float[Array, "... d"]) -> Float[Array, "..."]:
        if self.d == 2:
            return jnp.exp(self.log_density(x))
        return jnp.maximum(self._series(x @ self.mean), 0)

    def log_density(self, x: Float[Array, "... d"]) -> Float[Array, "..."]:
        if self.d == 2:
            return log_wrapped_normal(sphere.distance(x, self.mean), 2 * self.s)
        log, floor = self._log_density_and_floor(x)
        return refuse(
            log,
            log < floor,
            "Argument `x` must lie where the density of `HeatKernel` exceeds the rounding "
            "of its series, but a point lies so far from the mean that its log-density is "
            "lost. Use `density`, whose absolute error is small there.",
        )

    def _log_density_and_floor(self, x: Array) -> tuple[Array, Array]:
        if self.d == 2:
            log = self.log_density(x)
            return log, jnp.full_like(log, -jnp.inf)
        value = self._series(x @ self.mean)
        floor = 1e3 * jnp.finfo(value.dtype).eps * self._series(jnp.ones_like(value))
        good = value >= floor
        return (
            jnp.where(good, jnp.log(jnp.where(good, value, 1)), -jnp.inf),
            jnp.log(floor),
        )

    def angle_quantile(self, p: Float[Array, " n"]) -> Float[Array, " n"]:
        if self.d == 2:
            return jnp.sqrt(2 * self.s) * jax.scipy.special.ndtri((1 + p) / 2)
        # Curvature only shortens the path: θ is below √(2s) times a chi variable with d − 1
        # degrees of freedom. Beyond its far quantile there is noise of the series only.
        reach = (math.sqrt(self.d - 1) + 8) * jnp.sqrt(2 * self.s)
        end = jnp.minimum(math.pi, reach)
        end = jax.lax.stop_gradient(end)  # the table's size is no parameter of the law
        angle = end * jnp.linspace(0, 1, 2 * _PANELS + 1, dtype=p.dtype)
        value = self._series(jnp.cos(angle))
        tiny = jnp.finfo(p.dtype).tiny
        log_density = jnp.log(jnp.maximum(value, tiny))
        return _invert_angle_law(log_density + (self.d - 2) * _log_sine(angle), angle, p)

    def _series(self, q: Array) -> Array:
        d, s = self.d, self.s
        l = np.arange(self.degrees)
        # Numbers of harmonics overflow float32 where e^{−l²s} underflows: add logarithms.
        log_dims = np.log(harmonics.harmonic_dimension(d, self.degrees) / sphere.area(d))
        exponent = (
            jnp.asarray(log_dims, q.dtype) - jnp.asarray(l * (l + d - 2), q.dtype) * s
        )
        return harmonics.gegenbauer_sum(d, jnp.exp(exponent), q)


# --------------------------------------------------------------- composed laws


class Mixture(AbstractLaw):
    """Σⱼ αⱼ µⱼ for laws µⱼ on one sphere and weights αⱼ ≥ 0 (stored with sum 1)."""

    components: tuple[AbstractLaw, ...]
    weights: Float[Array, " m"]

    def __init__(self, components, weights: ArrayLike | None = None):
        if isinstance(components, AbstractLaw):
            raise ValueError(
                "Argument `components` must be a list of laws, but is one law. Use [law]."
            )
        components = tuple(components)
        if not components:
            raise ValueError(
                "Argument `components` must hold at least one law, not none."
            )
        dims = [c.d for c in components]
        if len(set(dims)) > 1:
            raise ValueError(
                f"Argument `components` must be laws on one sphere, but they have d = {dims}."
            )
        m = len(components)
        self.components = components
        self.weights = check_weights(
            jnp.ones(m) if weights is None else weights, "weights", m
        )

    @property
    def d(self) -> int:
        return self.components[0].d

    def sample(self, key: PRNGKeyArray, n: int) -> Float[Array, "n d"]:
        n = check_count(n, "n")
        key_choice, *keys = jr.split(key, len(self.components) + 1)
        choice = jr.choice(key_choice, len(keys), (n,), p=self.weights)
        draws = jnp.stack([c.sample(k, n) for c, k in zip(self.components, keys)])
        return jnp.take_along_axis(draws, choice[None, :, None], axis=0)[0]

    def log_density(self, x: Float[Array, "... d"]) -> Float[Array, "..."]:
        log, floor = self._log_density_and_floor(x)
        return refuse(
            log,
            log < floor,
            "Argument `x` must lie where the density of `Mixture` exceeds the rounding of "
            "its components, but a point lies where its log-density is lost. Use `density`, "
            "whose absolute error is small there.",
        )

    def _log_density_and_floor(self, x: Array) -> tuple[Array, Array]:
        parts = [c._log_density_and_floor(x) for c in self.components]
        logs, floors = (jnp.stack(p, axis=-1) for p in zip(*parts))
        weights = self.weights.astype(x.dtype)
        lost = jnp.where(jnp.isneginf(logs), floors, -jnp.inf)  # what was left out
        total = jax.nn.logsumexp(logs, axis=-1, b=weights)
        return total, jax.nn.logsumexp(lost, axis=-1, b=weights)

    def density(self, x: Float[Array, "... d"]) -> Float[Array, "..."]:
        values = jnp.stack([c.density(x) for c in self.components], axis=-1)
        return values @ self.weights.astype(x.dtype)

    def nodes(self, n: int) -> Empirical:
        """Nodes of each component, in numbers proportional to the weights."""
        n = check_count(n, "n")
        if is_traced(self.weights):
            raise ValueError(
                "Argument `weights` must have known values where nodes are made, because "
                "they decide how many each component gets. Make the mixture outside of `jit`."
            )
        share = [float(w) for w in self.weights]
        parts = [
            (w, c.nodes(max(1, round(w * n))))
            for w, c in zip(share, self.components)
            if w > 0
        ]
        return Empirical(
            jnp.concatenate([part.points for _, part in parts]),
            jnp.concatenate([w * part.weights for w, part in parts]),
            check=False,
        )


class AzimuthElevation(AbstractLaw):
    """x = (cos ψ cos θ, cos ψ sin θ, sin ψ) on S²: azimuth θ from a law on S¹, elevation ψ
    independent and uniform on [−π/2, π/2]. Not uniform in area: density g(θ)/(π cos ψ).

    **Arguments:** `azimuth`, a law with d = 2. **Source:** *multiscale*, scenario 2a."""

    azimuth: AbstractLaw

    def __init__(self, azimuth: AbstractLaw):
        if not isinstance(azimuth, AbstractLaw) or azimuth.d != 2:
            found = getattr(azimuth, "d", azimuth)
            raise ValueError(
                f"Argument `azimuth` must be a law on S¹ (d = 2), but has d = {found}. For "
                "example `WrappedNormal([1.0, 0.0], 0.2)`."
            )
        self.azimuth = azimuth

    @property
    def d(self) -> int:
        return 3

    def sample(self, key: PRNGKeyArray, n: int) -> Float[Array, "n d"]:
        key_azimuth, key_elevation = jr.split(key)
        ring = self.azimuth.sample(key_azimuth, n)
        half = math.pi / 2
        psi = jr.uniform(key_elevation, (n, 1), ring.dtype, -half, half)
        return sphere.normalise(jnp.concatenate([jnp.cos(psi) * ring, jnp.sin(psi)], 1))

    def log_density(self, x: Float[Array, "... d"]) -> Float[Array, "..."]:
        radius = sphere.safe_norm(x[..., :2])  # cos ψ
        safe = jnp.maximum(radius, jnp.finfo(x.dtype).tiny)
        # At a pole the azimuth is not defined: any will do, the density is infinite.
        east = jnp.asarray([1.0, 0.0], x.dtype)
        ring = jnp.where(radius[..., None] > 0, x[..., :2] / safe[..., None], east)
        return self.azimuth.log_density(ring) - jnp.log(math.pi * safe)

    def nodes(self, n: int) -> Empirical:
        """A product: mid-point rule in the elevation, nodes of the azimuth."""
        n = check_count(n, "n")
        rows = max(1, round(math.sqrt(n / 2)))
        ring = self.azimuth.nodes(max(1, round(n / rows)))
        psi = math.pi * ((np.arange(rows) + 0.5) / rows - 0.5)
        psi = jnp.asarray(psi, ring.points.dtype)[:, None, None]
        flat = jnp.cos(psi) * ring.points[None]
        height = jnp.broadcast_to(jnp.sin(psi), (rows, ring.n, 1))
        points = jnp.concatenate([flat, height], -1).reshape(-1, 3)
        weights = jnp.tile(ring.weights / rows, rows)
        return Empirical(sphere.normalise(points), weights, check=False)
