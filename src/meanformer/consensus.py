"""Polarised consensus-based dynamics: particles that look for the minimum of a function on
the sphere, of which attention is the case of a quadratic function."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from . import sphere
from .attention import AbstractField, check_partition
from .checks import ArrayLike, as_float, check_finite, check_scalar, is_traced, refuse
from .matrices import matmul
from .measures import Empirical
from .partition import AbstractPartition


class AbstractNoisyField(AbstractField):
    """A field whose noise has an amplitude of its own at each point."""

    @abc.abstractmethod
    def drive_and_amplitude(
        self, x: Float[Array, "m d"], mu: Empirical
    ) -> tuple[Float[Array, "m d"], Float[Array, " m"]]:
        """F(x, µ), and the factor by which the noise at x is larger than σ."""

    def drive(self, x: Float[Array, "m d"], mu: Empirical) -> Float[Array, "m d"]:
        return self.drive_and_amplitude(x, mu)[0]


class _Function(eqx.Module):
    """A plain function as part of a pytree: equal for equal functions."""

    f: Callable = eqx.field(static=True)

    def __call__(self, y: Array) -> Array:
        return self.f(y)


class PolarizedConsensus(AbstractNoisyField):
    """Polarised consensus-based dynamics on the sphere, for the minimum of f:

        dxᵢ = P_{xᵢ} c(xᵢ) dt + σ|xᵢ − c(xᵢ)| P_{xᵢ} dBᵢ − σ²|xᵢ − c(xᵢ)|² (d−1)/2 xᵢ dt,
        c(x) = ∫ y k(x,y) e^{−βf(y)} dµ(y) / ∫ k(x,y) e^{−βf(y)} dµ(y),
        k(x,y) = e^{−(β/2) ⟨x−y, B(x−y)⟩},

    in Itô's sense; the drift P_x(c − x) is P_x c, the last term keeps |xᵢ| = 1. `drive` is
    the consensus point c. `solve` integrates σ = 0, `diffuse(…, noise=σ)` all of it.

    - f(x) = −½⟨x,Bx⟩ gives self-attention with QᵀK = B and V = I.
    - B = I/(βκ²) is the Gaussian kernel of width κ; B = 0 (κ → ∞) is standard
        consensus-based optimisation, with one c for all.

    **Arguments:**

    - `objective`: f, a function of one unit vector, shape (d,), with a finite scalar value.
        Define it once (a new function is a new program); for gradients to its parameters
        make it an `equinox.Module` with a `__call__`.
    - `B`: symmetric, shape (d, d). Need not be positive: only differences of
        f(y) + ½⟨y,By⟩ and the products ⟨x,By⟩ count.
    - `beta`: β ≥ 0, a scalar. `partition`: as for `SelfAttention`, but no harmonics.

    e^{−βf} stays in the exponents, so that a particle sees its neighbourhood also where all
    others are better by any β Δf; rounding grows like β(max f − min f + ‖B‖). O(m n d) time.

    **Raises:** `ValueError` for a B that is not symmetric, bad shapes, β < 0, values of f of
    a wrong shape, or not finite (where they can be read).
    **Source:** *concentration*, Eqs. (5), (6)."""

    objective: Callable[[Array], Array]
    B: Float[Array, "d d"]
    beta: Float[Array, ""]
    partition: AbstractPartition

    def __init__(
        self,
        objective: Any,
        B: ArrayLike,
        beta: ArrayLike,
        partition: AbstractPartition | None = None,
    ):
        if not callable(objective):
            raise ValueError(
                f"Argument `objective` must be a function of one unit vector, but is "
                f"{objective!r}. For example `lambda x: -x[0]`."
            )
        module = isinstance(objective, eqx.Module)
        self.objective = objective if module else _Function(objective)  # pyright: ignore
        self.B = _check_symmetric(B, "B")
        self.beta = check_scalar(beta, "beta", minimum=0.0, cure="To maximise f give −f.")
        self.partition = check_partition(partition).off_sphere()  # tokens are lifted

    @property
    def d(self) -> int:
        return self.B.shape[-1]

    def consensus(self, x: Float[Array, "m d"], mu: Empirical) -> Float[Array, "m d"]:
        """The consensus points c(x), not on the sphere: no checks, for inner loops."""
        # k(x,y) e^{−βf(y)} = e^{⟨u,y⟩ + ℓ(y)} × (a function of x), u = βBx, and
        # ⟨u,y⟩ + ℓ = ⟨(u, s), (y, ℓ/s)⟩: the partition of tokens of R^{d+1}, of norm ≤ 1.
        y = mu.points
        log_tilt = self._log_tilt(mu)
        size = jax.lax.stop_gradient(jnp.max(jnp.abs(log_tilt)))
        size = jnp.where(size > 0, size, 1)
        root = jnp.sqrt(jnp.asarray(2, y.dtype))
        wide = jnp.result_type(self.B.dtype, x.dtype)
        kernel = (self.beta.astype(wide) * self.B.astype(wide)).astype(x.dtype)
        A = root * jax.scipy.linalg.block_diag(kernel, size)
        lifted = jnp.concatenate([y, (log_tilt / size)[:, None]], axis=1) / root
        ones = jnp.ones((x.shape[0], 1), x.dtype)
        _, mean = self.partition(
            jnp.concatenate([x, ones], axis=1),
            A,
            Empirical(lifted, mu.weights, check=False),
        )
        return root * mean[:, :-1]

    def _log_tilt(self, mu: Empirical) -> Float[Array, " n"]:
        """−β(f(y) + ½⟨y,By⟩) up to a constant, of the least absolute value; 0 where no mass
        is."""
        f = jnp.asarray(jax.vmap(self.objective)(mu.points))
        if f.shape != (mu.n,):
            raise ValueError(
                "Argument `objective` must return a scalar for one unit vector, but returns "
                f"shape {f.shape[1:]}. Return one number."
            )
        if not is_traced(f):
            refuse(
                f,
                ~jnp.isfinite(f),
                "Argument `objective` must be finite at every token, but is not. Give tokens "
                "outside of its domain weight 0 and a finite value.",
            )
        wide = jnp.result_type(self.B.dtype, mu.points.dtype)
        y = mu.points.astype(wide)
        g = f.astype(wide) + jnp.sum(y * matmul(y, self.B.astype(wide)), axis=1) / 2
        counts = mu.weights > 0
        highest = jnp.max(g, where=counts, initial=-jnp.inf)
        lowest = jnp.min(g, where=counts, initial=jnp.inf)
        middle = jax.lax.stop_gradient((highest + lowest) / 2)
        tilt = jnp.where(counts, -self.beta.astype(wide) * (g - middle), 0)
        return tilt.astype(mu.points.dtype)

    def drive_and_amplitude(
        self, x: Float[Array, "m d"], mu: Empirical
    ) -> tuple[Float[Array, "m d"], Float[Array, " m"]]:
        """c(x), and |x − c(x)|."""
        c = self.consensus(x, mu)
        return c, sphere.safe_norm(x - c)


def _check_symmetric(B: ArrayLike, name: str) -> Float[Array, "d d"]:
    """`B` as a symmetric matrix, to rounding."""
    B = as_float(B, name)
    if B.ndim != 2 or B.shape[0] != B.shape[1]:
        raise ValueError(
            f"Argument `{name}` must have shape (d, d), but has shape {B.shape}."
        )
    d = sphere.check_dimension(B.shape[0], f"d = {name}.shape[0]")
    B = check_finite(B, name, (d, d))
    rounding = 8 * jnp.finfo(B.dtype).eps * jnp.max(jnp.abs(B))
    return refuse(
        B,
        ~(jnp.abs(B - B.T) <= rounding),
        f"Argument `{name}` must be symmetric, but is not. Use ({name} + {name}.T)/2: the "
        "kernel knows no more of it.",
    )
