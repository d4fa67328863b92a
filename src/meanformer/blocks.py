"""What a transformer is built of besides one head of attention: several heads, the causal
mask, the feed-forward map, and a block of attention and feed-forward map.

All are fields; in layers (`unroll`, `LayerStack`) and in continuous time they stand where
`SelfAttention` stands."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from . import sphere
from .attention import AbstractAttention, AbstractField, LayerStack
from .checks import ArrayLike, as_float, check_count, check_finite, check_scalar
from .matrices import check_matrices, matmul
from .measures import Empirical, check_weights
from .partition import in_blocks


def _check_part(field: object, name: str) -> AbstractField:
    """`field` as a field that can be part of another."""
    if not isinstance(field, AbstractField):
        raise ValueError(
            f"Argument `{name}` must be a field such as `SelfAttention`, but is {field!r}."
        )
    if isinstance(field, LayerStack):
        raise ValueError(
            f"Argument `{name}` must not be a `LayerStack`: give each layer its own parts, "
            "LayerStack([Block(…), Block(…), …])."
        )
    return field


class MultiHead(AbstractField):
    """Several heads, averaged before the projection:

        F(x, µ) = Σ_h w_h F_h(x, µ),      Σ_h w_h = 1.

    **Arguments:** `heads`, fields of one d, each with its own parameters, of one kind or of
    several; `weights`, shape `(heads,)`, ≥ 0, only their ratios count (default: equal, the
    average over heads). An output map per head belongs into its V.

    Costs the sum of its heads, in time. **Raises:** `ValueError` for no heads, heads of
    different d, a `LayerStack` as a head, bad weights. **Source:** *concentration*, Section 5
    (extension)."""

    heads: tuple[AbstractField, ...]
    weights: Float[Array, " heads"]

    def __init__(self, heads: Any, weights: ArrayLike | None = None):
        if isinstance(heads, AbstractField):
            raise ValueError(
                "Argument `heads` must be a list of fields, but is one field. Use [field]."
            )
        self.heads = tuple(_check_part(head, "heads") for head in heads)
        if not self.heads:
            raise ValueError(
                "Argument `heads` must hold at least one field, not none. Use [field]."
            )
        dims = [head.d for head in self.heads]
        if len(set(dims)) > 1:
            raise ValueError(
                f"Argument `heads` must hold fields of one d, but their d are {dims}. Use "
                "matrices for tokens of one dimension."
            )
        count = len(self.heads)
        weights = jnp.ones(count) if weights is None else weights
        self.weights = check_weights(weights, "weights", count)

    @property
    def d(self) -> int | None:
        return self.heads[0].d

    def at(self, t: Float[Array, ""]) -> "MultiHead":
        heads = tuple(head.at(t) for head in self.heads)
        return eqx.tree_at(lambda f: f.heads, self, heads)

    def drive(self, x: Float[Array, "m d"], mu: Empirical) -> Float[Array, "m d"]:
        weights = self.weights.astype(x.dtype)
        heads = enumerate(self.heads)
        return sum(
            (weights[i] * head.drive(x, mu) for i, head in heads), jnp.zeros_like(x)
        )


class CausalSelfAttention(AbstractAttention):
    """Self-attention under the causal mask: token i sees itself and those before it,

        F(xᵢ, µ) = Σ_{j≤i} wⱼ e^{β⟨Qxᵢ,Kyⱼ⟩} V yⱼ / Σ_{j≤i} wⱼ e^{β⟨Qxᵢ,Kyⱼ⟩}.

    Defined for as many points as µ has tokens, in their order: point i sees the tokens
    0 … i of µ. A token with no mass up to and including itself sees itself, so that the
    first token always does.

    **Arguments:** as `SelfAttention`, with `block` ≥ 1 in place of a partition: rows are
    taken `block` at a time (default 256), O(n² d) time and O(n·block) memory in both
    directions. Exponents are shifted by the maximum of each row over the tokens it sees: no
    overflow at any β.

    **Raises:** `ValueError` as `SelfAttention`, and for points that are not as many as the
    tokens. **Source:** the mask of autoregressive transformers; not in the papers."""

    Q: Float[Array, "k d"]
    K: Float[Array, "k d"]
    V: Float[Array, "d d"]
    beta: Float[Array, ""]
    block: int = eqx.field(static=True)

    def __init__(
        self,
        Q: ArrayLike,
        K: ArrayLike,
        V: ArrayLike,
        beta: ArrayLike,
        block: int = 256,
    ):
        self.Q, self.K, self.V = check_matrices(Q, K, V)
        self.beta = check_scalar(
            beta, "beta", minimum=0.0, cure="For repulsion reverse the sign of `V`."
        )
        self.block = check_count(block, "block")

    def drive(self, x: Float[Array, "m d"], mu: Empirical) -> Float[Array, "m d"]:
        y, w = mu.points, mu.weights
        n = y.shape[0]
        if x.shape[0] != n:
            raise ValueError(
                f"Argument `x` must hold the {n} tokens of µ in their order, since each sees "
                f"those before it, but holds {x.shape[0]} points. Use `SelfAttention` for a "
                "field at any point."
            )
        massless = jnp.cumsum(w) <= 0
        positive = w > 0
        log_w = jnp.where(positive, jnp.log(jnp.where(positive, w, 1)), -jnp.inf)

        @jax.checkpoint  # what is kept of a block of rows is its queries
        def rows(entry: tuple[Array, Array]) -> Array:
            u, i = entry
            j = jnp.arange(n)
            mass = jnp.where(j <= i[:, None], log_w, -jnp.inf)
            itself = (j == i[:, None]) & massless[i, None]
            s = matmul(u, y.T) + jnp.where(itself, 0, mass)
            top = jax.lax.stop_gradient(jnp.max(s, axis=-1, keepdims=True))
            share = jnp.exp(s - top)
            return matmul(share, y) / jnp.sum(share, axis=-1, keepdims=True)

        u = matmul(x, self.to_dual(x.dtype, self.beta))
        blocks = [in_blocks(a, self.block) for a in (u, jnp.arange(n))]
        means = jax.lax.map(rows, tuple(blocks)).reshape(-1, x.shape[1])[:n]
        return matmul(means, self.V.T.astype(x.dtype))


class FeedForward(AbstractField):
    """The feed-forward map (MLP), which acts on each token by itself:

        F(x) = W₂ σ(W₁x + b₁) + b₂.

    **Arguments:**

    - `W1`, `b1`: shapes `(k, d)` and `(k,)`, any width k; `W2`, `b2`: shapes `(d, k)` and
        `(d,)`. Gradients reach all four.
    - `activation`: σ, a function of arrays that acts on each entry (default
        `jax.nn.gelu`). Part of the program: give the same function to all layers of a
        `LayerStack`.

    O(m k d) time. **Raises:** `ValueError` if shapes disagree, an entry is not finite, or σ
    changes the shape. **Source:** *multiscale*, Remark 2.1."""

    W1: Float[Array, "k d"]
    b1: Float[Array, " k"]
    W2: Float[Array, "d k"]
    b2: Float[Array, " d"]
    activation: Callable[[Array], Array] = eqx.field(static=True)

    def __init__(
        self,
        W1: ArrayLike,
        b1: ArrayLike,
        W2: ArrayLike,
        b2: ArrayLike,
        activation: Any = jax.nn.gelu,
    ):
        W1 = as_float(W1, "W1")
        if W1.ndim != 2:
            raise ValueError(
                f"Argument `W1` must have shape (k, d), but has shape {W1.shape}. It maps "
                "tokens of R^d to k hidden numbers."
            )
        k, d = W1.shape[0], sphere.check_dimension(W1.shape[1], "d = W1.shape[1]")
        arrays = (
            check_finite(W1, "W1", (k, d)),
            check_finite(b1, "b1", (k,)),
            check_finite(W2, "W2", (d, k)),
            check_finite(b2, "b2", (d,)),
        )
        dtype = jnp.result_type(*arrays)
        self.W1, self.b1, self.W2, self.b2 = (a.astype(dtype) for a in arrays)
        self.activation = _check_activation(activation, k)

    @property
    def d(self) -> int:
        return self.W1.shape[-1]

    def drive(self, x: Float[Array, "m d"], mu: Empirical) -> Float[Array, "m d"]:
        del mu
        W1, b1, W2, b2 = (a.astype(x.dtype) for a in (self.W1, self.b1, self.W2, self.b2))
        return matmul(self.activation(matmul(x, W1.T) + b1), W2.T) + b2


def _check_activation(activation: Any, k: int) -> Any:
    """`activation` as a function that keeps the shape (2, k)."""
    if not callable(activation):
        raise ValueError(
            f"Argument `activation` must be a function such as `jax.nn.gelu`, but is "
            f"{activation!r}."
        )
    shape = (2, k)
    out = jax.eval_shape(activation, jax.ShapeDtypeStruct(shape, jnp.result_type(float)))
    if getattr(out, "shape", None) != shape:
        raise ValueError(
            f"Argument `activation` must act on each entry, but makes {out} of an array of "
            f"shape {shape}. For example `jax.nn.gelu`."
        )
    return activation


class Block(AbstractField):
    """Attention, then the feed-forward map: one layer of a transformer.

    In layers (`unroll`, also in a `LayerStack`) by Lie–Trotter splitting, each with its own
    residual connection and normalisation:

        x ← N(x + h F_att(x, µ)),    then    x ← N(x + h F_ff(x, µ)),

    the second for the moved tokens and their law. As h → 0 both follow the flow of the sum
    F = F_att + F_ff, which is what `drive`, `velocity` and `solve` take; in continuous time
    `solver=LieTrotter(…)` of `meanformer.flow` splits too, with error O(h).

    **Arguments:** `attention`, `feed_forward`, any two fields of one d (blocks too: their
    parts follow each other). **Raises:** `ValueError` for different d or a `LayerStack`.
    **Source:** *multiscale*, Remark 2.1."""

    attention: AbstractField
    feed_forward: AbstractField

    def __init__(self, attention: Any, feed_forward: Any):
        self.attention = _check_part(attention, "attention")
        self.feed_forward = _check_part(feed_forward, "feed_forward")
        if attention.d != feed_forward.d:
            raise ValueError(
                "Arguments `attention` and `feed_forward` must have one d, but have d = "
                f"{attention.d} and {feed_forward.d}. Use matrices for one dimension."
            )

    @property
    def d(self) -> int | None:
        return self.attention.d

    def at(self, t: Float[Array, ""]) -> "Block":
        return Block(self.attention.at(t), self.feed_forward.at(t))

    def drive(self, x: Float[Array, "m d"], mu: Empirical) -> Float[Array, "m d"]:
        """F_att + F_ff; `unroll` takes them one after the other."""
        return self.attention.drive(x, mu) + self.feed_forward.drive(x, mu)


def parts(field: AbstractField) -> tuple[AbstractField, ...]:
    """The fields that a layer applies one after the other: those of a `Block`, or `field`
    itself."""
    if isinstance(field, Block):
        return parts(field.attention) + parts(field.feed_forward)
    return (field,)
