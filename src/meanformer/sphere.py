"""Geometry of the unit sphere S^{d−1} ⊂ R^d. Points are rows, or the last axis."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .checks import ArrayLike, as_float, is_traced, refuse


def normalise(x: Float[Array, "... d"]) -> Float[Array, "... d"]:
    """x/|x|, the nearest point of the sphere. The origin has none and gives NaN."""
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def project(x: Float[Array, "... d"], v: Float[Array, "... d"]) -> Float[Array, "... d"]:
    """P_x v = v − ⟨x, v⟩ x, the tangential part of `v` at the unit vector `x`."""
    return v - jnp.sum(x * v, axis=-1, keepdims=True) * x


def safe_norm(x: Float[Array, "... d"]) -> Float[Array, "..."]:
    """|x|, with derivative 0 (not NaN) at x = 0."""
    square = jnp.sum(x * x, axis=-1)
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0)


def distance(x: Float[Array, "... d"], y: Float[Array, "... d"]) -> Float[Array, "..."]:
    """Geodesic distance in [0, π], as 2·atan2(|x−y|, |x+y|): exact to rounding for
    coincident and for antipodal points, where arccos⟨x,y⟩ loses half of the digits.
    Its derivative there (none exists) is returned as 0."""
    return 2 * jnp.arctan2(safe_norm(x - y), safe_norm(x + y))


def exp(x: Float[Array, "... d"], v: Float[Array, "... d"]) -> Float[Array, "... d"]:
    """exp_x(v) = cos|v| x + sin|v| v/|v| for `v` tangent at `x`."""
    length = safe_norm(v)[..., None]
    return jnp.cos(length) * x + jnp.sinc(length / jnp.pi) * v


def log(x: Float[Array, "... d"], y: Float[Array, "... d"]) -> Float[Array, "... d"]:
    """The shortest tangent vector v at `x` with exp_x(v) = y; 0 for antipodal points,
    where it is not unique."""
    v = project(x, y - x)  # = P_x y, without cancellation for y near x
    length = safe_norm(v)
    angle = distance(x, y)
    # At the antipode v is the rounding of |x|² − 1, in no direction that means anything.
    antipodal = (angle > 3) & (length < 16 * jnp.finfo(length.dtype).eps)
    moves = (length > 0) & ~antipodal
    scale = jnp.where(moves, angle / jnp.where(moves, length, 1), ~antipodal)
    return scale[..., None] * v


def complement_basis(m: Float[Array, " d"]) -> Float[Array, "e d"]:
    """Orthonormal rows that span the complement of the unit vector `m`."""
    q, _ = jnp.linalg.qr(
        jnp.concatenate([m[:, None], jnp.eye(m.shape[0], dtype=m.dtype)], 1)
    )
    return q[:, 1:].T


def log_area(d: int) -> float:
    """log |S^{d−1}|, for any d."""
    return math.log(2) + d / 2 * math.log(math.pi) - math.lgamma(d / 2)


def area(d: int) -> float:
    """|S^{d−1}| = 2 π^{d/2} / Γ(d/2): 2π for d = 2, 4π for d = 3; underflows from d = 441 on."""
    return math.exp(log_area(d))


def from_angles(theta: ArrayLike) -> Float[Array, "... 2"]:
    """(cos θ, sin θ) on S¹."""
    theta = as_float(theta, "theta")
    return jnp.stack([jnp.cos(theta), jnp.sin(theta)], axis=-1)


def angles(x: Float[Array, "... d"]) -> Float[Array, "..."]:
    """Azimuth atan2(x₂, x₁) ∈ (−π, π] of the first two coordinates (d = 2: the angle)."""
    return jnp.arctan2(x[..., 1], x[..., 0])


def check_dimension(d: object, name: str = "d") -> int:
    """`d` as the dimension of the ambient space, at least 2."""
    if isinstance(d, bool) or not isinstance(d, (int, np.integer)) or d < 2:
        raise ValueError(
            f"Argument `{name}` must be an integer ≥ 2 (tokens lie on S^(d−1)), but is "
            f"{d!r}."
        )
    return int(d)


def check_tokens(
    x: ArrayLike, name: str = "x", d: int | None = None, tol: float = 1e-5
) -> Float[Array, "n d"]:
    """`x` as tokens: shape (n, d) with n ≥ 1, d ≥ 2 and rows of norm 1 to within `tol`.

    **Raises:** `ValueError` that names the argument and the first row at fault; for
    traced values the error comes when the program runs."""
    x = as_float(x, name)
    if x.ndim != 2:
        raise ValueError(
            f"Argument `{name}` must have shape (n, d), one row per token, but has shape "
            f"{x.shape}. For a batch of configurations use `jax.vmap`."
        )
    if x.shape[0] == 0:
        raise ValueError(
            f"Argument `{name}` must hold at least one token, but has shape {x.shape}. Sample "
            "some, for example `Uniform(3).sample(key, 100)`."
        )
    if x.shape[1] < 2:
        raise ValueError(
            f"Argument `{name}` must have d ≥ 2 columns, but has shape {x.shape}."
        )
    if d is not None and x.shape[1] != d:
        raise ValueError(
            f"Argument `{name}` must have d = {d} columns to fit the matrices, but has "
            f"shape {x.shape}. Use tokens on S^{d - 1}, or matrices for d = {x.shape[1]}."
        )
    norms = jnp.linalg.norm(x, axis=-1)
    off = ~(jnp.abs(norms - 1) <= tol)  # written so that NaN is off too
    found = "some row has not"
    if not is_traced(off) and bool(off.any()):
        i = int(np.argmax(np.asarray(off)))
        found = f"row {i} has norm {float(norms[i]):.6g}"
    return refuse(
        x,
        off,
        f"Argument `{name}` must have rows of norm 1 to within {tol:g}, but {found}. "
        f"Use `sphere.normalise({name})` to project finite rows.",
    )


def check_unit(m: ArrayLike, name: str) -> Float[Array, " d"]:
    """`m` as one unit vector of shape (d,)."""
    m = as_float(m, name)
    if m.ndim != 1:
        raise ValueError(
            f"Argument `{name}` must be one unit vector of shape (d,), but has shape "
            f"{m.shape}."
        )
    return check_tokens(m[None], name)[0]
