"""The heat phase, of time O(β): clusters narrow (V = +, backward) or spread (V = −, forward).

Conventions. On the dominant space QᵀK = λ₁I and V = sign·λ₂I; λ₁ = λ₂ = 1 if left out. In
the limit β → ∞ tokens follow ∂_s µ = −sign·Δµ in *heat time* s = λ₂t/(βλ₁), where t is
the time of the flow. e^{sΔ}δ_m, the heat kernel of heat time s, has *variance* 2s per tangent
direction; the name of each argument says which of the two it is."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .. import special, sphere
from ..checks import (
    ArrayLike,
    as_float,
    check_count,
    check_entries,
    check_finite,
    check_scalar,
    is_traced,
    refuse,
    shown,
)
from ..matrices import matmul
from ..measures import (
    Empirical,
    HeatKernel,
    Mixture,
    check_weights,
    log_wrapped_normal,
)

# ------------------------------------------------------------------ time and variance


def check_sign(sign: float | int, name: str = "sign") -> float:
    """`sign` as +1.0 or −1.0, the sign of V on the dominant space."""
    if sign not in (1, -1):
        raise ValueError(
            f"Argument `{name}` must be +1 (V = +I: backward heat, clusters form) or −1 "
            f"(V = −I: forward heat), but is {sign!r}."
        )
    return float(sign)


def check_rates(
    beta: ArrayLike, lambda1: ArrayLike, lambda2: ArrayLike
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """βλ₁ and λ₂ of QᵀK = λ₁I, V = ±λ₂I, all > 0: the flow with them is that with
    λ₁ = λ₂ = 1 at β' = βλ₁ and time t' = λ₂t."""
    cure = "The sign of V is the argument `sign`."
    beta = check_scalar(beta, "beta", minimum=0.0, strict=True)
    lambda1 = check_scalar(lambda1, "lambda1", minimum=0.0, strict=True)
    lambda2 = check_scalar(lambda2, "lambda2", minimum=0.0, strict=True, cure=cure)
    return beta * lambda1, lambda2


def heat_time(
    t: ArrayLike, beta: ArrayLike, lambda1: ArrayLike = 1.0, lambda2: ArrayLike = 1.0
) -> Float[Array, "..."]:
    """s = λ₂t/(βλ₁), the heat time that passes during a time t of the flow.

    **Source:** *multiscale*, Sec. 3.3, with the constants of Assumption 4 that the text sets
    to 1 (derived: P_x V∫e^{β⟨x,λ₁y⟩}y dµ/∫e^{β⟨x,λ₁y⟩}dµ = sign·λ₂/(βλ₁) ∇log(W*µ))."""
    kappa, lambda2 = check_rates(beta, lambda1, lambda2)
    return lambda2 * as_float(t, "t") / kappa


def heat_variance(
    variance: ArrayLike,
    t: ArrayLike,
    beta: ArrayLike,
    sign: int,
    lambda1: ArrayLike = 1.0,
    lambda2: ArrayLike = 1.0,
) -> Float[Array, "..."]:
    """Variance of a heat kernel of S^{d−1} in the limit β → ∞, t/β fixed:

        s(t) = s₀ − sign·2λ₂t/(βλ₁),    QᵀK = λ₁I, V = sign·λ₂I.

    `variance` s₀ is σ₀², twice the heat time. A backward flow ends at its blow-up time
    t = βλ₁s₀/(2λ₂).

    **Raises:** `ValueError` for a backward time past the blow-up of a component (traced: at
    run time). **Source:** *multiscale*, Eqs. (6), (7)."""
    gamma = check_sign(sign)
    s0 = _check_variance(variance)
    s = s0 - gamma * 2 * heat_time(t, beta, lambda1, lambda2)
    late = "does not"
    if not is_traced(s):
        late = f"is {float(jnp.max(_blow_up(-s, beta, lambda1, lambda2))):.6g} past it"
    return refuse(
        s,
        ~(s > 0),
        "Argument `t` must lie before the blow-up βλ₁·variance/(2λ₂) of every component of a "
        f"backward heat flow, but {late}. See `blow_up_time` and `continue_past_collapse`.",
    )


def blow_up_time(
    variance: ArrayLike,
    beta: ArrayLike,
    lambda1: ArrayLike = 1.0,
    lambda2: ArrayLike = 1.0,
) -> Float[Array, "..."]:
    """t = βλ₁σ₀²/(2λ₂), when a component of variance σ₀² collapses in the backward heat
    flow. **Source:** *multiscale*, after Eq. (7), in units of the flow."""
    return _blow_up(_check_variance(variance), beta, lambda1, lambda2)


def _blow_up(variance, beta, lambda1, lambda2) -> Array:
    kappa, lambda2 = check_rates(beta, lambda1, lambda2)
    return kappa * variance / (2 * lambda2)


def _check_variance(variance: ArrayLike) -> Array:
    s = as_float(variance, "variance")
    return check_entries(s, s >= 0, "variance", "be ≥ 0", "Use σ², or 2s of a heat time.")


def closure_variance(
    variance: ArrayLike,
    t: ArrayLike,
    beta: ArrayLike,
    sign: int,
    lambda1: ArrayLike = 1.0,
    lambda2: ArrayLike = 1.0,
) -> Float[Array, "..."]:
    """Variance of a Gaussian cluster of (SA) with QᵀK = λ₁I, V = sign·λ₂I on a tangent line:

        ṡ = −sign·2λ₂s/(1 + βλ₁s),    s(t) = W₀(κs₀ e^{κs₀ − 2·sign·λ₂t})/κ,  κ = βλ₁.

    For κs ≫ 1 it is the heat law, for κs ≪ 1 s ∝ e^{∓2λ₂t}: there is no blow-up at finite
    β. W₀ is Lambert's function, evaluated in logs. (Derived: the barycentre of N(0, s)
    tilted by κx is κs·x/(1 + κs), so that ẋ = −sign·λ₂x/(1 + κs).)"""
    gamma = check_sign(sign)
    s0, t = as_float(variance, "variance"), as_float(t, "t")
    kappa, lambda2 = check_rates(beta, lambda1, lambda2)
    s0 = refuse(
        s0,
        ~(s0 > 0),
        f"Argument `variance` must be > 0, but is {shown(s0)}. A cluster of no width has none "
        "at any time.",
    )
    a = kappa * s0
    return special.wright_omega(a + jnp.log(a) - 2 * gamma * lambda2 * t) / kappa


# ------------------------------------------------------------------ harmonics


def heat_multiplier(degree: ArrayLike, s: ArrayLike, d: int) -> Float[Array, "..."]:
    """e^{−l(l+d−2)s}, by which e^{sΔ} multiplies the harmonics of degree l on S^{d−1}.

    `degree` l ≥ 0 and the heat time `s` broadcast. s < 0 is the backward flow, whose
    multipliers exceed every bound: ∞ where l(l+d−2)|s| > 709 (float64).
    **Source:** *multiscale*, Eq. (6): the eigenvalues of Δ are −l(l+d−2)."""
    d = sphere.check_dimension(d)
    l = as_float(degree, "degree")
    l = refuse(
        l, ~(l >= 0), f"Argument `degree` must be ≥ 0, but is {shown(l)}. Use 0, 1, 2, …"
    )
    return jnp.exp(-l * (l + d - 2) * as_float(s, "s"))


def log_smoothing_multipliers(
    degrees: int, beta: ArrayLike, d: int
) -> Float[Array, "... l"]:
    """log(I_{l+d/2−1}(β)/I_{d/2−1}(β)) for l = 0 … `degrees` − 1 on a new last axis: what
    smoothing with W_β(q) = e^{βq}/∫e^{βq} does to harmonics of degree l.

    Attention sees µ only through W_β*µ: for QᵀK = V = I, β χ_β[µ] = ∇log(W_β*µ). For
    β → ∞ they tend to −l(l+d−2)/(2β), the logarithms of `heat_multiplier` at s = 1/(2β).
    `beta` > 0, any shape. The error is that of rounding, O(ε) per degree: absolute, so that it
    is βε relative to the limit. (Derived: the Funk–Hecke theorem.)"""
    degrees = check_count(degrees, "degrees")
    d = sphere.check_dimension(d)
    beta = as_float(beta, "beta")
    beta = refuse(
        beta,
        ~(beta > 0),
        f"Argument `beta` must be > 0, but is {shown(beta)}. At β = 0 attention sees the "
        "mean of the tokens only.",
    )
    zero = jnp.zeros_like(beta)[..., None]
    if degrees == 1:
        return zero
    ratios = special.bessel_ratio_sequence(d / 2 - 1, degrees - 1, beta)
    return jnp.concatenate([zero, jnp.cumsum(jnp.log(ratios), axis=-1)], axis=-1)


# ------------------------------------------------------------------ mixtures


class HeatMixture(eqx.Module):
    """µ = Σⱼ αⱼ e^{sⱼΔ}δ_{mⱼ} on S^{d−1}: mixtures of heat kernels, whose exact heat flow
    only moves the sⱼ. **Source:** *multiscale*, Eq. (7).

    **Arguments:** `means` mⱼ, unit vectors `(m, d)`; `s`, heat times `(m,)` > 0 (variances
    2s); `weights` αⱼ ≥ 0, stored with sum 1, default equal."""

    means: Float[Array, "m d"]
    s: Float[Array, " m"]
    weights: Float[Array, " m"]

    def __init__(self, means: ArrayLike, s: ArrayLike, weights: ArrayLike | None = None):
        self.means = sphere.check_tokens(means, "means")
        m = self.means.shape[0]
        s = check_finite(s, "s", (m,))
        rule = f"Argument `s` must be > 0, but is {shown(s)}. It is half of the variance."
        self.s = refuse(s, ~(s > 0), rule).astype(self.means.dtype)
        weights = jnp.ones(m) if weights is None else weights
        self.weights = check_weights(weights, "weights", m).astype(self.means.dtype)

    @property
    def d(self) -> int:
        """Dimension of the ambient space."""
        return self.means.shape[1]

    def law(self) -> Mixture:
        """The same measure as a law to sample, with density and nodes."""
        return Mixture(
            [HeatKernel(m, s) for m, s in zip(self.means, self.s)], self.weights
        )

    def evolve(
        self,
        t: ArrayLike,
        beta: ArrayLike,
        sign: int,
        lambda1: ArrayLike = 1.0,
        lambda2: ArrayLike = 1.0,
    ) -> "HeatMixture":
        """The mixture after a time t of the flow: sⱼ − sign·λ₂t/(βλ₁).

        **Raises:** `ValueError` for a backward time past the first blow-up, and by how
        much; `continue_past_collapse` has what the paper conjectures beyond."""
        t = check_scalar(t, "t")
        variance = heat_variance(2 * self.s, t, beta, sign, lambda1, lambda2)
        return HeatMixture(self.means, variance / 2, self.weights)

    def blow_up_time(
        self, beta: ArrayLike, lambda1: ArrayLike = 1.0, lambda2: ArrayLike = 1.0
    ) -> Float[Array, ""]:
        """The time at which the first component collapses if V = +λ₂I."""
        return blow_up_time(2 * jnp.min(self.s), beta, lambda1, lambda2)


class CollapsedMixture(eqx.Module):
    """What `continue_past_collapse` returns: components as in a `HeatMixture`, with s = 0
    for those that are Dirac masses by now.

    `means` (m, d), `s` (m,) ≥ 0, `weights` (m,) of sum 1. The properties need known
    values: they have no fixed shape under `jit`."""

    means: Float[Array, "m d"]
    s: Float[Array, " m"]
    weights: Float[Array, " m"]

    @property
    def frozen_mass(self) -> Float[Array, ""]:
        """Σ αⱼ over the collapsed components."""
        return jnp.sum(jnp.where(self.s == 0, self.weights, 0))

    @property
    def frozen(self) -> Empirical | None:
        """The Dirac masses, as a probability measure to be weighted by `frozen_mass`; None
        before the first collapse."""
        at = self._indices(self.s == 0)
        return Empirical(self.means[at], self.weights[at]) if at.size else None

    @property
    def remaining(self) -> HeatMixture | None:
        """The other components, as a probability measure to be weighted by
        1 − `frozen_mass`; None after the last collapse."""
        at = self._indices(self.s > 0)
        return (
            HeatMixture(self.means[at], self.s[at], self.weights[at]) if at.size else None
        )

    def _indices(self, which: Array) -> np.ndarray:
        if is_traced(which):
            raise ValueError(
                "Property `frozen` or `remaining` must be read where values are known: how "
                "many components have collapsed sets its shape. Read `s` and `weights` "
                "inside `jit`."
            )
        return np.flatnonzero(np.asarray(which))


def continue_past_collapse(
    mixture: HeatMixture,
    t: ArrayLike,
    beta: ArrayLike,
    lambda1: ArrayLike = 1.0,
    lambda2: ArrayLike = 1.0,
) -> CollapsedMixture:
    """CONJECTURE of the paper: the backward flow (V = +λ₂I) of a mixture at any time t ≥ 0.
    A component that has collapsed stays where it is as a Dirac mass, the others go on
    independently: sⱼ(t) = max(sⱼ − λ₂t/(βλ₁), 0).

    Not proved, and no limit is known to have this meaning: the backward heat equation has no
    solution past the first blow-up. At finite β nothing collapses in finite time
    (`closure_variance`), and sampled tokens leave the law before (`noise_time`).
    **Source:** *multiscale*, Sec. 3.3, after Eq. (7)."""
    t = check_scalar(t, "t", minimum=0.0)
    left = mixture.s - heat_time(t, beta, lambda1, lambda2)
    return CollapsedMixture(mixture.means, jnp.maximum(left, 0), mixture.weights)


def wrapped_mixture_density(
    theta: Float[Array, " g"],
    means: ArrayLike,
    variances: ArrayLike,
    weights: ArrayLike,
) -> Float[Array, " g"]:
    """Σⱼ αⱼ N(θ; mⱼ, sⱼ) wrapped on S¹: heat-kernel mixtures, whose exact heat flow only
    moves the variances (`heat_variance`). **Source:** *multiscale*, Eq. (7)."""
    return _density(jnp.asarray(theta), *_mixture(means, variances, weights))


@jax.jit
def _density(theta: Array, m: Array, s: Array, a: Array) -> Array:
    logs = jax.vmap(log_wrapped_normal)(theta[None] - m[:, None], s)
    return matmul(a, jnp.exp(logs))


def wrapped_mixture_mass(
    edges: Float[Array, " g"],
    means: ArrayLike,
    variances: ArrayLike,
    weights: ArrayLike,
) -> Float[Array, " g-1"]:
    """Mass of the wrapped mixture between consecutive angles `edges`: what a histogram
    counts, without the error of taking the density at mid-bin. For variances up to 10."""
    m, s, a = _mixture(means, variances, weights)
    s = check_entries(
        s, s <= 10, "variances", "be at most 10", "Beyond, the law is uniform to 1 %."
    )
    return _bin_mass(jnp.asarray(edges), m, s, a)


@jax.jit
def _bin_mass(edges: Array, m: Array, s: Array, a: Array) -> Array:
    m = m - 2 * math.pi * jnp.round((m - (edges[0] + edges[-1]) / 2) / (2 * math.pi))
    turns = 2 * math.pi * jnp.arange(-4, 5, dtype=edges.dtype)
    z = (edges[None, None] + turns[None, :, None] - m[:, None, None]) / jnp.sqrt(s)[
        :, None, None
    ]
    cdf = jnp.sum(jax.scipy.special.ndtr(z), axis=1)
    return matmul(a, jnp.diff(cdf, axis=-1))


def _mixture(means, variances, weights) -> tuple[Array, Array, Array]:
    m = check_finite(means, "means", (None,))
    s = check_finite(variances, "variances", m.shape)
    s = refuse(
        s,
        ~(s > 0),
        f"Argument `variances` must be > 0, but is {shown(s)}. Use σ², not 0.",
    )
    return m, s, check_weights(weights, "weights", m.shape[0])
