"""What a run takes and returns: the tokens it starts from, the times it keeps, and the
`Trajectory`, which is written to and read from one file."""

import json
import operator
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from . import files, sphere
from .attention import AbstractField, LayerStack, report_sums, summing
from .checks import ArrayLike
from .measures import Empirical

Observable = Callable[[Empirical], Any]


def starting_measure(field: AbstractField, x0: ArrayLike | Empirical) -> Empirical:
    if not isinstance(field, AbstractField):
        raise ValueError(
            f"Argument `field` must be a field such as `SelfAttention`, but is {field!r}."
        )
    if isinstance(x0, Empirical):
        if field.d is not None and x0.d != field.d:
            raise ValueError(
                f"Argument `x0` must be a measure on S^(d−1) with d = {field.d} to fit "
                f"the matrices, but has d = {x0.d}."
            )
        return x0
    return Empirical(sphere.check_tokens(x0, "x0", field.d), check=False)


def kept_indices(save: str | Sequence[int], count: int, name: str) -> tuple[int, ...]:
    """Indices to keep out of 0 … count − 1, increasing."""
    if isinstance(save, str):
        if save == "all":
            return tuple(range(count))
        if save == "last":
            return (count - 1,)
        raise ValueError(
            f'Argument `save` must be "all", "last" or a list of indices, but is {save!r}.'
        )
    try:
        kept = [operator.index(i) for i in save]
    except TypeError:
        kept = []
    wrong = [i for i in kept if not 0 <= i < count]
    if not kept or wrong or kept != sorted(set(kept)):
        raise ValueError(
            f"Argument `save` must list increasing indices from 0 to {count - 1} (of "
            f"`{name}`), at least one, but is {save!r}."
        )
    return tuple(kept)


@eqx.filter_jit
def stats_of_sums(
    field: AbstractField, times: Array, xs: Array, weights: Array
) -> dict[str, Array]:
    """`report_sums` at saved tokens; `times` are those that `field.at` takes, or numbers of
    layers of a `LayerStack`."""
    if not summing(field):
        return {}

    def one(entry):
        t, x = entry
        if isinstance(field, LayerStack) and jnp.issubdtype(t.dtype, jnp.integer):
            now = field.layer(t)
        else:
            now = field.at(t)
        return report_sums(now, x, Empirical(x, weights, check=False))

    return jax.lax.map(one, jax.lax.stop_gradient((times, xs)))


class Trajectory(eqx.Module):
    """What `solve` and `unroll` return: tokens at times.

    - `ts` (t,): the times at which tokens were saved; for `unroll`, layer × step.
    - `xs` (t, n, d): the tokens, of norm 1. `weights` (n,): their masses, of sum 1.
    - `observed`: by name, the values of the observables, first axis along `observed_ts`.
    - `stats`: numbers of the run (steps taken, accepted, rejected; or layers). For fields that
        sum by a partition also (t,) `modes`, the degrees of harmonics used for the tokens
        that were saved (0: none, sums over all pairs), and `dense_points`, how many of these
        were summed over all tokens one by one.
    - `event_time`, `event_x`: where the event stopped the run, if one was given; `stopped`
        says whether it did.
    - `method`: in words, what computed it.
    """

    ts: Float[Array, " t"]
    xs: Float[Array, "t n d"]
    weights: Float[Array, " n"]
    observed_ts: Float[Array, " s"]
    observed: dict[str, Any]
    stats: dict[str, Array]
    event_time: Float[Array, ""] | None = None
    event_x: Float[Array, "n d"] | None = None
    stopped: Bool[Array, ""] | None = None
    method: str = eqx.field(static=True, default="")

    def measure(self, i: int) -> Empirical:
        """µ at the time `ts[i]`."""
        return Empirical(self.xs[i], self.weights, check=False)

    def save(self, path: str | os.PathLike) -> Path:
        """Write one `.npz` file (arrays, and a JSON header under `meta`; no pickle) that
        `load` reads and NumPy opens. Written whole or not at all. Observables must be
        arrays, or nested dicts of arrays."""
        path = Path(path)
        if path.suffix != ".npz":
            raise ValueError(f"Argument `path` must end in .npz, but is {str(path)!r}.")
        files.check_folder(path.parent, "path")
        arrays = {"ts": self.ts, "xs": self.xs, "weights": self.weights}
        arrays["observed_ts"] = self.observed_ts
        arrays |= _flat("observed", self.observed) | _flat("stats", self.stats)
        for name in ("event_time", "event_x", "stopped"):
            if getattr(self, name) is not None:
                arrays[name] = getattr(self, name)
        meta = {"format": "meanformer trajectory", "version": 1, "method": self.method}
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.atomic(path) as draft, open(draft, "wb") as file:
            named = {k: np.asarray(v) for k, v in arrays.items()}
            named["meta"] = np.array(json.dumps(meta))
            np.savez_compressed(file, **named)  # pyright: ignore[reportArgumentType]
        return path


def _flat(prefix: str, tree: Mapping[str, Any]) -> dict[str, Any]:
    out = {}
    for key, value in tree.items():
        if "/" in key:
            raise ValueError(f"Argument `observables` has a name with a slash: {key!r}.")
        name = f"{prefix}/{key}"
        out |= _flat(name, value) if isinstance(value, Mapping) else {name: value}
    return out


# What NumPy, zipfile, zlib and json answer to files that are foreign, cut or damaged.
_UNREADABLE = (
    AttributeError,
    EOFError,
    KeyError,
    OSError,
    TypeError,
    ValueError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
)


def load(path: str | os.PathLike) -> Trajectory:
    """The trajectory that `Trajectory.save` wrote, in the dtypes it was saved in (float64
    needs jax's x64 mode, else an error says so).

    **Raises:** `ValueError` if the file is not such a file, with the reason."""
    path = Path(path)
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        meta = json.loads(str(arrays.pop("meta")))
        kind = meta["format"], meta["version"]
        missing = {"ts", "xs", "weights", "observed_ts"} - arrays.keys()
    except FileNotFoundError:
        raise ValueError(f"Argument `path` must exist, but {path} does not.") from None
    except _UNREADABLE as error:
        raise ValueError(
            f"Argument `path` must be a file written by `Trajectory.save`, but {path} is "
            f"not: {type(error).__name__}: {error}."
        ) from error
    if kind != ("meanformer trajectory", 1) or missing:
        raise ValueError(
            f"Argument `path` must be a meanformer trajectory of version 1, but {path} "
            f"says {meta}" + (f" and lacks {sorted(missing)}." if missing else ".")
        )
    wide = arrays["xs"].dtype == np.float64
    if wide and jnp.result_type(float) != jnp.float64:
        raise ValueError(
            "Argument `path` holds float64 tokens, but jax runs in float32. Call "
            '`jax.config.update("jax_enable_x64", True)` first.'
        )
    trees: dict[str, Any] = {"observed": {}, "stats": {}}
    fields: dict[str, Any] = {"method": meta["method"]}
    for name, value in arrays.items():
        head, *rest = name.split("/")
        if not rest:
            fields[head] = jnp.asarray(value)
            continue
        node = trees[head]
        for part in rest[:-1]:
            node = node.setdefault(part, {})
        node[rest[-1]] = jnp.asarray(value)
    return Trajectory(**fields, **trees)
