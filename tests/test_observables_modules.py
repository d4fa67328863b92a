"""Observables as modules: in runs, under transformations, in both precisions."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import meanformer as mf
from helpers import central_difference, random_tokens
from meanformer import observables as ob

I3 = np.eye(3)
B, V = np.diag([1.0, 0.5, -0.3]), np.diag([2.0, 1.0, -0.6])
E2 = I3[:, :2]
N = 12


# Each from one number s, so that its parameters can be changed.
ON_SPHERE = {
    "energy": lambda s: ob.Energy(I3, B, s),
    "log energy": lambda s: ob.Energy(I3, B, s, log=True),
    "normalised energy": lambda s: ob.NormalisedEnergy(I3, B, V, s),
    "lyapunov": lambda s: ob.Lyapunov(E2, s, 0.1),
    "wasserstein": lambda s: ob.Wasserstein(
        mf.sphere.normalise(jnp.asarray(I3) + s / 10), equal_weights=True
    ),
    "distance to H_2": lambda s: ob.DistanceToModes(2, 2, s, relative=True),
    "clusters": lambda s: ob.Clusters(s / 10, most=4, labels=True),
    "rank": lambda s: ob.Rank(s / 10),
    "cumulants": lambda s: ob.Cumulants(s * I3[0]),
}
WITHOUT_ARRAYS = {
    "alignment": ob.Alignment(E2),
    "polar": ob.PolarOrder(),
    "nematic": ob.NematicOrder(),
    "interaction": ob.Interaction(I3, B, 1.0),
    "power": ob.PowerSpectrum(2),
    "total variation": ob.TotalVariation((3, 4)),
    "effective rank": ob.EffectiveRank(),
    "participation": ob.ParticipationRatio(),
    "gram": ob.GramStatistics(),
    "kernel": ob.KernelEnergy(jnp.exp),
}
ON_CIRCLE = {
    "fold": ob.FoldOrder(3),
    "fourier": ob.FourierSpectrum(4),
    "norm": ob.SobolevNorm(4),
    "distance to H_3": ob.DistanceToModes(3, 4),
    "total variation": ob.TotalVariation(10),
    "to uniform": ob.Wasserstein(mf.Uniform(2), p=1),
    "clusters": ob.Clusters(0.1),
}


def all_on_sphere(s):
    return {name: make(s) for name, make in ON_SPHERE.items()} | WITHOUT_ARRAYS


def weighted(seed=0, d=3, n=N):
    rng = np.random.default_rng(seed)
    return mf.Empirical(random_tokens(rng, n, d), rng.uniform(0.2, 1, size=n))


class Traced(eqx.Module):
    """Counts how often it is traced."""

    calls: list = eqx.field(static=True, default_factory=list)

    def __call__(self, mu):
        self.calls.append(None)
        return mu.mean(mu.points[:, 0])


def test_runs_observe_everything_and_compile_once_for_all_parameters(tmp_path):
    """`solve` gives for each observable what it is of the tokens saved; a run with other
    parameters (β, radius, basis, reference, …) compiles nothing; the file holds it all."""
    x0 = random_tokens(np.random.default_rng(1), 3, 3)
    counter, ts = Traced(), np.array([0.0, 0.5, 1.0])

    def run(s):
        seen = {name: make(s) for name, make in ON_SPHERE.items()}
        seen |= {"gram": ob.GramStatistics(), "traced": counter}
        return mf.solve(mf.SelfAttention(I3, B, V, s), x0, ts, observables=seen), seen

    run(2.0)
    traced = len(counter.calls)
    second, seen = run(1.5)
    assert len(counter.calls) == traced > 0
    for name, observable in seen.items():
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a[1], b, atol=2e-9),
            second.observed[name],
            observable(second.measure(1)),
        )
    again = mf.load(second.save(tmp_path / "run.npz"))
    jax.tree.map(np.testing.assert_array_equal, again.observed, second.observed)


def test_layers_observe_on_the_circle(tmp_path):
    """`unroll` too, complex spectra included; other values of β compile nothing."""
    mu, eye, counter = weighted(2, 2), np.eye(2), Traced()
    for beta in (3.0, 2.0):
        seen = ON_CIRCLE | {"E": ob.Energy(eye, eye, beta), "traced": counter}
        field = mf.SelfAttention(eye, eye, eye, beta)
        run = mf.unroll(field, mu, 3, 0.1, observables=seen, save="all")
        traced = traced if beta == 2.0 else len(counter.calls)
    assert len(counter.calls) == traced > 0
    for name, observable in seen.items():
        got = jax.tree.map(lambda a: a[-1], run.observed[name])
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-13),
            got,
            observable(run.measure(-1)),
        )
    again = mf.load(run.save(tmp_path / "run.npz"))
    jax.tree.map(np.testing.assert_array_equal, again.observed, run.observed)


DIFFERENTIABLE = [
    "energy", "log energy", "interaction", "normalised energy", "lyapunov", "wasserstein",
    "distance to H_2", "cumulants", "alignment", "polar", "nematic", "power",
    "effective rank", "participation", "gram", "kernel",
]  # fmt: skip


def numbers(tree):
    """All floating-point numbers in one vector."""
    leaves = [jnp.ravel(a) for a in jax.tree.leaves(tree)]
    return jnp.concatenate([a for a in leaves if jnp.issubdtype(a.dtype, jnp.floating)])


def test_derivatives_in_tokens_and_weights_are_those_of_finite_differences():
    """d/dε of all differentiable observables at (x + εv)/|x + εv| and weights ∝ w + εa: forward
    mode, and reverse mode of a mixture."""
    rng = np.random.default_rng(3)
    x = jnp.asarray(random_tokens(rng, 3, 3))
    v, a = rng.normal(size=(3, 3)), rng.normal(size=3)
    base = jnp.array([1.0, 1.5, 2.2])  # no two parts equal: W₂ has no kink
    seen = {name: f for name, f in all_on_sphere(1.5).items() if name in DIFFERENTIABLE}
    seen["wasserstein"] = ob.Wasserstein(I3)  # weights are free here
    assert set(seen) == set(DIFFERENTIABLE)

    def values(eps):
        w = base + eps * a
        mu = mf.Empirical(mf.sphere.normalise(x + eps * v), w / w.sum(), check=False)
        picked = {name: f(mu) for name, f in seen.items()}
        picked["wasserstein"] = picked["wasserstein"]["value"]
        return numbers(picked)

    forward = jax.jit(lambda eps: jax.jvp(values, (eps,), (1.0,)))
    slope = forward(0.0)[1]
    exact = central_difference(lambda eps: forward(eps)[0], 0.0, 1e-3)
    np.testing.assert_allclose(slope, exact, rtol=1e-7, atol=1e-8)
    mixture = jnp.asarray(rng.normal(size=slope.shape))
    back = jax.jit(jax.grad(lambda eps: values(eps) @ mixture))(0.0)
    np.testing.assert_allclose(back, mixture @ slope, rtol=1e-9)


def test_derivatives_in_parameters_are_those_of_finite_differences():
    """d/ds of E, E/E_opt, E_p^ε, a distance in H^{−s}, … through the leaves of the modules."""
    mu = weighted(4)
    names = [n for n in DIFFERENTIABLE if n in ON_SPHERE and n != "wasserstein"]

    def values(s):
        return numbers({name: ON_SPHERE[name](s)(mu) for name in names})

    forward = jax.jit(lambda s: jax.jvp(values, (s,), (1.0,)))
    exact = central_difference(lambda s: forward(s)[0], 1.5, 1e-3)
    np.testing.assert_allclose(forward(1.5)[1], exact, rtol=1e-8, atol=1e-9)


def test_batches_are_batches_and_float32_stays_float32():
    """`vmap` over sets of tokens gives what each gives alone; results follow the dtype."""
    sets = jnp.stack([weighted(s, n=3).points for s in range(2)])
    seen = all_on_sphere(1.5)

    def values(x):
        mu = mf.Empirical(x, check=False)
        return {name: f(mu) for name, f in seen.items()}

    together, alone = jax.jit(jax.vmap(values))(sets), jax.jit(values)
    for i in range(2):
        single = alone(sets[i].astype(np.float32))
        for path, value in jax.tree.leaves_with_path(single):
            if jnp.issubdtype(value.dtype, jnp.inexact):
                assert value.dtype == jnp.float32, path
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=2e-5),
            together,
            single,
        )


def test_modules_refuse_what_functions_refuse():
    """At construction, or where the measure comes in."""
    with pytest.raises(ValueError, match="`beta` must be finite and > 0, but is 0"):
        ob.Energy(I3, I3, 0.0)
    with pytest.raises(ValueError, match="`Q` and `K` must have one shape"):
        ob.Energy(I3, np.eye(2), 1.0)
    with pytest.raises(ValueError, match="`Q` and `K` must have one shape"):
        ob.Interaction(1.0, 2.0, 1.0)
    with pytest.raises(ValueError, match="orthonormal columns"):
        ob.Alignment(2 * I3)
    with pytest.raises(ValueError, match=r"`E` must have shape \(d, k\) with d = 2"):
        ob.Alignment(I3)(mf.Empirical(np.eye(2)))
    with pytest.raises(ValueError, match="`tol` must be finite and ≥ 0"):
        ob.Rank(-1.0)
    with pytest.raises(ValueError, match="`degree` must be an integer ≥ 0"):
        ob.FourierSpectrum(-1)
