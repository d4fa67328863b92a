"""From attention to diffusion: the fields to which β χ_β and (USA) tend for β → ∞, and by how
much they miss them at finite β.

QᵀK = I, V = sign·I, and a smooth positive law µ. Attention sees µ through the smoothed density
W_β*µ, W_β(q) = e^{βq}/∫e^{βq}dσ, whose multipliers on degree l are I_{l+d/2−1}(β)/I_{d/2−1}(β):

    β χ_β[µ] = sign·∇log(W_β*µ)  →  sign·∇log µ                      (SA: heat equation)
    (1/Z_β) ∫ P_x y e^{β⟨x,y⟩}dµ  = sign·∇(W_β*µ)  →  sign·∇µ        (USA: porous medium)

with Z_β = (1/β)∫e^{β⟨x,y⟩}dσ. Nothing here is simulated: W_β*µ is a sum of zonal series."""

import functools
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .. import harmonics, sphere
from ..checks import (
    ArrayLike,
    as_float,
    check_count,
    check_scalar,
    is_traced,
    refuse,
    shown,
)
from ..matrices import matmul
from ..measures import AbstractLaw, Empirical, Uniform
from .heat import HeatMixture, check_sign, log_smoothing_multipliers
from .tilted import log_normaliser

# ------------------------------------------------------------------ the limits


def rescaled_field_limit(x: ArrayLike, law: Any, sign: int) -> Float[Array, "n d"]:
    """sign·∇µ/µ at unit vectors x, the limit of β χ_β[µ] for QᵀK = I, V = sign·I, β → ∞.

    **Arguments:** `x` (n, d); `law`, any law with a positive differentiable density.
    The error at finite β is `rescaled_field_correction`/β + O(β⁻²), not the O(β^{−1/2}) of the
    paper. **Source:** *multiscale*, Lemma B.1 and Cor. B.2; the factor β is missing in the
    proof of its Prop. 3.9, where χ_β = ∇(W_β*µ)/(W_β*µ) is written."""
    x, law = _check_point_and_law(x, law)
    x = refuse(
        x,
        ~jnp.isfinite(law.log_density(x)),
        "Argument `x` must lie where the density of `law` is positive and resolved, but a "
        "point does not. Stay nearer to its mass.",
    )
    return check_sign(sign) * _gradient(x, law, log=True)


def porous_medium_velocity(x: ArrayLike, law: Any, sign: int) -> Float[Array, "n d"]:
    """sign·∇µ at unit vectors x, the limit for β → ∞ of the velocity of (USA), QᵀK = I,
    V = sign·I, normalised by Z_β = (1/β)∫e^{β⟨x,y⟩}dσ(y). Tokens then obey

        ∂_t µ = −sign·div(µ∇µ) = −sign·½Δ(µ²),

    with the factor ½ that the paper's Remark 3.10 lacks. Velocities of (USA) itself are
    e^{log_usa_speed(β, d)} times as large. (Derived: P_x y e^{β⟨x,y⟩} = ∇e^{β⟨x,y⟩}/β, so
    that the velocity is sign·∇(W_β*µ).) **Source:** *multiscale*, Remark 3.10."""
    x, law = _check_point_and_law(x, law)
    return check_sign(sign) * _gradient(x, law, log=False)


@functools.partial(jax.jit, static_argnames="log")
def _gradient(x: Array, law: AbstractLaw, log: bool) -> Array:
    f = law.log_density if log else law.density
    return jax.vmap(jax.grad(lambda z: f(sphere.normalise(z))))(x)


def log_usa_speed(beta: ArrayLike, d: int) -> Float[Array, "..."]:
    """log Z_β, Z_β = (1/β)∫e^{β⟨x,y⟩}dσ(y) = (2π)^{d/2} β^{−d/2} I_{d/2−1}(β): how much faster
    (USA) moves than `porous_medium_velocity`. β > 0. **Source:** *multiscale*, Rem. 3.10."""
    beta = as_float(beta, "beta")
    beta = refuse(
        beta, ~(beta > 0), f"Argument `beta` must be > 0, but is {shown(beta)}."
    )
    return log_normaliser(d, beta) - jnp.log(beta)


def barenblatt_density(
    r: ArrayLike, t: ArrayLike, mass: ArrayLike, dim: int
) -> Float[Array, "..."]:
    """Barenblatt's solution of ∂_t u = ½Δ(u²) on R^dim, from a point mass at r = 0:

        u = t^{−n/(n+2)} (C − ξ²/(2(n+2)))₊,    ξ = r t^{−1/(n+2)},    n = dim.

    It is how a narrow cluster of (USA) with V = −I spreads while it is small on the sphere:
    tokens end at a front ξ² = 2(n+2)C, unlike in the heat flow. C is set by the mass: on the
    line, 3·mass = 4C√(6C).

    **Arguments:** `r` ≥ 0, distance to the centre, and `t` > 0, time in units of
    `porous_medium_velocity`, broadcast; `mass` > 0; `dim` = d − 1 on the tangent plane.
    (Derived: u = t^{−n/(n+2)}F(ξ) turns ∂_t u = div(u∇u) into F∇F = −ξF/(n+2).)"""
    n = check_count(dim, "dim")
    mass = check_scalar(mass, "mass", minimum=0.0, strict=True)
    r, t = as_float(r, "r"), as_float(t, "t")
    t = refuse(
        t,
        ~(t > 0),
        f"Argument `t` must be > 0, but is {shown(t)}. At t = 0 all mass is at one point.",
    )
    # ∫(C − ξ²/2(n+2))₊ = C (2(n+2)C)^{n/2} |B_n| 2/(n+2), |B_n| the volume of the unit ball.
    log_ball = n / 2 * math.log(math.pi) - math.lgamma(n / 2 + 1)
    rest = math.log((n + 2) / 2) - log_ball - n / 2 * math.log(2 * n + 4)
    C = jnp.exp(2 / (n + 2) * (jnp.log(mass) + rest))
    scale = t ** (-1 / (n + 2))
    return scale**n * jnp.maximum(C - (r * scale) ** 2 / (2 * n + 4), 0)


# ------------------------------------------------------------------ at finite β


def rescaled_field(
    x: ArrayLike,
    law: Any,
    beta: ArrayLike,
    sign: int,
    *,
    degrees: int | None = None,
) -> Float[Array, "n d"]:
    """β χ_β[µ](x) = sign·∇log(W_β*µ)(x), exactly, at finite β > 0 (QᵀK = I, V = sign·I).

    On a perturbation ε of degree 1 of the uniform law it is A_d(β)·sign·∇ε, the exact form of
    the prefactor in Lemma B.1: A_d(β) = (1 − A' − A²)β/(d−1).

    **Arguments:**

    - `x` (n, d), unit vectors; `law`, a `HeatMixture` (any d) or any law.
    - `degrees`: how many degrees of harmonics are summed. Needed for laws that are no
        `HeatMixture`, which are expanded by quadrature on 2·degrees^{d−1} nodes (d = 2, 3), and
        under `jit`.

    **Raises:** `ValueError` if the series misses the law's density (`degrees` too small), or
    where the density at a point is lost in the rounding of the series.
    **Source:** *multiscale*, proof of Prop. 3.9, with its missing factor β."""
    gamma, x, series = _expand(x, law, sign, degrees)
    return gamma * _field(x, series, _check_beta(beta))


def rescaled_field_correction(
    x: ArrayLike,
    law: Any,
    sign: int,
    *,
    degrees: int | None = None,
) -> Float[Array, "n d"]:
    """c = sign·½∇(Δµ/µ), the leading error: β χ_β[µ] = sign·∇log µ + c/β + O(β⁻²).

    Arguments as `rescaled_field`. The paper's Lemma B.1 bounds the error by O(β^{−1/2}).
    (Derived: the multipliers of W_β are 1 − l(l+d−2)/(2β) + O(β⁻²), hence
    W_β*µ = µ + Δµ/(2β) + O(β⁻²).)"""
    gamma, x, series = _expand(x, law, sign, degrees)
    return gamma * _correction(x, series)


def heat_residual(
    x: ArrayLike,
    law: Any,
    beta: ArrayLike,
    sign: int,
    *,
    degrees: int | None = None,
) -> Float[Array, " n"]:
    """R_β[µ] = div(µ(β χ_β[µ] − sign·∇log µ)) = div(µ β χ_β[µ]) − sign·Δµ at unit vectors x.

    A solution µ of the heat equation ∂_s µ = −sign·Δµ solves the mean-field equation in
    rescaled time up to it: ∂_s µ = −div(µ β χ_β[µ]) + R_β. It is O(1/β) for smooth positive
    µ, R_β ≈ div(µc)/β with c of `rescaled_field_correction`; computed without cancellation, so
    that R_β is exact to about ε·degrees² of its size, and βε. Arguments as `rescaled_field`.
    **Source:** *multiscale*, Prop. 3.9."""
    gamma, x, series = _expand(x, law, sign, degrees)
    return gamma * _residual(x, series, _check_beta(beta))


@jax.jit
def _field(x: Array, series: "_Series", beta: Array) -> Array:
    log = log_smoothing_multipliers(series.degrees, beta, series.d)
    value, slope = series(x, jnp.exp(log))
    return slope / value[:, None]


@jax.jit
def _correction(x: Array, series: "_Series") -> Array:
    l = series.eigenvalues
    values, slopes = series.all(x, jnp.stack([jnp.ones_like(l), -l]))
    (mu, laplace), (mu_slope, laplace_slope) = values, slopes
    ratio = (laplace / mu)[:, None]
    return 0.5 * (laplace_slope - ratio * mu_slope) / mu[:, None]


@jax.jit
def _residual(x: Array, series: "_Series", beta: Array) -> Array:
    # With w = W_β*µ − µ and r = w/µ: div(µ∇log(1 + r)), in terms that are all O(w).
    l = series.eigenvalues
    gain = jnp.expm1(log_smoothing_multipliers(series.degrees, beta, series.d))
    gains = jnp.stack([jnp.ones_like(l), gain, -l, -l * gain])
    (mu, w, laplace_mu, laplace_w), (mu_slope, w_slope, *_) = series.all(x, gains)
    r = w / mu
    r_slope = (w_slope - r[:, None] * mu_slope) / mu[:, None]
    mixed = jnp.sum(r_slope * mu_slope, axis=-1)
    square = jnp.sum(r_slope * r_slope, axis=-1)
    return (laplace_w - r * laplace_mu - mixed) / (1 + r) - mu * square / (1 + r) ** 2


# ------------------------------------------------------------------ zonal series


class _Series(eqx.Module):
    """µ(x) = Σⱼ Σ_l c_jl P_l(⟨x, mⱼ⟩), P_l(1) = 1: a sum of zonal functions."""

    means: Float[Array, "m d"]
    coefficients: Float[Array, "m l"]

    @property
    def d(self) -> int:
        return self.means.shape[1]

    @property
    def degrees(self) -> int:
        return self.coefficients.shape[1]

    @property
    def eigenvalues(self) -> Float[Array, " l"]:
        """l(l+d−2), those of −Δ."""
        l = np.arange(self.degrees)
        return jnp.asarray(l * (l + self.d - 2.0), self.means.dtype)

    def __call__(self, x: Float[Array, "n d"], gain: Float[Array, " l"]):
        """Value (n,) and gradient (n, d) on the sphere of the function whose harmonics of
        degree l are `gain`[l] times those of µ."""

        def zonal(q):  # (n, m)
            sum_one = functools.partial(harmonics.gegenbauer_sum, self.d)
            return jax.vmap(sum_one, (0, 1), 1)(self.coefficients * gain, q)

        q = jnp.matmul(x, self.means.T, precision=jax.lax.Precision.HIGHEST)
        value, slope = jax.jvp(zonal, (q,), (jnp.ones_like(q),))
        return jnp.sum(value, axis=1), sphere.project(x, matmul(slope, self.means))

    def all(self, x: Float[Array, "n d"], gains: Float[Array, "g l"]):
        """The same for several gains at once, along a new first axis."""
        return jax.vmap(self, (None, 0))(x, gains)


def _expand(
    x: ArrayLike, law: Any, sign: int, degrees: int | None
) -> tuple[float, Array, _Series]:
    gamma = check_sign(sign)
    if degrees is None:
        degrees = _enough_degrees(law)
    degrees = check_count(degrees, "degrees", 2)
    if isinstance(law, HeatMixture):
        x = sphere.check_tokens(x, "x", law.d)
        series = _mixture_series(law, degrees)
        missed, lost = _check_series(x, series, None)
    else:
        _check_law(law)
        x = sphere.check_tokens(x, "x", law.d)
        # Exact for polynomials of degree 2·degrees − 1.
        nodes = Uniform(law.d, x.dtype).nodes(2 * degrees ** (law.d - 1))
        series = _law_series(law, nodes, degrees)
        missed, lost = _check_series(x, series, law)
    x = refuse(
        x,
        lost,
        "Argument `x` must lie where the density exceeds the rounding of its series, but a "
        "point does not. Take points nearer to the means, or larger `s`.",
    )
    x = refuse(
        x,
        missed,
        f"Argument `degrees` must resolve the density of the law, but {degrees} degrees miss "
        "it by more than √ε of its value at a point. Give more, or keep to points of more mass.",
    )
    return gamma, x, series


def _enough_degrees(law: object) -> int:
    if not isinstance(law, HeatMixture):
        raise ValueError(
            "Argument `degrees` must be given for a law that is no `HeatMixture`: how many "
            "degrees of harmonics resolve its density. Start with 64."
        )
    if is_traced(law.s):
        raise ValueError(
            "Argument `degrees` must be given under `jit`, because shapes depend on it. "
            "2 + √((40 + 4d)/s) reaches rounding for the smallest `s`."
        )
    return 2 + math.ceil(math.sqrt((40 + 4 * law.d) / float(jnp.min(law.s))))


@functools.partial(jax.jit, static_argnames="degrees")
def _mixture_series(mixture: HeatMixture, degrees: int) -> _Series:
    series = _Series(mixture.means, jnp.zeros((len(mixture.s), degrees), mixture.s.dtype))
    # Numbers of harmonics overflow float32 where e^{−l²s} underflows: add logarithms.
    log_dims = np.log(
        harmonics.harmonic_dimension(mixture.d, degrees) / sphere.area(mixture.d)
    )
    logs = (
        jnp.asarray(log_dims, mixture.s.dtype) - series.eigenvalues * mixture.s[:, None]
    )
    return _Series(mixture.means, mixture.weights[:, None] * jnp.exp(logs))


@functools.partial(jax.jit, static_argnames="degrees")
def _law_series(law: AbstractLaw, nodes: Empirical, degrees: int) -> _Series:
    dims = harmonics.harmonic_dimension(law.d, degrees)  # over the area, times the area
    values = nodes.weights * law.density(nodes.points)
    return _Series(nodes.points, values[:, None] * jnp.asarray(dims, values.dtype))


@jax.jit
def _check_series(x: Array, series: _Series, law: AbstractLaw | None):
    """Whether the series misses the density of the law, or is lost in its rounding."""
    value, _ = series(x, jnp.ones(series.degrees, x.dtype))
    exact = value if law is None else law.density(x)
    eps = float(jnp.finfo(value.dtype).eps)
    peak = jnp.max(jnp.sum(jnp.abs(series.coefficients), axis=1))
    missed = ~(jnp.abs(value - exact) <= math.sqrt(eps) * exact)
    return jnp.any(missed), jnp.any(~(value > 1e3 * eps * peak))


def _check_beta(beta: ArrayLike) -> Float[Array, ""]:
    return check_scalar(beta, "beta", minimum=0.0, strict=True)


def _check_law(law: object) -> None:
    if not isinstance(law, AbstractLaw):
        raise ValueError(
            "Argument `law` must be a law such as `VonMisesFisher` or a `HeatMixture`, but is "
            f"a {type(law).__name__}. Tokens have no density."
        )


def _check_point_and_law(x: ArrayLike, law: Any) -> tuple[Array, AbstractLaw]:
    law = law.law() if isinstance(law, HeatMixture) else law
    _check_law(law)
    return sphere.check_tokens(x, "x", law.d), law
