"""The matrices Q, K, V: their shapes, and the products that the formulas are made of.

B = QᵀK gives the weights e^{β⟨x,By⟩} = e^{⟨u,y⟩} with u = βBᵀx; M = VBᵀ = VKᵀQ gives the
direction V u/|u| of the limit β → ∞."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from . import sphere
from .checks import ArrayLike, as_float, check_finite, refuse, shown

_HIGHEST = jax.lax.Precision.HIGHEST  # no TF32 or bf16 in logits (accelerators)


def matmul(a: Array, b: Array) -> Array:
    """a @ b without the reduced precision of accelerators."""
    return jnp.matmul(a, b, precision=_HIGHEST)


def check_matrices(
    Q: ArrayLike, K: ArrayLike, V: ArrayLike
) -> tuple[Float[Array, "k d"], Float[Array, "k d"], Float[Array, "d d"]]:
    """Q, K of one shape (k, d) and V of shape (d, d), finite, in one dtype."""
    Q, K, V = as_float(Q, "Q"), as_float(K, "K"), as_float(V, "V")
    if Q.ndim != 2 or Q.shape != K.shape:
        raise ValueError(
            "Arguments `Q` and `K` must have one shape (k, d), but their shapes are "
            f"{Q.shape} and {K.shape}. Both act on tokens of R^d; transpose if needed."
        )
    d = sphere.check_dimension(Q.shape[1], "d = Q.shape[1]")
    if V.shape != (d, d):
        raise ValueError(
            f"Argument `V` must have shape (d, d) = ({d}, {d}) to fit `Q` and `K` of "
            f"shape {Q.shape}, but has shape {V.shape}. Values are tokens: V maps R^d to R^d."
        )
    k = Q.shape[0]
    Q, K = check_finite(Q, "Q", (k, d)), check_finite(K, "K", (k, d))
    V = check_finite(V, "V", (d, d))
    dtype = jnp.result_type(Q, K, V)
    return Q.astype(dtype), K.astype(dtype), V.astype(dtype)


def key_query_value(
    Q: ArrayLike, K: ArrayLike, V: ArrayLike
) -> tuple[Float[Array, "d d"], Float[Array, "d d"], Float[Array, "d d"]]:
    """B = QᵀK, M = VBᵀ and V, of matrices that pass `check_matrices`."""
    Q, K, V = check_matrices(Q, K, V)
    B = matmul(Q.T, K)
    return B, matmul(V, B.T), V


def check_invertible(
    Q: Float[Array, "k d"], K: Float[Array, "k d"]
) -> tuple[Float[Array, "k d"], Float[Array, "k d"]]:
    """Q, K with QᵀK invertible to working precision."""
    singular = jnp.linalg.svd(matmul(Q.T, K), compute_uv=False)
    floor = singular[0] * Q.shape[1] * jnp.finfo(Q.dtype).eps
    return refuse(
        (Q, K),
        ~(singular[-1] > floor),
        "Arguments `Q` and `K` must have QᵀK invertible where β is infinite (x'/|x'| with "
        f"x' = KᵀQx is not defined otherwise), but its singular values are "
        f"{shown(singular)}. Use `SelfAttention` at a finite β, or make QᵀK regular.",
    )
