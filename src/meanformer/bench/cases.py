"""What is measured: fields and tokens of known sizes, and the targets they are held to."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..checks import nearest
from ..experiments.multiscale_heat import CENTRES, SHARES, SIGMA
from ..measures import AbstractLaw, Mixture, Uniform, WrappedNormal
from ..sphere import from_angles

BOTH = ("float32", "float64")
FAST = ("Harmonic", "Auto")
DENSE = ("Dense", "Blockwise", "Auto")
OURS = ("Dense", "Blockwise", "Harmonic", "Auto")
PEERS = ("torch", "NumPy", "CBXpy")
TILE = 1024.0  # a sum over tiles may take memory for n · TILE numbers


@dataclasses.dataclass(frozen=True)
class Target:
    """A bound on a number of a case, which is to be as small as possible.

    - `quantity`: "torch" (own time/time of torch, float32, forward), "dense" (own time/time of
        the best of our dense sums in the same dtype), "gradient" (time of the gradient/time
        of the evaluation), "best" (own time/time of the fastest partition), "exponent" (of n
        in the time), "seconds", or "memory" (temporary numbers/n: O(n) means a bound that
        does not grow).
    - `must`, `dream`: upper bounds; `contenders`: whose number it is, the best of them.
    - `error`: the largest absolute error with which a time counts.
    """

    quantity: str
    must: float
    dream: float | None
    contenders: tuple[str, ...]
    dtypes: tuple[str, ...] = BOTH
    error: float | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """One field with tokens drawn from one law, for one or more n.

    - `model`: "SA" or "USA" (in its shifted unit); `Q`, `K`, `V`, `beta` as in the papers.
    - `passes`: "forward": F(x_i, µ) at all tokens of µ; "gradient": ∇_x Σ_i ⟨G_i, F(x_i, µ)⟩.
    - `contenders`: names of those that are measured, where they fit.
    - `budget`: seconds that a contender may run in a round (one whose run takes half of it
        runs once); `longest`: seconds above which a run is not made, but extrapolated.
    """

    name: str
    title: str
    source: str
    ns: tuple[int, ...]
    law: Callable[[], AbstractLaw]
    beta: float
    Q: Any
    K: Any
    V: Any
    model: str = "SA"
    dtypes: tuple[str, ...] = BOTH
    passes: tuple[str, ...] = ("forward",)
    contenders: tuple[str, ...] = (*PEERS, *OURS)
    targets: tuple[Target, ...] = ()
    budget: float = 20.0
    longest: float = 60.0

    @property
    def d(self) -> int:
        return len(self.V)

    @property
    def kappa(self) -> float:
        """The largest κ = |βBᵀx|."""
        return float(self.beta * np.linalg.norm(np.transpose(self.Q) @ self.K, 2))

    def quick(self) -> "Case":
        """The same field with few tokens."""
        few = (256,) if len(self.ns) == 1 else (256, 512, 1024)
        ns = sorted({min(n, most) for n, most in zip(self.ns, few)})
        return dataclasses.replace(self, ns=tuple(ns))


def _uniform(d: int) -> Callable[[], AbstractLaw]:
    return lambda: Uniform(d, jnp.float64)


def _three_gaussians() -> AbstractLaw:
    return Mixture([WrappedNormal(from_angles(c), SIGMA) for c in CENTRES], SHARES)


def _case(name: str, title: str, source: str, ns: Any, d: int, beta: float, **more: Any):
    """Q = K = V = I and uniform tokens, unless `more` says otherwise."""
    ns = (ns,) if isinstance(ns, int) else tuple(ns)
    eye = np.eye(d)
    fields = {"Q": eye, "K": eye, "V": eye, "law": _uniform(d)} | more
    return Case(name, title, source, ns, beta=beta, **fields)


def oblique() -> np.ndarray:
    """B, not symmetric, with singular values 1, .6, .3: κ varies from token to token."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(3, 3)))[0] for _ in range(2))
    return left @ np.diag([1.0, 0.6, 0.3]) @ right.T


_TILES = Target("memory", TILE, None, ("Blockwise",))


def _dense() -> list[Case]:
    source = "one layer of exact sums"

    def speed(must: float) -> tuple[Target, ...]:
        return Target("torch", must, 1.0, DENSE, ("float32",)), _TILES

    return [
        _case(
            "dense/d3", "exact sums, d = 3", source, 10_000, 3, 30.0, targets=speed(1.2)
        ),
        _case(
            "dense/d64",
            "exact sums, d = 64",
            source,
            10_000,
            64,
            30.0,
            targets=speed(2.0),
        ),
    ]


def _harmonic() -> list[Case]:
    source = "one layer of many tokens"

    def speed(must: float, dream: float, dtypes: tuple[str, ...] = BOTH) -> Target:
        return Target("torch", 1 / must, 1 / dream, FAST, dtypes, 1e-6)

    return [
        _case(
            "harmonic/d2",
            "10⁵ tokens on S¹",
            source,
            100_000,
            2,
            50.0,
            targets=(speed(500.0, 1000.0),),
        ),
        _case(
            "harmonic/d3",
            "10⁵ tokens on S²",
            source,
            100_000,
            3,
            30.0,
            targets=(speed(100.0, 300.0),),
        ),
        _case(
            "harmonic/d3-oblique",
            "10⁵ tokens on S², B not symmetric, with singular values 1, .6, .3",
            source,
            100_000,
            3,
            30.0,
            K=oblique(),
            targets=(speed(30.0, 100.0, ("float64",)),),
        ),
        _case(
            "harmonic/d2-1e7",
            "10⁷ tokens on S¹: does one layer fit in memory?",
            source,
            10_000_000,
            2,
            50.0,
            contenders=FAST,
            targets=(Target("memory", 100.0, None, FAST),),
        ),
    ]


def _growth() -> list[Case]:
    ns = (10_000, 31_623, 100_000, 316_228, 1_000_000)
    exponent = Target("exponent", 1.1, 1.0, FAST)
    million = Target("seconds", 1.0, None, FAST)
    source = "growth of the time with n"
    names = ("torch", "NumPy", "CBXpy", "Blockwise", *FAST)
    return [
        _case(
            "growth/d2", "S¹, β = 50", source, ns, 2, 50.0, contenders=names,
            targets=(exponent,),
        ),
        _case(
            "growth/d3", "S², β = 30", source, ns, 3, 30.0, contenders=names,
            targets=(exponent, million),
        ),
    ]  # fmt: skip


def _gradient() -> list[Case]:
    source = "gradient of a scalar of one layer"
    both = ("forward", "gradient")

    def case(name: str, n: int, d: int, beta: float, must: float, names: tuple[str, ...]):
        light = tuple(name for name in names if name != "Dense")  # memory O(n)
        return _case(
            f"gradient/{name}",
            f"∇_x Σ⟨G_i, F(x_i, µ)⟩, d = {d}",
            source,
            n,
            d,
            beta,
            passes=both,
            contenders=("torch", *names),
            targets=(
                Target("gradient", must, 2.5, light),
                Target("memory", TILE, None, light),
            ),
        )

    exact = ("Dense", "Blockwise")
    return [
        case("dense-d3", 10_000, 3, 30.0, 5.5, exact),
        case("dense-d16", 10_000, 16, 30.0, 4.0, exact),
        case("harmonic-d2", 100_000, 2, 50.0, 4.0, FAST),
        case("harmonic-d3", 100_000, 3, 30.0, 4.0, FAST),
    ]


def _papers() -> list[Case]:
    first, second = "arXiv:2509.25040", "arXiv:2410.23228"
    ring = {"law": _three_gaussians, "V": -np.eye(2)}
    metastable = {"model": "USA"}
    return [
        _case(
            "multiscale/fig1a",
            "scenario 1a: 10⁴ tokens on S²",
            f"{first}, Figure 1",
            10_000,
            3,
            30.0,
            Q=np.diag([-1.0, -1, 1]),
            V=np.diag([1.0, -1, 2]),
            targets=(Target("dense", 1 / 6, None, FAST),),
        ),
        _case(
            "multiscale/fig3",
            "scenario 2b: 5·10⁴ tokens on S¹, V = −I",
            f"{first}, Figure 3",
            50_000,
            2,
            50.0,
            targets=(Target("dense", 1 / 200, None, FAST),),
            **ring,
        ),
        _case(
            "multiscale/fig3-million",
            "scenario 2b with 20 times the tokens: 1000 layers in 5 minutes?",
            f"{first}, Figure 3",
            1_000_000,
            2,
            50.0,
            contenders=("torch", *FAST),
            targets=(Target("seconds", 0.3, None, FAST),),
            **ring,
        ),
        _case(
            "metastable/fig2-beta5",
            "unnormalised, S¹, β = 5",
            f"{second}, Figure 2",
            10_000,
            2,
            5.0,
            **metastable,
        ),
        _case(
            "metastable/fig2-beta7",
            "unnormalised, S¹, β = 7",
            f"{second}, Figure 2",
            10_000,
            2,
            7.0,
            **metastable,
        ),
        _case(
            "metastable/fig3",
            "unnormalised, S¹, β = 2",
            f"{second}, Figure 3",
            (1_000, 2_000, 4_000, 8_000, 16_000),
            2,
            2.0,
            **metastable,
        ),
        _case(
            "concentration/fig3",
            "500 tokens on S², V = diag(1, ½, .1), QᵀK = diag(½, 2, ½)",
            "arXiv:2605.10931, Figure 3",
            500,
            3,
            10.0,
            K=np.diag([0.5, 2.0, 0.5]),
            V=np.diag([1.0, 0.5, 0.1]),
        ),
    ]


def _auto() -> list[Case]:
    """Sizes at which the choice of `Auto` matters: it should be near the best everywhere."""
    sizes = [
        (500, 2, 5.0, "float64"),
        (500, 3, 30.0, "float32"),
        (500, 16, 10.0, "float32"),
        (2_000, 2, 50.0, "float64"),
        (2_000, 3, 30.0, "float64"),
        (5_000, 3, 10.0, "float32"),
        (10_000, 3, 30.0, "float64"),
        (10_000, 16, 30.0, "float32"),
        (20_000, 3, 1000.0, "float64"),
        (50_000, 2, 1000.0, "float32"),
        (100_000, 2, 100.0, "float32"),
        (1_000_000, 3, 1.0, "float64"),
    ]
    return [
        _case(
            f"auto/n{n}-d{d}-beta{beta:g}",
            f"what `Auto` picks for n = {n}, d = {d}, β = {beta:g}",
            "tuning of `Auto`",
            n,
            d,
            beta,
            dtypes=(dtype,),
            contenders=OURS,
            budget=2.0,
            longest=10.0,
            targets=(Target("best", 1.3, None, ("Auto",), (dtype,)),),
        )
        for n, d, beta, dtype in sizes
    ]


CASES: dict[str, Case] = {
    case.name: case
    for case in (*_dense(), *_harmonic(), *_growth(), *_gradient(), *_papers(), *_auto())
}


def chosen(names: Iterable[str]) -> list[Case]:
    """The cases of these names, or of these groups (what stands before the slash); all for
    none. **Raises:** `ValueError` for a name that is neither."""
    names = list(names)
    groups = {name.split("/")[0] for name in CASES}
    for name in names:
        if name not in CASES and name not in groups:
            known = nearest(name, [*CASES, *sorted(groups)])
            raise ValueError(
                f"Argument `--cases` must name cases or groups of them, but has {name!r}. "
                f"{known} See `meanformer bench --list`."
            )
    wanted = set(names)
    return [
        case
        for name, case in CASES.items()
        if not names or name in wanted or name.split("/")[0] in wanted
    ]


def listing() -> str:
    """All cases: name, title, sizes, source."""
    width = max(map(len, CASES))
    return "\n".join(
        f"{c.name.ljust(width)}  {c.title}  [{c.source}; n = {', '.join(map(str, c.ns))}, "
        f"d = {c.d}, β = {c.beta:g}; {', '.join(c.dtypes)}]"
        for c in CASES.values()
    )
