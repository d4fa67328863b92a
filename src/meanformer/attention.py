"""Attention vector fields at finite inverse temperature β.

All take the matrices as the papers do: weights e^{β⟨Qx,Ky⟩}, values Vy. With B = QᵀK the
exponent is β⟨x,By⟩ = ⟨u,y⟩ for u = βBᵀx, so that every field is made of the
log-partition L_µ(u) and the barycentre ∇L_µ(u) of `partition`.

Points are rows. Parameters follow the dtype of the tokens at evaluation.
"""

import abc
import copy
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from . import sphere
from .checks import ArrayLike, check_finite, check_scalar, check_times, is_traced
from .matrices import check_matrices, matmul
from .measures import Empirical
from .partition import AbstractPartition, Auto


class AbstractField(eqx.Module):
    """The right-hand side of ẋ = P_x F(x, µ) for tokens of law µ.

    `drive` is F, which the discrete transformer adds before it normalises; `velocity` is
    its tangential part, the vector field of the flow."""

    @property
    @abc.abstractmethod
    def d(self) -> int | None:
        """Dimension of the tokens (None: any)."""

    @abc.abstractmethod
    def drive(self, x: Float[Array, "m d"], mu: Empirical) -> Float[Array, "m d"]:
        """F(x, µ) at unit vectors x: no checks, for inner loops."""

    def at(self, t: Float[Array, ""]) -> "AbstractField":
        """The field in force at time `t`: itself, unless parameters depend on time."""
        del t
        return self

    def velocity(self, x: ArrayLike, mu: Any) -> Float[Array, "m d"]:
        """χ[µ](x) = P_x F(x, µ), tangent to the sphere at each row of `x`.

        **Arguments:** `x`, any points of the sphere, shape `(m, d)`, tokens of µ or not;
        `mu`, an `Empirical` on the same sphere. **Raises:** `ValueError` for points off
        the sphere, of another d, not finite, or for a measure that is not `Empirical`."""
        x = sphere.check_tokens(x, "x", self.d)
        mu = check_measure(mu, self.d)
        return self.tangent(
            x,
            Empirical(mu.points.astype(x.dtype), mu.weights.astype(x.dtype), check=False),
        )

    def tangent(self, x: Float[Array, "m d"], mu: Empirical) -> Float[Array, "m d"]:
        """`velocity` without checks, for inner loops."""
        # Twice is enough: the second projection removes the rounding of the first.
        return sphere.project(x, sphere.project(x, self.drive(x, mu)))


_BETA = "For repulsion reverse the sign of `V`; for β → ∞ see `ZeroTemperature`."


def check_measure(mu: Any, d: int | None = None, name: str = "mu") -> Empirical:
    """`mu` as weighted tokens on S^{d−1}."""
    if not isinstance(mu, Empirical):
        raise ValueError(
            f"Argument `{name}` must be an `Empirical`, but is a {type(mu).__name__}. "
            "Use `Empirical(points, weights)`, or `law.nodes(n)` for a law."
        )
    if d is not None and mu.d != d:
        raise ValueError(
            f"Argument `{name}` must be a measure on S^(d−1) with d = {d} to fit the "
            f"matrices, but has d = {mu.d}."
        )
    return mu


def check_partition(partition: Any) -> AbstractPartition:
    """`partition`, or the default `Auto()` for None."""
    if partition is None:
        return Auto()
    if not isinstance(partition, AbstractPartition):
        raise ValueError(
            "Argument `partition` must be `Dense()`, `Blockwise()`, `Harmonic()` or `Auto()`, "
            f"but is {partition!r}."
        )
    return partition


def _sums(node: Any) -> bool:
    """Whether `node` sums e^{β⟨Qx,Ky⟩} over tokens by a partition."""
    return isinstance(getattr(node, "partition", None), AbstractPartition) and all(
        hasattr(node, name) for name in ("Q", "K", "beta")
    )


def summing(tree: Any) -> list[Any]:
    """All parts of a field (or of observables) that sum over tokens by a partition."""
    return [node for node in jax.tree.leaves(tree, is_leaf=_sums) if _sums(node)]


def prepared(tree: Any, m: int, n: int, dtype: Any) -> Any:
    """`tree` with each partition as it comes to for m points, n tokens and the largest β‖QᵀK‖
    in it, where these are known."""

    def choose(node):
        if not _sums(node):
            return node
        Q, K, beta = jax.lax.stop_gradient((node.Q, node.K, node.beta))
        if is_traced(Q, K, beta):
            return node
        Q, K, beta = np.asarray(Q), np.asarray(K), np.asarray(beta)
        A = beta[..., None, None] * (np.swapaxes(Q, -1, -2) @ K)
        A = A.reshape(-1, *A.shape[-2:])
        largest = A[np.argmax(np.linalg.norm(A, 2, axis=(1, 2)))]
        # What is known is known inside of `jit` too.
        with jax.ensure_compile_time_eval():
            found = node.partition.prepared(largest, m, n, dtype)
        changed = copy.copy(node)
        object.__setattr__(changed, "partition", found)
        return changed

    return jax.tree.map(choose, tree, is_leaf=_sums)


def sums_in_words(field: AbstractField) -> str:
    """The partitions of a field, for a run's `method`."""
    names = dict.fromkeys(type(node.partition).__name__ for node in summing(field))
    return f"; sums: {', '.join(names)}" if names else ""


def report_sums(field: AbstractField, x: Array, mu: Empirical) -> dict[str, Array]:
    """How the sums of F(x, µ) are taken (see `AbstractPartition.report`): the largest number
    of modes, and the sum of `dense_points` over the parts of the field."""
    modes, points = jnp.asarray(0), jnp.asarray(0)
    for node in summing(field):
        report = node.partition.report(x, node.to_dual(x.dtype, node.beta), mu)
        modes = jnp.maximum(modes, report["modes"])
        points = points + report["dense_points"]
    return {"modes": modes, "dense_points": points}


class AbstractAttention(AbstractField):
    """A field with matrices Q, K, V."""

    Q: eqx.AbstractVar[Float[Array, "k d"]]
    K: eqx.AbstractVar[Float[Array, "k d"]]
    V: eqx.AbstractVar[Float[Array, "d d"]]

    @property
    def d(self) -> int:
        return self.V.shape[-1]

    @property
    def B(self) -> Float[Array, "d d"]:
        """B = QᵀK, so that ⟨Qx, Ky⟩ = ⟨x, By⟩."""
        return matmul(jnp.swapaxes(self.Q, -1, -2), self.K)

    def to_dual(self, dtype: Any, beta: Array | float = 1.0) -> Float[Array, "d d"]:
        """βB in the given dtype, formed in the wider of it and the parameters': `x @ A` are
        the points u = βBᵀx at which the partition is taken."""
        wide = jnp.result_type(self.Q.dtype, dtype)
        B = matmul(jnp.swapaxes(self.Q, -1, -2).astype(wide), self.K.astype(wide))
        return (jnp.asarray(beta, wide) * B).astype(dtype)


class SelfAttention(AbstractAttention):
    """Softmax self-attention on the sphere, the field (SA) of the papers:

        χ_β[µ](x) = P_x ∫ e^{β⟨Qx,Ky⟩} V y dµ(y) / ∫ e^{β⟨Qx,Ky⟩} dµ(y)
                  = P_x V ∇L_µ(βBᵀx),      P_x v = v − ⟨x,v⟩x,  B = QᵀK.

    **Arguments:**

    - `Q`, `K`: query and key maps, shape `(k, d)`, any k.
    - `V`: value map, shape `(d, d)`.
    - `beta`: inverse temperature β ≥ 0, a scalar. β = 0 averages all tokens; for β → ∞
        see `ZeroTemperature` and `Hardmax`, which differ.
    - `partition`: how the sums over tokens are computed (default `Auto()`).

    All four are leaves of the pytree: gradients reach each of them. Time and β have no
    unit. One evaluation takes O(m n d) time; memory: see `partition`.

    **Raises:** `ValueError` if shapes disagree, an entry is not finite, or β < 0.

    **Source:** *multiscale*, Eq. (SA) and Eq. (3).
    """

    Q: Float[Array, "k d"]
    K: Float[Array, "k d"]
    V: Float[Array, "d d"]
    beta: Float[Array, ""]
    partition: AbstractPartition

    def __init__(
        self,
        Q: ArrayLike,
        K: ArrayLike,
        V: ArrayLike,
        beta: ArrayLike,
        partition: AbstractPartition | None = None,
    ):
        self.Q, self.K, self.V = check_matrices(Q, K, V)
        self.beta = check_scalar(beta, "beta", minimum=0.0, cure=_BETA)
        self.partition = check_partition(partition)

    def drive(self, x: Float[Array, "m d"], mu: Empirical) -> Float[Array, "m d"]:
        A = self.to_dual(x.dtype, self.beta)
        _, barycentre = self.partition(x, A, mu)
        return matmul(barycentre, self.V.T.astype(x.dtype))


class UnnormalizedSelfAttention(AbstractAttention):
    """Attention without the normaliser, the field (USA) of the papers:

        χ[µ](x) = P_x ∫ e^{β⟨Qx,Ky⟩} V y dµ(y) = P_x e^{L_µ(βBᵀx)} V ∇L_µ(βBᵀx).

    Speeds grow like e^{β‖B‖}. With `unit="shifted"` velocities are computed as
    e^{−c} χ with c = β‖B‖₂ (`log_unit`), so that time is measured in units of e^{−c} and
    β = 100 runs in float32; with `unit="paper"` (default) they are the papers' own, and
    β‖B‖₂ must stay below the overflow of the tokens' dtype (88 in float32).

    **Arguments:** as `SelfAttention`, and `unit`. **Source:** *metastable*, Eq. (USA);
    for Q = K = V = I it is the gradient flow of the interaction energy
    (1/2β)∬e^{β⟨x,y⟩}dµdµ.
    """

    Q: Float[Array, "k d"]
    K: Float[Array, "k d"]
    V: Float[Array, "d d"]
    beta: Float[Array, ""]
    partition: AbstractPartition
    unit: str = eqx.field(static=True)

    def __init__(
        self,
        Q: ArrayLike,
        K: ArrayLike,
        V: ArrayLike,
        beta: ArrayLike,
        partition: AbstractPartition | None = None,
        unit: str = "paper",
    ):
        self.Q, self.K, self.V = check_matrices(Q, K, V)
        self.beta = check_scalar(beta, "beta", minimum=0.0, cure=_BETA)
        self.partition = check_partition(partition)
        if unit not in ("paper", "shifted"):
            raise ValueError(
                f'Argument `unit` must be "paper" or "shifted", but is {unit!r}.'
            )
        self.unit = unit

    @property
    def log_unit(self) -> Float[Array, ""]:
        """c = β‖B‖₂ if time is counted in units of e^{−c}, else 0."""
        if self.unit == "paper":
            return jnp.zeros_like(self.beta)
        # σ = ⟨u, Bv⟩ with the first singular vectors held fixed: the gradient of the norm,
        # and no 1/(σ₁ − σ₂) in second derivatives where B = I.
        u, _, vh = jnp.linalg.svd(jax.lax.stop_gradient(self.B))
        norm = u[..., :, 0] @ self.B @ vh[..., 0, :]
        return self.beta * norm.astype(self.beta.dtype)

    def drive(self, x: Float[Array, "m d"], mu: Empirical) -> Float[Array, "m d"]:
        A = self.to_dual(x.dtype, self.beta)
        log_z, barycentre = self.partition(x, A, mu)
        factor = jnp.exp(log_z - self.log_unit.astype(x.dtype))
        return factor[:, None] * matmul(barycentre, self.V.T.astype(x.dtype))


class LayerStack(AbstractField):
    """One field per layer: the parameters Q_l, K_l, V_l, β_l of a deep transformer.

    **Arguments:**

    - `fields`: fields of one kind and shape, in the order of the layers; their leaves are
        stacked, so that a thousand layers compile as one.
    - `times`: when each layer begins in the flow of `solve`, shape `(layers,)`, strictly
        increasing; the last stays in force for ever, the first also before its time.
        Default 0, 1, 2, …; `unroll` takes the layers one by one and ignores it.

    In a `solve` of fixed steps put `times` on the grid of steps. `velocity` and `drive` are
    those of the first layer; use `stack.layer(l)` or `stack.at(t)` for others.

    **Source:** *multiscale*, Eq. (1) and (SA) with Q_t, K_t, V_t piecewise constant.
    """

    stacked: AbstractField
    times: Float[Array, " layers"]
    layers: int = eqx.field(static=True)

    def __init__(self, fields, times: ArrayLike | None = None):
        if isinstance(fields, AbstractField):
            raise ValueError(
                "Argument `fields` must be a list of fields, one per layer, but is one field. "
                "Use [field] * layers."
            )
        fields = tuple(fields)
        if not fields:
            raise ValueError("Argument `fields` must hold at least one field, not none.")
        first = jax.tree.structure(fields[0])
        shapes = [leaf.shape for leaf in jax.tree.leaves(fields[0])]
        for i, f in enumerate(fields):
            if jax.tree.structure(f) != first or shapes != [
                leaf.shape for leaf in jax.tree.leaves(f)
            ]:
                raise ValueError(
                    "Argument `fields` must hold fields of one kind, with matrices of one "
                    f"shape and one partition, but field {i} differs from field 0."
                )
        self.stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *fields)
        self.layers = len(fields)
        if times is None:
            times = jnp.arange(self.layers, dtype=jnp.result_type(float))
        self.times = check_times(check_finite(times, "times", (self.layers,)), "times")

    @property
    def d(self) -> int | None:
        return self.stacked.d

    def layer(self, l: int | Array) -> AbstractField:
        """The field of layer `l`, counted from 0."""
        return jax.tree.map(lambda leaf: leaf[l], self.stacked)

    def at(self, t: Float[Array, ""]) -> AbstractField:
        l = jnp.searchsorted(self.times, t, side="right") - 1
        return self.layer(jnp.clip(l, 0, self.layers - 1))

    def drive(self, x: Float[Array, "m d"], mu: Empirical) -> Float[Array, "m d"]:
        """F of the first layer; `solve` and `unroll` take the layer in force."""
        return self.layer(0).drive(x, mu)


class TimeDependent(AbstractField):
    """Parameters that vary smoothly with time: the field `make(t, args)`.

    **Arguments:** `make`, a function of a scalar time and of `args` that returns a field
    (called while tracing); `args`, a pytree of arrays that gradients shall reach;
    `dim`, the dimension d of the tokens. `velocity` and `drive` are those of time 0; use
    `field.at(t)` for others. **Source:** *multiscale*, (SA) with Q_t, K_t, V_t.
    """

    make: Callable[[Array, Any], AbstractField] = eqx.field(static=True)
    args: Any
    dim: int = eqx.field(static=True)

    def __init__(self, make: Callable, args: Any = None, *, dim: int):
        if not callable(make):
            raise ValueError(f"Argument `make` must be callable, but is {make!r}.")
        self.make, self.args = make, args
        self.dim = sphere.check_dimension(dim, "dim")

    @property
    def d(self) -> int:
        return self.dim

    def at(self, t: Float[Array, ""]) -> AbstractField:
        return self.make(t, self.args)

    def drive(self, x: Float[Array, "m d"], mu: Empirical) -> Float[Array, "m d"]:
        """F at time 0; `solve` and `unroll` take the time in force."""
        return self.at(jnp.zeros((), x.dtype)).drive(x, mu)
