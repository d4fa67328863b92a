"""What attention tends to for β → ∞. Three things, never mixed: the zero-temperature
field of a smooth positive density, the hardmax over finitely many tokens, and attention at
large finite β (`attention`)."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from . import sphere
from .attention import AbstractAttention
from .checks import ArrayLike
from .matrices import check_invertible, check_matrices, matmul
from .measures import Empirical
from .partition import in_blocks


class ZeroTemperature(AbstractAttention):
    """The limit β → ∞ of attention in a smooth positive density:

        χ_∞(x) = P_x V KᵀQx / |KᵀQx|.

    Tokens move independently of each other. **Arguments:** `Q`, `K` of shape `(k, d)` with
    QᵀK invertible, `V` of shape `(d, d)`. **Raises:** `ValueError` if shapes disagree or
    QᵀK is singular. **Source:** *multiscale*, Eq. (5); *concentration*, Algorithm 2."""

    Q: Float[Array, "k d"]
    K: Float[Array, "k d"]
    V: Float[Array, "d d"]

    def __init__(self, Q: ArrayLike, K: ArrayLike, V: ArrayLike):
        Q, K, self.V = check_matrices(Q, K, V)
        self.Q, self.K = check_invertible(Q, K)

    def drive(self, x: Float[Array, "m d"], mu: Empirical) -> Float[Array, "m d"]:
        del mu
        direction = sphere.normalise(matmul(x, self.to_dual(x.dtype)))
        return matmul(direction, self.V.T.astype(x.dtype))


class Hardmax(AbstractAttention):
    """The limit β → ∞ of attention over finitely many tokens:

        χ(x) = P_x V · (barycentre of the tokens y of µ that maximise ⟨Qx, Ky⟩).

    Ties are split in proportion to the weights; tokens of weight 0 never win. Two scores
    tie if they differ by at most `tie`·|KᵀQx| (default: 16 units of rounding).

    **Arguments:** as `ZeroTemperature` (QᵀK may be singular: where KᵀQx = 0 all tie).
    The field is piecewise constant in the winners, so its derivative ignores that they
    change. O(m n d) time, O(block·n) memory. **Source:** *concentration*, Appendix C.1:
    not the same as `ZeroTemperature`."""

    Q: Float[Array, "k d"]
    K: Float[Array, "k d"]
    V: Float[Array, "d d"]
    tie: float | None = eqx.field(static=True)

    def __init__(
        self, Q: ArrayLike, K: ArrayLike, V: ArrayLike, tie: float | None = None
    ):
        self.Q, self.K, self.V = check_matrices(Q, K, V)
        if tie is not None and not 0 <= tie < float("inf"):
            raise ValueError(
                f"Argument `tie` must be finite and ≥ 0, but is {tie}. "
                "Leave it out for ties up to rounding."
            )
        self.tie = tie

    def drive(self, x: Float[Array, "m d"], mu: Empirical) -> Float[Array, "m d"]:
        y, w = mu.points, mu.weights
        tie = 16 * float(jnp.finfo(x.dtype).eps) if self.tie is None else self.tie

        def rows(u: Array) -> Array:
            scores = matmul(u, y.T)
            scores = jnp.where(w > 0, scores, -jnp.inf)
            slack = tie * sphere.safe_norm(u)[:, None]
            top = jnp.max(scores, axis=-1, keepdims=True)
            share = jnp.where(scores >= top - slack, w, 0)
            return matmul(share, y) / jnp.sum(share, axis=-1, keepdims=True)

        u = in_blocks(matmul(x, self.to_dual(x.dtype)), 256)
        winners = jax.lax.map(rows, u).reshape(-1, x.shape[1])[: x.shape[0]]
        return matmul(winners, self.V.T.astype(x.dtype))
