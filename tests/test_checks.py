"""Refusals: they name the argument, the rule, the value and the cure."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

from meanformer import checks


def refused(check, message, *args, **kwargs):
    with pytest.raises(ValueError, match=message):
        check(*args, **kwargs)


# ------------------------------------------------------------------------ refuse


def test_refuse_answers_at_once_for_numbers():
    """A concrete `bad` raises before anything is computed; a good value is returned."""
    refused(checks.refuse, "^no$", 1.0, np.array([False, True]), "no")
    assert checks.refuse("anything", np.array(False), "no") == "anything"
    assert checks.refuse(3, False, "no") == 3


def test_refuse_answers_at_run_time_for_tracers():
    """Under jit the message comes when a bad value runs, and good values pass."""

    @eqx.filter_jit
    def root(x):
        return jnp.sqrt(checks.refuse(x, x < 0, "Argument `x` must be ≥ 0."))

    assert float(root(jnp.array(4.0))) == 2
    with pytest.raises(eqx.EquinoxRuntimeError, match="Argument `x` must be ≥ 0"):
        jax.block_until_ready(root(jnp.array(-1.0)))


def test_refuse_is_transparent_to_derivatives():
    """grad passes through a check that is content."""

    def square(x):
        return checks.check_scalar(x, "x", minimum=0.0) ** 2

    assert float(jax.grad(square)(3.0)) == 6
    np.testing.assert_array_equal(jax.vmap(jax.grad(square))(jnp.arange(3.0)), [0, 2, 4])


def test_is_traced_looks_into_trees():
    """One tracer among the leaves is enough; numbers and arrays are none."""
    assert not checks.is_traced(1, np.ones(2), {"a": jnp.ones(2)})
    seen = []
    jax.jit(lambda x: seen.append(checks.is_traced({"a": [1, x]})) or x)(1.0)
    assert seen == [True]


# ------------------------------------------------------------------------ numbers


def test_as_float_keeps_floats_and_widens_integers():
    """Float32 stays; integers and booleans become the default float."""
    assert checks.as_float(np.float32(1), "a").dtype == jnp.float32
    assert checks.as_float(np.arange(3), "a").dtype == jnp.float64
    assert checks.as_float(2, "a").dtype == jnp.float64


def test_as_float_refuses_what_is_not_a_real_array():
    """Complex numbers and text, by name."""
    refused(checks.as_float, "`beta` must be real, but is complex128", 1j, "beta")
    message = "`beta` must be a real array, but is array"
    refused(checks.as_float, message, np.array(["one"]), "beta")


@pytest.mark.parametrize("value", [-1e-300, -1.0, math.nan, math.inf, -math.inf])
def test_scalars_below_the_minimum_or_not_finite_are_refused(value):
    """The rule and the value stand in the message."""
    shown = repr(value)
    refused(
        checks.check_scalar,
        f"^Argument `beta` must be finite and ≥ 0, but is {shown}.$",
        value,
        "beta",
        minimum=0.0,
    )


def test_strict_scalars_exclude_the_minimum():
    """> instead of ≥; without a minimum any finite number will do."""
    assert float(checks.check_scalar(0, "s", minimum=0.0)) == 0
    message = "`s` must be finite and > 0, but is 0.0"
    refused(checks.check_scalar, message, 0, "s", minimum=0.0, strict=True)
    assert float(checks.check_scalar(-5, "s")) == -5
    refused(checks.check_scalar, "`s` must be finite, but is nan", math.nan, "s")


def test_arrays_are_not_scalars():
    """The cure for a batch is vmap."""
    message = r"`s` must be a scalar, but has shape \(1,\). For a batch use `jax.vmap`"
    refused(checks.check_scalar, message, np.ones(1), "s")


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "3", None, np.float64(2)])
def test_counts_are_integers_of_at_least_one(value):
    """Not floats that happen to be whole, not booleans."""
    refused(checks.check_count, "`n` must be an integer ≥ 1, but is", value, "n")


def test_counts_may_be_numpy_integers():
    """The result is a Python int; the minimum can be set."""
    count = checks.check_count(np.int32(4), "n")
    assert count == 4
    assert type(count) is int
    assert checks.check_count(0, "n", minimum=0) == 0
    refused(checks.check_count, "`n` must be an integer ≥ 2, but is 1", 1, "n", 2)


# ------------------------------------------------------------------------ arrays


@pytest.mark.parametrize("shape", [(), (3,), (2, 4), (3, 2), (1, 2, 3)])
def test_arrays_of_other_shapes_are_refused(shape):
    """Wanted and found shape; `None` stands for any length."""
    message = r"`V` must have shape \(any, 3\), but has shape "
    refused(checks.check_finite, message, np.ones(shape), "V", (None, 3))


@pytest.mark.parametrize(("bad", "shown"), [(np.nan, "nan"), (np.inf, "inf")])
def test_the_entry_that_is_not_finite_is_named(bad, shown):
    """Its index and value."""
    V = np.ones((2, 3))
    V[1, 2] = bad
    message = rf"`V` must be finite, but an entry at index \(1, 2\) is {shown}"
    refused(checks.check_finite, message, V, "V", (2, 3))
    assert checks.check_finite(np.ones((0, 3)), "V", (None, 3)).shape == (0, 3)


@pytest.mark.parametrize(
    ("ts", "message"),
    [
        ([], r"shape \(t,\) with t ≥ 1, but has shape \(0,\)"),
        (1.0, r"shape \(t,\) with t ≥ 1, but has shape \(\)"),
        ([0, 1, 1], "must increase strictly, but entry 2 is 1 after 1. Sort the times"),
        ([0, 2, 1], "must increase strictly, but entry 2 is 1 after 2"),
        ([0, np.nan], r"must be finite, but an entry at index \(1,\) is nan"),
        ([0, np.inf], r"must be finite, but an entry at index \(1,\) is inf"),
    ],
)
def test_times_increase_strictly(ts, message):
    """At least one, finite, each above the one before."""
    refused(checks.check_times, f"Argument `ts` .*{message}", np.array(ts, float))


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=9))
def test_times_pass_exactly_if_sorted_without_ties(ts):
    """check_times accepts a list if and only if it equals its sorted set."""
    if ts == sorted(set(ts)):
        np.testing.assert_array_equal(checks.check_times(np.array(ts)), ts)
    else:
        refused(checks.check_times, "must increase strictly", np.array(ts))


# ------------------------------------------------------------------------ names


def test_a_misspelt_name_meets_its_neighbour():
    """« Did you mean …? » for a near miss, the list for a far one."""
    known = ["energy", "spread"]
    assert checks.nearest("enrgy", known) == "Did you mean `energy`?"
    assert checks.nearest("zzz", iter(known)) == "Known: `energy`, `spread`."
