"""Clusters by single linkage, against SciPy's dendrogram, and their invariances."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import pdist

import meanformer as mf
from helpers import random_rotation, random_tokens
from meanformer import observables
from meanformer.observables import Clusters, clusters

N = 40  # one number of tokens for all random sets: each d compiles once


def random_set(rng, d):
    """N tokens, some scattered, some in tight groups, some coincident."""
    x = random_tokens(rng, N, d)
    x[10:25] = x[rng.integers(0, 3, size=15)] + rng.normal(size=(15, d)) * 0.02
    x[25:30] = x[rng.integers(0, 25, size=5)]
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def same_partition(a, b):
    """Whether two labellings have the same groups."""
    pairs = set(zip(a.tolist(), b.tolist()))
    return len(pairs) == len(set(a.tolist())) == len(set(b.tolist()))


def geodesics(x):
    """Condensed matrix of angles, by the chord."""
    return 2 * np.arcsin(np.minimum(pdist(x) / 2, 1))


@given(st.sampled_from([2, 3, 5]), st.integers(0, 10**6), st.floats(-3, 0.4))
def test_clusters_are_those_of_the_dendrogram(d, seed, log_radius):
    """Cutting SciPy's single-linkage tree of the angles at the radius gives the same groups,
    whose masses, sizes and barycentres are sums over the members."""
    rng = np.random.default_rng(seed)
    x, w = random_set(rng, d), rng.uniform(0.1, 1, size=N)
    radius, w = 10**log_radius, w / w.sum()
    exact = fcluster(linkage(geodesics(x), "single"), radius, "distance")
    found = clusters(mf.Empirical(x, w), radius)
    labels = np.asarray(found.labels)
    assert same_partition(labels, exact)
    assert found.count == len(set(exact))
    for k in range(min(int(found.count), 32)):
        members = labels == k
        mass = w[members].sum()
        barycentre = w[members] @ x[members] / mass
        np.testing.assert_allclose(found.masses[k], mass, rtol=1e-13)
        assert found.sizes[k] == members.sum()
        length = np.linalg.norm(barycentre)
        np.testing.assert_allclose(found.resultants[k], length, rtol=1e-12)
        np.testing.assert_allclose(found.centres[k] * length, barycentre, atol=1e-13)
    assert np.all(np.diff(found.masses) <= 1e-15)
    np.testing.assert_array_equal(found.masses[int(found.count) :], 0)


@given(st.sampled_from([2, 3, 5]), st.integers(0, 10**6))
def test_clusters_do_not_depend_on_the_order_of_the_tokens(d, seed):
    """Bit for bit, with equal weights and ties of mass; labels are permuted with the tokens."""
    rng = np.random.default_rng(seed)
    x, p = random_set(rng, d), rng.permutation(N)
    a, b = clusters(mf.Empirical(x), 0.1), clusters(mf.Empirical(x[p]), 0.1)
    np.testing.assert_array_equal(np.asarray(a.labels)[p], b.labels)
    for name in ("count", "masses", "sizes", "centres", "resultants"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


@given(st.sampled_from([2, 3, 5]), st.integers(0, 10**6))
def test_clusters_turn_with_the_sphere(d, seed):
    """A rotation keeps masses and labels (of unequal masses) and turns the centres."""
    rng = np.random.default_rng(seed)
    x, w, R = random_set(rng, d), rng.uniform(0.1, 1, size=N), random_rotation(rng, d)
    a, b = (clusters(mf.Empirical(y, w), 0.15) for y in (x, x @ R.T))
    np.testing.assert_array_equal(a.labels, b.labels)
    np.testing.assert_allclose(a.masses, b.masses, rtol=1e-13)
    np.testing.assert_allclose(a.centres @ R.T, b.centres, atol=1e-9)


def test_tokens_of_weight_zero_join_nothing():
    """A weightless bridge between two tokens leaves two clusters and gets the label −1."""
    for d in (2, 3, 4):
        x = np.zeros((3, d))
        x[:, :2] = [[np.cos(t), np.sin(t)] for t in (0.0, 0.1, 0.2)]
        whole = clusters(mf.Empirical(x), 0.11)
        parted = clusters(mf.Empirical(x, [1, 0, 2]), 0.11)
        assert (whole.count, parted.count) == (1, 2)
        np.testing.assert_array_equal(parted.labels, [1, -1, 0])
        np.testing.assert_array_equal(parted.sizes[:3], [1, 1, 0])
        np.testing.assert_allclose(parted.masses[:3], [2 / 3, 1 / 3, 0], rtol=1e-14)


def test_a_cluster_on_the_circle_may_cross_the_cut_of_the_angle():
    """Tokens on both sides of −1 ∈ S¹ are neighbours; a full ring is one cluster without a
    centre."""
    theta = np.array([np.pi - 0.05, -np.pi + 0.05, 0.0])
    found = clusters(mf.Empirical(mf.sphere.from_angles(theta)), 0.11)
    np.testing.assert_array_equal(found.labels, [0, 0, 1])
    np.testing.assert_allclose(found.centres[:2], [[-1, 0], [1, 0]], atol=1e-15)
    ring = mf.Uniform(2).nodes(64)
    found = clusters(ring, 2 * np.pi / 64 + 1e-9)
    assert found.count == 1
    assert found.resultants[0] < 1e-15
    assert clusters(ring, 2 * np.pi / 64 - 1e-9).count == 64


@pytest.mark.parametrize("excess", [1e-3, 1e-9, 1e-13, -1e-9])
def test_a_gap_just_above_the_radius_parts_two_crowds(excess):
    """Two bands of 2000 tokens on S² face each other along a front at the distance
    radius·(1 + excess): two clusters for a positive excess, one for a negative."""
    rng = np.random.default_rng(0)
    n, radius = 2000, 0.2
    up, down = (np.append(rng.uniform(0, 0.3, n - 50), np.zeros(50)) for _ in "ab")
    longitude = rng.uniform(-np.pi, np.pi, n)
    gap = radius * (1 + excess)
    latitude = np.concatenate([gap / 2 + up, -gap / 2 - down])
    longitude = np.append(longitude, longitude)  # fronts opposite each other
    x = np.stack(
        [
            np.cos(latitude) * np.cos(longitude),
            np.cos(latitude) * np.sin(longitude),
            np.sin(latitude),
        ],
        1,
    )
    assert clusters(mf.Empirical(x), radius).count == (2 if excess > 0 else 1)


@pytest.mark.parametrize("d", [2, 3])
def test_many_tokens_in_one_place_are_counted_at_once(d):
    """50 000 tokens collapsed into three clusters of size 10⁻⁶: no pairs are formed (they
    would not fit), masses are exact."""
    rng = np.random.default_rng(1)
    n = 50_000
    place = rng.choice(3, size=n, p=[0.5, 0.3, 0.2])
    x = np.eye(3)[place][:, :d] if d == 3 else mf.sphere.from_angles(2.0 * place)
    x = np.asarray(x) + 1e-6 * rng.normal(size=(n, d))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    found = clusters(mf.Empirical(x), 0.01)
    assert found.count == 3
    np.testing.assert_array_equal(found.sizes[:3], np.bincount(place))
    np.testing.assert_allclose(found.masses[:3], np.bincount(place) / n, rtol=1e-11)
    np.testing.assert_array_equal(found.labels, place)


def test_sums_over_clusters_keep_the_precision_of_float32():
    """50 000 equal weights in two clusters: masses to 10 roundings (a chain of additions is
    wrong by more than 10⁻⁴)."""
    n = 50_000
    theta = np.where(np.arange(n) % 4 == 0, 0.0, 1.0).astype(np.float32)
    mu = mf.Empirical(mf.sphere.from_angles(jnp.asarray(theta)))
    found = clusters(mu, 0.1)
    assert found.masses.dtype == jnp.float32
    np.testing.assert_allclose(found.masses[:2], [0.75, 0.25], rtol=6e-7)


def test_only_the_heaviest_are_listed_but_all_are_counted():
    mu = mf.Empirical(mf.Uniform(2).nodes(12).points, np.arange(1, 13))
    found = clusters(mu, 0.1, most=3)
    assert found.count == 12
    np.testing.assert_allclose(found.masses, np.array([12, 11, 10]) / 78, rtol=1e-14)
    np.testing.assert_array_equal(found.labels, np.arange(12)[::-1])


def test_masses_and_centres_have_derivatives_with_the_assignment_held_fixed():
    """Σ over the heaviest cluster: ∂mass/∂wᵢ is 1 for members and 0 else; the centre of two
    tokens of equal weight follows their mean."""
    d, rng = 3, np.random.default_rng(2)
    x, w = random_set(rng, d), jnp.full(N, 1 / N)
    labels = clusters(mf.Empirical(x), 0.2).labels

    def mass(w):
        return clusters(mf.Empirical(x, w, check=False), 0.2).masses[0]

    np.testing.assert_array_equal(jax.grad(mass)(w), labels == 0)
    pair = np.eye(d)[:1] + np.array([[0.0] * (d - 1) + [s] for s in (0.05, -0.05)])
    pair /= np.linalg.norm(pair, axis=1, keepdims=True)

    def height(x):
        return clusters(mf.Empirical(x, check=False), 0.2).centres[0, -1]

    slope = jax.grad(height)(jnp.asarray(pair))[:, -1]
    np.testing.assert_allclose(slope, 0.5 / np.cos(np.arctan(0.05)), rtol=1e-12)


def test_clusters_work_under_jit_and_vmap():
    """A batch of sets, and of radii, gives what each gives alone."""
    for d in (2, 3):  # on the device, on the host
        batch = jnp.stack([random_set(np.random.default_rng(s), d) for s in range(3)])
        radii = jnp.array([0.05, 0.1, 0.4])

        def found(x, radius):
            return Clusters(radius, labels=True)(mf.Empirical(x, check=False))

        together = jax.jit(jax.vmap(found))(batch, radii)
        for i in range(3):
            alone = found(batch[i], radii[i])
            for name, value in alone.items():
                np.testing.assert_allclose(together[name][i], value, atol=1e-15)


def test_clusters_refuse_bad_input():
    mu = mf.Empirical(np.eye(3))
    with pytest.raises(ValueError, match="`radius` must be finite and > 0, but is 0"):
        clusters(mu, 0.0)
    with pytest.raises(ValueError, match="`radius` must be an angle ≤ π, but is 4"):
        clusters(mu, 4.0)
    with pytest.raises(ValueError, match="`most` must be an integer ≥ 1, but is 0"):
        observables.Clusters(0.1, 0)
