"""The unstable mode beyond first order: Grenier's expansion on S¹.

Take ∂ₜf + ∂_θ(f ∂_θ(W*f)) = 0 with f(0) = 1/2π + α cos kθ. The wavelength 2π/k is kept, so that

    f = (1/2π) Σ_m b_m(t) e^{imkθ},    b_0 = 1,  b_{−m} = b_m real,
    ḃ_m = Γ_m b_m + m Σ_{p+q=m, p,q≠0} (Γ_q/q) b_p b_q,    Γ_m = γ_{mk},

exactly: the kernel enters through its growth rates only. Its power series in α is found order
by order; each b_m is a sum of exponentials e^{(n·Γ)t}, n·Γ = Σ_m n_m Γ_m with integers n_m ≥ 0."""

import functools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..checks import (
    ArrayLike,
    as_float,
    check_count,
    check_finite,
    check_scalar,
    refuse,
    shown,
)
from ..matrices import matmul


class GrenierExpansion(eqx.Module):
    """f^{α,K}(t, θ) = 1/2π + Σ_{j≤K} αʲ g_j(t, θ), with

        g_j(t, θ) = Σ_m Σ_n coefficients[j−1, m−1, n] e^{exponents[n]·t} cos(mkθ).

    - `rates` (order,): γ_k, γ_{2k}, ….
    - `exponents` (terms,): all n·Γ with Σ m n_m ≤ order; the first `order` of them are
        jγ_k, the fastest in g_j.
    - `coefficients` (order, order, terms): 0 for m > j, and for m and j of unlike parity.
    - `k`: the dominant mode.
    """

    rates: Float[Array, " order"]
    exponents: Float[Array, " terms"]
    coefficients: Float[Array, "order order terms"]
    k: int = eqx.field(static=True)

    @property
    def order(self) -> int:
        """The highest power of α."""
        return self.rates.shape[0]

    @property
    def leading(self) -> Float[Array, "order order"]:
        """G_{jm} in lim_{t→∞} e^{−jγ_k t} g_j = Σ_m G_{jm} cos mkθ. The sum
        1/2π + Σ_j (αe^{γ_k t})ʲ Σ_m G_{jm} cos mkθ is, to each order, the solution that leaves
        the uniform law at t = −∞ along cos kθ."""
        j = jnp.arange(self.order)
        return self.coefficients[j, :, j]

    def modes(
        self, t: ArrayLike, alpha: ArrayLike, order: int | None = None
    ) -> Float[Array, " order"]:
        """The amplitudes of cos(mkθ), m = 1 … order, in f^{α,K}(t) with K = `order`."""
        K = self.order if order is None else check_count(order, "order")
        if self.order < K:
            raise ValueError(
                f"Argument `order` must be at most {self.order}, the order of the expansion, "
                f"but is {K}. Expand further."
            )
        dtype = self.rates.dtype
        t = check_scalar(t, "t", minimum=0.0).astype(dtype)
        alpha = check_scalar(alpha, "alpha").astype(dtype)
        powers = alpha ** jnp.arange(1, K + 1)
        largest = jnp.max(self.exponents) * t
        t = refuse(
            t,
            ~(largest < math.log(float(jnp.finfo(dtype).max)) - 1),
            f"Argument `t` must be small enough for e^(γt) not to overflow {dtype}, but the "
            f"largest exponent is {shown(largest)}. The expansion is for αe^(γt) ≪ 1.",
        )
        growth = jnp.exp(self.exponents * t)
        return matmul(powers, matmul(self.coefficients[:K], growth))

    def density(
        self,
        theta: ArrayLike,
        t: ArrayLike,
        alpha: ArrayLike,
        order: int | None = None,
    ) -> Float[Array, "..."]:
        """f^{α,K}(t, θ), a density on S¹ (of integral 1), with K = `order` (default all).
        The error is O((αe^{γ_k t})^{K+1}); meant for αe^{γ_k t} well below 1/2π."""
        theta = as_float(theta, "theta")
        amplitudes = self.modes(t, alpha, order)
        m = self.k * jnp.arange(1, amplitudes.shape[0] + 1)
        return 1 / (2 * math.pi) + matmul(jnp.cos(theta[..., None] * m), amplitudes)


def grenier_expansion(rates: ArrayLike, k: int) -> GrenierExpansion:
    """g_1 … g_order of *metastable*, Eq. (25), for the initial law 1/2π + α cos kθ:

        g_1 = e^{γ_k t} cos kθ,   (∂ₜ − L) g_j = −Σ_{i<j} ∂_θ(g_i ∂_θ(W*g_{j−i})),   g_j(0) = 0.

    **Arguments:** `rates` (order,): the growth rates γ_k, γ_{2k}, …, γ_{order·k} of (USA), as
    `growth_rates(beta, 2, k * np.arange(1, order + 1))` returns them, or of any kernel W from
    `kernel_growth_rates`; `k` ≥ 1, normally k_max.

    Differentiable in the rates. **Raises:** `ValueError` (traced: at run time) at a resonance
    n·Γ = Γ_m, where a term t·e^{Γ_m t} appears; for k = k_max there is none.

    **Source:** *metastable*, Eqs. (23), (25)–(27), solved in closed form."""
    rates = check_finite(rates, "rates", (None,))
    order = rates.shape[0]
    if not 1 <= order <= 6:
        raise ValueError(
            "Argument `rates` must hold 1 to 6 rates, one per order, but holds "
            f"{order}. Each order is one power of α; give fewer."
        )
    exponents, coefficients, gap = _expand(rates, order)
    coefficients = refuse(
        coefficients,
        ~(gap > 1e3 * jnp.finfo(rates.dtype).eps),
        "Argument `rates` must have no resonance n·Γ = Γ_m, but has. Use k = k_max, where γ_k "
        "is the largest.",
    )
    return GrenierExpansion(rates, exponents, coefficients, check_count(k, "k"))


def _partitions(total: int, largest: int) -> list[tuple[int, ...]]:
    """All ways to write `total` as a sum of parts ≤ `largest`, parts descending."""
    if total == 0:
        return [()]
    return [
        (part, *rest)
        for part in range(1, min(total, largest) + 1)
        for rest in _partitions(total - part, part)
    ]


def _multi_indices(order: int) -> list[tuple[int, ...]]:
    """The n ≠ 0 with Σ m n_m ≤ order, as sorted parts; those of parts 1 only come first."""
    everything = [p for j in range(1, order + 1) for p in _partitions(j, j)]
    return sorted(everything, key=lambda p: (max(p) > 1, len(p), p))


@functools.partial(jax.jit, static_argnames="order")
def _expand(rates: Array, order: int) -> tuple[Array, Array, Array]:
    """Exponents, coefficients, and the least |n·Γ − Γ_m|/max Γ that was divided by."""
    indices = _multi_indices(order)
    where = {p: i for i, p in enumerate(indices)}
    exponents = jnp.stack([sum(rates[m - 1] for m in p) for p in indices])
    scale = jnp.max(jnp.abs(rates))
    gap = jnp.ones((), rates.dtype)
    # product[n', n''] → n'+n'' as a constant tensor, where the sum is within the order.
    join = np.zeros((len(indices),) * 3)
    for p, i in where.items():
        for q, j in where.items():
            both = tuple(sorted(p + q, reverse=True))
            if both in where:
                join[i, j, where[both]] = 1
    joined = jnp.asarray(join, rates.dtype)
    B = jnp.zeros((order, order, len(indices)), rates.dtype).at[0, 0, 0].set(1)
    for j in range(2, order + 1):
        for m in range(2 - j % 2, j + 1, 2):
            force = jnp.zeros(len(indices), rates.dtype)
            for i in range(1, j):
                for q in range(-(j - i), j - i + 1):
                    p = m - q
                    if q != 0 and p != 0 and abs(p) <= i:
                        weight = m * rates[abs(q) - 1] / q
                        left, right = B[i - 1, abs(p) - 1], B[j - i - 1, abs(q) - 1]
                        force += weight * jnp.einsum("a,b,abc->c", left, right, joined)
            used = np.array([sum(p) <= j and len(p) > 1 for p in indices])
            detuning = jnp.where(used, exponents - rates[m - 1], scale)
            forced = jnp.where(used, force / detuning, 0)
            gap = jnp.minimum(gap, jnp.min(jnp.abs(detuning)) / scale)
            B = B.at[j - 1, m - 1].set(forced)
            B = B.at[j - 1, m - 1, where[(m,)]].set(-jnp.sum(forced))
    # f = 1/2π + Σ_m (b_m/π) cos mkθ and b_1(0) = πα.
    powers = jnp.asarray(math.pi ** np.arange(order), rates.dtype)
    return exponents, B * powers[:, None, None], gap
