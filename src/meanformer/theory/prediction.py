"""One report of all phases: what the theory expects of (Q, K, V, β) from a law of n tokens."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from .. import sphere
from ..checks import ArrayLike, check_count, check_finite, check_scalar, is_traced
from ..matrices import check_matrices, key_query_value, matmul
from ..measures import (
    AbstractLaw,
    AbstractZonalLaw,
    AzimuthElevation,
    Empirical,
    HeatKernel,
    Mixture,
    Uniform,
    VonMisesFisher,
    WrappedNormal,
)
from .alignment import (
    AlignmentRates,
    DominantSpace,
    alignment_quantiles,
    alignment_rates,
    dominant_eigenspace,
)
from .assumptions import (
    ScalarOnDominant,
    Verdict,
    invertible_product,
    scalar_on_dominant,
    symmetric_dominance,
)
from .heat_end import (
    cluster_density,
    enough_degrees,
    heat_phase_end,
    noise_time,
    sampling_noise,
)
from .merging import MergeSequence, all_merges
from .metastability import most_unstable
from .pairing import merge_time
from .stationary import bipartite_rates, consensus_rates

_CLUSTERS = 64  # an `Empirical` of at most so many tokens counts as clusters
_CONTACT = 1e-2  # the angle at which clusters count as merged, or .1/√κ if less


class AlignmentPhase(eqx.Module):
    """Tokens fall onto E, in times O(1).

    - `occurs`, `reason`: whether, and why not (or what to keep in mind).
    - `gap`: of the real parts of the eigenvalues of M; `rates`: slowest and fastest decay
        rate of the angle to E.
    - `angle`, `probabilities` (q,), `times` (q,): by times[i] a share probabilities[i] of
        the tokens lies within `angle` of E (∞: never).
    - `coldness` (2,): smallest and largest β|Bᵀx| on the sphere. The limit β → ∞ needs it ≫ 1:
        the field is off by (d−1)/(2β|Bᵀx|) for smooth densities.
    - `rotation`: the largest |Im λ| on E; tokens turn at |Im λ|/|Bᵀz| there.
    - `assumes`: what it rests on, as verdicts.
    """

    gap: Float[Array, ""]
    rates: AlignmentRates | None
    angle: Float[Array, ""]
    probabilities: Float[Array, " q"]
    times: Float[Array, " q"] | None
    coldness: Float[Array, " 2"]
    rotation: Float[Array, ""]
    assumes: tuple[Verdict, ...]
    occurs: bool = eqx.field(static=True)
    reason: str = eqx.field(static=True)
    source: str = eqx.field(
        static=True, default="multiscale, Theorem 3.2, Prop. 3.4, Lemmas A.13, A.15"
    )


class HeatPhase(eqx.Module):
    """Clusters narrow (`sign` = +1) or tokens spread (−1) within E, in times O(β).

    - `occurs`, `reason`: whether, and why not.
    - `on_E`: λ₁, λ₂ and the sign of QᵀK|_E = λ₁I, V|_E = ±λ₂I, with the verdict.
    - `time`: how long it lasts: the smaller of `collapse` and `noise` if the sign is +1;
        βλ₁/(λ₂(dim E − 1)), the e-folding of the slowest harmonic, if it is −1.
    - `variance` σ² of the narrowest cluster of µ₀ (None: µ₀ has none); `collapse`,
        βλ₁σ²/(2λ₂); `halving`, when its width has halved at finite β, by the Gaussian
        closure ṡ = −2λ₂s/(1 + βλ₁s): (¾βλ₁σ² + ln 4)/(2λ₂).
    - `noise`: when the noise of n tokens has grown to order 1.
    - `limited_by`: "collapse", "noise", or "spreading".
    """

    on_E: ScalarOnDominant
    variance: Float[Array, ""] | None
    time: Float[Array, ""] | None
    collapse: Float[Array, ""] | None
    halving: Float[Array, ""] | None
    noise: Float[Array, ""] | None
    occurs: bool = eqx.field(static=True)
    reason: str = eqx.field(static=True)
    limited_by: str = eqx.field(static=True)
    source: str = eqx.field(
        static=True, default="multiscale, Sec. 3.3, Prop. 3.9; noise: derived"
    )


class PairingPhase(eqx.Module):
    """Clusters merge pair by pair, in times e^{cβ}.

    - `occurs`, `reason`: whether, and why not (or what the clusters are).
    - `merges`: the predicted sequence of merges on E, if µ₀ says where the clusters are; its
        times are those of λ₁ = λ₂ = 1, β → βλ₁: `log_times` has them in time of the flow.
    - `log_times` (m−1,): natural logarithms of the times of the merges since the phase began.
        Where the clusters form by chance: of one merge of neighbours at `angles`.
    - `angles` (m−1,): between the merging clusters; log T ≈ βλ₁(1 − cos angle).
    """

    log_times: Float[Array, " m"] | None
    angles: Float[Array, " m"] | None
    merges: MergeSequence | None
    occurs: bool = eqx.field(static=True)
    reason: str = eqx.field(static=True)
    clusters: int = eqx.field(static=True)
    source: str = eqx.field(
        static=True, default="multiscale, Sec. 3.4, Prop. 3.11; times: derived"
    )


class Prediction(eqx.Module):
    """What `predict` returns: three phases, as numbers and, printed, as text.

    - `space`: the dominant space E of M = VKᵀQ.
    - `alignment`, `heat`, `pairing`: the phases; each has `occurs` and `reason`.
    - `growth`: the largest rate of small deviations from what tokens end in, two antipodal
        clusters if E is a line, one cluster on E otherwise; > 0: it dissolves in the end. None
        where these are not stationary, or tokens form no clusters.
    """

    space: DominantSpace
    alignment: AlignmentPhase
    heat: HeatPhase
    pairing: PairingPhase
    growth: Float[Array, ""] | None
    beta: Float[Array, ""]
    n: int = eqx.field(static=True)
    law: str = eqx.field(static=True)

    def __repr__(self) -> str:
        return _report(self)


def predict(
    Q: ArrayLike,
    K: ArrayLike,
    V: ArrayLike,
    beta: ArrayLike,
    law: Any,
    n: Any,
    *,
    angle: ArrayLike = 0.1,
    probabilities: ArrayLike = (0.5, 0.9, 0.99),
    tol: float = 1e-5,
    key: PRNGKeyArray | None = None,
) -> Prediction:
    """What the theory expects of self-attention with matrices Q, K, V at inverse temperature β
    for n tokens of law µ₀: which of the three phases occur, when, and what that assumes.

    - **alignment** onto the dominant space E of VKᵀQ, by the zero-temperature flow: times by
      which given shares of µ₀ lie within `angle` of E.
    - **heat** flow on E where QᵀK = λ₁I and V = ±λ₂I there: collapse of the narrowest
      cluster at βλ₁σ²/(2λ₂), or noise of n tokens before; spreading for V = −λ₂I.
    - **pairing** of clusters where V = +λ₂I: the sequence of merges if µ₀ says where clusters
      are (a `Mixture`, or an `Empirical` of at most 64 tokens), else of neighbours at the
      wavelength 2π/k_max of the fastest mode.

    Times are in units of the flow, those of a phase counted from its begin; logarithms are
    natural. Printed, the result is a report; as data, a pytree of numbers.

    **Arguments:** `Q`, `K` (k, d), `V` (d, d); `beta` > 0; `law`, a law or an `Empirical` on
    the same sphere; `n` ≥ 1 tokens (for the noise); `angle` in radians, `probabilities` in
    [0, 1] of the alignment times; `tol`, within which matrices count as symmetric or as
    multiples of I; `key`, for the tokens that stand for a law in the alignment times
    (default `jax.random.key(0)`): 4096 for d ≤ 8, 512 for d ≥ 64, so that a time of
    probability p is that of p ± √(p(1−p)/4096).

    Differentiable in Q, K, V, β and the law (E moves with the matrices); which phases occur
    is decided by values, so that it cannot be traced by `jit` or `vmap`. Under a second for
    d ≤ 64 once compiled.

    **Raises:** `ValueError` for matrices that do not fit, β ≤ 0, a law on another sphere, or
    traced arguments. **Source:** each phase names its own.
    """
    Q, K, V = check_matrices(Q, K, V)
    beta = check_scalar(beta, "beta", minimum=0.0, strict=True, cure=_COLD).astype(
        Q.dtype
    )
    n = check_count(n, "n")
    law = _check_law(law, V.shape[0])
    if is_traced(_fixed(Q), _fixed(K), _fixed(V), _fixed(beta)):
        raise ValueError(
            "Arguments `Q`, `K`, `V`, `beta` must have values that can be read, because they "
            "decide which phases occur. Use `predict` outside of `jit` and `vmap`; the "
            "functions that it is made of work inside."
        )
    space = dominant_eigenspace(Q, K, V, dim=_dimension(Q, K, V))
    on_E = scalar_on_dominant(Q, K, V, space, tol=tol)
    clusters = _clusters(law)
    return Prediction(
        space=space,
        alignment=_alignment(
            Q, K, V, beta, space, _tokens(law, key), angle, probabilities, tol
        ),
        heat=_heat(space, on_E, beta, n, clusters, _smooth(law)),
        pairing=_pairing(space, on_E, beta, clusters),
        growth=_growth(Q, K, V, beta, space, on_E),
        beta=beta,
        n=n,
        law=_name(law),
    )


_COLD = "The phases are those of large β."
_fixed = jax.lax.stop_gradient


def _check_law(law: Any, d: int) -> AbstractLaw | Empirical:
    if not isinstance(law, AbstractLaw | Empirical):
        raise ValueError(
            f"Argument `law` must be a law or an `Empirical`, but is a {type(law).__name__}. "
            "For example `Uniform(3)`, or `Empirical(points)`."
        )
    if law.d != d:
        raise ValueError(
            f"Argument `law` must be a measure on S^(d−1) with d = {d} to fit the matrices, "
            f"but has d = {law.d}."
        )
    return law


def _dimension(Q: Array, K: Array, V: Array) -> int:
    """dim E, from values."""
    return dominant_eigenspace(_fixed(Q), _fixed(K), _fixed(V)).dim


def _tokens(law: AbstractLaw | Empirical, key: PRNGKeyArray | None) -> Empirical:
    """Tokens that stand for µ₀ in the alignment times, fewer where each costs d²."""
    if isinstance(law, Empirical):
        return law
    count = min(4096, max(512, 2**15 // law.d))
    return Empirical(law.sample(jr.key(0) if key is None else key, count), check=False)


# ------------------------------------------------------------------ the three phases


def _alignment(Q, K, V, beta, space, tokens, angle, probabilities, tol) -> AlignmentPhase:
    d = V.shape[0]
    invertible = invertible_product(Q, K)
    symmetric = symmetric_dominance(Q, K, V, space, tol=tol).verdict
    B = key_query_value(Q, K, V)[0]
    singular = jnp.linalg.svd(B, compute_uv=False)
    angle = check_scalar(angle, "angle", minimum=0.0, strict=True).astype(Q.dtype)
    probabilities = check_finite(probabilities, "probabilities", (None,)).astype(Q.dtype)
    eigenvalues = space.eigenvalues[: space.dim]
    times = rates = None
    if not invertible:
        reason = "QᵀK is singular: KᵀQx/|KᵀQx| has no limit where KᵀQx = 0"
    elif space.dim == d:
        reason = "E is everything: all eigenvalues of VKᵀQ have one real part"
    else:
        reason = ""
        times = alignment_quantiles(tokens, angle, Q, K, V, probabilities, dim=space.dim)
        rates = alignment_rates(Q, K, V, dim=space.dim)
    return AlignmentPhase(
        gap=space.gap,
        rates=rates,
        angle=angle,
        probabilities=probabilities,
        times=times,
        coldness=beta * jnp.stack([singular[-1], singular[0]]),
        rotation=jnp.max(jnp.abs(eigenvalues.imag)),
        assumes=(invertible, symmetric),
        occurs=times is not None,
        reason=reason,
    )


def _heat(space, on_E, beta, n, clusters, smooth: bool) -> HeatPhase:
    k = space.dim
    spreads = bool(_fixed(on_E.sign) < 0)
    reason, limited_by = "", ""
    variance = time = collapse = halving = noise = None
    kappa = _fixed(beta * on_E.lambda1)
    if k == 1:
        reason = "E is a line, on which tokens are two points"
    elif not on_E:
        reason = f"{on_E.verdict}; tokens drift within E on the scale O(1) instead"
    elif not smooth:
        reason = "µ₀ is a few tokens, not a density"
    elif spreads:
        time = beta * on_E.lambda1 / (on_E.lambda2 * (k - 1))
        limited_by = "spreading"
    else:
        peak = None
        if clusters is not None:
            narrowest = int(jnp.argmin(_fixed(clusters.variances)))
            variance = clusters.variances[narrowest]
            peak = cluster_density(variance, k, clusters.weights[narrowest])
        degrees = enough_degrees(float(kappa), k)
        seen = sampling_noise(
            n, kappa, k, density=jax.tree.map(_fixed, peak), degrees=degrees
        )
        scales = {"density": peak, "degrees": degrees}
        scales |= {"lambda1": on_E.lambda1, "lambda2": on_E.lambda2}
        if bool(seen >= 1):
            reason = "n tokens are fewer than the waves that attention at this β resolves"
        elif variance is None:
            time = noise = noise_time(n, beta, k, **scales)
            limited_by = "noise"
        else:
            end = heat_phase_end(variance, n, beta, k, **scales)
            time, collapse, noise = end.time, end.collapse, end.noise
            limited_by = end.reason
            size = beta * on_E.lambda1 * variance
            halving = (0.75 * size + math.log(4)) / (2 * on_E.lambda2)
    return HeatPhase(
        on_E=on_E,
        variance=variance,
        time=time,
        collapse=collapse,
        halving=halving,
        noise=noise,
        occurs=time is not None,
        reason=reason,
        limited_by=limited_by,
    )


def _pairing(space, on_E, beta, clusters) -> PairingPhase:
    merges = log_times = angles = None
    count = 0
    kappa = beta * on_E.lambda1
    contact = min(_CONTACT, 0.1 / math.sqrt(max(float(_fixed(kappa)), 1.0)))
    if space.dim == 1:
        reason = "tokens end at two antipodal points"
    elif not on_E:
        reason = f"{on_E.verdict}; clusters drift within E on the scale O(1)"
    elif bool(_fixed(on_E.sign) < 0):
        reason = "V = −λ₂I on E: tokens repel each other and form no clusters"
    elif clusters is not None and len(clusters.weights) == 1:
        count, reason = 1, "µ₀ is one cluster already"
    elif clusters is None or (points := clusters.on(space)) is None:
        count = int(most_unstable(_fixed(kappa), space.dim, "sa").k_max)
        if count <= 2:
            reason = f"the fastest mode is {count}: one cluster, or two antipodal ones"
        else:
            reason = (
                f"clusters form by chance, neighbours about 2π/{count} apart (the fastest mode "
                "of the uniform law); the time is that of two such neighbours"
            )
            angles = jnp.full(1, 2 * math.pi / count, beta.dtype)
            log_times = merge_time(angles, contact, kappa, log=True)
    else:
        count, reason = len(points), "clusters where µ₀ has them, with its weights"
        merges = all_merges(points, clusters.weights, kappa, contact)
        happen = int(jnp.sum(_fixed(merges.log_times) < jnp.inf))
        merges = jax.tree.map(lambda a: a[:happen], merges)
        log_times, angles = merges.log_times, merges.angles
        if happen < count - 1:
            reason += "; in the end two are antipodal, and rest"
        if happen == 0:
            merges = log_times = angles = None
            reason = "the two clusters are antipodal, and rest"
    return PairingPhase(
        log_times=None if log_times is None else log_times - jnp.log(on_E.lambda2),
        angles=angles,
        merges=merges,
        occurs=log_times is not None,
        reason=reason,
        clusters=count,
    )


def _growth(Q, K, V, beta, space, on_E) -> Array | None:
    """The largest rate of deviations from what tokens of E end in, if E has eigenvectors of
    V and attracts."""
    z = space.basis[:, 0]
    if space.dim > 1 and (not on_E or bool(_fixed(on_E.sign) < 0)):
        return None
    Vz = _fixed(matmul(V, z))
    if not jnp.linalg.norm(sphere.project(z, Vz)) <= 1e-5 * jnp.linalg.norm(_fixed(V)):
        return None
    if space.dim == 1:
        return bipartite_rates(z, Q, K, V, beta).growth
    return consensus_rates(z, V).growth


# ------------------------------------------------------------------ what µ₀ says of clusters


class _Clusters(eqx.Module):
    """Centres, weights and variances per tangent direction."""

    means: Float[Array, "m d"]
    weights: Float[Array, " m"]
    variances: Float[Array, " m"]

    def on(self, space: DominantSpace) -> Array | None:
        """The centres on E, or None if alignment tears one apart because it lies off E."""
        y = matmul(self.means, space.spectral.T.astype(self.means.dtype))
        near = jnp.linalg.norm(_fixed(y), axis=-1)
        return sphere.normalise(y) if bool(jnp.all(near > 0.1)) else None


def _clusters(law) -> _Clusters | None:
    """The clusters of which µ₀ is made, if it is made of any."""
    if isinstance(law, Empirical):
        if law.n > _CLUSTERS:
            return None
        some = np.flatnonzero(np.asarray(_fixed(law.weights)) > 0)
        weights = law.weights[some]
        return _Clusters(law.points[some], weights, jnp.zeros_like(weights))
    if isinstance(law, AbstractZonalLaw):
        variance = _variance(law)
        if variance is None:
            return None
        return _Clusters(law.mean[None], jnp.ones(1, law.mean.dtype), variance[None])
    if isinstance(law, AzimuthElevation):
        ring = _clusters(law.azimuth)
        if ring is None:
            return None
        means = jnp.pad(ring.means, ((0, 0), (0, 1)))
        return _Clusters(means, ring.weights, ring.variances)
    if isinstance(law, Mixture):
        shares = [w for w in law.weights if bool(_fixed(w) > 0)]
        laws = [c for w, c in zip(law.weights, law.components) if bool(_fixed(w) > 0)]
        found = [_clusters(c) for c in laws]
        parts = [p for p in found if p is not None]
        if len(parts) < len(found):
            return None
        return _Clusters(
            jnp.concatenate([p.means for p in parts]),
            jnp.concatenate([w * p.weights for w, p in zip(shares, parts)]),
            jnp.concatenate([p.variances for p in parts]),
        )
    return None


def _variance(law: AbstractZonalLaw) -> Array | None:
    """Variance per tangent direction; e^{κ⟨m,x⟩} counts as the Gaussian that it resembles."""
    if isinstance(law, HeatKernel):
        return 2 * law.s
    if isinstance(law, WrappedNormal):
        return law.sigma**2
    if isinstance(law, VonMisesFisher) and bool(_fixed(law.kappa) > 1):
        return 1 / law.kappa
    return None


def _smooth(law) -> bool:
    """Whether a density stands behind µ₀."""
    return not isinstance(law, Empirical) or law.n > _CLUSTERS


def _name(law) -> str:
    if isinstance(law, Uniform):
        return f"Uniform(d={law.d})"
    if isinstance(law, Empirical):
        return f"Empirical of {law.n} tokens, d = {law.d}"
    if isinstance(law, Mixture):
        return f"Mixture of {len(law.components)} laws, d = {law.d}"
    return f"{type(law).__name__}, d = {law.d}"


# ------------------------------------------------------------------ as text


def _report(p: Prediction) -> str:
    if is_traced(p):
        return "Prediction(traced)"
    lines = [
        f"Predicted phases of {p.n} tokens, µ₀ = {p.law}, β = {float(p.beta):.4g}",
        f"E: dimension {p.space.dim} of {p.space.projector.shape[0]}, eigenvalues of VKᵀQ "
        + ", ".join(_number(e) for e in np.asarray(p.space.eigenvalues)[:6])
        + (", …" if p.space.projector.shape[0] > 6 else ""),
        "",
        "1. Alignment: tokens fall onto E, times O(1)",
        *_say_alignment(p.alignment),
        "",
        "2. Heat: the law on E narrows or spreads, times O(β)",
        *_say_heat(p.heat),
        "",
        "3. Pairing: clusters merge, times e^{cβ}",
        *_say_pairing(p.pairing),
    ]
    if p.growth is not None:
        lines += ["", f"In the end: {_fate(p.space.dim, float(p.growth))}."]
    return "\n".join(lines)


def _fate(dim: int, rate: float) -> str:
    two = dim == 1
    what = "two antipodal clusters" if two else "one cluster on E"
    if rate > 1e-6:
        return (
            f"{what} dissolve{'' if two else 's'} at rate {rate:.3g}, towards the leading "
            "eigenvector of V"
        )
    return f"{what}, stable" + ("" if rate < -1e-6 else " (neutral within E)")


def _number(z: complex) -> str:
    z = complex(z)
    if abs(z.imag) < 1e-9 * max(abs(z), 1e-300):
        return f"{z.real:.4g}"
    return f"{z.real:.4g}{z.imag:+.4g}i"


def _say_alignment(a: AlignmentPhase) -> list[str]:
    if not a.occurs or a.times is None:
        return [f"   does not occur: {a.reason}."]
    out = [
        f"   {100 * float(q):g} % within {float(a.angle):g} rad of E at t = {float(t):.3g}"
        for q, t in zip(a.probabilities, a.times)
    ]
    if a.rates is not None:
        out.append(
            f"   then angles to E decay at rates {float(a.rates.slowest):.3g} to "
            f"{float(a.rates.fastest):.3g} (gap {float(a.gap):.3g})"
        )
    if a.rotation > 1e-9:
        out.append(f"   tokens keep turning on E: |Im λ| up to {float(a.rotation):.3g}")
    cold, hot = (float(c) for c in a.coldness)
    out.append(f"   assumes zero temperature: β|KᵀQx| ≫ 1, it is {cold:.3g} to {hot:.3g}")
    out += [f"   {v}" for v in a.assumes]
    return [*out, f"   from {a.source}"]


def _say_heat(h: HeatPhase) -> list[str]:
    if not h.occurs or h.time is None:
        return [f"   does not occur: {h.reason}."]
    if h.limited_by == "spreading":
        first = f"   spreads: the slowest harmonic decays by e in t = {float(h.time):.3g}"
    else:
        first = f"   clusters form by t = {float(h.time):.3g}, limited by {h.limited_by}"
    out = [first]
    if h.variance is not None and h.collapse is not None and h.halving is not None:
        out.append(
            f"   collapse of the narrowest cluster (σ² = {float(h.variance):.3g}) at "
            f"t = {float(h.collapse):.3g}"
        )
        out.append(
            f"   its width has halved by t = {float(h.halving):.3g} (Gaussian closure: at any β; "
            f"the heat flow needs βλ₁σ² ≫ 1)"
        )
    if h.noise is not None:
        out.append(f"   noise of the sample reaches order 1 at t = {float(h.noise):.3g}")
    return [*out, f"   {h.on_E.verdict}", f"   from {h.source}"]


def _say_pairing(p: PairingPhase) -> list[str]:
    if not p.occurs or p.log_times is None or p.angles is None:
        return [f"   does not occur: {p.reason}."]
    out = [f"   {p.reason}"]
    shown_ = list(zip(p.log_times, p.angles))
    for log_t, angle in shown_[:6]:
        out.append(f"   merge over {float(angle):.3g} rad at t = {_power(float(log_t))}")
    if len(shown_) > 6:
        out.append(f"   … the last at t = {_power(float(p.log_times[-1]))}")
    return [*out, f"   from {p.source}"]


def _power(log_t: float) -> str:
    """e^{log_t} as a decimal number, however large."""
    if log_t == -math.inf:
        return "0"
    digits = log_t / math.log(10)
    if abs(digits) < 5:
        return f"{math.exp(log_t):.3g}"
    power = math.floor(digits)
    return f"{10 ** (digits - power):.2f}·10^{power}"
