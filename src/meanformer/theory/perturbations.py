"""Perturbations of the uniform law given by their harmonics: the linear flow, norms, and the
times at which a sample of tokens is seen to cluster. Rates come from `metastability`."""

import functools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float, Inexact, Int

from .. import sphere
from ..checks import (
    ArrayLike,
    as_float,
    check_count,
    check_finite,
    check_scalar,
    nearest,
    refuse,
    shown,
)
from ..matrices import matmul
from ..measures import check_weights
from .metastability import check_degrees, growth_rates, most_unstable


def fourier_coefficients(
    theta: ArrayLike, degree: int, weights: ArrayLike | None = None
) -> Complex[Array, " k"]:
    """µ̂_k = ∫e^{−ikθ}dµ = Σⱼ wⱼ e^{−ikθⱼ} for k = 0 … `degree`, of weighted angles (n,).
    The density is (1/2π) Σ_{k∈Z} µ̂_k e^{ikθ}. Weights (default equal) are scaled to sum 1.

    O(n) memory. **Source:** *metastable*, Eq. (22), up to its factor 1/2π."""
    theta = check_finite(theta, "theta", (None,))
    n = theta.shape[0]
    w = jnp.full(n, 1 / n) if weights is None else check_weights(weights, "weights", n)
    return _fourier(theta, w.astype(theta.dtype), check_count(degree, "degree", 0))


@functools.partial(jax.jit, static_argnames="degree")
def _fourier(theta: Array, weights: Array, degree: int) -> Array:
    def one(k):
        phase = k * theta
        return jax.lax.complex(
            matmul(weights, jnp.cos(phase)), -matmul(weights, jnp.sin(phase))
        )

    return jax.lax.map(one, jnp.arange(degree + 1, dtype=theta.dtype))


def cluster_positions(coefficient: ArrayLike, k: int) -> Float[Array, "... k"]:
    """(2πj − arg µ̂_k)/k, j = 0 … k−1, in [−π, π]: where k clusters form, from the initial
    Fourier coefficient µ̂_k of the dominant mode, 2|µ̂_k| cos(kθ + arg µ̂_k).

    **Arguments:** `coefficient`, complex, any shape, not 0 (no position is preferred then).
    **Source:** the notebook of *metastable*'s authors; derived from its Eqs. (22), (8)."""
    c, k = _check_coefficients(coefficient, "coefficient"), check_count(k, "k")
    c = refuse(
        c,
        c == 0,
        "Argument `coefficient` must not be 0, because the phase of the mode decides where "
        "clusters form. Perturb the law.",
    )
    shift = -jnp.angle(c)[..., None] / k
    positions = shift + 2 * jnp.pi * jnp.arange(k, dtype=shift.dtype) / k
    return jnp.mod(positions + jnp.pi, 2 * jnp.pi) - jnp.pi


def linear_flow(
    coefficients: ArrayLike,
    t: ArrayLike,
    beta: ArrayLike,
    d: int = 2,
    *,
    model: str = "usa",
    degrees: ArrayLike | None = None,
) -> Inexact[Array, "... c"]:
    """The linearised flow around the uniform law: harmonic coefficients times e^{γ_k t}.

    **Arguments:**

    - `coefficients` (..., c), real or complex, of µ or of µ − µ_∞ (γ_0 = 0).
    - `t`: a time, also negative (smooth data only: modes shrink backwards).
    - `degrees` (c,): the degree of each coefficient. Default 0 … c−1: Fourier coefficients
        on S¹, zonal ones in any d. For all harmonics of S² (index l² + l + m) give
        floor(√index).

    **Raises:** `ValueError` where e^{γ_k t} overflows; the linear flow ends long before.
    **Source:** *metastable*, Eq. (22), and App. D for d ≥ 3."""
    c = _check_coefficients(coefficients)
    t = check_scalar(t, "t")
    beta = check_scalar(beta, "beta", minimum=0.0)
    k = _degrees(degrees, c, 2)
    rates = growth_rates(beta, d, k, model)
    exponent = (rates * t).astype(jnp.real(c).dtype)
    exponent = refuse(
        exponent,
        ~(exponent <= math.log(jnp.finfo(exponent.dtype).max) - 1),
        "Argument `t` must be such that e^{γt} does not overflow, but is too long for the "
        "largest rate. The linear flow holds while coefficients are small: use `exit_times`.",
    )
    return jnp.exp(exponent) * c


_NORMS = ("fourier", "dual", "homogeneous")


def sobolev_norm(
    coefficients: ArrayLike,
    s: ArrayLike = 1.0,
    d: int = 2,
    *,
    definition: str = "fourier",
    degrees: ArrayLike | None = None,
) -> Float[Array, "..."]:
    """‖µ − µ_∞‖ in H^{−s}(S^{d−1}), from the harmonic coefficients of µ.

    - "fourier": (Σ_{k≠0} |µ̂_k|² (1+k²)^{−s})^{1/2} over k ∈ Z, with µ̂_k = ∫e^{−ikθ}dµ.
    - "dual": sup{∫v dµ : ‖v‖_{H^s} = 1}, which is "fourier"/√(2π).
    - "homogeneous": as "fourier" with k² for 1 + k².

    In any d, 1 + k(k+d−2) stands for 1 + k², "dual" is the sum over orthonormal harmonics,
    and "fourier" is √|S^{d−1}| times that. T₁ of `exit_times` depends on the choice.
    For n uniform samples on S¹, E[n ‖·‖²_{H⁻¹}] = π coth π − 1 ("fourier"); it is finite for
    s > (d−1)/2.

    **Arguments:** `coefficients` (..., c): for d = 2 µ̂_0, µ̂_1, … of `fourier_coefficients`
    (those of −k are their conjugates); for d ≥ 3 ∫Y dµ of orthonormal real harmonics, with
    their `degrees` (c,) (default: the index l² + l + m of S²; required for d > 3). Degree 0
    is left out. What is not given is not counted: for n samples on S¹, degrees up to K miss
    about 2/(nK) in the square of the H⁻¹ norm. `s` > 0. Derivative 0 at µ = µ_∞.

    **Source:** *metastable*, App. C.1.1, Eq. (14), Lemma E.3 (which has three norms)."""
    c = _check_coefficients(coefficients)
    d = sphere.check_dimension(d)
    s = check_scalar(s, "s", minimum=0.0, strict=True)
    if definition not in _NORMS:
        raise ValueError(
            f"Argument `definition` must be one of {_NORMS}, but is {definition!r}. "
            + nearest(str(definition), _NORMS)
        )
    k = _degrees(degrees, c, d)
    eigenvalue = np.where(k > 0, k * (k + d - 2.0), 1.0) + (definition != "homogeneous")
    # |ρ_k|² is counted for k and −k on S¹, where it is an average, not an integral.
    twice = (2.0 if d == 2 else sphere.area(d)) * (k > 0)
    factor = twice / (sphere.area(d) if definition == "dual" else 1.0)
    weight = jnp.sqrt(factor) * jnp.asarray(eigenvalue) ** (-s / 2)
    parts = weight.astype(jnp.real(c).dtype) * jnp.stack([jnp.real(c), jnp.imag(c)])
    return sphere.safe_norm(jnp.concatenate([parts[0], parts[1]], axis=-1))


class ExitTimes(eqx.Module):
    """When a perturbation of the uniform law on S¹ is seen. Times are those of the flow.

    - `k_max`, `gamma_max`: the dominant mode and its rate.
    - `norm`: ‖µ_0 − µ_∞‖_{H⁻¹}, in the definition asked for.
    - `epsilon`: radius at which the linear phase ends.
    - `alpha`: |α|, amplitude of the mode then; the density is 1/2π + |α| cos(kθ + phase).
    - `T1`: end of the linear phase. `T2`: of the quasi-linear one, counted from T1.
    """

    k_max: Int[Array, ""]
    gamma_max: Float[Array, ""]
    norm: Float[Array, ""]
    epsilon: Float[Array, ""]
    alpha: Float[Array, ""]
    T1: Float[Array, ""]
    T2: Float[Array, ""]

    @property
    def total(self) -> Float[Array, ""]:
        """T₁ + T₂ = ln(πδ/|µ̂_k|)/γ_max, whatever ε and the norm: the time at which the
        dominant mode alone reaches the amplitude δ."""
        return self.T1 + self.T2


def exit_times(
    coefficients: ArrayLike,
    beta: ArrayLike,
    delta: ArrayLike,
    *,
    n: int | None = None,
    epsilon: ArrayLike | None = None,
    model: str = "usa",
    definition: str = "fourier",
) -> ExitTimes:
    """The durations of the linear and the quasi-linear phase on S¹,

        T₁ = ln(ε/‖µ_0 − µ_∞‖_{H⁻¹})/γ_max,    T₂ = ln(δ/|α|)/γ_max,
        |α| = ε |µ̂_k|/(π ‖µ_0 − µ_∞‖_{H⁻¹}),   k = k_max,

    for an initial law with Fourier coefficients µ̂ (`fourier_coefficients`, up to a degree
    well above k_max). |µ̂_k|/π is the initial amplitude of the mode in the density,
    (1/2π)·2|µ̂_k| cos(kθ + arg µ̂_k).

    **Arguments:** `delta` > 0, the amplitude δ of the density at which the mode is seen
    (1/2π is total modulation); either `n`, the number of tokens, for ε = n^{−1/4}, or
    `epsilon`; `definition` of the norm, see `sobolev_norm`. Only T₁ and T₂, not their sum,
    depend on ε and on the norm.

    **Raises:** `ValueError` (traced: at run time) unless ‖µ_0 − µ_∞‖ < ε, 0 < |α| < δ.
    **Source:** *metastable*, Eqs. (21), (24), Thms 4.2, 4.3, with complex coefficients."""
    c = _check_coefficients(coefficients)
    if c.ndim != 1 or c.shape[0] < 3:
        raise ValueError(
            "Argument `coefficients` must have shape (c,) with c ≥ 3, the coefficients of "
            f"degree 0, 1, …, but has shape {c.shape}. For a batch use `jax.vmap`."
        )
    if (n is None) == (epsilon is None):
        raise ValueError(
            "Exactly one of `n` and `epsilon` must be given: ε = n^(−1/4), or ε itself."
        )
    radius = check_count(n, "n") ** -0.25 if epsilon is None else epsilon
    radius, delta, beta = (
        check_scalar(value, name, minimum=0.0, strict=strict).astype(jnp.real(c).dtype)
        for value, name, strict in (
            (radius, "epsilon", True),
            (delta, "delta", True),
            (beta, "beta", False),
        )
    )
    top = most_unstable(beta, 2, model, degree=c.shape[0] - 1)
    norm = sobolev_norm(c, definition=definition)
    norm = refuse(
        norm,
        ~(norm < radius),
        f"Argument `coefficients` must be of a law within ε of the uniform one, but "
        f"‖µ_0 − µ_∞‖ is {shown(norm)} and ε is {shown(radius)}. Give a larger `epsilon`.",
    )
    alpha = radius * jnp.abs(c[top.k_max]) / (jnp.pi * norm)
    alpha = refuse(
        alpha,
        ~((alpha > 0) & (alpha < delta)),
        f"Argument `delta` must exceed the amplitude |α| > 0 of the dominant mode at T₁, but "
        f"δ is {shown(delta)} and |α| is {shown(alpha)}. Give a larger `delta` or a smaller "
        "`epsilon`.",
    )
    gamma = top.gamma_max
    T1, T2 = jnp.log(radius / norm) / gamma, jnp.log(delta / alpha) / gamma
    return ExitTimes(top.k_max, gamma, norm, radius, alpha, T1, T2)


def _check_coefficients(value: ArrayLike, name: str = "coefficients") -> Array:
    """`value` as finite real or complex numbers."""
    array = jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        array = as_float(array, name)
    return refuse(
        array, ~jnp.isfinite(array), f"Argument `{name}` must be finite, but is not."
    )


def _degrees(degrees: ArrayLike | None, c: Array, d: int) -> np.ndarray:
    """The degree of each coefficient along the last axis of `c`."""
    if c.ndim == 0:
        raise ValueError(
            "Argument `coefficients` must have shape (..., c), but is a scalar."
        )
    count = c.shape[-1]
    if degrees is None:
        if d > 3:
            raise ValueError(
                f"Argument `degrees` must be given for d = {d}: the degree of each coefficient."
            )
        index = np.arange(count)
        return index if d == 2 else np.floor(np.sqrt(index)).astype(int)
    k = check_degrees(degrees, "degrees")
    if k.shape != (count,):
        raise ValueError(
            f"Argument `degrees` must have shape ({count},), one per coefficient, but has "
            f"shape {k.shape}."
        )
    return k
