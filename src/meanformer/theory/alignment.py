"""Alignment, the phase of time O(1): tokens fall onto the dominant space of M = VKᵀQ.

Conventions: B = QᵀK, u = Bᵀx, M = VBᵀ; the dominant space E is spanned by the generalized
eigenspaces of all eigenvalues of M of largest real part, P_E is the orthogonal projector onto
it. Times and rates are those of the zero-temperature flow (`zero_temperature`)."""

import functools
import math
from typing import Any

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
    check_entries,
    check_finite,
    check_scalar,
    is_traced,
    refuse,
)
from ..matrices import check_invertible, check_matrices, key_query_value, matmul
from ..measures import AbstractLaw, Empirical
from .zero_temperature import (
    NODES,
    Linear,
    column_norm,
    enough_panels,
    land,
    march,
    zero_temperature_flow as zero_temperature_flow,
    zero_temperature_pushforward as zero_temperature_pushforward,
)


class DominantSpace(eqx.Module):
    """The dominant space E of M = VKᵀQ.

    - `basis` (d, k): orthonormal columns that span E.
    - `projector` (d, d): the orthogonal projector P_E onto E.
    - `spectral` (d, d): the projector onto E along the other generalized eigenspaces; it
        commutes with M and equals P_E for symmetric M.
    - `eigenvalues` (d,): of M, by decreasing real part.
    - `gap`: Re λ_k − Re λ_{k+1} > 0, or ∞ if E is everything. Its derivative exists where
        these two eigenvalues are semisimple (in a Jordan block it is infinite).
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
    tol: float | None = None,
    dim: int | None = None,
) -> DominantSpace:
    """The space E on which tokens align: the generalized eigenspaces of *all* eigenvalues
    of M = VKᵀQ whose real part is largest (complex pairs, Jordan blocks, multiplicities).

    **Arguments:**

    - `Q`, `K` (k, d), `V` (d, d).
    - `tol`: real parts within tol·‖M‖ of the largest count as equal. A Jordan block of
        size m splits numerically by about eps^{1/m}‖M‖, which may be more (default 1e-6;
        a gap that rounding alone can open is refused: give `tol` or `dim`).
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
    eigenvalues = jnp.linalg.eigvals(M)
    real = jax.lax.stop_gradient(eigenvalues.real)
    eigenvalues = eigenvalues[jnp.argsort(-real)]
    real = jax.lax.stop_gradient(eigenvalues.real)
    relative = 1e-6 if tol is None else tol
    slack = relative * scale
    if dim is None:
        if is_traced(M):
            raise ValueError(
                "Argument `dim` must be given under `jit` and `grad`, because the shape "
                "of the basis depends on it."
            )
        dim = int(np.sum(np.asarray(real) >= float(real[0] - slack)))
        if tol is None and dim < d:
            _check_conditioned(np.asarray(fixed), dim)
    dim = check_count(dim, "dim")
    if dim > d:
        raise ValueError(f"Argument `dim` must be at most d = {d}, but is {dim}.")
    if dim == d:
        eye = jnp.eye(d, dtype=M.dtype)
        return DominantSpace(eye, eye, eye, eigenvalues, jnp.asarray(jnp.inf, M.dtype))
    gap = eigenvalues[dim - 1].real - eigenvalues[dim].real
    M = refuse(
        M,
        ~(real[dim - 1] - real[dim] > slack),
        f"Argument `dim` must end at a gap in the real parts of the eigenvalues of VKᵀQ, "
        f"but dim = {dim} cuts a group that is equal up to tol = {relative:g} (relative to the "
        "norm). Use another `dim` or a smaller `tol`.",
    )
    middle = (real[dim - 1] + real[dim]) / 2
    spectral, projector, basis = _projectors(M, middle)
    return DominantSpace(basis[:, :dim], projector, spectral, eigenvalues, gap)


@jax.jit
def _projectors(M, middle):
    """Spectral and orthogonal projector onto the eigenspaces beyond `middle`, and an
    orthonormal basis whose first columns span them."""
    eye = jnp.eye(M.shape[0], dtype=M.dtype)
    spectral = (eye + _matrix_sign(M - middle * eye)) / 2
    # The orthogonal projector onto the range of an oblique one: P(P + Pᵀ − I)⁻¹.
    projector = jnp.linalg.solve((spectral + spectral.T - eye).T, spectral.T).T
    basis = jnp.linalg.svd(jax.lax.stop_gradient(projector))[0]
    return spectral, projector, basis


def _check_conditioned(M: np.ndarray, dim: int) -> None:
    """Refuse a gap after `dim` eigenvalues that rounding may have opened: an eigenvalue with
    right and left eigenvectors x, y is uncertain by eps‖M‖|x||y|/|⟨y,x⟩|, at a Jordan block
    of size m at most by about eps^{1/m}‖M‖."""
    values, right = np.linalg.eig(M)
    real = np.real(values)
    order = np.argsort(-real)[dim - 1 : dim + 1]
    left = np.linalg.pinv(right, rcond=1e-300)
    condition = np.linalg.norm(right[:, order], axis=0) * np.linalg.norm(
        left[order], axis=1
    )
    eps = np.finfo(M.dtype).eps
    noise = 10 * np.linalg.norm(M) * min(eps * condition.min(), eps ** (1 / 3))
    gap = real[order[0]] - real[order[1]]
    if gap < noise:
        raise ValueError(
            f"Argument `tol` must tell real parts of eigenvalues of VKᵀQ from rounding, but the "
            f"gap after {dim} of them is {gap:.3g} and rounding alone can open one of "
            f"{noise:.3g} (a Jordan block). Give `tol` above that over the norm, or `dim`."
        )


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


# ------------------------------------------------------------------ how fast


class AlignmentRates(eqx.Module):
    """The rates at which the angle to E decays, as e^{−rate·t}, over all limit points."""

    slowest: Float[Array, ""]
    fastest: Float[Array, ""]


def alignment_rates(
    Q: ArrayLike,
    K: ArrayLike,
    V: ArrayLike,
    *,
    tol: float | None = None,
    dim: int | None = None,
) -> AlignmentRates:
    """The rates of alignment gap/σ_max(Bᵀ|_E) and gap/σ_min(Bᵀ|_E) of the zero-temperature
    flow: a token that tends to z ∈ E has tan angle(x, E) ~ e^{−gap·t/|Bᵀz|}.

    (Derived.) In the time τ with dt = |Bᵀx| dτ the part in the other eigenspaces shrinks
    against that in E as e^{−gap·τ}, and |Bᵀx| → |Bᵀz|. Where no limit exists (complex pairs)
    |Bᵀz| is averaged along the rotation, which stays between the extremes. Jordan blocks add
    powers of t: t^{m−1} for a block of size m at the second real part, at most t^{1−m} for
    one in E; the rates are those of the exponentials. Tokens without part in E (for symmetric
    M: orthogonal to it) never align, those without part at the second eigenvalue align faster.

    **Arguments:** Q, K, V with QᵀK invertible; `tol`, `dim` as in `dominant_eigenspace`. Both
    rates are ∞ if E is everything. Differentiable where `gap` is. **Source:** *multiscale*,
    Prop. 3.4 with Lemma A.15."""
    Q, K, V = check_matrices(Q, K, V)
    Q, K = check_invertible(Q, K)
    space = dominant_eigenspace(Q, K, V, tol=tol, dim=dim)
    B, _, _ = key_query_value(Q, K, V)
    singular = jnp.linalg.svd(matmul(B.T, space.projector), compute_uv=False)
    return AlignmentRates(space.gap / singular[0], space.gap / singular[space.dim - 1])


def alignment_time(
    x0: ArrayLike,
    angle: ArrayLike,
    Q: ArrayLike,
    K: ArrayLike,
    V: ArrayLike,
    *,
    moving: bool = True,
    tol: float | None = None,
    dim: int | None = None,
    panels: int | None = None,
) -> Float[Array, " n"]:
    """Per token, the first time at which angle(x(t), E) ≤ `angle` on the zero-temperature
    flow: τ from |z − P_E z| = tan(angle) |P_E z| for z = e^{Mτ}x₀, then t = ∫₀^τ |Bᵀz|/|z| dσ.

    0 for a token that starts within the angle; ∞ for one that does not and has no part in E
    (spectral projection 0 to rounding; for symmetric M: x₀ ⟂ E), since it does not tend
    to E. For symmetric M the angle decreases, and there is one crossing. For other M it may
    rise before it falls; the first crossing counts, and a dip under the level between two
    of the 17 nodes of a panel, on which the angle is smooth, is not seen.

    **Arguments:** tokens `x0` (n, d); `angle` ∈ (0, π/2), in radians; Q, K, V with QᵀK
    invertible; `moving`: derivatives in Q, K, V let E move with the matrices (True) or hold E
    at its value (False; the times are the same); `tol`, `dim` as in `dominant_eigenspace`
    (`dim` is needed under `jit` and `grad`); `panels` as in `zero_temperature_flow`.

    Derivatives in `x0`, `angle`, Q, K, V are those of the implicit function, and 0 where the
    time is 0 or ∞. Angles down to 1e-12 are as accurate as others: what is left outside of E
    is followed by itself. Cost O(panels · n d²). **Raises:** `ValueError` for singular
    QᵀK, an angle outside (0, π/2), a closed gap. **Source:** *multiscale*, Lemmas A.13, A.15
    (Derived: the times)."""
    Q, K, V = check_matrices(Q, K, V)
    Q, K = check_invertible(Q, K)
    space = dominant_eigenspace(Q, K, V, tol=tol, dim=dim)
    B, M, _ = key_query_value(Q, K, V)
    x0 = sphere.check_tokens(x0, "x0", M.shape[0])
    angle = check_scalar(angle, "angle", minimum=0.0, strict=True).astype(x0.dtype)
    angle = refuse(
        angle,
        ~(angle < math.pi / 2),
        "Argument `angle` must be below π/2, because every token is within π/2 of E. Give "
        "radians, for example 0.1.",
    )
    if space.dim == M.shape[0]:
        return jnp.zeros(x0.shape[0], x0.dtype)
    numbers = (B, M, space.spectral, space.projector, space.basis)
    numbers = [a.astype(x0.dtype) for a in numbers]
    level = jnp.log(jnp.tan(angle))
    return enough_panels(lambda n: _time_to_angle(x0, level, *numbers, moving, n), panels)


@functools.partial(jax.jit, static_argnames=("moving", "panels"))
def _time_to_angle(x0, level, B, M, spectral, projector, basis, moving, panels):
    fixed = jax.lax.stop_gradient
    d, k = basis.shape
    eye = jnp.eye(d, dtype=M.dtype)
    # A frame of E and one of the other eigenspaces; they move with the matrices. In it M is
    # block diagonal, so that neither part leaks into the other by rounding.
    beside = jnp.linalg.svd(fixed(eye - projector))[0][:, : d - k]
    G = jnp.concatenate([projector @ basis, beside - spectral @ beside], axis=1)
    inside = jnp.arange(d) < k
    N = jnp.linalg.solve(G, matmul(M, G)) * (inside[:, None] == inside)
    if not moving:
        projector = fixed(projector)
    across, along = matmul(eye - projector, G), matmul(projector, G)

    def log_tan(c):  # of the angle to E
        hidden = matmul(
            across[:, :k], c[..., :k, :]
        )  # 0, but its derivative if E is held
        outside = matmul(across[:, k:], c[..., k:, :]) + (hidden - fixed(hidden))
        return jnp.log(column_norm(outside)) - jnp.log(column_norm(matmul(along, c)))

    heights = fixed(matmul(basis.T, G))
    log_sine = fixed(level - jax.nn.softplus(2 * level) / 2)

    def watch(c):  # log sin(angle) − log sin(level), smooth where the angle is π/2
        outside = jnp.sum(c[..., k:, :] ** 2, axis=-2)
        inside = jnp.sum(matmul(heights, c) ** 2, axis=-2)
        outside = jnp.maximum(outside, jnp.finfo(c.dtype).tiny)
        return (jnp.log(outside) - jnp.log(outside + inside)) / 2 - log_sine

    c = jnp.linalg.solve(G, x0.T)
    within = watch(fixed(c)) <= 0
    never = ~within & (column_norm(fixed(c[:k])) <= 8 * jnp.finfo(x0.dtype).eps)
    # Tokens that need no search get a place halfway between E and another eigenspace.
    half = (jnp.arctan(jnp.exp(fixed(level))) + math.pi / 2) / 2
    safe = jnp.where(jnp.arange(d) == 0, jnp.cos(half), 0)
    safe = jnp.where(jnp.arange(d) == k, jnp.sin(half), safe)
    c = jnp.where(within | never, safe[:, None].astype(c.dtype), c)

    linear = Linear(N, B, G)
    c = c / linear.length(c)
    walk, done = march(
        linear, c, lambda seen, _: jnp.any(seen <= 0, axis=0), panels, watch
    )
    guess = _first_crossing(linear, walk.c, watch)

    def residual(c, _):
        value, slope = jax.jvp(log_tan, (c,), (matmul(linear.N, c),))
        return value - level, slope

    walk = land(linear, walk, residual, guess)
    return jnp.where(within, 0, jnp.where(never, jnp.inf, walk.clock)), done


def _first_crossing(linear, c, residual):
    """Where the residual first falls to 0 in the panel of length h ahead: between which
    of its nodes, linearly."""
    path = matmul(linear.exponentials[0], c)
    values = residual(jnp.concatenate([c[None], path]))
    nodes = jnp.append(0, jnp.asarray(NODES, values.dtype)) * linear.h
    after = jnp.maximum(jnp.argmax(values <= 0, axis=0), 1)
    ends = jnp.stack([after - 1, after])
    left, right = jnp.take_along_axis(values, ends, axis=0)
    start, stop = nodes[ends]
    fall = jnp.where(left > right, left - right, 1)
    return start + (stop - start) * jnp.clip(left / fall, 0, 1)


def alignment_quantiles(
    mu: Any,
    angle: ArrayLike,
    Q: ArrayLike,
    K: ArrayLike,
    V: ArrayLike,
    probabilities: ArrayLike,
    *,
    n: int = 10_000,
    moving: bool = True,
    tol: float | None = None,
    dim: int | None = None,
    panels: int | None = None,
) -> Float[Array, " p"]:
    """The times by which given shares of the tokens have come within `angle` of E: for each
    probability p the smallest t with µ₀(`alignment_time` ≤ t) ≥ p. ∞ where fewer ever do.

    **Arguments:** `mu`, an `Empirical`, or a law, of which about `n` nodes are used;
    `probabilities` (p,) in [0, 1]; the others as in `alignment_time`. For a law the error
    is that of the share of nodes in a region, in probability below n^{−1/2} on S² (3e-3 for
    n = 1e4 and uniform tokens).

    Derivatives: that of the token at the quantile for an `Empirical`; for a law the mean
    over nodes within n^{−1/2}/2 of it in probability, which tends to the derivative
    E[∂T | T = t] of the law's quantile. **Raises:** as `alignment_time`. (Derived.)"""
    empirical = isinstance(mu, Empirical)
    if not empirical and not isinstance(mu, AbstractLaw):
        raise ValueError(
            f"Argument `mu` must be a law or an `Empirical`, but is a {type(mu).__name__}. "
            "For example `Uniform(3)`, or `Empirical(points, weights)`."
        )
    p = check_finite(probabilities, "probabilities", (None,))
    p = refuse(
        p,
        ~((p >= 0) & (p <= 1)),
        "Argument `probabilities` must lie in [0, 1], but some do not. Give shares of the "
        "tokens, for example [0.5, 0.9].",
    )
    tokens = mu if empirical else mu.nodes(n)
    times = alignment_time(
        tokens.points, angle, Q, K, V, moving=moving, tol=tol, dim=dim, panels=panels
    )
    window = 0.0 if empirical else 0.5 / math.sqrt(tokens.n)
    return _quantiles(times, tokens.weights, p.astype(times.dtype), window)


@jax.jit
def _quantiles(times, weights, p, window):
    """inf{t: µ(times ≤ t) ≥ p}; derivatives are means over ±window in probability."""
    order = jnp.argsort(times)
    times, weights = times[order], weights[order]
    share = jnp.cumsum(weights)
    rounding = times.shape[0] * jnp.finfo(times.dtype).eps
    last = jnp.sum(share < share[-1])  # not a token of weight 0
    at = jnp.minimum(jnp.searchsorted(share, p - rounding), last)
    near = jnp.abs(share - share[at][:, None]) <= window
    near = jnp.where(near, weights, 0)
    finite = jnp.where(jnp.isfinite(times), times, 0)
    live = finite - jax.lax.stop_gradient(finite)
    value = jax.lax.stop_gradient(times[at])
    return value + (near @ live) / jnp.maximum(jnp.sum(near, -1), 1e-30)


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
    angle, t, gap = as_float(angle, "angle"), as_float(t, "t"), as_float(gap, "gap")
    inside = (angle >= 0) & (angle <= math.pi / 2)
    angle = check_entries(angle, inside, "angle", "lie in [0, π/2]", "Give radians.")
    decay = gap * t
    decay = check_entries(decay, decay >= 0, "t", "be ≥ 0", "Give gap ≥ 0 and t ≥ 0.")
    return 2 / math.pi * jnp.arctan2(jnp.sin(angle), jnp.exp(-decay) * jnp.cos(angle))
