"""Figure 1 of *Quantifying concentration phenomena of mean-field transformers in the
low-temperature regime* (arXiv:2605.10931): an initial law, and its push-forward under π_E, to
which the zero-temperature flow takes it.

The text has lost the parameters of the law and the matrices; those here are chosen. Expected
values come from quadratures in plain NumPy.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .. import theory
from ..charts import Curve, Panel, panels
from ..flow import solve
from ..limits import ZeroTemperature
from ..measures import Empirical, Mixture, VonMisesFisher
from ..plotting import snapshots
from ..transport import wasserstein
from .report import Check, Report, slope
from .settings import Settings

WEIGHTS = np.array([0.5, 0.3, 0.2])
AZIMUTHS = np.array([0.4, 2.6, -1.6])
ELEVATIONS = np.array([0.3, -0.5, 0.9])
KAPPAS = np.array([12.0, 6.0, 20.0])
MEANS = np.stack(
    [
        np.cos(ELEVATIONS) * np.cos(AZIMUTHS),
        np.cos(ELEVATIONS) * np.sin(AZIMUTHS),
        np.sin(ELEVATIONS),
    ],
    axis=1,
)
# VBᵀ = diag(1, 1, .2) is symmetric, V and B are not; E is the plane of x₁ and x₂.
V = np.array([[1, 0, 0], [-0.5, 1, 0], [0.05, -0.1, 0.2]])
B = np.array([[1, 0.5, 0], [0, 1, 0.5], [0, 0, 1.0]])
GRID = 4096


def fig1(settings: Settings) -> Report:
    """A mixture of von Mises–Fisher laws on S², its push-forward under π_E on the great circle
    E ∩ S², and the zero-temperature flow from the one to the other."""
    n = settings.count(paper=10_000, quick=2_000, minimum=1_000)
    few = 400
    law = Mixture([VonMisesFisher(m, k) for m, k in zip(MEANS, KAPPAS)], WEIGHTS)
    x0 = jax.jit(lambda key: law.sample(key, n))(settings.key)
    x = np.asarray(x0, float)
    single = x0.dtype != jnp.float64
    I = np.eye(3)
    space = theory.dominant_eigenspace(I, B, V)
    target = theory.project_to_dominant(x0, space)
    ts = np.array([0.0, 1, 2, 4, 8, 16, 30])
    tol = 1e-5 if single else 1e-8
    run = solve(ZeroTemperature(I, B, V), x0, ts, rtol=tol, atol=tol)

    # --- the sampler against the density, in cells of equal area
    p = cell_masses(initial_density)
    chi, degrees = chi_square(cell_counts(x), p)
    even, _ = chi_square(n / p.size + 0 * p, p)  # what a uniform sample adds

    # --- push-forward on the circle
    theta, mass = push_forward(GRID)
    circle = np.stack([np.cos(theta), np.sin(theta)], axis=1)
    law_on_circle = Empirical(jnp.asarray(circle, x0.dtype), jnp.asarray(mass, x0.dtype))
    flat = theory.project_to_dominant(x0, space)[:, :2]
    w1 = float(wasserstein(flat, law_on_circle, p=1).value)
    sampled = _sampling_w1(theta, mass, n, replicates=200)
    naive = np.exp(KAPPAS[:, None] * (np.cos(theta - AZIMUTHS[:, None]) - 1))
    naive = WEIGHTS @ (naive / naive.sum(axis=1, keepdims=True))
    naive_w1 = circle_w1(theta, mass, naive)
    limit = float((sampled.mean() + 4 * sampled.std()) / sampled.mean())

    # --- zero temperature
    xs = run.xs
    same = np.array([float(_rms(a, target)) for a in xs])
    exact = [
        float(wasserstein(a[:few], target[:few], p=2, cost="chordal").value)
        for a in (xs[1], xs[-1])
    ]
    coupled = float(_rms(xs[1, :few], target[:few]))
    shuffled = float(_rms(xs[1, :few], jnp.roll(target[:few], 1, axis=0)))
    moved = theory.project_to_dominant(xs[-1], space)
    kept = float(jnp.max(jnp.linalg.norm(moved - target, axis=-1)))
    largest = float(jnp.linalg.norm(xs[0] - target, axis=-1).mean())
    late = (ts >= 8) & (same > (1e-5 if single else 0))
    fall = -slope(ts[late], np.log(same[late]))
    rates = theory.alignment_rates(I, B, V)
    slowest, fastest = float(rates.slowest), float(rates.fastest)
    later = theory.zero_temperature_pushforward(law, float(ts[2]), I, B, V)
    later_p = cell_masses(lambda y: np.asarray(later.density(jnp.asarray(y, x0.dtype))))
    later_chi, later_degrees = chi_square(cell_counts(np.asarray(xs[2], float)), later_p)
    stayed, _ = chi_square(n * p, later_p)

    checks = [
        Check(
            f"sample of µ₀ against its density: χ² per degree of freedom, {p.size} cells",
            "C29",
            chi,
            1.0,
            4 * math.sqrt(2 / degrees),
            "masses of the cells by quadrature of the density, written out in NumPy",
            even,
            "a uniform sample",
        ),
        Check(
            "π_E# of the sample against π_E#µ₀: W₁ on the circle over its sampling error",
            "C29",
            w1 / float(sampled.mean()),
            limit,
            0.0,
            "density of π_E#µ₀ by quadrature along meridians; mean + 4 sd of 200 samples",
            naive_w1 / float(sampled.mean()) - limit,
            "von Mises laws on the circle of the same κ and azimuths",
            "<",
        ),
        Check(
            f"zero temperature ends there: W₂(ρ_t, π_E#µ₀) at t = {ts[-1]:g}, {few} tokens",
            "C15",
            exact[1],
            0.0,
            1e-3,
            "Corollary 2; exact assignment, of the same tokens",
            exact[0],
            "the distance at t = 1",
        ),
        Check(
            f"each token goes to its π_E: W₂(ρ_t, π_E#µ₀) at t = {ts[1]:g} over that coupling",
            "C12",
            exact[0] / coupled,
            1.0,
            1e-4 if single else 1e-6,
            "π_E is the nearest point of E, and is conserved",
            shuffled / coupled - 1,
            "tokens coupled to others' targets",
        ),
        Check(
            f"π_E(x_t) = π_E(x₀): largest distance at t = {ts[-1]:g}",
            "C15",
            kept,
            0.0,
            1e-3 if single else 1e-5,
            "Lemma 9, VBᵀ symmetric",
            largest,
            "targets that move as far as tokens do",
        ),
        Check(
            "rate at which W₂(ρ_t, π_E#µ₀) falls from t = 8 on, at least",
            "C7",
            fall,
            slowest,
            0.01 * slowest,
            "gap/σ_max of Bᵀ on E",
            slowest,
            "a distance that stays",
            ">",
        ),
        Check(
            "and at most",
            "C7",
            fall,
            fastest,
            0.0,
            "gap/σ_min of Bᵀ on E",
            fastest - slowest,
            "tokens that pass slow places of E as if they were fast ones",
            "<",
        ),
        Check(
            f"tokens at t = {ts[2]:g} against the law of the flow: χ² per degree of freedom",
            "C29",
            later_chi,
            1.0,
            4 * math.sqrt(2 / later_degrees),
            "density of the flow backwards in closed form, cells by quadrature",
            stayed,
            "tokens that still have the law µ₀",
        ),
    ]
    density = mass / (2 * np.pi / GRID)
    angle = np.arctan2(*np.asarray(target, float)[:, 1::-1].T)
    height, edges = np.histogram(angle, 72, (-np.pi, np.pi), density=True)
    radius = 1.03 + 0.5 * density / density.max()
    curve = np.concatenate([radius[:, None] * circle, 0 * theta[:, None]], axis=1)
    curve = np.concatenate([curve, curve[:1]])
    shown = [0, 2, len(ts) - 1]
    thin = slice(0, 2_000)
    return Report(
        settings.record(
            n=n,
            weights=WEIGHTS.tolist(),
            means=MEANS.tolist(),
            kappas=KAPPAS.tolist(),
            V=V.tolist(),
            QtK=B.tolist(),
        ),
        checks,
        {
            "spheres": snapshots(
                np.asarray(xs, float)[shown, thin],
                ts[shown],
                color=initial_density(x[thin]),
                curves=[None, curve, curve],
            ),
            "laws": panels(
                [
                    Panel(
                        "angle θ on E (rad)",
                        "density",
                        [
                            Curve(theta, density, r"law $\pi_E\#\mu_0$", "theory"),
                            Curve(
                                theta,
                                naive / (2 * np.pi / GRID),
                                "von Mises, same κ",
                                "theory2",
                            ),
                        ],
                        bars=(edges, height),
                        bars_label=r"$\pi_E$ of tokens",
                        angles=True,
                    ),
                    Panel(
                        "time t",
                        r"rms distance to $\pi_E(x_0)$",
                        [
                            Curve(ts, same, "zero temperature, all tokens", "measured"),
                            Curve(
                                ts,
                                same[0] * np.exp(-slowest * ts),
                                f"slowest rate, {slowest:.2f}",
                                "theory",
                            ),
                            Curve(ts[[1, -1]], exact, "exact W₂, some tokens", "points"),
                        ],
                        yscale="log",
                    ),
                ]
            ),
        },
        {
            "ts": ts,
            "snapshots": np.asarray(xs, float)[shown, thin],
            "theta": theta,
            "density": density,
            "histogram": height,
            "edges": edges,
            "distance": same,
            "sampled_w1": sampled,
        },
        [
            "Parameters of the law and the matrices are chosen: the text has lost them. Colour of "
            "the spheres: density of µ₀ where the token started; curve: density of π_E#µ₀.",
        ],
    )


def initial_density(x: np.ndarray) -> np.ndarray:
    """Density of the mixture at unit vectors (..., 3), written out: κe^{κ⟨m,x⟩}/4π sinh κ."""
    peak = KAPPAS / (2 * np.pi * -np.expm1(-2 * KAPPAS))
    return np.exp(KAPPAS * (x @ MEANS.T - 1)) @ (WEIGHTS * peak)


def push_forward(grid: int) -> tuple[np.ndarray, np.ndarray]:
    """Angles (grid,), and the masses of π_E#µ₀ in the arcs around them: the density summed
    along the meridians, ∫ρ cos ψ dψ by 200 Gauss points."""
    theta = 2 * np.pi * (np.arange(grid) + 0.5) / grid - np.pi
    q, w = np.polynomial.legendre.leggauss(200)
    psi = q * np.pi / 2
    total = np.zeros(grid)
    for angle, weight in zip(psi, w * np.pi / 2 * np.cos(psi)):
        flat = np.cos(angle) * np.stack([np.cos(theta), np.sin(theta)], axis=1)
        x = np.concatenate([flat, np.full((grid, 1), np.sin(angle))], axis=1)
        total += weight * initial_density(x)
    return theta, total / total.sum()


BANDS, AROUND = 8, 16  # cells of equal area: heights × azimuths


def cell_masses(density: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Masses (cells,) by 8 × 8 Gauss points in height and azimuth per cell, of sum 1."""
    q, w = np.polynomial.legendre.leggauss(8)
    z = (np.arange(BANDS)[:, None] + (q + 1) / 2).ravel() * 2 / BANDS - 1
    theta = (np.arange(AROUND)[:, None] + (q + 1) / 2).ravel() * 2 * np.pi / AROUND
    theta = theta - np.pi
    flat = np.sqrt(1 - z**2)[:, None, None]
    ring = np.stack([np.cos(theta), np.sin(theta)], axis=-1)[None]
    height = np.broadcast_to(z[:, None, None], (z.size, theta.size, 1))
    x = np.concatenate([flat * ring, height], axis=-1)
    values = density(x.reshape(-1, 3)).reshape(BANDS, 8, AROUND, 8)
    mass = np.einsum("aibj,i,j->ab", values, w, w).ravel()
    return mass / mass.sum()


def cell_counts(x: np.ndarray) -> np.ndarray:
    """Tokens (n, 3) per cell."""
    row = np.clip(((x[:, 2] + 1) / 2 * BANDS).astype(int), 0, BANDS - 1)
    turn = (np.arctan2(x[:, 1], x[:, 0]) + np.pi) / (2 * np.pi)
    column = np.clip((turn * AROUND).astype(int), 0, AROUND - 1)
    return np.bincount(row * AROUND + column, minlength=BANDS * AROUND)


def chi_square(counts: np.ndarray, p: np.ndarray) -> tuple[float, int]:
    """Pearson's χ² of `counts` per degree of freedom, and how many there are. Cells in which
    fewer than ten tokens are expected count as one."""
    expected = counts.sum() * p
    small = expected < 10
    c = np.append(counts[~small], counts[small].sum())
    e = np.append(expected[~small], expected[small].sum())
    c, e = c[e > 0], e[e > 0]
    degrees = c.size - 1
    return float(((c - e) ** 2 / e).sum() / degrees), degrees


def circle_w1(theta: np.ndarray, p: np.ndarray, q: np.ndarray) -> float:
    """W₁ of masses on equal angles: ∫|F − G − median|."""
    gap = np.cumsum(p - q)
    return float(np.abs(gap - np.median(gap)).sum() * (theta[1] - theta[0]))


def _sampling_w1(
    theta: np.ndarray, mass: np.ndarray, n: int, replicates: int
) -> np.ndarray:
    """W₁ between the law and samples of it."""
    counts = np.random.default_rng(0).multinomial(n, mass, size=replicates)
    return np.array([circle_w1(theta, c / n, mass) for c in counts])


def _rms(x: Array, y: Array) -> Array:
    return jnp.sqrt(jnp.mean(jnp.sum((x - y) ** 2, axis=-1)))
