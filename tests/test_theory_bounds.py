"""Bounds against measured suprema, simulated flows, mpmath and brute-force minimisation.
Each inequality has one named case in which it is nearly attained, and why."""

import functools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import scipy.integrate
import scipy.optimize

import meanformer as mf
from helpers import random_rotation, random_tokens, relative_errors, sphere_area
from meanformer import theory

I2, I3 = np.eye(2), np.eye(3)
TURN = np.array([[0.0, -1.0], [1.0, 0.0]])
TS = np.array([0.0, 0.3, 1.0, 3.0])


def random_case(d, seed):
    """Random Q, K, V and β between 1 and 100 (log-uniform)."""
    rng = np.random.default_rng([d, seed])
    Q, K, V = rng.normal(size=(3, d, d)) / np.sqrt(d)
    return Q, K, V, float(10 ** rng.uniform(0, 2))


@functools.cache
def run(d, seed, n=60):
    """Tokens of (SA) at the times TS, shape (t, n, d), by Euler steps of 0.02, and the field
    (normalised layers: the inequalities hold for every configuration)."""
    field = mf.SelfAttention(*random_case(d, seed), partition=mf.Dense())
    x0 = random_tokens(np.random.default_rng(seed), n, d)
    layers = [round(t / 0.02) for t in TS]
    return field, mf.unroll(field, x0, layers[-1], 0.02, save=layers).xs


@jax.jit
def slopes(field, x, mu):
    """Largest speed, and largest norm of the differential on the tangent space, at x."""

    def at(y):
        return field.tangent(y[None], mu)[0]

    def differential(y):
        J = jax.jacfwd(at)(y) @ (jnp.eye(y.size) - jnp.outer(y, y))
        return jnp.sqrt(jnp.linalg.eigvalsh(J @ J.T)[-1])

    speed = jnp.linalg.norm(jax.vmap(at)(x), axis=-1)
    return jnp.stack([speed.max(), jax.vmap(differential)(x).max()])


@jax.jit
def bend(field, x, mu, key):
    """Largest second derivative along one random great circle through each x."""
    g = jax.random.normal(key, x.shape)
    xi = mf.sphere.normalise(mf.sphere.project(x, g))

    def along(s):
        return field.tangent(jnp.cos(s) * x + jnp.sin(s) * xi, mu)

    second = jax.jacfwd(jax.jacfwd(along))(0.0)
    return jnp.linalg.norm(second, axis=-1).max()


# --------------------------------------------------------------- the field and its slopes


@pytest.mark.parametrize("d", [2, 3, 5])
def test_field_bounds_hold_along_runs(d):
    """|χ|, |Dχ| and |χ''| on great circles stay below `field_bounds`, at the tokens and
    at random points, for random Q, K, V and β from 1 to 100."""
    for seed in range(4):
        field, xs = run(d, seed)
        bound = theory.field_bounds(field.Q, field.K, field.V, field.beta)
        limit = np.array([bound.speed, bound.slope, bound.curvature])
        rng = np.random.default_rng(seed)
        for i, x in enumerate(xs):
            points = jnp.concatenate([x, random_tokens(rng, len(x), d)])
            mu = mf.Empirical(x)
            values = [*slopes(field, points, mu), bend(field, x, mu, jax.random.key(i))]
            assert np.all(values <= limit * (1 + 1e-9)), (seed, TS[i])


def test_field_bounds_are_nearly_attained_by_two_antipodal_tokens():
    """Named case: µ = ½δ_z + ½δ_−z, Q = K = V = I on S¹, x ⊥ z. Both tokens weigh the same,
    Cov(ν) = zzᵀ has norm 1, its largest, and |Dχ| = β against β + 1/4β: slack below 1.01 for
    β = 10. The speed is attained where all mass is at one point, at 90° (slack 1). Second
    derivative: the third cumulant is largest for weights (1 ± 1/√3)/2: slack below 1.45."""
    beta = 10.0
    field = mf.SelfAttention(I2, I2, I2, beta, partition=mf.Dense())
    bound = theory.field_bounds(I2, I2, I2, beta)
    z = np.tile([[1.0, 0.0], [-1.0, 0.0]], (30, 1))  # shapes as above: nothing to compile
    x = jnp.asarray(np.tile([0.0, 1.0], (120, 1)))

    def mu(p):
        return mf.Empirical(z, np.tile([p, 1 - p], 30))

    slope = slopes(field, x, mu(0.5))[1]
    np.testing.assert_allclose(slope, beta, rtol=1e-12)
    assert bound.slope / slope < 1.01
    speed = slopes(field, x, mu(1.0))[0]
    np.testing.assert_allclose(speed, bound.speed, rtol=1e-12)
    curvature = bend(field, x[:60], mu((1 - 3**-0.5) / 2), jax.random.key(0))
    assert curvature <= bound.curvature < 1.45 * curvature


def test_slope_is_bounded_uniformly_in_beta_by_the_ratio_of_a_density():
    """|Dχ| ≤ ‖V‖(ratio·cond B·A_d(βσ_d) + 1) for von Mises–Fisher laws by quadrature, with
    V a rotation; named case: the uniform law with V a turn and B = I, where |Dχ| = A(β),
    half of the bound A(β) + 1, because Cov(ν) is that of the bound."""
    for kappa, B in [(0.0, I2), (0.5, I2), (1.0, np.diag([1.0, 0.4]))]:
        law = mf.VonMisesFisher([1.0, 0.0], kappa)
        low, high = theory.density_range(law)
        mu = mf.Uniform(2).nodes(2000)
        mu = mf.Empirical(mu.points, law.density(mu.points))
        for beta in (1.0, 30.0, 300.0):
            field = mf.SelfAttention(I2, B, TURN, beta, partition=mf.Dense())
            bound = theory.field_bounds(I2, B, TURN, beta, ratio=high / low)
            assert bound.slope <= float(high / low) * np.linalg.cond(B) + 1
            x = mf.Uniform(2).nodes(120).points
            slope = slopes(field, x, mu)[1]
            assert slope <= bound.slope * (1 + 1e-9), (kappa, beta)
            if kappa == 0:
                assert bound.slope / slope < (2.05 if beta > 1 else 3.3)


def test_zero_temperature_field_is_lipschitz():
    """|Dχ_∞| ≤ ‖V‖(1 + cond B) at random points, d = 2 and 4; named case, attained: V =
    diag(1, −1), B = diag(5, 1) at the singular vector x = e₂ of σ_d, where the differential
    of Bᵀx/|Bᵀx| is cond B and both of its terms point along e₁."""
    for d in (2, 4):
        x = jnp.asarray(random_tokens(np.random.default_rng(d), 300, d))
        mu = mf.Empirical(x[:1])
        for seed in range(4):
            Q, K, V, _ = random_case(d, seed)
            slope = slopes(mf.ZeroTemperature(Q, K, V), x, mu)[1]
            assert slope <= theory.zero_temperature_lipschitz(Q, K, V)
    V = np.diag([1.0, -1.0])
    field = mf.ZeroTemperature(I2, np.diag([5.0, 1.0]), V)
    x = jnp.asarray(np.tile([0.0, 1.0], (300, 1)))
    slope = slopes(field, x, mf.Empirical(x[:1]))[1]
    bound = theory.zero_temperature_lipschitz(field.Q, field.K, V)
    np.testing.assert_allclose(bound, slope, rtol=1e-12)


# ------------------------------------------------------------------------------ Dobrushin


@jax.jit
def change_of_field(matrices, beta, x, y, z, w):
    """|χ[µ](x) − χ[ν](x)| for µ = Σ wⱼδ(yⱼ), ν = Σ wⱼδ(zⱼ)."""
    Q, K, V = matrices
    u = beta * (x @ Q.T @ K)
    m = [_tilted(u, p, w) for p in (y, z)]
    return jnp.linalg.norm(mf.sphere.project(x, (m[0] - m[1]) @ V.T), axis=-1)


def _tilted(u, y, w):
    share = jax.nn.softmax(u @ y.T + jnp.log(w), axis=-1)
    return share @ y


@pytest.mark.parametrize("beta", [0.0, 0.5, 2.0, 5.0])
def test_field_is_lipschitz_in_the_law(beta):
    """|χ[µ](x) − χ[ν](x)| ≤ L_µ W₁(µ, ν), where W₁ is at most the mean distance of paired
    tokens, for random measures. Named case: B a quarter turn and V = I on S¹, so that nothing
    is projected away; µ and ν have e^{−2β}/10⁴ of their mass at angles φ and φ + dφ from v,
    the rest at −v, where both e^{κ}/Z and |y − m| are largest. Slack below 2."""
    rng = np.random.default_rng(1)
    for seed in range(20):
        Q, K, V, _ = random_case(3, seed)
        y = random_tokens(rng, 6, 3)
        z = y + 10 ** rng.uniform(-3, 0) * rng.normal(size=y.shape)
        z /= np.linalg.norm(z, axis=1, keepdims=True)
        w = rng.dirichlet(np.full(6, 0.3)) + 1e-9
        w /= w.sum()
        cost = w @ np.arccos(np.clip(np.sum(y * z, 1), -1, 1))
        x = jnp.asarray(random_tokens(rng, 50, 3))
        change = change_of_field((Q, K, V), beta, x, y, z, w)
        log_limit = theory.dobrushin_constants(Q, K, V, beta).log_measure
        assert np.log(change.max()) <= log_limit + np.log(cost) + 1e-9
    grain, step = np.exp(-2 * beta) * 1e-4, 1e-4
    x = jnp.asarray([[1.0, 0.0]])
    v, best, w = TURN[0], 0.0, np.array([1 - grain, grain])  # v = Bᵀx
    for phi in np.linspace(0, np.pi / 2, 60):
        y, z = (
            np.stack([-v, np.cos(a) * v + np.sin(a) * TURN @ v])
            for a in (phi, phi + step)
        )
        change = change_of_field((I2, TURN, I2), beta, x, y, z, w)[0]
        best = max(best, change / (grain * step))
    limit = np.exp(theory.dobrushin_constants(I2, TURN, I2, beta).log_measure)
    assert best <= limit * (1 + 1e-3)
    assert limit / best < 2.0, limit / best


def test_maximum_in_the_dobrushin_constant():
    """log L_µ − log‖V‖ = max_φ b(1 + cos φ) + log(1 + 2b sin φ), by brute force, and its
    asymptote 2b + ½ log(4b/e); it does not overflow at β = 10⁶."""
    phi = np.linspace(0, np.pi / 2, 200_001)
    for b in (0.0, 1e-3, 0.4, 3.0, 700.0):
        value = theory.dobrushin_constants(I2, I2, 3 * I2, b).log_measure - np.log(3)
        brute = np.max(b * (1 + np.cos(phi)) + np.log1p(2 * b * np.sin(phi)))
        np.testing.assert_allclose(value, brute, rtol=1e-8, atol=1e-12)
    far = theory.dobrushin_constants(I2, I2, I2, 1e6)
    np.testing.assert_allclose(far.log_rate, 2e6 + 0.5 * np.log(4e6 / np.e), atol=2e-3)


@pytest.mark.parametrize("seed", range(3))
def test_dobrushin_bound_holds_for_pairs_of_tokens(seed):
    """W₁ of two two-token solutions (exact: the better of two pairings) stays below
    W₁(0)e^{Lt}, and the bound is never above π."""
    Q, K, V, _ = random_case(2, seed)
    rng, beta = np.random.default_rng(seed), 0.5
    y = random_tokens(rng, 2, 2)
    z = y + 1e-3 * rng.normal(size=(2, 2))
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    field = mf.SelfAttention(Q, K, V, beta, partition=mf.Dense())
    layers = [0, 20, 50, 100]
    a, b = (mf.unroll(field, p, 100, 0.01, save=layers).xs for p in (y, z))
    pairings = [mf.sphere.distance(a, b), mf.sphere.distance(a, b[:, ::-1])]
    W1 = np.min(np.mean(np.stack(pairings), -1), 0)
    t = np.array(layers) * 0.01
    log = theory.log_dobrushin_bound(t, W1[0], Q, K, V, beta)
    np.testing.assert_allclose(log[0], np.log(W1[0]), rtol=1e-12)
    assert np.all(np.log(W1) <= log + 1e-9)
    assert np.all(log <= np.log(np.pi))


# ----------------------------------------------------------------- the Laplace principle


@pytest.mark.parametrize(("dtype", "tol"), [(np.float64, 1e-12), (np.float32, 1e-5)])
def test_cap_mass_is_the_incomplete_beta_function(dtype, tol):
    """The uniform mass of a cap is I_{sin²(θ/2)}((d−1)/2, (d−1)/2), from θ = 0 to π."""
    for d in (2, 3, 4, 7, 33, 100, 200):
        angle = np.array([1e-3, 0.1, 0.5, 1.2, 1.5707, 2.0, 3.0, 3.1415], dtype)
        with mpmath.workdps(50):
            half = [mpmath.sin(mpmath.mpf(float(a)) / 2) ** 2 for a in angle]
            a = mpmath.mpf(d - 1) / 2
            exact = [mpmath.betainc(a, a, 0, z, regularized=True) for z in half]
        keep = [i for i, e in enumerate(exact) if e > 1e3 * float(np.finfo(dtype).tiny)]
        value = theory.cap_mass(d, angle)
        assert value.dtype == dtype
        error = relative_errors(value[jnp.asarray(keep)], [exact[i] for i in keep])
        # sin^{d−2}(θ) of a rounded θ is known to (d−2)θ/tan(θ) roundings only.
        assert error.max() <= max(tol, (d + 8) * np.finfo(dtype).eps), d


@pytest.mark.parametrize("d", [2, 3, 6])
def test_cap_mass_has_its_slope_also_at_the_ends(d):
    """d/dθ = |S^{d−2}|/|S^{d−1}| sin^{d−2}θ at 0, inside and at π; second derivatives."""
    around = (2.0 if d == 2 else sphere_area(d - 1)) / sphere_area(d)
    angle = jnp.asarray([0.0, 0.7, 2.5, np.pi])
    slope = jax.vmap(jax.grad(lambda a: theory.cap_mass(d, a)))
    np.testing.assert_allclose(
        slope(angle), around * np.sin(angle) ** (d - 2), atol=1e-12
    )
    second = jax.vmap(jax.grad(lambda a: slope(a[None])[0]))(angle)
    exact = around * (d - 2) * np.sin(angle) ** max(d - 3, 0) * np.cos(angle)
    np.testing.assert_allclose(second, exact, atol=1e-11)


def barycentre_error(x, mu, Q, K, beta):
    """|m_β(x) − v|, in NumPy."""
    u = np.asarray(x) @ np.asarray(Q).T @ np.asarray(K)
    v = u / np.linalg.norm(u, axis=1, keepdims=True)
    y = np.asarray(mu.points)
    logits = beta * (u @ y.T)
    w = np.asarray(mu.weights) * np.exp(logits - logits.max(1, keepdims=True))
    return np.linalg.norm(w @ y / w.sum(1, keepdims=True) - v, axis=1)


@pytest.mark.parametrize("d", [2, 3, 5])
def test_laplace_principle_holds_along_runs(d):
    """|m − v| ≤ √(2(r+q)/|Bᵀx|) + 2e^{−βq}/µ(f ≤ r), optimised and for given r, q."""
    for seed in range(4):
        field, xs = run(d, seed)
        rng = np.random.default_rng(seed)
        for x in xs:
            points = jnp.concatenate([x, random_tokens(rng, len(x), d)])
            mu = mf.Empirical(x)
            error = barycentre_error(points, mu, field.Q, field.K, float(field.beta))
            args = (points, mu, field.Q, field.K, field.beta)
            best = theory.laplace_principle_bound(*args)
            assert np.all(error <= best * (1 + 1e-12))
            given = theory.laplace_principle_bound(*args, r=0.3, q=0.2)
            assert np.all(best <= given * (1 + 1e-12))


def brute_laplace(f, w, s, beta):
    """The least bound over r = f(y_j) and 4000 values of q."""
    order = np.argsort(f)
    r, mass = f[order, None], np.cumsum(w[order])[:, None]
    q = np.geomspace(1e-3, 100, 4000)[None] / beta
    return min(2, np.min(np.sqrt(2 * (r + q) / s) + 2 * np.exp(-beta * q) / mass))


def test_laplace_bound_is_the_least_over_r_and_q():
    """Against a brute-force search, for tokens (r over their values of f) and for a
    density (caps of any size)."""
    rng, beta, d = np.random.default_rng(0), 80.0, 3
    Q, K = rng.normal(size=(2, d, d))
    x, y = random_tokens(rng, 5, d), random_tokens(rng, 300, d)
    mu = mf.Empirical(y, rng.dirichlet(np.ones(300)))
    best = theory.laplace_principle_bound(x, mu, Q, K, beta)
    u = x @ Q.T @ K
    s = np.linalg.norm(u, axis=1)
    for i in range(5):
        f = s[i] - y @ u[i]
        brute = brute_laplace(f, np.asarray(mu.weights), s[i], beta)
        assert brute / 1.001 <= best[i] <= brute * (1 + 1e-9)
    floor = 0.5 / sphere_area(d)
    best = theory.laplace_principle_bound(x, floor, Q, K, beta)
    for i in range(5):

        def bound(z, s=s[i]):
            r, q = np.exp(z)
            mass = 0.5 * min(r / s / 2, 1)  # S²: the area of a cap is its height
            return np.sqrt(2 * (r + q) / s) + 2 * np.exp(-beta * q) / mass

        least = scipy.optimize.minimize(bound, np.log([1 / beta, 5 / beta])).fun
        assert least * (1 - 1e-6) <= best[i] <= 1.01 * least


def test_laplace_bound_is_nearly_attained_by_a_grain_at_the_target():
    """Named case: mass w = 10⁻⁸ at v, the rest where e^{−βf} = 10w, so that ten elevenths of
    ν sit at the distance √(2f/|Bᵀx|); the bound has q just above f. Slack below 1.7."""
    beta, w = 200.0, 1e-8
    angle = np.arccos(1 + np.log(10 * w) / beta)
    y = np.array([[1.0, 0.0], [np.cos(angle), np.sin(angle)]])
    mu, x = mf.Empirical(y, [w, 1 - w]), y[:1]
    error = barycentre_error(x, mu, I2, I2, beta)
    bound = theory.laplace_principle_bound(x, mu, I2, I2, beta)
    assert error[0] <= bound[0] < 1.7 * error[0]


@pytest.mark.parametrize("d", [2, 3, 5])
def test_laplace_bound_of_a_density_scales_as_the_root_of_log_beta_over_beta(d):
    """Fitted exponent of the bound in log β/β between β = 10³ and 10⁷: ½ up to the
    additive constants of log β + const; the uniform error is (d−1)/2β only."""
    beta = np.geomspace(1e3, 1e7, 9)
    x = np.eye(d)[:1]
    eye, law = np.eye(d), mf.Uniform(d)
    bound = np.concatenate(
        [theory.laplace_principle_bound(x, law, eye, eye, b) for b in beta]
    )
    slope = np.polyfit(np.log(np.log(beta) / beta), np.log(bound), 1)[0]
    assert 0.47 < slope < 0.53
    exact = mf.special.mean_resultant_complement(d, beta)
    assert np.all(exact <= theory.barycentre_error_bound(d, beta, 1.0))
    assert np.all(theory.barycentre_error_bound(d, beta, 1.0) < bound)


# ------------------------------------------------------------------ densities along flows


def circle_case(B, V, beta, n=400, kappa=0.0):
    """Mid-quantile tokens of a von Mises–Fisher law on S¹ under (SA) and at zero
    temperature, at times 0, .05, …, .5; shape (t, n, 2) each."""
    law = mf.VonMisesFisher([1.0, 0.0], kappa)
    theta = np.asarray(
        law.angle_quantile(jnp.asarray((np.arange(n // 2) + 0.5) / (n // 2)))
    )
    x0 = mf.sphere.from_angles(np.concatenate([-theta[::-1], theta]))
    layers = list(range(0, 101, 10))
    hot = mf.SelfAttention(I2, B, V, beta, partition=mf.Dense())
    runs = [
        mf.unroll(field, x0, 100, 0.005, save=layers)
        for field in (hot, mf.ZeroTemperature(I2, B, V))
    ]
    return law, np.array(layers) * 0.005, runs[0].xs, runs[1].xs


CIRCLES = [
    (np.diag([1.0, 0.5]), np.diag([1.0, -1.0]), 20.0, 0.0),
    (np.diag([1.0, 1.0]), I2, 50.0, 0.5),
    (TURN, np.array([[0.5, 0.3], [-0.2, 1.0]]), 5.0, 0.2),
]


@pytest.mark.parametrize(("B", "V", "beta", "kappa"), CIRCLES)
def test_density_bounds_hold_on_the_circle(B, V, beta, kappa):
    """The density between neighbouring tokens, 1/(n·spacing), stays within `density_bounds`
    (2 % allowed for the finite spacing)."""
    law, t, hot, _ = circle_case(B, V, beta, kappa=kappa)
    low, high = theory.density_range(law)
    limit = theory.density_bounds(t, low, high, I2, B, V, beta)
    spacing = mf.sphere.distance(hot, jnp.roll(hot, -1, axis=1))
    density = 1 / (spacing * hot.shape[1])
    assert np.all(density.max(1) <= 1.02 * limit.upper)
    assert np.all(density.min(1) >= 0.98 * limit.lower)


def test_density_bound_is_nearly_attained_by_a_contracting_field():
    """Named case: uniform law on S¹, V = diag(1, −1), B = I, early: div χ = −2A(β)cos 2θ,
    so that log max µ_t starts with slope 2A(β), against κ(1 − A²) + 1. Slack below 1.05."""
    beta, t, uniform = 50.0, 1e-6, 1 / (2 * np.pi)
    V = np.diag([1.0, -1.0])
    growth = theory.density_bounds(t, uniform, uniform, I2, I2, V, beta)
    rate = float((growth.log_upper - np.log(uniform)) / t)
    exact = 2 * float(mf.special.mean_resultant(2, beta))
    assert exact <= rate < 1.05 * exact


@pytest.mark.parametrize("beta", [0.5, 10.0, 1000.0])
def test_density_bounds_solve_their_differential_equation(beta):
    """G' = min(αρ + γ, R) with ρ = ρ₀e^{2G}, by SciPy's solver, across the change of rate."""
    Q, K, V, _ = random_case(3, 1)
    s = np.linalg.svd(Q.T @ K, compute_uv=False)
    norm = np.linalg.norm(V, 2)
    kappa = beta * s[-1]
    A = 1 / np.tanh(kappa) - 1 / kappa
    alpha, gamma = norm * s[0] / s[-1] * kappa * (1 - A * A), 2 * norm
    b = beta * s[0]
    share = np.linspace(0, 1, 100_001)
    rate = norm * np.max(b * (1 - share**2) + 2 * share)
    low, high = 0.03, 0.4
    scale = np.log1p(gamma / (alpha * high / low)) / (2 * gamma)
    t = scale * np.array([0.0, 0.3, 0.9, 0.999, 1.5, 4.0])

    def slope(_, G):
        return np.minimum(
            alpha * high / low * np.exp(np.minimum(2 * G, 500)) + gamma, rate
        )

    exact = scipy.integrate.solve_ivp(
        slope,
        (0, t[-1]),
        [0.0],
        "LSODA",
        t,
        rtol=1e-10,
        atol=1e-12,
        max_step=t[-1] / 2000,
    ).y[0]
    limit = theory.density_bounds(t, low, high, Q, K, V, beta)
    np.testing.assert_allclose(
        np.log(high) + exact, limit.log_upper, rtol=1e-4, atol=1e-7
    )
    np.testing.assert_allclose(np.log(low) - exact, limit.log_lower, rtol=1e-4, atol=1e-7)


def test_zero_temperature_divergence_is_bounded():
    """|div χ_∞| ≤ ‖V‖(d−1)(1 + cond B) by autodiff; named case, attained: V = diag(1, −1),
    B = diag(5, 1), x = e₂, as for the Lipschitz constant (on S¹ they are one number)."""
    divergence = jax.jit(jax.vmap(_divergence, (None, 0)))
    for d in (2, 4):
        field = mf.ZeroTemperature(*random_case(d, 0)[:3])
        x = jnp.asarray(random_tokens(np.random.default_rng(d), 300, d))
        rate = theory.limit_density_rate(field.Q, field.K, field.V)
        assert np.abs(divergence(field, x)).max() <= rate
    field = mf.ZeroTemperature(I2, np.diag([5.0, 1.0]), np.diag([1.0, -1.0]))
    value = divergence(field, jnp.asarray(np.tile([0.0, 1.0], (300, 1))))
    rate = theory.limit_density_rate(field.Q, field.K, field.V)
    np.testing.assert_allclose(value, rate, rtol=1e-12)


def _divergence(field, y):
    mu = mf.Empirical(y[None], check=False)
    J = jax.jacfwd(lambda z: field.tangent(z[None], mu)[0])(y)
    return jnp.trace(J) - y @ J @ y


# ---------------------------------------------------------- finite against zero temperature


@pytest.mark.parametrize(("B", "V", "beta", "kappa"), CIRCLES)
def test_stability_bound_holds_on_the_circle(B, V, beta, kappa):
    """The root mean square distance of tokens at β and at zero temperature, which is at
    least W₂, stays below `stability_bound`. Named case: the third circle, β = 5, at t = 0.05,
    where |m − v| = O(1) makes up for the square root in its bound: slack below 10."""
    law, t, hot, cold = circle_case(B, V, beta, kappa=kappa)
    low, high = theory.density_range(law)
    limit = theory.stability_bound(t, low, high, I2, B, V, beta)
    distance = np.sqrt(np.mean(np.sum((hot - cold) ** 2, -1), -1))
    assert np.all(distance <= limit + 1e-12)
    if beta == 5:
        assert limit[1] < 10 * distance[1]
    assert limit[0] == 0
    assert np.all(np.diff(limit) >= 0)


def test_stability_bound_has_its_order_in_beta():
    """At a time before the bounds of the density depend on β the bound falls like β^{−1/2}
    and the exact difference like 1/β (E25): measured exponents."""
    beta = np.array([1e3, 1e4, 1e5, 1e6])
    limit = [theory.stability_bound(0.05, 0.1, 0.2, I2, I2, TURN, b) for b in beta]
    slope = np.polyfit(np.log(beta), np.log(np.array(limit)), 1)[0]
    np.testing.assert_allclose(slope, -0.5, atol=0.01)


@pytest.mark.parametrize("d", [2, 3, 4])
def test_leading_error_of_the_field_is_of_order_one_over_beta(d):
    """χ_β[µ] − χ_∞ for a von Mises–Fisher law, exactly: ν is von Mises–Fisher with natural
    parameter βBᵀx + κm, hence m_β = A(|·|)·direction. The leading term leaves O(β⁻²)."""
    rng = np.random.default_rng(d)
    Q, K, V, _ = random_case(d, 2)
    x = random_tokens(rng, 5, d)
    mean, kappa = random_tokens(rng, 1, d)[0], 1.5
    rest = []
    for beta in (1e4, 1e5):
        natural = beta * x @ Q.T @ K + kappa * mean
        size = np.linalg.norm(natural, axis=1, keepdims=True)
        A = [
            mpmath.besseli(d / 2, s) / mpmath.besseli(d / 2 - 1, s) for s in size.ravel()
        ]
        barycentre = np.array([[float(a)] for a in A]) * natural / size
        v = x @ Q.T @ K
        v /= np.linalg.norm(v, axis=1, keepdims=True)
        error = (barycentre - v) @ V.T
        error -= np.sum(x * error, 1, keepdims=True) * x
        law = mf.VonMisesFisher(mean, kappa)
        found = theory.field_error(x, law, Q, K, V, beta)
        np.testing.assert_allclose(
            found.rate, np.sqrt(np.log(beta + 1) / beta), rtol=1e-9
        )
        rest.append(np.abs(found.leading - error).max() * beta**2)
    assert 0.5 < rest[0] / rest[1] < 2


# --------------------------------------------------------------------- Theorem 1, Cor. 4


def test_alignment_constant_is_the_largest_quotient():
    """C_p = max (2 − 2cos θ)/tan^pθ, by brute force; C₂ = 1 at θ = 0."""
    theta = np.linspace(1e-5, np.pi / 2 - 1e-5, 400_001)
    for p in (0.1, 0.5, 1.0, 1.9, 2.0):
        brute = np.max(4 * np.sin(theta / 2) ** 2 / np.tan(theta) ** p)
        np.testing.assert_allclose(theory.alignment_constant(p), brute, rtol=1e-6)


@pytest.mark.parametrize(("d", "m", "slack"), [(5, 3, 1.1), (4, 2, 2), (3, 1, 2.5)])
def test_zero_temperature_part_of_the_theorem_holds(d, m, slack):
    """W₂(ρ_t, π_E#µ₀) ≤ (∫|x(t) − π_E x₀|²dσ)^{1/2} ≤ C₂e^{−ct} for uniform tokens, by SciPy's
    quadrature over the angle θ to E: tan θ falls exactly like e^{−gap t} for B orthogonal and
    M of two eigenvalues. Named case: dim E = 3, p = 2, late, where 2 − 2cos θ → tan²θ: slack
    below 1.1."""
    gap = 0.8
    M = np.diag([1.0] * m + [1 - gap] * (d - m))
    R = random_rotation(np.random.default_rng(d), d)
    bound = theory.concentration_bound(np.eye(d), R, M @ R, mf.Uniform(d))  # VKᵀQ = M

    def weight(theta):
        return np.sin(theta) ** (d - m - 1) * np.cos(theta) ** (m - 1)

    total = scipy.integrate.quad(weight, 0, np.pi / 2)[0]
    ratios = []
    for t in (0.0, 0.5, 2.0, 4.0, 8.0):
        fall = np.exp(-gap * t)

        def square(theta, fall=fall):
            end = np.arctan2(fall * np.sin(theta), np.cos(theta))
            return 4 * np.sin(end / 2) ** 2 * weight(theta)

        edge = np.pi / 2 - 5 * fall  # where tan θ_t is of order 1
        points = None if edge < 0 else [edge]
        mean = scipy.integrate.quad(square, 0, np.pi / 2, points=points)[0] / total
        ratios.append(float(bound.C2 * np.exp(-bound.c * t) / np.sqrt(mean)))
    assert min(ratios) >= 1
    assert min(ratios) < slack


CASE = (np.eye(4), np.eye(4), np.diag([1.0, 1.0, 1.0, 0.0]))


def test_constants_of_the_theorem_bound_the_laplace_error():
    """C₁ comes from |m − v| ≤ (L C₁/‖V‖)√(log(β+1)/β) at time 0, which must be above the
    optimised Laplace bound with half the minimum of the density, at every β."""
    bound = theory.concentration_bound(*CASE, mf.Uniform(4))
    Q, K, V = CASE
    L = theory.zero_temperature_lipschitz(Q, K, V)
    assert bound.C == L == 2
    for beta in (0.3, 1.0, 3.0, 30.0, 1e3, 1e6):
        best = theory.laplace_principle_bound(
            Q[:1], 0.5 / sphere_area(4), Q, K, beta
        )[0]  # fmt: skip
        assert best <= L * bound.C1 * np.sqrt(np.log1p(beta) / beta)


def test_best_time_and_window_of_the_bound():
    """`best` minimises `value` over t (SciPy); within the window both terms are ≤ ε/2; from
    e^{log_beta} on the window is open, and just below it is empty."""
    bound = theory.concentration_bound(*CASE, mf.Uniform(4))
    for beta in (1.0, 1e6, 1e12):
        best = bound.best(beta)
        found = scipy.optimize.minimize_scalar(
            lambda t, b=beta: float(bound.value(t, b)), bounds=(0, 20), method="bounded"
        )
        assert best.value <= found.fun * (1 + 1e-12)
        assert best.t == 0 or abs(best.t - found.x) < 1e-4
    epsilon = 0.1
    opening = float(bound.window(epsilon, 1.0).log_beta)
    empty = bound.window(epsilon, np.exp(opening - 1e-6))
    assert empty.end < empty.start
    assert "opens from log β" in empty.reason
    window = bound.window(epsilon, np.exp(opening + 1))
    assert window.reason == ""
    for t in (window.start, window.end):
        assert bound.value(t, np.exp(opening + 1)) <= epsilon * (1 + 1e-9)
    longer = bound.window(epsilon, np.exp(opening + 2))
    growth = (longer.end - longer.start) - (window.end - window.start)
    np.testing.assert_allclose(growth * bound.C, 0.5, atol=0.05)  # like ½ log β/C
    assert bound.window(50.0, 1e4).start == 0


def test_whole_space_needs_no_alignment():
    """M = λI: π_E is the identity, C₂ = 0, the best time is 0."""
    bound = theory.concentration_bound(I3, I3, I3, mf.VonMisesFisher([1.0, 0, 0], 1.0))
    assert bound.C2 == 0
    assert bound.best(100.0).t == 0
    assert np.isfinite(bound.window(0.1, 100.0).start)


# ---------------------------------------------------------------- dtypes, gradients, errors


def test_bounds_follow_float32_and_are_differentiable():
    """float32 stays float32; gradients in Q and β are finite, also at β = 0 and B = I."""
    Q, V = I3.astype(np.float32), np.diag([1, 0.5, 0.2]).astype(np.float32)
    args = (Q, Q, V, np.float32(30))
    found = [theory.field_bounds(*args, ratio=2.0), theory.dobrushin_constants(*args)]
    found += [theory.laplace_principle_bound(Q, 0.01, Q, Q, 30.0)]
    found += [theory.stability_bound(np.float32(0.1), 0.05, 0.1, *args)]
    found += [theory.concentration_bound(Q, Q, V, mf.Uniform(3, np.float32))]
    for leaf in jax.tree.leaves(found):
        assert leaf.dtype == np.float32
        assert np.all(np.isfinite(leaf))

    def total(Q, beta):
        a = theory.field_bounds(Q, I3, V, beta)
        b = theory.dobrushin_constants(Q, I3, V, beta)
        return a.speed + a.slope + a.curvature + b.log_rate

    slope = jax.jit(jax.grad(total, (0, 1)))
    for beta in (0.0, 0.5, 20.0):
        assert all(np.all(np.isfinite(s)) for s in slope(I3, beta))


def test_laplace_bound_has_the_slope_of_its_minimum():
    """d/dβ against a central difference (the minimum over q is differentiated with it)."""
    x = random_tokens(np.random.default_rng(0), 1, 3)
    mu = mf.Uniform(3).nodes(200)

    def bound(beta):
        return theory.laplace_principle_bound(x, mu, I3, I3, beta)[0]

    slope = jax.grad(bound)(60.0)
    h = 1e-3
    difference = (bound(60.0 + h) - bound(60.0 - h)) / (2 * h)
    np.testing.assert_allclose(slope, difference, rtol=1e-6)


def test_bounds_refuse_what_they_do_not_cover():
    """Errors name the argument, the rule and the value."""
    singular = np.diag([1.0, 0.0, 1.0])
    x = I3[:1]
    with pytest.raises(ValueError, match="invertible"):
        theory.zero_temperature_lipschitz(I3, singular, I3)
    with pytest.raises(ValueError, match="`beta` must be finite and ≥ 0"):
        theory.field_bounds(I3, I3, I3, -1.0)
    with pytest.raises(ValueError, match="`ratio` must be finite and ≥ 1"):
        theory.field_bounds(I3, I3, I3, 1.0, ratio=0.5)
    with pytest.raises(ValueError, match="`beta` must be finite and > 0"):
        theory.laplace_principle_bound(x, mf.Uniform(3), I3, I3, 0.0)
    with pytest.raises(ValueError, match=r"at most 1/\|S"):
        theory.laplace_principle_bound(x, 1.0, I3, I3, 1.0)
    with pytest.raises(ValueError, match="`law` must be `Uniform`"):
        theory.density_range(mf.WrappedNormal([1.0, 0.0], 1.0))
    with pytest.raises(ValueError, match="`t` must be ≥ 0"):
        theory.density_bounds(-1.0, 0.01, 0.2, I3, I3, I3, 1.0)
    with pytest.raises(ValueError, match="`maximum` must be at least `minimum`"):
        theory.density_bounds(1.0, 0.05, 0.01, I3, I3, I3, 1.0)
    with pytest.raises(ValueError, match="symmetric"):
        theory.concentration_bound(I3, I3, np.triu(np.ones((3, 3))) * 1.0, mf.Uniform(3))
    with pytest.raises(ValueError, match=r"`p` must lie in \(0, 2\] and below dim E = 1"):
        theory.concentration_bound(I3, I3, np.diag([1.0, 0, 0]), mf.Uniform(3), p=1.0)
    with pytest.raises(ValueError, match=r"`p` must lie in \(0, 2\]"):
        theory.concentration_bound(I3, I3, I3, mf.Uniform(3), p=3.0)
    with pytest.raises(ValueError, match="`law` must live on"):
        theory.concentration_bound(I3, I3, I3, mf.Uniform(4))
