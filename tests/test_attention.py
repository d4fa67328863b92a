"""The vector fields at finite β: values, symmetries, closed forms and refusals."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy.special import ive

import reference as ref
from meanformer import (
    Blockwise,
    Dense,
    Empirical,
    Hardmax,
    LayerStack,
    SelfAttention,
    TimeDependent,
    Uniform,
    UnnormalizedSelfAttention,
    ZeroTemperature,
)
from meanformer.attention import check_measure

BETAS = [0.0, 1.0, 30.0, 1e3, 1e4]
SHIFTED = functools.partial(UnnormalizedSelfAttention, unit="shifted")
KINDS = {"SelfAttention": SelfAttention, "UnnormalizedSelfAttention": SHIFTED}


@eqx.filter_jit
def velocity(field, x, points, weights):
    return field.tangent(x, Empirical(points, weights, check=False))


def at_tokens(field, y, w=None):
    """Velocities of the tokens themselves."""
    w = np.full(len(y), 1 / len(y)) if w is None else w
    return velocity(field, *map(jnp.asarray, (y, y, w)))


# ------------------------------------------------------------------------ values


@functools.cache
def case(d, k, beta):
    """Matrices with k × d queries, 40 tokens (10 of weight 0), and the points: a token,
    two others, and one whose query points at a token."""
    Q, K, V = ref.matrices(d + k, d, k)
    y, w = ref.tokens(d, 40, d), ref.weights(d, 40, zeros=10)
    aimed = np.linalg.pinv(K.T @ Q) @ y[20]
    x = np.stack([y[0], *ref.tokens(100 + d, 2, d), aimed / np.linalg.norm(aimed)])
    mu = Empirical(y, w)
    log_unit = beta * ref.spectral_norm(Q.T @ K)
    exact = ref.attention_fields(x, y, mu.weights, Q, K, V, beta, log_unit)
    return (Q, K, V, beta), x, mu, exact


@eqx.filter_jit
def both_fields(Q, K, V, beta, partition, x, mu):
    """Velocities of attention with and without the normaliser (one compilation)."""
    fields = SelfAttention(Q, K, V, beta, partition), SHIFTED(Q, K, V, beta, partition)
    return [field.tangent(x, mu) for field in fields]


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(("d", "k"), [(2, 2), (3, 3), (3, 1), (5, 9), (16, 16)])
def test_fields_are_exact_to_rounding(d, k, beta):
    """|error| ≤ 8(1 + β‖B‖) 2⁻⁵³ ‖V‖, with B = QᵀK not symmetric, Q and K of any shape
    (k, d), zero weights, and at points that are no tokens. Here ‖B‖ = ‖V‖ = 1.

    Without the normaliser, in units of time e^{−c}, c = β‖B‖₂: the same times the sum of
    the shifted terms wⱼ e^{β⟨x,Byⱼ⟩−c}, down to the smallest normal floats."""
    matrices, x, mu, (exact, exact_sum, shifted_sum) = case(d, k, beta)
    units = 8 * (1 + beta) * ref.EPS64
    tiny = np.finfo(float).tiny
    arrays = [*map(jnp.asarray, matrices[:3]), jnp.asarray(beta)]
    for partition in (Dense(), Blockwise(7)):
        v, v_sum = both_fields(*arrays, partition, jnp.asarray(x), mu)
        assert ref.error_norms(v, exact).max() <= units
        allowed = units * np.maximum(shifted_sum, tiny) + 8 * tiny
        assert np.all(ref.error_norms(v_sum, exact_sum) <= allowed)


def test_velocity_equals_the_double_loop():
    """Two loops over the tokens in NumPy, at moderate β: 1e−14."""
    Q, K, V = ref.matrices(0, 3)
    x, w = ref.tokens(0, 15, 3), ref.weights(0, 15, zeros=2)
    field = SelfAttention(Q, K, V, 5.0)
    expected = ref.self_attention_loop(x, w, Q, K, V, 5.0)
    got = field.velocity(x, Empirical(x, w))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-14)


def test_the_two_units_of_time_differ_by_the_stated_factor():
    """velocity in the paper's unit = e^{c} × velocity in the shifted unit, c = β‖B‖₂."""
    Q, K, V = ref.matrices(3, 3)
    x = ref.tokens(0, 9, 3)
    paper = UnnormalizedSelfAttention(3 * Q, K, V, 4.0)
    shifted = SHIFTED(3 * Q, K, V, 4.0)
    assert float(paper.log_unit) == 0
    np.testing.assert_allclose(shifted.log_unit, 12.0, rtol=1e-14)
    np.testing.assert_allclose(
        at_tokens(paper, x), np.exp(12.0) * at_tokens(shifted, x), rtol=1e-12, atol=1e-9
    )


def test_unnormalized_attention_is_the_gradient_of_the_interaction_energy():
    """Q = K = V = I: n χ(xᵢ)/n is the tangential gradient of
    E = (1/2β) Σᵢⱼ wᵢwⱼ e^{β⟨xᵢ,xⱼ⟩} in xᵢ, divided by wᵢ."""
    x, w, beta, eye = ref.tokens(0, 7, 3), ref.weights(0, 7), 2.0, np.eye(3)

    def energy(x):
        return jnp.sum(w[:, None] * w * jnp.exp(beta * x @ x.T)) / (2 * beta)

    g = np.asarray(jax.grad(energy)(jnp.asarray(x))) / w[:, None]
    expected = g - np.sum(x * g, axis=1, keepdims=True) * x
    got = at_tokens(UnnormalizedSelfAttention(eye, eye, eye, beta), x, w)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-13)


def test_shifted_unit_runs_in_float32_where_the_papers_overflows():
    """β = 100 in float32: e^{β} is above the largest float, the shifted field is not."""
    x = jnp.asarray(ref.tokens(0, 9, 3), jnp.float32)
    eye = np.eye(3, dtype=np.float32)
    shifted = at_tokens(SHIFTED(eye, eye, eye, 100.0), x, np.full(9, 1 / 9, np.float32))
    assert bool(jnp.isfinite(shifted).all())
    paper = UnnormalizedSelfAttention(eye, eye, eye, 100.0)
    assert not bool(jnp.isfinite(at_tokens(paper, x, np.full(9, 1 / 9, "f4"))).all())


# -------------------------------------------------------------------- symmetries


@pytest.mark.parametrize("kind", KINDS)
def test_queries_and_keys_are_not_confused(kind):
    """Exchanging Q and K turns B into Bᵀ: another field, exactly that of Bᵀ."""
    make = KINDS[kind]
    Q, K, V = ref.matrices(1, 3)
    x, beta, eye = ref.tokens(0, 12, 3), 6.0, np.eye(3)
    straight = at_tokens(make(Q, K, V, beta), x)
    swapped = at_tokens(make(K, Q, V, beta), x)
    assert np.abs(straight - swapped).max() > 0.01 * np.abs(straight).max()
    B = Q.T @ K
    for field, same in ((straight, B), (swapped, B.T)):
        # ⟨x, By⟩ with the query map I and the key map B.
        np.testing.assert_allclose(
            at_tokens(make(eye, same, V, beta), x), field, rtol=0, atol=1e-14
        )


@given(seed=st.integers(0, 10**6), kind=st.sampled_from(list(KINDS)))
def test_rotated_tokens_move_as_rotated(seed, kind):
    """χ with (QRᵀ, KRᵀ, RVRᵀ) at xRᵀ = χ(x)Rᵀ for every orthogonal R."""
    Q, K, V = ref.matrices(seed, 3)
    x, w, R = ref.tokens(seed, 12, 3), ref.weights(seed, 12), ref.rotation(seed, 3)
    plain = at_tokens(KINDS[kind](Q, K, V, 8.0), x, w)
    turned = at_tokens(KINDS[kind](Q @ R.T, K @ R.T, R @ V @ R.T, 8.0), x @ R.T, w)
    np.testing.assert_allclose(turned, plain @ R.T, rtol=0, atol=3e-14)


@given(seed=st.integers(0, 10**6), kind=st.sampled_from(list(KINDS)))
def test_names_of_tokens_do_not_matter(seed, kind):
    """Permuted tokens move as permuted, and the field elsewhere is the same."""
    Q, K, V = ref.matrices(seed, 3)
    x, w = ref.tokens(seed, 12, 3), ref.weights(seed, 12, zeros=2)
    order = np.random.default_rng(seed).permutation(12)
    field = KINDS[kind](Q, K, V, 8.0)
    np.testing.assert_allclose(
        at_tokens(field, x[order], w[order]), at_tokens(field, x, w)[order], atol=1e-14
    )
    z = jnp.asarray(ref.tokens(seed + 1, 12, 3))
    np.testing.assert_allclose(
        velocity(field, z, jnp.asarray(x[order]), jnp.asarray(w[order])),
        velocity(field, z, jnp.asarray(x), jnp.asarray(w)),
        atol=1e-14,
    )


@given(
    seed=st.integers(0, 10**6),
    share=st.floats(0, 1),
    kind=st.sampled_from(list(KINDS)),
)
def test_a_token_may_be_split_into_two(seed, share, kind):
    """wδ_y = w(1−s)δ_y + wsδ_y: nothing moves differently."""
    Q, K, V = ref.matrices(seed, 3)
    y, w = ref.tokens(seed, 11, 3), ref.weights(seed, 11)
    z = jnp.asarray(ref.tokens(seed + 1, 12, 3))
    field = KINDS[kind](Q, K, V, 8.0)
    whole = velocity(field, z, jnp.asarray(y), jnp.asarray(w))
    parts = np.concatenate([w[:-1], [w[-1] * (1 - share), w[-1] * share]])
    split = velocity(field, z, jnp.asarray(np.vstack([y, y[-1:]])), jnp.asarray(parts))
    np.testing.assert_allclose(split, whole, rtol=0, atol=1e-14)


@given(
    seed=st.integers(0, 10**6),
    beta=st.sampled_from([0.0, 1.0, 1e3]),
    kind=st.sampled_from(list(KINDS)),
)
def test_velocities_are_tangent(seed, beta, kind):
    """|⟨x, χ(x)⟩| ≤ 1e−14 with ‖V‖ = 1."""
    x, w = ref.tokens(seed, 12, 3), ref.weights(seed, 12)
    v = at_tokens(KINDS[kind](*ref.matrices(seed, 3), beta), x, w)
    assert np.abs(np.sum(x * v, axis=1)).max() <= 1e-14


def test_tokens_of_weight_zero_move_but_move_none():
    """Without them the others, and without weight they themselves, move the same."""
    Q, K, V = ref.matrices(2, 3)
    x, w = ref.tokens(0, 12, 3), ref.weights(0, 12, zeros=4)
    field = SelfAttention(Q, K, V, 9.0)
    everywhere = field.velocity(x, Empirical(x, w))
    without = field.velocity(x, Empirical(x[4:], w[4:]))
    np.testing.assert_allclose(everywhere, without, rtol=0, atol=1e-14)


def test_only_ratios_of_weights_count():
    """Weights are stored with sum 1."""
    W = np.array([[1, 2, 1], [0.25, 0.5, 0.25]])
    mu, nu = (Empirical(ref.tokens(0, 3, 2), w) for w in W)
    np.testing.assert_array_equal(mu.weights, nu.weights)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_follow_the_dtype_of_the_tokens(kind):
    """float32 tokens in, float32 velocities out, equal to float64 within 8(1 + β) units of
    float32 rounding; the matrices may be float64 or integers."""
    Q, K, V = ref.matrices(2, 3)
    x = ref.tokens(0, 12, 3)
    field = KINDS[kind](Q, K, V, 4)
    wide = field.velocity(x, Empirical(x))
    small = field.velocity(x.astype(np.float32), Empirical(x))
    assert small.dtype == jnp.float32
    np.testing.assert_allclose(small, wide, rtol=0, atol=8 * 5 * ref.EPS32)


# ------------------------------------------------------------------ closed forms


def alignment(d, kappa):
    """A_d(κ) = I_{d/2}(κ)/I_{d/2−1}(κ): the mean of ⟨u/|u|, y⟩ under the density ∝ e^{⟨u,y⟩}
    on S^{d−1}, with |u| = κ."""
    return ive(d / 2, kappa) / ive(d / 2 - 1, kappa)


@pytest.mark.parametrize(("d", "n"), [(2, 80), (3, 1500), (5, 20_000)])
@pytest.mark.parametrize("beta", [0.5, 5.0])
def test_uniform_measure_gives_the_von_mises_fisher_mean(d, n, beta):
    """µ uniform: χ(x) = A_d(κ) P_x V u/κ with u = βBᵀx and κ = |u|. The nodes are exact
    for polynomials of a degree at which e^{⟨u,y⟩} has converged."""
    Q, K, V = ref.matrices(d, d)
    mu = Uniform(d).nodes(n)
    x = ref.tokens(0, 6, d)
    u = beta * x @ (Q.T @ K)
    kappa = np.linalg.norm(u, axis=1, keepdims=True)
    drive = alignment(d, kappa) * (u / kappa) @ V.T
    expected = drive - np.sum(x * drive, axis=1, keepdims=True) * x
    field = SelfAttention(Q, K, V, beta)
    np.testing.assert_allclose(field.velocity(x, mu), expected, rtol=0, atol=1e-13)


def test_at_zero_beta_every_token_is_drawn_to_v_times_the_mean():
    """β = 0: χ(x) = P_x V Σⱼ wⱼ yⱼ, normalised or not."""
    Q, K, V = ref.matrices(2, 3)
    x, w = ref.tokens(0, 12, 3), ref.weights(0, 12)
    drive = V @ (w @ x)
    expected = drive - (x @ drive)[:, None] * x
    for make in KINDS.values():
        v = make(Q, K, V, 0.0).velocity(x, Empirical(x, w))
        np.testing.assert_allclose(v, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("beta", [0.0, 3.0])
def test_equiangular_tokens_move_alike(beta):
    """n tokens with all ⟨xᵢ,xⱼ⟩ = γ and Q = K = V = I: d⟨xᵢ,xⱼ⟩/dt =
    2 e^{βγ}(1 − γ)(1 + (n−1)γ)/(e^β + (n−1)e^{βγ}), the same for every pair."""
    n, gamma, eye = 6, 0.3, np.eye(6)
    x = ref.equiangular(n, gamma)
    v = np.asarray(at_tokens(SelfAttention(eye, eye, eye, beta), x))
    rates = (x @ v.T + v @ x.T)[~np.eye(n, dtype=bool)]
    own, other = np.exp(beta), np.exp(beta * gamma)
    expected = 2 * other * (1 - gamma) * (1 + (n - 1) * gamma) / (own + (n - 1) * other)
    np.testing.assert_allclose(rates, expected, rtol=1e-13)


def test_large_beta_tends_to_the_hardmax():
    """β → ∞ over finitely many tokens: the error is below 2n e^{−β·gap}."""
    Q, K, V = ref.matrices(2, 3)
    x = ref.tokens(0, 12, 3)
    scores = np.sort(x @ Q.T @ K @ x.T, axis=1)
    gap = (scores[:, -1] - scores[:, -2]).min()
    hard = np.asarray(at_tokens(Hardmax(Q, K, V), x))
    for beta in (10 / gap, 20 / gap):
        soft = np.asarray(at_tokens(SelfAttention(Q, K, V, beta), x))
        assert np.abs(soft - hard).max() <= 2 * 12 * np.exp(-beta * gap)


def test_large_beta_tends_to_the_zero_temperature_field():
    """β → ∞ in the uniform density: |χ_β − χ_∞| ≤ 1 − A_d(κ) ≤ (d−1)/(2κ)·(1 + 1/κ)."""
    Q, K, V = ref.matrices(1, 2)
    mu, x = Uniform(2).nodes(400), ref.tokens(0, 9, 2)
    limit = ZeroTemperature(Q, K, V).velocity(x, mu)
    speed = np.linalg.norm(x @ (Q.T @ K), axis=1).min()
    for beta in (100.0, 1000.0):
        v = SelfAttention(Q, K, V, beta).velocity(x, mu)
        kappa = beta * speed
        assert np.abs(v - limit).max() <= (1 + 1 / kappa) / (2 * kappa)


# ---------------------------------------------------- fields that depend on time


def layers():
    return [SelfAttention(*ref.matrices(s, 3), 1.0 + s) for s in range(3)]


@pytest.mark.parametrize(
    ("t", "layer"), [(-1.0, 0), (0.0, 0), (0.49, 0), (0.5, 1), (2.0, 2), (99.0, 2)]
)
def test_layer_in_force_changes_at_its_time(t, layer):
    """Layer l acts on [times[l], times[l+1]), the first also before, the last for ever."""
    fields = layers()
    stack = LayerStack(fields, np.array([0.0, 0.5, 2.0]))
    assert stack.layers == 3
    assert stack.d == 3
    for got in (stack.at(jnp.asarray(t)), stack.layer(layer)):
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(fields[layer])):
            np.testing.assert_array_equal(a, b)


def test_layers_begin_at_whole_times_unless_told_otherwise():
    np.testing.assert_array_equal(LayerStack(layers()).times, [0.0, 1.0, 2.0])


def test_time_dependent_field_is_the_field_of_that_time():
    """`TimeDependent(make, args).at(t)` = `make(t, args)`; its velocity is that at 0."""
    Q, K, V = ref.matrices(1, 3)
    x = ref.tokens(0, 5, 3)
    field = TimeDependent(
        lambda t, beta: SelfAttention(Q, K, V, beta * (1 + t)), 2.0, dim=3
    )
    mu = Empirical(x)
    later = field.at(jnp.asarray(1.5)).velocity(x, mu)
    np.testing.assert_array_equal(later, SelfAttention(Q, K, V, 5.0).velocity(x, mu))
    now = field.velocity(x, mu)
    np.testing.assert_array_equal(now, SelfAttention(Q, K, V, 2.0).velocity(x, mu))


# ---------------------------------------------------------------------- refusals

I3 = np.eye(3)
X = ref.tokens(0, 4, 3)


def with_row(x, i, row):
    x = np.array(x)
    x[i] = row
    return x


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (
            with_row(X, 1, [1.01, 0, 0]),
            r"`x` must have rows of norm 1 .* row 1 has norm ",
        ),
        (with_row(X, 2, [np.nan, 0, 1]), r"`x` must .* row 2 has norm nan.*normalise"),
        (X[0], r"`x` must have shape \(n, d\).*shape \(3,\).*jax.vmap"),
        (X[None], r"`x` must have shape \(n, d\).*\(1, 4, 3\)"),
        (X[:0], r"`x` must hold at least one token, but has shape \(0, 3\)"),
        (ref.tokens(0, 4, 2), r"`x` must have d = 3 columns .*\(4, 2\)"),
        (X.astype(complex), r"`x` must be real, but is complex128"),
        (np.array([["a", "b"]]), r"`x` must be a real array, but is array"),
    ],
)
def test_points_off_the_sphere_are_refused(x, message):
    field = SelfAttention(I3, I3, I3, 1.0)
    with pytest.raises(ValueError, match=message):
        field.velocity(x, Empirical(X))


@pytest.mark.parametrize(
    ("mu", "message"),
    [
        (X, r"`mu` must be an `Empirical`, but is a ndarray. Use `Empirical\(points"),
        (Uniform(3), r"`mu` must be an `Empirical`, but is a Uniform.*law\.nodes"),
        (Empirical(ref.tokens(0, 4, 2)), r"`mu` must .* d = 3 .* but has d = 2"),
    ],
)
def test_other_measures_are_refused(mu, message):
    with pytest.raises(ValueError, match=message):
        check_measure(mu, 3)


@pytest.mark.parametrize(
    ("points", "weights", "message"),
    [
        (
            2 * X,
            None,
            r"`points` must have rows of norm 1 .* row 0 has norm 2.*normalise",
        ),
        (X[:0], None, r"`points` must hold at least one token"),
        (np.ones((3, 1)), None, r"`points` must have d ≥ 2 columns, .*\(3, 1\)"),
        (
            X,
            np.array([1, 1, -2, 1]),
            r"`weights` must be finite and ≥ 0, but entry 2 is -2",
        ),
        (
            X,
            np.array([1, 1, 1, np.nan]),
            r"`weights` must be finite and ≥ 0, but entry 3 is nan",
        ),
        (X, np.zeros(4), r"`weights` must have a positive finite sum.*Leave it out"),
        (X, np.ones(2), r"`weights` must have shape \(4,\).*\(2,\)"),
    ],
)
def test_measures_that_are_none_are_refused(points, weights, message):
    with pytest.raises(ValueError, match=message):
        Empirical(points, weights)


NAN = np.full((3, 3), np.nan)


@pytest.mark.parametrize("make", [SelfAttention, UnnormalizedSelfAttention])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((I3, I3[:2], I3, 1.0), r"`Q` and `K` must have one shape \(k, d\).*\(2, 3\)"),
        ((I3[0], I3[0], I3, 1.0), r"`Q` and `K` must have one shape .*\(3,\)"),
        ((I3, I3, I3[:2], 1.0), r"`V` must have shape \(d, d\) = \(3, 3\).*\(2, 3\)"),
        ((I3[:, :1], I3[:, :1], I3, 1.0), r"`d = Q.shape\[1\]` must be an integer ≥ 2"),
        (
            (NAN, I3, I3, 1.0),
            r"`Q` must be finite, but an entry at index \(0, 0\) is nan",
        ),
        ((I3, I3, -np.inf * np.ones((3, 3)), 1.0), r"`V` must be finite, .* is -inf"),
        ((1j * I3, I3, I3, 1.0), r"`Q` must be real, but is complex128"),
        ((I3, I3, I3, -1.0), r"`beta` must be finite and ≥ 0, but is -1.0"),
        ((I3, I3, I3, np.nan), r"`beta` must be finite and ≥ 0, but is nan"),
        ((I3, I3, I3, np.inf), r"`beta` must be finite and ≥ 0, but is inf"),
        ((I3, I3, I3, np.ones(2)), r"`beta` must be a scalar, .*\(2,\).*jax.vmap"),
    ],
)
def test_matrices_that_do_not_fit_are_refused(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(*arguments)


def test_unit_of_time_is_one_of_two():
    with pytest.raises(ValueError, match='`unit` must be "paper" or "shifted", but is'):
        UnnormalizedSelfAttention(I3, I3, I3, 1.0, unit="natural")


@pytest.mark.parametrize(
    ("fields", "times", "message"),
    [
        ([], None, r"`fields` must hold at least one field"),
        (
            [SelfAttention(I3, I3, I3, 1.0), ZeroTemperature(I3, I3, I3)],
            None,
            r"`fields` must hold fields of one kind.* field 1 differs",
        ),
        (
            [SelfAttention(I3, I3, I3, 1.0), SelfAttention(I3[:2], I3[:2], I3, 1.0)],
            None,
            r"matrices of one shape .* field 1 differs",
        ),
        (
            [SelfAttention(I3, I3, I3, 1.0)],
            np.arange(2.0),
            r"`times` must have shape \(1\), but has shape \(2,\)",
        ),
        ([SelfAttention(I3, I3, I3, 1.0)], np.array([np.nan]), r"`times` must be finite"),
    ],
)
def test_stacks_that_do_not_fit_are_refused(fields, times, message):
    with pytest.raises(ValueError, match=message):
        LayerStack(fields, times)


def test_times_of_layers_must_increase():
    with pytest.raises(ValueError, match=r"`times` must increase strictly"):
        LayerStack([SelfAttention(I3, I3, I3, 1.0)] * 2, np.array([1.0, 0.0]))


def test_time_dependent_fields_need_a_dimension():
    with pytest.raises(ValueError, match=r"`dim` must be an integer ≥ 2"):
        TimeDependent(lambda t, args: None, dim=1)


def test_bad_values_under_jit_are_refused_at_run_time():
    """Traced numbers cannot be read while tracing: the same rule answers in the run."""

    @eqx.filter_jit
    def speed(beta, x):
        return SelfAttention(I3, I3, I3, beta).velocity(x, Empirical(X, check=False))

    assert bool(jnp.isfinite(speed(jnp.asarray(1.0), jnp.asarray(X))).all())
    with pytest.raises(RuntimeError, match=r"`beta` must be finite and ≥ 0"):
        jax.block_until_ready(speed(jnp.asarray(-1.0), jnp.asarray(X)))
    with pytest.raises(RuntimeError, match=r"`x` must have rows of norm 1 to within"):
        jax.block_until_ready(speed(jnp.asarray(1.0), jnp.asarray(2 * X)))
