"""L_µ(u) = log ∫ e^{⟨u,y⟩} dµ(y) and its gradient, the barycentre, against mpmath."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

import reference as ref
from meanformer import Auto, Blockwise, Dense, Empirical

PARTITIONS = [Dense(), Blockwise(7), Blockwise(1)]  # n = 40 is no multiple of 7


@eqx.filter_jit
def at(partition, u, mu):
    return partition.at(u, mu)


@eqx.filter_jit
def both(partition, x, A, mu):
    return partition(x, A, mu)


def unit_rows(rows, dtype=np.float64):
    rows = np.array(rows, float)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(dtype)


def check_against_mpmath(partitions, u, mu, unit):
    """|L − L_exact| and |∇L − ∇L_exact| are at most 8(1 + |u|) units of rounding: each
    exponent ⟨u,y⟩ is wrong by that, and so is a logarithm or a mean of exponentials."""
    values, means = ref.log_partition(u, mu.points, mu.weights)
    values = np.array(values, dtype=object)[:, None]
    means = np.array(means, dtype=object)
    allowed = 8 * unit * (1 + np.linalg.norm(np.asarray(u, float), axis=1))
    for partition in partitions:
        log_z, mean = at(partition, jnp.asarray(u), mu)
        assert np.all(ref.error_norms(log_z[:, None], values) <= allowed)
        # Two barycentres are never further apart than 2.
        assert np.all(ref.error_norms(mean, means) <= np.minimum(allowed, 2))


# ------------------------------------------------------------------------ values


@pytest.mark.parametrize("kappa", [0.0, 1.0, 30.0, 1e3, 1e6])
@pytest.mark.parametrize("d", [2, 3, 16])
def test_log_partition_and_barycentre_are_exact_to_rounding(d, kappa):
    """L = log Σⱼ wⱼ e^{⟨u,yⱼ⟩} and ∇L = Σⱼ wⱼ yⱼ e^{⟨u,yⱼ⟩} / Σⱼ wⱼ e^{⟨u,yⱼ⟩} for random
    tokens, a quarter of them of weight 0, in float64."""
    mu = Empirical(ref.tokens(d, 40, d), ref.weights(d, 40, zeros=10))
    u = kappa * ref.tokens(100 + d, 4, d)
    check_against_mpmath(PARTITIONS, u, mu, ref.EPS64)


def test_points_are_multiplied_by_the_matrix_from_the_right():
    """`partition(x, A, mu)` is L and ∇L at the rows of x A."""
    A = np.random.default_rng(0).normal(size=(3, 3))
    x, mu = ref.tokens(1, 5, 3), Empirical(ref.tokens(2, 9, 3))
    for partition in PARTITIONS:
        np.testing.assert_allclose(
            both(partition, jnp.asarray(x), jnp.asarray(A), mu)[1],
            at(partition, jnp.asarray(x @ A), mu)[1],
            rtol=0,
            atol=1e-14,
        )


@pytest.mark.parametrize(("m", "n", "block"), [(1, 1, 4), (5, 3, 2), (13, 40, 7)])
def test_blocks_need_not_divide_the_number_of_tokens(m, n, block):
    """`Blockwise` = `Dense`, whatever remains in the last block of points and tokens."""
    mu = Empirical(ref.tokens(0, n, 3), ref.weights(0, n))
    u = jnp.asarray(20 * ref.tokens(1, m, 3))
    dense, tiles = at(Dense(), u, mu), at(Blockwise(block), u, mu)
    np.testing.assert_allclose(tiles[0], dense[0], rtol=0, atol=21 * 8 * ref.EPS64)
    np.testing.assert_allclose(tiles[1], dense[1], rtol=0, atol=21 * 8 * ref.EPS64)


def test_auto_takes_all_pairs_at_once_up_to_a_million():
    """For d > 3 `Auto` chooses by the number of pairs m·n alone."""
    assert Auto().choose(1024, 1024, 4, np.float64) == Dense()
    assert Auto().choose(1024, 1025, 4, np.float64) == Blockwise()
    mu = Empirical(ref.tokens(0, 10, 3))
    u = jnp.asarray(ref.tokens(1, 2, 3))
    np.testing.assert_array_equal(at(Auto(), u, mu)[1], at(Dense(), u, mu)[1])


def test_a_single_token_is_its_own_barycentre():
    """µ = δ_y: L(u) = ⟨u, y⟩ and ∇L = y, even for ⟨u, y⟩ = −10⁶."""
    y = ref.tokens(0, 1, 3)
    mu = Empirical(y)
    log_z, mean = at(Dense(), jnp.asarray(-1e6 * y), mu)
    np.testing.assert_allclose(log_z, [-1e6], rtol=4 * ref.EPS64)
    np.testing.assert_allclose(mean, y, rtol=0, atol=2 * ref.EPS64)


@pytest.mark.parametrize("block", [0, -3, True])
def test_block_must_be_a_positive_integer(block):
    with pytest.raises(ValueError, match=r"`block` must be an integer ≥ 1, but is"):
        Blockwise(block)


# --------------------------------------------------------------------- stability

CAP = [[1, 0, 0], [1, 0.4, 0], [1, -0.3, 0.5], [1, 0, -0.6], [1, 0.1, 0.2]]
POLES = [[1, 0, 0], [1, 1e-3, 0], [-1, 0, 0], [-1, 0, 1e-3]]
NEAR, FAR, SIDE = [1, 0, 0], [-1, 0, 0], [0, 0.6, 0.8]
ADVERSARIES = {
    "all tokens opposite to u": (CAP, None, FAR),
    "all tokens near u": (CAP, None, NEAR),
    "two antipodal clusters": (POLES, None, NEAR),
    "clusters at right angles": (POLES, None, [0, 1, 0]),
    "one heavy token far off": ([*CAP, FAR], [1e-6] * 5 + [1], NEAR),
    "the nearest tokens weigh nothing": ([*POLES], [0, 0, 1, 3], NEAR),
    "only the opposite token weighs": ([*CAP, FAR], [0] * 5 + [1], NEAR),
    "one token": ([SIDE], None, FAR),
}


def adversary_of(name, dtype):
    """The measure as six tokens (the last repeated: one shape, one compilation) with
    their weights, and the direction of u."""
    y, w, direction = ADVERSARIES[name]
    w = np.ones(len(y)) if w is None else np.array(w, float)
    copies = 7 - len(y)
    y = unit_rows([*y[:-1], *[y[-1]] * copies], dtype)
    w = np.r_[w[:-1], [w[-1] / copies] * copies]
    return jnp.asarray(y), jnp.asarray((w / w.sum()).astype(dtype)), direction


@pytest.mark.parametrize("adversary", ADVERSARIES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_values_survive_adversarial_measures(adversary, dtype):
    """No overflow, no NaN and 8(1 + κ) units of rounding, for κ = |u| from 0 to 10⁶, where
    the shifted sums Σ wⱼ e^{⟨u,yⱼ⟩−κ} reach e^{−2·10⁶}. Rows that underflow and rows that
    do not are mixed."""
    y, w, direction = adversary_of(adversary, dtype)
    mu = Empirical(y, w, check=False)
    u = np.outer([0, 1, 20, 25, 45, 180, 330, 372, 1e3, 1e6], direction).astype(dtype)
    unit = ref.EPS32 if dtype == np.float32 else ref.EPS64
    check_against_mpmath((Dense(), Blockwise(4)), u, mu, unit)


@eqx.filter_jit
def slopes(partition, u, y, w):
    """Derivatives of Σ L and of Σ ∇L₁ in u, y and w."""

    def value(u, y, w):
        return partition.at(u, Empirical(y, w, check=False))[0].sum()

    def first(u, y, w):
        return partition.at(u, Empirical(y, w, check=False))[1][:, 0].sum()

    return [jax.grad(f, argnums=(0, 1, 2))(u, y, w) for f in (value, first)]


@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_gradients_survive_adversarial_measures(adversary):
    """|∇L| ≤ 1 and ∇²L = Cov_u(y) has entries in [−1, 1], here in float32 for all κ up to
    10⁶, through every scale of the shifted sums; ∂/∂wⱼ and ∂/∂yⱼ are finite too."""
    y, w, direction = adversary_of(adversary, np.float32)
    kappas = np.r_[0.0, np.linspace(5, 100, 96), 3e2, 1e3, 1e6]
    u = jnp.asarray(np.outer(kappas, direction).astype(np.float32))
    for partition in (Dense(), Blockwise(4)):
        for in_u, in_y, in_w in slopes(partition, u, y, w):
            assert in_u.dtype == in_y.dtype == in_w.dtype == jnp.float32
            assert bool(jnp.all(jnp.abs(in_u) <= 1 + 1e-4))
            assert bool(jnp.isfinite(in_y).all())
            assert bool(jnp.isfinite(in_w).all())


def test_batches_of_gradients_survive_where_both_branches_run():
    """Under `vmap` the sums that underflow and those that do not are both computed; the
    gradients are those of the single points."""
    y, w, direction = adversary_of("all tokens opposite to u", np.float32)
    kappas = np.array([0, 20, 45, 60, 1e3, 1e6])
    u = jnp.asarray(np.outer(kappas, direction).astype(np.float32))

    def single(u):
        return slopes(Dense(), u[None], y, w)

    together = jax.vmap(single)(u)
    for i in range(len(kappas)):
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(single(u[i]))):
            np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_covariance_is_right_at_every_scale_of_the_shifted_sum(dtype):
    """∇²L = Cov_u(y) of tokens opposite to u, where Σ wⱼ e^{⟨u,yⱼ⟩−κ} runs from 1 through
    the smallest floats: the relative error stays at 64(1 + κ) units of rounding."""
    mu = Empirical(unit_rows(CAP, dtype))
    end, unit = (60, ref.EPS32) if dtype == np.float32 else (400, ref.EPS64)
    kappas = np.linspace(1, end, 60)
    u = np.outer(kappas, FAR).astype(dtype)

    @jax.jit
    def curvature(u):
        return jax.grad(lambda u: Dense().at(u, mu)[1][:, 0].sum())(u)[:, 0]

    y, w = np.asarray(mu.points, float), np.asarray(mu.weights, float)
    s = np.asarray(u, float) @ y.T
    p = w * np.exp(s - s.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    mean = p @ y[:, 0]
    variance = np.sum(p * (y[:, 0] - mean[:, None]) ** 2, axis=1)
    np.testing.assert_array_less(
        np.abs(curvature(jnp.asarray(u)) - variance), 64 * unit * (1 + kappas)
    )


# --------------------------------------------------------------- laws of L and ∇L


@given(
    seed=st.integers(0, 10**6),
    kappa=st.sampled_from([1e-3, 1.0, 30.0, 1e4]),
    t=st.floats(0, 1),
)
def test_log_partition_is_convex(seed, kappa, t):
    """L((1−t)u + tv) ≤ (1−t)L(u) + tL(v)."""
    mu = Empirical(ref.tokens(seed, 12, 3), ref.weights(seed, 12, zeros=3))
    u, v = kappa * ref.tokens(seed + 1, 2, 3)
    rows = jnp.asarray(np.stack([u, v, (1 - t) * u + t * v]))
    low, high, mid = np.asarray(at(Dense(), rows, mu)[0])
    assert mid <= (1 - t) * low + t * high + 16 * ref.EPS64 * (1 + kappa)


@given(seed=st.integers(0, 10**6), kappa=st.sampled_from([0.0, 1.0, 30.0, 1e4]))
def test_log_partition_lies_between_its_mean_and_its_maximum(seed, kappa):
    """⟨u, ∫ y dµ⟩ ≤ L(u) ≤ |u| (Jensen), and |∇L| ≤ 1."""
    mu = Empirical(ref.tokens(seed, 12, 3), ref.weights(seed, 12))
    u = kappa * ref.tokens(seed + 1, 4, 3)
    log_z, mean = at(Dense(), jnp.asarray(u), mu)
    slack = 16 * ref.EPS64 * (1 + kappa)
    lower = u @ np.asarray(mu.mean(mu.points))
    assert np.all(np.asarray(log_z) >= lower - slack)
    assert np.all(np.asarray(log_z) <= kappa + slack)
    assert np.all(np.linalg.norm(mean, axis=1) <= 1 + 4 * ref.EPS64)


@pytest.mark.parametrize("kappa", [0.0, 3.0, 300.0])
@pytest.mark.parametrize("partition", PARTITIONS[:2], ids=str)
def test_gradient_of_the_log_partition_is_the_barycentre(partition, kappa):
    """d/du L_µ(u) by reverse mode equals the barycentre that is returned with L."""
    mu = Empirical(ref.tokens(0, 40, 3), ref.weights(0, 40, zeros=5))
    u = jnp.asarray(kappa * ref.tokens(1, 3, 3))
    slope = jax.grad(lambda u: at(partition, u, mu)[0].sum())(u)
    np.testing.assert_allclose(
        slope, at(partition, u, mu)[1], rtol=0, atol=16 * ref.EPS64 * (1 + kappa)
    )


@pytest.mark.parametrize("partition", PARTITIONS[:2], ids=str)
def test_hessian_of_the_log_partition_is_the_covariance(partition):
    """∇²L_µ(u) = ⟨y yᵀ⟩ − ⟨y⟩⟨y⟩ᵀ, means with the weights wⱼ e^{⟨u,yⱼ⟩}/Z."""
    y, w = ref.tokens(0, 40, 3), ref.weights(0, 40, zeros=5)
    mu, u = Empirical(y, w), 4 * ref.tokens(1, 1, 3)[0]
    p = w * np.exp(y @ u)
    p /= p.sum()
    covariance = (y.T * p) @ y - np.outer(p @ y, p @ y)
    hessian = jax.hessian(lambda u: at(partition, u[None], mu)[0][0])(jnp.asarray(u))
    jacobian = jax.jacfwd(lambda u: at(partition, u[None], mu)[1][0])(jnp.asarray(u))
    np.testing.assert_allclose(hessian, covariance, rtol=0, atol=1e-14)
    np.testing.assert_allclose(jacobian, covariance, rtol=0, atol=1e-14)


def test_derivative_in_the_weights_is_the_share_of_a_token():
    """∂L/∂wⱼ = e^{⟨u,yⱼ⟩−L}, tokens of weight 0 included."""
    y, w, u = ref.tokens(0, 8, 3), ref.weights(0, 8, zeros=2), ref.tokens(1, 1, 3)
    for partition in PARTITIONS[:2]:
        slope = jax.grad(
            lambda w, p=partition: p.at(jnp.asarray(u), Empirical(y, w, check=False))[0][
                0
            ]
        )(jnp.asarray(w))
        share = np.exp(y @ u[0]) / np.sum(w * np.exp(y @ u[0]))
        np.testing.assert_allclose(slope, share, rtol=1e-14)


# ------------------------------------------------------------------- derivatives


def scalar(partition, x, A, y, w):
    """A smooth number that depends on L and ∇L at all points."""
    log_z, mean = partition(x, A, Empirical(y, w, check=False))
    return jnp.sum(jnp.sin(log_z)) + jnp.sum(jnp.cos(mean[:, 0] + 2 * mean[:, 1]))


@functools.cache
def arguments():
    rng = np.random.default_rng(5)
    primal = (ref.tokens(1, 9, 3), 3 * rng.normal(size=(3, 3)), ref.tokens(2, 20, 3))
    primal = (*primal, ref.weights(3, 20))
    tangent = [rng.normal(size=p.shape) for p in primal]
    return tuple(map(jnp.asarray, primal)), tuple(map(jnp.asarray, tangent))


@functools.cache
def derivatives(partition):
    """Slope along the tangent by forward and by reverse mode, and the Hessian along it
    by forward over reverse and by reverse over reverse."""
    primal, tangent = arguments()
    f = functools.partial(scalar, partition)

    def along(slopes):
        return sum(jnp.vdot(s, t) for s, t in zip(slopes, tangent))

    gradient = jax.grad(f, argnums=(0, 1, 2, 3))

    @jax.jit
    def compute(primal, tangent):
        forward = jax.jvp(f, primal, tangent)[1]
        reverse = gradient(*primal)
        over = jax.jvp(lambda *p: gradient(*p), primal, tangent)[1]
        twice = jax.grad(lambda *p: along(gradient(*p)), argnums=(0, 1, 2, 3))(*primal)
        return forward, reverse, over, twice

    return compute(primal, tangent)


@pytest.mark.parametrize("partition", PARTITIONS[:2], ids=str)
def test_first_derivatives_match_central_differences(partition):
    """d/ds f(p + s v) at s = 0, extrapolated central differences, error ≈ ε/h ≈ 1e−12."""
    primal, tangent = arguments()
    forward, reverse, *_ = derivatives(partition)
    f = jax.jit(functools.partial(scalar, partition))
    expected = ref.slope(
        lambda s: float(f(*[p + s * t for p, t in zip(primal, tangent)])), 1e-4
    )
    along = sum(jnp.vdot(s, t) for s, t in zip(reverse, tangent))
    np.testing.assert_allclose(forward, expected, rtol=1e-9)
    np.testing.assert_allclose(along, forward, rtol=1e-12)


@pytest.mark.parametrize("partition", PARTITIONS[:2], ids=str)
def test_second_derivatives_match_central_differences(partition):
    """∇²f·v by forward over reverse = by reverse over reverse = d/ds ∇f(p + s v)."""
    primal, tangent = arguments()
    *_, over, twice = derivatives(partition)
    gradient = jax.jit(
        jax.grad(functools.partial(scalar, partition), argnums=(0, 1, 2, 3))
    )
    expected = ref.slope(
        lambda s: np.concatenate(
            [np.ravel(g) for g in gradient(*[p + s * t for p, t in zip(primal, tangent)])]
        ),
        1e-4,
    )
    flat = np.concatenate([np.ravel(g) for g in over])
    size = np.abs(expected).max()
    np.testing.assert_allclose(flat, expected, rtol=0, atol=1e-9 * size)
    flat_twice = np.concatenate([np.ravel(g) for g in twice])
    np.testing.assert_allclose(flat_twice, flat, rtol=0, atol=1e-12 * size)


def test_derivatives_of_the_two_partitions_agree():
    """All first and second derivatives of `Blockwise` equal those of `Dense`."""
    for dense, tiles in zip(derivatives(Dense()), derivatives(Blockwise(7))):
        for a, b in zip(jax.tree.leaves(dense), jax.tree.leaves(tiles)):
            np.testing.assert_allclose(b, a, rtol=0, atol=1e-13 * np.abs(a).max())


def test_blockwise_stores_no_matrix_of_pairs():
    """Value and gradient at n = 4096 need less memory than a quarter of n² float64
    numbers; `Dense` needs at least n² of them."""
    n = 4096
    A = jnp.eye(3)

    def energy(partition, x, A):
        return partition(x, A, Empirical(x, check=False))[0].sum()

    def temporary_bytes(partition, transform):
        f = transform(functools.partial(energy, partition))
        lowered = jax.jit(f).lower(jax.ShapeDtypeStruct((n, 3), A.dtype), A)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    def gradient(f):
        return jax.grad(f, argnums=(0, 1))

    assert temporary_bytes(Blockwise(512), lambda f: f) < n**2 * 8 / 4
    assert temporary_bytes(Blockwise(512), gradient) < n**2 * 8 / 4
    assert temporary_bytes(Blockwise(), gradient) < n**2 * 8 / 2
    assert temporary_bytes(Dense(), gradient) >= n**2 * 8


def test_float32_in_float32_out():
    """The dtype of the points is kept by value and gradient."""
    mu = Empirical(ref.tokens(0, 6, 3).astype(np.float32))
    u = jnp.asarray(ref.tokens(1, 2, 3), jnp.float32)
    for partition in PARTITIONS:
        log_z, mean = at(partition, u, mu)
        assert log_z.dtype == mean.dtype == jnp.float32
