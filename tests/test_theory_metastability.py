"""Growth around the uniform law, against mpmath and against each other."""

import math
import time

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import scipy.special

from helpers import EPS, relative_errors
from meanformer.theory import metastability as ms


def exact_rate(beta, d, k, model):
    """γ_k with mpmath's Bessel functions."""
    b, nu = mpmath.mpf(beta), mpmath.mpf(d) / 2 - 1
    if model == "sa":
        ratio = mpmath.besseli(nu + k, b) / mpmath.besseli(nu, b)
        return k * (k + d - 2) / b * ratio
    area = 2 * mpmath.pi ** (nu + 1) / mpmath.gamma(nu + 1)
    bessel = mpmath.besseli(nu + k, b)
    return k * (k + d - 2) * (2 * mpmath.pi / b) ** (nu + 1) * bessel / area


MODELS = ["usa", "sa"]
BETAS = [1e-8, 1e-3, 0.3, 0.99, 1.0, 2.0, 5.0, 30.0, 87.0, 400.0, 690.0]
DEGREES = np.array([1, 2, 3, 5, 14, 50, 200])


# ------------------------------------------------------------------------ growth rates


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("dtype", "d"), [(np.float64, 2), (np.float64, 3), (np.float64, 64), (np.float32, 3)]
)
def test_growth_rates_to_full_precision(model, dtype, d):
    """γ_k and log γ_k against mpmath: 1e-12 in float64, 1e-5 in float32, wherever the dtype
    holds the number."""
    f, betas = np.finfo(dtype), np.array(BETAS, dtype)
    rates = np.asarray(ms.growth_rates(betas, d, DEGREES, model))
    logs = np.asarray(ms.growth_rates(betas, d, DEGREES, model, log=True))
    assert rates.dtype == logs.dtype == dtype
    assert rates.shape == (len(BETAS), len(DEGREES))
    exact = [exact_rate(float(b), d, int(k), model) for b in betas for k in DEGREES]
    held = np.array([4 * float(f.tiny) < e < float(f.max) / 16 for e in exact])
    errors = relative_errors(rates, exact)[held]
    assert errors.max() < (1e-12 if dtype == np.float64 else 1e-5)
    logs_exact = np.array([float(mpmath.log(e)) for e in exact])
    eps = 16 * float(f.eps)
    np.testing.assert_allclose(logs.ravel(), logs_exact, rtol=eps, atol=eps)


@pytest.mark.parametrize("model", MODELS)
def test_logarithms_reach_where_rates_overflow(model):
    """log γ_k for β to 1e6 and k to 2000."""
    betas, ks = [1.0, 1e4, 1e6], np.array([1, 100, 2000])
    logs = ms.growth_rates(betas, 3, ks, model, log=True)
    with mpmath.workdps(40):
        exact = [mpmath.log(exact_rate(b, 3, int(k), model)) for b in betas for k in ks]
    assert np.max(relative_errors(logs, exact)) < 1e-13
    assert np.isfinite(np.asarray(logs)).all()
    high = ms.growth_rates(720.0, 2, 300, log=False)  # e^β overflows, γ does not
    np.testing.assert_allclose(high, float(exact_rate(720, 2, 300, "usa")), rtol=1e-12)


@pytest.mark.parametrize(("d", "model"), [(2, "usa"), (7, "usa"), (7, "sa")])
def test_rates_at_beta_zero(d, model):
    """β = 0: γ_1 = (d−1)/d, the others 0, with finite derivatives: dγ_2/dβ = 2/(d+2)."""

    @jax.jit
    def at_zero(beta):
        both = jax.jvp(
            lambda b: ms.growth_rates(b, d, np.arange(5), model), (beta,), (1.0,)
        )
        return *both, ms.growth_rates(beta, d, np.arange(3), model, log=True)

    rates, slope, logs = at_zero(0.0)
    np.testing.assert_allclose(rates, [0, (d - 1) / d, 0, 0, 0], rtol=4 * EPS)
    np.testing.assert_allclose(slope, [0, 0, 2 / (d + 2), 0, 0], atol=4 * EPS)
    np.testing.assert_allclose(logs, [-np.inf, math.log((d - 1) / d), -np.inf])


@pytest.mark.parametrize("model", MODELS)
def test_derivatives_in_beta(model):
    """γ_k'(β), γ_k''(β) and (log γ_k)' (reverse mode) against mpmath."""
    betas, ks, d = [0.5, 0.999, 5.0, 100.0], np.array([1, 2, 3, 14]), 3

    def rates(b):
        return ms.growth_rates(b, d, ks, model)

    def along(f, b):
        return jax.jvp(f, (b,), (jnp.ones_like(b),))

    @jax.jit
    @jax.vmap
    def derivatives(b):
        first, second = along(lambda b: along(rates, b)[1], b)
        logs = jax.jacrev(lambda b: ms.growth_rates(b, d, ks, model, log=True))(b)
        return first, second, logs

    found = [np.asarray(f) for f in derivatives(jnp.array(betas))]
    with mpmath.workdps(30):
        for i, b in enumerate(betas):
            for j, k in enumerate(ks):
                series = mpmath.taylor(lambda x: exact_rate(x, d, int(k), model), b, 2)  # noqa: B023
                value, first, half = (float(c) for c in series)
                expected = [first, 2 * half, first / value]
                got = [f[i, j] for f in found]
                # Derivatives of γ may cancel: the tolerance is relative to γ/β^order.
                atol = [1e-13 * value / b, 1e-12 * value / b**2, 0]
                for g, e, a in zip(got, expected, atol):
                    np.testing.assert_allclose(g, e, rtol=1e-10, atol=a)


def test_normalisations_of_the_paper():
    """E2: k²I_k/β is the true rate (18.596, 116.58, 1.3779 for β = 5, 7, 2); λ_k = 2πI_k/β,
    2I_k/β and the figure's k²I_k/(πβ) (peaks 5.92 and 37.1) are others."""
    beta, k = np.array([5.0, 7.0, 2.0]), np.array([3, 4, 2])
    plain = k**2 * scipy.special.iv(k, beta) / beta
    np.testing.assert_allclose(plain, [18.596, 116.58, 1.3779], rtol=3e-5)
    factors = {"rate": 1, "funk-hecke": 2 * np.pi, "cosine": 2, "figure": 1 / np.pi}
    for name, factor in factors.items():
        table = np.asarray(ms.growth_rates(beta, 2, k, normalisation=name))
        np.testing.assert_allclose(np.diag(table), factor * plain, rtol=1e-13)
        logs = ms.growth_rates(beta, 2, k, log=True, normalisation=name)
        np.testing.assert_allclose(np.exp(logs), table, rtol=1e-13)


@pytest.mark.parametrize("d", [2, 3, 8])
def test_kernel_rates_give_those_of_attention(d):
    """W = e^{βq}/β by quadrature is the closed form; W = q moves degree 1 only, at (d−1)/d."""
    found = ms.kernel_growth_rates(lambda q: jnp.exp(5 * q) / 5, d, 8)
    np.testing.assert_allclose(
        found, ms.growth_rates(5.0, d, np.arange(9)), rtol=1e-12, atol=1e-13
    )
    found = ms.kernel_growth_rates(lambda q: q, d, 3)
    np.testing.assert_allclose(found, [0, (d - 1) / d, 0, 0], atol=1e-13)


def test_a_thousand_temperatures_and_two_hundred_modes_take_no_time():
    """γ_k for 1000 β × 200 modes in one call, far under a second."""
    betas, ks = jnp.linspace(0, 300, 1000), np.arange(200)
    jax.block_until_ready(ms.growth_rates(betas, 3, ks))
    start = time.perf_counter()
    jax.block_until_ready(ms.growth_rates(betas, 3, ks))
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("model", MODELS)
def test_the_curve_through_real_degrees(model):
    """k real: the integers lie on it, and its maximum is at 14.13 and 28.28 for β = 100, 400."""
    for d, beta in ((2, 7.0), (3, 0.2), (9, 300.0)):
        curve = ms.growth_rate_curve(beta, d, np.arange(1.0, 9), model)
        rates = ms.growth_rates(beta, d, np.arange(1, 9), model)
        np.testing.assert_allclose(curve, rates, rtol=1e-11)
    k = np.linspace(1, 60, 59_001)
    for beta, top in ((100, 14.13), (400, 28.28)):
        found = k[np.argmax(ms.growth_rate_curve(beta, 2, k, model))]
        assert abs(found - top) < 0.01


# ------------------------------------------------------------------------ the fastest mode


def test_the_most_unstable_degree():
    """k_max = 2, 3, 4 for β = 2, 5, 7 on S¹ (γ_2nd/γ_max = .879, .939 for β = 5, 7), and the
    two largest of mpmath's rates in any d; (SA) has the same degrees."""
    betas = np.array([0.1, 2.0, 5.0, 7.0, 40.0, 500.0])
    for d in (2, 16):
        top = ms.most_unstable(betas, d)
        other = ms.most_unstable(betas, d, "sa")
        np.testing.assert_array_equal(top.k_max, other.k_max)
        np.testing.assert_allclose(top.ratio, other.ratio, rtol=1e-12)
        for i, beta in enumerate(betas):
            rates = [exact_rate(beta, d, k, "usa") for k in range(1, 50)]
            order = sorted(range(49), key=lambda j: -rates[j])
            first, second = rates[order[0]], rates[order[1]]
            assert (int(top.k_max[i]), int(top.k_second[i])) == (
                order[0] + 1,
                order[1] + 1,
            )
            found = [top.gamma_max[i], top.gamma_second[i], top.ratio[i]]
            assert relative_errors(found, [first, second, second / first]).max() < 1e-12
            np.testing.assert_allclose(top.log_gamma_max[i], float(mpmath.log(first)))
    top = ms.most_unstable(betas, 2)
    np.testing.assert_array_equal(top.k_max[1:4], [2, 3, 4])
    np.testing.assert_allclose(top.ratio[2:4], [0.879, 0.939], atol=5e-4)


def test_the_most_unstable_degree_is_root_two_beta():
    """E1: k_max = 14, 28 for β = 100, 400 (√β would be 10, 20); in any d k(k+d−2) ≈ 2β to
    half a degree, and γ_max → 2/e for (SA), with error O(1/β)."""
    betas = np.array([100.0, 400.0, 4000.0, 40000.0])
    np.testing.assert_array_equal(ms.most_unstable(betas, 2, "sa").k_max[:2], [14, 28])
    for d in (2, 16):
        top = ms.most_unstable(betas, d, "sa")
        real = np.sqrt((d - 2) ** 2 / 4 + 2 * betas) - (d - 2) / 2
        assert np.all(np.abs(np.asarray(top.k_max) - real) < 0.75)
        np.testing.assert_array_less(np.abs(top.gamma_max - 2 / np.e), 0.3 / betas + 1e-4)


def test_the_most_unstable_degree_under_jit_and_grad():
    """dγ_max/dβ is that of its mode; without `degree` or with too small a one: refused."""
    slope = jax.grad(lambda b: ms.most_unstable(b, 2, degree=8).gamma_max)(5.0)
    np.testing.assert_allclose(
        slope, float(mpmath.diff(lambda b: exact_rate(b, 2, 3, "usa"), 5)), rtol=1e-10
    )
    at_zero = jax.jit(jax.grad(lambda b: ms.most_unstable(b, 2, degree=8).gamma_second))
    np.testing.assert_allclose(at_zero(0.0), 0.5, rtol=1e-14)  # γ_2 = β/2 + O(β³)
    with pytest.raises(ValueError, match=r"`degree` must be given under `jit`"):
        jax.jit(lambda b: ms.most_unstable(b, 2).k_max)(5.0)
    with pytest.raises(ValueError, match="rates still rise at 10"):
        ms.most_unstable(400.0, 2, degree=10)
    far = ms.most_unstable(1e5, 2)
    assert np.isinf(far.gamma_max)
    assert np.isfinite(far.log_gamma_max)
    assert np.isfinite(far.ratio)


@pytest.mark.parametrize(
    ("d", "known"),
    [
        (2, [1.04, 3.17, 6.21, 10.23, 15.24, 21.24, 28.24]),
        (3, [1.82, 4.43, 7.96, 12.48, 17.98, 24.49]),
        (64, [42.62, 77.74]),
    ],
)
def test_jumps_of_the_most_unstable_degree(d, known):
    """B9: γ_k = γ_{k+1} at these β, to rounding of mpmath's roots."""
    jumps = ms.mode_jumps(d, len(known))
    np.testing.assert_allclose(jumps, known, atol=0.0051)
    exact = [
        mpmath.findroot(
            lambda b: exact_rate(b, d, k, "sa") / exact_rate(b, d, k + 1, "sa") - 1,  # noqa: B023
            start,
        )
        for k, start in enumerate(known, 1)
    ]
    assert relative_errors(jumps, exact).max() < 1e-13
    sides = np.ravel([[0.999 * b, 1.001 * b] for b in np.asarray(jumps)])
    k_max = np.asarray(ms.most_unstable(sides, d).k_max)
    expected = np.ravel([[k, k + 1] for k in range(1, len(known) + 1)])
    np.testing.assert_array_equal(k_max, expected)


# ------------------------------------------------------------------------- stability


def test_dobrushin_constant_of_usa_on_the_circle():
    """C = sup|h''| = e^β = 2.718, 7.389, 148.4, 1096.6, h = e^{β cos}/β; L = 2C."""
    theta = np.linspace(0, np.pi, 100_001)
    for beta in (1.0, 2.0, 5.0, 7.0):
        h2 = np.exp(beta * np.cos(theta)) * (beta * np.sin(theta) ** 2 - np.cos(theta))
        sup = np.max(np.abs(h2))
        np.testing.assert_allclose(ms.dobrushin_rate(beta), 2 * sup, rtol=1e-12)
    np.testing.assert_allclose(
        ms.dobrushin_rate([0.0, 3e5], log=True), [math.log(2), math.log(2) + 3e5]
    )


def test_growth_rates_stay_below_dobrushin():
    """γ_max ≤ L, as W₁ to the uniform law grows like e^{γ_max t}; the slack is 4 on S¹
    for β → 0."""
    betas = np.array([0.0, 0.1, 1.0, 5.0, 50.0])
    for model in MODELS:
        bound = np.asarray(ms.dobrushin_rate(betas, model))
        slack = bound / np.asarray(ms.most_unstable(betas, 2, model).gamma_max)
        assert np.all(slack >= 1)
        np.testing.assert_allclose(slack[0], 4.0, rtol=1e-12)


# --------------------------------------------------------------------------- refusals


def test_refusals_of_growth_rates():
    with pytest.raises(ValueError, match=r"`beta` must be finite and ≥ 0, but is -1"):
        ms.growth_rates(-1.0, 2, 1)
    with pytest.raises(ValueError, match=r"`d`.*≥ 2"):
        ms.growth_rates(1.0, 1, 1)
    with pytest.raises(ValueError, match=r"`k` must be integers ≥ 0, but is 1.5"):
        ms.growth_rates(1.0, 2, 1.5)
    with pytest.raises(ValueError, match="Did you mean `usa`"):
        ms.growth_rates(1.0, 2, 1, "us")
    with pytest.raises(ValueError, match="`normalisation` must be one of"):
        ms.growth_rates(1.0, 2, 1, normalisation="fig")
    with pytest.raises(ValueError, match=r"\(USA\) only on S¹"):
        ms.growth_rates(1.0, 3, 1, normalisation="figure")
    with pytest.raises(ValueError, match=r"\(USA\) only\."):
        ms.growth_rates(1.0, 3, 1, "sa", normalisation="funk-hecke")
    with pytest.raises(ValueError, match="`k` must be concrete"):
        jax.jit(lambda k: ms.growth_rates(1.0, 2, k))(3)
    with pytest.raises(ValueError, match="`k` must be > 0"):
        ms.growth_rate_curve(1.0, 2, [0.0, 1.0])
