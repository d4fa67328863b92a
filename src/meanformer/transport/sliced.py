"""Sliced distances: the mean of exact distances of random one-dimensional images.

- chordal: the images x ↦ ⟨θ, x⟩ on lines, θ uniform on S^{d−1},
  SW_p^p = ∫ W_p^p(⟨θ,·⟩#µ, ⟨θ,·⟩#ν) dθ. Each is 1-Lipschitz, so that SW_p ≤ W_p.
- geodesic: the nearest points x ↦ P x/|P x| on great circles, P onto a uniform plane,
  with the arc as cost (Bonet et al., *Spherical sliced-Wasserstein*, ICLR 2023). This is
  another distance, of the size of W_p but neither above nor below it; for d = 2 it is W_p.
"""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from .. import sphere
from ..matrices import matmul
from . import circle, ground


@functools.partial(jax.jit, static_argnames=("even", "cost", "p", "projections"))
def sliced(
    x: Float[Array, "n d"],
    y: Float[Array, "m d"],
    a: Float[Array, " n"],
    b: Float[Array, " m"],
    key: PRNGKeyArray,
    *,
    even: bool,
    cost: str,
    p: float,
    projections: int,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean over the projections of W_p^p of the images, and its standard error. `even`:
    n = m and all weights are equal. O(projections · n log n) time, O(n) memory."""
    d = x.shape[1]

    def on_line(key):
        theta = sphere.normalise(jr.normal(key, (d,), x.dtype))
        u, v = matmul(x, theta), matmul(y, theta)
        if even:
            return jnp.mean(ground.power(jnp.sort(u) - jnp.sort(v), p))
        return circle.line(u, a, v, b, p)

    def on_circle(key):
        plane = jnp.linalg.qr(jr.normal(key, (d, 2), x.dtype))[0]
        u, v = circle.turns(matmul(x, plane)), circle.turns(matmul(y, plane))
        if even:
            power = circle.equal(u, v, p)
        elif p == 1:
            power = circle.weighted_one(u, a, v, b)
        else:
            power = circle.weighted(u, a, v, b, p)
        return power * (2 * jnp.pi) ** p

    image = jax.checkpoint(on_circle if cost == "geodesic" else on_line)
    powers = jax.lax.map(image, jr.split(key, projections))
    return jnp.mean(powers), jnp.std(powers, ddof=1) / projections**0.5
