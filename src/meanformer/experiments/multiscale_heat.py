"""Figures 2 and 3 of *A multiscale analysis of mean-field transformers in the moderate
interaction regime* (arXiv:2509.25040): the heat phase, backward on S² and forward on S¹, at
the paper's sizes, with its claims checked.

Expected values come from `theory` or from `independent`, which share no code with the
simulator.
"""

import math

import jax.numpy as jnp
import numpy as np

from .. import theory
from ..attention import SelfAttention
from ..charts import Curve, Panel, panels
from ..flow import solve
from ..layers import unroll
from ..measures import AzimuthElevation, Mixture, WrappedNormal
from ..observables import alignment, angle_histogram
from ..plotting import snapshots
from ..sphere import from_angles
from ..trajectory import Trajectory
from . import independent
from .report import Check, Report, nearest_index, slope
from .settings import Settings

STEP = 1e-2  # the paper's dt for Figure 1, used for Figure 2 where layers are asked for


# -------------------------------------------------------- Figure 2, scenario 2a

CENTRES = np.array([np.pi / 2, 0.0, 4 * np.pi / 3])
SHARES = np.array([0.2, 0.5, 0.3])
SIGMA = 0.2


def _three_gaussians() -> Mixture:
    return Mixture([WrappedNormal(from_angles(c), SIGMA) for c in CENTRES], SHARES)


def _labels(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nearest of the three centres in azimuth, and the signed angle from it."""
    theta = np.arctan2(x[..., 1], x[..., 0])
    off = np.angle(np.exp(1j * (theta[..., None] - CENTRES)))
    label = np.abs(off).argmin(axis=-1)
    return label, np.take_along_axis(off, label[..., None], axis=-1)[..., 0]


def fig2(settings: Settings) -> Report:
    """Alignment on the equator, then three clusters: V = QᵀK = diag(1,1,.1), β = 10.

    The clusters stand where the backward heat flow puts them. Their widths do not follow
    it: βσ₀² = .4 < 1, so that widths shrink like e^{−t} (A45), with no blow-up at t = .2.
    Their masses are not .2/.5/.3: tokens near the poles go to the heaviest cluster."""
    beta, I = 10.0, np.eye(3)
    W = np.diag([1.0, 1, 0.1])
    n = settings.count(paper=10_000, quick=1_500, minimum=1_000)
    ring = _three_gaussians()
    x0 = AzimuthElevation(ring).sample(settings.key, n)
    times = [0, 0.1, 0.2, 0.5, 1, 2, 3, 4, 5, 6, 8, 10, 14, 20, 50, 100]
    field = SelfAttention(W, I, W, beta)
    if settings.layers:
        layers = [round(t / STEP) for t in times]
        run = unroll(field, x0, layers[-1], STEP, save=layers, progress=settings.progress)
    else:
        tol = 1e-6 if x0.dtype == jnp.float64 else 1e-4
        run = solve(field, x0, times, rtol=tol, atol=tol, progress=settings.progress)
    ts, xs = np.asarray(run.ts, float), np.asarray(run.xs, float)

    space = theory.dominant_eigenspace(W, I, W)
    plane = np.array([float(alignment(run.measure(i), space)) for i in range(len(ts))])
    labels, off = zip(*[_labels(x) for x in xs])
    labels, off = np.stack(labels), np.stack(off)
    position = np.array(
        [
            [np.angle(np.exp(1j * o[la == j]).mean()) for j in range(3)]
            for la, o in zip(labels, off)
        ]
    )
    mass = np.stack([(labels == j).mean(axis=1) for j in range(3)], axis=1)
    width = np.array(
        [
            [np.median(np.abs(o[la == j] - np.median(o[la == j]))) for j in range(3)]
            for la, o in zip(labels, off)
        ]
    )
    i5, i20, i100 = nearest_index(ts, [5, 20, 100])
    kept = slice(i5, i20 + 1)
    leaked = labels[i5] != labels[0]
    leak = float((leaked & (labels[i5] == 1)).mean())
    predicted = independent.three_cluster_masses(CENTRES, SHARES, SIGMA, beta)
    expected_leak = float(predicted[1] - SHARES[1])
    latitude = np.abs(np.arcsin(np.clip(xs[0, :, 2], -1, 1)))
    polar = float(np.quantile(latitude[leaked], 0.01)) if leaked.any() else math.nan
    early, late = nearest_index(ts, [3, 6])
    narrowing = slope(ts[early : late + 1], np.log(width[early : late + 1, 1]))
    rate = float(theory.cluster_contraction_rate(W, I[0]))
    i02 = nearest_index(ts, [0.2])[0]
    blow_up = float(theory.blow_up_time(SIGMA**2, beta))
    se = 1 / math.sqrt(n)
    names = ("π/2", "0", "4π/3")
    independent_source = "mean field on weighted nodes in plain NumPy, Euler steps"

    checks = [
        Check(
            "collapse on the xy-plane: 1 − ∫|P_E x|²dµ at t = 5",
            "A42",
            1 - float(plane[i5]),
            0.0,
            0.01,
            "Prop. 3.4: support in E, from the eigenvalues of VKᵀQ",
            1 - float(plane[0]),
            "the elevations at t = 0",
        ),
        *[
            Check(
                f"cluster at {name}: largest offset for 5 ≤ t ≤ 20 (rad)",
                "A42",
                float(np.abs(position[kept, j]).max()),
                0.0,
                0.05 if n >= 5_000 else 0.05 + 3 * SIGMA * se / math.sqrt(SHARES[j]),
                "the centre of the heat kernel, Eq. (7)",
                math.pi / 4,
                "no relation to the centres",
            )
            for j, name in enumerate(names)
        ],
        *[
            Check(
                f"mass of the cluster at {name} at t = 5",
                "A42",
                float(mass[i5, j]),
                float(predicted[j]),
                max(0.012, 2.5 * math.sqrt(predicted[j] * (1 - predicted[j])) * se),
                independent_source,
                float(min(predicted[j], 1 - predicted[j])),
                "no such cluster",
            )
            for j, name in enumerate(names)
        ],
        Check(
            "leakage: share of tokens that change to the heaviest cluster",
            "A42",
            leak,
            expected_leak,
            min(max(0.004, 3 * math.sqrt(expected_leak) * se), expected_leak / 2),
            independent_source,
            expected_leak,
            "masses .2/.5/.3, no leakage",
        ),
        Check(
            "leakage comes from the poles: smallest |elevation| that leaks, 1 % quantile",
            "A42",
            polar,
            1.3,
            0.0,
            "A42: about 1.4 of π/2",
            0.5,
            "leakage at every elevation (quantile near 0)",
            ">",
        ),
        Check(
            "no blow-up at t = βσ₀²/2 = .2: width of the heaviest cluster there / at t = 0",
            "A42, E10",
            float(width[i02, 1] / width[0, 1]),
            0.5,
            0.0,
            "A45 gives .86 on the circle, the backward heat equation 0",
            0.5,
            "the backward heat equation",
            ">",
        ),
        Check(
            "widths shrink like e^{−t}: rate for 3 ≤ t ≤ 6",
            "A45, E10",
            -narrowing,
            rate,
            0.05,
            "small-width limit of A45, ⟨z,Vz⟩ = 1",
            1.0,
            "a heat flow that has ended",
        ),
        Check(
            "clusters persist to t = 100: largest change of position since t = 5 (rad)",
            "A42",
            float(np.abs(position[i100] - position[i5]).max()),
            0.0,
            0.05,
            "merge times e^{β(1−cos φ)} ≥ e^{10} of clusters π/2 apart (A24)",
            math.pi / 2,
            "clusters that merge",
        ),
    ]

    shown = nearest_index(ts, [0, 1, 2, 5])
    curves = []
    for i in shown:
        s = np.asarray(theory.closure_variance(np.full(3, SIGMA**2), ts[i], beta, 1))
        curves.append(_crown(CENTRES, np.maximum(s, 1e-3), SHARES))
    widths = width[:, 1] / width[0, 1]
    closure = np.sqrt(np.asarray(theory.closure_variance(SIGMA**2, ts, beta, 1))) / SIGMA
    before = np.linspace(0, 0.999 * blow_up, 200)
    heat = np.sqrt(np.asarray(theory.heat_variance(SIGMA**2, before, beta, 1))) / SIGMA
    seen = ts <= 8
    theta = np.linspace(-np.pi, np.pi, 721)

    def circle_law(t: float) -> np.ndarray:
        s = theory.closure_variance(np.full(3, SIGMA**2), t, beta, 1)
        return np.asarray(
            theory.wrapped_mixture_density(jnp.asarray(theta), CENTRES, s, SHARES)
        )

    histograms = panels(
        [
            *[
                _angle_panel(
                    xs[i], ts[i], 120, (theta, circle_law(ts[i])), "A45 on the circle"
                )
                for i in nearest_index(ts, [0, 0.5])
            ],
            Panel(
                "time t",
                "relative width, heaviest cluster",
                [
                    Curve(ts[seen], widths[seen], "tokens", "points"),
                    Curve(ts[seen], closure[seen], "Gaussian closure (A45)", "theory"),
                    Curve(before, heat, "backward heat, ends at t = 0.2", "theory2"),
                ],
                yscale="log",
                ylim=(1e-4, 2),
            ),
        ]
    )
    return Report(
        settings.record(
            n=n,
            beta=beta,
            V=W.tolist(),
            QtK=W.tolist(),
            sigma0=SIGMA,
            steps="layers of 1e-2" if settings.layers else "adaptive",
        ),
        checks,
        {
            "spheres": snapshots(
                xs[shown], ts[shown], color=_labels(xs[0])[0] * 1.0, curves=curves
            ),
            "widths": histograms,
        },
        {
            "ts": ts,
            "snapshots": xs[shown],
            "position": position,
            "mass": mass,
            "width": width,
            "expected_mass": predicted,
        },
        [
            f"Spheres: colour is the component of each token at t = 0; the red curve is the "
            f"Gaussian closure A45 of the three components, lifted over the equator. Masses "
            f"are {mass[i5, 0]:.3f}/{mass[i5, 1]:.3f}/{mass[i5, 2]:.3f}, not .2/.5/.3: "
            f"{100 * leak:.1f} % of the tokens start so near a pole (|elevation| > "
            f"{polar:.2f} for all but 1 % of them) that they see all clusters alike and go to "
            "the heaviest.",
        ],
    )


def _crown(centres, variances, shares, height: float = 0.35) -> np.ndarray:
    """A curve around the equator whose radius is 1 + (density/its maximum)·height."""
    theta = np.linspace(-np.pi, np.pi, 1441)
    density = np.asarray(
        theory.wrapped_mixture_density(jnp.asarray(theta), centres, variances, shares)
    )
    r = 1.02 + height * density / density.max()
    return np.stack([r * np.cos(theta), r * np.sin(theta), 0 * theta], axis=1)


def _angle_panel(x, t, bins: int, theory_curve=None, label="law", more=()) -> Panel:
    theta = np.arctan2(x[:, 1], x[:, 0])
    height, edges = np.histogram(theta, bins, (-np.pi, np.pi), density=True)
    curves = []
    if theory_curve is not None:
        curves = [Curve(theory_curve[0], theory_curve[1], label, "theory")]
    return Panel(
        "angle θ (rad)",
        "density",
        [*curves, *more],
        title=f"t = {t:g}",
        bars=(edges, height),
        angles=True,
    )


# -------------------------------------------------------- Figure 3, scenario 2b


def _quantile_masses(x, weights: np.ndarray, edges) -> np.ndarray:
    """Mass between `edges` of nodes on S¹ that are quantiles: their distribution function
    is interpolated instead of counted, which would add an error of a node per edge."""
    theta = np.arctan2(*np.asarray(x, float).T[::-1])
    order = np.argsort(theta)
    theta, w = theta[order], weights[order]
    level = np.cumsum(w) - w / 2
    turns = np.array([-1.0, 0, 1])[:, None]
    lifted = (theta + 2 * np.pi * turns).ravel()
    return np.diff(
        np.interp(np.asarray(edges), lifted, (level + turns * w.sum()).ravel())
    )


def fig3(settings: Settings) -> Report:
    """Forward diffusion on S¹: Q = K = I, V = −I, β = 50, three Gaussians at t = 0.

    The histogram against the heat equation (variance σ₀² + 2t/β per component) and against
    the Gaussian closure A45 at finite β, in L¹; once from a sample, once from a start
    without noise."""
    beta, I = 50.0, np.eye(2)
    n = settings.count(paper=50_000, quick=4_000, minimum=2_000)
    bins = 100 if n >= 20_000 else 40
    law = _three_gaussians()
    x0 = law.sample(settings.key, n)
    m = min(n, 5_000)
    smooth0 = law.nodes(m)
    times = [0.0, 0.5, 1.0, 2.0, 4.0]
    field = SelfAttention(I, I, -I, beta)

    def evolved(start) -> Trajectory:
        if settings.layers:
            layers = [round(t / 1e-3) for t in times]
            bar = settings.progress
            return unroll(field, start, layers[-1], 1e-3, save=layers, progress=bar)
        tol = 1e-5 if x0.dtype == jnp.float64 else 1e-4
        return solve(field, start, times, rtol=tol, atol=tol, progress=settings.progress)

    run, smooth = evolved(x0), evolved(smooth0)
    ts = np.asarray(run.ts, float)
    edges = jnp.linspace(-jnp.pi, jnp.pi, bins + 1)
    s0 = np.full(3, SIGMA**2)

    def masses(variance) -> np.ndarray:
        return np.asarray(theory.wrapped_mixture_mass(edges, CENTRES, variance, SHARES))

    heat_s = [np.asarray(theory.heat_variance(s0, t, beta, -1)) for t in ts]
    closure_s = [np.asarray(theory.closure_variance(s0, t, beta, -1)) for t in ts]
    heat = np.stack([masses(s) for s in heat_s])
    closure = np.stack([masses(s) for s in closure_s])
    counted = np.stack(
        [np.asarray(angle_histogram(run.measure(i), bins)[0]) for i in range(len(ts))]
    )
    counted_smooth = np.stack(
        [_quantile_masses(x, np.asarray(smooth.weights), edges) for x in smooth.xs]
    )

    def l1(a, b) -> np.ndarray:
        return np.abs(a - b).sum(axis=-1)

    to_heat, to_closure = l1(counted, heat), l1(counted, closure)
    smooth_to_heat = l1(counted_smooth, heat)
    smooth_to_closure = l1(counted_smooth, closure)
    # E|N(p)/n − p| = √(2p(1−p)/(πn)) for a bin of mass p that is not nearly empty.
    noise = np.sqrt(2 * closure * (1 - closure) / (np.pi * n)).sum(axis=1)
    gap = l1(heat, closure)
    at = {t: nearest_index(ts, [t])[0] for t in (0.5, 1, 2, 4)}
    binomial = "binomial noise Σ√(2p(1−p)/πn) of the histogram, A45 for p"
    single = x0.dtype != jnp.float64
    checks = []
    for t, i in at.items():
        checks.append(
            Check(
                f"t = {t:g}: L¹(histogram, A45) / sampling error",
                "A41",
                float(to_closure[i] / noise[i]),
                1.3,
                0.0,
                binomial,
                abs(float(np.hypot(gap[i], noise[i]) / noise[i]) - 1.3),
                "tokens that follow the heat equation",
                "<",
            )
        )
    for t in (1, 2, 4):
        i = at[t]
        factor = 2.0 if n >= 20_000 else 1.1
        checks.append(
            Check(
                f"t = {t:g}: L¹ to the heat law / L¹ to A45",
                "A41",
                float(to_heat[i] / to_closure[i]),
                factor,
                0.0,
                "heat equation at variance σ₀² + 2t/β; A45 at finite β",
                factor - 1,
                "two laws that fit alike",
                ">",
            )
        )
    for t, i in at.items():
        checks.append(
            Check(
                f"t = {t:g}: noise-free start, L¹(tokens, A45)",
                "A41",
                float(smooth_to_closure[i]),
                0.0,
                min(0.005 if m >= 4_000 and not single else 0.01, float(gap[i]) / 2),
                "A45 (Lambert W), bin masses by the normal distribution function",
                float(gap[i]),
                "tokens that follow the heat equation",
            )
        )

    theta = np.linspace(-np.pi, np.pi, 721)

    def curve(variance):
        return np.asarray(
            theory.wrapped_mixture_density(jnp.asarray(theta), CENTRES, variance, SHARES)
        )

    shown = [0, at[1], at[2], at[4]]
    rows = [
        _angle_panel(
            np.asarray(run.xs[i]),
            ts[i],
            bins,
            (theta, curve(heat_s[i])),
            "heat equation",
            [Curve(theta, curve(closure_s[i]), "Gaussian closure (A45)", "theory2")],
        )
        for i in shown
    ]
    return Report(
        settings.record(
            n=n,
            beta=beta,
            nodes=m,
            bins=bins,
            sigma0=SIGMA,
            steps="layers of 1e-3" if settings.layers else "adaptive",
        ),
        checks,
        {"histograms": panels(rows, shared=True)},
        {
            "ts": ts,
            "edges": np.asarray(edges),
            "tokens": counted,
            "nodes": counted_smooth,
            "heat": heat,
            "closure": closure,
            "l1_heat": to_heat,
            "l1_closure": to_closure,
            "nodes_l1_heat": smooth_to_heat,
            "nodes_l1_closure": smooth_to_closure,
            "noise": noise,
        },
    )
