"""Many runs at once: one program for all matrices, temperatures and starts of an experiment."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from ..attention import SelfAttention
from ..charts import Curve
from ..checks import ArrayLike
from ..layers import unroll
from ..measures import Uniform

ON_E, ON_V, ON_A = "#0072B2", "#009E73", "#CC79A7"  # colours of E, E_V and E_|V|


def uniform_starts(
    key: PRNGKeyArray, seeds: int, n: int, d: int = 3
) -> Float[Array, "s n d"]:
    """n uniform tokens on S^{d−1} for each of `seeds` seeds."""
    return Uniform(d).sample(key, seeds * n).reshape(seeds, n, d)


def unroll_all(
    x0: Float[Array, "r n d"],
    V: np.ndarray,
    B: np.ndarray,
    beta: np.ndarray,
    layers: int,
    step: float,
    every: int,
    read: Callable[[Array], Any] = lambda xs: xs,
) -> tuple[np.ndarray, Any]:
    """Run r of the layers x ← N(x + step·F) from x0[r] with V[r] (d, d), QᵀK = B[r] and
    β[r]. Returns the times (t,) of every `every`-th layer, and what `read` makes of the tokens
    (t, n, d) of each run, by default themselves, stacked over runs.

    One run after the other (`lax.map`): under `vmap` each sum over tokens takes both
    branches of its overflow check, which is slower by more than two."""
    dtype = x0.dtype
    runs = [jnp.asarray(a, dtype) for a in (V, B, beta)]
    kept = _unroll_all(x0, *runs, layers, step, every, read)
    ts = step * np.arange(0, layers + 1, every)
    return ts, jax.tree.map(lambda a: np.asarray(a, float), kept)


@functools.partial(jax.jit, static_argnums=(4, 5, 6, 7))
def _unroll_all(x0, V, B, beta, layers, step, every, read):
    I = jnp.eye(x0.shape[-1], dtype=x0.dtype)

    def one(run):
        x, V, B, beta = run
        field = SelfAttention(I, B, V, beta)
        save = range(0, layers + 1, every)
        return read(unroll(field, x, layers, step, save=save).xs)

    return jax.lax.map(one, (x0, V, B, beta))


def alignments(xs: np.ndarray, E: ArrayLike) -> np.ndarray:
    """∫|P_E x|²dµ of tokens (..., n, d), for orthonormal columns E (d, k)."""
    return ((xs @ np.asarray(E, float)) ** 2).sum(axis=-1).mean(axis=-1)


def first_ahead(ts: np.ndarray, lead: np.ndarray) -> np.ndarray:
    """Per run (r, t), the time from which on `lead` stays positive; the last time if it never
    does."""
    behind = lead <= 0
    last = behind.shape[1] - 1 - behind[:, ::-1].argmax(axis=1)
    return np.where(behind.any(axis=1), ts[np.minimum(last + 1, len(ts) - 1)], ts[0])


def bands(ts: np.ndarray, values: np.ndarray, label: str, color: str) -> list[Curve]:
    """Median and 10–90 % range over runs of `values` (r, t)."""
    low, middle, high = np.quantile(values, [0.1, 0.5, 0.9], axis=0)
    return [
        Curve(ts, low, "", "band", high, color=color),
        Curve(ts, middle, label, "measured", color=color),
    ]


def dotted_last(curves: list[Curve]) -> list[Curve]:
    """The curves with the last dotted, so that one that it covers is seen below it."""
    return [*curves[:-1], dataclasses.replace(curves[-1], kind="theory2")]
