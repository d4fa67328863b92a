"""Predictions of the papers as functions of (Q, K, V, β, µ₀). Nothing here calls a vector
field or a solver, so that comparing a simulation with it is a test.

Conventions: B = QᵀK, u = Bᵀx, M = VBᵀ = VKᵀQ; the dominant space E is spanned by the
generalized eigenspaces of all eigenvalues of M of largest real part."""

import functools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float

from . import special, sphere
from .checks import (
    ArrayLike,
    as_float,
    check_count,
    check_finite,
    check_scalar,
    is_traced,
    refuse,
    shown,
)
from .measures import check_weights, log_wrapped_normal

# ------------------------------------------------------------------ alignment phase


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


def _matrix(Q: ArrayLike, K: ArrayLike, V: ArrayLike) -> tuple[Array, Array]:
    """B = QᵀK and M = VBᵀ, with shapes checked."""
    Q, K = check_finite(Q, "Q", (None, None)), check_finite(K, "K", (None, None))
    if Q.shape != K.shape:
        raise ValueError(
            "Arguments `Q` and `K` must have one shape (k, d), but their shapes are "
            f"{Q.shape} and {K.shape}."
        )
    d = sphere.check_dimension(Q.shape[1], "d = Q.shape[1]")
    V = check_finite(V, "V", (d, d))
    dtype = jnp.result_type(Q, K, V)
    B = Q.T.astype(dtype) @ K.astype(dtype)
    return B, V.astype(dtype) @ B.T


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
    _, M = _matrix(Q, K, V)
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
    B, M = _matrix(Q, K, V)
    d = M.shape[0]
    x0 = sphere.check_tokens(x0, "x0", d)
    t = check_scalar(t, "t", minimum=0.0).astype(x0.dtype)
    B, M = B.astype(x0.dtype), M.astype(x0.dtype)
    singular = jax.lax.stop_gradient(jnp.linalg.svd(B, compute_uv=False))
    M = refuse(
        M,
        ~(singular[-1] > d * jnp.finfo(B.dtype).eps * singular[0]),
        "Arguments `Q` and `K` must have QᵀK invertible at zero temperature, but its "
        "smallest singular value is 0 up to rounding.",
    )
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


# ------------------------------------------------------------------ heat phase


def _check_sign(sign: float | int, name: str = "sign") -> float:
    if sign not in (1, -1):
        raise ValueError(
            f"Argument `{name}` must be +1 (V = +I: backward heat, clusters form) or −1 "
            f"(V = −I: forward heat), but is {sign!r}."
        )
    return float(sign)


def heat_variance(
    variance: ArrayLike, t: ArrayLike, beta: ArrayLike, sign: int
) -> Float[Array, "..."]:
    """Variance of a heat kernel of S^{d−1} in the limit β → ∞, t/β fixed:

        s(t) = s₀ − sign·2t/β,    sign = +1 for V = I, −1 for V = −I, and QᵀK = I.

    `variance` s₀ is σ₀², twice the heat time. A backward flow ends at its blow-up time
    t = βs₀/2.

    **Raises:** `ValueError` for a backward time past the blow-up of a component (traced: at
    run time). **Source:** *multiscale*, Eqs. (6), (7)."""
    gamma = _check_sign(sign)
    s0, t = as_float(variance, "variance"), as_float(t, "t")
    s = s0 - gamma * 2 * t / check_scalar(beta, "beta", minimum=0.0, strict=True)
    return refuse(
        s,
        ~(s > 0),
        "Argument `t` must lie before the blow-up β·variance/2 of every component of a "
        "backward heat flow, but does not. See `blow_up_time`.",
    )


def blow_up_time(variance: ArrayLike, beta: ArrayLike) -> Float[Array, "..."]:
    """t = βσ₀²/2, when a component of variance σ₀² collapses in the backward heat flow
    (QᵀK = V = I). **Source:** *multiscale*, after Eq. (7), in units of the flow."""
    beta = check_scalar(beta, "beta", minimum=0.0, strict=True)
    return beta * as_float(variance, "variance") / 2


def closure_variance(
    variance: ArrayLike, t: ArrayLike, beta: ArrayLike, sign: int
) -> Float[Array, "..."]:
    """Variance of a Gaussian cluster of (SA) with QᵀK = I, V = sign·I on a tangent line:

        ṡ = −sign·2s/(1 + βs),    s(t) = W₀(βs₀ e^{βs₀ − 2·sign·t})/β.

    For βs ≫ 1 it is the heat law, for βs ≪ 1 s ∝ e^{∓2t}: there is no blow-up at finite
    β. W₀ is Lambert's function, evaluated in logs. (Derived: the barycentre of N(0, s)
    tilted by βx is βs·x/(1 + βs), so that ẋ = −sign·x/(1 + βs).)"""
    gamma = _check_sign(sign)
    s0, t = as_float(variance, "variance"), as_float(t, "t")
    beta = check_scalar(beta, "beta", minimum=0.0, strict=True)
    s0 = refuse(
        s0,
        ~(s0 > 0),
        f"Argument `variance` must be > 0, but is {shown(s0)}. A cluster of no width has none "
        "at any time.",
    )
    a = beta * s0
    return special.wright_omega(a + jnp.log(a) - 2 * gamma * t) / beta


def wrapped_mixture_density(
    theta: Float[Array, " g"],
    means: ArrayLike,
    variances: ArrayLike,
    weights: ArrayLike,
) -> Float[Array, " g"]:
    """Σⱼ αⱼ N(θ; mⱼ, sⱼ) wrapped on S¹: heat-kernel mixtures, whose exact heat flow only
    moves the variances (`heat_variance`). **Source:** *multiscale*, Eq. (7)."""
    return _density(jnp.asarray(theta), *_mixture(means, variances, weights))


@jax.jit
def _density(theta: Array, m: Array, s: Array, a: Array) -> Array:
    logs = jax.vmap(log_wrapped_normal)(theta[None] - m[:, None], s)
    return a @ jnp.exp(logs)


def wrapped_mixture_mass(
    edges: Float[Array, " g"],
    means: ArrayLike,
    variances: ArrayLike,
    weights: ArrayLike,
) -> Float[Array, " g-1"]:
    """Mass of the wrapped mixture between consecutive angles `edges`: what a histogram
    counts, without the error of taking the density at mid-bin. For variances up to 10."""
    return _bin_mass(jnp.asarray(edges), *_mixture(means, variances, weights))


@jax.jit
def _bin_mass(edges: Array, m: Array, s: Array, a: Array) -> Array:
    turns = 2 * math.pi * jnp.arange(-4, 5, dtype=edges.dtype)
    z = (edges[None, None] + turns[None, :, None] - m[:, None, None]) / jnp.sqrt(s)[
        :, None, None
    ]
    cdf = jnp.sum(jax.scipy.special.ndtr(z), axis=1)
    return a @ jnp.diff(cdf, axis=-1)


def _mixture(means, variances, weights) -> tuple[Array, Array, Array]:
    m = check_finite(means, "means", (None,))
    s = check_finite(variances, "variances", m.shape)
    s = refuse(
        s,
        ~(s > 0),
        f"Argument `variances` must be > 0, but is {shown(s)}. Use σ², not 0.",
    )
    return m, s, check_weights(weights, "weights", m.shape[0])


# ------------------------------------------- rotating ring (scenario 1b of multiscale)


def height_growth_rate(beta: ArrayLike, variance: ArrayLike) -> Float[Array, "..."]:
    """1 − 2βσ²: growth rate of the mean height x̄₃ of tokens near the equator in scenario
    1b (V = I, QᵀK = [[0,1,0],[−1,0,0],[0,0,−2]]), with σ² the variance of the heights.

    A token at height z is drawn to the barycentre of tokens tilted by e^{−2βz·z'}, which
    lies at x̄₃ − 2βσ²z; the mean obeys x̄₃' = x̄₃(1 − 2βσ²), and σ² shrinks, so that the
    plane is left once σ² < 1/(2β). (Derived, to leading order in the heights.)"""
    return 1 - 2 * as_float(beta, "beta") * as_float(variance, "variance")


def height_variance(
    variance: ArrayLike, t: ArrayLike, beta: ArrayLike
) -> Float[Array, "..."]:
    """σ²(t) = σ₀²/(1 + 4βσ₀²t), the variance of the heights in scenario 1b after it was
    σ₀² (derived with `height_growth_rate`: (σ²)' = −4βσ⁴)."""
    s0 = as_float(variance, "variance")
    return s0 / (1 + 4 * as_float(beta, "beta") * s0 * as_float(t, "t"))


def ring_growth_rate(k: int, beta: ArrayLike) -> Float[Array, "..."]:
    """k sin(kπ/2) d/dκ(I_k/I_0)(β): growth rate of mode k of a uniform ring that rotates
    because QᵀK turns by 90° and V = I (scenario 1b on S¹).

    With µ = (1 + ε cos kθ)/2π the speed is A(β) + ε (I_k/I_0)'(β) cos k(θ + π/2), whose
    divergence is in phase with the mode as sin(kπ/2). Odd k with k ≡ 1 mod 4 grow.
    (Derived.)"""
    k = check_count(k, "k")
    beta = as_float(beta, "beta")
    slope = jax.grad(lambda b: jnp.sum(special.bessel_quotient(k, b)))(beta)
    return k * (0, 1, 0, -1)[k % 4] * slope


def height_amplification(
    variance: ArrayLike, t: ArrayLike, beta: ArrayLike
) -> Float[Array, "..."]:
    """x̄₃(t)/x̄₃(0) = e^t/√(1 + 4βσ₀²t), the growth of the mean height in scenario 1b when
    the heights had variance σ₀² at time 0: `height_growth_rate` integrated along
    `height_variance`. (Derived.)"""
    t = as_float(t, "t")
    widening = 4 * as_float(beta, "beta") * as_float(variance, "variance") * t
    return jnp.exp(t) / jnp.sqrt(1 + widening)


def axis_fraction(angle: ArrayLike, t: ArrayLike, gap: ArrayLike) -> Float[Array, "..."]:
    """Share of uniform tokens on S² within `angle` of ±e at time t of the zero-temperature
    flow with orthogonal QᵀK, where the dominant space is the axis e of symmetric VKᵀQ and
    only the second eigenvalue, `gap` below the first, matters any more:

        (2/π) arctan(e^{gap·t} tan(angle)).

    x₂/x₃ is Cauchy distributed at time 0 and is multiplied by e^{−gap·t}; the third
    coordinate is smaller by another e^{−(λ₂−λ₃)t}. (Derived from A8.)"""
    growth = jnp.exp(as_float(gap, "gap") * as_float(t, "t"))
    return 2 / math.pi * jnp.arctan(growth * jnp.tan(as_float(angle, "angle")))
