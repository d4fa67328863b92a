"""Harmonic spectra on S¹ and S², and norms of µ − µ_∞ made of them."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float, Inexact

from .. import harmonics, sphere, theory
from ..attention import check_measure
from ..checks import ArrayLike, check_count, check_scalar
from ..matrices import matmul
from ..measures import Empirical

_ROWS = 4096  # tokens whose harmonics are held at a time


def _check_sphere(mu: Empirical, d: int) -> Empirical:
    mu = check_measure(mu)
    if mu.d != d:
        raise ValueError(
            f"Argument `mu` must be a measure on S^{d - 1} (d = {d}), but has d = {mu.d}. For "
            "any d use `power_spectrum`."
        )
    return mu


class FourierSpectrum(eqx.Module):
    """`fourier_spectrum` as an observable: `FourierSpectrum(degree)(mu)`."""

    degree: int = eqx.field(static=True)

    def __init__(self, degree: int):
        self.degree = check_count(degree, "degree", 0)

    def __call__(self, mu: Empirical) -> Complex[Array, " k"]:
        mu = _check_sphere(mu, 2)
        theta = sphere.angles(mu.points)
        return theory.fourier_coefficients(theta, self.degree, mu.weights)


def fourier_spectrum(mu: Empirical, degree: int) -> Complex[Array, " k"]:
    """µ̂_k = ∫e^{−ikθ}dµ for k = 0 … `degree` of µ on S¹: `theory.fourier_coefficients` of its
    angles. For n independent uniform tokens E|µ̂_k|² = 1/n. O(n degree) time, O(n) memory."""
    return FourierSpectrum(degree)(mu)


class HarmonicSpectrum(eqx.Module):
    """`harmonic_spectrum` as an observable: `HarmonicSpectrum(degree)(mu)`."""

    degree: int = eqx.field(static=True)

    def __init__(self, degree: int):
        self.degree = check_count(degree, "degree", 0)

    def __call__(self, mu: Empirical) -> Float[Array, " lm"]:
        return _harmonic_sums(_check_sphere(mu, 3), self.degree)


@eqx.filter_jit
def _harmonic_sums(mu: Empirical, degree: int) -> Array:
    count = math.ceil(mu.n / _ROWS)
    index = np.arange(count * math.ceil(mu.n / count)).reshape(count, -1)
    weights = jnp.where(index < mu.n, mu.weights[index % mu.n], 0)

    @jax.checkpoint  # keep no harmonics
    def part(points, weights):
        return matmul(weights, harmonics.real_harmonics(points, degree))

    def add(total, block):
        return total + part(*block), None

    zero = jnp.zeros((degree + 1) ** 2, mu.points.dtype)
    return jax.lax.scan(add, zero, (mu.points[index % mu.n], weights))[0]


def harmonic_spectrum(mu: Empirical, degree: int) -> Float[Array, " lm"]:
    """∫Y_lm dµ of µ on S² for all l ≤ `degree`, at index l² + l + m: the orthonormal
    `harmonics.real_harmonics`. O(n degree²) time, O(degree²) memory beside the tokens."""
    return HarmonicSpectrum(degree)(mu)


class PowerSpectrum(eqx.Module):
    """`power_spectrum` as an observable: `PowerSpectrum(degree)(mu)`."""

    degree: int = eqx.field(static=True)

    def __init__(self, degree: int):
        self.degree = check_count(degree, "degree")

    def __call__(self, mu: Empirical) -> Float[Array, " l"]:
        mu = check_measure(mu)
        if mu.d > 3:
            design = theory.design_strength(mu.points, mu.weights, degree=self.degree)
            return jnp.concatenate([jnp.ones(1, mu.points.dtype), design.residuals])
        c = _coefficients(mu, self.degree)
        square = jnp.real(c) ** 2 + jnp.imag(c) ** 2
        if mu.d == 2:
            return square
        l = np.arange(self.degree + 1)
        total = jnp.zeros(len(l), square.dtype).at[np.repeat(l, 2 * l + 1)].add(square)
        return total * jnp.asarray(4 * np.pi / (2 * l + 1), square.dtype)


def power_spectrum(mu: Empirical, degree: int) -> Float[Array, " l"]:
    """p_l = ∬P_l(⟨x,y⟩)dµdµ ∈ [0, 1] for l = 0 … `degree` ≥ 1, with the zonal polynomials of
    S^{d−1}, P_l(1) = 1: how much of degree l is in µ, in every rotation alike.

    p_0 = 1; p_l = 1 for all l for a single point, 0 (l > 0) for the uniform law, and on average
    1/n for n independent uniform tokens. On S¹ p_l = |µ̂_l|², on S² p_l = 4π/(2l+1)
    Σ_m(∫Y_lm dµ)². O(n degree) on S¹, O(n degree²) on S², O(n² degree) on other spheres
    (`theory.design_strength`)."""
    return PowerSpectrum(degree)(mu)


def _coefficients(mu: Empirical, degree: int) -> Inexact[Array, " c"]:
    """Harmonic coefficients, as `theory.sobolev_norm` takes them."""
    if mu.d == 2:
        return FourierSpectrum(degree)(mu)
    return HarmonicSpectrum(degree)(_check_sphere(mu, 3))


class SobolevNorm(eqx.Module):
    """`sobolev_norm` as an observable: `SobolevNorm(degree, s)(mu)`. s is a leaf."""

    degree: int = eqx.field(static=True)
    s: Float[Array, ""]
    definition: str = eqx.field(static=True)

    def __init__(self, degree: int, s: ArrayLike = 1.0, definition: str = "fourier"):
        self.degree = check_count(degree, "degree")
        self.s = check_scalar(s, "s", minimum=0.0, strict=True)
        self.definition = definition

    def __call__(self, mu: Empirical) -> Float[Array, ""]:
        c = _coefficients(check_measure(mu), self.degree)
        return theory.sobolev_norm(c, self.s, mu.d, definition=self.definition)


def sobolev_norm(
    mu: Empirical, degree: int, s: ArrayLike = 1.0, definition: str = "fourier"
) -> Float[Array, ""]:
    """‖µ − µ_∞‖ in H^{−s} of S¹ or S², of the harmonics up to `degree`: `theory.sobolev_norm`
    of `fourier_spectrum` or `harmonic_spectrum`, with its three definitions.

    For n independent uniform tokens on S¹ E[n‖·‖²_{H⁻¹}] = π coth π − 1 = 2.153, of which
    degrees above K hold about 2/K. **Arguments:** `degree` ≥ 1; `s` > 0, above (d−1)/2 if the
    norm shall have a limit in the degree. **Source:** *metastable*, Lemma E.3."""
    return SobolevNorm(degree, s, definition)(mu)


class DistanceToModes(eqx.Module):
    """`distance_to_modes` as an observable: `DistanceToModes(k, degree, s)(mu)`. s is a leaf."""

    k: int = eqx.field(static=True)
    degree: int = eqx.field(static=True)
    s: Float[Array, ""]
    definition: str = eqx.field(static=True)
    relative: bool = eqx.field(static=True)

    def __init__(
        self,
        k: int,
        degree: int,
        s: ArrayLike = 1.0,
        definition: str = "fourier",
        relative: bool = False,
    ):
        self.k, self.degree = check_count(k, "k"), check_count(degree, "degree")
        self.s = check_scalar(s, "s", minimum=0.0, strict=True)
        self.definition, self.relative = definition, relative

    def __call__(self, mu: Empirical) -> Float[Array, ""]:
        c = _coefficients(check_measure(mu), self.degree)
        index = np.arange(c.shape[0])
        l = index if mu.d == 2 else np.floor(np.sqrt(index)).astype(int)

        def norm(c):
            return theory.sobolev_norm(c, self.s, mu.d, definition=self.definition)

        distance = norm(jnp.where(l % self.k == 0, 0, c))
        if not self.relative:
            return distance
        whole = norm(c)
        return jnp.where(whole > 0, distance / jnp.where(whole > 0, whole, 1), 0)


def distance_to_modes(
    mu: Empirical,
    k: int,
    degree: int,
    s: ArrayLike = 1.0,
    definition: str = "fourier",
    relative: bool = False,
) -> Float[Array, ""]:
    """Distance of µ to H_k, the laws on S¹ or S² whose harmonics of degrees not divisible by k
    vanish, in the H^{−s} norm of harmonics up to `degree`: the norm of what is in the other
    degrees (to the linear space: that its nearest element is ≥ 0 is not asked).

    With `relative` divided by ‖µ − µ_∞‖ (0 at µ_∞): in [0, 1], its square the share of the
    spectrum outside H_k. 0 on S¹ for laws of period 2π/k. **Arguments:** as `sobolev_norm`.
    On S² H_k is not invariant for k ≥ 3, see `theory.leakage`. **Source:** *metastable*, Sec.
    4.4 and App. D."""
    return DistanceToModes(k, degree, s, definition, relative)(mu)
