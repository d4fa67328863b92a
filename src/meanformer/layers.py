"""Discrete layers: `unroll` runs a transformer layer by layer."""

from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jaxtyping import Array

from . import sphere
from .attention import AbstractField, LayerStack, prepared, sums_in_words
from .blocks import parts
from .checks import ArrayLike, check_count, check_scalar, is_traced
from .measures import Empirical
from .trajectory import (
    Observable,
    Trajectory,
    kept_indices,
    starting_measure,
    stats_of_sums,
)


def unroll(
    field: AbstractField,
    x0: ArrayLike | Empirical,
    layers: int | None = None,
    step: ArrayLike = 1.0,
    *,
    project: bool = False,
    save: str | Sequence[int] = "last",
    observables: Mapping[str, Observable] | None = None,
    progress: bool = False,
) -> Trajectory:
    """The discrete transformer, *multiscale* Eq. (1) with a residual step h:

        x(l+1) = N(x(l) + h F(x(l), µ(l))),   N(x) = x/|x|,

    F the field before projection. A `Block` does so with its attention, then with its
    feed-forward map (Lie–Trotter splitting). h = 1 is the paper's equation; as h → 0 with
    l·h = t fixed, the layers follow `solve` with error O(h).

    **Arguments:**

    - `field`: any field. A `LayerStack` gives layer l its own parameters; a field that
        depends on time is taken at time l·h.
    - `x0`: tokens (n, d) of equal weight, or an `Empirical`.
    - `layers`: number of layers (default: those of the `LayerStack`). `step`: h > 0.
    - `project`: whether to take P_x F for F: Algorithms 1 and 2 of *concentration*, the Euler
        steps of `solve`. It differs by O(h²) per layer.
    - `save`: "last", "all" (`layers` + 1 of them: the start is number 0), or a list of
        layer numbers.
    - `observables`: name → function of the measure, evaluated at each saved layer.
    - `progress`: a bar (on a terminal), and Ctrl-C between chunks of layers; not under a
        transformation.

    **Returns:** a `Trajectory` with `ts` = layer number × h. Works under `jit`, `vmap` and
    `grad` (reverse mode recomputes inside each layer: memory O(layers · n d)).

    **Raises:** `ValueError` for bad arguments, `RuntimeError` if a token is not finite.
    """
    mu0 = starting_measure(field, x0)
    x, weights = mu0.points, mu0.weights
    if layers is None:
        if not isinstance(field, LayerStack):
            raise ValueError(
                "Argument `layers` must be given, unless `field` is a `LayerStack`."
            )
        layers = field.layers
    layers = check_count(layers, "layers")
    if isinstance(field, LayerStack) and layers > field.layers:
        raise ValueError(
            f"Argument `layers` must be at most {field.layers}, the layers of the stack, "
            f"but is {layers}."
        )
    step = check_scalar(step, "step", minimum=0.0, strict=True).astype(x.dtype)
    keep = kept_indices(save, layers + 1, "layers, 0 the start")
    named = tuple((observables or {}).items())
    field, named = prepared((field, named), mu0.n, mu0.n, x.dtype)
    if progress and not is_traced(field, x, weights, step):
        xs, observed = _unroll_with_bar(field, x, weights, step, keep, named, project)
    else:
        xs, observed = _unroll(field, x, weights, step, keep, named, project)
    bad = ~jnp.all(jnp.isfinite(xs))
    message = (
        "`unroll` met a token that is not finite: a layer moved a token onto the origin or "
        "overflowed. Use a smaller `step`."
    )
    if is_traced(bad):
        xs = eqx.error_if(xs, bad, message)
    elif bool(bad):
        raise RuntimeError(message)
    ts = step * jnp.asarray(keep, x.dtype)
    return Trajectory(
        ts,
        xs,
        weights,
        ts if named else ts[:0],
        observed,
        {"layers": jnp.asarray(keep[-1])}
        | stats_of_sums(field, _kept(field, keep, ts), xs, weights),
        method="unroll: layers x <- normalise(x + step F)" + sums_in_words(field),
    )


def _kept(field: AbstractField, keep: tuple[int, ...], ts: Array) -> Array:
    """The layer in force at what was kept, or the time."""
    if isinstance(field, LayerStack):
        return jnp.minimum(jnp.asarray(keep), field.layers - 1)
    return ts


def _layer(
    field: AbstractField, x: Array, weights: Array, step: Array, project: bool
) -> Array:
    for part in parts(field):
        mu = Empirical(x, weights, check=False)
        force = part.tangent(x, mu) if project else part.drive(x, mu)
        x = sphere.normalise(x + step * force)
    return x


def _observe(named, x: Array, weights: Array) -> dict[str, Any]:
    mu = Empirical(x, weights, check=False)
    return {name: f(mu) for name, f in named}


def _runs_of_gaps(keep: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """(first layer, gap, how many times that gap) that lead through the kept layers."""
    runs: list[tuple[int, int, int]] = []
    for a, b in zip((0, *keep), keep):
        if runs and runs[-1][1] == b - a:
            first, gap, count = runs[-1]
            runs[-1] = (first, gap, count + 1)
        elif b > a:
            runs.append((a, b - a, 1))
    return runs


@eqx.filter_jit
def _unroll(field, x, weights, step, keep, named, project):
    stack = isinstance(field, LayerStack)

    @jax.checkpoint  # keep x(l) only
    def one(x, entry):
        if stack:
            return _layer(entry, x, weights, step, project), None
        now = field.at(entry.astype(x.dtype) * step)
        return _layer(now, x, weights, step, project), None

    def entries(first, gap, count):
        l = np.arange(first, first + gap * count)
        tree = (
            jax.tree.map(lambda leaf: leaf[l], field.stacked) if stack else jnp.array(l)
        )
        return jax.tree.map(lambda a: a.reshape(count, gap, *a.shape[1:]), tree)

    def across(x, gap_entries):
        x, _ = jax.lax.scan(one, x, gap_entries)
        return x, (x, _observe(named, x, weights))

    rows = []
    if keep[0] == 0:
        rows.append(
            jax.tree.map(lambda a: jnp.asarray(a)[None], (x, _observe(named, x, weights)))
        )
    for first, gap, count in _runs_of_gaps(keep):
        x, out = jax.lax.scan(across, x, entries(first, gap, count))
        rows.append(out)
    return jax.tree.map(lambda *r: jnp.concatenate(r), *rows)


@eqx.filter_jit
def _advance(field, x, weights, step, project, first, last):
    """Layers `first` … `last` − 1, numbers that need not be known to the compiler."""

    def body(l, x):
        if isinstance(field, LayerStack):
            return _layer(field.layer(l), x, weights, step, project)
        return _layer(field.at(l.astype(x.dtype) * step), x, weights, step, project)

    return jax.lax.fori_loop(first, last, body, x)


_observe_jit = eqx.filter_jit(_observe)


def _unroll_with_bar(field, x, weights, step, keep, named, project):
    chunk = max(1, 2**27 // x.shape[0] ** 2)  # about a second of pairs
    rows, done = [], 0
    with tqdm.tqdm(total=keep[-1], unit="layer", disable=None) as bar:
        for stop in keep:
            while done < stop:
                last = min(done + chunk, stop)
                ends = jnp.asarray(done), jnp.asarray(last)
                x = _advance(field, x, weights, step, project, *ends)
                jax.block_until_ready(x)
                bar.update(last - done)
                done = last
            rows.append((x, _observe_jit(named, x, weights)))
    return jax.tree.map(lambda *r: jnp.stack(r), *rows)
