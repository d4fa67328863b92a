"""`diffuse`: Brownian motion on the sphere, stationary laws, Itô's sense of noise that
depends on the state, orders in the step, and what a run returns.

Statistical tolerances are 5 standard deviations of the mean at a fixed key: one such check
fails by chance for one key in 1.7 million. Where the bias of the step counts, it is removed
by extrapolation, or is itself what is tested."""

import functools
import math

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy import stats
from scipy.linalg import expm
from scipy.optimize import brentq
from scipy.special import ive

import reference as ref
from meanformer import (
    Empirical,
    LayerStack,
    SelfAttention,
    Uniform,
    ZeroTemperature,
    solve,
)
from meanformer.blocks import FeedForward
from meanformer.consensus import PolarizedConsensus
from meanformer.flow import diffuse

KEY = jr.key(7)


N = 20_000  # one size, so that tests share their programs


def same(a):
    return a


def affine(a, A=None):
    """The field with F(x) = Ax + a."""
    d = len(a)
    A = np.zeros((d, d)) if A is None else A
    return FeedForward(A, np.zeros(d), np.eye(d), a, same)


@functools.partial(jax.jit, static_argnames=("solver",))
def end(field, x0, t, sigma, step, key, solver=None):
    """The tokens at time t (one program for all times, σ and steps)."""
    ts = jnp.stack([0 * t, t])
    run = diffuse(
        field, x0, ts, noise=sigma, key=key, step=step, save="last", solver=solver
    )
    return run.xs[-1]


def run_to(field, x0, t, sigma, step, key=KEY, solver=None):
    t, sigma, step = (jnp.asarray(v, jnp.result_type(x0)) for v in (t, sigma, step))
    return np.asarray(end(field, jnp.asarray(x0), t, sigma, step, key, solver))


def assert_mean(samples, expected):
    """The mean of independent samples, to 5 standard deviations of the mean."""
    slack = 5 * np.std(samples, axis=0) / math.sqrt(len(samples))
    error = np.abs(np.mean(samples, axis=0) - expected)
    assert np.all(error <= slack), (error, slack)


# ---------------------------------------------------------------- Brownian motion


def test_brownian_motion_on_the_circle_is_exact_in_law_at_any_step():
    """d = 2, no drift: E x = e^{−σ²t/2} x₀ and E cos 2θ = e^{−2σ²t}, in one step or ten."""
    sigma, t = 0.8, 1.5
    x0 = np.tile([1.0, 0.0], (N, 1))
    for step in (t, t / 10):
        x = run_to(affine([0.0, 0.0]), x0, t, sigma, step)
        assert_mean(x, [math.exp(-(sigma**2) * t / 2), 0])
        assert_mean(x[:, 0] ** 2 - x[:, 1] ** 2, math.exp(-2 * sigma**2 * t))


def test_means_of_brownian_motion_decay_by_its_eigenvalues_with_weak_order_one():
    """d = 3: steps along geodesics of normal length multiply E x by E cos(σ√h χ) each, χ of
    d − 1 degrees of freedom, and the second harmonic by the mean of its own: with steps so
    large that the bias is seen. The bias of these products to e^{−σ²(d−1)t/2} and
    e^{−σ²dt} is C h: weak order 1."""
    d, sigma, t = 3, 1.0, 1.0
    x0 = np.tile([1.0, 0.0, 0.0], (N, 1))
    chi = stats.chi(d - 1)

    def product(f, h):
        return chi.expect(lambda r: f(np.cos(sigma * math.sqrt(h) * r))) ** (t / h)

    def second(q):
        return (q**2 - 1 / d) / (1 - 1 / d)

    for h in (1.0, 0.5, 0.25):
        x = run_to(affine(np.zeros(d)), x0, t, sigma, h)
        assert_mean(x, [product(lambda q: q, h), 0, 0])
        assert_mean(second(x[:, 0]), product(second, h))
    steps = (1 / 8, 1 / 16, 1 / 32)
    for f, rate in ((lambda q: q, (d - 1) / 2), (second, d)):
        bias = [abs(product(f, h) - math.exp(-rate * sigma**2 * t)) for h in steps]
        assert 0.9 < ref.fitted_order(steps, bias) < 1.1
    assert abs(product(lambda q: q, 1.0) - math.exp(-1)) > 0.05


def test_the_uniform_law_is_stationary_without_drift():
    """Mean 0, covariance I/d, and E⟨x₀,x_t⟩ = e^{−σ²(d−1)t/2}, for any step (the law of a
    step does not know a direction)."""
    d, sigma, t = 3, 0.6, 1.0
    x0 = np.asarray(Uniform(d).sample(jr.key(1), N))
    x = run_to(affine(np.zeros(d)), x0, t, sigma, 0.05)
    assert_mean(x, 0)
    assert_mean(x[:, :, None] * x[:, None, :], np.eye(d) / d)
    fine = run_to(affine(np.zeros(d)), x0, t, sigma, 0.025)
    kept = [np.sum(x0 * y, axis=1) for y in (x, fine)]
    assert_mean(2 * kept[1] - kept[0], math.exp(-(sigma**2) * (d - 1) * t / 2))


# ----------------------------------------------------------------- stationary laws


@pytest.mark.parametrize("d", [2, 3])
def test_a_constant_pull_has_a_von_mises_fisher_law(d):
    """Drift P_x a with noise σ ends in the density ∝ e^{2⟨a,x⟩/σ²}: the distribution of
    ⟨x,a⟩/|a| by Kolmogorov and Smirnov, against quadrature, from the uniform law. The
    density with half or twice that κ is 0.1 away."""
    sigma = 0.9
    a = np.arange(1.0, d + 1)
    kappa = 2 * np.linalg.norm(a) / sigma**2
    x0 = Uniform(d).sample(jr.key(2), N)
    x = run_to(affine(a), x0, 4.0, sigma, 0.02)
    q = x @ a / np.linalg.norm(a)

    def cdf(kappa):
        s = np.linspace(0, np.pi, 20_001)  # angles to −a
        f = np.exp(kappa * (-np.cos(s) - 1)) * np.sin(s) ** (d - 2)
        total = np.concatenate([[0], np.cumsum((f[1:] + f[:-1]) / 2)])
        return lambda q: np.interp(np.arccos(np.clip(-q, -1, 1)), s, total / total[-1])

    # 2.5/√n is exceeded by chance once in 10⁵ times; 0.005 for the bias of the step.
    allowed = 2.5 / math.sqrt(N) + 0.005
    assert stats.kstest(q, cdf(kappa)).statistic < allowed
    for wrong in (kappa / 2, 2 * kappa):
        assert stats.kstest(q, cdf(wrong)).statistic > 2 * allowed


def test_noisy_zero_temperature_attention_has_a_bingham_law():
    """Q = K = I: χ = P_x V x, for symmetric V half the gradient of ⟨x,Vx⟩: density
    ∝ e^{⟨x,Vx⟩/σ²}, E x_i² against quadrature over S², bias removed by extrapolation."""
    sigma = 0.8
    values = np.array([1.0, 0.2, -0.5])
    field = ZeroTemperature(np.eye(3), np.eye(3), np.diag(values))
    x0 = Uniform(3).sample(jr.key(3), N)
    coarse, fine = (run_to(field, x0, 6.0, sigma, h) ** 2 for h in (0.04, 0.02))
    z, wz = np.polynomial.legendre.leggauss(60)
    phi = np.arange(120) * 2 * np.pi / 120
    z, phi = np.meshgrid(z, phi, indexing="ij")
    rho = np.sqrt(1 - z**2)
    squares = np.stack([(rho * np.cos(phi)) ** 2, (rho * np.sin(phi)) ** 2, z**2])
    density = wz[:, None] * np.exp(np.tensordot(values, squares, 1) / sigma**2)
    expected = np.sum(squares * density, axis=(1, 2)) / np.sum(density)
    assert_mean(2 * fine - coarse, expected)


@functools.partial(jax.jit, static_argnums=(1, 2))
def order_parameters(sigma, n, seeds):
    """|mean of the tokens| at time 6 of noisy attention with β = 0 on the circle."""
    field = SelfAttention(*[np.eye(2)] * 3, 0.0)

    def one(key):
        start, noise = jr.split(key)
        first = jnp.asarray([1.0, 0.0])
        x0 = jnp.where(sigma < 1, jnp.tile(first, (n, 1)), Uniform(2).sample(start, n))
        run = diffuse(
            field, x0, [0.0, 6.0], noise=sigma, key=noise, step=0.05, save="last"
        )
        return jnp.linalg.norm(run.xs[-1].mean(axis=0))

    return jax.vmap(one)(jr.split(KEY, seeds))


def test_noisy_averaging_is_ordered_below_its_transition_only():
    """β = 0, V = I, d = 2 (Kuramoto with noise): below σ² = 2/d tokens agree to
    r = I₁(2r/σ²)/I₀(2r/σ²), up to O(1/n); above, n E r² = σ²/(σ² − 2/d), the fluctuations
    of the linearised mean, where independent tokens have 1."""
    n, seeds = 60, 100
    ordered = np.asarray(order_parameters(jnp.sqrt(0.5), n, seeds))
    r = brentq(lambda r: ive(1, 4 * r) / ive(0, 4 * r) - r, 0.1, 1)
    slack = 5 * ordered.std() / math.sqrt(seeds) + 1 / n
    assert abs(ordered.mean() - r) < slack < 0.1
    free = n * np.asarray(order_parameters(jnp.sqrt(2.0), n, seeds)) ** 2
    assert_mean(free, 2.0)
    assert free.mean() > 1.3


# ------------------------------------------------- noise that depends on the state


@functools.partial(jax.jit, static_argnums=(0, 1))
def pulled(d, samples, sigma, step, key):
    """1 − ⟨x,c⟩ at time 1 for particles without mass, from 0.7, pulled by one at c."""
    field = PolarizedConsensus(lambda y: -y[0], np.zeros((d, d)), 2.0)
    c, e = np.eye(d)[:2]
    x0 = Empirical(np.stack([c, 0.3 * c + math.sqrt(1 - 0.09) * e]), [1, 0], check=False)

    def one(key):
        run = diffuse(field, x0, [0.0, 1.0], noise=sigma, key=key, step=step, save="last")
        return 1 - run.xs[-1, 1, 0]

    return jax.vmap(one)(jr.split(key, samples))


def test_consensus_noise_is_in_the_sense_of_ito():
    """One heavy particle at c: p = 1 − ⟨x,c⟩ obeys dE p/dt = E[−(2−p)p + σ²(d−1)(1−p)p],
    which for σ² = 1/(d−1) is −E p, so that E p = e^{−t} p₀. Stratonovich's reading adds the
    drift σ²p(2−p)/2 and ends at 0.347 in place of 0.258. Weak order 1: extrapolation
    of two steps is exact to O(h²)."""
    d, samples, t = 3, 60_000, 1.0
    sigma = jnp.sqrt(1 / (d - 1))
    coarse, fine = (
        np.asarray(pulled(d, samples, sigma, jnp.asarray(h), k))
        for h, k in zip((0.1, 0.05), jr.split(KEY))
    )
    expected = 0.7 * math.exp(-t)
    assert_mean(2 * fine - coarse, expected)
    assert 5 * np.std(2 * fine - coarse) / math.sqrt(samples) < 0.07 / 2


def test_noisy_consensus_stays_on_the_sphere_and_finds_the_minimum():
    """All particles with mass: norms 1 to rounding; noise dies out with the distance to the
    consensus point, which ends near the minimum of f."""
    a = np.array([0.6, 0.0, 0.8])
    field = PolarizedConsensus(lambda y: -y @ jnp.asarray(a), np.zeros((3, 3)), 30.0)
    x0 = ref.tokens(0, 50, 3)
    run = diffuse(field, x0, [0.0, 5.0, 10.0], noise=0.5, key=KEY, step=0.05)
    norms = np.linalg.norm(run.xs, axis=-1)
    assert np.abs(norms - 1).max() <= 4 * ref.EPS64
    assert np.all(run.xs[-1] @ a > 0.95)


# ---------------------------------------------------------------- order in the step


def test_strong_order_is_one_half_on_one_path():
    """The mean distance to a run 32 times finer on the same Brownian path: slope between
    0.4 and 0.7 (the fields P e_k do not commute), for noise that depends on the state."""
    n, d = 100, 3
    anchor = np.eye(d)[:1]
    x0 = Empirical(np.concatenate([anchor, ref.tokens(0, n, d)]), np.eye(n + 1)[0])
    field = PolarizedConsensus(lambda y: -y[0], np.zeros((d, d)), 1.0)
    shape = jax.ShapeDtypeStruct((n + 1, d), jnp.dtype("float64"))
    path = dfx.VirtualBrownianTree(0.0, 1.0, 2**-11, shape, KEY)

    @jax.jit
    def at(step):
        run = diffuse(field, x0, [0.0, 1.0], noise=0.7, path=path, step=step, save="last")
        return run.xs[-1]

    best = at(jnp.asarray(2.0**-10))
    steps = [2.0**-k for k in (2, 3, 4, 5)]
    errors = [float(jnp.mean(jnp.linalg.norm(at(h) - best, axis=1))) for h in steps]
    assert 0.4 < ref.fitted_order(steps, errors) < 0.7


def test_without_noise_it_is_the_flow():
    """σ = 0, χ = P_x A x: Euler along geodesics has order 1 (slope 1 ± 0.1) against
    e^{At}x/|·|, and Heun is `solve` with Heun, to rounding."""
    A, x0 = ref.matrices(0, 3)[2], ref.tokens(0, N, 3)
    exact = x0 @ expm(A).T
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    field, steps = affine(np.zeros(3), A), [1 / 20, 1 / 40, 1 / 80]
    errors = [np.abs(run_to(field, x0, 1.0, 0.0, h) - exact).max() for h in steps]
    assert 0.9 < ref.fitted_order(steps, errors) < 1.1
    heun = run_to(field, x0, 1.0, 0.0, 0.125, solver=dfx.Heun())
    other = solve(field, x0, [0.0, 1.0], step=0.125, solver=dfx.Heun()).xs[-1]
    np.testing.assert_allclose(heun, other, rtol=0, atol=1e-14)


def test_stratonovich_methods_have_the_same_law_for_constant_noise():
    """Heun, which converges to dx = χ dt + σP∘dB: the mean of Brownian motion on S²."""
    sigma, t = 0.8, 1.0
    x0 = np.tile([1.0, 0.0, 0.0], (N, 1))
    field = affine(np.zeros(3))
    coarse, fine = (
        run_to(field, x0, t, sigma, h, k, dfx.Heun())
        for h, k in zip((0.1, 0.05), jr.split(KEY))
    )
    assert_mean(2 * fine - coarse, [math.exp(-(sigma**2) * t), 0, 0])


# ------------------------------------------------------------------ what a run returns

FIELD = affine([0.3, -0.2, 0.5])
X0 = ref.tokens(0, 8, 3)
TS = [0.0, 0.3, 0.47, 1.0]
ARGUMENTS = {"noise": 0.5, "key": KEY, "step": 0.1}
SEEN = {"mean": lambda mu: mu.mean(mu.points)}


def test_the_same_key_gives_the_same_numbers():
    """Also with a bar, and within a batch; another key gives
    others."""
    run = diffuse(FIELD, X0, TS, observables=SEEN, **ARGUMENTS)
    bar = diffuse(FIELD, X0, TS, observables=SEEN, progress=True, **ARGUMENTS)
    for got, expected in zip(jax.tree.leaves(bar), jax.tree.leaves(run)):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-15)
    np.testing.assert_allclose(run.observed["mean"], run.xs.mean(1), rtol=0, atol=1e-15)
    assert int(run.stats["steps"]) == 3 + 2 + 6  # each interval in equal steps ≤ 0.1
    keys = jnp.stack([KEY, jr.key(8)])
    batch = jax.vmap(lambda k: diffuse(FIELD, X0, TS, **{**ARGUMENTS, "key": k}).xs)(keys)
    np.testing.assert_allclose(batch[0], run.xs, rtol=0, atol=1e-14)
    assert np.abs(batch[1, 1:] - batch[0, 1:]).min(axis=(1, 2)).max() > 1e-4


def test_a_run_of_no_duration_is_its_start():
    run = diffuse(FIELD, X0, [2.0], observables=SEEN, **ARGUMENTS)
    np.testing.assert_array_equal(run.xs[0], X0)


def test_increments_of_steps_are_independent_normal_numbers():
    """One token, σ small: the moves of 4000 steps are normal of variance σ²h in each
    tangential direction, uncorrelated from step to step."""
    n, sigma, h = 4000, 1e-4, 0.01
    ts = np.arange(n + 1) * h
    field, x0 = affine([0.0, 0.0]), np.array([[1.0, 0.0]])
    run = diffuse(field, x0, ts, noise=sigma, key=KEY, step=h)
    moves = np.diff(np.arctan2(run.xs[:, 0, 1], run.xs[:, 0, 0])) / (sigma * math.sqrt(h))
    assert stats.kstest(moves, "norm").pvalue > 1e-5
    assert abs(np.mean(moves[1:] * moves[:-1])) < 5 / math.sqrt(n)


def test_a_stack_of_layers_is_noisy_layer_by_layer():
    """The layer in force is that of the step. On the circle θ̇ = a cos θ has
    sin θ = tanh(a t): with a = 2, then −1, the ends are tanh 2 and tanh 1, up to the bias of
    the step and a little noise."""
    stack = LayerStack([affine([0.0, 2.0]), affine([0.0, -1.0])])
    x0 = np.array([[1.0, 0.0]])
    run = diffuse(stack, x0, [0, 1, 2], noise=1e-4, key=KEY, step=1 / 200)
    np.testing.assert_allclose(run.xs[1:, 0, 1], np.tanh([2, 1]), rtol=0, atol=0.01)


def test_gradients_at_a_fixed_path():
    """To the parameters of the field, σ and the tokens: central differences with the same
    key, for a field whose noise depends on the state."""

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1, 2))
    def loss(a, sigma, x0):
        objective = Tilted(a)
        field = PolarizedConsensus(objective, jnp.eye(3), 3.0)
        run = diffuse(field, x0, [0.0, 0.3], noise=sigma, key=KEY, step=0.1, save="last")
        return jnp.sum(jnp.asarray(ref.tokens(5, 8, 3)) * run.xs[-1])

    at = [jnp.asarray([1.0, -0.5, 0.3]), jnp.asarray(0.6), jnp.asarray(X0)]
    gradients = loss(*at)[1]
    for i, g in enumerate(gradients):
        v = np.random.default_rng(i).normal(size=g.shape)
        if i == 2:  # along the sphere
            v = v - np.sum(v * X0, axis=1, keepdims=True) * X0

        def along(s, i=i, v=v):
            moved = at[i] + s * v
            if i == 2:
                moved = moved / jnp.linalg.norm(moved, axis=1, keepdims=True)
            return float(loss(*at[:i], moved, *at[i + 1 :])[0])

        slope = ref.slope(along, 1e-3)
        assert abs(slope) > 1e-4
        assert abs(np.sum(g * v) - slope) <= 1e-8 * (1 + abs(slope))


class Tilted(eqx.Module):
    """x ↦ ⟨a, x⟩."""

    a: jax.Array

    def __call__(self, x):
        return self.a @ x


def test_float32_tokens_stay_float32():
    """On the sphere to rounding, and time and noise follow."""
    x0 = np.float32(X0)
    run = diffuse(FIELD, x0, TS, **ARGUMENTS)
    assert run.xs.dtype == run.ts.dtype == np.float32
    norms = np.linalg.norm(np.asarray(run.xs, float), axis=-1)
    assert np.abs(norms - 1).max() <= 4 * ref.EPS32


# ------------------------------------------------------------------------- refusals

CONSENSUS = PolarizedConsensus(lambda y: -y[0], np.zeros((3, 3)), 1.0)
NARROW = dfx.VirtualBrownianTree(0.0, 1.0, 0.01, (4, 3), KEY)
BAD = {
    "noise < 0": ({"noise": -1.0}, "`noise` must be finite and ≥ 0"),
    "step 0": ({"step": 0.0}, "`step` must be finite and > 0"),
    "no key": ({"key": None}, "`key` and `path` .* none is"),
    "key and path": ({"path": NARROW}, "`key` and `path` .* both are"),
    "path of another shape": ({"key": None, "path": NARROW}, r"`path` .* \(8, 3\)"),
    "times back": ({"ts": [1.0, 0.0]}, "`ts` must increase"),
    "another method": ({"solver": dfx.Tsit5()}, "`solver` must be `GeodesicEuler"),
    "Stratonovich for its own amplitude": (
        {"field": CONSENSUS, "solver": dfx.Heun()},
        "`solver` must not be Heun .* Stratonovich",
    ),
    "back-solving": ({"adjoint": dfx.BacksolveAdjoint()}, "`adjoint` must not be"),
    "tokens of another d": ({"x0": np.eye(2)}, "`x0` must have d = 3"),
    "save": ({"save": "some"}, "`save` must be"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused(name):
    """A `ValueError` that names the argument, and says how it should be."""
    change, message = BAD[name]
    arguments = {"field": FIELD, "x0": X0, "ts": [0.0, 1.0], **ARGUMENTS} | change
    with pytest.raises(ValueError, match=message):
        diffuse(**arguments)


def test_runs_that_fail_say_so():
    """Steps used up: a `RuntimeError` that says how far the run came, or a flag."""
    with pytest.raises(RuntimeError, match=r"`diffuse` used up max_steps = 5 .* `step`"):
        diffuse(FIELD, X0, [0.0, 1.0], max_steps=5, **ARGUMENTS)
    run = diffuse(FIELD, X0, [0.0, 1.0], max_steps=5, throw=False, **ARGUMENTS)
    assert bool(run.stats["failed"])
