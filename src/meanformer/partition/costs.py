"""What sums cost, to choose between ways to take them: seconds of two CPU cores, fitted to
`meanformer bench --cases auto`. Only their ratios count. Accelerators are guesses."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


def dense(dtype: jnp.dtype, m: int, n: int) -> float:
    """All m n pairs, for d = 2 and 3."""
    pair = 1.3e-9 if dtype == jnp.float64 else 0.6e-9
    return m * n * pair / (1 if _on_cpu() else 300)


def harmonic(
    d: int,
    dtype: jnp.dtype,
    P: Array | int,
    radii: Array | int,
    read: Array | int,
    m: int,
    n: int,
) -> Any:
    """`Harmonic` with P nodes to a circle and a number of radii, each read at `read` points."""
    size = 1.0 if dtype == jnp.float64 else 0.55
    stage = 1e-7 * P if d == 2 else 2e-9 * P**3.0
    point = 4e-8 if d == 2 else 1.3e-7
    token = 3e-8 if d == 2 else 1.8e-7
    work = size * (radii * (stage + point * read) + point * m + token * n)
    return 3e-4 + work if _on_cpu() else 3e-3 + work / 30


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


@functools.cache
def least(d: int, dtype: jnp.dtype) -> int:
    """From how many tokens on `Harmonic` is ever faster than all pairs of them."""
    n = 1024
    while n < 2**24:
        if harmonic(d, dtype, 48, 1, n, 0, n) < dense(dtype, n, n):
            return n
        n = math.ceil(1.2 * n)
    return n
