"""How tokens lie to a subspace, and order parameters: to one axis, or k directions."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from .. import sphere, theory
from ..attention import check_measure
from ..checks import ArrayLike, as_float, check_count, check_scalar, refuse
from ..matrices import matmul
from ..measures import Empirical


def check_basis(E: Any, d: int | None = None) -> Float[Array, "d k"]:
    """`E` as orthonormal columns of R^d (any d for None), its own or those of its field
    `basis`."""
    E = as_float(getattr(E, "basis", E), "E")
    if E.ndim != 2 or (d is not None and E.shape[0] != d):
        fixed = "" if d is None else f" with d = {d}"
        raise ValueError(
            f"Argument `E` must have shape (d, k){fixed}, one column per basis "
            f"vector, but has shape {E.shape}."
        )
    defect = jnp.max(jnp.abs(matmul(E.T, E) - jnp.eye(E.shape[1], dtype=E.dtype)))
    return refuse(
        E,
        ~(defect <= 1e-5),
        "Argument `E` must have orthonormal columns to within 1e-05, but EᵀE is not the "
        "identity. Use `jnp.linalg.qr(E)[0]`.",
    )


def _basis_for(mu: Empirical, E: Array) -> Array:
    """The checked basis `E`, in the dtype of µ and of its dimension."""
    if E.shape[0] != mu.d:
        check_basis(E, mu.d)
    return E.astype(mu.points.dtype)


class Alignment(eqx.Module):
    """`alignment` as an observable: `Alignment(E)(mu)`. The basis is a leaf."""

    E: Float[Array, "d k"]

    def __init__(self, E: Any):
        self.E = check_basis(E)

    def __call__(self, mu: Empirical) -> Float[Array, ""]:
        mu = check_measure(mu)
        inside = matmul(mu.points, _basis_for(mu, self.E))
        return mu.mean(jnp.sum(inside**2, axis=-1))


def alignment(mu: Empirical, E: Any) -> Float[Array, ""]:
    """∫ |P_E x|² dµ ∈ [0, 1]: 1 if all tokens lie in the subspace E, dim E/d for the
    uniform law.

    **Arguments:** `E`, orthonormal columns that span the subspace, shape `(d, k)`, or what
    `theory.dominant_eigenspace` returns. **Raises:** `ValueError` if they are not
    orthonormal. **Source:** *concentration*, Figs. 3–10."""
    return Alignment(E)(mu)


class Lyapunov(eqx.Module):
    """`lyapunov` as an observable: `Lyapunov(E, p, epsilon)(mu)`. All three are leaves."""

    E: Float[Array, "d k"]
    p: Float[Array, ""]
    epsilon: Float[Array, ""]

    def __init__(self, E: Any, p: ArrayLike, epsilon: ArrayLike = 0.0):
        self.E = check_basis(E)
        self.p = check_scalar(p, "p", minimum=0.0, strict=True)
        self.epsilon = check_scalar(epsilon, "epsilon", minimum=0.0)

    def __call__(self, mu: Empirical) -> Float[Array, ""]:
        mu = check_measure(mu)
        E = _basis_for(mu, self.E)
        p, epsilon = (a.astype(mu.points.dtype) for a in (self.p, self.epsilon))
        coordinates = matmul(mu.points, E)
        outside = sphere.safe_norm(mu.points - matmul(coordinates, E.T))
        inside = sphere.safe_norm(coordinates)
        orthogonal = (inside <= 8 * jnp.finfo(inside.dtype).eps) & (epsilon == 0)
        regular = (outside > 0) & ~orthogonal
        ratio = outside / jnp.where(orthogonal, 1, inside + epsilon)
        power = jnp.where(regular, jnp.where(regular, ratio, 1) ** p, 0)
        infinite = jnp.any(orthogonal & (mu.weights > 0))
        return jnp.where(infinite, jnp.inf, mu.mean(power))


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
    return Lyapunov(E, p, epsilon)(mu)


# ------------------------------------------------------------------- order parameters


def polar_order(mu: Empirical) -> Float[Array, ""]:
    """|∫x dµ| ∈ [0, 1]: 1 for one cluster, 0 for a law symmetric under x → −x; for n
    independent uniform tokens about n^{−1/2}. Derivative 0 at 0."""
    mu = check_measure(mu)
    return sphere.safe_norm(mu.mean(mu.points))


class PolarOrder(eqx.Module):
    """`polar_order` as an observable: `PolarOrder()(mu)`."""

    def __call__(self, mu: Empirical) -> Float[Array, ""]:
        return polar_order(mu)


def second_moment(mu: Empirical) -> Float[Array, "d d"]:
    """∫ x xᵀ dµ, of trace 1; I/d for the uniform law. O(nd²)."""
    mu = check_measure(mu)
    return matmul((mu.weights[:, None] * mu.points).T, mu.points)


def nematic_order(mu: Empirical) -> Float[Array, ""]:
    """(dλ − 1)/(d − 1) ∈ [0, 1] with λ the largest eigenvalue of ∫xxᵀdµ: 1 if all tokens lie on
    one axis ±z, 0 if the second moment is that of the uniform law. It does not tell x from −x.

    Where the largest eigenvalue is multiple, the derivative is that along one of its
    eigenvectors."""
    values = jnp.linalg.eigvalsh(second_moment(mu))
    return (mu.d * values[-1] - 1) / (mu.d - 1)


class NematicOrder(eqx.Module):
    """`nematic_order` as an observable: `NematicOrder()(mu)`."""

    def __call__(self, mu: Empirical) -> Float[Array, ""]:
        return nematic_order(mu)


class FoldOrder(eqx.Module):
    """`fold_order` as an observable: `FoldOrder(k)(mu)`."""

    k: int = eqx.field(static=True)

    def __init__(self, k: int):
        self.k = check_count(k, "k")

    def __call__(self, mu: Empirical) -> Float[Array, ""]:
        mu = check_measure(mu)
        if mu.d != 2:
            raise ValueError(
                f"Argument `mu` must be a measure on S¹ (d = 2), but has d = {mu.d}. On other "
                "spheres use `power_spectrum`."
            )
        theta = self.k * sphere.angles(mu.points)
        c = theory.fourier_coefficients(theta, 1, mu.weights)[1]
        return sphere.safe_norm(jnp.stack([jnp.real(c), jnp.imag(c)]))


def fold_order(mu: Empirical, k: int) -> Float[Array, ""]:
    """|µ̂_k| = |∫e^{−ikθ}dµ| ∈ [0, 1] on S¹: 1 if all tokens lie on the corners of one regular
    k-gon (whatever their masses), about n^{−1/2} for n independent uniform tokens.

    **Arguments:** `k` ≥ 1. Derivative 0 at 0. **Source:** *metastable*, Sec. 4."""
    return FoldOrder(k)(mu)
