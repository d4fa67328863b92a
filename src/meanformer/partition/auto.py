"""The automatic choice between the ways to sum."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..measures import Empirical
from . import costs
from .harmonic import Harmonic
from .sums import AbstractPartition, Blockwise, Dense


class Auto(AbstractPartition):
    """The fastest of `Dense`, `Blockwise` and `Harmonic(tol)` for the numbers of points and
    tokens, d, κ = |βBᵀx|, the dtype and the kind of device, by the costs that
    `meanformer bench --cases auto` measures.

    Up to 2²⁰ pairs `Dense`. Above, for d = 2 and 3, harmonics if they are faster; for large κ
    with few tokens, and for d > 3, `Blockwise`. Where β, Q and K are known when `solve` or
    `unroll` begins, the choice is made then, else while running.

    **Arguments:** `tol`: as for `Harmonic`. `exact`: never harmonics, so that sums are exact
    to rounding."""

    tol: float | None = eqx.field(static=True, default=None)
    exact: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        Harmonic(self.tol)

    def choose(self, m: int, n: int, d: int, dtype: Any) -> AbstractPartition:
        """The partition for m points and n tokens of this dtype, whatever κ is."""
        if m * n <= 2**20:
            return Dense()
        if self.exact or d > 3 or min(m, n) < costs.least(d, jnp.dtype(dtype)):
            return Blockwise()
        return Harmonic(self.tol, thrifty=True)

    def __call__(
        self, x: Float[Array, "m d"], A: Float[Array, "d d"], mu: Empirical
    ) -> tuple[Float[Array, " m"], Float[Array, "m d"]]:
        return self.choose(x.shape[0], mu.n, mu.d, x.dtype)(x, A, mu)

    def at(
        self, u: Float[Array, "m d"], mu: Empirical
    ) -> tuple[Float[Array, " m"], Float[Array, "m d"]]:
        return self.choose(u.shape[0], mu.n, mu.d, u.dtype).at(u, mu)

    def report(
        self, x: Float[Array, "m d"], A: Float[Array, "d d"], mu: Empirical
    ) -> dict[str, Array]:
        return self.choose(x.shape[0], mu.n, mu.d, x.dtype).report(x, A, mu)

    def prepared(self, A: np.ndarray, m: int, n: int, dtype: Any) -> AbstractPartition:
        return self.choose(m, n, A.shape[0], dtype).prepared(A, m, n, dtype)

    def off_sphere(self) -> AbstractPartition:
        return Auto(exact=True)
