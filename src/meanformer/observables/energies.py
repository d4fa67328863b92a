"""Interaction energies E(µ) = ½∬W(⟨x,y⟩)dµdµ, and how close they are to their optimum."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .. import theory
from ..attention import check_measure, check_partition
from ..checks import ArrayLike, as_float, check_kernel, check_scalar
from ..matrices import check_matrices, matmul
from ..measures import Empirical
from ..partition import AbstractPartition, in_blocks


class Interaction(eqx.Module):
    """`interaction` as an observable: `Interaction(Q, K, beta)(mu)`; with `log` its
    logarithm. Q, K and β are leaves."""

    Q: Float[Array, "k d"]
    K: Float[Array, "k d"]
    beta: Float[Array, ""]
    partition: AbstractPartition
    log: bool = eqx.field(static=True)

    def __init__(
        self,
        Q: ArrayLike,
        K: ArrayLike,
        beta: ArrayLike,
        partition: AbstractPartition | None = None,
        log: bool = False,
    ):
        Q = as_float(Q, "Q")
        values = jnp.eye(Q.shape[-1] if Q.ndim else 0, dtype=Q.dtype)
        self.Q, self.K, _ = check_matrices(Q, K, values)
        self.beta = check_scalar(beta, "beta", minimum=0.0)
        self.partition, self.log = check_partition(partition), log

    def __call__(self, mu: Empirical) -> Float[Array, ""]:
        mu = check_measure(mu, self.Q.shape[1])
        B = matmul(self.Q.T, self.K)
        A = (self.beta.astype(B.dtype) * B).astype(mu.points.dtype)
        total = _log_mean_partition(self.partition, A, mu)
        return total if self.log else jnp.exp(total)


@eqx.filter_jit
def _log_mean_partition(partition: AbstractPartition, A: Array, mu: Empirical) -> Array:
    log_z, _ = partition(mu.points, A, mu)
    return jax.nn.logsumexp(log_z, b=mu.weights)


def interaction(
    mu: Empirical,
    Q: ArrayLike,
    K: ArrayLike,
    beta: ArrayLike,
    partition: AbstractPartition | None = None,
    log: bool = False,
) -> Float[Array, ""]:
    """∬ e^{β⟨Qx,Ky⟩} dµ(x) dµ(y), or its logarithm, which no β ≥ 0 makes overflow: the energy
    without the factor 1/2β. Arguments and cost as for `energy`; β = 0 gives 1.
    **Source:** *concentration*, App. C.3."""
    return Interaction(Q, K, beta, partition, log)(mu)


class Energy(eqx.Module):
    """`energy` as an observable: `Energy(Q, K, beta)(mu)`; with `log` it is `log_energy`.
    Q, K and β are leaves."""

    interaction: Interaction
    log: bool = eqx.field(static=True)

    def __init__(
        self,
        Q: ArrayLike,
        K: ArrayLike,
        beta: ArrayLike,
        partition: AbstractPartition | None = None,
        log: bool = False,
    ):
        beta = check_scalar(beta, "beta", minimum=0.0, strict=True)
        self.interaction = Interaction(Q, K, beta, partition, log=True)
        self.log = log

    def __call__(self, mu: Empirical) -> Float[Array, ""]:
        total = self.interaction(mu)
        value = total - jnp.log(2 * self.interaction.beta).astype(total.dtype)
        return value if self.log else jnp.exp(value)


def energy(
    mu: Empirical,
    Q: ArrayLike,
    K: ArrayLike,
    beta: ArrayLike,
    partition: AbstractPartition | None = None,
) -> Float[Array, ""]:
    """The interaction energy E(µ) = (1/2β) ∬ e^{β⟨Qx,Ky⟩} dµ(x) dµ(y).

    It increases along (USA), and along (SA) where QᵀK is symmetric and V = QᵀK; with
    V = −QᵀK it decreases. For B = QᵀK symmetric and V = cB the field is its gradient,

        χ(xᵢ) = (c/wᵢ) P ∂E/∂xᵢ  (USA),   χ(xᵢ) = (c/(wᵢZᵢ)) P ∂E/∂xᵢ  (SA),

    with Zᵢ = ∫e^{β⟨xᵢ,By⟩}dµ(y), so that dE/dt = Σwᵢ|χᵢ|²/c or Σwᵢ Zᵢ|χᵢ|²/c.

    **Arguments:** Q, K of shape `(k, d)`, β > 0, and how to sum (`partition`, default
    `Auto()`). O(n²d) time. For large β use `log_energy`. **Source:** *multiscale*, Appendix
    E; *metastable*, Sec. 2; *concentration*, App. C.3."""
    return Energy(Q, K, beta, partition)(mu)


def log_energy(
    mu: Empirical,
    Q: ArrayLike,
    K: ArrayLike,
    beta: ArrayLike,
    partition: AbstractPartition | None = None,
) -> Float[Array, ""]:
    """log of `energy`, finite for every β > 0 (E itself overflows from β‖B‖ ≈ 700 on)."""
    return Energy(Q, K, beta, partition, log=True)(mu)


class NormalisedEnergy(eqx.Module):
    """`normalised_energy` as an observable: `NormalisedEnergy(Q, K, V, beta)(mu)`.

    The optimum is taken once, when the observable is made: differentiate through the making
    (or rebuild it) when Q, K, V or β change, not by replacing leaves."""

    energy: Energy
    log_optimum: Float[Array, ""]
    scale: Float[Array, ""]
    log: bool = eqx.field(static=True)

    def __init__(
        self,
        Q: ArrayLike,
        K: ArrayLike,
        V: ArrayLike,
        beta: ArrayLike,
        log_optimum: ArrayLike | None = None,
        partition: AbstractPartition | None = None,
        log: bool = False,
    ):
        self.energy = Energy(Q, K, beta, partition, log=True)
        self.scale = theory.gradient_flow(Q, K, V).scale
        if log_optimum is None:
            log_optimum = theory.energy_optimum(Q, K, V, beta).log_energy
        self.log_optimum = check_scalar(log_optimum, "log_optimum")
        self.log = log

    def __call__(self, mu: Empirical) -> Float[Array, ""]:
        gap = self.energy(mu) - self.log_optimum.astype(mu.points.dtype)
        value = jnp.where(self.scale > 0, gap, -gap)
        return value if self.log else jnp.exp(value)


def normalised_energy(
    mu: Empirical,
    Q: ArrayLike,
    K: ArrayLike,
    V: ArrayLike,
    beta: ArrayLike,
    log_optimum: ArrayLike | None = None,
    partition: AbstractPartition | None = None,
    log: bool = False,
) -> Float[Array, ""]:
    """How good µ is for the flow that optimises E: E/E_opt ∈ (0, 1] where V = cQᵀK has c > 0
    and E is maximised, E_opt/E ∈ (0, 1] where c < 0 and it is minimised; 1 at the optimum.

    With `log` the logarithm (≤ 0), which neither overflows nor underflows; the ratio is its
    exponential, taken last, so that β = 10³ is no problem.

    **Arguments:** as `energy`; V; `log_optimum`, the logarithm of E_opt where
    `theory.energy_optimum` does not know it (for B = λI > 0 and c < 0 that of the uniform law).
    **Raises:** `ValueError` where V is not cB with symmetric B, or the optimum is neither
    known nor given. **Source:** *concentration*, App. C.3, Figs. 6–9."""
    return NormalisedEnergy(Q, K, V, beta, log_optimum, partition, log)(mu)


class KernelEnergy(eqx.Module):
    """`kernel_energy` as an observable: `KernelEnergy(W)(mu)`. Arrays of a W that is a
    module are leaves."""

    W: Callable[[Array], Array]

    def __init__(self, W: Callable[[Array], Array]):
        self.W = check_kernel(W)

    def __call__(self, mu: Empirical) -> Float[Array, ""]:
        return _kernel_energy(self.W, check_measure(mu))


@eqx.filter_jit
def _kernel_energy(W: Callable, mu: Empirical) -> Array:
    tiles = in_blocks(mu.points, 1024), in_blocks(mu.weights, 1024)

    @jax.checkpoint  # keep no tile
    def pairs(x, w, y, v):
        return jnp.dot(w, matmul(W(matmul(x, y.T)), v))

    def row(total, tile):
        def add(part, other):
            return part + pairs(*tile, *other), None

        return jax.lax.scan(add, total, tiles)[0], None

    zero = jnp.zeros((), mu.points.dtype)
    return jax.lax.scan(row, zero, tiles)[0] / 2


def kernel_energy(mu: Empirical, W: Callable[[Array], Array]) -> Float[Array, ""]:
    """½ ∬ W(⟨x,y⟩) dµ(x) dµ(y), which grows at the rate `theory.equilibrium_residual` along
    ∂_t µ + div(µ ∇(W∗µ)) = 0; W(q) = e^{βq}/β is `energy` with Q = K = I.

    **Arguments:** `W`, of an array of cosines, elementwise, finite on [−1, 1]. O(n²d) time,
    O(n) memory, for the reverse mode too. **Source:** *metastable*, Eq. (3)."""
    return KernelEnergy(W)(mu)
