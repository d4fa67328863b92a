"""Who is measured: our partitions, torch, NumPy and CBXpy, each brought to one form.

A contender takes a `Problem` and returns a `Prepared` program. torch and cbx are optional:
they are imported where they are asked for."""

import dataclasses
import warnings
from collections.abc import Callable
from importlib import util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import partition
from ..attention import SelfAttention, UnnormalizedSelfAttention
from ..measures import Empirical
from .measure import available_memory, compiled, cores
from .reference import Problem

MOST_DENSE = 20_000  # tokens of which `Dense` may hold all pairs


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A program ready to run. `call()`: one run, its result not yet on the host; `read`: a
    result as NumPy array; `along(G)`: a run of the gradient for other directions G."""

    call: Callable[[], Any]
    read: Callable[[Any], np.ndarray]
    threads: int
    along: Callable[[np.ndarray], Any] | None = None
    compile_seconds: float | None = None
    temporary_bytes: int | None = None
    note: str | None = None

    def value(self, G: np.ndarray) -> np.ndarray:
        """The result of a run, of the gradient for the directions G."""
        return self.read(self.call() if self.along is None else self.along(G))


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to compute the field. `quadratic`: its time grows as n²; `first_probe`: how many
    tokens its time is estimated from first; `unfit(problem, what)`: why it cannot
    compute a pass of that problem ("": it can); `roomy(problem)`: whether memory suffices."""

    name: str
    quadratic: Callable[[Problem], bool]
    first_probe: int
    unfit: Callable[[Problem, str], str]
    prepare: Callable[[Problem, str], Prepared]
    package: str | None = None
    roomy: Callable[[Problem], bool] = lambda p: True

    @property
    def missing(self) -> bool:
        return self.package is not None and util.find_spec(self.package) is None


# ------------------------------------------------------------------------- ours


def _field(p: Problem, sums: partition.AbstractPartition) -> Any:
    Q, K, V = (jnp.asarray(a) for a in (p.Q, p.K, p.V))
    if p.case.model == "USA":
        return UnnormalizedSelfAttention(
            Q, K, V, p.case.beta, partition=sums, unit="shifted"
        )
    return SelfAttention(Q, K, V, p.case.beta, partition=sums)


def drive(field: Any, x: jax.Array) -> jax.Array:
    """F(x_i, µ) at all tokens of µ."""
    return field.drive(x, Empirical(x, check=False))


def slope(field: Any, x: jax.Array, G: jax.Array) -> jax.Array:
    """∇_x Σ_i ⟨G_i, F(x_i, µ)⟩."""
    return jax.grad(lambda x: jnp.sum(drive(field, x) * G))(x)


def _ours(name: str) -> Contender:
    sums = getattr(partition, name)()

    def prepare(p: Problem, what: str) -> Prepared:
        field, x, G = _field(p, sums), jnp.asarray(p.x), jnp.asarray(p.G)
        note = f"picks {type(picked(p)).__name__}" if name == "Auto" else None
        if what == "forward":
            call, seconds, memory = compiled(drive, field, x)
            return Prepared(call, np.asarray, cores(), None, seconds, memory, note)
        call, seconds, memory = compiled(slope, field, x, G)
        return Prepared(
            call,
            np.asarray,
            cores(),
            lambda g: call(field, x, jnp.asarray(g)),
            seconds,
            memory,
            note,
        )

    def picked(p: Problem) -> partition.AbstractPartition:
        if isinstance(sums, partition.Auto):
            return sums.choose(p.n, p.n, p.d, jnp.dtype(p.dtype))
        return sums

    def unfit(p: Problem, what: str) -> str:
        if name == "Harmonic" and p.d not in (2, 3):
            return f"harmonics are short on S¹ and S² only, d = {p.d}"
        if name == "Dense" and p.n > MOST_DENSE:
            return f"holds n² numbers, n > {MOST_DENSE}"
        return ""

    def quadratic(p: Problem) -> bool:
        return not isinstance(picked(p), partition.Harmonic)

    def roomy(p: Problem) -> bool:
        """Reverse mode holds several arrays of all pairs."""
        pairs = np.dtype(p.dtype).itemsize * p.n**2
        return name != "Dense" or 4 * pairs <= 0.5 * available_memory()

    return Contender(name, quadratic, 10_000, unfit, prepare, roomy=roomy)


# ------------------------------------------------------------------------- torch


def _torch(p: Problem, what: str) -> Prepared:
    """`scaled_dot_product_attention` of queries xQᵀ, keys xKᵀ and values xVᵀ at scale β.

    The unnormalised field needs the sums Z_i as well, which torch keeps to itself: one token
    more with key 0 (exponent 0) and one column more, 1 for it and 0 for the others, give
    the sum Z_i + 1 as the inverse of that column of the result."""
    import torch  # pyright: ignore[reportMissingImports]

    cuda = jax.default_backend() == "gpu" and torch.cuda.is_available()
    torch.set_num_threads(cores())
    place = "cuda" if cuda else "cpu"
    x, Q, K, V = (torch.from_numpy(a.copy()).to(place) for a in (p.x, p.Q, p.K, p.V))
    n, d = p.x.shape
    usa = p.case.model == "USA"
    # Fused kernels want one width for all three, on CUDA a multiple of 8.
    width = max(Q.shape[0], d + usa)
    width = -(-width // 8) * 8 if cuda else width

    def padded(a: Any) -> Any:
        return torch.nn.functional.pad(a, (0, width - a.shape[1]))[None, None]

    def field(x: Any) -> Any:
        keys, values = x @ K.T, x @ V.T
        if usa:
            keys = torch.nn.functional.pad(keys, (0, 0, 0, 1))
            values = torch.nn.functional.pad(values, (0, 1, 0, 1))
            values[-1, -1] = 1
        out = torch.nn.functional.scaled_dot_product_attention(
            padded(x @ Q.T), padded(keys), padded(values), scale=p.case.beta
        )[0, 0]
        if usa:
            return out[:, :d] / out[:, d : d + 1] * (float(np.exp(-p.shift)) / n)
        return out[:, :d]

    def forward() -> Any:
        with torch.inference_mode():
            out = field(x)
        if cuda:
            torch.cuda.synchronize()
        return out

    def gradient(G: Any) -> Any:
        y = x.detach().requires_grad_()
        (field(y) * G).sum().backward()
        if cuda:
            torch.cuda.synchronize()
        return y.grad

    note = None
    if jax.default_backend() != "cpu" and not cuda:
        note = "torch runs on the CPU: it has no such device"

    def there(G: np.ndarray) -> Any:
        return torch.from_numpy(G.copy()).to(place)

    def read(result: Any) -> np.ndarray:
        return result.cpu().numpy()

    if what == "forward":
        return Prepared(forward, read, cores(), note=note)
    every = there(p.G)
    return Prepared(
        lambda: gradient(every), read, cores(), lambda G: gradient(there(G)), note=note
    )


# ------------------------------------------------------------------------- NumPy


def _numpy(p: Problem, what: str) -> Prepared:
    """Exponentials of 256 rows at a time: of 10⁴ tokens they stay in cache, or nearly so."""
    beta = np.asarray(p.case.beta, p.dtype)
    values = np.concatenate([p.x @ p.V.T, np.ones((p.n, 1), p.dtype)], axis=1)

    def call() -> np.ndarray:
        u = beta * (p.x @ p.Q.T @ p.K)
        out = np.empty_like(p.x)
        for i in range(0, p.n, 256):
            rows = u[i : i + 256]
            s = rows @ p.x.T
            if p.case.model == "USA":
                top = np.asarray(p.shift, p.dtype)
            else:
                top = s.max(axis=1, keepdims=True)
            s -= top
            np.exp(s, out=s)
            sums = s @ values
            total = p.n if p.case.model == "USA" else sums[:, -1:]
            out[i : i + 256] = sums[:, :-1] / total
        return out

    return Prepared(call, np.asarray, 1, note="exponentials on one core")


# ------------------------------------------------------------------------- CBXpy


def _cbx(p: Problem, what: str) -> Prepared:
    """The consensus points of `PolarCBO` with the kernel e^{⟨Qx,Ky⟩}, α = β and a flat
    objective: the barycentres of attention. V is applied to them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from cbx.dynamics import PolarCBO  # pyright: ignore[reportMissingImports]
        from cbx.dynamics.polarcbo import (  # pyright: ignore[reportMissingImports]
            kernel,
        )

    B = (p.Q.T @ p.K).astype(np.float64)

    class Attention(kernel):
        """−⟨Qx, Ky⟩ for all pairs at once, without the differences of the other kernels."""

        def neg_log(self, y: Any, x: Any) -> np.ndarray:
            return -(x[:, :, 0] @ B) @ np.swapaxes(y[:, 0], 1, 2)

    def flat(x: np.ndarray) -> np.ndarray:
        return np.zeros(x.shape[:2])

    dynamics = PolarCBO(
        flat,
        kernel=Attention(),  # pyright: ignore[reportArgumentType]
        x=p.x[None].astype(np.float64),
        f_dim="3D",
        alpha=float(p.case.beta),
        check_f_dims=False,
        verbosity=0,
    )

    def call() -> np.ndarray:
        dynamics.compute_consensus()
        points = dynamics.consensus
        dynamics.neg_log_eval = None  # n² numbers, not needed any more
        return points[0] @ p.V.T

    return Prepared(call, np.asarray, 1, note="one consensus evaluation, all pairs")


def _unfit_torch(p: Problem, what: str) -> str:
    return ""


def _unfit_numpy(p: Problem, what: str) -> str:
    return "" if what == "forward" else "has no derivatives"


def _unfit_cbx(p: Problem, what: str) -> str:
    if what != "forward":
        return "has no derivatives"
    if p.dtype != "float64":
        return "computes in float64"
    if p.case.model == "USA":
        return "normalises its weights"
    return ""


def _roomy_cbx(p: Problem) -> bool:
    """`PolarCBO` holds weights, their exponentials, and n² d products at once."""
    return 8.0 * p.n * p.n * (p.d + 3) <= 0.5 * available_memory()


def _always(p: Problem) -> bool:
    return True


CONTENDERS: dict[str, Contender] = {
    c.name: c
    for c in (
        Contender("torch", _always, 1_000, _unfit_torch, _torch, "torch"),
        Contender("NumPy", _always, 1_000, _unfit_numpy, _numpy),
        Contender("CBXpy", _always, 500, _unfit_cbx, _cbx, "cbx", _roomy_cbx),
        *map(_ours, ("Dense", "Blockwise", "Harmonic", "Auto")),
    )
}
