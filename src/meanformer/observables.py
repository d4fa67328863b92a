"""Numbers read off tokens: functions of a measure, to be evaluated on snapshots or handed
to `solve` and `unroll` as observables."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from . import sphere
from .attention import check_measure
from .checks import ArrayLike, as_float, check_count, check_scalar, refuse
from .matrices import check_matrices, matmul
from .measures import Empirical
from .partition import AbstractPartition, Auto


def alignment(mu: Empirical, E: Any) -> Float[Array, ""]:
    """∫ |P_E x|² dµ ∈ [0, 1]: 1 if all tokens lie in the subspace E, dim E/d for the
    uniform law.

    **Arguments:** `E`, orthonormal columns that span the subspace, shape `(d, k)`, or what
    `theory.dominant_eigenspace` returns. **Raises:** `ValueError` if they are not
    orthonormal. **Source:** *concentration*, Figs. 3–10."""
    mu = check_measure(mu)
    inside = matmul(mu.points, check_basis(E, mu.d).astype(mu.points.dtype))
    return mu.mean(jnp.sum(inside**2, axis=-1))


def check_basis(E: Any, d: int) -> Float[Array, "d k"]:
    """`E` as orthonormal columns of R^d, its own or those of its field `basis`."""
    E = as_float(getattr(E, "basis", E), "E")
    if E.ndim != 2 or E.shape[0] != d:
        raise ValueError(
            f"Argument `E` must have shape (d, k) with d = {d}, one column per basis "
            f"vector, but has shape {E.shape}."
        )
    defect = jnp.max(jnp.abs(matmul(E.T, E) - jnp.eye(E.shape[1], dtype=E.dtype)))
    return refuse(
        E,
        ~(defect <= 1e-5),
        "Argument `E` must have orthonormal columns to within 1e-05, but EᵀE is not the "
        "identity. Use `jnp.linalg.qr(E)[0]`.",
    )


def lyapunov(
    mu: Empirical, E: Any, p: ArrayLike, epsilon: ArrayLike = 0.0
) -> Float[Array, ""]:
    """E_p(µ) = ∫ (|x − P_E x|/(|P_E x| + ε))^p dµ, which measures the distance to E: 0 for
    tokens in E; for ε = 0, ∞ for tokens of positive weight orthogonal to E (to 8 roundings).

    Along the zero-temperature flow with symmetric VKᵀQ it decreases for any ε ≥ 0, and for
    ε = 0 at least like `theory.lyapunov_decay`. It increases to E_p as ε ↓ 0.

    **Arguments:** `E` as in `alignment`; `p` > 0; `epsilon` ≥ 0. The derivative is 0 at tokens
    in E or orthogonal to it, where there is none (p ≤ 1, or ε = 0). **Raises:** `ValueError`
    for other p and ε, and a basis that is not orthonormal. **Source:** *concentration*, Eq.
    (14) and its regularisation in App. A.2.2, where the text has lost the formulas: ε > 0
    keeps the integrand bounded and Lipschitz, and this one lets the proof of Prop. 8 run."""
    mu = check_measure(mu)
    E = check_basis(E, mu.d).astype(mu.points.dtype)
    p = check_scalar(p, "p", minimum=0.0, strict=True).astype(mu.points.dtype)
    epsilon = check_scalar(epsilon, "epsilon", minimum=0.0).astype(mu.points.dtype)
    coordinates = matmul(mu.points, E)
    outside = sphere.safe_norm(mu.points - matmul(coordinates, E.T))
    inside = sphere.safe_norm(coordinates)
    orthogonal = (inside <= 8 * jnp.finfo(inside.dtype).eps) & (epsilon == 0)
    regular = (outside > 0) & ~orthogonal
    ratio = outside / jnp.where(orthogonal, 1, inside + epsilon)
    power = jnp.where(regular, jnp.where(regular, ratio, 1) ** p, 0)
    infinite = jnp.any(orthogonal & (mu.weights > 0))
    return jnp.where(infinite, jnp.inf, mu.mean(power))


def log_energy(
    mu: Empirical,
    Q: ArrayLike,
    K: ArrayLike,
    beta: ArrayLike,
    partition: AbstractPartition | None = None,
) -> Float[Array, ""]:
    """log of `energy`, finite for every β > 0 (E itself overflows from β‖B‖ ≈ 700 on)."""
    d = check_measure(mu).d
    Q, K, _ = check_matrices(Q, K, jnp.eye(d, dtype=mu.points.dtype))
    beta = check_scalar(beta, "beta", minimum=0.0, strict=True)
    x = mu.points
    A = (beta.astype(Q.dtype) * matmul(Q.T, K)).astype(x.dtype)
    log_z, _ = (Auto() if partition is None else partition)(x, A, mu)
    total = jax.nn.logsumexp(log_z, b=mu.weights)
    return total - jnp.log(2 * beta).astype(x.dtype)


def energy(
    mu: Empirical,
    Q: ArrayLike,
    K: ArrayLike,
    beta: ArrayLike,
    partition: AbstractPartition | None = None,
) -> Float[Array, ""]:
    """The interaction energy E(µ) = (1/2β) ∬ e^{β⟨Qx,Ky⟩} dµ(x) dµ(y).

    It increases along (USA), and along (SA) where QᵀK is symmetric and V = QᵀK; with
    V = −QᵀK it decreases. **Arguments:** Q, K of shape `(k, d)`, β > 0, and how to sum
    (`partition`, default `Auto()`). O(n²d) time. For large β use `log_energy`.
    **Source:** *multiscale*, Appendix E; *metastable*, Sec. 2."""
    return jnp.exp(log_energy(mu, Q, K, beta, partition))


def angle_histogram(
    mu: Empirical, bins: int = 100
) -> tuple[Float[Array, " bins"], Float[Array, " edges"]]:
    """Mass of µ in `bins` equal bins of the azimuth on [−π, π), and the bin edges.

    The masses sum to 1; divide by the bin width for a density. On S¹ the azimuth is the
    angle; on S² that of the first two coordinates."""
    bins = check_count(bins, "bins")
    mu = check_measure(mu)
    theta = sphere.angles(mu.points)
    theta = jnp.where(theta >= math.pi, -math.pi, theta)  # π is −π
    cell = jnp.floor((theta + math.pi) * (bins / (2 * math.pi))).astype(int)
    mass = (
        jnp.zeros(bins, mu.weights.dtype).at[jnp.minimum(cell, bins - 1)].add(mu.weights)
    )
    return mass, jnp.linspace(-math.pi, math.pi, bins + 1, dtype=theta.dtype)
