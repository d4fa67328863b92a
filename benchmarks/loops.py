"""Question: what do `unroll` and fixed-step `solve` add to a `lax.scan` written by hand?

python benchmarks/loops.py
"""

from pathlib import Path

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np

import meanformer as mf
from meanformer.bench import in_turn, record

RECORDS = Path(__file__).parent / "records" / "loops.jsonl"
STEP, BETA = 1e-2, 30.0


def by_hand(n: int, layers: int, projected: bool):
    """normalise(x + h·F), F = softmax(β x xᵀ) x, or its tangential part if `projected`; in
    row blocks of 1000 for large n, since n² numbers do not fit a cache."""

    def attend(rows, x, beta):
        w = jnp.exp(beta * rows @ x.T - beta)
        return (w @ x) / jnp.sum(w, axis=1, keepdims=True)

    def layer(x, beta):
        if n <= 1000:
            f = attend(x, x, beta)
        else:
            blocks = x.reshape(n // 1000, 1000, -1)
            f = jax.lax.map(lambda rows: attend(rows, x, beta), blocks).reshape(x.shape)
        return f - jnp.sum(x * f, axis=1, keepdims=True) * x if projected else f

    @jax.jit
    def run(x, beta):
        def step(x, _):
            x = x + STEP * layer(x, beta)
            return x / jnp.linalg.norm(x, axis=1, keepdims=True), None

        return jax.lax.scan(step, x, length=layers)[0]

    return run


def one(n: int, layers: int, repeats: int) -> None:
    x = mf.Uniform(3).sample(jax.random.key(0), n)
    eye = jnp.eye(3)
    field = mf.SelfAttention(eye, eye, eye, BETA)
    beta = jnp.asarray(BETA)
    ts = jnp.array([0.0, layers * STEP])
    scan, projected = by_hand(n, layers, False), by_hand(n, layers, True)
    unroll = jax.jit(lambda f, x: mf.unroll(f, x, layers, STEP).xs[-1])
    solve = jax.jit(
        lambda f, x: mf.solve(f, x, ts, step=STEP, solver=dfx.Euler(), save="last").xs[-1]
    )
    contenders = {
        "lax.scan by hand": lambda: scan(x, beta),
        "unroll": lambda: unroll(field, x),
        "lax.scan by hand, projected": lambda: projected(x, beta),
        "solve, fixed steps": lambda: solve(field, x),
    }
    seconds = in_turn(contenders, repeats)
    results = {name: np.asarray(call()) for name, call in contenders.items()}
    for ours, peer in (
        ("unroll", "lax.scan by hand"),
        ("solve, fixed steps", "lax.scan by hand, projected"),
    ):
        record(
            RECORDS,
            ours,
            "overhead over a scan of the same formula",
            {"n": n, "d": 3, "layers": layers, "dtype": str(x.dtype)},
            seconds[ours],
            peer=peer,
            peer_seconds=[round(s, 6) for s in seconds[peer]],
            ratio=float(np.median(seconds[ours]) / np.median(seconds[peer])),
            max_abs_error=float(np.abs(results[ours] - results[peer]).max()),
            reference=peer,
        )


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    one(128, 1000, 11)
    one(10_000, 20, 7)


if __name__ == "__main__":
    main()
