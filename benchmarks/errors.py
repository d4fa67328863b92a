"""The distance of a function and of its derivative from mpmath: cases, entries, references."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
from mpmath import mp, mpf

mp.dps = 60

Number = Any  # an mpf; mpmath has no types
Exact = Callable[..., Sequence[Number]]  # numbers at one point


@dataclasses.dataclass
class Case:
    """`value(points)` and its derivative against `exact(point)`, `exact_slope(point)`.

    `points` has shape (p,) or (p, k); `value` returns (p, ...) and `exact` that many numbers
    per point. The derivative is along `tangents` if given (then `exact_slope` gets point and
    tangent), else that of an elementwise function; without `exact_slope` it is not
    measured."""

    value: Callable
    points: np.ndarray
    exact: Exact
    exact_slope: Exact | None = None
    tangents: np.ndarray | None = None


@dataclasses.dataclass
class Entry:
    """A row of the table: the worst of all cases. Errors are divided by `size` of the exact
    numbers (`slope_size` for derivatives), which `relative_to` puts in words."""

    function: str
    where: str
    cases: Sequence[Case]
    relative_to: str = "itself"
    size: Callable = lambda exact: [abs(e) if e else 1 for e in exact]
    slope_size: Callable = lambda exact: [abs(e) if e else 1 for e in exact]


def worst(entry: Entry, dtype) -> tuple[float, float | None]:
    """The largest error of the values and of the derivatives of all cases; a NaN stays."""
    values, slopes = [], []
    with jax.enable_x64(dtype == np.float64):
        for case in entry.cases:
            x = np.asarray(case.points, dtype)
            v = np.ones_like(x) if case.tangents is None else case.tangents.astype(dtype)
            value, slope = jax.jvp(case.value, (jnp.asarray(x),), (jnp.asarray(v),))
            assert value.dtype == dtype, (entry.function, value.dtype)
            exact = [case.exact(*exactly(p)) for p in x]
            values.append(largest(value, exact, entry.size))
            if case.exact_slope is not None:
                where = x if case.tangents is None else np.concatenate([x, v], axis=1)
                exact = [case.exact_slope(*exactly(p)) for p in where]
                slopes.append(largest(slope, exact, entry.slope_size))
    return np.max(values), np.max(slopes) if slopes else None


def exactly(point) -> list[Number]:
    return [mpf(float(c)) for c in np.ravel(point)]


def largest(have, exact: Sequence[Sequence[Number]], size: Callable) -> float:
    """The largest |have − exact|/size."""
    rows = np.asarray(have, float).reshape(len(exact), -1)
    return np.max(
        [
            float(abs(mpf(float(number)) - e) / s)
            for row, true in zip(rows, exact)
            for number, e, s in zip(row, true, size(true), strict=True)
        ]
    )


def own_size(exact):
    return [max(1, abs(e)) for e in exact]


@functools.cache
def ratio_derivatives(nu, kappa) -> list[Number]:
    """A = I_{ν+1}/I_ν, A', A'' from the differential equations of I_{ν+1} and I_ν; at κ = 0
    from A = κ/(2ν+2) + O(κ³)."""
    if kappa == 0:
        return [mpf(0), 1 / (2 * mpf(nu) + 2), mpf(0)]
    with mp.workdps(60 + 4 * max(0, int(mpmath.log10(max(kappa, 1 / kappa))))):
        ratio = mpmath.besseli(nu + 1, kappa) / mpmath.besseli(nu, kappa)
        c = 2 * mpf(nu) + 1
        slope = 1 - ratio**2 - c * ratio / kappa
        return [
            ratio,
            slope,
            -2 * ratio * slope - c * slope / kappa + c * ratio / kappa**2,
        ]


def differentiated(exact: Exact) -> Exact:
    """The derivative of `exact` at point and tangent (at a single number: tangent 1) by a
    central difference with 40 digits more than the step of 10⁻²⁰ takes."""

    def slope(*where):
        half = max(1, len(where) // 2)
        point, tangent = where[:half], where[half:] or (mpf(1),)
        with mp.workdps(100):
            h = mpf(10) ** -20
            ahead = exact(*[p + h * v for p, v in zip(point, tangent)])
            behind = exact(*[p - h * v for p, v in zip(point, tangent)])
            return [(a - b) / (2 * h) for a, b in zip(ahead, behind)]

    return slope
