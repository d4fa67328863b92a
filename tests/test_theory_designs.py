"""Designs known by name, SciPy's polynomials, and second-order velocities of the simulator."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special

import meanformer as mf
from meanformer import harmonics
from meanformer.theory import designs

GOLDEN = (1 + 5**0.5) / 2


def icosahedron():
    corners = [[0, s, t * GOLDEN] for s in (1, -1) for t in (1, -1)]
    return np.concatenate([np.roll(corners, i, axis=1) for i in range(3)])


def cell_24():
    """±eᵢ ± eⱼ in R⁴."""
    pairs = [(i, j) for i in range(4) for j in range(i)]
    eye = np.eye(4)
    return np.array(
        [s * eye[i] + t * eye[j] for i, j in pairs for s in (1, -1) for t in (1, -1)]
    )


@pytest.mark.parametrize(
    ("points", "strength"),
    [
        ([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], 2),  # tetrahedron
        (np.concatenate([np.eye(3), -np.eye(3)]), 3),  # octahedron
        (icosahedron(), 5),
        (cell_24(), 5),
        (np.concatenate([np.eye(5), -np.eye(5)]), 3),  # cross-polytope
        (np.exp(2j * np.pi * np.arange(7) / 7).view(float).reshape(7, 2), 6),  # heptagon
        ([[0, 0, 1.0], [0, 0, -1]], 1),
        ([[0, 1.0, 0]], 0),
    ],
)
def test_strength_of_known_designs(points, strength):
    """The tables of spherical designs."""
    points = np.asarray(points, float)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    found = designs.design_strength(points, degree=8)
    assert int(found.strength) == strength


def test_residuals_are_averages_of_harmonics():
    """residual_l = (4π/(2l+1)) Σ_m (∫Y_lm dµ)² for weighted points of S², against SciPy's Y_lm;
    a Gauss rule of degree 7 is a weighted design of strength 7."""
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(9, 3)), rng.dirichlet(np.ones(9))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    found = designs.design_strength(x, w, degree=5).residuals
    polar, azimuth = np.arccos(x[:, 2]), np.arctan2(x[:, 1], x[:, 0])
    for l in range(1, 6):
        Y = [scipy.special.sph_harm_y(l, m, polar, azimuth) for m in range(-l, l + 1)]
        total = np.sum(np.abs(np.array(Y) @ w) ** 2) * 4 * np.pi / (2 * l + 1)
        np.testing.assert_allclose(found[l - 1], total, rtol=1e-12)
    nodes = mf.Uniform(3).nodes(4 * 8)  # 4 latitudes, 8 longitudes
    assert int(designs.design_strength(nodes.points, nodes.weights).strength) == 7
    assert int(designs.design_strength(nodes.points).strength) < 7
    single = designs.design_strength(np.asarray(nodes.points, np.float32), nodes.weights)
    assert single.residuals.dtype == np.float32
    assert int(single.strength) == 7


def test_residuals_are_differentiable():
    """∂residual_1/∂x of three points is that of |mean|²."""
    x = jnp.asarray(mf.Uniform(3).sample(jax.random.key(0), 3))

    def f(x):
        return designs.design_strength(x, degree=1).residuals[0]

    np.testing.assert_allclose(f(x), np.sum(np.mean(x, axis=0) ** 2), rtol=1e-13)
    np.testing.assert_allclose(
        jax.grad(f)(x), np.tile(2 / 3 * np.mean(x, axis=0), (3, 1)), rtol=1e-12
    )


def test_triple_products():
    """E5: ∫P₃P₃P₂ = 8/105 = 0.0762 on S²; SciPy's quadrature of its Gegenbauer polynomials in
    other dimensions; 0 outside |a−b| ≤ c ≤ a+b and for odd sums."""
    np.testing.assert_allclose(designs.triple_product(3, 3, 3, 2), 8 / 105, rtol=1e-13)
    for d, (a, b, c) in ((3, (2, 4, 4)), (4, (1, 3, 2)), (7, (3, 3, 4)), (2, (2, 3, 5))):

        def integrand(t):  # q = cos t
            out = np.sin(t) ** (d - 2)  # noqa: B023
            for l in (a, b, c):  # noqa: B023
                alpha = (d - 2) / 2  # noqa: B023
                q = np.cos(t)
                if alpha == 0:
                    out *= scipy.special.eval_chebyt(l, q)
                    continue
                top = scipy.special.eval_gegenbauer(l, alpha, 1.0)
                out *= scipy.special.eval_gegenbauer(l, alpha, q) / top
            return out

        expected = scipy.integrate.quad(integrand, 0, np.pi, epsabs=1e-14)[0]
        found = designs.triple_product(d, a, b, c)
        np.testing.assert_allclose(found, expected, rtol=1e-11)
    for a, b, c in ((3, 3, 8), (1, 4, 2), (2, 2, 3)):
        np.testing.assert_allclose(designs.triple_product(3, a, b, c), 0, atol=1e-14)


def test_only_degrees_one_and_two_keep_to_themselves():
    """E5: the share outside H_k is 0 for k = 1, 2 and on S¹, and positive for k ≥ 3, d ≥ 3; on S²
    k = 3 feeds degrees 2 and 4."""
    for k, d in ((1, 3), (2, 3), (2, 8), (3, 2)):
        assert float(designs.leakage(k, d).share) < 1e-28
    for k, d in ((4, 3), (3, 8)):
        assert float(designs.leakage(k, d).share) > 0.1
    third = designs.leakage(3)
    np.testing.assert_array_equal(third.degrees, [0, 2, 4, 6])
    # P₃² = Σ (2l+1) (3 3 l; 0 0 0)² P_l with Wigner's symbols.
    expected = np.array([1 / 7, 4 / 21, 18 / 77, 100 / 231])
    np.testing.assert_allclose(third.product, expected, rtol=1e-13)
    power = (np.array([0, 6, 20, 42]) * expected) ** 2 / (2 * np.arange(0, 7, 2) + 1)
    np.testing.assert_allclose(third.share, power[1:3].sum() / power.sum(), rtol=1e-12)


@pytest.mark.parametrize(("d", "k", "n"), [(3, 3, 1800), (4, 3, 8000)])
def test_velocities_of_the_simulator_leak_as_predicted(d, k, n):
    """∫⟨∇P_l, χ⟩dµ/∫P_l² = feed_l γ_k a² for µ = (1 ± aP_k)µ_∞, averaged over the sign: (USA)
    velocities of weighted nodes, of which the theory knows nothing."""
    mu, beta, a = mf.Uniform(d).nodes(n), 2.0, 0.1
    x = mu.points
    P = harmonics.gegenbauer(d, 2 * k, x[:, 0])
    field = mf.UnnormalizedSelfAttention(np.eye(d), np.eye(d), np.eye(d), beta)
    slopes = jax.vmap(jax.jacfwd(lambda y: harmonics.gegenbauer(d, 2 * k, y[0])))(x)
    drifts = np.zeros(2 * k + 1)
    for sign in (a, -a):
        law = mf.Empirical(x, mu.weights * (1 + sign * P[:, k]))
        drift = field.tangent(x, law)
        drifts += np.einsum("n,nld,nd->l", law.weights, slopes, drift) / (2 * a * a)
    found = drifts / (np.asarray(mu.weights) @ np.asarray(P) ** 2)
    gamma = k * (k + d - 2) * scipy.special.iv(k + d / 2 - 1, beta) / beta ** (d / 2)
    gamma *= 2 ** (d / 2 - 1) * scipy.special.gamma(d / 2)
    leak = designs.leakage(k, d)
    np.testing.assert_allclose(found[::2], leak.feed * gamma, atol=1e-9)


def test_refusals():
    with pytest.raises(ValueError, match="`points` must have rows of norm 1"):
        designs.design_strength([[1.0, 1.0, 0.0]])
    with pytest.raises(ValueError, match="`degree` must be an integer ≥ 1"):
        designs.design_strength(np.eye(3), degree=0)
    with pytest.raises(ValueError, match="`k` must be an integer ≥ 1, but is 0"):
        designs.leakage(0)
    with pytest.raises(ValueError, match="`a` must be an integer ≥ 0"):
        designs.triple_product(3, -1, 1, 2)
