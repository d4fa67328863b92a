"""A case in numbers, and what is true of it: sums of all pairs in NumPy float64."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .cases import Case

ROWS = 200  # how many tokens the error is measured at


@dataclasses.dataclass(frozen=True)
class Problem:
    """Tokens x (n, d) and matrices in one dtype; directions G (n, d) of the scalar whose
    gradient is taken, and the rows at which errors are measured."""

    case: Case
    dtype: str
    x: np.ndarray
    Q: np.ndarray
    K: np.ndarray
    V: np.ndarray
    G: np.ndarray
    rows: np.ndarray

    @property
    def n(self) -> int:
        return len(self.x)

    @property
    def d(self) -> int:
        return self.x.shape[1]

    @property
    def shift(self) -> float:
        """c of the unit e^{−c} of time in which the unnormalised field is measured."""
        return self.case.kappa if self.case.model == "USA" else 0.0

    def first(self, n: int) -> "Problem":
        """The same with the first n tokens only."""
        rows = np.unique(self.rows[self.rows < n])
        return dataclasses.replace(self, x=self.x[:n], G=self.G[:n], rows=rows)

    def some(self) -> np.ndarray:
        """G on the rows of the reference, 0 elsewhere: its gradient costs n · ROWS."""
        picked = np.zeros_like(self.G)
        picked[self.rows] = self.G[self.rows]
        return picked


def problem(case: Case, n: int, dtype: str, seed: int) -> Problem:
    """The same tokens in each dtype (rounded), on each device."""
    with jax.default_device(_host()):
        token_key, direction_key = jax.random.split(jax.random.key(seed))
        x = np.asarray(case.law().sample(token_key, n), np.float64)
        G = np.asarray(jax.random.normal(direction_key, x.shape, jnp.float32), np.float64)
    x, Q, K, V, G = (np.asarray(a, dtype) for a in (x, case.Q, case.K, case.V, G))
    return Problem(
        case, dtype, x, Q, K, V, G, np.unique(np.linspace(0, n - 1, ROWS, dtype=int))
    )


def _host() -> Any:
    try:
        return jax.devices("cpu")[0]
    except RuntimeError:  # hidden by JAX_PLATFORMS
        return None


def _pairs(p: Problem):
    """x, A = βQᵀK, V in float64, and for the rows of the reference, some at a time: their
    indices, weights e^{⟨u,y⟩−s} (r, n) and shifts s (r, 1)."""
    x, Q, K, V = (a.astype(np.float64) for a in (p.x, p.Q, p.K, p.V))
    A = p.case.beta * Q.T @ K
    at_once = max(1, 4_000_000 // p.n)

    def blocks():
        for i in range(0, len(p.rows), at_once):
            rows = p.rows[i : i + at_once]
            s = x[rows] @ A @ x.T
            top = s.max(axis=1, keepdims=True)
            yield rows, np.exp(s - top), top

    return x, A, V, blocks()


def exact_field(p: Problem) -> np.ndarray:
    """F(x_i, µ) at the rows of the reference."""
    x, _, V, blocks = _pairs(p)
    out = []
    for _, w, top in blocks:
        total = w.sum(axis=1, keepdims=True)
        factor = np.exp(top - p.shift) * total / p.n if p.case.model == "USA" else 1.0
        out.append(factor * (w @ x / total @ V.T))
    return np.concatenate(out)


def exact_gradient(p: Problem) -> np.ndarray:
    """∇_x Σ_i ⟨G_i, V m_i⟩ over the rows i of the reference, m_i the barycentre, tangential
    part, at all tokens (n, d); SA only.

    With p_ij the weights of row i, u_i = Aᵀx_i, g_i = VᵀG_i and a_ij = p_ij⟨g_i, y_j − m_i⟩ the
    differential is Σ_ij p_ij⟨g_i, dy_j⟩ + a_ij(⟨u_i, dy_j⟩ + ⟨Aᵀdx_i, y_j⟩)."""
    x, A, V, blocks = _pairs(p)
    out = np.zeros_like(x)
    for rows, w, _ in blocks:
        w = w / w.sum(axis=1, keepdims=True)
        g = p.G[rows].astype(np.float64) @ V
        a = w * (g @ x.T - np.sum(g * (w @ x), axis=1, keepdims=True))
        out += w.T @ g + a.T @ (x[rows] @ A)
        np.add.at(out, rows, a @ x @ A.T)
    return tangential(x, out)


def tangential(x: np.ndarray, v: np.ndarray) -> np.ndarray:
    """v_i − ⟨x_i, v_i⟩x_i: what moves along the sphere."""
    return v - np.sum(x * v, axis=1, keepdims=True) * x
