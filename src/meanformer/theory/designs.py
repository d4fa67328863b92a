"""Symmetry on S^{d−1}, d ≥ 3: spherical designs, and why one degree feeds others.

On S¹ the laws of period 2π/k are invariant under the flow. *metastable*, Sec. 4.4 and App. D,
puts in their place H_k, the laws whose harmonics of degrees not divisible by k vanish. For d ≥ 3
H_k is invariant only for k = 1 (all laws) and k = 2 (laws symmetric under x → −x): a product
of two harmonics of degree k has parts of all even degrees up to 2k, not only 2k, and for k ≥ 3
the part of degree 2 leaves H_k at second order (`leakage`)."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.special import roots_jacobi

from .. import harmonics, sphere
from ..checks import ArrayLike, check_count, check_scalar
from ..matrices import matmul
from ..measures import check_weights


class DesignStrength(eqx.Module):
    """How far a measure agrees with the uniform law, degree by degree.

    - `strength`: the largest t such that all harmonics of degrees 1 … t average to 0 (at
        most the `degree` that was looked at).
    - `residuals` (degree,): for l = 1 … degree the mean over the harmonics Y of degree l,
        of mean square 1, of (∫Y dµ)²: 0 in a design, 1 for a single point.
    """

    strength: Int[Array, ""]
    residuals: Float[Array, " degree"]


def design_strength(
    points: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    degree: int = 12,
    tol: ArrayLike | None = None,
) -> DesignStrength:
    """The strength of a weighted set of points as a spherical design:

        residual_l = ∬ P_l(⟨x,y⟩) dµ(x) dµ(y) = Σᵢⱼ wᵢ wⱼ P_l(⟨xᵢ,xⱼ⟩),

    with the zonal polynomials P_l(1) = 1 of S^{d−1}, by the addition theorem; degrees with
    √residual ≤ `tol` count as 0 (default √(1000 eps): 5e-7, or 1e-2 in float32).

    k clusters that grow out of degree k of the uniform law would be a design of strength
    k − 1 if H_k was invariant (*metastable*, after Thm 4.7). Points along a closed curve are
    taken as they are (its Fig. 6).

    **Arguments:** `points` (n, d), any d ≥ 2; `weights` (n,) default equal. Time O(n²
    degree), memory O(n degree). Residuals are differentiable in points and weights.

    **Source:** *metastable*, Sec. 4.4; the sum is the classical criterion of Delsarte,
    Goethals and Seidel."""
    x = sphere.check_tokens(points, "points")
    n, d = x.shape
    w = jnp.full(n, 1 / n) if weights is None else check_weights(weights, "weights", n)
    if tol is None:
        tol = float(np.sqrt(1e3 * jnp.finfo(x.dtype).eps))
    level = check_scalar(tol, "tol", minimum=0.0) ** 2
    residuals = _residuals(x, w.astype(x.dtype), d, check_count(degree, "degree"))
    return DesignStrength(jnp.sum(jnp.cumprod(residuals <= level)), residuals)


@functools.partial(jax.jit, static_argnames=("d", "degree"))
def _residuals(x: Array, w: Array, d: int, degree: int) -> Array:
    def row(xi):
        return matmul(w, harmonics.gegenbauer(d, degree, matmul(x, xi))[:, 1:])

    return matmul(w, jax.lax.map(row, x))


def triple_product(d: int, a: int, b: int, c: int) -> Float[Array, ""]:
    """∫₋₁¹ P_a P_b P_c (1−q²)^{(d−3)/2} dq of the zonal polynomials of S^{d−1}, P_l(1) = 1.

    It is > 0 if a + b + c is even and |a−b| ≤ c ≤ a+b (d = 2: only for c = |a−b| or a+b), else 0:
    on S² ∫P₃P₃P₂ = 8/105 = 0.0762. Gauss–Jacobi quadrature, exact to rounding. **Source:**
    *metastable*, App. D, whose identity keeps c = a + b only."""
    d = sphere.check_dimension(d)
    degrees = [check_count(l, name, 0) for l, name in ((a, "a"), (b, "b"), (c, "c"))]
    P, w = _zonal(d, max(degrees), sum(degrees))
    return jnp.asarray(w @ (P[:, a] * P[:, b] * P[:, c]))


def _zonal(d: int, degree: int, exact: int) -> tuple[np.ndarray, np.ndarray]:
    """P_0 … P_degree at the nodes, and the weights, of a Gauss rule of that exactness."""
    exponent = (d - 3) / 2
    q, w = roots_jacobi(exact // 2 + 1, exponent, exponent)
    return np.asarray(harmonics.gegenbauer(d, degree, q)), w


class Leakage(eqx.Module):
    """What a zonal perturbation of degree k feeds at second order; one entry per degree
    l = 0, 2, …, 2k.

    - `degrees`: l.
    - `product`: c_l in P_k² = Σ_l c_l P_l, all > 0 for d ≥ 3.
    - `feed`: ρ̇_l = γ_l ρ_l + feed_l γ_k a² for µ = µ_∞(1 + a P_k + Σ_l ρ_l P_l).
    - `share`: part of ‖Σ_l feed_l P_l‖²_{L²} in degrees that k does not divide.
    """

    degrees: Int[Array, " l"]
    product: Float[Array, " l"]
    feed: Float[Array, " l"]
    share: Float[Array, ""]


def leakage(k: int, d: int = 3) -> Leakage:
    """How much a perturbation a·P_k(⟨x,e⟩) of the uniform law on S^{d−1} drives other
    degrees at second order in a, under (USA) or any kernel W:

        −div(µ∇(W*µ))_l = feed_l γ_k a²,    feed_l = l(l+d−2) c_l / (2k(k+d−2)),

    since ρ∇(W*ρ) = (λ_k/2)∇ρ² for ρ of one degree. W enters through γ_k only.

    H_k is left as soon as some l not divisible by k has c_l ≠ 0: never for d = 2 (c_l ≠ 0
    for l = 0 and 2k only) and for k = 1, 2; always, in degree 2, for k ≥ 3 and d ≥ 3. On S²
    k = 3 feeds degrees 2 and 4.

    **Source:** derived; *metastable*, Sec. 4.4 and App. D, asserts that nothing leaks."""
    d, k = sphere.check_dimension(d), check_count(k, "k")
    P, w = _zonal(d, 2 * k, 4 * k)
    l = np.arange(0, 2 * k + 1, 2)
    norms = w @ P[:, l] ** 2
    product = (w * P[:, k] ** 2) @ P[:, l] / norms
    if d == 2:  # cos² kθ = (1 + cos 2kθ)/2, without rounding
        product = np.where((l == 0) | (l == 2 * k), 0.5, 0.0)
    feed = l * (l + d - 2) / (2 * k * (k + d - 2)) * product
    power = feed**2 * norms
    share = np.sum(power[l % k != 0]) / np.sum(power)
    return Leakage(*map(jnp.asarray, (l, product, feed, share)))
