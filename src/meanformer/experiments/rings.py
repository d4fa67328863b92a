"""Laws on S³ that are symmetric under rotations of (x₂, x₃) and under x₄ → −x₄, as tokens on
an octant of S²: the mean field of *concentration*, Theorem 1, free of sampling noise.

A token (x₁, r, x₄), r, x₄ ≥ 0, stands for the two rings {(x₁, r cos φ, r sin φ, ±x₄)}. Attention
with V = diag(v₁, v, v, v₄) and QᵀK = diag(b₁, b, b, b₄) keeps the symmetry, and moves
(x₁, r, x₄) as attention on S² with diag(v₁, v, v₄), diag(b₁, b, b₄) and this partition does:
averages over the two rings stand for e^{⟨u,y⟩}. Distances of symmetric laws on S³ are those of
the reduced tokens."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import i0e, i1e
from jaxtyping import Array, Float

from ..matrices import matmul
from ..measures import Empirical
from ..partition import AbstractPartition, in_blocks


class Rings(AbstractPartition):
    """L and ∇L with e^{⟨u,y⟩} averaged over the two rings of y:

        e^{u₁y₁} I₀(u_r y_r) cosh(u₄y₄),

    which is even in r and x₄. O(m n) time (two Bessel functions and two exponentials a
    pair), O(block·n) memory. There must be tokens near each direction u: shifted sums have
    no second chance here, and NaN says so."""

    block: int = eqx.field(static=True, default=128)

    def __call__(
        self, x: Float[Array, "m d"], A: Float[Array, "d d"], mu: Empirical
    ) -> tuple[Float[Array, " m"], Float[Array, "m d"]]:
        (y1, r, y4), w = mu.points.T, mu.weights

        def rows(u: Array) -> tuple[Array, Array]:
            bound = jnp.linalg.norm(u, axis=-1, keepdims=True)
            ring, up = u[:, 1:2] * r, u[:, 2:] * y4
            level = u[:, :1] * y1 + ring - bound
            above, below = jnp.exp(level + up), jnp.exp(level - up)
            both = (above + below) / 2
            even, odd = both * i0e(ring), both * i1e(ring)
            height = (above - below) / 2 * i0e(ring)
            sums = matmul(even, jnp.stack([w, w * y1], 1))
            across, upward = matmul(odd, w * r), matmul(height, w * y4)
            z = sums[:, 0]
            mean = jnp.stack([sums[:, 1], across, upward], 1) / z[:, None]
            return bound[:, 0] + jnp.log(z), mean

        u = in_blocks(matmul(x, A), self.block)
        log_z, mean = jax.lax.map(rows, u)
        return log_z.reshape(-1)[: x.shape[0]], mean.reshape(-1, 3)[: x.shape[0]]


def tilted_nodes(tilt: float, around: int) -> tuple[np.ndarray, np.ndarray]:
    """Gauss nodes (n, 3) and weights of the law of density (1 + tilt·x₁)/|S³|, reduced as
    above: `around` nodes for the polar angle θ of (x₁, r), half as many for the angle η ≥ 0
    to x₄ = 0. x = (cos η cos θ, cos η sin θ, sin η) has the uniform law for cos²η dη dcos θ;
    nodes in η, since ∫tan²η shall be right too, which near x₄ = 1 is not smooth in x₄."""
    eta, v = np.polynomial.legendre.leggauss(2 * (around // 2))
    eta, v = np.pi / 2 * eta[eta > 0, None], v[eta > 0, None]  # the law is even in x₄
    z, w = np.polynomial.legendre.leggauss(around)
    c = np.cos(eta)
    weights = (v * c**2 * w * (1 + tilt * c * z)).ravel()
    x = np.stack([c * z, c * np.sqrt(1 - z**2), np.sin(eta) + 0 * z], -1).reshape(-1, 3)
    return x / np.linalg.norm(x, axis=1, keepdims=True), weights / weights.sum()
