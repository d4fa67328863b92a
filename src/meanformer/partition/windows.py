"""Between scattered points of a circle and its equispaced grids: the non-uniform Fourier
transform's spreading and interpolation.

A function f of period 2π with Fourier modes |k| ≤ P/2 − 1 is known from its values at P
equispaced nodes. `refine` gives g on a grid of N = 2P points whose modes are f̂_k/ψ̂_k, so
that near any s (in units of the grid's spacing)

    f(s) ≈ Σᵢ ψ(i − s) gᵢ,     a sum over the w grid points next to s,

with the window ψ(x) = e^{2.3w(√(1 − (2x/w)²) − 1)} on |x| ≤ w/2 (the "exponential of a
semicircle"), as a polynomial on each of its w unit intervals. The error is that of
aliasing, Σ_r ψ̂(k + rN)/ψ̂(k): it is computed, not estimated, for each w.

**Source:** A. Barnett, J. Magland, L. af Klinteberg, *A parallel nonuniform fast Fourier
transform library based on an "exponential of semicircle" kernel*, SIAM J. Sci. Comput. 41
(2019)."""

import dataclasses
import functools
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

_WIDEST = 16


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Window:
    """The window of `width` w: `coefficients[q, i]` of z^q on its i-th interval, where z in
    [−1, 1] runs against s. `error` is the largest for a mode |k| ≤ N/8, `outer_error` for
    any |k| < N/4."""

    width: int
    coefficients: np.ndarray
    error: float
    outer_error: float

    def __repr__(self) -> str:
        return f"Window(width={self.width})"

    def weights(
        self, s: Float[Array, " n"]
    ) -> tuple[Int[Array, " n"], Float[Array, "n w"]]:
        """The first grid point next to each s, and ψ(i − s) at it and the w − 1 that follow.
        Differentiable in s."""
        first = jnp.ceil(s - self.width / 2)
        z = (2 * (first - (s - self.width / 2)) - 1)[:, None]
        rows = jnp.asarray(self.coefficients, s.dtype)
        total = jnp.broadcast_to(rows[-1], (s.shape[0], self.width))
        for row in rows[-2::-1]:
            total = total * z + row
        return first.astype(jnp.int32), total

    def transform(self, P: int) -> np.ndarray:
        """ψ̂_k for the modes k = 0 … P/2 − 1 of a grid of 2P points."""
        return _transform(self, np.arange(P // 2) * (math.pi / P))


def _on_intervals(window: Window, z: np.ndarray) -> np.ndarray:
    """The polynomials at z: shape (z, w)."""
    return np.polynomial.polynomial.polyval(z, window.coefficients).T


def _transform(window: Window, angle: np.ndarray) -> np.ndarray:
    """ψ̂ = ∫ ψ(x) cos(x·angle) dx by Gauss's rule on each interval."""
    z, w = np.polynomial.legendre.leggauss(24)
    x = (z[:, None] + 1) / 2 + np.arange(window.width) - window.width / 2
    values = _on_intervals(window, z) * (w[:, None] / 2)
    return np.einsum("zi,zik->k", values, np.cos(x[..., None] * angle))


def _aliasing(window: Window) -> np.ndarray:
    """The largest error of Σᵢ ψ(i − s) e^{ia(i − s)} = ψ̂ over s, for waves 0 ≤ a ≤ π/2."""
    angle = np.linspace(0, math.pi / 2, 65)
    z = np.linspace(-1, 1, 101)
    x = (z[:, None] + 1) / 2 + np.arange(window.width) - window.width / 2
    waves = np.exp(1j * x[..., None] * angle)
    sums = np.einsum("zi,zik->zk", _on_intervals(window, z), waves)
    return np.max(np.abs(sums / _transform(window, angle) - 1), axis=0)


@functools.cache
def _window(width: int) -> Window:
    degree = min(width + 4, 19)
    z = np.cos(math.pi * (np.arange(48) + 0.5) / 48)
    x = (z[:, None] + 1) / 2 + np.arange(width) - width / 2
    root = np.sqrt(np.maximum(1 - (2 * x / width) ** 2, 0))
    values = np.exp(2.3 * width * (root - 1))
    fitted = np.polynomial.chebyshev.chebfit(z, values, degree)
    coefficients = np.stack(
        [
            np.pad(p, (0, degree + 1 - len(p)))
            for p in map(np.polynomial.chebyshev.cheb2poly, fitted.T)
        ],
        axis=1,
    )
    bare = Window(width, coefficients, math.nan, math.nan)
    errors = _aliasing(bare)
    return Window(width, coefficients, float(errors[:33].max()), float(errors.max()))


@functools.cache
def window(error: float) -> Window:
    """The narrowest window whose error is at most `error`, else the most accurate one."""
    for width in range(4, _WIDEST):
        found = _window(width)
        if found.error <= error:
            return found
    return _window(_WIDEST)


def refine(f: Float[Array, "P *s"], window: Window) -> Float[Array, "N *s"]:
    """g on the grid of N = 2P points from the values at P nodes (the mode P/2 is dropped)."""
    P = f.shape[0]
    modes = jnp.fft.rfft(f, axis=0)[: P // 2]
    scale = (2 / window.transform(P)).reshape(-1, *(1,) * (f.ndim - 1))
    return jnp.fft.irfft(modes * jnp.asarray(scale, f.dtype), n=2 * P, axis=0)


@functools.cache
def refinement(P: int, window: Window, before: int, after: int) -> np.ndarray:
    """`refine` as a matrix, its rows −before … after − 1 (the grid is periodic)."""
    modes = np.fft.rfft(np.eye(P), axis=0)[: P // 2]
    g = np.fft.irfft(modes * (2 / window.transform(P))[:, None], n=2 * P, axis=0)
    return np.concatenate([g[2 * P - before :], g[:after]])
