"""Tilted measures, von Mises–Fisher laws, and what attention does at large β because of them.

The weights of attention turn µ into the tilted measure ν_u ∝ e^{⟨u,y⟩} dµ(y), u = βBᵀx, whose
cumulants are the derivatives of L_µ(u) = log ∫ e^{⟨u,y⟩} dµ. For the uniform law ν_u is a
von Mises–Fisher law, and L depends on s = |u|²/2 only: with F(s) = L(u), g₀ = F', g₁ = F'',
g₂ = F''', and Sym(u⊗I)ᵢⱼₖ = uᵢδⱼₖ + uⱼδᵢₖ + uₖδᵢⱼ,

    ∇L = g₀ u,    ∇²L = g₀ I + g₁ u⊗u,    ∇³L = g₁ Sym(u⊗I) + g₂ u⊗u⊗u.

All three are smooth at u = 0, and none is a small difference of large numbers."""

import functools
import math
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .. import special, sphere
from ..checks import (
    ArrayLike,
    as_float,
    check_finite,
    check_nonnegative,
    check_scalar,
    refuse,
    shown,
)
from ..matrices import check_matrices, matmul
from ..measures import AbstractLaw, AbstractMeasure, Empirical

_nonnegative = functools.partial(
    check_nonnegative, cure="Concentrations have no sign: reverse the direction instead."
)

# --------------------------------------------------------------- tilted measures


def tilted_measure(mu: AbstractMeasure, u: ArrayLike) -> Empirical:
    """The tilted measure ν_u ∝ e^{⟨u,y⟩} dµ(y), an `Empirical` on the points of µ.

    With u = βBᵀx it is what the token x attends to, ν_x^{µ,β,B}; its mean is the barycentre
    that softmax attention returns. A weight 0 stays 0.

    **Arguments:** `mu`, an `Empirical` of n tokens; `u` (d,), of any length up to 1e6 and more:
    exponents are differences ⟨u, y − y*⟩ to the heaviest token y*. For more points `jax.vmap`.
    Cost O(nd).

    **Raises:** `ValueError` if µ is not an `Empirical` or u not a finite (d,). **Source:**
    *multiscale*, Eq. (8)."""
    return _tilted(*_measure_and_dual(mu, u))


@jax.jit
def _tilted(mu: Empirical, u: Array) -> Empirical:
    return Empirical(mu.points, _tilt(mu, u).weights, check=False)


class Cumulants(eqx.Module):
    """Derivatives 0 to 3 of L_µ(u) = log ∫ e^{⟨u,y⟩} dµ(y), that is the logarithm of the
    mass and the cumulants 1 to 3 of the tilted measure ν_u.

    - `log_partition`: L.
    - `mean` (d,): ∇L = E_ν[Y], the barycentre.
    - `covariance` (d, d): ∇²L = E_ν[(Y − EY)⊗²].
    - `third` (d, d, d): ∇³L = E_ν[(Y − EY)⊗³].
    """

    log_partition: Float[Array, ""]
    mean: Float[Array, " d"]
    covariance: Float[Array, "d d"]
    third: Float[Array, "d d d"]


def cumulants(mu: AbstractMeasure, u: ArrayLike) -> Cumulants:
    """The cumulants of the `Empirical` µ tilted by `u` (d,), as centred moments.

    Cost O(nd³) time and O(nd²) memory. **Raises:** as `tilted_measure`. **Source:** *multiscale*,
    Eqs. (8), (9)."""
    return _cumulants(*_measure_and_dual(mu, u))


@jax.jit
def _cumulants(mu: Empirical, u: Array) -> Cumulants:
    tilt = _tilt(mu, u)
    shift = matmul(tilt.weights, tilt.offsets)  # E[Y] − y*
    y = tilt.offsets - shift
    weighted = tilt.weights[:, None] * y
    pairs = (y[:, :, None] * y[:, None, :]).reshape(y.shape[0], -1)
    third = matmul(weighted.T, pairs).reshape((mu.d,) * 3)
    return Cumulants(tilt.log_partition, tilt.top + shift, matmul(weighted.T, y), third)


class _Tilt(NamedTuple):
    top: Array  # y*, the token of largest tilted weight
    offsets: Array  # y − y*
    weights: Array  # those of ν_u
    log_partition: Array


def _tilt(mu: Empirical, u: Array) -> _Tilt:
    positive = mu.weights > 0
    log_weights = jnp.log(jnp.where(positive, mu.weights, 1))
    log_weights = jnp.where(positive, log_weights, -jnp.inf)
    top = mu.points[jnp.argmax(matmul(mu.points, u) + log_weights)]
    offsets = mu.points - top
    exponents = matmul(offsets, u) + log_weights
    log_total = jax.nn.logsumexp(exponents)
    return _Tilt(top, offsets, jnp.exp(exponents - log_total), matmul(top, u) + log_total)


def _measure_and_dual(mu: AbstractMeasure, u: ArrayLike) -> tuple[Empirical, Array]:
    if not isinstance(mu, Empirical):
        raise ValueError(
            f"Argument `mu` must be an `Empirical`, but is a {type(mu).__name__}. Use "
            "`law.nodes(n)` for a law, or `vmf_cumulants` for the uniform one."
        )
    return mu, check_finite(u, "u", (mu.d,)).astype(mu.points.dtype)


# ------------------------------------------------------- von Mises–Fisher laws


class VonMisesFisherCoefficients(eqx.Module):
    """Cumulants 1 to 3 of the von Mises–Fisher law on S^{d−1} of mean direction x (a unit
    vector) and concentration κ, by symmetry

        α₁ x,    α₂ x⊗x + β₂ I,    α₃ x⊗x⊗x + β₃ Sym(x⊗I),

    where Sym(x⊗I)ᵢⱼₖ = xᵢδⱼₖ + xⱼδᵢₖ + xₖδᵢⱼ: three terms, not their mean."""

    alpha1: Float[Array, "..."]
    alpha2: Float[Array, "..."]
    beta2: Float[Array, "..."]
    alpha3: Float[Array, "..."]
    beta3: Float[Array, "..."]


def vmf_coefficients(d: int, kappa: ArrayLike) -> VonMisesFisherCoefficients:
    """The coefficients, with A = A_d(κ) = I_{d/2}(κ)/I_{d/2−1}(κ):

        α₁ = A,    β₂ = (1 − A' − A²)/(d−1) = A/κ,    α₂ = A' − β₂ = κβ₃,
        β₃ = (−A'' − 2AA')/(d−1) = (A' − A/κ)/κ,    α₃ = A'' − 3β₃.

    At κ = 0: β₂ = 1/d, the others 0. For κ → ∞: 1, −1/κ, 1/κ, 3/κ², −1/κ² to leading order.

    **Arguments:** `d` ≥ 2, an integer; `kappa` κ ≥ 0, an array. Exact to rounding for κ from 0
    to 1e6 (relative, where the coefficient does not vanish).

    **Source:** *multiscale*, Eqs. (10)–(13). (Derived: β₂ = g₀, β₃ = κg₁, α₂ = κ²g₁, α₃ = κ³g₂
    with the g of this module, which do not cancel.)"""
    return _vmf_coefficients(sphere.check_dimension(d), _nonnegative(kappa, "kappa"))


@functools.partial(jax.jit, static_argnums=0)
def _vmf_coefficients(d: int, kappa: Array) -> VonMisesFisherCoefficients:
    g0, g1, g2 = _radial_derivatives(d, kappa**2 / 2)
    return VonMisesFisherCoefficients(
        alpha1=special.mean_resultant(d, kappa),
        alpha2=kappa**2 * g1,
        beta2=g0,
        alpha3=kappa**3 * g2,
        beta3=kappa * g1,
    )


def vmf_cumulants(u: ArrayLike) -> Cumulants:
    """The `Cumulants` of the uniform law on S^{d−1} tilted by `u` (d,): those of the von
    Mises–Fisher law of mean direction u/|u| and κ = |u|, in closed form and smooth at u = 0.

    Errors are a few roundings of the largest entry of each tensor. **Source:** *multiscale*,
    Eq. (10) and Lemma D.2."""
    u = check_finite(u, "u", (None,))
    sphere.check_dimension(u.shape[0], "d = u.shape[0]")
    return _vmf_cumulants(u)


@jax.jit
def _vmf_cumulants(u: Array) -> Cumulants:
    d = u.shape[0]
    s = jnp.sum(u * u) / 2
    g0, g1, g2 = _radial_derivatives(d, s)
    eye = jnp.eye(d, dtype=u.dtype)
    ui = u[:, None, None] * eye
    symmetric = ui + jnp.swapaxes(ui, 0, 1) + jnp.moveaxis(ui, 0, 2)
    # g₂u first: u⊗u⊗u alone may overflow.
    cube = (g2 * u)[:, None, None] * (u[:, None] * u)
    return Cumulants(
        log_partition=_log_mean(d, s, sphere.safe_norm(u)),
        mean=g0 * u,
        covariance=g0 * eye + (g1 * u)[:, None] * u,
        third=g1 * symmetric + cube,
    )


def log_normaliser(d: int, beta: ArrayLike) -> Float[Array, "..."]:
    """log Z_β = log ∫ e^{β⟨x,y⟩} dσ(y) = log((2π)^{d/2} β^{1−d/2} I_{d/2−1}(β)), with σ the
    surface measure; log|S^{d−1}| at β = 0. Its derivative in β is A_d(β).

    **Arguments:** `d` ≥ 2, an integer; `beta` ≥ 0, an array. The error is relative to
    max(1, |log Z|). **Source:** *multiscale*, proof of Lemma A.6, with C_d = (2π)^{d/2}."""
    return _log_normaliser(sphere.check_dimension(d), _nonnegative(beta, "beta"))


@functools.partial(jax.jit, static_argnums=0)
def _log_normaliser(d: int, beta: Array) -> Array:
    return sphere.log_area(d) + _log_mean(d, beta**2 / 2, beta)


# ------------------------------------- the uniform law as a function of s = κ²/2

_SERIES = 40  # terms of the power series of e^L, for s ≤ 4d
_LEVELS = 28  # of the continued fraction, for κ ≤ d/2


def _log_mean(d: int, s: Array, kappa: Array) -> Array:
    """F = log ∫ e^{κ⟨x,y⟩} dσ/|S^{d−1}|, given s = κ²/2 and κ. Near 0 it is the series of
    e^F − 1 = Σ_{j≥1} (s/2)^j/(j! (d/2)_j), smooth in s and free of cancellation."""
    near = s < 4 * d
    x = jnp.where(near, s, 0) / 2

    def term(tail, factor):
        return 1 + x * factor * tail, None

    j = np.arange(_SERIES, 1, -1)
    factors = jnp.asarray(1 / (j * (d / 2 + j - 1)), s.dtype)
    tail, _ = jax.lax.scan(term, jnp.ones_like(x), factors)
    far = jnp.where(near, math.sqrt(8 * d), kappa)
    return jnp.where(
        near,
        jnp.log1p(x / (d / 2) * tail),
        far + special.log_bessel(d / 2 - 1, far),
    )


def _barycentre_factor(d: int, s: Array) -> Array:
    """g₀ = F'(s) = A_d(κ)/κ. Near 0 by the continued fraction
    1/g₀ = d + 2s/(d+2 + 2s/(d+4 + …)), a function of s with all its derivatives."""
    near = s < d * d / 8  # κ < d/2
    square = 2 * jnp.where(near, s, 0)

    def step(below, level):
        return level + square / below, None

    top = d + 2 * _LEVELS
    levels = jnp.arange(top - 2, d - 1, -2, dtype=s.dtype)
    start = jnp.full_like(s, top)
    fraction, _ = jax.lax.scan(step, start, levels)
    kappa = jnp.sqrt(2 * jnp.where(near, d * d / 8, s))
    return jnp.where(near, 1 / fraction, special.mean_resultant(d, kappa) / kappa)


def _radial_derivatives(d: int, s: Array) -> tuple[Array, Array, Array]:
    """g₀ > 0, g₁ < 0 and g₂ > 0 at s = κ²/2."""
    one = jnp.ones_like(s)

    def first(s):
        return jax.jvp(functools.partial(_barycentre_factor, d), (s,), (one,))

    (g0, _), (g1, g2) = jax.jvp(first, (s,), (one,))
    return g0, g1, g2


# ------------------------------------------------------ Laplace's method, Lemma D.1

_NODES = 1024


def log_laplace_integral(d: int, k: ArrayLike, beta: ArrayLike) -> Float[Array, "..."]:
    """log ∫ (1 − ⟨x,y⟩)^{k/2} e^{β⟨x,y⟩} dσ(y) over S^{d−1}, for any unit vector x:

        log(|S^{d−2}| 2^{k/2+d−2} B(a, b) e^β M(a, a+b, −2β)),    a = (d−1+k)/2, b = (d−1)/2,

    with Kummer's M. The error is a few roundings of max(1, |log|) for k ≤ 1000 and β from 0 to
    1e6.

    **Arguments:** `d` ≥ 2, an integer; arrays `k` > −(d−1), where the integral is finite, and
    `beta` ≥ 0, which broadcast. Differentiable in both. Cost 1024 exponentials each.

    **Source:** *multiscale*, Lemma D.1. (Derived: ⟨x,y⟩ = 1 − 2v turns it into
    ∫₀¹ v^{a−1}(1−v)^{b−1}e^{−2βv} dv, see `_log_beta_laplace`.)"""
    d = sphere.check_dimension(d)
    return _laplace_integral(d, _check_power(d, k), _nonnegative(beta, "beta"))


@functools.partial(jax.jit, static_argnums=0)
def _laplace_integral(d: int, k: Array, beta: Array) -> Array:
    b = (d - 1) / 2
    factor = sphere.log_area(d - 1) + (k / 2 + d - 2) * math.log(2)
    return beta + (factor + _log_beta_laplace(b + k / 2, b, 2 * beta))


def log_laplace_asymptotic(d: int, k: ArrayLike, beta: ArrayLike) -> Float[Array, "..."]:
    """log(|S^{d−2}| 2^{(d−3)/2} Γ(a) β^{−a} e^β) with a = (d−1+k)/2: what
    `log_laplace_integral` tends to for β → ∞: that is smaller by a(d−3)/(4β) + O(1/β²).

    **Arguments:** as there, but `beta` > 0. **Source:** *multiscale*, Lemma D.1, which has no
    constant. (Derived: (1−v)^{b−1} → 1 in the integral above.)"""
    d = sphere.check_dimension(d)
    beta = _nonnegative(beta, "beta", strict=True)
    return _laplace_asymptotic(d, _check_power(d, k), beta)


@functools.partial(jax.jit, static_argnums=0)
def _laplace_asymptotic(d: int, k: Array, beta: Array) -> Array:
    a = (d - 1 + k) / 2
    factor = sphere.log_area(d - 1) + (d - 3) / 2 * math.log(2)
    return beta + (factor + jax.scipy.special.gammaln(a) - a * jnp.log(beta))


def _log_beta_laplace(a: Array, b: float, z: Array) -> Array:
    """log J(a, b) with J(a, b) = ∫₀¹ v^{a−1}(1−v)^{b−1} e^{−zv} dv, a, b > 0, z ≥ 0.

    Integration by parts, J(a, b) = [(a+b) J(a+1, b) + z J(a+1, b+1)]/a, takes away the
    singularity at a = 0. With v = 1/(1+e^{−w}) the rest is an analytic function of w ∈ ℝ that
    decays at least like e^{−|w|/2}: the trapezoidal rule converges to rounding."""
    fixed = jax.lax.stop_gradient
    a, z = jnp.broadcast_arrays(a, z)
    p = a + 1

    def exponent(w, p, z):
        log_v, log_rest = jax.nn.log_sigmoid(w), jax.nn.log_sigmoid(-w)
        return p * log_v + b * log_rest - z * jax.nn.sigmoid(w)

    # At the peak the odds o = v/(1−v) = e^w solve b o² + (b + z − p) o − p = 0.
    m = b + z - p
    root = jnp.abs(m) + jnp.sqrt(m * m + 4 * b * p)
    odds = fixed(jnp.where(m > 0, 2 * p / root, root / (2 * b)))
    peak = jnp.log(odds)
    level = fixed(exponent(peak, p, z)) - 45  # e^{−45}: below rounding

    def end(sign, bracket):  # where the integrand has fallen to that level
        def halve(_, ends):
            inside, outside = ends
            middle = (inside + outside) / 2
            beyond = exponent(peak + sign * middle, fixed(p), fixed(z)) < level
            return jnp.where(beyond, inside, middle), jnp.where(beyond, middle, outside)

        return jax.lax.fori_loop(0, 12, halve, (jnp.zeros_like(peak), bracket))[1]

    # Beyond half of v (of 1 − v) the slope is at least p/4 (b/2).
    left = end(-1, jnp.log(2 + odds) + 180 / fixed(p))
    right = end(1, jnp.log(2 + 1 / odds) + 90 / b)
    h = (left + right) / (_NODES - 1)
    w = (peak - left)[..., None] + h[..., None] * jnp.arange(_NODES, dtype=h.dtype)
    p, z, a = p[..., None], z[..., None], a[..., None]
    logs = exponent(w, p, z) + jnp.log((a + b + z * jax.nn.sigmoid(-w)) / a)
    return jax.nn.logsumexp(logs, axis=-1) + jnp.log(h)


# ----------------------------------------------- the field at large β, term by term


def field_terms(
    x: ArrayLike,
    Q: ArrayLike,
    K: ArrayLike,
    V: ArrayLike,
    beta: ArrayLike,
    law: AbstractMeasure,
) -> tuple[Float[Array, "n d"], Float[Array, "n d"]]:
    """The terms (I) and (II) of the field χ_β[µ] of a smooth positive density µ at large β:

        (I) = A_d(κ) P_x V û,    (II) = (A_d(κ)/κ) P_x V ∇_S log µ(û),

    with u = KᵀQx, û = u/|u|, κ = β|u|. (I) = O(1) drives the alignment; (II) = O(1/β) is what
    remains where VKᵀQx is parallel to x, the heat phase. The rest of χ_β is O(1/β²).

    **Arguments:** tokens `x` (n, d); `Q`, `K`, `V`; `beta` ≥ 0, a scalar; `law` µ, one with
    a differentiable `log_density`.

    **Raises:** `ValueError` where KᵀQx is 0 or lost in rounding, so that û is not defined.
    **Source:** *multiscale*, Eq. (4), with µ evaluated at û where its text has u. (Derived: with
    µ(y) ≈ µ(û) + ⟨y − û, ∇µ(û)⟩ and ∇µ ⟂ û, the normalisation is Z µ(û), and the barycentre is
    E[Y] + E[Y⊗(Y − û)]∇log µ = Aû + β₂∇log µ under the von Mises–Fisher law, β₂ = A/κ.)"""
    Q, K, V = check_matrices(Q, K, V)
    x = sphere.check_tokens(x, "x", V.shape[0])
    beta = check_scalar(beta, "beta", minimum=0.0)
    Q, K, V, beta = (a.astype(x.dtype) for a in (Q, K, V, beta))
    if not isinstance(law, AbstractLaw) or law.d != x.shape[1]:
        raise ValueError(
            f"Argument `law` must be a law on S^{x.shape[1] - 1} with a density, but is "
            f"{type(law).__name__} with d = {getattr(law, 'd', None)}. For example "
            f"`Uniform({x.shape[1]})`."
        )
    u = matmul(matmul(x, Q.T), K)
    rounding = x.shape[1] * jnp.finfo(x.dtype).eps
    rounding = rounding * jnp.linalg.norm(Q) * jnp.linalg.norm(K)
    u = refuse(
        u,
        ~(jnp.linalg.norm(u, axis=-1) > rounding),
        "Argument `x` must have KᵀQx ≠ 0 to working precision (µ is evaluated at its "
        "direction), but a row has not. Leave such tokens out, or make QᵀK regular.",
    )
    return _field_terms(x, u, V, beta, law)


@eqx.filter_jit
def _field_terms(x, u, V, beta, law):
    d = x.shape[1]
    kappa = beta * jnp.linalg.norm(u, axis=-1)
    direction = sphere.normalise(u)

    def log_density(y):  # constant along rays: its gradient is that of the sphere
        return law.log_density(sphere.normalise(y))

    def moved(v):
        return sphere.project(x, matmul(v, V.T))

    score = jax.vmap(jax.grad(log_density))(direction)
    ratio = special.mean_resultant(d, kappa)[:, None]
    factor = _barycentre_factor(d, kappa**2 / 2)[:, None]
    return ratio * moved(direction), factor * moved(score)


# ------------------------------------------------------------------ refusals


def _check_power(d: int, k: ArrayLike) -> Array:
    k = as_float(k, "k")
    return refuse(
        k,
        ~(jnp.isfinite(k) & (k > 1 - d)),
        f"Argument `k` must be finite and > −(d−1) = {1 - d}, but is {shown(k)}. The integral "
        "diverges at y = x otherwise.",
    )
