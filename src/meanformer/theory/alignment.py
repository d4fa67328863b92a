"""Alignment, the phase of time O(1): tokens fall onto the dominant space of M = VKᵀQ.

Conventions: B = QᵀK, u = Bᵀx, M = VBᵀ; the dominant space E is spanned by the generalized
eigenspaces of all eigenvalues of M of largest real part."""

import functools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float

from .. import sphere
from ..checks import (
    ArrayLike,
    as_float,
    check_count,
    check_finite,
    check_scalar,
    is_traced,
    refuse,
)
from ..matrices import check_invertible, check_matrices, key_query_value


class DominantSpace(eqx.Module):
    """The dominant space E of M = VKᵀQ.

    - `basis` (d, k): orthonormal columns that span E.
    - `projector` (d, d): the orthogonal projector P_E onto E.
    - `spectral` (d, d): the projector onto E along the other generalized eigenspaces; it
        commutes with M and equals P_E for symmetric M.
    - `eigenvalues` (d,): of M, by decreasing real part.
    - `gap`: Re λ_k − Re λ_{k+1} > 0, or ∞ if E is everything.
    """

    basis: Float[Array, "d k"]
    projector: Float[Array, "d d"]
    spectral: Float[Array, "d d"]
    eigenvalues: Complex[Array, " d"]
    gap: Float[Array, ""]

    @property
    def dim(self) -> int:
        """k = dim E."""
        return self.basis.shape[1]


def dominant_eigenspace(
    Q: ArrayLike,
    K: ArrayLike,
    V: ArrayLike,
    *,
    tol: float = 1e-6,
    dim: int | None = None,
) -> DominantSpace:
    """The space E on which tokens align: the generalized eigenspaces of *all* eigenvalues
    of M = VKᵀQ whose real part is largest (complex pairs, Jordan blocks, multiplicities).

    **Arguments:**

    - `Q`, `K` (k, d), `V` (d, d).
    - `tol`: real parts within tol·‖M‖ of the largest count as equal. A Jordan block of
        size m splits numerically by about eps^{1/m}‖M‖, so do not set it below 1e-7.
    - `dim`: dim E, if known; needed under `jit` and `grad`, where shapes cannot depend on
        numbers.

    The projectors come from the matrix sign function of M − c, with c inside the gap, and
    are differentiable in Q, K and V as long as the gap is open; the basis is fixed up to
    rotation within E only, so differentiate projectors. Cost O(d³), on the CPU.

    **Raises:** `ValueError` (traced: at run time) if `dim` cuts through eigenvalues of equal
    real part. **Source:** *multiscale*, Prop. 3.4, with all eigenvalues of largest real
    part (a rotation has ±i) where its text has one.
    """
    _, M, _ = key_query_value(Q, K, V)
    d = M.shape[0]
    fixed = jax.lax.stop_gradient(M)
    scale = jnp.linalg.norm(fixed)
    eigenvalues = jnp.linalg.eigvals(fixed)
    eigenvalues = eigenvalues[jnp.argsort(-eigenvalues.real)]
    real = eigenvalues.real
    slack = tol * scale
    if dim is None:
        if is_traced(M):
            raise ValueError(
                "Argument `dim` must be given under `jit` and `grad`, because the shape "
                "of the basis depends on it."
            )
        dim = int(np.sum(np.asarray(real) >= float(real[0] - slack)))
    dim = check_count(dim, "dim")
    if dim > d:
        raise ValueError(f"Argument `dim` must be at most d = {d}, but is {dim}.")
    if dim == d:
        eye = jnp.eye(d, dtype=M.dtype)
        return DominantSpace(eye, eye, eye, eigenvalues, jnp.asarray(jnp.inf, M.dtype))
    gap = real[dim - 1] - real[dim]
    M = refuse(
        M,
        ~(gap > slack),
        f"Argument `dim` must end at a gap in the real parts of the eigenvalues of VKᵀQ, "
        f"but dim = {dim} cuts a group that is equal up to tol = {tol:g} (relative to the "
        "norm). Use another `dim` or a smaller `tol`.",
    )
    middle = (real[dim - 1] + real[dim]) / 2
    eye = jnp.eye(d, dtype=M.dtype)
    spectral = (eye + _matrix_sign(M - middle * eye)) / 2
    # The orthogonal projector onto the range of an oblique one: P(P + Pᵀ − I)⁻¹.
    projector = jnp.linalg.solve((spectral + spectral.T - eye).T, spectral.T).T
    basis = jnp.linalg.svd(jax.lax.stop_gradient(projector))[0][:, :dim]
    return DominantSpace(basis, projector, spectral, eigenvalues, gap)


def _matrix_sign(A: Array) -> Array:
    """sign(A) by Newton's iteration with determinantal scaling; A has no eigenvalue on
    the imaginary axis. The last steps are unscaled, so that derivatives are those of the
    limit."""
    d = A.shape[0]
    eye = jnp.eye(d, dtype=A.dtype)

    def newton(X, scaled):
        inverse = jnp.linalg.solve(X, eye)
        _, log_det = jnp.linalg.slogdet(jax.lax.stop_gradient(X))
        c = jnp.where(scaled, jnp.exp(-log_det / d), 1)
        return (c * X + inverse / c) / 2, None

    steps = jnp.arange(40) < 30
    return jax.lax.scan(newton, A, steps)[0]


def project_to_dominant(x: ArrayLike, space: DominantSpace) -> Float[Array, "n d"]:
    """π_E(x) = P_E x/|P_E x|, the limit of the zero-temperature flow for symmetric VKᵀQ.

    **Raises:** `ValueError` if a row of `x` is orthogonal to E, where π_E is not defined.
    **Source:** *concentration*, Eq. (4)."""
    x = sphere.check_tokens(x, "x", space.projector.shape[0])
    y = x @ space.projector.T.astype(x.dtype)
    length = jnp.linalg.norm(y, axis=-1)
    y = refuse(
        y,
        ~(length > 8 * jnp.finfo(x.dtype).eps),
        "Argument `x` must have a part in the dominant space E, but a row is orthogonal "
        "to it, where π_E is not defined. Leave such rows out.",
    )
    return sphere.normalise(y)


_GAUSS_X, _GAUSS_W = np.polynomial.legendre.leggauss(16)


def zero_temperature_flow(
    x0: ArrayLike,
    t: ArrayLike,
    Q: ArrayLike,
    K: ArrayLike,
    V: ArrayLike,
    *,
    panels: int | None = None,
) -> Float[Array, "n d"]:
    """The flow ẋ = P_x V KᵀQx/|KᵀQx| in closed form:

        x(t) = z/|z|,  z = e^{Mτ} x₀,  where  t = ∫₀^τ |Bᵀz(σ)|/|z(σ)| dσ,

    for any invertible B = QᵀK. The integral is monotone in τ; it is computed by
    16-point Gauss rules on equal panels and inverted by Newton's method per token.

    **Arguments:** tokens `x0` (n, d); a time `t` ≥ 0; Q, K, V; `panels`, how many panels
    (default: enough for full accuracy, about 4‖M‖τ; 256 under `jit`).

    Differentiable in all arguments (twice). Cost O(panels · n d²). **Raises:**
    `ValueError` for singular QᵀK or t < 0. **Source:** *multiscale*, Lemmas A.13, A.15.
    """
    Q, K, V = check_matrices(Q, K, V)
    B, M, _ = key_query_value(*check_invertible(Q, K), V)
    d = M.shape[0]
    x0 = sphere.check_tokens(x0, "x0", d)
    t = check_scalar(t, "t", minimum=0.0).astype(x0.dtype)
    B, M = B.astype(x0.dtype), M.astype(x0.dtype)
    singular = jax.lax.stop_gradient(jnp.linalg.svd(B, compute_uv=False))
    tau_end = jax.lax.stop_gradient(t) / singular[-1]
    if panels is None:
        if is_traced(tau_end, M):
            panels = 256
        else:
            reach = float(tau_end * jnp.linalg.norm(M, ord=2))
            panels = max(4, math.ceil(4 * reach))
    panels = check_count(panels, "panels")
    h = tau_end / panels
    M = refuse(
        M,
        jax.lax.stop_gradient(jnp.linalg.norm(M)) * h > 2,
        f"Argument `panels` must be large enough for panels of length 2/‖M‖, but {panels} "
        "is not. Give about 4‖M‖t/(smallest singular value of QᵀK).",
    )
    return _closed_form(x0, t, B, M, h, panels)


_TAYLOR = 20  # terms of e^{sM}z inside one panel, where |s|‖M‖ ≤ 1


@functools.partial(jax.jit, static_argnames="panels")
def _closed_form(x0, t, B, M, h, panels):
    fixed = jax.lax.stop_gradient
    nodes = jnp.asarray((_GAUSS_X + 1) / 2, x0.dtype)
    weights = jnp.asarray(_GAUSS_W / 2, x0.dtype)

    def taylor(z):  # (terms, n, d), for `position`
        def step(term, k):
            return term @ M.T / k, term

        return jax.lax.scan(step, z, jnp.arange(1, _TAYLOR + 1, dtype=z.dtype))[1]

    def position(terms, tau):  # e^{τM} z, one τ per token
        def step(total, term):
            return total * tau[:, None] + term, None

        return jax.lax.scan(step, jnp.zeros_like(terms[0]), terms, reverse=True)[0]

    def speed(z):  # dt/dτ along x = z/|z|
        return jnp.linalg.norm(z @ B, axis=-1) / jnp.linalg.norm(z, axis=-1)

    def elapsed(terms, tau):
        parts = jax.vmap(lambda c: speed(position(terms, c * tau)))(nodes)
        return tau * (weights @ parts)

    width = jnp.full(x0.shape[0], h)

    def panel(carry, _):
        z, done, clock = carry
        terms = taylor(z)
        times = elapsed(terms, width)
        done = done | (clock + times >= t)  # the time lies in this panel: stay
        z = jnp.where(done[:, None], z, sphere.normalise(position(terms, width)))
        return (z, done, jnp.where(done, clock, clock + times)), None

    state = (x0, jnp.zeros(x0.shape[0], bool), jnp.zeros(x0.shape[0], x0.dtype))
    (z, _, clock), _ = jax.lax.scan(panel, state, None, length=panels)
    terms = taylor(z)
    rest = t - clock  # ≥ 0, at most one panel long

    def newton(tau):
        return tau - (elapsed(terms, tau) - rest) / speed(position(terms, tau))

    tau = fixed(rest) / fixed(speed(z))
    tau = jax.lax.fori_loop(0, 6, lambda _, s: fixed(newton(s)), tau)
    tau = newton(newton(tau))  # two steps with derivatives: exact to second order
    return sphere.normalise(position(terms, tau))


def cluster_contraction_rate(V: ArrayLike, z: ArrayLike) -> Float[Array, ""]:
    """⟨z, Vz⟩: the rate at which tokens of a tight cluster at z approach each other.

    For x = z + δ with the barycentre of the cluster at z, P_x V z = Vz − ⟨x,Vz⟩x makes
    deviations δ − δ̄ decay like e^{−⟨z,Vz⟩t}, at any finite β once β|δ|² ≪ 1. Zero
    temperature contracts at the spectral gap of VKᵀQ instead. (Derived; *concentration*
    App. B has the consensus states.)"""
    z = sphere.check_unit(z, "z")
    V = check_finite(V, "V", (z.shape[0], z.shape[0]))
    return z @ V.astype(z.dtype) @ z


def axis_fraction(angle: ArrayLike, t: ArrayLike, gap: ArrayLike) -> Float[Array, "..."]:
    """Share of uniform tokens on S² within `angle` of ±e at time t of the zero-temperature
    flow with orthogonal QᵀK, where the dominant space is the axis e of symmetric VKᵀQ and
    only the second eigenvalue, `gap` below the first, matters any more:

        (2/π) arctan(e^{gap·t} tan(angle)).

    x₂/x₃ is Cauchy distributed at time 0 and is multiplied by e^{−gap·t}; the third
    coordinate is smaller by another e^{−(λ₂−λ₃)t}. (Derived from A8.)"""
    growth = jnp.exp(as_float(gap, "gap") * as_float(t, "t"))
    return 2 / math.pi * jnp.arctan(growth * jnp.tan(as_float(angle, "angle")))
