"""Question: what does one attention layer cost, against torch's
`scaled_dot_product_attention` on the same matrices, and how wrong is each?

    python benchmarks/layer.py
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import torch

import meanformer as mf
from meanformer.experiments.report import peak_memory_mb
from measure import compiled, in_turn, record


def reference(x: np.ndarray, beta: float, rows: np.ndarray) -> np.ndarray:
    """Softmax attention of some rows, Q = K = V = I, NumPy float64."""
    x = x.astype(np.float64)
    s = beta * x[rows] @ x.T
    w = np.exp(s - s.max(axis=1, keepdims=True))
    return (w / w.sum(axis=1, keepdims=True)) @ x


def one(n: int, d: int, dtype: str, beta: float, repeats: int) -> None:
    x = np.asarray(mf.Uniform(d, jnp.float64).sample(jax.random.key(0), n), dtype)
    rows = np.arange(0, n, max(1, n // 200))
    exact = reference(x, beta, rows)
    xj, xt = jnp.asarray(x), torch.from_numpy(x.copy())[None, None]
    eye = jnp.eye(d, dtype=dtype)

    field = mf.SelfAttention(eye, eye, eye, beta)
    ours, compile_seconds, temporary = compiled(
        lambda f, x: f.drive(x, mf.Empirical(x, check=False)), field, xj
    )

    def peer():
        with torch.inference_mode():
            return torch.nn.functional.scaled_dot_product_attention(
                xt, xt, xt, scale=beta
            )

    seconds = in_turn({"ours": ours, "torch": lambda: peer().numpy()}, repeats)
    error = float(np.abs(np.asarray(ours())[rows] - exact).max())
    peer_error = float(np.abs(peer()[0, 0].numpy()[rows] - exact).max())
    parameters = {"n": n, "d": d, "dtype": dtype, "beta": beta}
    question = "cost of one dense layer"
    torch_line = record(
        "layer",
        "torch.scaled_dot_product_attention",
        question,
        parameters,
        seconds["torch"],
        max_abs_error=peer_error,
        threads=torch.get_num_threads(),
    )
    record(
        "layer",
        "SelfAttention.drive",
        question,
        parameters,
        seconds["ours"],
        max_abs_error=error,
        compile_seconds=compile_seconds,
        temporary_bytes=temporary,
        peer="torch",
        ratio=float(np.median(seconds["ours"])) / torch_line["median_seconds"],
        reference="NumPy float64, explicit exponentials, 200 rows",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=11)
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    if options.n == 10_000:
        memory(100_000)  # first: peak memory only grows
    for dtype in ("float32", "float64"):
        for d in (3, 64):
            one(options.n, d, dtype, 30.0, options.repeats)


def memory(n: int) -> None:
    """By how much one layer of n tokens raises the peak memory of this process: < 200 MB."""
    x = mf.Uniform(3, jnp.float32).sample(jax.random.key(0), n)
    eye = jnp.eye(3, dtype=jnp.float32)
    field = mf.SelfAttention(eye, eye, eye, 30.0)
    before = peak_memory_mb()
    call, compile_seconds, temporary = compiled(
        lambda f, x: f.drive(x, mf.Empirical(x, check=False)), field, x
    )
    seconds = in_turn({"ours": call}, 3)["ours"]
    growth = peak_memory_mb() - before
    record(
        "layer",
        "SelfAttention.drive, memory",
        "does memory grow with n²?",
        {"n": n, "d": 3, "dtype": "float32", "beta": 30.0},
        seconds,
        compile_seconds=compile_seconds,
        temporary_bytes=temporary,
        peak_growth_mb=round(growth, 1),
    )
    if growth > 200:
        raise SystemExit(f"peak memory grew by {growth:.0f} MB, more than 200 MB")


if __name__ == "__main__":
    main()
