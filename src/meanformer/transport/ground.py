"""The cost of moving one unit of mass from x to y: c(x, y)^p with c the geodesic distance
(angle in [0, π]) or the chordal one |x − y|."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.spatial.distance import cdist

from .. import sphere

DIAMETER = {"geodesic": math.pi, "chordal": 2.0}


def power(r: Array, p: float) -> Array:
    """|r|^p, with derivative 0 at r = 0."""
    return r * r if p == 2 else jnp.abs(r) if p == 1 else jnp.abs(r) ** p


def root(powered: Float[Array, ""], p: float) -> Float[Array, ""]:
    """W_p from W_p^p; 0 with derivative 0 where that is not positive."""
    positive = powered > 0
    return jnp.where(positive, jnp.where(positive, powered, 1) ** (1 / p), 0)


def total(values: Float[Array, " n"]) -> Float[Array, ""]:
    """Σ values in √n parts: rounding as of √n terms, which float32 needs at n = 10⁶."""
    parts = max(1, int(values.shape[0] ** 0.5))
    padded = jnp.pad(values, (0, -values.shape[0] % parts))
    return jnp.sum(jnp.sum(padded.reshape(parts, -1), axis=1))


def distance(x: Float[Array, "*s d"], y: Float[Array, "*s d"], cost: str) -> Array:
    """c(x, y), row by row: accurate for close and for antipodal rows."""
    return sphere.distance(x, y) if cost == "geodesic" else sphere.safe_norm(x - y)


def table(x: np.ndarray, y: np.ndarray, cost: str, p: float) -> np.ndarray:
    """c(xᵢ, yⱼ)^p on the host in float64, shape (n, m)."""
    c = cdist(x, y)
    if cost == "geodesic":
        c = 2 * np.arctan2(c, cdist(x, -y))
    return c if p == 1 else c**p
