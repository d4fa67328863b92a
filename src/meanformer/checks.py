"""Refusals: an error names the argument, the rule, the value that broke it, and the cure.

Doorways call these once. Concrete values answer with a `ValueError` before anything is
computed; traced values (under `jit`, `vmap`, `grad`) answer when the program runs.
"""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

# What `jnp.asarray` takes: arrays, numbers, nested lists of them.
ArrayLike = jaxtyping.ArrayLike | Sequence
T = TypeVar("T")


def is_traced(*values: Any) -> bool:
    """Whether any array in `values` is abstract, so that its numbers cannot be read."""
    return any(isinstance(v, Tracer) for v in jax.tree.leaves(values))


def refuse(value: T, bad: Any, message: str) -> T:
    """`value`, or an error that says `message` if any entry of `bad` is true."""
    if is_traced(bad):
        return eqx.error_if(value, jnp.any(bad), message)
    if np.any(np.asarray(bad)):
        raise ValueError(message)
    return value


def shown(value: Any) -> str:
    """`value` for an error message: the number if it can be read."""
    return (
        "otherwise (a traced value)"
        if is_traced(value)
        else f"{np.asarray(value).tolist()!r}"
    )


def as_float(value: ArrayLike, name: str) -> Array:
    """`value` as an array of real floating-point numbers."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = float(value)  # weak, as a Python float: it follows the dtype of arrays
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Argument `{name}` must be a real array, but is {value!r}."
        ) from error
    if jnp.iscomplexobj(array):
        raise ValueError(f"Argument `{name}` must be real, but is {array.dtype}.")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        array = array.astype(jnp.result_type(float))
    return array


def check_scalar(
    value: ArrayLike,
    name: str,
    *,
    minimum: float | None = None,
    strict: bool = False,
    cure: str = "",
) -> Float[Array, ""]:
    """`value` as a finite scalar, at least (`strict`: above) `minimum`; the error ends with
    the `cure`."""
    array = as_float(value, name)
    if array.ndim != 0:
        raise ValueError(
            f"Argument `{name}` must be a scalar, but has shape {array.shape}. "
            "For a batch use `jax.vmap`."
        )
    rule, good = "finite", jnp.isfinite(array)
    if minimum is not None:
        sign = ">" if strict else "≥"
        rule = f"finite and {sign} {minimum:g}"
        good &= array > minimum if strict else array >= minimum
    message = f"Argument `{name}` must be {rule}, but is {shown(array)}. {cure}".rstrip()
    return refuse(array, ~good, message)


def check_entries(value: Array, good: Any, name: str, rule: str, cure: str) -> Array:
    """`value`, or an error about its first entry that is not `good`."""
    bad = ~good
    found = "some entry is not"
    if not is_traced(bad) and bool(bad.any()):
        worst = np.broadcast_to(np.asarray(value), bad.shape)[np.asarray(bad)][0]
        found = f"is {float(worst):.9g}"
    return refuse(value, bad, f"Argument `{name}` must {rule}, but {found}. {cure}")


def check_nonnegative(
    value: ArrayLike, name: str, *, strict: bool = False, cure: str = ""
) -> Array:
    """`value` as an array of finite numbers ≥ 0 (`strict`: > 0)."""
    array = as_float(value, name)
    good = jnp.isfinite(array) & ((array > 0) if strict else (array >= 0))
    rule = f"finite and {'>' if strict else '≥'} 0"
    message = f"Argument `{name}` must be {rule}, but is {shown(array)}. {cure}".rstrip()
    return refuse(array, ~good, message)


def check_count(value: Any, name: str, minimum: int = 1) -> int:
    """`value` as an integer of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ValueError(
            f"Argument `{name}` must be an integer ≥ {minimum}, but is {value!r}. Give a whole "
            "number."
        )
    if value < minimum:
        raise ValueError(
            f"Argument `{name}` must be an integer ≥ {minimum}, but is {int(value)}. Give at "
            f"least {minimum}, or leave it out for the default if it has one."
        )
    return int(value)


def check_kernel(W: Any) -> Any:
    """`W` as a function on [−1, 1]."""
    if not callable(W):
        raise ValueError(
            f"Argument `W` must be a function on [−1, 1], but is {W!r}. For example "
            "`lambda q: jnp.exp(beta * q) / beta`."
        )
    return W


def check_finite(value: ArrayLike, name: str, shape: tuple[int | None, ...]) -> Array:
    """`value` as a finite array of the given shape (`None`: any length)."""
    array = as_float(value, name)
    fits = len(array.shape) == len(shape) and all(
        want is None or want == have for want, have in zip(shape, array.shape)
    )
    if not fits:
        wanted = "(" + ", ".join("any" if s is None else str(s) for s in shape) + ")"
        raise ValueError(
            f"Argument `{name}` must have shape {wanted}, but has shape {array.shape}."
        )
    bad = ~jnp.isfinite(array)
    where = ""
    if not is_traced(bad) and bool(bad.any()):
        index = tuple(int(i) for i in np.argwhere(np.asarray(bad))[0])
        where = f" at index {index} is {np.asarray(array)[index]}"
    return refuse(
        array,
        bad,
        f"Argument `{name}` must be finite, but an entry{where or ' is not'}. Remove or "
        "replace such entries.",
    )


def check_times(ts: ArrayLike, name: str = "ts") -> Float[Array, " t"]:
    """`ts` as finite, strictly increasing times, at least one."""
    array = as_float(ts, name)
    if array.ndim != 1 or array.shape[0] == 0:
        raise ValueError(
            f"Argument `{name}` must have shape (t,) with t ≥ 1, but has shape "
            f"{array.shape}."
        )
    array = check_finite(array, name, (None,))
    steps = jnp.diff(array)
    where = "they are not"
    if not is_traced(steps) and bool((steps <= 0).any()):
        i = int(np.argmax(np.asarray(steps) <= 0))
        where = f"entry {i + 1} is {array[i + 1]:g} after {array[i]:g}"
    return refuse(
        array,
        steps <= 0,
        f"Argument `{name}` must increase strictly, but {where}. Sort the times, or "
        "reverse the sign of `V` to run backwards.",
    )


def nearest(name: str, known: Iterable[str]) -> str:
    """« Did you mean …? », or the list of what is known."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    if close:
        return f"Did you mean `{close[0]}`?"
    return "Known: " + ", ".join(f"`{k}`" for k in known) + "."
