"""The papers' assumptions as predicates. Each answers with a `Verdict`: whether it holds and
the number that this rests on, not only True or False.

Conventions: B = QᵀK, M = VBᵀ = VKᵀQ; E is the dominant space of M. Defects are relative (0:
holds exactly, 1: not at all). All run under `jit` and `vmap` unless their docstring says not."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from scipy.special import roots_jacobi

from .. import sphere
from ..checks import (
    ArrayLike,
    as_float,
    check_count,
    check_scalar,
    is_traced,
)
from ..matrices import check_matrices, key_query_value, matmul
from ..measures import AbstractLaw, Empirical, Uniform, uniform_nodes
from .alignment import DominantSpace, dominant_eigenspace


class Verdict(eqx.Module):
    """Whether an assumption holds, and the number it rests on.

    - `holds`: the answer; `bool(verdict)` for concrete numbers.
    - `measured`, `threshold`: the number, and what it is compared to.
    - `name`, `statement`, `source`: which assumption, what it requires, where it is from.
    - `quantity`, `relation`: what was measured, and how it must lie to the threshold ("at
        most", "above", "below").

    Printed, it is one line. `holds` can be False although the number is good, where the
    assumption requires more than the number says (see the predicate)."""

    holds: Bool[Array, ""]
    measured: Float[Array, ""]
    threshold: Float[Array, ""]
    name: str = eqx.field(static=True)
    statement: str = eqx.field(static=True)
    source: str = eqx.field(static=True)
    quantity: str = eqx.field(static=True)
    relation: str = eqx.field(static=True, default="at most")

    def __bool__(self) -> bool:
        return bool(self.holds)

    def __str__(self) -> str:
        head = f"{self.name} ({self.statement})"
        if is_traced(self.holds) or jnp.ndim(self.holds) > 0:
            return f"{head}: {self.quantity}, numbers not concrete or batched"
        return (
            f"{head} {'holds' if self.holds else 'fails'}: {self.quantity} "
            f"{float(self.measured):.3g}, {self.relation} {float(self.threshold):.3g}"
        )


class AbstractFinding(eqx.Module):
    """Numbers with a `verdict` on them, which answers `bool` and `str`."""

    verdict: eqx.AbstractVar[Verdict]

    def __bool__(self) -> bool:
        return bool(self.verdict)

    def __str__(self) -> str:
        return str(self.verdict)


def _judge(
    measured: ArrayLike, threshold: ArrayLike, *, also: ArrayLike = True, **words: str
) -> Verdict:
    """The verdict on `measured`, with the further condition `also`. A NaN fails."""
    measured = as_float(measured, "measured")
    limit = jnp.asarray(threshold, measured.dtype)
    relation = words.setdefault("relation", "at most")
    compare = {"at most": jnp.less_equal, "above": jnp.greater, "below": jnp.less}
    holds = compare[relation](measured, limit) & jnp.asarray(also)
    return Verdict(holds, measured, limit, **words)


def _check_tol(tol: ArrayLike) -> Float[Array, ""]:
    return check_scalar(tol, "tol", minimum=0.0)


def _check_space(space: Any, d: int) -> DominantSpace:
    if not isinstance(space, DominantSpace):
        raise ValueError(
            "Argument `space` must be a `DominantSpace`, but is a "
            f"{type(space).__name__}. Use `dominant_eigenspace(Q, K, V)`."
        )
    if space.basis.shape[0] != d:
        raise ValueError(
            f"Argument `space` must be a subspace of R^d with d = {d}, but has d = "
            f"{space.basis.shape[0]}. Use the matrices and the tokens of one model."
        )
    return space


def check_empirical(mu: Any) -> Empirical:
    if not isinstance(mu, Empirical):
        raise ValueError(
            f"Argument `mu` must be an `Empirical`, but is a {type(mu).__name__}. Use "
            "`Empirical(points, weights)`, or `law.nodes(n)` for a law."
        )
    return mu


# ------------------------------------------------------------------------ matrices


@jax.jit
def _condition(A: Array) -> Array:
    """σ_max/σ_min, ∞ for a singular matrix."""
    s = jnp.linalg.svd(A, compute_uv=False)
    regular = s[-1] > 0
    return jnp.where(regular, s[0] / jnp.where(regular, s[-1], 1), jnp.inf)


def invertible_matrices(Q: ArrayLike, K: ArrayLike, V: ArrayLike) -> Verdict:
    """Assumption 1 of *multiscale*: Q, K and V are square and invertible.

    Measured: the largest of their condition numbers σ_max/σ_min (∞ if Q and K are not
    square), which must stay below 1/(d·eps) of the dtype: beyond it a matrix cannot be told
    from a singular one. **Source:** *multiscale*, Assumption 1."""
    Q, K, V = check_matrices(Q, K, V)
    numbers = [_condition(A) for A in (Q, K, V)]
    if Q.shape[0] != Q.shape[1]:
        numbers.append(jnp.asarray(jnp.inf, Q.dtype))
    return _judge(
        jnp.max(jnp.stack(numbers)),
        1 / (Q.shape[1] * jnp.finfo(Q.dtype).eps),
        name="Assumption 1",
        statement="Q, K, V square and invertible",
        quantity="condition number",
        source="multiscale, Assumption 1",
    )


def invertible_product(Q: ArrayLike, K: ArrayLike) -> Verdict:
    """Assumption A1 of *concentration*: B = QᵀK is invertible. Q and K may be k × d with
    k ≥ d. Measured: its condition number, which must stay below 1/(d·eps) of the dtype.
    **Source:** *concentration*, Assumption 1, A1."""
    Q = as_float(Q, "Q")
    Q, K, _ = check_matrices(Q, K, jnp.eye(Q.shape[-1] if Q.ndim else 1, dtype=Q.dtype))
    return _judge(
        _condition(matmul(Q.T, K)),
        1 / (Q.shape[1] * jnp.finfo(Q.dtype).eps),
        name="Assumption A1",
        statement="QᵀK invertible",
        quantity="condition number",
        source="concentration, Assumption 1",
    )


@jax.jit
def _relative(part: Array, whole: Array) -> Array:
    """|part|/|whole| in the Frobenius norm, 0 for 0/0 and at most ∞."""
    a, b = sphere.safe_norm(part.ravel()), sphere.safe_norm(whole.ravel())
    return jnp.where(a > 0, a / jnp.where(b > 0, b, 1) / (b > 0), 0)


def _asymmetry(A: Array) -> Array:
    """|A − Aᵀ|/(2|A|) ∈ [0, 1]: the part of A that is skew."""
    return _relative((A - A.T) / 2, A)


class GradientFlow(AbstractFinding):
    """Whether attention is a gradient flow, see `gradient_flow`.

    - `verdict`: on the larger of the two defects.
    - `scale` c: V = cB. c > 0 increases the interaction energy, c < 0 decreases it.
    - `symmetry_defect`: |B − Bᵀ|/(2|B|).
    - `value_defect`: |V − cB|/|V|.
    - `eigenvalues` (d,): of (B + Bᵀ)/2, increasing; B is definite if they have one sign.
    """

    verdict: Verdict
    scale: Float[Array, ""]
    symmetry_defect: Float[Array, ""]
    value_defect: Float[Array, ""]
    eigenvalues: Float[Array, " d"]


def gradient_flow(
    Q: ArrayLike, K: ArrayLike, V: ArrayLike, *, tol: ArrayLike = 1e-5
) -> GradientFlow:
    """The gradient-flow condition: B = QᵀK = S symmetric and V = cS with a number c ≠ 0.

    Then χ = (c/Z) ∇ δE/δµ with E = (1/2β)∬e^{β⟨x,Sy⟩}dµdµ and Z > 0 the normaliser (Z = 1
    for USA): the energy is monotone. The papers have c = ±1, with S positive definite
    (*multiscale*) or of either sign (*concentration*); |c| is a unit of time. c is the best
    one, ⟨V,B⟩/|B|². Measured: the larger of two relative defects, at most `tol`.

    **Source:** *multiscale*, Remark 3.8; *concentration*, App. C.3."""
    B, _, V = key_query_value(Q, K, V)
    square = jnp.sum(B * B)
    scale = jnp.sum(V * B) / jnp.where(square > 0, square, 1)
    symmetry, value = _asymmetry(B), _relative(V - scale * B, V)
    verdict = _judge(
        jnp.maximum(symmetry, value),
        _check_tol(tol),
        also=scale != 0,
        name="Gradient flow",
        statement="QᵀK = S symmetric, V = cS",
        quantity="relative defect",
        source="multiscale, Remark 3.8",
    )
    eigenvalues = jnp.linalg.eigvalsh((B + B.T) / 2)
    return GradientFlow(verdict, scale, symmetry, value, eigenvalues)


class SymmetricDominance(AbstractFinding):
    """Whether M = VBᵀ is symmetric, see `symmetric_dominance`.

    - `verdict`: on the symmetry defect of M.
    - `eigenvalue` λ₁: the largest real part of an eigenvalue of M; `gap` λ₁ − λ₂ to the next
        (∞ if there is none); `multiplicity` m = dim E.
    """

    verdict: Verdict
    eigenvalue: Float[Array, ""]
    gap: Float[Array, ""]
    multiplicity: int = eqx.field(static=True)


def symmetric_dominance(
    Q: ArrayLike,
    K: ArrayLike,
    V: ArrayLike,
    space: Any = None,
    *,
    tol: ArrayLike = 1e-5,
) -> SymmetricDominance:
    """Assumption A2 of *concentration*: M = VKᵀQ is symmetric, with largest eigenvalue λ₁ of
    multiplicity m above the next, λ₂.

    Measured: |M − Mᵀ|/(2|M|), at most `tol`. The gap λ₁ − λ₂ is open by construction of
    `space` (default: `dominant_eigenspace(Q, K, V)`; give it under `jit`).
    **Source:** *concentration*, Assumption 1, A2."""
    _, M, _ = key_query_value(Q, K, V)
    if space is None:
        space = dominant_eigenspace(Q, K, V)
    space = _check_space(space, M.shape[0])
    verdict = _judge(
        _asymmetry(M),
        _check_tol(tol),
        name="Assumption A2",
        statement="VKᵀQ symmetric",
        quantity="relative symmetry defect",
        source="concentration, Assumption 1",
    )
    return SymmetricDominance(
        verdict, jnp.max(space.eigenvalues.real), space.gap, space.dim
    )


class ScalarOnDominant(AbstractFinding):
    """QᵀK and V on the dominant space E, see `scalar_on_dominant`.

    - `lambda1`, `lambda2`, `sign`: QᵀK|_E ≈ λ₁ I and V|_E ≈ sign·λ₂ I; λ₁ is the mean of
        the diagonal of QᵀK on E (negative if that is), sign·λ₂ that of V.
    - `defect`: how far the two are from that, relative to their size on E; 1 where λ₁ ≤ 0.
    - `verdict`: on the defect.
    """

    verdict: Verdict
    lambda1: Float[Array, ""]
    lambda2: Float[Array, ""]
    sign: Float[Array, ""]
    defect: Float[Array, ""]


def scalar_on_dominant(
    Q: ArrayLike,
    K: ArrayLike,
    V: ArrayLike,
    space: Any = None,
    *,
    tol: ArrayLike = 1e-5,
) -> ScalarOnDominant:
    """Assumption 4 of *multiscale*: QᵀK|_E = λ₁ I and V|_E = ±λ₂ I with λ₁, λ₂ > 0, which
    makes E invariant and is what the heat phase needs.

    With orthonormal columns U of E, λ₁ = tr(UᵀBU)/dim E, and the defect of B is
    |BU − max(λ₁, 0)U|/|BU|; the same for ±V. Measured: the larger defect, at most `tol`.
    λ₁ and λ₂ set the heat time, λ₂t/(βλ₁) (not 1 without loss of generality).

    **Arguments:** `space`, default `dominant_eigenspace(Q, K, V)`; give it under `jit`.
    **Source:** *multiscale*, Assumption 4."""
    B, _, V = key_query_value(Q, K, V)
    if space is None:
        space = dominant_eigenspace(Q, K, V)
    U = _check_space(space, B.shape[0]).basis.astype(B.dtype)
    lambda1, defect1 = _scalar_part(B, U)
    mean = jnp.trace(matmul(U.T, matmul(V, U)))
    sign = jnp.where(mean < 0, -1.0, 1.0).astype(B.dtype)
    lambda2, defect2 = _scalar_part(sign * V, U)
    defect = jnp.maximum(defect1, defect2)
    verdict = _judge(
        defect,
        _check_tol(tol),
        name="Assumption 4",
        statement="QᵀK = λ₁I and V = ±λ₂I on E, λ₁, λ₂ > 0",
        quantity="relative defect",
        source="multiscale, Assumption 4",
    )
    return ScalarOnDominant(verdict, lambda1, lambda2, sign, defect)


@jax.jit
def _scalar_part(A: Array, U: Array) -> tuple[Array, Array]:
    """λ = tr(UᵀAU)/k and |AU − λ₊U|/|AU| (1 if AU = 0)."""
    AU = matmul(A, U)
    scalar = jnp.sum(U * AU) / U.shape[1]
    defect = _relative(AU - jnp.maximum(scalar, 0) * U, AU)
    return scalar, jnp.where(jnp.any(AU != 0), defect, 1)


# ------------------------------------------------------------------------ measures


class RegularDensity(AbstractFinding):
    """Estimated bounds of a density, see `regular_density`: its `minimum`, `maximum` and
    `lipschitz` constant, and the `verdict` on them."""

    verdict: Verdict
    minimum: Float[Array, ""]
    maximum: Float[Array, ""]
    lipschitz: Float[Array, ""]


def regular_density(mu: Any, n: int = 1000) -> RegularDensity:
    """Assumption 2 of *multiscale* (3 of *concentration*): µ₀ has a Lipschitz density that is
    bounded above and away from 0.

    **An estimate**: the density and its gradient (by autodiff) on 4n nodes spread evenly,
    4n nodes of the law and their antipodes; the true minimum is not above, the true maximum
    and Lipschitz constant are not below. It is taken to be Lipschitz if maximum + Lipschitz
    constant are at most 1.4 times what n nodes give. Measured: the smallest density over
    that of the uniform law; one that underflows, or is lost in the rounding of its series
    (tails of `HeatKernel`, d ≥ 3), counts as 0. Tokens (`Empirical`) have no density: fail.

    Density is with respect to the surface measure, per (radian)^{d−1}. Mixtures need known
    weights, hence no `jit` over them. **Source:** *multiscale*, Assumption 2."""
    words = {
        "name": "Assumption 2",
        "statement": "Lipschitz density, bounded above and away from 0",
        "source": "multiscale, Assumption 2",
        "relation": "above",
    }
    if isinstance(mu, Empirical):
        zero, infinite = jnp.zeros_like(mu.points[0, 0]), jnp.asarray(jnp.inf)
        words["quantity"] = "tokens have no density: smallest relative density"
        infinite = infinite.astype(zero.dtype)
        return RegularDensity(_judge(zero, 0, **words), zero, infinite, infinite)
    if not isinstance(mu, AbstractLaw):
        raise ValueError(
            f"Argument `mu` must be a law or an `Empirical`, but is a {type(mu).__name__}. "
            "For example `Uniform(3)`."
        )
    n = check_count(n, "n")
    *bounds, smooth = _density_bounds(mu, *(_spread_nodes(mu, k) for k in (n, 4 * n)))
    words["quantity"] = "smallest density relative to the uniform law"
    relative = bounds[0] * sphere.area(mu.d)
    return RegularDensity(_judge(relative, 0, also=smooth, **words), *bounds)


def _spread_nodes(law: AbstractLaw, n: int) -> Array:
    cloud = law.nodes(n).points
    even = Uniform(law.d, cloud.dtype).nodes(n).points
    return jnp.concatenate([even, cloud, -cloud])


@eqx.filter_jit
def _density_bounds(law: AbstractLaw, coarse: Array, fine: Array) -> tuple[Array, ...]:
    """Smallest and largest density, largest slope, and whether they have converged."""
    x = jnp.concatenate([coarse, fine])
    density, gradient = jax.vmap(jax.value_and_grad(law.density))(x)
    slope = jnp.linalg.norm(sphere.project(x, gradient), axis=-1)
    k = len(coarse)
    before = jnp.max(density[:k]) + jnp.max(slope[:k])
    highest, steepest = jnp.max(density[k:]), jnp.max(slope[k:])
    smooth = (highest + steepest <= 1.4 * before) & jnp.isfinite(highest + steepest)
    return jnp.min(density), highest, steepest, smooth


def supported_on_dominant(mu: Any, space: Any, *, tol: ArrayLike = 1e-5) -> Verdict:
    """Assumption 3 of *multiscale*: supp µ₀ ⊂ E, at the start of the heat phase.

    Measured: the largest distance |x − P_E x| of a token of positive weight, at most `tol`.
    **Source:** *multiscale*, Assumption 3."""
    mu = check_empirical(mu)
    P = _check_space(space, mu.d).projector.astype(mu.points.dtype)
    away = jnp.linalg.norm(mu.points - matmul(mu.points, P.T), axis=-1)
    return _judge(
        jnp.max(jnp.where(mu.weights > 0, away, 0)),
        _check_tol(tol),
        name="Assumption 3",
        statement="all tokens in E",
        quantity="largest distance to E",
        source="multiscale, Assumption 3",
    )


def separated_clusters(mu: Any, beta: ArrayLike, *, radius: ArrayLike = 0.0) -> Verdict:
    """Assumption 5 of *multiscale*: µ₀ = Σⱼ αⱼ δ_{xⱼ} with finitely many clusters, far enough
    apart for the pairing phase.

    Tokens up to the angle `radius` (radians, default 0: only equal tokens) apart count as
    one cluster. Measured: the smallest larger angle (∞ for one cluster), which must exceed
    1/√β, the width of the kernel e^{β(cos φ − 1)}: below it clusters attract like one. Tokens
    of weight 0 do not count. O(n²d) time and memory.

    **Source:** *multiscale*, Assumption 5; the number 1/√β is not in the paper."""
    mu = check_empirical(mu)
    beta = check_scalar(beta, "beta", minimum=0.0, strict=True)
    radius = check_scalar(radius, "radius", minimum=0.0)
    return _judge(
        _closest_angle(mu, radius),
        1 / jnp.sqrt(beta),
        name="Assumption 5",
        statement="finitely many clusters further apart than 1/√β",
        quantity="closest angle",
        relation="above",
        source="multiscale, Assumption 5",
    )


@jax.jit
def _closest_angle(mu: Empirical, radius: Array) -> Array:
    x, present = mu.points, mu.weights > 0
    angle = sphere.distance(x[:, None], x[None])
    pair = present[:, None] & present & (angle > radius)
    return jnp.min(jnp.where(pair, angle, jnp.inf))


class ConcentrationMoment(AbstractFinding):
    """The `value` of ∫|P_E x|^{−p} dµ₀ and the `verdict` on whether it is finite, see
    `concentration_moment`."""

    verdict: Verdict
    value: Float[Array, ""]


def concentration_moment(
    mu: Any, space: Any, p: float | int = 2, n: int = 4096
) -> ConcentrationMoment:
    """Assumption 2 of *concentration*: ∫|P_E x|^{−p} dµ₀ < ∞ for some p ≥ 2, so that little
    mass lies near E^⊥, which never reaches E.

    For a law whose density is bounded, and positive on E^⊥: finite if and only if
    p < m = dim E (for m = d always: |P_E x| = 1). Measured: p, below m. The value, exactly
    Γ((m−p)/2)Γ(d/2)/(Γ(m/2)Γ((d−p)/2)) for the uniform law, is a product of Gauss–Jacobi
    in |P_E x|², which takes the singularity, and rules on S^{m−1} and S^{d−m−1}, about 4n
    nodes in all (at most 256 in |P_E x|²): for laws wider than n^{−1/(d−1)} and 0.02. For
    tokens: the sum, finite if no token lies in E^⊥; measured is the smallest |P_E x|.

    **Source:** *concentration*, Assumption 2 and Example 3."""
    if not 0 <= p < math.inf:
        raise ValueError(
            f"Argument `p` must be finite and ≥ 0, but is {p}. The paper takes p ≥ 2."
        )
    words = {
        "name": "Assumption 2",
        "statement": f"∫|P_E x|^−{p:g} dµ₀ finite",
        "source": "concentration, Assumption 2",
    }
    if isinstance(mu, Empirical):
        x = mu.points
        P = _check_space(space, mu.d).projector.astype(x.dtype)
        length = jnp.linalg.norm(matmul(x, P.T), axis=-1)
        closest = jnp.min(jnp.where(mu.weights > 0, length, 1))
        floor = 8 * jnp.finfo(x.dtype).eps
        words |= {"quantity": "smallest |P_E x|", "relation": "above"}
        inverse = jnp.where(length > floor, length, floor) ** -p
        value = jnp.where(closest > floor, mu.mean(inverse), jnp.inf if p else 1)
        return ConcentrationMoment(_judge(closest, floor, **words), value)
    if not isinstance(mu, AbstractLaw):
        raise ValueError(
            f"Argument `mu` must be a law or an `Empirical`, but is a {type(mu).__name__}. "
            "For example `Uniform(3)`."
        )
    basis, m = _check_space(space, mu.d).basis, space.dim
    limit = jnp.inf if m == mu.d else m
    words |= {"quantity": "exponent p", "relation": "below"}
    verdict = _judge(jnp.asarray(p, basis.dtype), limit, **words)
    if m == mu.d:
        value = jnp.ones_like(verdict.measured)
    elif p >= m:
        value = jnp.full_like(verdict.measured, jnp.inf)
    else:
        value = _singular_moment(mu, basis, p, check_count(n, "n"))
    return ConcentrationMoment(verdict, value)


def _singular_moment(law: AbstractLaw, basis: Array, p: float, n: int) -> Array:
    """∫|P_E x|^{−p} dµ for p < m < d: x = (√t e, √(1−t) f) with e ∈ S^{m−1} ⊂ E,
    f ∈ S^{d−m−1} and t = |P_E x|² ~ Beta(m/2, (d−m)/2) under the uniform law."""
    d, m = basis.shape
    a, b = (d - m) / 2, (m - p) / 2
    count = [max(2, round(n ** (k / (d - 1)))) for k in (1, m - 1, d - m - 1)]
    q, weight = roots_jacobi(min(count[0], 256), a - 1, b - 1)
    root = np.sqrt((1 + q) / 2), np.sqrt((1 - q) / 2)
    (e, we), (f, wf) = (uniform_nodes(k, 2 * c) for k, c in zip((m, d - m), count[1:]))
    inside = root[0][:, None, None, None] * e[None, :, None]
    outside = root[1][:, None, None, None] * f[None, None]
    shape = (len(q), len(e), len(f))
    local = np.concatenate(
        [np.broadcast_to(inside, (*shape, m)), np.broadcast_to(outside, (*shape, d - m))],
        axis=-1,
    ).reshape(-1, d)
    weights = (weight / weight.sum())[:, None, None] * we[None, :, None] * wf
    frame = jnp.linalg.qr(basis, mode="complete")[0]  # its first m columns span E
    x = sphere.normalise(matmul(jnp.asarray(local, basis.dtype), frame.T))
    density = eqx.filter_jit(law.density)(x)
    mean = jnp.sum(
        jnp.asarray(weights.ravel(), basis.dtype) * density
    )  # a dot rounds more
    gammas = math.lgamma(b) - math.lgamma(a + b) - math.lgamma(m / 2) + math.lgamma(d / 2)
    return sphere.area(d) * math.exp(gammas) * mean
