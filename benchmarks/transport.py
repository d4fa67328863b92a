"""Question: what do Wasserstein distances cost, and how wrong are they? On the circle
against POT at n = 10⁶; by entropy on S² at n = 10⁴, against SciPy's exact assignment.

    python benchmarks/transport.py           # all but the assignments, about 5 minutes
    python benchmarks/transport.py --exact   # with them: minutes and 2 GB each
"""

import argparse
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import meanformer as mf
from meanformer.bench import compiled, in_turn, record
from meanformer.experiments.report import peak_memory_mb
from meanformer.transport import wasserstein

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ot

RECORDS = Path(__file__).parent / "records" / "transport.jsonl"
CIRCLE = "cost of an exact distance on the circle"
ENTROPY = "cost and error of a Sinkhorn divergence"
EPSILON = 1e-2


def circle(n: int, p: int, repeats: int) -> None:
    """Equal weights, in float64. The reference is the code for weights, which works another
    way; its own is POT."""
    x = mf.Uniform(2, jnp.float64).sample(jax.random.key(0), n)
    y = mf.WrappedNormal([1.0, 0.0], 0.5).sample(jax.random.key(1), n)
    u, v = (np.asarray(mf.sphere.angles(z)) / (2 * np.pi) % 1 for z in (x, y))
    ours, compile_seconds, temporary = compiled(lambda x, y: wasserstein(x, y, p), x, y)
    weights = jnp.full(n, 1 / n)
    general, *_ = compiled(
        lambda x, a, y: wasserstein(mf.Empirical(x, a, check=False), y, p), x, weights, y
    )
    peer = {"POT": lambda: ot.wasserstein_circle(u, v, p=p)}
    seconds = in_turn({"ours": ours} | peer, repeats)
    seconds["general"] = in_turn({"general": general}, 1)["general"]
    exact = float(general().value)
    peer_value = 2 * np.pi * float(peer["POT"]()[0]) ** (1 / p)
    parameters = {"n": n, "p": p, "dtype": "float64"}
    line = record(
        RECORDS,
        "ot.wasserstein_circle",
        CIRCLE,
        parameters,
        seconds["POT"],
        max_abs_error=abs(peer_value - exact),
        value=peer_value,
    )
    found = ours()
    record(
        RECORDS,
        "wasserstein, circle",
        CIRCLE,
        parameters,
        seconds["ours"],
        max_abs_error=abs(float(found.value) - exact),
        stated_error=float(found.error),
        value=float(found.value),
        compile_seconds=compile_seconds,
        temporary_bytes=temporary,
        peer="POT",
        ratio=float(np.median(seconds["ours"])) / line["median_seconds"],
        reference="the same distance by the code for weights",
    )
    record(
        RECORDS,
        "wasserstein, circle, weights",
        CIRCLE,
        parameters,
        seconds["general"],
        max_abs_error=abs(exact - peer_value),
        reference="POT",
    )


def clouds(n: int, dtype: str) -> tuple[jax.Array, jax.Array]:
    """n uniform tokens of S² and n of the heat kernel of time 0.3."""
    x = mf.Uniform(3, jnp.float64).sample(jax.random.key(0), n)
    y = mf.HeatKernel([0.0, 0.0, 1.0], 0.3).sample(jax.random.key(1), n)
    return x.astype(dtype), y.astype(dtype)


def assignment(n: int, cost: str) -> float:
    """W2 by SciPy's assignment, once."""
    x, y = clouds(n, "float64")
    begin = time.perf_counter()
    found = wasserstein(x, y, cost=cost, method="exact")
    seconds = [time.perf_counter() - begin]
    record(
        RECORDS,
        "wasserstein, assignment",
        "cost of an exact distance on S²",
        {"n": n, "d": 3, "p": 2, "cost": cost, "dtype": "float64"},
        seconds,
        max_abs_error=float(found.error),
        value=float(found.value),
        reference="rounding: exact",
    )
    return float(found.value)


def sinkhorn(n: int, cost: str, dtype: str, exact: float | None) -> None:
    x, y = clouds(n, dtype)
    before = peak_memory_mb()
    call, compile_seconds, temporary = compiled(
        lambda x, y: wasserstein(
            x, y, cost=cost, method="sinkhorn", epsilon=EPSILON, throw=False
        ),
        x,
        y,
    )
    begin = time.perf_counter()  # once: nothing is compiled by the first run
    found = jax.block_until_ready(call())
    seconds = [time.perf_counter() - begin]
    growth = peak_memory_mb() - before
    value = float(found.value)
    judged = {} if exact is None else {"max_abs_error": abs(value - exact)}
    if exact is not None:
        judged |= {"relative_error": abs(value / exact - 1), "reference": "assignment"}
    record(
        RECORDS,
        "wasserstein, sinkhorn",
        ENTROPY,
        {"n": n, "d": 3, "p": 2, "cost": cost, "epsilon": EPSILON, "dtype": dtype},
        seconds,
        value=value,
        lower=float(found.lower),
        upper=float(found.upper),
        stated_error=float(found.error),
        converged=bool(found.converged),
        iterations=int(found.iterations),
        compile_seconds=compile_seconds,
        temporary_bytes=temporary,
        peak_growth_mb=round(growth, 1),
        **judged,
    )
    if growth > 1000:
        raise SystemExit(f"peak memory grew by {growth:.0f} MB, more than 1 GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--circle", type=int, default=1_000_000)
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--exact", action="store_true")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    # First: peak memory only grows, and the assignment's table has 800 MB.
    sinkhorn(options.n, "chordal", "float32", None)
    costs = ("chordal", "geodesic")
    exact = {c: assignment(options.n, c) if options.exact else None for c in costs}
    for cost in costs:
        for dtype in ("float32", "float64"):
            sinkhorn(options.n, cost, dtype, exact[cost])
    for p in (1, 2):
        circle(options.circle, p, options.repeats)


if __name__ == "__main__":
    main()
