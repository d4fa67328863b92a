"""Derivatives of whole runs with respect to Q, K, V, β and the tokens at time 0, against
central differences in float64."""

import functools
import itertools

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import meanformer as mf
import reference as ref
from meanformer import (
    Blockwise,
    Dense,
    LayerStack,
    SelfAttention,
    UnnormalizedSelfAttention,
    ZeroTemperature,
    solve,
    sphere,
    unroll,
)

T1, N, D = 1.5, 5, 3
NAMES = ("Q", "K", "V", "beta", "x0")


def stack(Q, K, V, beta):
    """Two layers: the second takes other matrices, made of the same numbers."""
    first = SelfAttention(Q, K, V, beta, Dense())
    return LayerStack(
        [first, SelfAttention(K, Q, V.T, 2 * beta, Dense())], np.array([0.0, 0.8])
    )


FIELDS = {
    "self-attention": lambda *p: SelfAttention(*p, partition=Dense()),
    "self-attention, in blocks": lambda *p: SelfAttention(*p, partition=Blockwise(2)),
    "unnormalized": lambda *p: UnnormalizedSelfAttention(*p, partition=Dense()),
    "zero temperature": lambda Q, K, V, beta: ZeroTemperature(Q, K, beta * V),
    "layers": stack,
}
TIGHT = {"rtol": 1e-11, "atol": 1e-11, "save": "last"}
RUNS = {
    "solve": lambda f, x, **more: solve(f, x, np.array([0.0, T1]), **TIGHT, **more),
    "unroll": lambda f, x: unroll(f, x, None if isinstance(f, LayerStack) else 6, 0.25),
}


def number(make, run, Q, K, V, beta, x0):
    """A smooth number that depends on every token at the end of the run. `x0` is projected
    first: its gradient is the tangential one."""
    end = run(make(Q, K, V, beta), sphere.normalise(x0)).xs[-1]
    return jnp.sum(end @ np.array([0.3, -0.5, 0.8])) + jnp.sum(end[0] * end[1] ** 2)


@functools.cache
def point():
    """Parameters, and a direction of unit size in each of them."""
    Q, K, V = ref.matrices(3, D)
    primal = (Q, K, np.eye(D) + V / 2, 2.0, ref.tokens(1, N, D))
    rng = np.random.default_rng(0)
    raw = [rng.normal(size=np.shape(p)) for p in primal]
    return (
        tuple(jnp.asarray(p, float) for p in primal),
        tuple(jnp.asarray(r / np.linalg.norm(r)) for r in raw),
    )


def differences(value):
    """Central differences of `value` along each direction, one parameter at a time."""
    primal, tangent = point()

    def moved(i, h):
        return [p + h * tangent[i] if j == i else p for j, p in enumerate(primal)]

    return [ref.slope(lambda h, i=i: float(value(*moved(i, h))), 1e-3) for i in range(5)]


@functools.cache
def compiled(kind, run):
    """The number and its gradient, a function of the five parameters."""
    f = functools.partial(number, FIELDS[kind], RUNS[run])
    return eqx.filter_jit(jax.value_and_grad(f, argnums=range(5)))


@functools.cache
def reverse(kind, run):
    """Slopes along each direction by reverse mode and by central differences, and the
    gradient."""
    both, (primal, tangent) = compiled(kind, run), point()
    gradient = both(*primal)[1]
    slopes = [float(jnp.vdot(g, t)) for g, t in zip(gradient, tangent)]
    return slopes, differences(lambda *p: both(*p)[0]), gradient


SLOW = [("solve", "unnormalized"), ("solve", "zero temperature")]  # `unroll` is not
CASES = [
    pytest.param(*case, marks=pytest.mark.slow if case in SLOW else ())
    for case in itertools.product(RUNS, FIELDS)
]


@pytest.mark.parametrize(("run", "kind"), CASES)
def test_reverse_mode_matches_central_differences(run, kind):
    """d/dh of the number along Q, K, V, β and x0: to 1e−6 of the largest slope. For zero
    temperature the fourth parameter is the size of V."""
    slopes, expected, _ = reverse(kind, run)
    atol = 1e-6 * np.abs(expected).max()
    for name, slope, value in zip(NAMES, slopes, expected):
        np.testing.assert_allclose(slope, value, rtol=1e-6, atol=atol, err_msg=name)
        assert abs(value) > 10 * atol, f"{name} does not matter: the test says nothing"


@pytest.mark.parametrize("run", RUNS)
def test_gradients_of_the_two_partitions_agree(run):
    """`Blockwise` recomputes its tiles in the reverse pass and gets the same numbers."""
    for a, b in zip(
        *(reverse(f"self-attention{s}", run)[2] for s in ("", ", in blocks"))
    ):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-9)


@pytest.mark.parametrize("run", RUNS)
def test_gradient_in_the_tokens_is_tangential(run):
    """⟨x0ᵢ, ∂/∂x0ᵢ⟩ = 0 for each token."""
    gradient, x0 = reverse("self-attention", run)[2][-1], point()[0][-1]
    np.testing.assert_allclose(jnp.sum(gradient * x0, axis=1), 0, atol=1e-13)


@pytest.mark.parametrize("kind", ["self-attention", "self-attention, in blocks"])
def test_forward_mode_matches_reverse_mode(kind):
    """`jax.jvp` with `diffrax.ForwardMode()` and through `unroll`: the same slopes along
    all five directions, to 1e−8 of the largest."""
    primal, tangent = point()
    forward = functools.partial(RUNS["solve"], adjoint=dfx.ForwardMode())
    for name, run in (("solve", forward), ("unroll", RUNS["unroll"])):
        f = functools.partial(number, FIELDS[kind], run)

        @eqx.filter_jit
        def push(tangent, f=f):
            return jax.jvp(f, primal, tangent)[1]

        slopes = reverse(kind, name)[0]
        for i, expected in enumerate(slopes):
            one = tuple(t if i == j else 0 * t for j, t in enumerate(tangent))
            atol = 1e-8 * np.abs(slopes).max()
            np.testing.assert_allclose(push(one), expected, rtol=0, atol=atol)


def test_second_derivatives_of_layers_match_central_differences():
    """Hessian times direction of an unrolled run, forward over reverse."""
    primal, tangent = point()
    both = compiled("self-attention, in blocks", "unroll")

    def gradient(*p):
        return both(*p)[1]

    product = jax.jvp(gradient, primal, tangent)[1]

    def flat(tree):
        return np.concatenate([np.ravel(leaf) for leaf in tree])

    expected = ref.slope(
        lambda h: flat(gradient(*[p + h * t for p, t in zip(primal, tangent)])), 1e-3
    )
    size = np.abs(expected).max()
    np.testing.assert_allclose(flat(product), expected, rtol=0, atol=1e-8 * size)


@pytest.mark.parametrize("run", RUNS)
def test_gradients_exist_at_rest(run):
    """Coincident tokens and V = I do not move, and their derivatives are numbers. Moved
    together they stay together, so Σᵢ ∂/∂x0ᵢ is that of the number at the start."""
    (Q, K, _, beta, x0), _ = point()
    same = jnp.tile(x0[:1], (N, 1))
    both = compiled("self-attention", run)
    *in_parameters, in_x0 = both(Q, K, jnp.eye(D), beta, same)[1]
    for slope in in_parameters:
        assert bool(jnp.isfinite(slope).all())
    # Q, K and β act through differences of tokens, of which there are none.
    np.testing.assert_allclose(in_parameters[0], 0, atol=1e-12)
    np.testing.assert_allclose(in_parameters[3], 0, atol=1e-12)
    x = np.asarray(x0[0])
    c = N * np.array([0.3, -0.5, 0.8]) + 3 * x**2
    expected = c - (c @ x) * x
    np.testing.assert_allclose(jnp.sum(in_x0, axis=0), expected, rtol=0, atol=1e-9)


def test_backsolve_adjoint_is_refused():
    """Clustering contracts: integrated backwards it explodes."""
    (Q, K, V, beta, x0), _ = point()
    field = FIELDS["self-attention"](Q, K, V, beta)
    message = (
        r"`adjoint` must not be `BacksolveAdjoint`.* Use `RecursiveCheckpointAdjoint"
    )
    with pytest.raises(ValueError, match=message):
        RUNS["solve"](field, x0, adjoint=dfx.BacksolveAdjoint())


def test_second_derivatives_of_the_shifted_model_are_finite_where_QtK_is_the_identity():
    """‖B‖₂ has equal singular values at B = I; its unit must not make a Hessian NaN."""
    eye = jnp.eye(3)
    x = mf.Uniform(3).sample(jax.random.key(0), 5)

    def f(Q, beta):
        field = mf.UnnormalizedSelfAttention(Q, eye, eye, beta, unit="shifted")
        return jnp.sum(field.velocity(x, mf.Empirical(x)) ** 2)

    second = jax.hessian(f, argnums=(0, 1))(eye, 2.0)
    assert all(bool(jnp.all(jnp.isfinite(block))) for block in jax.tree.leaves(second))
