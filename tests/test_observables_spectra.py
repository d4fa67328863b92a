"""Spectra and norms, total variation, Wasserstein distances as observables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import given, strategies as st
from scipy.stats import binom

import meanformer as mf
from helpers import random_rotation, random_tokens
from meanformer import observables
from meanformer.observables import TotalVariation, power_spectrum, total_variation


def weighted(seed, n, d):
    """Random weighted tokens: (points, weights of sum 1, measure)."""
    rng = np.random.default_rng(seed)
    x, w = random_tokens(rng, n, d), rng.uniform(0.1, 1, size=n)
    return x, w / w.sum(), mf.Empirical(x, w)


# ------------------------------------------------------------------------- spectra


@given(st.integers(0, 10**6))
def test_fourier_spectrum_is_the_sum_over_tokens(seed):
    x, w, mu = weighted(seed, 20, 2)
    z = x[:, 0] + 1j * x[:, 1]
    exact = [np.sum(w * z.conj() ** k) for k in range(9)]
    np.testing.assert_allclose(observables.fourier_spectrum(mu, 8), exact, atol=1e-14)
    for k in (1, 5):
        np.testing.assert_allclose(
            observables.fold_order(mu, k), abs(exact[k]), atol=1e-14
        )


@given(st.integers(0, 10**6))
def test_harmonic_spectrum_agrees_with_scipy(seed):
    """∫Y_lm dµ: the real and imaginary parts of SciPy's complex harmonics, m = 0 apart."""
    x, w, mu = weighted(seed, 20, 3)
    polar, azimuth = np.arccos(x[:, 2]), np.arctan2(x[:, 1], x[:, 0])
    found = np.asarray(observables.harmonic_spectrum(mu, 5))
    for l in range(6):
        for m in range(l + 1):
            c = np.sum(w * scipy.special.sph_harm_y(l, m, polar, azimuth))
            c *= (-1) ** m * (np.sqrt(2) if m else 1)  # no Condon–Shortley sign
            np.testing.assert_allclose(found[l * l + l + m], c.real, atol=1e-13)
            if m:
                np.testing.assert_allclose(found[l * l + l - m], c.imag, atol=1e-13)


@pytest.mark.parametrize("d", [2, 3, 5])
def test_power_spectrum_is_the_double_integral_of_the_zonal_polynomials(d):
    """p_l = ∬P_l(⟨x,y⟩)dµdµ, the same after a rotation; P_l by SciPy's Gegenbauer."""
    x, w, mu = weighted(d, 20, d)
    q = np.clip(x @ x.T, -1, 1)
    if d == 2:
        P = [np.cos(l * np.arccos(q)) for l in range(7)]
    else:
        a = d / 2 - 1
        C = scipy.special.eval_gegenbauer
        P = [C(l, a, q) / C(l, a, 1.0) for l in range(7)]
    exact = [w @ p @ w for p in P]
    np.testing.assert_allclose(power_spectrum(mu, 6), exact, atol=1e-13)
    R = random_rotation(np.random.default_rng(d), d)
    turned = mf.Empirical(x @ R.T, w)
    np.testing.assert_allclose(power_spectrum(turned, 6), exact, atol=1e-13)
    point = mf.Empirical(np.eye(d)[:1])
    np.testing.assert_allclose(power_spectrum(point, 6), 1, atol=1e-13)


def test_harmonic_spectrum_in_blocks_is_that_of_all_tokens():
    """More tokens than one block: the spectrum is additive over parts of the measure."""
    x, w, mu = weighted(0, 9001, 3)
    whole = observables.harmonic_spectrum(mu, 3)
    parts = 0.0
    for half in (slice(0, 3000), slice(3000, 9001)):
        part = observables.harmonic_spectrum(mf.Empirical(x[half], w[half]), 3)
        parts = parts + w[half].sum() * part
    np.testing.assert_allclose(whole, parts, atol=1e-14)


def test_negative_norm_of_a_uniform_sample_is_pi_coth_pi_minus_1():
    """E[n ‖µ − µ_∞‖²_{H⁻¹}] = π coth π − 1 on S¹. n|µ̂_k|² is exponential of mean 1 up to O(1/n),
    so that one sample varies by (Σ(2/(1+k²))²)^{1/2}; degrees above K hold ≈ 2/K."""
    n, K, seeds = 200, 64, 2000
    keys = jax.random.split(jax.random.key(0), seeds)

    @jax.jit
    def squares(keys):
        def one(key):
            mu = mf.Empirical(mf.Uniform(2).sample(key, n), check=False)
            return n * observables.sobolev_norm(mu, K) ** 2

        return jax.lax.map(one, keys)

    k = np.arange(1, K + 1)
    deviation = np.sqrt(np.sum((2 / (1 + k**2)) ** 2) / seeds)
    rest = np.pi / np.tanh(np.pi) - 1 - np.sum(2 / (1.0 + k**2))
    np.testing.assert_allclose(rest, 2 / K, rtol=0.02)
    mean = float(jnp.mean(squares(keys))) + rest
    assert abs(mean - 2.1533) < 4 * deviation
    assert deviation < 0.03


def test_negative_norm_on_the_sphere_is_a_kernel():
    """‖µ − µ_∞‖²_{H^{−s}} ("dual", S²) = Σ_{l≥1} (2l+1)/4π (1+l(l+1))^{−s} ∬P_l dµdµ, by the
    addition theorem."""
    x, w, mu = weighted(3, 12, 3)
    q, s = np.clip(x @ x.T, -1, 1), 1.7
    exact = sum(
        (2 * l + 1) / (4 * np.pi) * (1 + l * (l + 1)) ** -s
        * (w @ scipy.special.eval_legendre(l, q) @ w)
        for l in range(1, 9)
    )  # fmt: skip
    found = observables.sobolev_norm(mu, 8, s, "dual")
    np.testing.assert_allclose(found, np.sqrt(exact), rtol=1e-12)


@given(st.sampled_from([2, 3, 5]), st.integers(0, 10**6))
def test_laws_of_period_2pi_over_k_are_in_H_k(k, seed):
    """Distance to H_k: 0 on S¹ for µ averaged over rotations by 2π/k, never more than the
    norm; H_1 holds everything; Pythagoras for what is left."""
    rng = np.random.default_rng(seed)
    theta = rng.uniform(-np.pi, np.pi, size=4)
    turns = (theta[:, None] + 2 * np.pi * np.arange(k) / k).ravel()
    mu = mf.Empirical(mf.sphere.from_angles(turns))
    assert observables.distance_to_modes(mu, k, 12) < 1e-14
    other = mf.Empirical(mf.sphere.from_angles(theta))
    assert observables.distance_to_modes(other, 1, 12) == 0
    share = observables.distance_to_modes(other, k, 12, relative=True)
    away = observables.distance_to_modes(other, k, 12)
    c = np.array([np.mean(np.exp(-1j * m * theta)) for m in range(13)])
    parts = 2 * np.abs(c[1:]) ** 2 / (1 + np.arange(1, 13) ** 2)
    outside = np.arange(1, 13) % k != 0
    np.testing.assert_allclose(away**2, parts[outside].sum(), rtol=1e-11)
    np.testing.assert_allclose(share**2, parts[outside].sum() / parts.sum(), rtol=1e-11)


def test_antipodal_laws_are_in_H_2_of_the_sphere():
    """Even laws have no odd degrees; a single token is far from H_2, and µ_∞ is in all H_k."""
    x = random_tokens(np.random.default_rng(5), 6, 3)
    even = mf.Empirical(np.concatenate([x, -x]))
    assert observables.distance_to_modes(even, 2, 8, 1.5) < 1e-14
    l = np.arange(1, 9)
    parts = (2 * l + 1) * (1.0 + l * (l + 1)) ** -1.5  # of one token, up to a factor
    share = observables.distance_to_modes(
        mf.Empirical(x[:1]), 2, 8, 1.5, "dual", relative=True
    )
    odd = parts[l % 2 == 1].sum()
    np.testing.assert_allclose(share**2, odd / parts.sum(), rtol=1e-12)
    flat = mf.Uniform(3).nodes(800)  # exact to degree 39
    assert observables.distance_to_modes(flat, 2, 8, 1.5) < 1e-14


def test_spectra_refuse_other_spheres():
    mu = mf.Empirical(np.eye(4))
    with pytest.raises(ValueError, match=r"`mu` must be a measure on S\^2 .* has d = 4"):
        observables.sobolev_norm(mu, 3)
    with pytest.raises(ValueError, match=r"`mu` must be a measure on S\^1 .* has d = 4"):
        observables.fourier_spectrum(mu, 3)
    with pytest.raises(ValueError, match=r"`mu` must be a measure on S¹ .* d = 4"):
        observables.fold_order(mu, 3)
    with pytest.raises(ValueError, match=r"`definition` must be one of"):
        observables.sobolev_norm(mf.Empirical(np.eye(2)), 3, definition="weak")
    with pytest.raises(ValueError, match=r"`s` must be finite and > 0"):
        observables.SobolevNorm(3, 0.0)


# ------------------------------------------------------------------ total variation


@pytest.mark.parametrize(("n", "cells"), [(7, 2), (20, 100), (1000, 100), (6400, 10)])
def test_noise_of_total_variation_is_the_binomial_mean_deviation(n, cells):
    """½ c E|N/n − 1/c|, by SciPy's binomial law: exact up to n/c = 64, to 0.2 % above."""
    k = np.arange(n + 1)
    exact = cells / 2 * np.sum(binom.pmf(k, n, 1 / cells) * abs(k / n - 1 / cells))
    found = observables.total_variation_noise(n, cells)
    np.testing.assert_allclose(found, exact, rtol=2e-3 if n / cells > 64 else 1e-11)
    single = observables.total_variation_noise(np.float32(n), cells)
    np.testing.assert_allclose(single, exact, rtol=2e-3 if n / cells > 64 else 1e-5)


def mean_and_error(law, n, weights=None, bins=100, seeds=400):
    """Mean of total variation over samples (debiased, raw) and standard errors."""
    observable = TotalVariation(bins), TotalVariation(bins, debias=False)

    @jax.jit
    def values(keys):
        def one(key):
            mu = mf.Empirical(law(key, n), weights, check=False)
            return jnp.stack([f(mu) for f in observable])

        return jax.lax.map(one, keys)

    found = values(jax.random.split(jax.random.key(1), seeds))
    return np.mean(found, 0), np.std(found, 0) / np.sqrt(seeds)


def uniform(d):
    return lambda key, n: mf.Uniform(d).sample(key, n)


@pytest.mark.parametrize(
    ("n", "d", "bins"), [(30, 2, 100), (1000, 2, 100), (400, 2, 8), (1000, 3, (5, 12))]
)
def test_debiased_total_variation_of_uniform_samples_is_0_on_average(n, d, bins):
    """Within 4 standard errors, which are far below the bias of the histogram."""
    mean, error = mean_and_error(uniform(d), n, bins=bins)
    cells = np.prod(bins)
    noise = float(observables.total_variation_noise(n, int(cells)))
    assert abs(mean[0]) < 4 * error[0] < 0.3 * noise
    assert abs(mean[1] - noise) < 4 * error[1]


def test_weighted_tokens_count_as_their_effective_number():
    """Weights of an effective number 1/Σw² ≈ 830 of 1000: the bias is that of 830 tokens."""
    w = np.random.default_rng(0).uniform(0.2, 2, size=1000)
    w /= w.sum()
    mean, error = mean_and_error(uniform(2), 1000, jnp.asarray(w))
    noise = float(observables.total_variation_noise(1 / np.sum(w**2), 100))
    assert noise > 1.08 * float(observables.total_variation_noise(1000, 100))
    assert abs(mean[0]) < 4 * error[0]
    assert abs(mean[1] / noise - 1) < 0.02


@pytest.mark.parametrize("n", [1000, 5000])
def test_debiased_total_variation_of_a_known_density(n):
    """(1 + a cos θ)/2π, a = 0.9, is a/π from the uniform law (in 100 cells to 2·10⁻⁴). The mean
    over samples is right to a tenth of the noise of the histogram, whose own bias is four
    times the error here."""
    a = 0.9
    theta = np.linspace(-np.pi, np.pi, 20_001)
    cdf = (theta + np.pi + a * np.sin(theta)) / (2 * np.pi)

    def law(key, n):
        u = jax.random.uniform(key, (n,))
        return mf.sphere.from_angles(jnp.interp(u, cdf, theta))

    mean, error = mean_and_error(law, n)
    noise = float(observables.total_variation_noise(n, 100))
    wrong = abs(mean - a / np.pi)
    assert wrong[0] < 0.05 * noise + 4 * error[0] < 0.1 * noise
    assert wrong[1] > 4 * wrong[0]


def test_total_variation_without_correction_is_the_sum():
    """½Σ|m − 1/c| of NumPy's histogram; a single point is 1 − 1/c away, corrected or not."""
    x, w, mu = weighted(7, 50, 2)
    mass, _ = np.histogram(np.arctan2(x[:, 1], x[:, 0]), 9, (-np.pi, np.pi), weights=w)
    np.testing.assert_allclose(
        total_variation(mu, 9, debias=False), abs(mass - 1 / 9).sum() / 2, rtol=1e-13
    )
    point = mf.Empirical(np.tile(x[:1], (5000, 1)))
    np.testing.assert_allclose(total_variation(point, 9), 8 / 9, rtol=1e-12)
    lattice = mf.Uniform(2).nodes(900)  # more regular than a sample
    lowest = -2.33 * float(observables.total_variation_noise(900, 9))
    np.testing.assert_allclose(total_variation(lattice, 9), lowest, rtol=0.01)


def test_cells_of_equal_area_are_bands_of_equal_height_by_sectors():
    """Archimedes: bands of equal height; masses by NumPy's two-dimensional histogram."""
    x, w, mu = weighted(8, 60, 3)
    azimuth = np.arctan2(x[:, 1], x[:, 0])
    ranges = ((-1, 1), (-np.pi, np.pi))
    exact, *_ = np.histogram2d(x[:, 2], azimuth, (4, 6), ranges, weights=w)
    np.testing.assert_allclose(observables.equal_area_histogram(mu, 4, 6), exact)
    poles = mf.Empirical([[0.0, 0, 1], [0, 0, -1]])
    assert jnp.sum(observables.equal_area_histogram(poles, 4, 6)[jnp.array([0, 3])]) == 1


def test_total_variation_refuses_bad_input():
    with pytest.raises(ValueError, match="`bins` must be an integer ≥ 2, but is 1"):
        total_variation(mf.Empirical(np.eye(2)), 1)
    with pytest.raises(ValueError, match="`mu` must be a measure on S¹"):
        total_variation(mf.Empirical(np.eye(4)), 10)
    with pytest.raises(ValueError, match=r"`bins` must be a number, or a pair"):
        TotalVariation((1, 1))
    with pytest.raises(ValueError, match="`n` must be finite and ≥ 1, but is 0"):
        observables.total_variation_noise(0.0, 10)


# ---------------------------------------------------------------------- Wasserstein


def test_wasserstein_to_a_reference_is_an_observable():
    """W₂ of tokens and the same tokens turned by a small angle is the angle; to the uniform
    law W₁ of k equal clusters is π/2k."""
    theta = np.array([-2.0, 0.1, 0.5, 2.2])
    mu = mf.Empirical(mf.sphere.from_angles(theta), [1, 2, 3, 4])
    turned = mf.Empirical(mf.sphere.from_angles(theta + 0.01), [1, 2, 3, 4])
    found = observables.Wasserstein(turned)(mu)
    np.testing.assert_allclose(found["value"], 0.01, rtol=1e-10)
    assert bool(found["converged"])
    clusters = mf.Uniform(2).nodes(5)
    to_uniform = observables.Wasserstein(mf.Uniform(2), p=1)
    np.testing.assert_allclose(to_uniform(clusters)["value"], np.pi / 10, rtol=1e-12)


def test_a_promise_of_equal_weights_is_checked():
    """Assignment and transport plan agree where it holds; else an error says so."""
    x, y = random_tokens(np.random.default_rng(0), 6, 3), np.eye(3)[[0, 1, 2, 0, 1, 2]]
    mu = mf.Empirical(x)
    plain, even = (observables.Wasserstein(y, equal_weights=e) for e in (False, True))
    np.testing.assert_allclose(plain(mu)["value"], even(mu)["value"], rtol=1e-12)
    with pytest.raises(ValueError, match="`equal_weights` must be false"):
        even(mf.Empirical(x, np.arange(1, 7)))
