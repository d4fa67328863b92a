"""Quantitative concentration: densities along the flow, the distance of a flow at finite β to
its zero-temperature limit, and Theorem 1 of *concentration* with its constants.

Conventions as in `bounds`: B = QᵀK, κ = β|Bᵀx|, v = Bᵀx/|Bᵀx|; σ₁, σ_d are the largest and
smallest singular values of B and ‖·‖ that of V. Bounds are upper bounds, often far from what
happens: `prediction` has expected values."""

import functools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .. import special, sphere
from ..checks import ArrayLike, as_float, check_entries, check_scalar, refuse, shown
from ..matrices import check_invertible, check_matrices, key_query_value, matmul
from ..measures import AbstractLaw
from .alignment import dominant_eigenspace
from .bounds import check_floor, density_range, norms, peak
from .lyapunov import check_symmetric, constant_of_p, lyapunov_moment

# ------------------------------------------------- densities along the flow, Lemma 10 (C17)


class DensityBounds(eqx.Module):
    """`log_lower` ≤ log µ_t ≤ `log_upper` for the density µ_t of a solution of (SA);
    logarithms, because they go like βt in the end."""

    log_lower: Float[Array, "..."]
    log_upper: Float[Array, "..."]

    @property
    def lower(self) -> Float[Array, "..."]:
        """The lower bound of µ_t (0 where it underflows)."""
        return jnp.exp(self.log_lower)

    @property
    def upper(self) -> Float[Array, "..."]:
        """The upper bound of µ_t (∞ where it overflows)."""
        return jnp.exp(self.log_upper)


def density_bounds(
    t: ArrayLike,
    minimum: ArrayLike,
    maximum: ArrayLike,
    Q: ArrayLike,
    K: ArrayLike,
    V: ArrayLike,
    beta: ArrayLike,
) -> DensityBounds:
    """Rigorous bounds of the density of a solution of (SA), for every β > 0 and t ≥ 0:

        min µ₀ e^{−G(t)} ≤ µ_t ≤ max µ₀ e^{G(t)},   G' = min(αρ + γ, R),  ρ = (max/min)µ₀·e^{2G},

    α = ‖V‖(σ₁/σ_d)κ(1 − A_d(κ)²) at κ = βσ_d, γ = ‖V‖(d−1), R = ‖V‖ max_s(b(1−s²) + (d−1)s)
    with b = βσ₁. Until ρ = (R−γ)/α the bounds are uniform in β (α → ‖V‖(d−1)σ₁/σ_d), namely
    up to the order of time log(1 + γ/αρ₀)/2γ; from then on G grows at the rate R ∝ β.

    **Arguments:** times `t` ≥ 0, any shape; `minimum` > 0 and `maximum`, of the density at
    time 0; Q, K, V with QᵀK invertible; `beta`.

    (Derived: µ_t changes along a trajectory by e^{−∫div χ}, and div χ = β tr(P_xV Cov(ν)Bᵀ) −
    (d−1)⟨x,Vm⟩, where tr Cov(ν) = 1 − |m|² and ≤ ρ(1 − A_d²). With ρ' = 2ρ(αρ + γ):
    t = [log(ρ/(γ+αρ)) − log(ρ₀/(γ+αρ₀))]/2γ.) **Source:** *multiscale*, Lemmas A.9, A.10, with
    constants and without « β large enough »."""
    norm, top, least, d = norms(Q, K, V, invertible=True)
    beta = check_scalar(beta, "beta", minimum=0.0, strict=True).astype(norm.dtype)
    t = as_float(t, "t").astype(norm.dtype)
    t = refuse(t, ~(t >= 0), f"Argument `t` must be ≥ 0, but is {shown(t)}.")
    low = check_floor(as_float(minimum, "minimum").astype(norm.dtype), "minimum", d)
    high = check_scalar(maximum, "maximum").astype(norm.dtype)
    high = refuse(
        high,
        ~(high >= low),
        f"Argument `maximum` must be at least `minimum`, but is {shown(high)}.",
    )
    growth = _density_growth(d, t, high / low, norm, top, least, beta)
    return DensityBounds(jnp.log(low) - growth, jnp.log(high) + growth)


@functools.partial(jax.jit, static_argnames="d")
def _density_growth(d, t, ratio, norm, top, least, beta):
    kappa = beta * least
    complement = special.mean_resultant_complement(d, kappa)
    norm = jnp.maximum(norm, jnp.finfo(norm.dtype).tiny ** 0.5)  # V = 0: nothing moves
    alpha = norm * top / least * kappa * complement * (2 - complement)
    gamma = norm * (d - 1)
    rate = norm * peak(beta * top, d - 1)
    # ρ/(γ + αρ) grows as e^{2γt} until ρ = (R − γ)/α, at time `change`.
    end = jnp.maximum((rate - gamma) / alpha, ratio)
    change = jnp.log(end / ratio * (gamma + alpha * ratio) / (gamma + alpha * end))
    change = change / (2 * gamma)
    first = jnp.minimum(t, change)
    excess = alpha * ratio / gamma * jnp.expm1(2 * gamma * first)  # < 1 until `change`
    early = gamma * first - jnp.log1p(-excess) / 2
    return early + rate * (t - first)


def limit_density_rate(Q: ArrayLike, K: ArrayLike, V: ArrayLike) -> Float[Array, ""]:
    """C = ‖V‖(d−1)(1 + σ₁/σ_d) ≥ |div χ_∞|: densities of the zero-temperature flow obey
    min ρ_t ≥ min ρ₀ e^{−Ct}, rigorously, and those of (SA)

        min µ_t ≥ ½ min µ₀ e^{−2Ct}   on [0, T],   for all β ≥ β₀(µ₀, T),

    with a β₀ that is not known (`density_bounds` needs none). (Derived: div χ_∞ =
    tr(P_xV P_vBᵀ)/|Bᵀx| − (d−1)⟨x,Vv⟩, and P_v has rank d−1.) **Source:** *concentration*,
    Lemma 10; the constant is reconstructed."""
    norm, top, least, d = norms(Q, K, V, invertible=True)
    return norm * (d - 1) * (1 + top / least)


# ------------------------------------------------------- finite against zero temperature


def barycentre_error_bound(
    d: int, kappa: ArrayLike, ratio: ArrayLike
) -> Float[Array, "..."]:
    """√(2·ratio·(1 − A_d(κ))) ≥ |m − v|, for a density with max µ/min µ ≤ ratio and
    κ = β|Bᵀx|: about √((d−1)ratio/κ), without the logarithm that a lower bound alone costs.

    (Derived: |m−v|² ≤ ∫|y−v|²dν ≤ ratio·∫|y−v|²dν_σ, σ uniform.) At most 2."""
    kappa, ratio = as_float(kappa, "kappa"), as_float(ratio, "ratio")
    ratio = check_entries(ratio, ratio >= 1, "ratio", "be ≥ 1", "It is max µ/min µ.")
    square = 2 * ratio * special.mean_resultant_complement(d, kappa)
    return jnp.sqrt(jnp.minimum(square, 4))


class FieldError(eqx.Module):
    """What separates χ_β[µ] from χ_∞ at tokens x, for a smooth positive density µ:

    - `leading` (n, d): χ_β[µ](x) − χ_∞(x) up to O(β⁻²).
    - `rate`: √(log(β+1)/β), the order of the bound of *concentration*, without its constant.
    """

    leading: Float[Array, "n d"]
    rate: Float[Array, ""]


def field_error(
    x: ArrayLike,
    law: AbstractLaw,
    Q: ArrayLike,
    K: ArrayLike,
    V: ArrayLike,
    beta: ArrayLike,
) -> FieldError:
    """The error of the zero-temperature field is O(1/β) for a smooth positive density:

        χ_β[µ](x) − χ_∞(x) = P_xV(∇log µ(v) − ½(d−1)v)/κ + O(κ⁻²),   κ = β|Bᵀx|,

    for the uniform law exactly −(1 − A_d(κ))P_xVv (`special.mean_resultant_complement`).
    The rate √(log(β+1)/β) of *concentration*, Theorem 1, is an upper bound.

    **Arguments:** tokens `x`; `law`, with a differentiable `log_density`; `beta` > 0.
    (Derived by Laplace's method: ν is nearly normal around v with variance 1/κ per tangent
    direction; E[P_vy] = ∇log µ(v)/κ and E⟨v,y⟩ = 1 − (d−1)/2κ.)"""
    x = sphere.check_tokens(x, "x", law.d)
    Q, K, V = check_matrices(Q, K, V)
    B, _, _ = key_query_value(*check_invertible(Q, K), V)
    beta = check_scalar(beta, "beta", minimum=0.0, strict=True).astype(x.dtype)
    return _field_error(x, law, B.astype(x.dtype), V.astype(x.dtype), beta)


@eqx.filter_jit
def _field_error(x, law, B, V, beta):
    u = matmul(x, B)
    length = jnp.linalg.norm(u, axis=-1, keepdims=True)
    v = u / length
    score = jax.vmap(jax.grad(lambda y: law.log_density(y)))(v)
    drift = (sphere.project(v, score) - (law.d - 1) / 2 * v) / (beta * length)
    return FieldError(sphere.project(x, matmul(drift, V.T)), _rate(beta))


def _rate(beta: Array) -> Array:
    return jnp.sqrt(jnp.log1p(beta) / beta)


def stability_bound(
    t: ArrayLike,
    minimum: ArrayLike,
    maximum: ArrayLike,
    Q: ArrayLike,
    K: ArrayLike,
    V: ArrayLike,
    beta: ArrayLike,
) -> Float[Array, "..."]:
    """W₂(µ_t^β, ρ_t) ≤ ‖V‖ |m − v|_t (e^{Lt} − 1)/L, at most 2: the distance (with chords) of
    the solutions of (SA) and of the zero-temperature flow with one density at time 0.

    Rigorous for every β > 0, without unknown constants: |m − v|_t is
    `barycentre_error_bound` at κ = βσ_d with the ratio of `density_bounds` at time t (which
    grows in t), L = `zero_temperature_lipschitz`. Of order β^{−1/2} while `density_bounds` is
    uniform in β. The same bound holds for the root mean square distance of each token to
    itself. **Arguments:** as `density_bounds`. **Source:** *concentration*, Prop. 6 (there
    √(log(β+1)/β); here the ratio of the density takes the place of its minimum)."""
    bounds = density_bounds(t, minimum, maximum, Q, K, V, beta)
    norm, top, least, d = norms(Q, K, V)
    t, beta = as_float(t, "t").astype(norm.dtype), as_float(beta, "beta")
    return _stability(d, t, norm, top / least, beta.astype(norm.dtype) * least, bounds)


@functools.partial(jax.jit, static_argnames="d")
def _stability(d, t, norm, condition, kappa, bounds):
    # At e^60 the bounds are at their ceilings 2 already: no overflow.
    ratio = jnp.exp(jnp.minimum(bounds.log_upper - bounds.log_lower, 60))
    error = barycentre_error_bound(d, kappa, ratio)
    spread = jnp.expm1(jnp.minimum(norm * (1 + condition) * t, 60)) / (1 + condition)
    return jnp.minimum(error * spread, 2)


# ------------------------------------------------------------------ Theorem 1 and Cor. 4


def w2_bound(
    t: ArrayLike,
    beta: ArrayLike,
    C1: ArrayLike,
    C: ArrayLike,
    C2: ArrayLike,
    c: ArrayLike,
) -> Float[Array, "..."]:
    """C₁√(log(β+1)/β)e^{Ct} + C₂e^{−ct} ≥ W₂(µ_t^β, π_E#µ₀). Arrays broadcast.
    **Raises:** `ValueError` for β ≤ 0 or t < 0. **Source:** *concentration*, Theorem 1 (form
    reconstructed)."""
    t, beta = as_float(t, "t"), as_float(beta, "beta")
    t = check_entries(t, t >= 0, "t", "be ≥ 0", "The bound holds forwards in time.")
    beta = check_entries(
        beta, beta > 0, "beta", "be > 0", "The bound is one for large β."
    )
    C1, C2 = as_float(C1, "C1"), as_float(C2, "C2")
    C, c = as_float(C, "C"), as_float(c, "c")
    return C1 * _rate(beta) * jnp.exp(C * t) + C2 * jnp.exp(-c * t)


class BestTime(eqx.Module):
    """The time `t` at which a bound is least, and its `value` there."""

    t: Float[Array, ""]
    value: Float[Array, ""]


class Window(eqx.Module):
    """Times `start` ≤ t ≤ `end` at which the bound of Theorem 1 is at most ε; empty if
    `end` < `start`. From β = e^`log_beta` on it is not (a logarithm, for it may overflow)."""

    start: Float[Array, ""]
    end: Float[Array, ""]
    log_beta: Float[Array, ""]

    @property
    def reason(self) -> str:
        """Why the window is empty; "" if it is not."""
        if self.end >= self.start:
            return ""
        return (
            f"the tokens need t = {float(self.start):.4g} to align to ε/2, but the error of "
            f"finite temperature passes ε/2 at t = {float(self.end):.4g}; the window opens "
            f"from log β = {float(self.log_beta):.4g} on"
        )


class ConcentrationBound(eqx.Module):
    """The constants of W₂(µ_t^β, π_E#µ₀) ≤ C₁√(log(β+1)/β)e^{Ct} + C₂e^{−ct}:

    - `C` = ‖V‖(1 + σ₁/σ_d) (rigorous: `zero_temperature_lipschitz`).
    - `c` = p·gap/2σ₁ and `C2` (rigorous: W₂(ρ_t, π_E#µ₀) ≤ C₂e^{−ct} for all t, Cor. 2).
    - `C1` (reconstructed): rigorous but for Lemma 10 in the form of `limit_density_rate`,
        that is on [0, T] for all β ≥ β₀(µ₀, T), β₀ unknown. See `concentration_bound`.
    """

    C1: Float[Array, ""]
    C: Float[Array, ""]
    C2: Float[Array, ""]
    c: Float[Array, ""]

    def value(self, t: ArrayLike, beta: ArrayLike) -> Float[Array, "..."]:
        """The bound at times t ≥ 0 and β > 0."""
        return w2_bound(t, beta, self.C1, self.C, self.C2, self.c)

    def best(self, beta: ArrayLike) -> BestTime:
        """The least bound over t ≥ 0: at t = log(cC₂/C C₁√(log(β+1)/β))/(C + c), if
        positive; it grows like log β/2(C + c)."""
        beta = check_scalar(beta, "beta", minimum=0.0, strict=True)
        growing = self.C * self.C1 * _rate(beta)
        falling = self.c * self.C2
        moves = (falling > growing) & (growing > 0)
        safe = jnp.where(moves, falling, 1) / jnp.where(moves, growing, 1)
        t = jnp.where(moves, jnp.log(safe) / (self.C + self.c), 0)
        return BestTime(t, self.value(t, beta))

    def window(self, epsilon: ArrayLike, beta: ArrayLike) -> Window:
        """Times with both terms at most ε/2: c⁻¹ log(2C₂/ε) ≤ t ≤
        C⁻¹ log((ε/2C₁)√(β/log(β+1))). **Source:** *concentration*, Cor. 4."""
        epsilon = check_scalar(epsilon, "epsilon", minimum=0.0, strict=True)
        beta = check_scalar(beta, "beta", minimum=0.0, strict=True)
        late = epsilon < 2 * self.C2
        fall = jnp.where(late, 2 * self.C2 / epsilon, 1)
        start = jnp.log(fall) / jnp.where(late, self.c, 1)
        log_half = jnp.log(epsilon / (2 * self.C1))
        end = (log_half - jnp.log(_rate(beta))) / self.C
        return Window(start, end, _log_opening(2 * (self.C * start - log_half)))


def _log_opening(y: Array) -> Array:
    """log β for β/log(β+1) = e^y; −∞ for y ≤ 0, where any β > 0 will do. With l = log(1+β):
    l + log((1 − e^{−l})/l) = y, by Newton's method from above."""
    opens = y > 0
    y = jnp.where(opens, y, 1)

    def h(l):
        return l + jnp.log(-jnp.expm1(-l) / l) - y

    def newton(_, l):
        return l - h(l) / (1 + 1 / jnp.expm1(l) - 1 / l)

    l = jax.lax.fori_loop(0, 12, newton, jax.lax.stop_gradient(2 * y))
    l = newton(0, jax.lax.stop_gradient(l))
    return jnp.where(opens, l + jnp.log(-jnp.expm1(-l)), -jnp.inf)


def concentration_bound(
    Q: ArrayLike,
    K: ArrayLike,
    V: ArrayLike,
    law: AbstractLaw,
    *,
    p: ArrayLike | None = None,
    minimum: ArrayLike | None = None,
    moment: ArrayLike | None = None,
    dim: int | None = None,
) -> ConcentrationBound:
    """The constants of *concentration*, Theorem 1, for µ₀ = `law`.

    **Arguments:** Q, K, V with QᵀK invertible and VKᵀQ symmetric; `law`; the exponent
    `p` ∈ (0, 2], p < dim E (default 2, or 0.9·dim E if that is less); lower bound `minimum` of the
    density and upper bound `moment` of E_p(µ₀) (defaults: from `density_range`, the moment as
    that of the uniform law times max µ₀·|S^{d−1}|); `dim` E under `jit`.

        c = p·gap/2σ₁,  C₂ = (C_pE_p(µ₀))^{1/2},  C = L = ‖V‖(1 + σ₁/σ_d),
        C₁ = (‖V‖/L) max(2√(e−1), (2 + √(g + 4D/L))/√σ_d),  D = `limit_density_rate` = (d−1)L,
        g = 2 + d(1 + log⁺σ_d) + 2 log(2/(k_d|S^{d−1}| min µ₀)),  k₂ = √2/π, else k_d = ½.

    (Derived. |P_⊥x|/|P_Ex| decays at least like e^{−gap·t/σ₁} along the zero-temperature flow,
    which keeps π_E(x): the second term. First term: `laplace_principle_bound` at r = 1/β·σ_d⁻¹
    |Bᵀx| with q such that e^{−κq}/µ = κ^{−1/2}, where caps {1 − ⟨v,y⟩ ≤ h} have uniform mass
    ≥ k_dh^{(d−1)/2} and µ_t ≥ ½ min µ₀ e^{−2Dt}: |m−v| ≤ κ^{−1/2}(2 + √(2 + d log⁺κ +
    2 log(2/…) + 4Dt)) at κ = βσ_d; then W₂' ≤ L W₂ + ‖V‖|m−v|, and Jensen's inequality for
    ∫e^{−Lt}√(g + 4Dt)dt. For β < e−1, |m−v| ≤ 2 suffices.)

    **Raises:** `ValueError` if VKᵀQ is not symmetric, QᵀK singular, p ≥ dim E, or the density
    has no positive lower bound. **Source:** *concentration*, Theorem 1, Lemmas 5–10."""
    norm, top, least, d = norms(Q, K, V, invertible=True)
    if law.d != d:
        raise ValueError(
            f"Argument `law` must live on S^(d−1) with d = {d} to fit the matrices, but has "
            f"d = {law.d}."
        )
    norm = check_symmetric(norm, key_query_value(Q, K, V)[1])
    space = dominant_eigenspace(Q, K, V, dim=dim)
    m = space.dim
    p = check_scalar(min(2.0, 0.9 * m) if p is None else p, "p")
    free = m == d or moment is not None
    p = refuse(
        p,
        ~((p > 0) & (p <= 2) & (free | (p < m))),
        f"Argument `p` must lie in (0, 2] and below dim E = {m}, where the moment is finite, but "
        f"is {shown(p)}. Use a smaller p (2 needs dim E ≥ 3).",
    )
    if moment is None:
        moment = density_range(law)[1] * sphere.area(d) * lyapunov_moment(d, m, p)
    moment = check_scalar(moment, "moment", minimum=0.0)
    low = check_floor(density_range(law)[0] if minimum is None else minimum, "minimum", d)
    gap = space.gap if m < d else jnp.zeros_like(norm)  # m = d: C₂ = 0
    return jax.tree.map(
        lambda a: a.astype(norm.dtype),
        _concentration(d, norm, top, least, gap, p, moment, low),
    )


@functools.partial(jax.jit, static_argnames="d")
def _concentration(d, norm, top, least, gap, p, moment, low):
    corner = math.sqrt(2) / math.pi if d == 2 else 0.5
    g = 2 + d * (1 + jnp.maximum(jnp.log(least), 0))
    g = g + 2 * jnp.log(2 / (corner * sphere.area(d) * low))
    steady = (2 + jnp.sqrt(g + 4 * (d - 1))) / jnp.sqrt(least)  # D/L = d − 1
    C1 = jnp.maximum(2 * math.sqrt(math.e - 1), steady) / (1 + top / least)
    C2 = jnp.sqrt(constant_of_p(p) * moment)
    return ConcentrationBound(C1, norm * (1 + top / least), C2, p * gap / (2 * top))
