"""Clusters that merge, against mpmath (exponential integrals, quadrature), SciPy's ODE
solver, and simulations."""

import math

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import scipy.cluster.hierarchy
import scipy.integrate

import meanformer as mf
from helpers import central_difference, random_tokens
from meanformer import theory


def floats(*values):
    return [v if isinstance(v, mpmath.mpf) else mpmath.mpf(float(v)) for v in values]


def exact_speed(angle, beta, a, c):
    """−φ' from the field of (SA) at each of two clusters x, y: c e^{β⟨x,y⟩}|P_x y|/Z."""
    with mpmath.workdps(40):
        angle, beta, a, c = floats(angle, beta, a, c)
        near, far = mpmath.exp(beta), mpmath.exp(beta * mpmath.cos(angle))
        first = c * far / (a * near + c * far)
        second = a * far / (c * near + a * far)
        return mpmath.sin(angle) * (first + second)


def exact_time(angle, end, beta, a=0.5, c=0.5):
    """∫ dφ/(−φ') by partial fractions in u = e^{β(1−cos φ)}: with h = (a/c + c/a)/2,

        1/S = u/(2h) + 1 − 1/(2h²) − (1 − 1/h²)/(2(1 + hu)),

    where ∫ u/sin φ is made of exponential integrals of p = sin²(φ/2), q = cos²(φ/2), and
    only the last, bounded term needs a quadrature."""
    with mpmath.workdps(50):
        angle, end, beta, a, c = floats(angle, end, beta, a, c)
        h = (a / c + c / a) / 2
        w0, w1 = (mpmath.log(mpmath.tan(phi / 2)) for phi in (angle, end))
        if beta == 0:
            return w0 - w1
        p0, p1 = (2 * beta * mpmath.sin(phi / 2) ** 2 for phi in (angle, end))
        q0, q1 = (2 * beta * mpmath.cos(phi / 2) ** 2 for phi in (angle, end))
        leading = mpmath.ei(p0) - mpmath.ei(p1)
        leading += mpmath.exp(2 * beta) * (mpmath.e1(q0) - mpmath.e1(q1))
        bounded = 0
        if h > 1:
            cuts = {w1 + (w0 - w1) * k / 20 for k in range(21)}
            for level in range(1, 60, 3):  # where β(1 − cos φ) is this
                if p1 < level < p0:
                    cuts.add(mpmath.log(level / (2 * beta - level)) / 2)

            def last(w):
                return 1 / (1 + h * mpmath.exp(2 * beta / (1 + mpmath.exp(-2 * w))))

            with mpmath.workdps(20):
                bounded = mpmath.quad(last, sorted(cuts), maxdegree=6)
        return (
            leading / (4 * h)
            + (1 - 1 / (2 * h * h)) * (w0 - w1)
            - bounded * (1 - 1 / h**2) / 2
        )


def log_errors(values, exact):
    """|value − log T|/max(1, |log T|) for exact times T."""
    logs = [mpmath.log(t) for t in exact]
    return np.array(
        [float(abs(float(v) - e) / max(1, abs(e))) for v, e in zip(values, logs)]
    )


def hard_cases(rng, count, dtype: type = np.float64):
    """(angle, end, β, a) with c = 1: both ends of the circle, close and distant ends, β from
    0 to 1e6, mass ratios from 1e-6 to 1e6."""
    cases = []
    top = math.pi - 1e-6
    while len(cases) < count:
        near = 10 ** rng.uniform(-6, 0, 4)
        angle = rng.choice([near[0], math.pi - near[1], rng.uniform(1e-6, top)])
        end = angle * rng.choice([near[2], rng.uniform(), 1 - 0.1 * near[3]])
        beta = rng.choice([0, 10 ** rng.uniform(-3, 6), *10 ** rng.uniform(0, 2.5, 2)])
        mass = rng.choice([1, *10 ** rng.uniform(-6, 6, 2), 10 ** rng.uniform(-1, 1)])
        case = np.array([angle, end, beta, mass]).astype(dtype)
        if 1e-6 <= case[1] < case[0] <= top:
            cases.append(case)
    return np.array(cases).T


def rotated(rng, angle, d):
    """Two unit vectors of R^d at the given angle, in general position."""
    basis = np.linalg.qr(rng.normal(size=(d, 2)))[0]
    return basis[:, 0], math.cos(angle) * basis[:, 0] + math.sin(angle) * basis[:, 1]


# ------------------------------------------------------------------ speed


@pytest.mark.parametrize("masses", [(0.5, 0.5), (0.5, 0.2), (3.0, 0.01)])
def test_speed_is_that_of_two_tokens_of_self_attention(masses):
    """−φ' = −d/dt arccos⟨x, y⟩ = (⟨ẋ, y⟩ + ⟨x, ẏ⟩)/sin φ with the field of the simulator."""
    rng = np.random.default_rng(0)
    for angle, beta in [(0.3, 0.0), (1.1, 5.0), (2.8, 3.0)]:
        x = np.stack(rotated(rng, angle, 4))
        field = mf.SelfAttention(np.eye(4), np.eye(4), np.eye(4), beta)
        v = np.asarray(field.velocity(x, mf.Empirical(x, masses)))
        speed = (v[0] @ x[1] + v[1] @ x[0]) / math.sin(angle)
        predicted = theory.pair_speed(angle, beta, masses)
        np.testing.assert_allclose(predicted, speed, rtol=1e-12)


def test_speed_is_exact_from_angle_0_to_pi_at_any_beta():
    """Values and logarithms; equal masses have 2 sin φ/(1 + e^{β(1−cos φ)}); no underflow of
    the logarithm."""
    rng = np.random.default_rng(1)
    angle, _, beta, mass = hard_cases(rng, 200)
    exact = [exact_speed(*case, 1.0) for case in zip(angle, beta, mass)]
    log = theory.pair_speed(angle, beta, (mass, 1.0), log=True)
    assert log_errors(log, exact).max() < 1e-14
    plain = theory.pair_speed(angle, beta, (mass, 1.0))
    shown = np.array([float(e) for e in exact]) > 1e-290  # else underflow
    # E = β(1 − cos φ) ≤ 700 is rounded to eps·E
    np.testing.assert_allclose(
        plain[shown], [float(e) for e, s in zip(exact, shown) if s], rtol=2e-13
    )
    equal = 2 * np.sin(angle) / (1 + np.exp(np.minimum(beta * (1 - np.cos(angle)), 700)))
    both = theory.pair_speed(angle, beta)
    np.testing.assert_allclose(both, equal, rtol=1e-9, atol=1e-290)


def test_speed_at_both_ends_has_value_zero_and_its_slope():
    """At φ = 0 the slope is 1 (clusters merge at rate 1), at π it is −S."""
    slope = jax.grad(theory.pair_speed)
    assert theory.pair_speed(0.0, 7.0) == 0
    np.testing.assert_allclose(slope(0.0, 7.0, (0.3, 0.1)), 1, rtol=1e-15)
    S = 1 / (1 + 3 * math.exp(14)) + 1 / (1 + math.exp(14) / 3)
    np.testing.assert_allclose(slope(math.pi, 7.0, (0.3, 0.1)), -S, rtol=1e-12)
    np.testing.assert_allclose(theory.pair_speed(math.pi, 7.0), 0, atol=1e-15)
    assert theory.pair_speed(0.0, 7.0, log=True) == -np.inf
    assert slope(1.0, 0.0) == pytest.approx(math.cos(1.0))


# ------------------------------------------------------------------ time


def test_merge_times_of_the_papers_regime():
    """60° → 10° takes 3.5, 13.6, 802, 8.4e6 at β = 5, 10, 20, 40: the O(e^{cβ}) of the paper;
    90° → 5° with masses 0.5 and 0.2 at β = 10 takes 780."""
    times = theory.merge_time(math.pi / 3, math.pi / 18, [5.0, 10.0, 20.0, 40.0])
    np.testing.assert_allclose(times, [3.530, 13.59, 801.9, 8.393e6], rtol=2e-4)
    uneven = theory.merge_time(math.pi / 2, math.pi / 36, 10.0, (0.5, 0.2))
    np.testing.assert_allclose(uneven, 780.1, rtol=1e-4)


def test_merge_time_is_exact_for_any_angles_beta_and_masses():
    """T against exponential integrals at 50 digits, angles 1e-6 … π − 1e-6, β 0 … 1e6, mass
    ratios 1e-6 … 1e6."""
    angle, end, beta, mass = hard_cases(np.random.default_rng(2), 60)
    log = theory.merge_time(angle, end, beta, (mass, 1.0), log=True)
    exact = [exact_time(*case, 1.0) for case in zip(angle, end, beta, mass)]
    assert log_errors(log, exact).max() < 2e-14
    fits = log < 700
    times = theory.merge_time(angle[fits], end[fits], beta[fits], (mass[fits], 1.0))
    exact = np.array([float(t) for t, f in zip(exact, fits) if f])
    np.testing.assert_allclose(times, exact, rtol=1e-12)  # eps·log T, and 1e-14
    swapped = theory.merge_time(angle, end, beta, (1.0, mass), log=True)
    np.testing.assert_allclose(swapped, log, rtol=1e-14, atol=1e-14)


def test_merge_time_is_exact_in_float32():
    """To 1e-5, with the float32 numbers taken as they are."""
    angle, end, beta, mass = hard_cases(np.random.default_rng(3), 40, np.float32)
    masses = (mass, np.float32(1))
    log = theory.merge_time(angle, end, beta, masses, log=True)
    assert log.dtype == np.float32
    exact = [exact_time(*case, 1.0) for case in zip(angle, end, beta, mass)]
    assert log_errors(log, exact).max() < 1e-5
    fits = np.asarray(log) < 60  # the exponential multiplies rounding by log T
    times = theory.merge_time(angle[fits], end[fits], beta[fits], (mass[fits], 1.0))
    exact = np.array([float(t) for t, f in zip(exact, fits) if f])
    np.testing.assert_allclose(times, exact, rtol=1e-5)
    speed = theory.pair_speed(angle, beta, masses, log=True)
    exact = [exact_speed(*case, 1.0) for case in zip(angle, beta, mass)]
    assert speed.dtype == np.float32
    assert log_errors(speed, exact).max() < 1e-5


def test_merge_time_is_that_of_the_angle_equation():
    """SciPy's integration of φ' = −sin φ[1/(1+(a/c)e^E) + 1/(1+(c/a)e^E)] arrives at `end`
    at T, and passes `pair_angle`(t) on the way."""
    a, c, beta, start, end = 0.5, 0.2, 8.0, 1.4, 0.05

    def rhs(_, y):
        E = beta * (1 - np.cos(y))
        return -np.sin(y) * (1 / (1 + a / c * np.exp(E)) + 1 / (1 + c / a * np.exp(E)))

    T = float(theory.merge_time(start, end, beta, (a, c)))
    ts = np.linspace(0, T, 7)
    run = scipy.integrate.solve_ivp(
        rhs, (0, T), [start], "DOP853", ts, rtol=1e-12, atol=1e-14
    )
    np.testing.assert_allclose(run.y[0, -1], end, rtol=1e-8)
    angles = theory.pair_angle(ts, start, beta, (a, c))
    np.testing.assert_allclose(angles, run.y[0], rtol=1e-8)


def test_third_time_scale_is_exponential_in_beta():
    """d log T/dβ = 1 − cos φ₀ − 1/β + O(1/β²), and log T + log(β sin²φ₀ (a² + c²)/(ac)) −
    β(1 − cos φ₀) → 0: the scale O(e^{cβ}) of the paper with c = 1 − cos φ₀."""
    start, a, c = 1.2, 0.3, 0.1
    beta = np.array([1e2, 1e3, 1e4])

    def log_time(beta):
        return theory.merge_time(start, 0.1, beta, (a, c), log=True)

    slope = jax.vmap(jax.grad(log_time))(jnp.asarray(beta))
    error = np.abs(slope - (1 - math.cos(start) - 1 / beta)) * beta**2
    assert error.max() < 3
    laplace = beta * (1 - math.cos(start)) - np.log(
        beta * math.sin(start) ** 2 * (a * a + c * c) / (a * c)
    )
    assert np.all(np.abs(log_time(beta) - laplace) * beta < 3)


def test_derivatives_of_merge_time_are_those_of_the_integral():
    """∂T/∂angle = 1/speed, ∂T/∂end = −1/speed; ∂/∂β and ∂/∂masses by mpmath, also where T
    is e^{1000}."""
    cases = [
        (1.3, 0.2, 6.0, 0.5, 0.2),
        (2.9, 1e-3, 0.0, 0.5, 0.5),
        (1.7, 1e-4, 900.0, 1, 9),
    ]
    slopes = jax.vmap(
        jax.grad(
            lambda angle, end, beta, a, c: theory.merge_time(
                angle, end, beta, (a, c), log=True
            ),
            argnums=(0, 1, 2, 3, 4),
        )
    )(*np.array(cases, float).T)
    for k, case in enumerate(cases):
        angle, end, beta, a, c = case
        T = exact_time(*case)
        at = [s[k] for s in slopes]
        np.testing.assert_allclose(
            at[0], float(1 / exact_speed(angle, beta, a, c) / T), rtol=1e-12
        )
        np.testing.assert_allclose(
            at[1], float(-1 / exact_speed(end, beta, a, c) / T), rtol=1e-12, atol=1e-290
        )
        for which in (2, 3, 4):
            if case[which] == 0:
                continue
            with mpmath.workdps(40):
                logs = []
                for sign in (-1, 1):
                    moved = list(floats(*case))
                    moved[which] *= 1 + sign * mpmath.mpf("1e-8")
                    logs.append(mpmath.log(exact_time(*moved)))
                slope = (logs[1] - logs[0]) / (2e-8 * case[which])
            np.testing.assert_allclose(at[which], float(slope), rtol=1e-11, atol=1e-13)
    # at β = 0: ∂T/∂β = ∫ (1 − cos φ)/(2·…) dφ with 1/S = 1 + E/2 + O(E²) for equal masses
    T = math.log(math.tan(1.45) / math.tan(5e-4))
    exact = math.log(math.cos(5e-4) / math.cos(1.45))  # ½∫ (1 − cos φ)/sin φ dφ
    np.testing.assert_allclose(slopes[2][1], exact / T, rtol=1e-12)


def test_second_derivatives_of_merge_time():
    """Twice differentiable, forward over reverse: the Hessian times a direction against
    differences of the gradient."""

    def log_time(v):
        return theory.merge_time(v[0], v[1], v[2], (v[3], v[4]), log=True)

    v, e = jnp.array([1.3, 0.2, 6.0, 0.5, 0.2]), jnp.array([0.3, 0.2, -1.0, 0.4, -0.1])

    @jax.jit
    def both(h):
        return jax.jvp(jax.grad(log_time), (v + h * e,), (e,))

    slope = central_difference(lambda h: both(h)[0], 0.0, 1e-3)
    np.testing.assert_allclose(both(0.0)[1], slope, rtol=1e-8)


def test_an_overflowing_time_asks_for_its_logarithm():
    """β = 1000 and 1e6 have log T, and no T."""
    log = theory.merge_time(1.0, 0.1, [1e3, 1e6], log=True)
    exact = [exact_time(1.0, 0.1, beta) for beta in (1e3, 1e6)]
    assert log_errors(log, exact).max() < 1e-15
    with pytest.raises(
        ValueError, match=r"`log` must be True where the time overflows float64"
    ):
        theory.merge_time(1.0, 0.1, 1e6)
    with pytest.raises(ValueError, match=r"overflows float32"):
        theory.merge_time(np.float32(1), 0.1, 1e3)


# ------------------------------------------------------------------ angle and meeting point


def test_pair_angle_inverts_merge_time():
    """T(φ₀ → `pair_angle`(T)) = T, with exact derivatives, before, at and after the collapse
    and for β = 1e5 in logarithms."""
    start = np.array([0.5, 1.2, 2.9, 3.1, 1.0])
    end = np.array([0.4, 1e-4, 2.8, 1e-8, 0.9999])
    beta = np.array([1.0, 20.0, 0.0, 3.0, 1e5])
    mass = np.array([0.5, 3.0, 1e-3, 1.0, 1.0])
    log_t = theory.merge_time(start, end, beta, (mass, 1.0), log=True)
    back = theory.pair_angle(log_t, start, beta, (mass, 1.0), log=True)
    speed = theory.pair_speed(end, beta, (mass, 1.0), log=True)
    condition = np.exp(log_t + speed) / end * np.maximum(1, np.abs(log_t))
    assert np.all(np.abs(back / end - 1) < 1e-15 * (10 + 10 * condition))
    assert theory.pair_angle(0.0, 1.0, 5.0) == 1.0
    assert 0 <= theory.pair_angle(1e6, 1.0, 5.0) < 1e-290  # after the collapse


def test_derivatives_of_pair_angle():
    """dφ/dt = −speed(φ), also at t = 0; the others against differences."""

    def f(v):
        return theory.pair_angle(v[0], v[1], v[2], (v[3], 0.2))

    v = np.array([[0.0, 1.0, 5.0, 0.5], [2.0, 1.0, 5.0, 0.5], [8.0, 1.0, 5.0, 0.5]])
    values = jax.jit(jax.vmap(f))
    angles = values(v)
    slopes = np.asarray(jax.jit(jax.vmap(jax.grad(f)))(v))
    for k in range(3):
        rate = -float(exact_speed(float(angles[k]), 5.0, 0.5, 0.2))
        np.testing.assert_allclose(slopes[k, 0], rate, rtol=1e-12)
    np.testing.assert_allclose(slopes[0, 1:], [1, 0, 0], atol=1e-15)
    for k, e in enumerate(np.eye(4)[1:], 1):
        moved = central_difference(lambda h, e=e: values(v + h * e), 0.0, 1e-3)
        np.testing.assert_allclose(slopes[1:, k], moved[1:], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("a", "c"), [(0.5, 0.5), (0.6, 0.1), (1.0, 50.0)])
def test_clusters_meet_where_their_speeds_take_them(a, c):
    """The way of each is ∫ speed dφ/(−φ') (mpmath); in proportion to the other's mass at
    β = 0, to its square for β → ∞; swapping the clusters swaps nothing."""
    x, y = rotated(np.random.default_rng(5), 2.0, 3)
    end = 1e-6
    for beta in (0.0, 3.0, 60.0, 1e6):
        point = theory.merge_point(x, y, end, beta, (a, c))
        swapped = theory.merge_point(y, x, end, beta, (c, a))
        np.testing.assert_allclose(point, swapped, atol=1e-14)

        def share(phi, beta=beta):
            u = mpmath.exp(beta * (1 - mpmath.cos(phi)))
            first, second = 1 / (1 + u * a / c), 1 / (1 + u * c / a)
            return first / (first + second)

        cuts = [0, *(k / math.sqrt(beta + 1) for k in (1, 2, 4, 8)), 2]
        way = mpmath.quad(share, sorted(t for t in cuts if t <= 2))
        way = float(way)  # type: ignore
        walked = mf.sphere.distance(jnp.asarray(x), point)
        np.testing.assert_allclose(walked, way, rtol=1e-11)
        if beta == 0:
            np.testing.assert_allclose(way, 2 * c / (a + c), rtol=1e-12)
        if beta == 1e6:  # a width 1/√β at the end is shared otherwise
            np.testing.assert_allclose(way, 2 * c**2 / (a**2 + c**2), atol=1e-3)


@pytest.mark.parametrize("beta", [5.0, 10.0])
def test_two_weighted_clusters_of_a_simulation_follow_the_prediction(beta):
    """`mf.solve` of (SA) with masses 0.7 and 0.3 on S²: angle at four times, time of
    arrival and meeting point."""
    a, c, start, end = 0.7, 0.3, 1.2, 0.02
    x, y = rotated(np.random.default_rng(6), start, 3)
    T = theory.merge_time(start, end, beta, (a, c))
    ts = np.append(0, T * np.array([0.3, 0.8, 0.97, 1.0]))
    eye = np.eye(3)
    field = mf.SelfAttention(eye, eye, eye, beta)
    run = mf.solve(field, mf.Empirical([x, y], [a, c]), ts, rtol=1e-10, atol=1e-10)
    angles = mf.sphere.distance(run.xs[:, 0], run.xs[:, 1])
    predicted = theory.pair_angle(ts, start, beta, (a, c))
    # near the collapse an error of 1e-10 in the angle at the start is e^{E₀}/sin times that
    np.testing.assert_allclose(angles, predicted, rtol=1e-6)
    np.testing.assert_allclose(angles[-1], end, rtol=1e-6)
    point = theory.merge_point(x, y, end, beta, (a, c))
    last = run.xs[-1]
    middle = mf.sphere.normalise(a * last[0] + c * last[1])
    np.testing.assert_allclose(middle, point, atol=beta * end**3)


# ------------------------------------------------------------------ the limit


def velocities(x, weights, beta):
    """(SA) with V = QᵀK = I, from differences: no rounding of a cluster's own pull."""
    steps = x[None] - x[:, None]
    pull = weights * np.exp(-beta * np.sum(steps**2, -1) / 2)
    v = np.einsum("ij,ijd->id", pull / pull.sum(1, keepdims=True), steps)
    return v - np.sum(v * x, 1, keepdims=True) * x


def integrate(velocity, x0, ts, event=None):
    """SciPy's solution of ẋ = velocity(x) on the sphere at the times `ts`."""

    def rhs(_, y):
        x = y.reshape(x0.shape)
        return velocity(x / np.linalg.norm(x, axis=1, keepdims=True)).ravel()

    run = scipy.integrate.solve_ivp(
        rhs,
        (ts[0], ts[-1]),
        x0.ravel(),
        "LSODA",
        ts,
        events=event,
        rtol=1e-10,
        atol=1e-12,
    )
    assert run.status >= 0, run.message
    return run


def cosines(x):
    """⟨x_i, x_j⟩ of all pairs i < j, by rows of (…, m, d)."""
    i, j = np.triu_indices(x.shape[-2], 1)
    return np.sum(x[..., i, :] * x[..., j, :], -1)


# m = 4 clusters on S²: the closest pair (0, 2) at 0.7, the next pair at about 1.15.
FOUR = np.asarray(
    mf.sphere.exp(
        jnp.array([0.0, 0, 1]),
        jnp.array([[0.35, 0, 0], [0.1, 1.3, 0], [-0.35, 0, 0], [0.2, -1.1, 0]]),
    )
)
UNEQUAL = np.array([0.4, 0.3, 0.2, 0.1])
POLES = np.array([[0, 0, 1.0], [0, 0, 1], [0, 0, -1], [0, 0, -1]])


@pytest.mark.parametrize("weights", [None, UNEQUAL])
def test_limit_of_the_paper_in_closed_form(weights):
    """ẏ_i = (α_j/α_i)P_{y_i}y_j and ẏ_j = (α_i/α_j)P_{y_j}y_i, the others at rest, by SciPy;
    tan(φ/2)(s) = tan(φ₀/2)e^{−2s} for equal weights; only i and j move."""
    w = np.ones(4) if weights is None else weights

    def limit(y):
        v = np.zeros_like(y)
        for i, j in ((0, 2), (2, 0)):
            v[i] = w[j] / w[i] * (y[j] - y[i] @ y[j] * y[i])
        return v

    ts = np.array([0, 0.3, 1.0])
    run = integrate(limit, FOUR, ts).y.T.reshape(3, 4, 3)
    for s, y in zip(ts, run):
        predicted = theory.pairing_limit(FOUR, s, weights)
        np.testing.assert_allclose(predicted, y, atol=1e-8)
        np.testing.assert_array_equal(predicted[1::2], FOUR[1::2])
        phi = theory.pairing_limit_angle(0.7, s, (w[0], w[2]))
        np.testing.assert_allclose(
            phi, 2 * math.asin(np.linalg.norm(y[0] - y[2]) / 2), 1e-7
        )
    if weights is None:
        tangent = math.tan(0.35) * math.exp(-2)
        np.testing.assert_allclose(phi, 2 * math.atan(tangent), rtol=1e-14)


def test_time_of_the_limit_by_quadrature():
    """t = ∫ e^{β(1−cos φ(s))} ds by SciPy, its logarithm at β = 1e4 by mpmath; for β → ∞ it
    is the time of the finite-β equation."""
    masses = (0.5, 0.2)

    def rescaling(s):
        return np.exp(9 * (1 - np.cos(theory.pairing_limit_angle(1.3, s, masses))))

    t, _ = scipy.integrate.quad(rescaling, 0, 0.8, epsabs=0, epsrel=1e-12)
    mine = theory.pairing_limit_time(1.3, 0.8, 9.0, masses)
    np.testing.assert_allclose(mine, t, rtol=1e-11)
    mine = theory.pairing_limit_time(1.3, 0.8, 1e4, masses, log=True)
    with mpmath.workdps(30):
        p1 = (
            mpmath.sin(mpmath.atan(mpmath.tan(0.65) * mpmath.exp(-2.9 * mpmath.mpf(0.8))))
            ** 2
        )
        b = mpmath.mpf(2e4)
        q0, q1 = mpmath.cos(mpmath.mpf(0.65)) ** 2, 1 - p1
        e = mpmath.ei(b * mpmath.sin(mpmath.mpf(0.65)) ** 2) - mpmath.ei(b * p1)
        e += mpmath.exp(b) * (mpmath.e1(b * q0) - mpmath.e1(b * q1))
        exact = mpmath.log(e / 2 / mpmath.mpf(2.9))
    np.testing.assert_allclose(mine, float(exact), rtol=1e-13)
    end = theory.pairing_limit_angle(1.3, 0.8, masses)
    whole = theory.merge_time(1.3, end, 1e4, masses, log=True)
    np.testing.assert_allclose(mine, whole, rtol=1e-13)


@pytest.mark.parametrize("weights", [np.full(4, 0.25), UNEQUAL])
def test_rescaled_trajectories_fall_onto_the_limit(weights):
    """max |x_k(s) − y_k(s)| until φ = 0.45, for β = 10, 20, 40, decreases at least like
    e^{−β(1−cos(α/4))}, the rate in the proof of Prop. 3.11."""
    ratio = weights[0] / weights[2]
    s1 = math.log(math.tan(0.35) / math.tan(0.225)) / (ratio + 1 / ratio)
    ts = np.linspace(0, s1, 4)
    limit = np.stack([theory.pairing_limit(FOUR, s, weights) for s in ts])
    errors = []
    for beta in (10.0, 20.0, 40.0):
        x = rescaled_run(FOUR, weights, beta, ts)
        errors.append(np.max(np.linalg.norm(x - limit, axis=-1)))
    rates = -np.diff(np.log(errors)) / np.array([10, 20])
    level = 1 - math.cos(float(theory.closest_pair(FOUR).gap) / 4)
    assert np.all(rates > level), (errors, rates)
    # and the pair's own correction 1/S = (g/2)e^E(1 + O(e^{−E})) ends at e^{−40(1−cos .45)}
    assert errors[-1] < 2 * math.exp(-40 * (1 - math.cos(0.45)))


def rescaled_run(x0, weights, beta, ts):
    """(SA) in the time s of the pair (0, 2), dt = e^{β(1−⟨x_0,x_2⟩)} ds."""

    def velocity(x):
        return velocities(x, weights, beta) * math.exp(beta * (1 - x[0] @ x[2]))

    return integrate(velocity, x0, ts).y.T.reshape(len(ts), *x0.shape)


def test_closest_pair_stays_the_closest_in_the_window_of_lemma_C1():
    """d_t − m_t ≥ 1 − cos(α/4) for rescaled times up to T = (α/2C)e^{β(1−cos(α/4))}."""
    for beta in (10.0, 1000.0):
        window = theory.pairing_window(FOUR, beta, UNEQUAL)
        T = min(math.exp(window.log_time), 0.9)
        assert beta < 100 or T == 0.9  # at β = 1000 it is most of the way
        x = rescaled_run(FOUR, UNEQUAL, beta, np.linspace(0, T, 10))
        products = cosines(x)
        pair, others = products[:, 1], np.delete(products, 1, axis=1)
        assert np.min(pair - others.max(1)) >= window.level


def test_constant_of_lemma_C1_bounds_every_other_angle():
    """∂_s φ_kl − ∂_s φ_ij ≥ −C e^{β(m−d)} at random clusters and weights, for all (k, l);
    C = 4m − 6 for m ≥ 4 equal weights. Three equal clusters at nearly one angle come within
    a factor 10."""
    rng = np.random.default_rng(8)
    largest = 0.0
    for trial in range(60):
        m = 3 + 2 * (trial % 2)
        weights = rng.dirichlet(np.ones(m)) if trial % 3 else np.full(m, 1 / m)
        x = random_tokens(rng, m, 3)
        beta = [0.5, 3.0, 20.0][trial // 20]
        window = theory.pairing_window(x, beta, weights)
        if m > 3 and trial % 3 == 0:
            np.testing.assert_allclose(window.constant, 4 * m - 6, rtol=1e-13)
        q = cosines(x)
        order = np.sort(q)[::-1]
        v = velocities(x, weights, beta) * np.exp(beta * (1 - order[0]))
        i, j = np.triu_indices(m, 1)
        rates = -(np.sum(v[i] * x[j], 1) + np.sum(x[i] * v[j], 1)) / np.sqrt(1 - q * q)
        relative = rates[np.argmax(q)] - np.delete(rates, np.argmax(q))
        bound = float(window.constant) * math.exp(beta * (order[1] - order[0]))
        largest = max(largest, relative.max() / bound)
    assert 0.1 < largest <= 1, largest


def test_closest_pair_by_brute_force():
    """Pair, second pair, angles and gap against all pairs."""
    for seed in range(3):
        x = random_tokens(np.random.default_rng(seed), 9, 4)
        i, j = np.triu_indices(9, 1)
        q = cosines(x)
        order = np.argsort(-q)
        near = theory.closest_pair(x)
        assert near.pair.tolist() == [i[order[0]], j[order[0]]]
        assert near.second.tolist() == [i[order[1]], j[order[1]]]
        angles = np.arccos(q[order])
        np.testing.assert_allclose(near.angle, angles[0], rtol=1e-12)
        np.testing.assert_allclose(near.gap, angles[1] - angles[0], rtol=1e-11)
    assert theory.closest_pair(FOUR[:2]).gap == np.inf


# ------------------------------------------------------------------ all merges


def simulate_merges(x, weights, beta, contact):
    """Direct integration of (SA); clusters at the angle `contact` become one at their
    barycentre. Pairs in the numbering of linkage matrices, times, points."""
    names, t, merges = list(range(len(x))), 0.0, []
    while len(x) > 1:
        i, j = np.triu_indices(len(x), 1)

        def reached(_, y, shape=x.shape, i=i, j=j):
            z = y.reshape(shape)
            return np.min(np.linalg.norm(z[i] - z[j], axis=1)) - 2 * math.sin(contact / 2)

        reached.terminal = True
        run = integrate(
            lambda x, w=weights: velocities(x, w, beta), x, [0.0, 1e12], reached
        )
        t += run.t_events[0][0]
        x = run.y_events[0][0].reshape(x.shape)
        k = np.argmin(np.linalg.norm(x[i] - x[j], axis=1))
        a, b = i[k], j[k]
        new = weights[a] * x[a] + weights[b] * x[b]
        new /= np.linalg.norm(new)
        merges.append((sorted((names[a], names[b])), t, new, weights[a] + weights[b]))
        rest = [k for k in range(len(x)) if k not in (a, b)]
        x, weights = np.vstack([x[rest], new]), np.append(weights[rest], merges[-1][3])
        names = [names[k] for k in rest] + [max(names) + 1]
    return merges


@pytest.mark.parametrize("weights", [np.full(4, 0.25), UNEQUAL])
def test_order_and_times_of_merges_are_those_of_a_direct_integration(weights):
    """Four clusters at β = 15: the same pairs in the same order, log times and places close
    (the pull of third clusters is neglected)."""
    contact = 0.01
    direct = simulate_merges(FOUR, weights, 15.0, contact)
    merges = theory.merge_sequence(FOUR, weights, 15.0, contact)
    assert merges.pairs.tolist() == [pair for pair, *_ in direct]
    np.testing.assert_allclose(merges.masses, [d[3] for d in direct], rtol=1e-12)
    # clocks of a new cluster start at contact: late by t₁/t₂ ≈ 0.1; places move by as much
    # of the way as third clusters pull, e^{−β(cos φ − m)} ≈ 1e-3 here
    log_times = np.log([d[1] for d in direct])
    np.testing.assert_allclose(merges.log_times, log_times, atol=0.12)
    np.testing.assert_allclose(merges.points, [d[2] for d in direct], atol=2e-3)


def test_first_merge_of_equal_masses_is_the_closest_pair_at_its_merge_time():
    """Angle, time and place of the first are those of two clusters alone; masses add up to
    1; pairs form a valid linkage matrix with the times as heights; waits sum to times."""
    x = random_tokens(np.random.default_rng(10), 12, 3)
    merges = theory.merge_sequence(x, None, 200.0)
    near = theory.closest_pair(x)
    i, j = near.pair
    assert merges.pairs[0].tolist() == near.pair.tolist()
    np.testing.assert_allclose(merges.angles[0], near.angle, rtol=1e-14)
    time = theory.merge_time(near.angle, 1e-3, 200.0, log=True)
    np.testing.assert_allclose(merges.log_times[0], time, rtol=1e-14)
    point = theory.merge_point(x[i], x[j], 1e-3, 200.0)
    np.testing.assert_allclose(merges.points[0], point, atol=1e-14)
    np.testing.assert_allclose(merges.masses[-1], 1, rtol=1e-14)
    np.testing.assert_allclose(
        np.logaddexp.accumulate(merges.log_waits), merges.log_times, rtol=1e-12
    )
    sizes = [1] * 12
    for pair in merges.pairs:
        sizes.append(sizes[pair[0]] + sizes[pair[1]])
    heights = np.asarray(merges.log_times) - float(merges.log_times[0]) + 1
    matrix = np.column_stack([merges.pairs, heights, sizes[12:]]).astype(float)
    assert scipy.cluster.hierarchy.is_valid_linkage(matrix)
    assert scipy.cluster.hierarchy.is_monotonic(matrix)


def test_merge_sequences_of_many_seeds_at_once_and_their_derivatives():
    """`vmap` over seeds under `jit` gives what single calls give; the derivative of the times
    in β and in the positions is that of differences."""
    x = np.stack([random_tokens(np.random.default_rng(k), 4, 3) for k in range(3)])
    way = np.random.default_rng(11).normal(size=x.shape)

    def total(h, x, way):
        moved = mf.sphere.normalise(x + h[0] * way)
        return jnp.sum(theory.merge_sequence(moved, None, 30.0 + h[1]).log_times)

    many = jax.jit(jax.vmap(jax.value_and_grad(total), (None, 0, 0)))
    values, slopes = many(jnp.zeros(2), x, way)
    for k in range(3):
        single = theory.merge_sequence(x[k], None, 30.0).log_times
        np.testing.assert_allclose(values[k], jnp.sum(single), rtol=1e-12)
    for k, e in enumerate(jnp.eye(2)):
        moved = central_difference(lambda h, e=e: many(h * e, x, way)[0], 0.0, 1e-4)
        np.testing.assert_allclose(slopes[:, k], moved, rtol=1e-6)


def test_clusters_in_contact_merge_at_once():
    """Two clusters at one place, in float32: log T = −∞, the others wait as ever."""
    touching = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    merges = theory.merge_sequence(touching, None, 1e6)
    assert merges.log_times.dtype == np.float32
    assert merges.pairs.tolist() == [[0, 1], [2, 3]]
    assert merges.log_waits[0] == -np.inf
    assert merges.log_waits[1] == merges.log_times[1] > 9e5


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: theory.pair_speed(1.0, -1.0),
            "`beta` must be finite and ≥ 0, but is -1",
        ),
        (
            lambda: theory.pair_speed(3.2, 1.0),
            r"`angle` must lie in \[0, π\], but is 3.2",
        ),
        (lambda: theory.pair_speed(1.0, 1.0, (1, 0)), "`masses` must be finite and > 0"),
        (
            lambda: theory.pair_speed(1.0, 1.0, (1.0, 1e-40)),
            "`masses` must have a ratio",
        ),
        (lambda: theory.pair_speed(1.0, 1.0, (1, 2, 3)), r"must be a pair \(a, c\)"),
        (
            lambda: theory.merge_time(math.pi, 0.1, 1.0),
            "Antipodal clusters rest for ever",
        ),
        (lambda: theory.merge_time(0.0, 0.1, 1.0), r"`angle` must lie in \(0, π\)"),
        (lambda: theory.merge_time(0.5, 0.5, 1.0), "`end` must lie strictly between 0"),
        (lambda: theory.merge_time(0.5, [0.1, 0.0], 1.0), "but is 0. Clusters approach"),
        (lambda: theory.merge_time(0.5, 0.1, np.nan), "`beta` must be finite"),
        (lambda: theory.pair_angle(-1.0, 0.5, 1.0), "`t` must be finite and ≥ 0"),
        (lambda: theory.pair_angle(np.inf, 0.5, 1.0, log=True), "It is a logarithm"),
        (lambda: theory.pairing_limit_angle(1.0, -1.0), "`s` must be finite and ≥ 0"),
        (lambda: theory.pairing_limit_time(1.0, 0.0, 1.0), "`s` must be finite and > 0"),
        (lambda: theory.merge_point([1.0, 0], [1.0, 0, 0], 0.1, 1), "one shape"),
        (lambda: theory.merge_point([1.0, 0], [-1.0, 0], 0.1, 1), "Antipodal"),
        (lambda: theory.closest_pair([[1.0, 0]]), "at least 2 clusters, but holds 1"),
        (lambda: theory.pairing_window(FOUR[:2], 1.0), "at least 3 clusters"),
        (lambda: theory.pairing_limit(np.eye(3), 1.0), "second closest is 0.0. Tied"),
        (
            lambda: theory.pairing_window(np.eye(3), 1.0),
            "unique closest pair, but the gap",
        ),
        (lambda: theory.pairing_limit(FOUR, 1.0, [1, 1, 0, 1]), "`weights` must be > 0"),
        (
            lambda: theory.merge_sequence(FOUR, None, -1.0),
            "`beta` must be finite and ≥ 0",
        ),
        (
            lambda: theory.merge_sequence(FOUR, None, 1.0, 2.0),
            "`contact` must be below π/2",
        ),
        (lambda: theory.merge_sequence(POLES, None, 1.0), "are antipodal"),
    ],
)
def test_bad_arguments_are_refused_by_name(call, message):
    """The error names the argument, the rule, the value and the cure."""
    with pytest.raises(ValueError, match=message):
        call()


def test_traced_arguments_are_refused_when_the_program_runs():
    with pytest.raises(Exception, match="`end` must lie strictly between"):
        jax.block_until_ready(jax.jit(theory.merge_time)(0.5, 0.6, 1.0))
