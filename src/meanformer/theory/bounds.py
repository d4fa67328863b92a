"""Inequalities with explicit constants: how fast and how rough the field of attention can
be, how far it is from its zero-temperature limit, and how far the two flows can part.

Conventions: B = QᵀK, u = βBᵀx, κ = |u|, v = u/|u|; ν is µ tilted by e^{⟨u,y⟩}, m its
barycentre, so that χ_β[µ](x) = P_x V m; σ₁, σ_d are the largest and smallest singular values
of B and ‖·‖ that of V. Distances on the sphere are geodesic. Constants of *concentration* are
lost in its text and those of *multiscale* implicit: all were derived anew. Bounds are
differentiable once in Q, K, V (singular values), and in the other arguments.
"""

import functools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .. import special, sphere
from ..checks import ArrayLike, as_float, check_scalar, refuse, shown
from ..matrices import check_invertible, check_matrices, matmul
from ..measures import (
    AbstractMeasure,
    Empirical,
    HeatKernel,
    Uniform,
    VonMisesFisher,
)


def norms(Q, K, V, invertible: bool = False) -> tuple[Array, Array, Array, int]:
    """‖V‖, σ₁, σ_d and the dimension d."""
    Q, K, V = check_matrices(Q, K, V)
    if invertible:
        Q, K = check_invertible(Q, K)
    return *_singular_values(Q, K, V), V.shape[0]


@jax.jit
def _singular_values(Q: Array, K: Array, V: Array) -> tuple[Array, Array, Array]:
    singular = jnp.linalg.svd(matmul(Q.T, K), compute_uv=False)
    return jnp.linalg.svd(V, compute_uv=False)[0], singular[0], singular[-1]


def peak(a: Array, c: int) -> Array:
    """max of a(1−s²) + cs over 0 ≤ s ≤ 1, for a, c ≥ 0."""
    inside = 2 * a > c
    safe = jnp.where(inside, a, 1)
    return jnp.where(inside, safe + c * c / (4 * safe), c)


# ---------------------------------------------------------------- the field and its slopes


class FieldBounds(eqx.Module):
    """Suprema over the sphere, for the field χ of attention:

    - `speed` ≥ |χ(x)|.
    - `slope` ≥ |Dχ(x)ξ| for every unit tangent vector ξ: the Lipschitz constant of χ in x,
        with respect to the geodesic distance.
    - `curvature` ≥ |d²χ(γ(s))/ds²| along every great circle γ of unit speed.
    """

    speed: Float[Array, ""]
    slope: Float[Array, ""]
    curvature: Float[Array, ""]


def field_bounds(
    Q: ArrayLike,
    K: ArrayLike,
    V: ArrayLike,
    beta: ArrayLike,
    *,
    ratio: ArrayLike | None = None,
) -> FieldBounds:
    """Bounds on χ_β[µ] = P_x V m and its first two derivatives, with b = βσ₁:

        speed      ‖V‖
        slope      ‖V‖ max_s(b(1−s²) + s)            = ‖V‖(b + 1/4b)   for b ≥ 1/2
        curvature  ‖V‖(4b²/3√3 + max_s(3b(1−s²) + 2s))

    They hold for *every* probability measure µ, discrete ones included, and so grow with β.

    **Arguments:** Q, K, V; `beta` ≥ 0; `ratio` = max µ/min µ ≥ 1 of a density, if there is
    one (QᵀK must then be invertible). It bounds the slope uniformly in β:

        slope      ‖V‖(ratio·(σ₁/σ_d)·A_d(βσ_d) + 1),

    and the smaller slope is returned. No such bound on the curvature follows from the ratio
    alone (a density with a jump has one of order √β).

    (Derived: with F = Vm, Dχξ = P_xV Cov(ν)βBᵀξ − (⟨x,F⟩ξ + ⟨ξ,F⟩x), where the bracket has
    norm ≤ |F|; the trace of Cov(ν) is 1 − |m|². On a great circle χ'' = P_xF'' − 2(γ'γᵀ +
    γγ'ᵀ)F' + 2(γγᵀ − γ'γ'ᵀ)F, with F'' of the third cumulant, a symmetric form, so that its
    norm is a third central moment on [−1, 1], at most 4/3√3. With the ratio ρ, dν ≤ ρ dν_σ for
    the uniform law σ, hence Cov(ν) ≤ ρ Cov(ν_σ) ≤ ρA_d(κ)/κ.)
    **Source:** *multiscale*, Lemma A.5; for the ratio Prop. A.8, whose bound has
    ‖∇µ‖/(√β min µ) instead."""
    norm, top, least, d = norms(Q, K, V, invertible=ratio is not None)
    beta = check_scalar(beta, "beta", minimum=0.0).astype(norm.dtype)
    if ratio is not None:
        ratio = check_scalar(ratio, "ratio", minimum=1.0, cure="It is max µ/min µ.")
        ratio = ratio.astype(norm.dtype)
    return _field_bounds(d, norm, top, least, beta, ratio)


@functools.partial(jax.jit, static_argnames="d")
def _field_bounds(d, norm, top, least, beta, ratio):
    b = beta * top
    slope = peak(b, 1)
    if ratio is not None:
        spread = ratio * top / least * special.mean_resultant(d, beta * least)
        slope = jnp.minimum(slope, spread + 1)
    third = 4 / (3 * math.sqrt(3)) * b**2
    return FieldBounds(norm, norm * slope, norm * (third + peak(3 * b, 2)))


def zero_temperature_lipschitz(
    Q: ArrayLike, K: ArrayLike, V: ArrayLike
) -> Float[Array, ""]:
    """L = ‖V‖(1 + σ₁/σ_d): the Lipschitz constant of χ_∞(x) = P_xV Bᵀx/|Bᵀx| in the geodesic
    distance, attained for V = diag(1, −1), B = diag(σ₁, σ_d).

    Two solutions of the zero-temperature flow part at most like e^{Lt}, in geodesic and in
    chord length (the chord c = 2 sin(φ/2) obeys c' = cos(φ/2)φ' ≤ Lφ cos(φ/2) ≤ Lc).
    **Raises:** `ValueError` for singular QᵀK. (Derived: Dχ_∞ξ = P_xV P_vBᵀξ/|Bᵀx| −
    (⟨x,Vv⟩ξ + ⟨ξ,Vv⟩x).) **Source:** *concentration*, Eq. (25), where it is twice as large:
    ‖V‖(2 + 2σ₁/σ_d), as reconstructed."""
    norm, top, least, _ = norms(Q, K, V, invertible=True)
    return norm * (1 + top / least)


# ------------------------------------------------------------------------------- Dobrushin


class DobrushinConstants(eqx.Module):
    """Lipschitz constants of the field χ_β[µ](x) of (SA):

    - `slope`: in x, as in `FieldBounds`.
    - `log_measure`: log L_µ, where |χ[µ](x) − χ[ν](x)| ≤ L_µ W₁(µ, ν).
    - `log_rate`: log L, L = slope + L_µ, where W₁(µ_t, ν_t) ≤ e^{Lt} W₁(µ₀, ν₀).

    W₁ is taken with the geodesic distance. With chords, it is at most π/2 times smaller."""

    slope: Float[Array, "..."]
    log_measure: Float[Array, "..."]
    log_rate: Float[Array, "..."]


def dobrushin_constants(
    Q: ArrayLike, K: ArrayLike, V: ArrayLike, beta: ArrayLike
) -> DobrushinConstants:
    """Stability of (SA) in the law of the tokens, for all measures, with b = βσ₁:

        L_µ = ‖V‖ max_φ e^{b(1 + cos φ)} (1 + 2b sin φ),   about 2‖V‖√(b/e) e^{2b} for large b.

    The exponential cannot be avoided: a grain of mass near v, when all other tokens lie at
    −v, decides where m is. Logarithms, because L overflows from b = 350 on. β ≥ 0.

    (Derived: on the segment from µ to ν the barycentre changes by ∫g d(ν−µ), g(y) =
    e^{⟨u,y⟩}(y − m)/Z, hence by at most W₁ sup|Dg|; |Dg| ≤ (1 + κ sin φ·|y−m|)
    e^{κ cos φ}/Z with φ the angle of y and v, Z ≥ e^{−κ} and |y − m| ≤ 2. For the rate,
    follow an optimal coupling: its cost obeys D' ≤ slope·D + L_µ W₁ ≤ L·D.)
    **Source:** *multiscale*, Lemma 3.1 and Cor. 3.3 (constant not given)."""
    norm, top, _, _ = norms(Q, K, V)
    beta = check_scalar(beta, "beta", minimum=0.0).astype(norm.dtype)
    return dobrushin_of_norms(norm, beta * top)


@jax.jit
def dobrushin_of_norms(norm: Array, b: Array) -> DobrushinConstants:
    # The stationary point of b(1 + cos φ) + log(1 + 2b sin φ) is the zero on [0, π/2] of
    # the increasing function sin φ(1 + 2b sin φ) − 2cos φ: bisection.
    fixed = jax.lax.stop_gradient(b)

    def halve(_, ends):
        low, high = ends
        phi = (low + high) / 2
        left = jnp.sin(phi) * (1 + 2 * fixed * jnp.sin(phi)) < 2 * jnp.cos(phi)
        return jnp.where(left, phi, low), jnp.where(left, high, phi)

    ends = (jnp.zeros_like(b), jnp.full_like(b, math.pi / 2))
    phi = jax.lax.fori_loop(0, 50, halve, ends)[0]
    log_slope = b * (1 + jnp.cos(phi)) + jnp.log1p(2 * b * jnp.sin(phi))
    log_measure = jnp.log(norm) + log_slope
    slope = norm * peak(b, 1)
    return DobrushinConstants(
        slope, log_measure, jnp.logaddexp(jnp.log(slope), log_measure)
    )


def log_dobrushin_bound(
    t: ArrayLike,
    distance: ArrayLike,
    Q: ArrayLike,
    K: ArrayLike,
    V: ArrayLike,
    beta: ArrayLike,
) -> Float[Array, "..."]:
    """log of the bound W₁(µ_t, ν_t) ≤ W₁(µ₀, ν₀)e^{Lt} ≤ π for two solutions of (SA), with L
    of `dobrushin_constants`: min(log `distance` + Lt, log π).

    **Arguments:** times `t` ≥ 0, any shape; `distance` = W₁(µ₀, ν₀) > 0, geodesic.
    **Source:** *multiscale*, Lemma 3.1."""
    t = as_float(t, "t")
    t = refuse(t, ~(t >= 0), f"Argument `t` must be ≥ 0, but is {shown(t)}.")
    distance = check_scalar(distance, "distance", minimum=0.0, strict=True)
    log_rate = dobrushin_constants(Q, K, V, beta).log_rate
    ceiling = math.log(math.pi)
    # Where the growth overflows, the bound is π.
    rate = jnp.exp(jnp.minimum(log_rate, jnp.log(jnp.finfo(log_rate.dtype).max) / 2))
    return jnp.minimum(jnp.log(distance) + rate * t, ceiling)


# ----------------------------------------------------------- the Laplace principle, C10


_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)


def cap_mass(d: int, angle: ArrayLike) -> Float[Array, "..."]:
    """Uniform probability of the cap of S^{d−1} within `angle` ∈ [0, π] of a point:

        |S^{d−2}|/|S^{d−1}| ∫₀^angle sin^{d−2}φ dφ;   angle/π for d = 2, sin²(angle/2) for d = 3,

    by a Gauss rule, to about d/4 roundings for d ≤ 200. The angle is not checked."""
    d = sphere.check_dimension(d)
    return _cap_mass(d, as_float(angle, "angle"))


@functools.partial(jax.jit, static_argnames="d")
def _cap_mass(d: int, angle: Array) -> Array:
    nodes = jnp.asarray((1 + _NODES) / 2, angle.dtype)
    weights = jnp.asarray(_WEIGHTS / 2, angle.dtype)
    around = math.exp(math.lgamma(d / 2) - math.lgamma((d - 1) / 2)) / math.sqrt(math.pi)
    large = 2 * angle > math.pi  # more than half: one minus the opposite cap
    near = jnp.where(large, math.pi - angle, angle)
    mass = around * near * (jnp.sin(near[..., None] * nodes) ** (d - 2) @ weights)
    return jnp.where(large, 1 - mass, mass)


def laplace_principle_bound(
    x: ArrayLike,
    mu: AbstractMeasure | ArrayLike,
    Q: ArrayLike,
    K: ArrayLike,
    beta: ArrayLike,
    r: ArrayLike | None = None,
    q: ArrayLike | None = None,
) -> Float[Array, " n"]:
    """The quantitative Laplace principle: with f(y) = |Bᵀx| − ⟨x,By⟩ = ½|Bᵀx||y − v|²,

        |m_β(x) − v| ≤ √(2(r+q)/|Bᵀx|) + 2e^{−βq}/µ({f ≤ r})    for all r ≥ 0, q > 0,

    and ≤ 2 in any case. For each token, the least such bound over r and q that are not given.

    **Arguments:** `x` (n, d); `mu`, an `Empirical` (masses of caps are counted), a law (with
    `density_range`), or a number > 0: a lower bound of a density, whose caps have at least
    that times their area; Q, K; `beta` > 0; `r` ≥ 0 and `q` > 0, scalars in units of f.

    The best q is closed-form: z = 2β(r+q) is the larger root of z − log z = 2βr +
    log(4β|Bᵀx|/µ²), Lambert's W₋₁. Only values f(y) count for the best r of an `Empirical`;
    for a density, 65 values around (d−1)/2β. Cost O(n·points·log(points)).

    (Proof: |m − v| ≤ ∫|y−v|dν. Where f ≤ r+q, |y−v| is at most the first term; elsewhere it is
    at most 2, and ν({f > r+q}) ≤ e^{−β(r+q)}/∫e^{−βf}dµ ≤ e^{−βq}/µ({f ≤ r}).)
    **Raises:** `ValueError` for singular QᵀK, β = 0, or a density bound above 1/|S^{d−1}|.
    **Source:** *concentration*, Lemma 5 (reconstructed); of order √(log β/β) for a density."""
    x = sphere.check_tokens(x, "x")
    Q, K, _ = check_matrices(Q, K, jnp.eye(x.shape[1], dtype=x.dtype))
    Q, K = check_invertible(Q, K)
    beta = check_scalar(beta, "beta", minimum=0.0, strict=True).astype(x.dtype)
    u = matmul(x, matmul(Q.T, K).astype(x.dtype))
    if r is not None:
        r = check_scalar(r, "r", minimum=0.0).astype(x.dtype)
    if q is not None:
        q = check_scalar(q, "q", minimum=0.0, strict=True).astype(x.dtype)
    if isinstance(mu, Empirical):
        points, weights = mu.points.astype(x.dtype), mu.weights.astype(x.dtype)
        return _laplace_empirical(u, beta, points, weights, r, q)
    if isinstance(mu, AbstractMeasure):
        floor, _ = density_range(mu)
        floor = refuse(
            floor,
            ~(floor > 0),
            "Argument `mu` must have a density whose minimum does not underflow, but it is 0. "
            "Give tokens, for example `mu.nodes(n)`.",
        )
    else:
        floor = mu
    floor = check_floor(floor, "mu", x.shape[1]).astype(x.dtype)
    return _laplace_density(u, beta, floor, r, q)


@jax.jit
def _laplace_empirical(u, beta, points, weights, r, q):
    def row(u):
        s = jnp.linalg.norm(u)
        gap = jnp.sum((points - u / s) ** 2, axis=-1) / 2  # f/|Bᵀx|
        if r is None:
            order = jnp.argsort(gap)
            levels, mass = gap[order], jnp.cumsum(weights[order])
        else:
            levels = r / s
            mass = jnp.sum(jnp.where(gap <= levels, weights, 0))
        return _laplace(beta * s, levels, mass, None if q is None else q / s)

    return jax.lax.map(row, u)


@jax.jit
def _laplace_density(u, beta, floor, r, q):
    d = u.shape[1]

    def row(u):
        s = jnp.linalg.norm(u)
        kappa = beta * s
        if r is None:
            scale = jnp.asarray(np.geomspace(1 / 16, 16, 65), u.dtype)
            levels = jnp.minimum((d - 1) / (2 * kappa) * scale, 2)
        else:
            levels = r / s
        angle = 2 * jnp.arcsin(jnp.sqrt(jnp.minimum(levels, 2) / 2))
        mass = floor * sphere.area(d) * _cap_mass(d, angle)
        return _laplace(kappa, levels, mass, None if q is None else q / s)

    return jax.lax.map(row, u)


def _laplace(kappa: Array, r: Array, mass: Array, q: Array | None) -> Array:
    """The least bound over the entries of r; r and q in units of |Bᵀx|."""
    holds = mass > 0
    mass = jnp.where(holds, mass, 1)
    if q is None:
        z = _larger_root(2 * kappa * r + jnp.log(4 * kappa / mass**2))
        q = jnp.maximum(z / (2 * kappa) - r, 0)
    bound = jnp.sqrt(2 * (r + q)) + 2 * jnp.exp(-kappa * q) / mass
    return jnp.minimum(jnp.min(jnp.where(holds, bound, 2)), 2)


def _larger_root(y: Array) -> Array:
    """The root z > 1 of z − log z = y, −W₋₁(−e^{−y}); y is raised to 1.1 if below (there the
    bound above exceeds 2)."""
    y = jnp.maximum(y, 1.1)

    def newton(_, z):
        return z - (z - jnp.log(z) - y) * z / (z - 1)

    z = jax.lax.fori_loop(0, 8, newton, jax.lax.stop_gradient(2 * y))
    return newton(0, jax.lax.stop_gradient(z))  # with the derivative of the root


def check_floor(floor: ArrayLike, name: str, d: int) -> Array:
    floor = check_scalar(floor, name, minimum=0.0, strict=True)
    uniform = 1 / sphere.area(d)
    return refuse(
        floor,
        floor > uniform * (1 + 1e-5),
        f"Argument `{name}` must be a lower bound of a probability density, at most "
        f"1/|S^{d - 1}| = {uniform:.6g}, but is {shown(floor)}. Densities here are with "
        "respect to the surface measure.",
    )


def density_range(law: AbstractMeasure) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """min µ and max µ of a density that is largest at `mean` and least at −`mean`: `Uniform`,
    `VonMisesFisher`, `HeatKernel`. **Raises:** `ValueError` for any other law."""
    if isinstance(law, Uniform):
        value = jnp.asarray(1 / sphere.area(law.d), law.dtype)
        return value, value
    if isinstance(law, (VonMisesFisher, HeatKernel)):
        return jnp.exp(law.log_density(-law.mean)), law.density(law.mean)
    raise ValueError(
        "Argument `law` must be `Uniform`, `VonMisesFisher` or `HeatKernel`, whose extremes "
        f"are known, but is a {type(law).__name__}. Give bounds of its density as numbers."
    )
