"""Figure 1 of *A multiscale analysis of mean-field transformers in the moderate interaction
regime* (arXiv:2509.25040): the alignment phase, at the paper's size, with its claims checked.

Expected values come from `theory`, which shares no code with the simulator.
"""

import math

import jax.numpy as jnp
import numpy as np

from .. import theory
from ..attention import SelfAttention
from ..charts import Curve, Panel, panels
from ..flow import solve
from ..layers import unroll
from ..limits import ZeroTemperature
from ..measures import Uniform
from ..observables import alignment
from ..plotting import snapshots
from ..special import mean_resultant
from ..sphere import from_angles
from ..trajectory import Trajectory
from .report import Check, Report, nearest_index, slope
from .settings import Settings

STEP = 1e-2  # the paper's dt


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
    at = {t: nearest_index(ts, [t])[0] for t in (4, 8, 12)}

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
            -slope(ts[late], np.log(deviation[late])),
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
    start = nearest_index(ts, [6])[0]
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
    shown = nearest_index(ts, [0, 1, 2, 8])
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
    n = settings.count(paper=10_000, quick=1_000, minimum=1_000)
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
    begin, end = nearest_index(ts, [4, 6])
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
    rest = ts[-1] - ts[begin]
    still = math.sqrt(float(theory.height_variance(control_variance, rest, beta)))
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
            "window 4 ≤ t ≤ 6: largest rms height" + ("" if n >= 5_000 else ", control"),
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
            "(σ²)' = −4βσ⁴/(1 + βσ²) from t = 4",
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
            "x̄₃' = x̄₃(1 − 2βσ²)/(1 + βσ²), (σ²)' = −4βσ⁴/(1 + βσ²)",
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
            still,
            0.3 * still,
            "symmetry x₃ → −x₃ keeps x̄₃ = 0, and σ²(t) = σ₀²/(1 + 4βσ₀²t) goes on",
            1.0,
            "a control that leaves the plane too, heights of order one",
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
                slope(ts[in_control], np.log(nine[in_control])),
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
                        "law of the mean height",
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
                        "law of the variance",
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
    shown = nearest_index(ts, [0, 2, 5, 12])
    shown_control = nearest_index(ts, [0, 2, 5, 17])
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
    modes, m, size = [5, 9, 13], 360, 1e-5
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
        slope(ts, np.log(np.abs(np.exp(-1j * k * angle).mean(axis=1)))) for k in modes
    ]
    return modes, rates, [float(theory.ring_growth_rate(k, beta)) for k in modes]
