"""Harmonic analysis on S^{d−1}: zonal polynomials, spherical harmonics, Funk–Hecke.

P_l is the zonal polynomial of degree l of S^{d−1} with P_l(1) = 1: Gegenbauer's, for d = 2
cos(l arccos q), for d = 3 Legendre's. Its three-term recurrence loses digits near q = 1,
where neighbours differ little. Here it runs in differences D_l = P_{l+1} − P_l,

    D_l = (l D_{l−1} − (2l+d−2)(1−q) P_l)/(l+d−2),    P_{l+1} = P_l + D_l,

at |q|, with P_l(−q) = (−1)^l P_l(q).
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.special import roots_jacobi

from . import special, sphere
from .checks import ArrayLike, as_float, check_count, check_kernel, refuse, shown


def harmonic_dimension(d: int, degrees: int) -> np.ndarray:
    """dim of the spherical harmonics of degree l on S^{d−1}, l = 0 … `degrees` − 1."""
    l = np.arange(degrees)
    if d == 2:
        return np.where(l == 0, 1.0, 2.0)
    choose = np.array([float(math.comb(i + d - 3, d - 3)) for i in range(degrees)])
    return (2 * l + d - 2) / (d - 2) * choose


def _differences(d: int, degrees: int) -> np.ndarray:
    """l/(l+d−2) and (2l+d−2)/(l+d−2) for l = 0 … degrees − 1 (d = 2, l = 0: 0 and 1)."""
    l = np.arange(degrees)
    kept = l / np.maximum(l + d - 2, 1)
    return np.stack([kept, 1 + kept])


def _fold(q: Array) -> tuple[Array, Array]:
    """The sign of q (1 at 0) and 1 − |q|, both with the right derivatives."""
    sign = jnp.where(q < 0, -1, 1).astype(q.dtype)
    return sign, 1 - sign * q


@functools.partial(jax.jit, static_argnums=0)
def _zonal_sum(d: int, coefficients: Array, q: Array) -> Array:
    sign, gap = _fold(q)

    def step(carry, row):
        value, difference, total, parity = carry
        c, kept, pulled = row
        total = total + c * parity * value
        difference = kept * difference - pulled * gap * value
        return (value + difference, difference, total, sign * parity), None

    one, zero = jnp.ones_like(q), jnp.zeros_like(q)
    factors = jnp.asarray(_differences(d, coefficients.shape[0]), q.dtype)
    rows = (coefficients, *factors)
    return jax.lax.scan(step, (one, zero, zero, one), rows)[0][2]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _zonals(d: int, degree: int, q: Array) -> Array:
    sign, gap = _fold(q)

    def step(carry, row):
        value, difference, parity = carry
        kept, pulled = row
        difference = kept * difference - pulled * gap * value
        return (value + difference, difference, sign * parity), parity * value

    one = jnp.ones_like(q)
    factors = jnp.asarray(_differences(d, degree + 1), q.dtype)
    values = jax.lax.scan(step, (one, jnp.zeros_like(q), one), tuple(factors))[1]
    return jnp.moveaxis(values, 0, -1)


def gegenbauer_sum(
    d: int, coefficients: Float[Array, " l"], q: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Σ_l c_l P_l(q) with the zonal polynomials of S^{d−1}, for |q| ≤ 1; O(1) memory in l.
    (Where |q| exceeds 1 by rounding it is the polynomial too.)"""
    dtype = jnp.result_type(coefficients, q)
    return _zonal_sum(
        sphere.check_dimension(d), coefficients.astype(dtype), q.astype(dtype)
    )


def gegenbauer(d: int, degree: int, q: ArrayLike) -> Float[Array, "... l"]:
    """P_l(q) of S^{d−1} for l = 0 … degree, along a new last axis; P_l(1) = 1, |P_l| ≤ 1.

    **Arguments:** `d` ≥ 2; `degree` ≥ 0; `q` in [−1, 1], an array. A polynomial in q: all
    derivatives exist, P_l'(1) = l(l+d−2)/(d−1). O(degree) for each q. **Source:**
    DLMF 18.9.1 with 18.7; the recurrence in differences is C. Reinsch's for Chebyshev
    sums."""
    d, degree = sphere.check_dimension(d), check_count(degree, "degree", 0)
    return _zonals(d, degree, as_float(q, "q"))


def zonal(d: int, degree: int, q: ArrayLike) -> Float[Array, "... l"]:
    """Z_l(q) = dim_l P_l(q)/|S^{d−1}| for l = 0 … degree: at q = ⟨x, y⟩ the kernel that
    projects on the harmonics of degree l, Σ_m Y_lm(x) Y_lm(y).

    Arguments as for `gegenbauer`. **Raises:** `ValueError` if a dim_l exceeds the numbers
    of the dtype of q (float32: d = 33, l > 140)."""
    d, degree = sphere.check_dimension(d), check_count(degree, "degree", 0)
    q = as_float(q, "q")
    size = harmonic_dimension(d, degree + 1) / sphere.area(d)
    if size.max() > jnp.finfo(q.dtype).max:
        raise ValueError(
            f"Argument `degree` must be ≤ {int(np.argmax(size > jnp.finfo(q.dtype).max)) - 1} "
            f"for d = {d} in {q.dtype}, but is {degree}: numbers of harmonics overflow. Use "
            "`gegenbauer` and add logarithms of `harmonic_dimension`."
        )
    return jnp.asarray(size, q.dtype) * _zonals(d, degree, q)


# ---------------------------------------------------------------------- on S²


def real_harmonics(x: ArrayLike, degree: int) -> Float[Array, "... lm"]:
    """All real spherical harmonics of S² to `degree`, orthonormal for the surface measure:

        Y_lm = K_lm C_m(x₁, x₂) P_{l−m}(x₃; 2m+3),    C_m = Re (x₁ + i x₂)^m,

    for m > 0 (cos mφ), Im for m < 0 (sin |m|φ), 1 for m = 0, at index l² + l + m of the last
    axis; P(·; d) is `gegenbauer` of S^{d−1}. No sign (−1)^m: Y_{1,−1}, Y_10, Y_11 are
    √(3/4π) times x₂, x₃, x₁.

    **Arguments:** `x`, unit vectors, shape `(..., 3)`; `degree` ≥ 0 (tested to 200). What
    is computed is Y(x/|x|), so that `jax.grad` is the gradient on the sphere, at the poles
    too. O(degree²) time and memory for each x. **Raises:** `ValueError` for rows off the
    sphere. (jax.scipy.special.sph_harm_y is as accurate, but gives one complex number at a
    time, for angles, with NaN for derivatives at the poles.)

    (Derived: d^m P_l/dz^m is the zonal polynomial of degree l − m for d = 2m+3 up to a
    factor; K_{l+1,m}/K_lm = √((2l+3)(l+1+m)/((2l+1)(l+1−m))) keeps C_m K_lm in range.)"""
    degree = check_count(degree, "degree", 0)
    x = as_float(x, "x")
    if x.ndim == 0 or x.shape[-1] != 3:
        raise ValueError(
            f"Argument `x` must be points of S², shape (..., 3), but has shape {x.shape}. On "
            "other spheres use `zonal`."
        )
    return _real_harmonics(sphere.check_tokens(x.reshape(-1, 3)).reshape(x.shape), degree)


def _harmonic_tables(degree: int) -> list[np.ndarray]:
    """For l = 0 … degree (rows) and m: what starts at l = m, K_l/K_{l−1}, the two factors
    of `_differences` for dimension 2m+3 and degree l − m; and whether l − m is odd."""
    l, m = np.ogrid[: degree + 1, : degree + 1]
    below = np.arange(1, degree + 1)
    first = np.cumprod(np.append(0.5, (2 * below - 1) / (2 * below))) * (2 * m[0] + 1)
    first = np.sqrt(first / math.pi / np.where(m[0] == 0, 2, 1))
    steps = np.maximum(l - m, 1)
    ratio = np.sqrt((2 * l + 1) * (l + m) / (np.maximum(2 * l - 1, 1) * steps))
    here = l >= m
    return [
        np.where(l == m, first, 0),
        np.where(l > m, ratio, 0),
        np.where(here, (l - m) / (l + m + 1), 0),
        np.where(here, (2 * l + 1) / (l + m + 1), 0),
        (l - m) % 2 == 1,
    ]


@functools.partial(jax.jit, static_argnums=1)
def _real_harmonics(x: Array, degree: int) -> Array:
    x = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    east, north, up = x[..., 0], x[..., 1], x[..., 2, None]
    sign, _ = _fold(up)
    # 1 − |x₃| from x₁ and x₂: near the poles x₃ has lost it.
    gap = (east**2 + north**2)[..., None] / (1 + sign * up)

    def step(carry, row):
        value, difference, wave = carry  # cos and sin first, m last; wave = C_l
        start, grow, kept, pulled, odd = row
        value = grow * (value + difference) + start * wave[..., None]
        difference = kept * grow * difference - pulled * gap * value
        wave = jnp.stack(
            [wave[0] * east - wave[1] * north, wave[0] * north + wave[1] * east]
        )
        return (value, difference, wave), jnp.where(odd, sign, 1) * value

    blank = jnp.zeros((2, *x.shape[:-1], degree + 1), x.dtype)
    # C_l underflows where Y_lm, which grows from it, need not: it is carried magnified.
    magnified = 2.0 ** (jnp.finfo(x.dtype).maxexp // 2)
    wave = jnp.stack([jnp.full_like(east, magnified), jnp.zeros_like(east)])
    *tables, odd = _harmonic_tables(degree)
    rows = (*(jnp.asarray(table, x.dtype) for table in tables), odd)
    values = jax.lax.scan(step, (blank, blank, wave), rows)[1]
    l = np.repeat(np.arange(degree + 1), 2 * np.arange(degree + 1) + 1)
    m = np.arange((degree + 1) ** 2) - l**2 - l
    values = values[l, (m < 0).astype(int), ..., np.abs(m)] / magnified
    return jnp.moveaxis(values, 0, -1)


# ---------------------------------------------------------------------- Funk–Hecke


def _zonals_at(d: int, degree: int, theta: np.ndarray) -> np.ndarray:
    """P_l(cos θ), l = 0 … degree along the first axis, for angles θ in [0, π/2], which say
    more of 1 − q than q does."""
    pull = 2 * np.sin(theta / 2) ** 2
    values, difference = [np.ones_like(theta)], np.zeros_like(theta)
    for kept, pulled in _differences(d, degree).T:
        difference = kept * difference - pulled * pull * values[-1]
        values.append(values[-1] + difference)
    return np.stack(values)


def _gauss(d: int, nodes: int, degree: int) -> tuple[np.ndarray, ...]:
    """The Gauss rule of S^{d−1} for functions of q: nodes q, weights of sum |S^{d−1}|, and
    P_l(q), l = 0 … degree. SciPy's nodes (absolute precision) are made relatively precise
    near q = ±1 by Newton's steps in the angle; the weights are ∝ (dP_n/dθ)⁻²."""
    q, _ = roots_jacobi(nodes, (d - 3) / 2, (d - 3) / 2)
    theta, sign = np.arccos(np.abs(q)), np.where(q < 0, -1, 1)

    def value_and_slope():
        below, value = _zonals_at(d, nodes, theta)[-2:]
        return value, nodes * (np.cos(theta) * value - below) / np.sin(theta)

    for _ in range(2):
        value, slope = value_and_slope()
        theta = theta - value / slope
    w = value_and_slope()[1] ** -2.0
    signs = sign ** np.arange(degree + 1)[:, None]
    table = signs * _zonals_at(d, degree, theta)
    return sign * np.cos(theta), w * (sphere.area(d) / w.sum()), table


def funk_hecke(
    W: Callable[[Array], Array], d: int, degree: int, nodes: int | None = None
) -> Float[Array, " l"]:
    """Eigenvalues λ_l, l = 0 … degree, of the zonal kernel W(⟨x, y⟩) on S^{d−1}:

        ∫ W(⟨x,y⟩) Y_l(y) dy = λ_l Y_l(x),
        λ_l = |S^{d−2}| ∫ W(q) P_l(q) (1−q²)^{(d−3)/2} dq  over [−1, 1],

    by the Gauss–Jacobi rule, exact where W is a polynomial of degree ≤ 2·nodes − degree − 1.

    **Arguments:** `W`, a smooth jax function of an array of cosines q; `d` ≥ 2; `degree` ≥
    0; `nodes`, by default degree + 128: enough where W varies over widths of q ≥ 10⁻³ (at
    the ends q = ±1 nodes are denser, some √β of them resolve e^{βq}). Differentiable in
    what W closes over. The error is absolute, some roundings of ∫|W|: an eigenvalue far
    below λ_0 is lost. For e^{βq}/β see `funk_hecke_exponential`.

    **Raises:** `ValueError` where W changes the shape or is not finite. **Source:** the
    Funk–Hecke theorem; *metastable*, Section 4."""
    d, degree = sphere.check_dimension(d), check_count(degree, "degree", 0)
    nodes = degree + 128 if nodes is None else check_count(nodes, "nodes", degree + 1)
    q, w, table = (jnp.asarray(a, float) for a in _gauss(d, nodes, degree))
    values = as_float(check_kernel(W)(q), "W(q)")
    if values.shape != q.shape:
        raise ValueError(
            "Argument `W` must map an array of cosines to an array of its shape, but maps "
            f"{q.shape} to {values.shape}. Use jax.numpy functions of q, and `jax.vmap` over "
            "parameters."
        )
    values = refuse(
        values,
        ~jnp.isfinite(values),
        "Argument `W` must be finite on (−1, 1), but is not at some node. Divide it by its "
        "largest value, or see `funk_hecke_exponential`.",
    )
    return jnp.dot(table, w * values, precision="highest")


def funk_hecke_exponential(
    beta: ArrayLike, d: int, degree: int, log: bool = False
) -> Float[Array, "... l"]:
    """λ_l of W(q) = e^{βq}/β on S^{d−1}, for l = 0 … degree along a new last axis:

        λ_l = (2π)^{d/2} β^{−d/2} I_{l+d/2−1}(β).

    **Arguments:** `beta` β > 0, an array; `d` ≥ 2; `degree` ≥ 0; with `log` the logarithms,
    which neither overflow (β > 700 in float64, 88 in float32) nor underflow. Every
    eigenvalue has its own relative precision: the logarithm is exact to roundings of β +
    |log λ_l|. O(degree) for each β. **Raises:** `ValueError` unless β > 0, and if e^{βq}
    overflows without `log`. **Source:** *metastable*, Remark 4.1 for d = 2, where
    λ_l = 2π I_l(β)/β."""
    d, degree = sphere.check_dimension(d), check_count(degree, "degree", 0)
    beta = as_float(beta, "beta")
    beta = refuse(
        beta,
        ~((beta > 0) & jnp.isfinite(beta)),
        f"Argument `beta` must be finite and > 0, but is {shown(beta)}. For β → 0 the kernel "
        "e^{βq}/β has no limit; that of e^{βq} has the eigenvalues βλ_l.",
    )
    logs = _log_funk_hecke_exponential(d, degree, beta)
    if log:
        return logs
    return refuse(
        jnp.exp(logs),
        logs > math.log(jnp.finfo(logs.dtype).max),
        "Argument `beta` must be so small that e^β does not overflow, but is "
        f"{shown(beta)}. Use `log=True`.",
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _log_funk_hecke_exponential(d: int, degree: int, beta: Array) -> Array:
    # With μ = l + d/2 − 1 and L_μ of `log_bessel`,
    # I_μ(β) = e^{β + L_μ} (β/2)^μ/Γ(μ+1) and Γ(μ+1) = (μ/e)^μ e^{rest}.
    order = np.arange(degree + 1) + d / 2 - 1
    rest = np.array([special.log_gamma_rest(mu) for mu in order])
    shrink = math.e / (2 * np.where(order > 0, order, math.e / 2))
    fixed = d / 2 * (math.log(2 * math.pi) + np.log(shrink)) - rest
    power = jnp.asarray(order - d / 2, beta.dtype)  # l − 1
    power = power * jnp.log(beta[..., None] * jnp.asarray(shrink, beta.dtype))
    scaled = special.log_bessel_sequence(d / 2 - 1, degree + 1, beta)
    return jnp.asarray(fixed, beta.dtype) + power + (beta[..., None] + scaled)
