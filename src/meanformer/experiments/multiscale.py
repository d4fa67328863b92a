"""The figures of *A multiscale analysis of mean-field transformers in the moderate
interaction regime* (arXiv:2509.25040), at the paper's sizes, with their claims checked.

Each function takes `Settings` and returns a `Report`. Expected values come from `theory`
or from computations that share no code with the simulator (`independent`).
"""

import math

import jax.numpy as jnp
import numpy as np

from .. import theory
from ..attention import SelfAttention
from ..charts import Curve, Panel, panels
from ..flow import Trajectory, solve, unroll
from ..limits import ZeroTemperature
from ..measures import AzimuthElevation, Mixture, Uniform, WrappedNormal
from ..observables import alignment, angle_histogram
from ..plotting import snapshots
from ..special import mean_resultant
from ..sphere import from_angles
from . import independent
from .report import Check, Report
from .settings import Settings

STEP = 1e-2  # the paper's dt, for its Figures 1 and 2


def _slope(t: np.ndarray, y: np.ndarray) -> float:
    """Least-squares slope of y against t."""
    return float(np.polyfit(t, y, 1)[0])


def _nearest(ts: np.ndarray, times) -> list[int]:
    return [int(np.argmin(np.abs(ts - t))) for t in times]


# -------------------------------------------------------- Figure 1, scenario 1a


def fig1a(settings: Settings) -> Report:
    """Collapse to two antipodal points: V = diag(1,−1,2), QᵀK = diag(−1,−1,1), β = 30.

    M = diag(−1,1,2). At zero temperature tan(angle to ±e₃) falls like e^{−t}, the gap of M;
    at β = 30 tokens near a pole feel their own cluster and fall like e^{−2t}."""
    beta, V, B, I = 30.0, np.diag([1.0, -1, 2]), np.diag([-1.0, -1, 1]), np.eye(3)
    n = settings.count(paper=10_000, quick=1_000, minimum=200)
    x0 = Uniform(3).sample(settings.key, n)
    every, layers = 10, 1200
    run = unroll(
        SelfAttention(B, I, V, beta),
        x0,
        layers,
        STEP,
        save=range(0, layers + 1, every),
        progress=settings.progress,
    )
    ts, xs = np.asarray(run.ts), np.asarray(run.xs, float)
    at = {t: _nearest(ts, [t])[0] for t in (4, 8, 12)}

    space = theory.dominant_eigenspace(B, I, V)
    gap = float(space.gap)
    axis = space.basis[:, 0]
    rate = float(theory.cluster_contraction_rate(V, axis))
    cold = solve(ZeroTemperature(B, I, V), x0, [0.0, 1, 2, 4, 6, 8, 10, 12])
    closed = [theory.zero_temperature_flow(x0, t, B, I, V, panels=96) for t in cold.ts]
    cold_error = float(jnp.max(jnp.abs(cold.xs - jnp.stack(closed))))

    angle = _angle_to_axis(xs, np.asarray(axis))
    cold_angle = _angle_to_axis(np.stack(closed), np.asarray(axis))
    near = 1e-2
    share = (angle < near).mean(axis=1)
    law = np.asarray(theory.axis_fraction(near, ts, gap))
    up = xs[-1] @ np.asarray(axis) > 0
    deviation = _deviation_from_cluster(xs, up)
    late = (ts >= 8) & (ts <= 12)
    se = 0.5 / math.sqrt(n)
    end = run.measure(-1)
    single = np.finfo(run.xs.dtype).eps > 1e-10  # float32 deviations drown in rounding
    if single:
        late = (ts >= 6.5) & (ts <= 8.5)

    law_source = "share (2/π)arctan(e^{t} tan .01) of the zero-temperature flow (A8)"
    checks = [
        Check(
            "zero temperature: tokens follow the closed form (sup error, t ≤ 12)",
            "A8",
            cold_error,
            0.0,
            1e-3 if single else 1e-6,
            "closed form x = e^{Mτ}x₀/|·| with its time change, by quadrature",
            float(np.abs(cold_angle[1] - cold_angle[2]).max()),
            "the shift between t = 1 and t = 2",
        ),
        Check(
            "zero temperature: share within .01 of ±e₃ at t = 8",
            "A39",
            float((cold_angle[5] < near).mean()),
            float(law[at[8]]),
            min(4 * math.sqrt(law[at[8]] * (1 - law[at[8]]) / n), 0.06),
            law_source,
            float(law[at[8]] - law[at[4]]),
            "the share at t = 4",
        ),
        Check(
            "β = 30 aligns faster than zero temperature: share at t = 4",
            "A39",
            float(share[at[4]]),
            float(law[at[4]]) + 0.25,
            0.0,
            law_source + ", plus a margin of .25",
            0.25,
            "tokens that follow the zero-temperature law",
            ">",
        ),
        Check(
            "β = 30 aligns faster than zero temperature: share at t = 8",
            "A39",
            float(share[at[8]]),
            0.995,
            0.0,
            "A39; the zero-temperature law gives .979",
            0.995 - float(law[at[8]]),
            "tokens that follow the zero-temperature law",
            ">",
        ),
        Check(
            "once concentrated, deviations decay at rate ⟨e₃,Ve₃⟩",
            "A39",
            -_slope(ts[late], np.log(deviation[late])),
            rate,
            0.05,
            "linearisation around a cluster: rate ⟨z,Vz⟩",
            rate - gap,
            "the gap of VKᵀQ, the zero-temperature rate",
        ),
        Check(
            "half of the mass at each pole",
            "A39",
            float(up.mean()),
            0.5,
            min(4.5 * se, 0.2),
            "symmetry x₃ → −x₃; three standard errors, each 1.5 times the binomial one: "
            "tokens near the equator choose a side together",
            0.5,
            "all mass at one pole",
        ),
        Check(
            "the dominant axis holds all tokens at t = 12: 1 − ∫|P_E x|²dµ",
            "A10",
            1 - float(alignment(end, space)),
            0.0,
            1e-4,
            "Prop. 3.4: support in E; E from the eigenvalues of VKᵀQ",
            2 / 3,
            "the uniform law",
        ),
        Check(
            "the end state is stationary: largest speed at t = 12",
            "A39",
            float(
                jnp.max(
                    jnp.linalg.norm(
                        SelfAttention(B, I, V, beta).velocity(end.points, end), axis=-1
                    )
                )
            ),
            0.0,
            0.02,
            "⟨δ_z⟩ at eigenvectors of V are fixed points",
            1.0,
            "speeds of order one at t = 0",
        ),
    ]

    quantiles = np.quantile(np.tan(angle), [0.1, 0.5, 0.9], axis=1)
    cold_median = np.median(np.tan(cold_angle), axis=1)
    floor = 1e-12 if not single else 1e-6
    start = _nearest(ts, [6])[0]
    law_panels = panels(
        [
            Panel(
                "time t",
                "tan(angle to ±e₃)",
                [
                    Curve(
                        ts, np.maximum(quantiles[1], floor), "β = 30, median", "measured"
                    ),
                    Curve(
                        ts,
                        np.maximum(quantiles[0], floor),
                        "β = 30, 10–90 %",
                        "band",
                        np.maximum(quantiles[2], floor),
                    ),
                    Curve(
                        np.asarray(cold.ts), cold_median, "zero temp., median", "points"
                    ),
                    Curve(
                        ts,
                        np.exp(-gap * ts),
                        r"zero temp., law $e^{-t}$",
                        "theory",
                    ),
                    Curve(
                        ts,
                        np.maximum(deviation, floor),
                        "β = 30, deviation from own cluster",
                        "measured2",
                    ),
                    Curve(
                        ts[start:],
                        deviation[start] * np.exp(-rate * (ts[start:] - ts[start])),
                        r"law $e^{-2t}$, $2 = \langle e_3, Ve_3\rangle$",
                        "theory2",
                    ),
                ],
                yscale="log",
                ylim=(1e-10 if not single else 1e-5, 10),
            ),
            Panel(
                "time t",
                "share within 0.01 of ±e₃",
                [
                    Curve(ts, share, "β = 30, tokens", "measured"),
                    Curve(
                        np.asarray(cold.ts),
                        (cold_angle < near).mean(axis=1),
                        "zero temp., tokens",
                        "points",
                    ),
                    Curve(ts, law, "zero temp., law", "theory"),
                ],
            ),
        ],
        "",
    )
    shown = _nearest(ts, [0, 1, 2, 8])
    return Report(
        settings.record(
            n=n, beta=beta, step=STEP, layers=layers, V=V.tolist(), QtK=B.tolist()
        ),
        checks,
        {
            "spheres": snapshots(xs[shown], ts[shown], color=xs[0, :, 2], cmap="viridis"),
            "laws": law_panels,
        },
        {
            "ts": ts,
            "snapshots": xs[shown],
            "share": share,
            "deviation": deviation,
            "law": law,
        },
        ["Spheres: colour is the height x₃ at t = 0."],
    )


def _angle_to_axis(xs: np.ndarray, axis: np.ndarray) -> np.ndarray:
    """Angle between the tokens (..., 3) and the line through `axis`."""
    along = xs @ axis
    across = np.linalg.norm(xs - along[..., None] * axis, axis=-1)
    return np.arctan2(across, np.abs(along))


def _deviation_from_cluster(xs: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Root mean square distance of tokens (t, n, d) from the mean of their half."""
    total = np.zeros(xs.shape[0])
    for side in (up, ~up):
        x = xs[:, side]
        total += ((x - x.mean(axis=1, keepdims=True)) ** 2).sum(axis=(1, 2))
    return np.sqrt(total / xs.shape[1])


# -------------------------------------------------------- Figure 1, scenario 1b


def fig1b(settings: Settings) -> Report:
    """Collapse to a rotating great circle: V = I, QᵀK = [[0,1,0],[−1,0,0],[0,0,−2]], β = 30.

    At zero temperature the circle is reached and kept. At finite β it is a window,
    4 ≤ t ≤ 6 for 10⁴ tokens; then the mean height grows (the plane is left), and on the
    ring the modes k ≡ 1 mod 4 grow. A sample with mirror images is the control that has no
    mean height and keeps the ring."""
    beta, I = 30.0, np.eye(3)
    B = np.array([[0.0, 1, 0], [-1, 0, 0], [0, 0, -2]])
    field = SelfAttention(I, B, I, beta)  # QᵀK = B, which is not symmetric
    n = settings.count(paper=10_000, quick=1_200, minimum=1_000)
    n += n % 2
    every, layers = 10, 1700
    save = range(0, layers + 1, every)
    x0 = Uniform(3).sample(settings.key, n)
    half = x0[: n // 2]
    mirrored = jnp.concatenate([half, half * jnp.asarray([1, 1, -1], x0.dtype)])
    run = unroll(field, x0, layers, STEP, save=save, progress=settings.progress)
    control = unroll(field, mirrored, layers, STEP, save=save, progress=settings.progress)

    ts = np.asarray(run.ts)
    xs, cs = np.asarray(run.xs, float), np.asarray(control.xs, float)
    mean, rms = xs[..., 2].mean(1), np.sqrt((xs[..., 2] ** 2).mean(1))
    control_rms = np.sqrt((cs[..., 2] ** 2).mean(1))
    begin, end = _nearest(ts, [4, 6])
    variance = float(xs[begin, :, 2].var())
    # The linear law holds while |x̄₃| is small against the width that tokens sense, β^{-1/2}.
    above = np.flatnonzero(np.abs(mean[begin:]) > 0.08)
    stop = begin + int(above[0]) if above.size else len(ts) - 1
    growth = math.log(abs(mean[stop] / mean[begin]))
    lasts = ts[stop] - ts[begin]
    predicted = math.log(float(theory.height_amplification(variance, lasts, beta)))
    control_variance = float(cs[begin, :, 2].var())
    ring_variance = float(
        theory.height_variance(control_variance, ts[end] - ts[begin], beta)
    )
    window = slice(begin, end + 1)
    speed = _angular_speed(field, run, window)
    expected_speed = float(mean_resultant(2, beta))
    last = run.measure(-1)
    modes, rates, laws = _ring_rates(beta)
    nine = np.abs(np.exp(-9j * np.arctan2(cs[..., 1], cs[..., 0])).mean(1))
    concentrated = float(jnp.linalg.norm(last.mean(last.points)))
    se = 1 / math.sqrt(n)

    checks = [
        Check(
            "window 4 ≤ t ≤ 6: largest rms height",
            "A40",
            float(rms[window].max() if n >= 5_000 else control_rms[window].max()),
            0.08,
            0.0,
            "A40; the uniform law has .577",
            0.5,
            "no collapse onto the circle",
            "<",
        ),
        Check(
            "heights shrink algebraically, not like e^{−2t}: control, sd at t = 6",
            "A40",
            float(control_rms[end]),
            math.sqrt(ring_variance),
            0.2 * math.sqrt(ring_variance),
            "σ²(t) = σ₀²/(1 + 4βσ₀²t) from t = 4",
            math.sqrt(ring_variance) - math.exp(-4) * math.sqrt(control_variance),
            "zero temperature, e^{−2t}",
        ),
        Check(
            "window: mean angular speed is A₂(β)",
            "A40",
            speed,
            expected_speed,
            0.005,
            "Bessel ratio I₁(β)/I₀(β)",
            1 - expected_speed,
            "zero temperature, speed 1",
        ),
        Check(
            "first instability: ln growth of |x̄₃| from t = 4 to |x̄₃| = .08, measured/law",
            "A40",
            growth / predicted,
            1.0,
            0.2,
            "x̄₃' = (1 − 2βσ²)x̄₃ along (σ²)' = −4βσ⁴, leading order in the heights",
            1.0,
            "a plane that is not left",
        ),
        Check(
            "the plane is left and one point remains: |∫x dµ| at t = 17",
            "A40",
            concentrated,
            1.0,
            0.01,
            "consensus δ_z: |∫x dµ| = 1",
            1.0,
            "a ring, |∫x dµ| = 0",
        ),
        Check(
            "mirror images remove it: control, rms height at t = 17",
            "A40",
            float(control_rms[-1]),
            float(rms[-1]) / 4,
            0.0,
            "symmetry x₃ → −x₃ keeps x̄₃ = 0; a quarter of the height without it",
            float(rms[-1]),
            "a control that leaves the plane too",
            "<",
        ),
        *[
            Check(
                f"second instability: growth rate of ring mode {k}",
                "A40",
                rate,
                law,
                0.01 * abs(law),
                "k sin(kπ/2) (I_k/I_0)'(β), linearisation on the ring",
                abs(law),
                "a ring that is stable",
            )
            for k, rate, law in zip(modes, rates, laws)
        ],
    ]
    in_control = (ts >= 5) & (ts <= 17)
    if n >= 5_000:
        law9 = float(theory.ring_growth_rate(9, beta))
        checks.append(
            Check(
                "second instability on the sphere: control, mode 9 for 5 ≤ t ≤ 17",
                "A40",
                _slope(ts[in_control], np.log(nine[in_control])),
                law9,
                0.03,
                "the same rate; the ring has a width, the mode starts from noise",
                law9,
                "a ring that is stable",
            )
        )
    t_law = ts[begin : stop + 1]
    figure = panels(
        [
            Panel(
                "time t",
                "height over the plane",
                [
                    Curve(ts, rms, "rms x₃, tokens", "measured"),
                    Curve(ts, control_rms, "rms x₃, mirrored control", "measured2"),
                    Curve(ts, np.abs(mean), "|mean x₃|, tokens", "points"),
                    Curve(
                        t_law,
                        abs(mean[begin])
                        * np.asarray(
                            theory.height_amplification(variance, t_law - t_law[0], beta)
                        ),
                        "law (1 − 2βσ²)",
                        "theory",
                    ),
                    Curve(
                        ts[begin:],
                        np.sqrt(
                            np.asarray(
                                theory.height_variance(
                                    control_variance, ts[begin:] - ts[begin], beta
                                )
                            )
                        ),
                        "law σ²' = −4βσ⁴",
                        "theory2",
                    ),
                    Curve(
                        ts, rms[0] * np.exp(-2 * ts), r"zero temp., $e^{-2t}$", "theory3"
                    ),
                ],
                yscale="log",
                ylim=(min(0.3 * se, 3e-3), 1.5),
                spans=[(4, 6, "window")],
            ),
            Panel(
                "time t",
                "amplitude of ring mode 9",
                [
                    Curve(ts, nine, "mirrored control", "measured2"),
                    Curve(
                        ts[in_control],
                        nine[in_control][0]
                        * np.exp(
                            float(theory.ring_growth_rate(9, beta))
                            * (ts[in_control] - ts[in_control][0])
                        ),
                        "law, rate 0.105",
                        "theory",
                    ),
                ],
                yscale="log",
            ),
        ]
    )
    shown = _nearest(ts, [0, 2, 5, 12])
    shown_control = _nearest(ts, [0, 2, 5, 17])
    return Report(
        settings.record(
            n=n, beta=beta, step=STEP, layers=layers, V=I.tolist(), QtK=B.tolist()
        ),
        checks,
        {
            "spheres": snapshots(xs[shown], ts[shown], color=xs[0, :, 2], cmap="viridis"),
            "spheres-control": snapshots(
                cs[shown_control], ts[shown_control], color=cs[0, :, 2], cmap="viridis"
            ),
            "laws": figure,
        },
        {
            "ts": ts,
            "snapshots": xs[shown],
            "rms_height": rms,
            "mean_height": mean,
            "control_rms_height": control_rms,
            "control_mode9": nine,
            "ring_modes": modes,
            "ring_rates": rates,
        },
        [
            "The rotating circle of the paper's Figure 1 is its limit at zero temperature; at "
            "β = 30 it is a window. Spheres: colour is the height x₃ at t = 0.",
        ],
    )


def _angular_speed(field: SelfAttention, run: Trajectory, window: slice) -> float:
    """Mean over tokens and times of (x₁ẋ₂ − x₂ẋ₁)/(x₁² + x₂²)."""
    speeds = []
    for i in range(window.start, window.stop):
        mu = run.measure(i)
        x, v = mu.points, field.tangent(mu.points, mu)
        turn = x[:, 0] * v[:, 1] - x[:, 1] * v[:, 0]
        speeds.append(jnp.mean(turn / (x[:, 0] ** 2 + x[:, 1] ** 2)))
    return float(jnp.mean(jnp.stack(speeds)))


def _ring_rates(beta: float) -> tuple[list[int], list[float], list[float]]:
    """Growth of small modes of a ring of equal angles on S¹, simulated, and their laws."""
    modes, m, size = [5, 9, 13], 720, 1e-5
    theta = 2 * np.pi * np.arange(m) / m
    # Positions shifted by Σ sin(kθ)·2ε/k carry density 1 − 2ε Σ cos kθ.
    x0 = from_angles(theta + sum(2 * size / k * np.sin(k * theta) for k in modes))
    turn = np.array([[0.0, 1], [-1, 0]])
    run = solve(
        SelfAttention(np.eye(2), turn, np.eye(2), beta),
        x0,
        np.linspace(0, 20, 11),
        rtol=1e-7 if x0.dtype == jnp.float64 else 1e-5,
        atol=1e-7 if x0.dtype == jnp.float64 else 1e-6,
    )
    ts, xs = np.asarray(run.ts), np.asarray(run.xs, float)
    angle = np.arctan2(xs[..., 1], xs[..., 0])
    rates = [
        _slope(ts, np.log(np.abs(np.exp(-1j * k * angle).mean(axis=1)))) for k in modes
    ]
    return modes, rates, [float(theory.ring_growth_rate(k, beta)) for k in modes]


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
    i5, i20, i100 = _nearest(ts, [5, 20, 100])
    kept = slice(i5, i20 + 1)
    leaked = labels[i5] != labels[0]
    leak = float((leaked & (labels[i5] == 1)).mean())
    predicted = independent.three_cluster_masses(CENTRES, SHARES, SIGMA, beta)
    expected_leak = float(predicted[1] - SHARES[1])
    latitude = np.abs(np.arcsin(np.clip(xs[0, :, 2], -1, 1)))
    early, late = _nearest(ts, [3, 6])
    narrowing = _slope(ts[early : late + 1], np.log(width[early : late + 1, 1]))
    rate = float(theory.cluster_contraction_rate(W, I[0]))
    i02 = _nearest(ts, [0.2])[0]
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
            float(np.quantile(latitude[leaked], 0.01)) if leaked.any() else math.nan,
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

    shown = _nearest(ts, [0, 1, 2, 5])
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
                for i in _nearest(ts, [0, 0.5])
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
            f"{np.quantile(latitude[leaked], 0.01) if leaked.any() else math.nan:.2f}) that they see "
            "all clusters alike and go to the heaviest.",
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
        tol = 1e-6 if x0.dtype == jnp.float64 else 1e-4
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
    at = {t: _nearest(ts, [t])[0] for t in (0.5, 1, 2, 4)}
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
