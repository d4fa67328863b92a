"""Heads, the causal mask, the feed-forward map and blocks: each a special case of another,
or equal to loops over the tokens in NumPy."""

import functools

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy.special import erf

import reference as ref
from meanformer import (
    Empirical,
    Hardmax,
    LayerStack,
    SelfAttention,
    TimeDependent,
    ZeroTemperature,
    solve,
    theory,
    unroll,
)
from meanformer.blocks import Block, CausalSelfAttention, FeedForward, MultiHead
from meanformer.flow import LieTrotter

N, D = 10, 3
SPLIT = LieTrotter(dfx.Heun())
X = ref.tokens(0, N, D)
W = ref.weights(0, N, zeros=2)[::-1].copy()  # the last two tokens have no mass
MU = Empirical(X, W)
EYE = np.eye(D)


def head(seed, beta=4.0, kind=SelfAttention, **options):
    return kind(*ref.matrices(seed, D), beta, **options)


def mlp(seed, k=5, activation=jnp.tanh):
    rng = np.random.default_rng(seed)
    W1, W2 = rng.normal(size=(k, D)), rng.normal(size=(D, k)) / k
    return FeedForward(W1, rng.normal(size=k), W2, rng.normal(size=D) / 3, activation)


@eqx.filter_jit
def drive(field, x, points, weights):
    return field.drive(x, Empirical(points, weights, check=False))


def at_tokens(field, x=X, w=W):
    """F of the tokens themselves."""
    return np.asarray(drive(field, jnp.asarray(x), jnp.asarray(x), jnp.asarray(w)))


def tangential(x, v):
    return v - np.sum(x * v, axis=1, keepdims=True) * x


# ------------------------------------------------------------------------- heads


def test_several_heads_are_averaged_before_the_projection():
    """Against a double loop over the tokens for each head, with and without weights."""
    seeds, betas = (0, 1, 2), (0.0, 3.0, 20.0)
    loops = [
        ref.self_attention_loop(X, W, *ref.matrices(s, D), b)
        for s, b in zip(seeds, betas)
    ]
    heads = [head(s, b) for s, b in zip(seeds, betas)]
    equal = MultiHead(heads).velocity(X, MU)
    np.testing.assert_allclose(equal, sum(loops) / 3, rtol=0, atol=1e-14)
    w = np.array([2.0, 0.0, 6.0])  # only ratios count
    uneven = MultiHead(heads, w).velocity(X, MU)
    expected = 0.25 * loops[0] + 0.75 * loops[2]
    np.testing.assert_allclose(uneven, expected, rtol=0, atol=1e-14)


def test_heads_that_are_one_head():
    """One head; identical heads; heads that differ in V alone are one head of the mean V."""
    one = at_tokens(head(0))
    for heads in ([head(0)], [head(0)] * 3):
        np.testing.assert_allclose(at_tokens(MultiHead(heads)), one, rtol=0, atol=1e-15)
    Q, K, V = ref.matrices(0, D)
    other = ref.matrices(7, D)[2]
    pair = MultiHead([SelfAttention(Q, K, V, 4.0), SelfAttention(Q, K, other, 4.0)])
    mean = SelfAttention(Q, K, (V + other) / 2, 4.0)
    np.testing.assert_allclose(at_tokens(pair), at_tokens(mean), rtol=0, atol=1e-15)


def test_heads_may_be_of_any_kind_and_depend_on_time():
    """The average of the fields, each at its time."""
    Q, K, V = ref.matrices(1, D)
    moving = TimeDependent(lambda t, V: SelfAttention(Q, K, t * V, 4.0), V, dim=D)
    heads = [head(0), ZeroTemperature(Q, K, V), mlp(0), moving]
    heads += [head(2, kind=CausalSelfAttention), Hardmax(Q, K, V)]
    field = MultiHead(heads).at(jnp.asarray(2.0))
    now = [*heads[:3], SelfAttention(Q, K, 2 * V, 4.0), *heads[4:]]
    expected = sum(at_tokens(h) for h in now) / 6
    np.testing.assert_allclose(at_tokens(field), expected, rtol=0, atol=1e-15)


# ------------------------------------------------------------------- causal mask


def causal_loop(x, w, Q, K, V, beta):
    """F by loops: token i sees 0 … i, or itself where none of those has mass."""
    out = np.zeros_like(x)
    for i in range(len(x)):
        seen = [j for j in range(i + 1) if w[j] > 0] or [i]
        scores = np.array([beta * (Q @ x[i]) @ (K @ x[j]) for j in seen])
        a = np.array([w[j] or 1.0 for j in seen]) * np.exp(scores - scores.max())
        out[i] = V @ sum(a_j * x[j] for a_j, j in zip(a / a.sum(), seen))
    return out


@pytest.mark.parametrize("beta", [0.0, 5.0, 1e6])
def test_causal_attention_is_the_loop_over_earlier_tokens(beta):
    """8(1 + β) units of rounding, whatever the blocks, with tokens of weight 0 before,
    between and after the others."""
    matrices = ref.matrices(0, D)
    w = W.copy()
    w[[0, 1, 5]] = 0
    expected = causal_loop(X, w, *matrices, beta)
    for block in (1, 4, 256):
        field = CausalSelfAttention(*matrices, beta, block)
        error = np.abs(at_tokens(field, w=w) - expected).max()
        assert error <= 8 * (1 + beta) * ref.EPS64
        np.testing.assert_allclose(
            field.velocity(X, Empirical(X, w)),
            tangential(X, expected),
            rtol=0,
            atol=8 * (1 + beta) * ref.EPS64,
        )


def test_the_last_token_sees_what_self_attention_sees():
    """And the first sees itself alone: F = V x₀."""
    masked, full = at_tokens(head(3, kind=CausalSelfAttention)), at_tokens(head(3))
    np.testing.assert_allclose(masked[-1], full[-1], rtol=0, atol=1e-15)
    V = ref.matrices(3, D)[2]
    np.testing.assert_allclose(masked[0], V @ X[0], rtol=0, atol=1e-15)
    assert np.abs(masked - full)[:-1].max() > 0.1


def test_causal_attention_without_preference_is_the_running_mean():
    """β = 0, V = I, equal weights: the mean of the tokens so far."""
    field = CausalSelfAttention(EYE, EYE, EYE, 0.0)
    means = np.cumsum(X, axis=0) / np.arange(1, N + 1)[:, None]
    got = at_tokens(field, w=np.full(N, 1 / N))
    np.testing.assert_allclose(got, means, rtol=0, atol=1e-15)


def test_mass_on_one_token_draws_all_that_come_later():
    """µ = δ at token 4: those before it see themselves, those from it on see it."""
    field = CausalSelfAttention(*ref.matrices(0, D)[:2], EYE, 4.0)
    expected = X.copy()
    expected[4:] = X[4]
    got = at_tokens(field, w=np.eye(N)[4])
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-15)


@given(st.integers(1, N - 3), st.integers(0, 2**16), st.floats(0, 1e3))
def test_tokens_do_not_see_what_comes_after(i, seed, beta):
    """Other tokens from i on leave the velocities before i as they are, bit for bit."""
    changed = X.copy()
    changed[i:] = ref.tokens(seed, N - i, D)
    field = CausalSelfAttention(*ref.matrices(0, D), jnp.asarray(beta))
    before, after = at_tokens(field), at_tokens(field, x=changed)
    np.testing.assert_array_equal(before[:i], after[:i])
    assert np.abs(before[i:] - after[i:]).max() > 1e-3


@pytest.mark.parametrize("derivative", [False, True])
def test_causal_attention_needs_no_memory_for_all_pairs(derivative):
    """What the compiled programs allocate, forward and reverse, is below 6 arrays of
    block × n, here a fifth of n × n."""
    n, block = 8192, 256

    def loss(field, x):
        return jnp.sum(field.drive(x, Empirical(x, check=False)) ** 2)

    f = jax.grad(loss) if derivative else loss
    field = head(0, kind=CausalSelfAttention, block=block)
    program = jax.jit(f).lower(field, jax.ShapeDtypeStruct((n, D), float)).compile()
    used = program.memory_analysis().temp_size_in_bytes
    assert used < 6 * 8 * block * n < 8 * n * n / 5


# ------------------------------------------------------------------ feed-forward


def test_feed_forward_is_its_formula():
    """W₂ σ(W₁x + b₁) + b₂ token by token, with the exact Gaussian error unit of SciPy; µ
    does not count."""
    activation = functools.partial(jax.nn.gelu, approximate=False)
    field = mlp(0, activation=activation)
    W1, b1, W2, b2 = (np.asarray(a) for a in (field.W1, field.b1, field.W2, field.b2))
    hidden = [W1 @ x + b1 for x in X]
    expected = [W2 @ (h * (1 + erf(h / np.sqrt(2))) / 2) + b2 for h in hidden]
    np.testing.assert_allclose(at_tokens(field), expected, rtol=0, atol=1e-14)
    alone = drive(field, jnp.asarray(X[:1]), jnp.asarray(X[5:]), jnp.asarray(W[5:]))
    np.testing.assert_allclose(alone[0], expected[0], rtol=0, atol=1e-14)


def same(a):
    return a


def test_linear_feed_forward_and_no_attention_is_the_oja_flow():
    """ẋ = P_x A x, for A of no symmetry, against the closed form e^{At}x/|·|."""
    A = 2 * ref.matrices(4, D)[2]
    zero = SelfAttention(EYE, EYE, 0 * EYE, 1.0)
    linear = FeedForward(A, np.zeros(D), EYE, np.zeros(D), same)
    run = solve(Block(zero, linear), X, [0.0, 1.5], rtol=1e-11, atol=1e-11)
    exact = theory.oja_flow(X, 1.5, A)
    np.testing.assert_allclose(run.xs[-1], exact, rtol=0, atol=1e-9)


# ------------------------------------------------------------------------ blocks


def numpy_parts(beta=4.0):
    """A block, and the velocities of its parts in NumPy."""
    matrices = ref.matrices(0, D)
    att = ref.attention_velocity(np.full(N, 1 / N), *matrices, beta)
    field = mlp(1)
    W1, b1, W2, b2 = (np.asarray(a) for a in (field.W1, field.b1, field.W2, field.b2))

    def ff(t, x):
        return tangential(x, np.tanh(x @ W1.T + b1) @ W2.T + b2)

    return Block(SelfAttention(*matrices, beta), field), att, ff


@functools.cache
def flow_of_the_sum():
    _, att, ff = numpy_parts()
    return ref.flow(lambda t, x: att(t, x) + ff(t, x), X, [0.0, 1.0], 1e-13)[-1]


def test_in_continuous_time_a_block_is_the_sum():
    """`solve` against DOP853 on the sum of the two velocities."""
    run = solve(numpy_parts()[0], X, [0.0, 1.0], rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(run.xs[-1], flow_of_the_sum(), rtol=0, atol=1e-9)


def test_a_layer_is_attention_then_the_feed_forward_map():
    """Lie–Trotter in `unroll`: two residual steps with a normalisation after each, the
    second from where the first ended. One step of the sum is another map."""
    block, *_ = numpy_parts()
    Q, K, V = ref.matrices(0, D)
    x = X
    for _ in range(3):
        s = 4.0 * x @ Q.T @ K @ x.T
        a = np.exp(s - s.max(axis=1, keepdims=True))
        x = x + 0.3 * (a / a.sum(axis=1, keepdims=True)) @ x @ V.T
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
        f = block.feed_forward
        x = x + 0.3 * (np.tanh(x @ f.W1.T + f.b1) @ f.W2.T + f.b2)
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
    got = unroll(block, X, 3, 0.3).xs[-1]
    np.testing.assert_allclose(got, x, rtol=0, atol=1e-14)
    np.testing.assert_allclose(
        unroll(block, X, 3, 0.3, progress=True).xs[-1], x, rtol=0, atol=1e-14
    )
    as_one = MultiHead([block.attention, block.feed_forward])
    together = unroll(as_one, X, 3, 0.6).xs[-1]  # twice the average is the sum
    assert np.abs(together - got).max() > 1e-3


@pytest.mark.parametrize("how", ["layers", "Lie–Trotter", "the other order"])
def test_splitting_has_order_one(how):
    """The distance to the flow of the sum is C h, C > 0: slope 1 ± 0.1 of its logarithm,
    for layers, and for flows of the parts one after the other, each with error O(h²)."""
    block = numpy_parts()[0]
    if how == "the other order":
        block = Block(block.feed_forward, block.attention)
    counts = (32, 64, 128) if how == "layers" else (16, 32, 64)

    def end(n):
        if how == "layers":
            return unroll(block, X, n, 1 / n).xs[-1]
        return solve(block, X, [0.0, 1.0], step=1 / n, solver=SPLIT).xs[-1]

    errors = [np.abs(end(n) - flow_of_the_sum()).max() for n in counts]
    order = ref.fitted_order([1 / n for n in counts], errors)
    assert 0.9 < order < 1.1
    assert errors[-1] > 1e-4


def test_without_a_feed_forward_map_a_block_is_attention():
    """In layers, and split in continuous time, to rounding."""
    att = head(0)
    some = mlp(1)
    nothing = FeedForward(some.W1, some.b1, 0 * some.W2, 0 * some.b2, some.activation)
    block = Block(att, nothing)
    pairs = [[unroll(f, X, 4, 0.5).xs for f in (block, att)]]
    split = solve(block, X, [0.0, 1.0], step=0.125, solver=SPLIT).xs
    pairs += [(split, solve(att, X, [0.0, 1.0], step=0.125, solver=dfx.Heun()).xs)]
    for got, expected in pairs:
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-14)


def test_a_stack_of_blocks_is_the_loop_over_its_layers():
    """Layers with heads, mask and feed-forward map of their own; blocks inside of blocks
    follow each other."""

    def layer(l):
        heads = [
            head(l, kind=CausalSelfAttention),
            head(l + 10, kind=CausalSelfAttention),
        ]
        return Block(Block(MultiHead(heads), mlp(l)), mlp(l + 20))

    layers = [layer(l) for l in range(3)]
    expected = X
    for block in layers:
        inner = (block.attention.attention, block.attention.feed_forward)
        for field in (*inner, block.feed_forward):
            moved = expected + 0.4 * at_tokens(field, x=expected, w=np.full(N, 1 / N))
            expected = moved / np.linalg.norm(moved, axis=1, keepdims=True)
    run = unroll(LayerStack(layers), X, step=0.4)
    np.testing.assert_allclose(run.xs[-1], expected, rtol=0, atol=1e-14)


def test_a_stack_in_continuous_time_splits_in_the_layer_in_force():
    """The same as one run after another, each with the block of its layer."""
    layers = [Block(head(l), mlp(l)) for l in range(2)]
    split = {"step": 0.5, "solver": SPLIT}
    whole = solve(LayerStack(layers), X, [0.0, 1.0, 2.0], **split).xs
    first = solve(layers[0], X, [0.0, 1.0], **split).xs[-1]
    second = solve(layers[1], first, [0.0, 1.0], **split).xs[-1]
    np.testing.assert_allclose(whole[1:], [first, second], rtol=0, atol=1e-14)


# -------------------------------------------------------------- transformations


def everything(beta=4.0):
    heads = [head(0, beta), head(1, beta, CausalSelfAttention)]
    return Block(MultiHead(heads, [1.0, 3.0]), mlp(2))


def test_gradients_reach_every_parameter():
    """Through two layers, along a random direction of each array: central differences."""
    leaves, tree = jax.tree.flatten(everything())
    weight = np.random.default_rng(5).normal(size=(N, D))

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=range(len(leaves)))
    def loss(*leaves):
        run = unroll(jax.tree.unflatten(tree, leaves), Empirical(X, W), 2, 0.5)
        return jnp.sum(weight * run.xs[-1])

    gradients = loss(*leaves)[1]
    for i, (leaf, g) in enumerate(zip(leaves, gradients)):
        v = np.random.default_rng(i).normal(size=leaf.shape)

        def along(s, i=i, leaf=leaf, v=v):
            return float(loss(*leaves[:i], leaf + s * v, *leaves[i + 1 :])[0])

        slope = ref.slope(along, 1e-3)
        assert abs(slope) > 1e-6
        assert abs(np.sum(g * v) - slope) <= 1e-8 * (1 + abs(slope))


def test_batches_of_blocks_are_runs_one_by_one():
    """`vmap` over β of a run in layers, under `jit`."""
    betas = jnp.asarray([0.0, 2.0, 50.0])

    @jax.jit
    def end(beta):
        return unroll(everything(beta), X, 2, 0.5).xs[-1]

    for one, beta in zip(jax.jit(jax.vmap(end))(betas), betas):
        np.testing.assert_allclose(one, end(beta), rtol=0, atol=1e-14)


def test_float32_tokens_stay_float32():
    """And differ from float64 by rounding: 8(1 + β) units per evaluation."""
    wide, small = (
        at_tokens(everything()),
        at_tokens(everything(), *map(np.float32, (X, W))),
    )
    assert small.dtype == np.float32
    assert np.abs(small - wide).max() <= 8 * 5 * ref.EPS32 * 3


# ------------------------------------------------------------------------ refusals

NARROW = SelfAttention(np.eye(2), np.eye(2), np.eye(2), 1.0)
STACK = LayerStack([head(0)])
ZEROS = np.zeros
BAD = {
    "no heads": (lambda: MultiHead([]), "at least one"),
    "one field as heads": (lambda: MultiHead(head(0)), r"Use \[field\]"),
    "heads of different d": (lambda: MultiHead([head(0), NARROW]), r"one d, .* \[3, 2\]"),
    "no field": (lambda: MultiHead([EYE]), "`heads` must be a field"),
    "a stack of layers as a head": (lambda: MultiHead([STACK]), "its own parts"),
    "too many weights": (lambda: MultiHead([head(0)], [1, 2]), r"`weights` .* \(1,\)"),
    "negative weights": (lambda: MultiHead([head(0)], [-1]), "`weights` .* -1"),
    "beta < 0": (lambda: head(0, -1.0, CausalSelfAttention), "`beta` .* ≥ 0"),
    "block 0": (lambda: head(0, kind=CausalSelfAttention, block=0), "`block`"),
    "points that are no tokens": (
        lambda: head(0, kind=CausalSelfAttention).velocity(X[:4], MU),
        "10 tokens of µ .* holds 4",
    ),
    "W1 a vector": (lambda: FeedForward(ZEROS(3), [0], EYE, [0]), r"`W1` .* \(k, d\)"),
    "W2 transposed": (
        lambda: FeedForward(ZEROS((4, 3)), ZEROS(4), ZEROS((4, 3)), ZEROS(3)),
        r"`W2` must have shape \(3, 4\)",
    ),
    "b1 not finite": (
        lambda: FeedForward(ZEROS((1, 3)), [np.nan], ZEROS((3, 1)), ZEROS(3)),
        "`b1` must be finite",
    ),
    "activation of rows": (
        lambda: FeedForward(EYE, ZEROS(3), EYE, ZEROS(3), jnp.sum),
        "`activation` must act on each entry",
    ),
    "no activation": (
        lambda: FeedForward(EYE, ZEROS(3), EYE, ZEROS(3), "gelu"),
        "`activation` must be a function",
    ),
    "parts of different d": (lambda: Block(head(0), NARROW), "d = 3 and 2"),
    "a stack in a block": (lambda: Block(STACK, mlp(0)), "`attention` must not be"),
    "other activations in one stack": (
        lambda: LayerStack([mlp(0), mlp(0, activation=jnp.sin)]),
        "field 1 differs",
    ),
    "adaptive splitting": (
        lambda: solve(Block(head(0), mlp(0)), X, [0, 1], solver=LieTrotter()),
        "`step` must be given for LieTrotter",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused(name):
    """A `ValueError` that names the argument, and says how it should be."""
    make, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        make()
