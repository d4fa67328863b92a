"""The functional E_p(µ) = ∫(|x − P_E x|/|P_E x|)^p dµ of *concentration* (`observables.lyapunov`
computes it): how it decays at zero temperature, and what it says of Wasserstein distances."""

import math

import jax
import jax.numpy as jnp
from jax.scipy.special import gammaln
from jaxtyping import Array, Float

from .. import sphere
from ..checks import ArrayLike, as_float, check_count, check_entries, refuse, shown
from ..matrices import check_invertible, check_matrices, key_query_value
from .alignment import dominant_eigenspace


def lyapunov_decay(
    t: ArrayLike,
    p: ArrayLike,
    Q: ArrayLike,
    K: ArrayLike,
    V: ArrayLike,
    *,
    tol: float | None = None,
    dim: int | None = None,
) -> Float[Array, "..."]:
    """e^{−p(λ₁−λ₂)t/σ_max(B)}, by which E_p (`observables.lyapunov`) has decayed at least:
    E_p(ρ_t) ≤ E_p(ρ₀) e^{−p(λ₁−λ₂)t/σ_max(B)} along the zero-temperature flow.

    (Derived.) For v = P_E x, w = x − v and symmetric M, |w|/|v| decays at the rate
    (λ₁ − ⟨w,Mw⟩/|w|²)/|Bᵀx| ≥ (λ₁−λ₂)/σ_max(B). Equality if M has two eigenvalues and B is
    a multiple of an orthogonal matrix. With ε in the denominator of E_p the rate is
    multiplied by |v|/(|v| + ε): E_p^ε decreases too, but not at this rate.

    **Arguments:** `t` ≥ 0 and `p` > 0, arrays (broadcast); Q, K, V; `tol`, `dim` (the
    multiplicity of λ₁) as in `dominant_eigenspace`. If M = λI then E_p = 0 from the start and
    the factor is 0 for t > 0. **Raises:** `ValueError` for singular QᵀK and for VKᵀQ not
    symmetric to 1e-5, where the bound is false. **Source:** *concentration*, Prop. 8."""
    t, p = as_float(t, "t"), as_float(p, "p")
    t = refuse(
        t,
        ~(t >= 0),
        "Argument `t` must be ≥ 0, but some entry is not. The bound holds forwards in time.",
    )
    p = refuse(
        p,
        ~(p > 0),
        "Argument `p` must be > 0, but some entry is not. Use the p of `lyapunov`.",
    )
    Q, K, V = check_matrices(Q, K, V)
    Q, K = check_invertible(Q, K)
    B, M, _ = key_query_value(Q, K, V)
    B = check_symmetric(B, M)
    gap = dominant_eigenspace(Q, K, V, tol=tol, dim=dim).gap
    finite = jnp.isfinite(gap)  # else E is everything
    rate = jnp.where(finite, gap, 0) / jnp.linalg.norm(B, ord=2)
    return jnp.where(finite | (t == 0), jnp.exp(-p * rate * t), 0)


def wasserstein_from_lyapunov(value: ArrayLike, p: ArrayLike) -> Float[Array, "..."]:
    """The smallest bound on W₂(µ, π_E#µ) that follows from E_p(µ) = `value`:

        W₂² ≤ g(E_p),  g(s) = 2 − 2/√(1 + s^{2/p}),                         p ≥ 2,
        W₂² ≤ C_p E_p  for E_p ≤ s_p,  g(E_p) beyond,                       p < 2,
        c = (√(1+4p) − 1)/2,  s_p = (1/c² − 1)^{p/2},  C_p = 2(1 − c)/s_p.

    (Derived.) A token at angle φ to E has |x − π_E x|² = 2 − 2cos φ = g(tan^p φ), so W₂² is at
    most the least concave majorant of g at E_p: g itself for p ≥ 2; for p < 2 the tangent
    from the origin, which touches at cos φ = c, then g. Attained by a point mass at angle φ
    (joined with mass on E). In particular W₂² ≤ E₂ (Lemma 7) and W₂² ≤ 2; for p > 2 there
    is no C with W₂² ≤ C·E_p, but W₂² ≤ E_p^{2/p}.

    **Arguments:** `value` ≥ 0 (∞ is allowed) and `p` > 0, arrays (broadcast). The derivative
    at value 0, where the root has none, is returned as 0. **Source:** *concentration*,
    Lemma 7."""
    value, p = as_float(value, "value"), as_float(p, "p")
    value = refuse(
        value,
        ~(value >= 0),
        "Argument `value` must be ≥ 0, but some entry is not. Use that of `lyapunov`.",
    )
    p = refuse(
        p,
        ~(p > 0),
        "Argument `p` must be > 0, but some entry is not. Use the p of `lyapunov`.",
    )
    return _least_majorant(*jnp.broadcast_arrays(value, p))


@jax.jit
def _least_majorant(value, p):
    small = p < 2
    q = jnp.where(small, p, 1)
    c = 2 * q / (jnp.sqrt(1 + 4 * q) + 1)
    touch = ((1 - c) * (1 + c) / c**2) ** (q / 2)
    positive = value > 0
    line = small & (value < touch)
    straight = jnp.where(line & positive, value, 1) * constant_of_p(q)
    # sin²φ = u/(1+u) with u = tan²φ, for u small and large alike; 2 − 2cos = 2sin²/(1+cos).
    curved = positive & ~line
    log_u = 2 / p * jnp.log(jnp.where(curved, value, 1))
    bend = 2 * jax.nn.sigmoid(log_u) / (1 + jnp.sqrt(jax.nn.sigmoid(-log_u)))
    return jnp.where(positive, jnp.sqrt(jnp.where(line, straight, bend)), 0)


def lyapunov_moment(d: int, m: int, p: ArrayLike) -> Float[Array, "..."]:
    """E_p of the uniform law on S^{d−1} for dim E = m:

        E_p = Γ((d−m+p)/2) Γ((m−p)/2) / (Γ((d−m)/2) Γ(m/2)) for p < m, ∞ for p ≥ m,

    and 0 for m = d. Finite if and only if p < m: *concentration* needs m ≥ 3 for p = 2.

    (Derived.) |x − P_E x|²/|P_E x|² is a ratio of two independent χ² variables with d − m
    and m degrees of freedom. Relative error below 1e-12 (float64, d ≤ 1000) and 1e-5 (float32,
    d ≤ 32; it grows with log Γ(d/2)). **Arguments:** integers 1 ≤ m ≤ d, d ≥ 2; `p` ≥ 0, an array.
    **Source:** *concentration*, Example 3 (which has the condition p < m only)."""
    d, m = sphere.check_dimension(d), check_count(m, "m")
    if m > d:
        raise ValueError(f"Argument `m` must be at most d = {d}, but is {m}.")
    p = as_float(p, "p")
    p = refuse(
        p, ~(p >= 0), "Argument `p` must be ≥ 0, but some entry is not. Use p ≥ 0."
    )
    if m == d:
        return jnp.zeros_like(p)
    finite = p < m
    s = jnp.where(finite, p, 0) / 2
    outside, inside = (d - m) / 2, m / 2
    log_moment = (gammaln(outside + s) - math.lgamma(outside)) + (
        gammaln(inside - s) - math.lgamma(inside)
    )
    return jnp.where(finite, jnp.exp(log_moment), jnp.inf)


def alignment_constant(p: ArrayLike) -> Float[Array, "..."]:
    """C_p = max_θ (2 − 2cos θ)/tan^p θ for 0 < p ≤ 2, the constant of W₂²(µ, π_E#µ) ≤ C_pE_p(µ):
    2(1−g)(g²/(1−g²))^{p/2} at g = cos θ = (√(1+4p) − 1)/2; C₂ = 1, C₁ = 0.6006.

    For p > 2 there is none. **Source:** *concentration*, Lemma 7 (p = 2)."""
    p = as_float(p, "p")
    good = (p > 0) & (p <= 2)
    return constant_of_p(
        check_entries(p, good, "p", "lie in (0, 2]", "See `wasserstein_from_lyapunov`.")
    )


@jax.jit
def constant_of_p(p):
    root = jnp.sqrt(1 + 4 * p)
    g, left = (root - 1) / 2, 2 * (2 - p) / (3 + root)  # left = 1 − g
    power = jnp.where(p < 2, jnp.where(p < 2, left, 1) ** (1 - p / 2), 1)
    return 2 * power * (g * g / (1 + g)) ** (p / 2)


def check_symmetric(value: Array, M: Array) -> Array:
    """`value`, if M is symmetric to 1e-5."""
    size, defect = jnp.linalg.norm(M), jnp.linalg.norm(M - M.T)
    return refuse(
        value,
        ~(defect <= 1e-5 * size),
        "Arguments `Q`, `K`, `V` must have M = VKᵀQ symmetric to 1e-05, but its symmetry defect "
        f"‖M − Mᵀ‖ is {shown(defect)} with ‖M‖ = {shown(size)}. Without symmetry E_p may grow and "
        "π_E#µ₀ is no limit; use `alignment_rates` or `stability_bound`.",
    )
