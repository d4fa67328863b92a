"""The terminal phase: stationary states and their stability, the Oja flow of a collapsed
ensemble, and energetically optimal states.

Fields are passed in: any object with `velocity(x, mu)` and `tangent(x, mu)`. Conventions:
B = QᵀK; (SA) is ẋ = P_x V ∫y e^{β⟨x,By⟩}dµ / ∫e^{β⟨x,By⟩}dµ, (USA) is without the normaliser."""

import functools
import math
from collections.abc import Callable
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
    check_finite,
    check_kernel,
    check_scalar,
    is_traced,
    refuse,
    shown,
)
from ..matrices import check_matrices, key_query_value, matmul
from ..measures import Empirical, check_weights
from .alignment import dominant_eigenspace
from .assumptions import check_empirical, gradient_flow

# ------------------------------------------------------------- residuals and spectra


class StationarityResidual(eqx.Module):
    """|χ[µ](x)| over the tokens of positive weight: the `largest`, and the root mean square
    `rms` = (∫|χ|²dµ)^{1/2}. Unit: 1/time of the field."""

    largest: Float[Array, ""]
    rms: Float[Array, ""]


def stationarity_residual(field: Any, mu: Any) -> StationarityResidual:
    """How far µ is from a stationary state of `field`: |χ[µ](x)| on the support of µ.

    0 means that div(µ χ[µ]) = 0, up to rounding. Tokens of weight 0 do not count.
    **Source:** *concentration*, Eq. (38)."""
    mu = check_empirical(mu)
    speed = sphere.safe_norm(field.velocity(mu.points, mu))
    speed = jnp.where(mu.weights > 0, speed, 0)
    rms = sphere.safe_norm(jnp.sqrt(mu.weights) * speed)
    return StationarityResidual(jnp.max(speed), rms)


def equilibrium_residual(W: Callable[[Array], Array], mu: Any) -> Float[Array, ""]:
    """∫|∇(W∗µ)|² dµ with (W∗µ)(x) = ∫W(⟨x,y⟩)dµ(y): 0 exactly at the equilibria of
    ∂_t µ + div(µ ∇(W∗µ)) = 0, and the speed dE/dt of E = ½∬W dµdµ elsewhere.

    `W`: a smooth function of a scalar in [−1, 1], made of jax operations (W' by autodiff);
    W(q) = e^{βq}/β is (USA). A law: give its `nodes`. O(n²d) time, O(n²) memory.
    **Source:** *metastable*, Lemma E.5."""
    return _equilibrium_residual(check_kernel(W), check_empirical(mu))


@eqx.filter_jit
def _equilibrium_residual(W: Callable, mu: Empirical) -> Array:
    x = mu.points
    q = matmul(x, x.T)
    slope = jax.vmap(jax.grad(lambda s: jnp.reshape(W(s), ())))(q.ravel()).reshape(
        q.shape
    )
    gradient = sphere.project(x, matmul(slope * mu.weights, x))
    return mu.mean(jnp.sum(gradient**2, axis=-1))


class JacobianSpectrum(eqx.Module):
    """The linearised flow at a stationary state, see `jacobian_spectrum`.

    - `eigenvalues` (n(d−1),): by decreasing real part, in 1/time of the field.
    - `growth`: the largest real part.
    - `tolerance`: real parts within it count as 0.
    - `residual`: the largest speed of a token at the state.
    """

    eigenvalues: Complex[Array, " k"]
    growth: Float[Array, ""]
    tolerance: Float[Array, ""]
    residual: Float[Array, ""]

    @property
    def stability(self) -> str:
        """ "unstable" if a perturbation grows, "stable" if all decay, "neutral" if the
        largest real part is 0 up to `tolerance` (rotations; undecided to first order)."""
        if bool(self.growth > self.tolerance):
            return "unstable"
        return "stable" if bool(self.growth < -self.tolerance) else "neutral"


def jacobian_spectrum(
    field: Any, mu: Any, *, tol: ArrayLike | None = None
) -> JacobianSpectrum:
    """Eigenvalues of the flow of all n tokens of µ linearised at µ, weights held fixed.

    The Jacobian of h ↦ χ[µ_h](x_h), x_h = (x + h)/|x + h|, in orthonormal tangent frames, by
    forward autodiff of `field.tangent`: n(d−1) × n(d−1), O((n(d−1))³) time. Coincident tokens
    move apart independently: put k copies on a cluster to see its inner deviations.

    **Arguments:** `tol`, relative to max(1, ‖J‖) (default √eps of the dtype, the accuracy
    of a double eigenvalue): speeds above tol·max(1, ‖J‖) are not stationary, growth rates
    below it are neutral. **Raises:** `ValueError` if µ is not stationary (its tokens of weight
    0 included). **Source:** *concentration*, App. B. Runs under `jit`; eigenvalues of a
    general matrix are computed on the CPU."""
    mu = check_empirical(mu)
    default = float(jnp.finfo(mu.points.dtype).eps) ** 0.5
    tol = check_scalar(default if tol is None else tol, "tol", minimum=0.0)
    eigenvalues, size, residual = _spectrum(field, mu)
    tolerance = tol.astype(size.dtype) * jnp.maximum(1, size)
    residual = refuse(
        residual,
        ~(residual <= tolerance),
        "Argument `mu` must be a stationary state of the field, but the largest speed of its "
        f"tokens is {shown(residual)} (allowed: {shown(tolerance)}). See "
        "`stationarity_residual`, or run the flow on, or give a larger `tol`.",
    )
    return JacobianSpectrum(eigenvalues, eigenvalues[0].real, tolerance, residual)


@eqx.filter_jit
def _spectrum(field: Any, mu: Empirical) -> tuple[Array, Array, Array]:
    x = mu.points
    frames = jax.vmap(sphere.complement_basis)(x)  # (n, d−1, d)

    def velocity(h: Array) -> tuple[Array, Array]:
        y = sphere.normalise(x + jnp.sum(h[..., None] * frames, axis=1))
        v = field.tangent(y, Empirical(y, mu.weights, check=False))
        return jnp.sum(frames * v[:, None], axis=-1), v

    start = jnp.zeros(frames.shape[:2], x.dtype)
    J, v = jax.jacfwd(velocity, has_aux=True)(start)
    J = J.reshape(start.size, start.size)
    values = jnp.linalg.eigvals(J)
    residual = jnp.max(jnp.linalg.norm(v, axis=-1))
    return values[jnp.argsort(-values.real)], jnp.linalg.norm(J, ord=2), residual


# ----------------------------------------------------------------- stationary states


def _check_eigenvectors(
    z: Float[Array, "m d"], V: ArrayLike, tol: float = 1e-5
) -> Float[Array, "d d"]:
    """V, of which the rows of z are eigenvectors."""
    V = check_finite(V, "V", (z.shape[1],) * 2)
    defect, size = _eigen_defect(z, V.astype(jnp.result_type(V, z)))
    return refuse(
        V,
        ~(defect <= tol * size),
        f"Argument `z` must be an eigenvector of `V`, but |P_z V z| is {shown(defect)}. Take "
        "one from `jnp.linalg.eigh(V)`.",
    )


@jax.jit
def _eigen_defect(z: Array, V: Array) -> tuple[Array, Array]:
    """The largest |P_z V z| over the rows of z, and |V|."""
    away = jnp.linalg.norm(sphere.project(z, matmul(z, V.T)), axis=-1)
    return jnp.max(away), jnp.linalg.norm(V)


def _copies(points: Array, weights: Array, copies: int) -> Empirical:
    copies = check_count(copies, "copies")
    return Empirical(
        jnp.repeat(points, copies, 0), jnp.repeat(weights, copies) / copies, check=False
    )


def consensus(z: ArrayLike, V: ArrayLike, *, copies: int = 1) -> Empirical:
    """δ_z for a unit eigenvector z of V: stationary for any Q, K and β, since
    P_z V z = 0. `copies`: as how many equal tokens.

    **Raises:** `ValueError` if z is no eigenvector. **Source:** *concentration*, App. B."""
    z = sphere.check_unit(z, "z")
    _check_eigenvectors(z[None], V)
    return _copies(z[None], jnp.ones(1, z.dtype), copies)


def bipartite_consensus(z: ArrayLike, V: ArrayLike, *, copies: int = 1) -> Empirical:
    """½(δ_z + δ_{−z}) for a unit eigenvector z of V: stationary for any Q, K and β, since
    all barycentres are multiples of z. `copies`: tokens per pole.

    **Raises:** `ValueError` if z is no eigenvector. **Source:** *concentration*, App. B."""
    z = sphere.check_unit(z, "z")
    _check_eigenvectors(z[None], V)
    return _copies(jnp.stack([z, -z]), jnp.full(2, 0.5, z.dtype), copies)


def eigenvector_mixture(
    z: ArrayLike,
    Q: ArrayLike,
    K: ArrayLike,
    V: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    copies: int = 1,
) -> Empirical:
    """Σⱼ wⱼ ½(δ_{zⱼ} + δ_{−zⱼ}) for unit eigenvectors zⱼ of V, rows of `z`, with
    ⟨zᵢ, Bzⱼ⟩ P_{zᵢ}Vzⱼ = 0 for all i, j: stationary for (SA) and (USA) at any β.

    The pair ±zⱼ pulls zᵢ by wⱼ sinh(β⟨zᵢ,Bzⱼ⟩) P_{zᵢ}Vzⱼ/Z. Eigenvectors of V alone are not
    enough: V = B = I has them everywhere, and clusters attract. For symmetric commuting B
    and V any orthonormal eigenvectors of both will do. `weights`: default equal.

    **Raises:** `ValueError` if a row is no eigenvector, or if two rows pull. **Source:**
    *concentration*, App. B, Eq. (38), with the condition for its zeros derived."""
    B, _, V = key_query_value(Q, K, V)
    z = sphere.check_tokens(z, "z", V.shape[0])
    V = _check_eigenvectors(z, V).astype(z.dtype)
    m = z.shape[0]
    weights = check_weights(jnp.ones(m) if weights is None else weights, "weights", m)
    pull, size = _largest_pull(z, B.astype(z.dtype), V)
    z = refuse(
        z,
        ~(pull <= 1e-5 * size),
        "Argument `z` must have rows with ⟨zᵢ, QᵀK zⱼ⟩ P_{zᵢ}V zⱼ = 0, but the largest is "
        f"{shown(pull)}. Use orthonormal common eigenvectors of QᵀK and V.",
    )
    both = jnp.concatenate([z, -z])
    return _copies(both, jnp.tile(weights / 2, 2).astype(z.dtype), copies)


@jax.jit
def _largest_pull(z: Array, B: Array, V: Array) -> tuple[Array, Array]:
    """max |⟨zᵢ, Bzⱼ⟩ P_{zᵢ}Vzⱼ|, and |B||V|."""
    pull = jnp.linalg.norm(sphere.project(z[:, None], matmul(z, V.T)[None]), axis=-1)
    pull = jnp.max(pull * jnp.abs(matmul(z, matmul(B, z.T))))
    return pull, jnp.linalg.norm(B) * jnp.linalg.norm(V)


class ClusterRates(eqx.Module):
    """Exponential rates of small deviations from δ_z or ½(δ_z + δ_{−z}) under (SA), see
    `consensus_rates` and `bipartite_rates`; negative real parts decay.

    - `within`: of tokens of one cluster relative to each other (multiplicity (n−1)(d−1),
        n tokens, for one cluster, (n−2)(d−1) for two).
    - `together` (d−1,): of the clusters on one common axis.
    - `apart` (d−1,): of the angle between the two clusters (one cluster: none, shape (0,)).
    """

    within: Float[Array, ""]
    together: Complex[Array, " k"]
    apart: Complex[Array, " l"]

    @property
    def growth(self) -> Float[Array, ""]:
        """The largest real part: > 0 is unstable."""
        rates = jnp.concatenate([self.together, self.apart]).real
        return jnp.maximum(self.within, jnp.max(rates))


@jax.jit
def _transverse(z: Array, V: Array) -> tuple[Array, Array]:
    """λ = ⟨z,Vz⟩ and the other eigenvalues of V, those of P_zVP_z on z^⊥."""
    frame = sphere.complement_basis(z)
    others = jnp.linalg.eigvals(matmul(frame, matmul(V, frame.T)))
    return matmul(z, matmul(V, z)), others[jnp.argsort(-others.real)]


def consensus_rates(z: ArrayLike, V: ArrayLike) -> ClusterRates:
    """Spectrum of (SA) at δ_z, Vz = λz: −λ within the cluster, and λ_k − λ for its centre,
    with λ_k the other eigenvalues of V: those of the Oja flow. Stable if and only if λ > 0
    exceeds the real parts of all others, whatever Q, K and β.

    For x_i = z + a_i every barycentre is z + ā to first order (weights change, but all act
    on the same z), so that ȧ_i = P_zV ā − λ a_i. Under (USA): times e^{β⟨z,Bz⟩}. (Derived;
    *concentration*, App. B has the states.)"""
    z = sphere.check_unit(z, "z")
    V = _check_eigenvectors(z[None], V).astype(z.dtype)
    value, others = _transverse(z, V)
    return ClusterRates(-value, others - value, others[:0])


def bipartite_rates(
    z: ArrayLike, Q: ArrayLike, K: ArrayLike, V: ArrayLike, beta: ArrayLike
) -> ClusterRates:
    """Spectrum of (SA) at ½(δ_z + δ_{−z}), Vz = λz, with t = tanh(β⟨z,Bz⟩): −λt within each
    cluster, t(λ_k − λ) together, and λ_k − λt apart, λ_k the other eigenvalues of V.

    With x_i = σ_i z + a_i the own pole has the share (1 + t)/2 of the attention. Changes
    of the shares act along z only, which P_z removes: ȧ_i = P_zV Σ_j p_ij a_j − λt a_i, and
    p has the eigenvalues 1 (both clusters move by one a: apart), t (by ±a: the axis tilts)
    and 0. For β⟨z,Bz⟩ → −∞ the state is stable if λ < 0 and all
    real parts lie in (λ, −λ): on E_|V|, where no consensus is. (Derived; *concentration*,
    App. B has the states.)"""
    B, _, V = key_query_value(Q, K, V)
    z = sphere.check_unit(z, "z")
    V, B = _check_eigenvectors(z[None], V).astype(z.dtype), B.astype(z.dtype)
    beta = check_scalar(beta, "beta", minimum=0.0).astype(z.dtype)
    value, others = _transverse(z, V)
    t = jnp.tanh(beta * matmul(z, matmul(B, z)))
    return ClusterRates(-value * t, t * (others - value), others - value * t)


# ----------------------------------------------------------- Oja flow, eigen-directions


def oja_flow(
    x0: ArrayLike, t: ArrayLike, V: ArrayLike, *, panels: int | None = None
) -> Float[Array, "n d"]:
    """The Oja flow ẋ = P_x V x in closed form, x(t) = e^{Vt}x₀/|e^{Vt}x₀|: the path of a
    fully collapsed ensemble under (SA), for any Q, K and β.

    e^{Vt} is applied in equal panels of ‖V‖h ≤ 1 (Taylor series), x normalised after each:
    no overflow, and no underflow of a slow direction. Relative error about eps·‖V‖t; where
    x₀ lies off the dominant directions rounding grows as the flow does. Cost
    O((panels·n + 20 d) d²).

    **Arguments:** points `x0` (n, d), each on its own; any time `t` (negative: backward);
    `V` (d, d); `panels` ≥ ‖V‖t in the Frobenius norm (default: as few as that; 256 under
    `jit`). Differentiable in all, twice. **Source:** *concentration*, App. B;
    *multiscale*, Lemma A.15."""
    x0 = sphere.check_tokens(x0, "x0")
    V = check_finite(V, "V", (x0.shape[1],) * 2).astype(x0.dtype)
    t = check_scalar(t, "t").astype(x0.dtype)
    length = jax.lax.stop_gradient(jnp.linalg.norm(V) * jnp.abs(t))
    if panels is None:
        panels = 256 if is_traced(length) else max(1, math.ceil(float(length)))
    panels = check_count(panels, "panels")
    V = refuse(
        V,
        ~(length <= panels),
        f"Argument `panels` must be at least ‖V‖t = {shown(length)}, but is {panels}. Give "
        "more panels, or leave it out where t is known.",
    )
    return _oja(x0, t / panels, V, panels)


@functools.partial(jax.jit, static_argnames="panels")
def _oja(x0: Array, h: Array, V: Array, panels: int) -> Array:
    def series(carry, k):
        term, total = carry
        term = matmul(term, h * V) / k
        return (term, total + term), None

    eye = jnp.eye(V.shape[0], dtype=V.dtype)
    k = jnp.arange(1, 21, dtype=V.dtype)
    step = jax.lax.scan(series, (eye, eye), k)[0][1].T  # 1/21! is below rounding

    def panel(x, _):
        return sphere.normalise(matmul(x, step)), None

    return jax.lax.scan(panel, x0, None, length=panels)[0]


def value_eigenspace(
    V: ArrayLike,
    *,
    modulus: bool = False,
    tol: float | None = None,
    dim: int | None = None,
) -> Float[Array, "d k"]:
    """Orthonormal columns that span E_V, the generalized eigenspaces of V for the
    eigenvalues of largest real part; with `modulus`, E_|V|, those of largest |λ|: the
    directions on which tokens end (Conjecture 1).

    **Arguments:** `tol`: real parts (moduli) within tol·‖V‖ of the largest count as equal
    (default 1e-6); `dim`: the dimension, needed under `jit`; as in `dominant_eigenspace`.
    **Raises:** `ValueError` if `dim` cuts a group.

    E_|V| is the space where (V − ρ)(V + ρ)⁻¹ has positive real parts, for ρ between the
    moduli: (λ − ρ)/(λ + ρ) has the real part (|λ|² − ρ²)/|λ + ρ|².
    **Source:** *concentration*, Sec. 5, Conjecture 1."""
    V = as_float(V, "V")
    d = sphere.check_dimension(V.shape[-1] if V.ndim else 1, "d = V.shape[-1]")
    V = check_finite(V, "V", (d, d))
    eye = jnp.eye(d, dtype=V.dtype)
    if not modulus:
        return dominant_eigenspace(eye, eye, V, tol=tol, dim=dim).basis
    sizes = jnp.sort(jnp.abs(jnp.linalg.eigvals(V)))[::-1]
    relative = 1e-6 if tol is None else tol
    slack = relative * jnp.linalg.norm(V)
    if dim is None and not is_traced(V):
        dim = int(np.sum(np.asarray(sizes) >= float(sizes[0] - slack)))
    if dim is None or not dim < d:  # E is everything, or `dim` is refused there
        return dominant_eigenspace(eye, eye, V, tol=tol, dim=dim).basis
    dim = check_count(dim, "dim")
    V = refuse(
        V,
        ~(sizes[dim - 1] - sizes[dim] > slack),
        f"Argument `dim` must end at a gap in the moduli of the eigenvalues of V, but dim = "
        f"{dim} cuts a group that is equal up to tol = {relative:g} (relative to the norm). "
        "Use another `dim` or a smaller `tol`.",
    )
    rho = (sizes[dim - 1] + sizes[dim]) / 2
    cayley = jnp.linalg.solve(V + rho * eye, V - rho * eye)
    return dominant_eigenspace(eye, eye, cayley, tol=0.0, dim=dim).basis


# ------------------------------------------------------------------- optimal energies


class EnergyOptimum(eqx.Module):
    """The state that attention strives for, see `energy_optimum`.

    - `state`: tokens z and −z (an `Empirical`), the second of weight 0 for a single Dirac.
    - `log_energy`: log E of it.
    """

    state: Empirical
    log_energy: Float[Array, ""]


def energy_optimum(
    Q: ArrayLike, K: ArrayLike, V: ArrayLike, beta: ArrayLike
) -> EnergyOptimum:
    """The optimal state of the interaction energy E(µ) = (1/2β)∬e^{β⟨x,By⟩}dµdµ for symmetric
    B = QᵀK and V = cB: its maximum for c > 0, where it increases, its minimum for c < 0.

    With λ_min, λ_max the extreme eigenvalues of B and z their eigenvectors:

    - max, λ_max ≥ |λ_min| (B ≥ 0): δ_z at λ_max, 2βE = e^{βλ_max};
    - max, B ≤ 0: ½(δ_z + δ_{−z}) at λ_min, 2βE = cosh(βλ_min);
    - min, |λ_min| ≥ λ_max and λ_min < 0 (B ≤ 0): δ_z at λ_min, 2βE = e^{βλ_min};
    - min, B ≥ 0 with λ_min = 0: δ_z, Bz = 0, 2βE = 1 (as all laws on the kernel of B);
    - other: not known (for B = λI > 0 the minimum is the uniform law), refused.

    (Derived: |⟨x,By⟩| ≤ ‖B‖ is attained in cases 1 and 3. For B = −S ≤ 0 split µ into its
    even and odd part: sinh(β⟨x,Sy⟩) is positive definite and cosh(β⟨x,Sy⟩) ≤ cosh β‖S‖. For
    B ≥ 0 Jensen gives 2βE ≥ e^{β⟨m,Bm⟩} ≥ 1.) The optimum need not be reached: at large β
    other states are metastable. log E is differentiable, the state is held fixed.

    **Raises:** `ValueError` if V is not cB with symmetric B, and where the optimum is not
    known. **Source:** *concentration*, App. C.3."""
    Q, K, V = check_matrices(Q, K, V)
    beta = check_scalar(beta, "beta", minimum=0.0, strict=True).astype(V.dtype)
    flow = gradient_flow(Q, K, V)
    B = refuse(
        matmul(Q.T, K),
        ~flow.verdict.holds,
        "Arguments `Q`, `K`, `V` must make a gradient flow, but: "
        f"{flow.verdict}. Other dynamics optimise no energy.",
    )
    log_energy, points, weights, unknown = _optimum(B, flow.scale, beta)
    log_energy = refuse(
        log_energy,
        unknown,
        "Arguments `Q`, `K`, `V` must be a case with known optimum, but for V = cQᵀK with "
        f"c = {shown(flow.scale)} and eigenvalues {shown(flow.eigenvalues)} of QᵀK it is not "
        "known. Compare energies of runs instead.",
    )
    return EnergyOptimum(Empirical(points, weights, check=False), log_energy)


@jax.jit
def _optimum(B: Array, scale: Array, beta: Array) -> tuple[Array, ...]:
    B = (B + B.T) / 2
    values = jnp.linalg.eigvalsh(B)
    vectors = jnp.linalg.eigh(jax.lax.stop_gradient(B))[1]
    low, high = values[0], values[-1]
    slack = 16 * len(values) * jnp.finfo(B.dtype).eps * jnp.maximum(-low, high)
    up = scale > 0
    top = up & (high >= -low - slack)
    pair = up & (high <= slack) & ~top
    bottom = ~up & ((-low >= high - slack) | (jnp.abs(low) <= slack))
    a = beta * jnp.abs(low)
    log_cosh = a + jnp.log1p(jnp.exp(-2 * a)) - math.log(2)
    exponent = jnp.where(pair, log_cosh, beta * jnp.where(top, high, low))
    z = jnp.where(top, vectors[:, -1], vectors[:, 0])
    second = jnp.where(pair, 0.5, 0).astype(B.dtype)
    weights = jnp.stack([1 - second, second])
    unknown = ~(top | pair | bottom)
    return exponent - jnp.log(2 * beta), jnp.stack([z, -z]), weights, unknown
