"""Sums through harmonics: `Harmonic` against mpmath, against sums over all pairs, and the
bounds that its promises rest on."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy.special import ive

import meanformer as mf
import reference as ref
from meanformer.partition.grids import Circle, Sphere
from meanformer.partition.harmonic import tail
from meanformer.partition.windows import refine, window
from test_partition import ADVERSARIES, adversary_of

SMALL = {2: 127, 3: 71}  # degrees enough for κ = 30, and few branches to compile


@eqx.filter_jit
def at(partition, u, mu):
    return partition.at(u, mu)


@eqx.filter_jit
def both(partition, x, A, mu):
    return partition(x, A, mu), partition.report(x, A, mu)


def close(found, expected, tol):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=0, atol=tol * np.abs(b).max())


# ----------------------------------------------------------------- never wrong silently


def in_plane(y, direction):
    """The adversary on S¹: the first two coordinates, or the last two where those vanish."""
    y, direction = np.asarray(y, float), np.asarray(direction, float)
    y2, direction2 = y[:, :2] + [[0, 1e-3]], direction[:2] + np.array([0, 1e-9])
    norm = np.linalg.norm(y2, axis=1, keepdims=True)
    return y2 / norm, direction2 / np.linalg.norm(direction2)


@pytest.mark.parametrize("d", [2, 3])
@pytest.mark.parametrize(("dtype", "tol"), [(np.float32, 1e-5), (np.float64, 1e-10)])
@settings(max_examples=12)
@given(
    adversary=st.sampled_from(sorted(ADVERSARIES)),
    kappa=st.sampled_from([0.0, 1e-3, 1.0, 12.0, 50.0, 400.0, 1e5]),
    turned=st.floats(-3.0, 3.0),
)
def test_error_is_below_tol_for_adversaries(d, dtype, tol, adversary, kappa, turned):
    """|L − L_exact| and |∇L − ∇L_exact| ≤ tol, beside 8(1 + κ) units of rounding that sums
    over all pairs have too: all tokens on one side and u opposite, antipodal clusters, one
    heavy token, … from κ = 0 to 10⁵, at a multiple of κ along `turned` too."""
    y, w, direction = adversary_of(adversary, np.float64)
    if d == 2:
        y, direction = in_plane(y, direction)
    mu = mf.Empirical(jnp.asarray(y, dtype), jnp.asarray(w, dtype), check=False)
    side = np.roll(direction, 1)
    rows = [
        direction,
        np.cos(turned) * np.asarray(direction) + np.sin(turned) * side,
        side,
    ]
    rows = np.array(rows) / np.linalg.norm(rows, axis=1, keepdims=True)
    u = (kappa * rows * np.array([[1.0], [0.5], [1.0]])).astype(dtype)
    values, means = ref.log_partition(u, mu.points, mu.weights)
    unit = float(np.finfo(dtype).eps) / 2
    allowed = tol + 8 * unit * (1 + np.linalg.norm(u.astype(float), axis=1))
    log_z, mean = at(mf.Harmonic(tol), jnp.asarray(u), mu)
    assert log_z.dtype == mean.dtype == dtype
    exact = np.array(values, dtype=object)[:, None]
    assert np.all(ref.error_norms(log_z[:, None], exact) <= allowed)
    error = ref.error_norms(mean, np.array(means, dtype=object))
    assert np.all(error <= np.minimum(allowed, 2))


@pytest.mark.parametrize("d", [2, 3])
def test_points_far_from_all_tokens_are_summed_densely_and_counted(d):
    """Tokens in a cap and κ = 30: Z/e^κ is of order 1 near the cap and e^{−2κ} opposite to it.
    Points where it is below 10⁻⁶ are counted as dense, none where it is above 10⁻², and all
    answers are right."""
    y = 0.2 * ref.tokens(0, 300, d) + np.eye(d)[0]
    y /= np.linalg.norm(y, axis=1, keepdims=True)
    turn = ref.rotation(0, d)
    x = np.concatenate([y[:50], -y[:3], ref.tokens(1, 20, d)]) @ turn.T
    mu, A = mf.Empirical(y), 30 * jnp.asarray(turn)
    found, report = both(mf.Harmonic(1e-10, SMALL[d]), jnp.asarray(x), A, mu)
    expected = mf.Dense()(jnp.asarray(x), A, mu)
    close(found, expected, 1e-12)
    share = np.exp(expected[0] - 30)
    assert (
        3 <= np.sum(share < 1e-6) <= int(report["dense_points"]) <= np.sum(share < 1e-2)
    )
    assert int(report["modes"]) == SMALL[d]


def test_a_few_tokens_of_scenario_1b_are_summed_densely():
    """Scenario 1b, β = 30: tokens sink to a rotating great circle; those that were near a pole
    come late and, at 2 ≤ t ≤ 8, see less than the series resolves. They are counted in the
    stats, and the run is that of the sums over all pairs."""
    eye = np.eye(3)
    Q = np.array([[0.0, 1, 0], [-1, 0, 0], [0, 0, -2]])
    x0 = mf.Uniform(3).sample(jax.random.key(0), 1000)
    runs = [
        mf.unroll(
            mf.SelfAttention(Q, eye, eye, 30.0, partition=how),
            x0,
            layers=60,
            step=0.05,
            save=[0, 40, 60],
        )
        for how in (mf.Harmonic(1e-10, 95), mf.Blockwise())
    ]
    counts = np.asarray(runs[0].stats["dense_points"])
    assert counts[0] == 0
    assert np.all((counts[1:] > 0) & (counts[1:] <= 60))
    assert np.all(np.asarray(runs[0].stats["modes"]) == 95)
    assert np.all(np.asarray(runs[1].stats["modes"]) == 0)
    assert runs[0].method.endswith("sums: Harmonic")
    np.testing.assert_allclose(runs[0].xs, runs[1].xs, rtol=0, atol=1e-8)


# --------------------------------------------------------------- agreement with all pairs


MATRICES = {
    "rotation": lambda d: 30 * ref.rotation(3, d),
    "not symmetric": lambda d: 30 * ref.matrices(4, d)[0].T @ ref.matrices(4, d)[1],
    "singular": lambda d: np.outer(ref.tokens(1, 1, d), 12 * ref.tokens(2, 1, d)),
    "zero": lambda d: np.zeros((d, d)),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("d", [2, 3])
def test_series_agrees_with_sums_over_all_pairs(d, dtype):
    """Uniform tokens, a tenth of weight 0: `Harmonic` = `Dense` for any matrix (κ is constant,
    varies, vanishes somewhere or everywhere), in float64 by the series alone."""
    x = jnp.asarray(ref.tokens(d, 1500, d), dtype)
    mu = mf.Empirical(x, ref.weights(d, 1500, zeros=150))
    how = mf.Harmonic(None, SMALL[d])
    for name, matrix in MATRICES.items():
        A = jnp.asarray(matrix(d), dtype)
        found, report = both(how, x, A, mu)
        expected = mf.Dense()(x, A, mu)
        tol = how.tolerance(dtype) + 8 * 31 * float(np.finfo(dtype).eps)
        for a, b in zip(found, expected):
            np.testing.assert_allclose(a, b, rtol=0, atol=tol, err_msg=name)
        if dtype == np.float64:
            assert int(report["dense_points"]) == 0, name


def test_batches_with_members_beyond_all_grids_are_right():
    """`vmap` over β = 5 and 10⁷: the second member has no grid and is summed over all pairs."""
    x = jnp.asarray(ref.tokens(0, 60, 2))
    mu = mf.Empirical(x)
    for how in (mf.Harmonic(1e-10), mf.Harmonic(1e-10, nodes=64)):
        found, report = jax.vmap(lambda b, how=how: both(how, x, b * jnp.eye(2), mu))(
            jnp.asarray([5.0, 1e7])
        )
        expected = [mf.Dense()(x, b * jnp.eye(2), mu) for b in (5.0, 1e7)]
        for i, pair in enumerate(expected):
            for a, b in zip(found, pair):
                np.testing.assert_allclose(a[i], b, rtol=1e-9, atol=1e-9)
        assert list(np.asarray(report["dense_points"])) == [0, 60]


def test_sums_of_many_coincident_tokens_do_not_drift_in_float32():
    """2·10⁵ tokens in one cluster, added one by one, would be wrong by 10⁻³ in float32; at κ = 1
    L is right to 10⁻⁵."""
    y = np.array([[0.6, 0.8]]) + 1e-3 * ref.tokens(0, 200_000, 2)
    y = jnp.asarray(y / np.linalg.norm(y, axis=1, keepdims=True), np.float32)
    u = jnp.asarray(ref.tokens(1, 20, 2), np.float32)
    found = at(mf.Harmonic(1e-5, 31), u, mf.Empirical(y, check=False))
    exact = np.asarray(y, float).T @ np.full(200_000, 1 / 200_000)
    second = np.exp(np.asarray(u, float) @ np.asarray(y[::20], float).T).mean(axis=1)
    np.testing.assert_allclose(found[0], np.log(second), rtol=0, atol=1e-5)
    np.testing.assert_allclose(found[1], np.tile(exact, (20, 1)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("d", [2, 3])
def test_many_points_are_read_through_a_screen_in_x(d):
    """For many points and κ that varies, sums are taken at the nodes of a grid of x and
    interpolated; the accuracy is the same."""
    n = {2: 1000, 3: 17_000}[d]
    x = jnp.asarray(ref.tokens(d, n, d))
    A = jnp.asarray(10 * ref.rotation(1, d) @ np.diag([1, 0.4, 0.6][:d]))
    some = mf.Empirical(x[:: n // 500])
    found, report = both(mf.Harmonic(1e-9, SMALL[d]), x, A, some)
    close(found, mf.Blockwise()(x, A, some), 1e-9)
    assert int(report["dense_points"]) == 0


def scalar(partition, x, A, y, w):
    """A smooth number that depends on L and ∇L at all points, and on directions only."""
    x = x / jnp.linalg.norm(x, axis=1, keepdims=True)
    y = y / jnp.linalg.norm(y, axis=1, keepdims=True)
    log_z, mean = partition(x, A, mf.Empirical(y, w, check=False))
    return jnp.sum(jnp.sin(log_z)) + jnp.sum(jnp.cos(mean[:, 0] + 2 * mean[:, 1]))


@pytest.mark.parametrize(
    ("d", "name"), [(2, "not symmetric"), (3, "rotation"), (2, "zero")]
)
def test_first_and_second_derivatives_agree_with_those_of_all_pairs(d, name):
    """Forward, reverse, and forward over reverse in points, matrix, tokens and weights: at an
    orthogonal B and at β = 0 too, where κ and the direction of u are not smooth."""
    rng = np.random.default_rng(5)
    A = MATRICES[name](d) / 5
    primal = (ref.tokens(1, 30, d), A, ref.tokens(2, 60, d), ref.weights(3, 60))
    primal = tuple(map(jnp.asarray, primal))
    tangent = tuple(jnp.asarray(rng.normal(size=p.shape)) for p in primal)

    @functools.partial(jax.jit, static_argnums=0)
    def compute(partition, primal, tangent):
        f = functools.partial(scalar, partition)
        gradient = jax.grad(f, argnums=(0, 1, 2, 3))
        both = jax.jvp(lambda *p: (gradient(*p), f(*p)), primal, tangent)
        return both

    expected, found = (
        compute(how, primal, tangent) for how in (mf.Dense(), mf.Harmonic(1e-10, 31))
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        size = max(1.0, float(np.abs(b).max()))
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-9 * size)


# ------------------------------------------------------------------ one program for all β


def test_one_program_serves_every_beta_alone_in_batches_and_under_derivatives():
    """The number of modes follows β while running: one trace for β from 0 to 10³; `vmap` over
    β is the loop; d/dβ is that of all pairs."""
    x = jnp.asarray(ref.tokens(0, 300, 2))
    eye, traces = np.eye(2), []

    def speed(beta, how):
        field = mf.SelfAttention(eye, eye, eye, beta, partition=how)
        return jnp.sum(field.tangent(x, mf.Empirical(x, check=False))[:, 0] * x[:, 1])

    @jax.jit
    def value_and_slope(beta):
        traces.append(0)
        return jax.value_and_grad(speed)(beta, mf.Harmonic(1e-10, 511))

    betas = jnp.asarray([0.0, 1.0, 20.0, 150.0, 1000.0])
    exact = jax.jit(jax.vmap(lambda b: jax.value_and_grad(speed)(b, mf.Dense())))(betas)
    alone = [value_and_slope(b) for b in betas]
    assert len(traces) == 1
    for i, single in enumerate(alone):
        np.testing.assert_allclose(single[0], exact[0][i], rtol=0, atol=1e-9)
        np.testing.assert_allclose(single[1], exact[1][i], rtol=0, atol=1e-8)
    together = jax.vmap(value_and_slope)(betas)
    close(together, jax.tree.map(lambda *v: jnp.stack(v), *alone), 1e-12)


def test_memory_grows_like_the_number_of_tokens():
    """One evaluation, and its gradient, of 2·10⁵ tokens reserve less than 1 kB a token."""
    x = jax.ShapeDtypeStruct((200_000, 2), np.float64)
    how, A = mf.Harmonic(1e-10, 63), 5 * jnp.eye(2)

    def loss(x):
        return jnp.sum(how(x, A, mf.Empirical(x, check=False))[1][:, 0] ** 2)

    for f in (loss, jax.grad(loss)):
        memory = jax.jit(f).lower(x).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 1000 * 200_000


# ---------------------------------------------------------------------- what it rests on


@pytest.mark.parametrize("kappa", [1e-3, 0.5, 7.0, 100.0, 3e4])
@pytest.mark.parametrize("K", [1, 4, 20, 90, 600])
def test_tail_bounds_hold(kappa, K):
    """d = 2: Σ_{k>K} 2 I_k e^{−κ}; d = 3: Σ_{l>K} (2l+1) i_l e^{−κ}, summed by SciPy and mpmath;
    and the bounds are not lame: one degree further they are within 60(2 + κ) of the tail."""
    k = np.arange(K + 1, K + 6000)
    circle = 2 * np.sum(ive(k, kappa))
    with np.errstate(under="ignore"):
        spherical = np.sqrt(np.pi / (2 * kappa)) * ive(k + 0.5, kappa)
    for d, exact in ((2, circle), (3, np.sum((2 * k + 1) * spherical))):
        bound = float(tail(d, jnp.asarray(kappa), K))
        assert exact <= bound * (1 + 1e-12) + 1e-300
        if exact > 1e-280:
            assert float(tail(d, jnp.asarray(kappa), K + 1)) <= 60 * (2 + kappa) * exact


def test_exponent_of_the_bound_is_that_of_the_bessel_function():
    """e^{−κ} I_k(κ) ≤ e^{−ψ(k)} far out too, where floats underflow."""
    with mpmath.workdps(30):
        for kappa, k in ((10, 300), (1, 400), (1000, 4000)):
            root = mpmath.sqrt(mpmath.mpf(kappa) ** 2 + k**2)
            psi = kappa - root + k * mpmath.asinh(mpmath.mpf(k) / kappa)
            assert mpmath.log(mpmath.besseli(k, kappa)) - kappa <= -psi


@pytest.mark.parametrize("error", [1e-3, 1e-7, 1e-12, 1e-15])
def test_windows_read_waves_to_their_stated_error(error):
    """f(s) = Σ ψ(i − s) gᵢ for all waves that a grid carries, at random s, to `outer_error`, and
    the slower half to `error`, which is what was asked for (3.6e-15 at best)."""
    found = window(error)
    P, s = 64, np.random.default_rng(0).uniform(0, 128, 400)
    first, psi = found.weights(jnp.asarray(s))
    index = (np.asarray(first)[:, None] + np.arange(found.width)) % (2 * P)
    assert found.error <= max(error, 4e-15)
    for k in range(32):
        for wave in (np.cos, np.sin):
            g = refine(jnp.asarray(wave(2 * np.pi * k * np.arange(P) / P)), found)
            read = np.sum(np.asarray(g)[index] * np.asarray(psi), axis=1)
            worst = np.abs(read - wave(2 * np.pi * k * s / (2 * P))).max()
            assert worst <= (found.error if k <= 16 else found.outer_error) + 2e-14


@pytest.mark.parametrize("chart", [Circle(window(1e-14)), Sphere(window(1e-14))], ids=str)
def test_node_weights_integrate_polynomials_like_the_tokens(chart):
    """Σ_s W_s p(y_s) = Σⱼ wⱼ p(yⱼ) for polynomials p of degree < P/2 of the coordinates, tokens at
    the poles included; and spreading is the transpose of reading."""
    d = len(chart.shape(4)) + 1
    y = np.concatenate([ref.tokens(0, 50, d), np.eye(d), -np.eye(d)])
    w = ref.weights(0, len(y))
    P = 32
    spread = chart.gather(jnp.asarray(y), jnp.asarray(w), P, chart.entries(P))
    W, nodes = np.asarray(chart.weights(spread, P)), chart.nodes(P)
    a = ref.tokens(7, 1, d)[0]
    for degree in (0, 1, 2, 7, 15):
        exact = np.sum(w * (y @ a) ** degree)
        np.testing.assert_allclose(np.sum(W * (nodes @ a) ** degree), exact, atol=1e-13)
    table = np.random.default_rng(1).normal(size=(chart.entries(P), 1))
    read = chart.interpolate(jnp.asarray(table), jnp.asarray(y), P)[:, 0]
    np.testing.assert_allclose(np.dot(spread, table[:, 0]), np.dot(w, read), atol=1e-11)


# ------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("tol", [0.0, -1e-3, float("nan")])
def test_tol_must_be_positive(tol):
    with pytest.raises(ValueError, match=r"`tol` must be .*1e-10 is the default"):
        mf.Harmonic(tol)
    with pytest.raises(ValueError, match="`tol` must be"):
        mf.Auto(tol)


def test_what_harmonics_cannot_do_is_refused_with_the_cure():
    """A tol below the dtype, d > 3, κ beyond `max_modes`, points off the sphere."""
    x32, x64 = (
        jnp.asarray(ref.tokens(0, 20, 3), dtype) for dtype in (np.float32, np.float64)
    )
    mu32, mu64 = mf.Empirical(x32), mf.Empirical(x64)
    with pytest.raises(
        ValueError, match=r"`tol` must be at least 9.5e-07 .*float64 tokens"
    ):
        mf.Harmonic(1e-8).at(x32, mu32)
    high = jnp.asarray(ref.tokens(0, 20, 5))
    with pytest.raises(ValueError, match=r"d = 5: .*Use `Auto\(\)` or `Blockwise\(\)`"):
        mf.Harmonic().at(high, mf.Empirical(high))
    with pytest.raises(Exception, match=r"`max_modes` must be large enough .*but is 8"):
        mf.Harmonic(1e-10, 8).at(100 * x64, mu64)
    eye = np.eye(3)
    field = mf.SelfAttention(eye, eye, eye, 100.0, partition=mf.Harmonic(1e-10, 8))
    with pytest.raises(Exception, match=r"`max_modes` must be large enough .*Blockwise"):
        field.velocity(x64, mu64)
    with pytest.raises(ValueError, match=r"must not be `Harmonic` here"):
        mf.PolarizedConsensus(lambda x: x[0], np.eye(2), 1.0, partition=mf.Harmonic())


# ------------------------------------------------------------------------------- kernels


KERNELS = {
    "exponential": lambda q: jnp.exp(5 * (q - 1)) / 5,
    "cubic": lambda q: q**3 - q,
    "rational": lambda q: 1 / (1.5 - q),
}


@pytest.mark.parametrize("d", [2, 3, 5])
def test_kernel_interaction_is_the_sum_over_pairs(d):
    """χ(x) = P_x Σⱼ wⱼ W'(⟨x,yⱼ⟩) yⱼ with W' by hand; blocks, and harmonics for d = 2, 3."""
    slopes = {
        "exponential": lambda q: np.exp(5 * (q - 1)),
        "cubic": lambda q: 3 * q**2 - 1,
        "rational": lambda q: (1.5 - q) ** -2.0,
    }
    y, w, x = ref.tokens(0, 90, d), ref.weights(0, 90, zeros=9), ref.tokens(1, 7, d)
    mu = mf.Empirical(y, w)
    for name, W in KERNELS.items():
        force = (slopes[name](x @ y.T) * w) @ y
        exact = force - np.sum(force * x, axis=1, keepdims=True) * x
        ways = [mf.Dense(), mf.Blockwise(32), None]
        for how in ways if d > 3 else [*ways, mf.Harmonic(1e-10, SMALL[d])]:
            found = mf.KernelInteraction(W, partition=how).velocity(x, mu)
            np.testing.assert_allclose(found, exact, rtol=0, atol=2e-10, err_msg=name)


def test_exponential_kernel_is_unnormalised_attention():
    """W(q) = e^{β(q−1)}/β gives (USA) with Q = K = V = I in shifted units."""
    y, eye = jnp.asarray(ref.tokens(0, 200, 2)), np.eye(2)
    usa = mf.UnnormalizedSelfAttention(eye, eye, eye, 5.0, unit="shifted")
    kernel = mf.KernelInteraction(KERNELS["exponential"], d=2, partition=mf.Harmonic())
    mu = mf.Empirical(y)
    np.testing.assert_allclose(kernel.velocity(y, mu), usa.velocity(y, mu), atol=1e-10)


def test_kernel_interaction_climbs_its_energy_and_is_differentiable_in_w():
    """dE/dt = Σ wᵢ |χᵢ|²; gradients through the series in tokens and in W's own numbers agree
    with those over all pairs."""

    class Power(eqx.Module):
        scale: jax.Array

        def __call__(self, q):
            return jnp.exp(self.scale * (q - 1))

    y = jnp.asarray(ref.tokens(3, 80, 2))
    mu, W = mf.Empirical(y), Power(jnp.asarray(4.0))
    chi = mf.KernelInteraction(W).velocity(y, mu)
    energy = mf.observables.KernelEnergy(W)

    def along(s):
        moved = y + s * chi
        moved = moved / jnp.linalg.norm(moved, axis=1, keepdims=True)
        return energy(mf.Empirical(moved, check=False))

    np.testing.assert_allclose(
        jax.grad(along)(0.0), jnp.sum(mu.weights * jnp.sum(chi**2, 1)), rtol=1e-10
    )

    def loss(W, y, how):
        y = y / jnp.linalg.norm(y, axis=1, keepdims=True)
        field = mf.KernelInteraction(W, partition=how)
        return jnp.sum(field.tangent(y, mf.Empirical(y, check=False)) ** 3)

    found, exact = (
        jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)(W, y, how)
        for how in (mf.Harmonic(1e-10, 63), mf.Dense())
    )
    close(found, exact, 1e-8)


def test_kernels_that_are_not_smooth_are_summed_over_pairs_or_refused():
    """|q − 0.3|^{3/2} has no short series: `Harmonic` says so, `Auto` sums all pairs."""
    y = jnp.asarray(ref.tokens(0, 2100, 2))
    mu = mf.Empirical(y)

    def rough(q):
        return jnp.abs(q - 0.3) ** 1.5

    exact = mf.KernelInteraction(rough, partition=mf.Blockwise()).velocity(y[:5], mu)
    field = mf.KernelInteraction(rough)
    np.testing.assert_allclose(field.velocity(y, mu)[:5], exact, atol=1e-13)
    with pytest.raises(Exception, match=r"`W` must be so smooth"):
        mf.KernelInteraction(rough, partition=mf.Harmonic()).velocity(y[:5], mu)

    def spike(q):
        """Between the nodes of every quadrature but for q = 1."""
        return jnp.exp(1e8 * (q - 1)) / 1e8

    with pytest.raises(Exception, match=r"`W` must be so smooth"):
        mf.KernelInteraction(spike, partition=mf.Harmonic()).velocity(y[:5], mu)


# ---------------------------------------------------------------------------------- Auto


def test_auto_chooses_by_numbers_dimension_and_concentration():
    """All pairs for few tokens, d > 3, large κ with few tokens; harmonics for many."""
    auto, f64 = mf.Auto(), np.dtype(np.float64)
    assert auto.choose(1024, 1024, 2, f64) == mf.Dense()
    assert auto.choose(1024, 5000, 5, f64) == mf.Blockwise()
    assert mf.Auto(exact=True).choose(10**6, 10**6, 2, f64) == mf.Blockwise()
    chosen = {
        (d, beta, n): type(auto.prepared(beta * np.eye(d), n, n, f64))
        for d, beta, n in (
            (2, 50, 10**4),
            (3, 30, 10**5),
            (3, 250, 3000),
            (3, 1e5, 10**6),
        )
    }
    assert list(chosen.values()) == [mf.Harmonic, mf.Harmonic, mf.Blockwise, mf.Blockwise]


def test_auto_takes_all_pairs_while_running_where_they_are_faster():
    """With β unknown to the compiler: κ = 5 by harmonics, κ = 250 over all pairs."""
    x = jnp.asarray(ref.tokens(0, 4000, 3))
    mu = mf.Empirical(x)
    for beta, modes in ((5.0, 23), (250.0, 0)):
        found, report = both(mf.Auto(), x, beta * jnp.eye(3), mu)
        close(found, mf.Blockwise()(x, beta * jnp.eye(3), mu), 1e-9)
        assert (int(report["modes"]) > 0) == (modes > 0)
