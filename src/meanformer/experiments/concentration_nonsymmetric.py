"""Figure 5 of *Quantifying concentration phenomena of mean-field transformers in the
low-temperature regime* (arXiv:2605.10931): what becomes of alignment where VBᵀ is not symmetric,
over many seeds.

The text has lost the matrices (39), (40) and all sizes; those here are chosen so that each claim
is exercised. Expected values come from `theory` or plain NumPy, which share no code with the
simulator.
"""

import math

import jax.numpy as jnp
import numpy as np

from .. import theory
from ..charts import Curve, Panel, panels
from ..flow import solve
from ..limits import ZeroTemperature
from ..measures import Uniform
from ..plotting import snapshots
from .instances import (
    ON_E,
    ON_V,
    alignments,
    bands,
    first_ahead,
    unroll_all,
)
from .report import Check, Report, nearest_index
from .settings import Settings

I = np.eye(3)

STEP = 0.05
# (39): V and VBᵀ have complex eigenvalues of largest real part.
COMPLEX_V = np.array([[0.5, -1, 0], [1, 0.5, 0], [0, 0, 0.1]])
COMPLEX_B = np.diag([2.0, 0.5, 0.5])
# (40): VBᵀ = [[.5,.2,0],[0,1,0],[0,0,.05]] is not symmetric, with real eigenvalues.
REAL_V = np.diag([1.0, 0.5, 0.1])
REAL_B = np.array([[0.5, 0, 0], [0.2, 2, 0], [0, 0, 0.5]])
SYMMETRIC_B = np.diag([0.5, 2, 0.5])


def fig5(settings: Settings) -> Report:
    """Non-symmetric VBᵀ. (39): complex eigenvalues, tokens turn for ever. (40): real
    eigenvalues, tokens align with E, then with E_V, as for symmetric VBᵀ (the control); but at
    zero temperature some end at the pole opposite to π_E of their start."""
    beta, end = 5.0, 60.0
    n = settings.count(paper=400, quick=150, minimum=100)
    many, seeds = (5_000, 6) if settings.quick else (20_000, 16)
    tokens = Uniform(3).sample(settings.key, seeds * n + many)
    x0, cold_x0 = tokens[: seeds * n].reshape(seeds, n, 3), tokens[seeds * n :]
    pairs = [(COMPLEX_V, COMPLEX_B), (REAL_V, REAL_B), (REAL_V, SYMMETRIC_B)]
    V, B = (np.repeat(np.stack(a), seeds, axis=0) for a in zip(*pairs))
    ts, xs = unroll_all(
        jnp.tile(x0, (3, 1, 1)),
        V,
        B,
        np.full(3 * seeds, beta),
        round(end / STEP),
        STEP,
        5,
    )
    turning, real, control = xs.reshape(3, seeds, *xs.shape[1:])

    # --- complex eigenvalues
    window = ts >= end / 2
    speeds = _turning_speed(ts[window], turning[:, window])
    eigenvalue = complex(np.linalg.eigvals(COMPLEX_V)[0])
    speed = abs(float(np.angle(1 + STEP * eigenvalue))) / STEP
    period = zero_temperature_period(COMPLEX_V, COMPLEX_B)
    late = 0.6 * end
    grid = np.arange(0, late, 0.25)
    # Times of return, and of a turn of the collapsed ensemble, which takes longer.
    cold_ts = np.concatenate([grid, late + np.array([0, 5 * period, 10 * np.pi])])
    order = np.argsort(cold_ts)
    cold_run = solve(ZeroTemperature(I, COMPLEX_B, COMPLEX_V), cold_x0, cold_ts[order])
    cold = np.empty_like(np.asarray(cold_run.xs, float))
    cold[order] = np.asarray(cold_run.xs, float)
    returned = float(np.linalg.norm(cold[-2] - cold[-3], axis=-1).max())
    not_returned = float(np.linalg.norm(cold[-1] - cold[-3], axis=-1).mean())
    axis = alignments(turning, I[:, :1])
    swing = np.ptp(axis[:, ts >= 40], axis=1)
    plane = theory.dominant_eigenspace(I, COMPLEX_B, COMPLEX_V).basis
    off_plane = 1 - alignments(turning[:, -1], plane)

    # --- real eigenvalues
    E = np.asarray(theory.dominant_eigenspace(I, REAL_B, REAL_V).basis)
    E_V = np.asarray(theory.value_eigenspace(REAL_V))
    on_E, on_V = alignments(real, E), alignments(real, E_V)
    control_E = alignments(control, I[:, 1:2])
    control_V = alignments(control, E_V)
    rate = float(theory.alignment_rates(I, REAL_B, REAL_V).slowest)
    crossing = first_ahead(ts, on_V - on_E)
    control_crossing = first_ahead(ts, control_V - control_E)
    # The same tokens without and with one entry of B.
    # As many times as above: one program for all three.
    even = np.linspace(0, end, len(cold_ts))
    cold_real = solve(ZeroTemperature(I, REAL_B, REAL_V), cold_x0, even)
    cold_control = solve(ZeroTemperature(I, SYMMETRIC_B, REAL_V), cold_x0, even)
    cold_xs = np.asarray(cold_real.xs, float)
    cold_E, cold_V = alignments(cold_xs, E), alignments(cold_xs, E_V)
    share = _opposite(cold_xs, E[:, 0])
    control_share = _opposite(np.asarray(cold_control.xs, float), I[1])
    expected_share = opposite_pole_share(REAL_V, REAL_B)
    se = math.sqrt(expected_share * (1 - expected_share) / many)
    single = x0.dtype != jnp.float64

    cold_speed = 2 * np.pi / period
    checks = [
        Check(
            "(39) β = 5: angular speed over t ≥ 30, median over seeds",
            "C31",
            float(np.median(speeds)),
            speed,
            0.01,
            "arg(1 + hλ)/h, λ the eigenvalue of V: Oja flow in layers of h",
            cold_speed - speed,
            "the speed at zero temperature",
        ),
        Check(
            "(39) β = 5: no limit, swing of ∫⟨e₁,x⟩²dµ for t ≥ 40, least of all seeds",
            "C31",
            float(swing.min()),
            0.5,
            0.0,
            "one cluster or two opposite ones turn: 1",
            0.5,
            "tokens that come to rest",
            ">",
        ),
        Check(
            "(39) β = 5: but all tokens are in the plane E: 1 − ∫|P_E x|²dµ, worst seed",
            "C31",
            float(off_plane.max()),
            0.0,
            1e-3,
            "Prop. 3.4 of *multiscale*; E from the eigenvalues of VBᵀ",
            1 / 3,
            "the uniform law",
        ),
        Check(
            "(39) zero temperature: tokens are back after five periods, largest distance",
            "C31",
            returned,
            0.0,
            2e-2 if single else 1e-4,
            "period ∮|Bᵀx|/⟨θ̂,Mx⟩dθ of the circle, by quadrature",
            not_returned,
            "five turns of the Oja flow, 10π",
        ),
        Check(
            "(40) β = 5: peak of the alignment with E, median over seeds",
            "C31",
            float(np.median(on_E.max(axis=1))),
            0.7,
            0.0,
            "first phase; C30 has .86 for the symmetric pair, the uniform law 1/3",
            0.7 - 1 / 3,
            "no first phase",
            ">",
        ),
        Check(
            "(40) β = 5: share of seeds that end on E_V (> .99)",
            "C31",
            float((on_V[:, -1] > 0.99).mean()),
            1.0,
            0.1,
            "consensus_rates: only E_V has stable states",
            1.0,
            "tokens that stay on E",
        ),
        Check(
            "(40) β = 5: time for which E leads E_V, shortest of all seeds, at least 1/rate",
            "C31",
            float(crossing.min()),
            1 / rate,
            0.0,
            "rate gap/|Bᵀz| at which tokens align with z ∈ E",
            1 / rate,
            "one phase only, E_V ahead from the start",
            ">",
        ),
        Check(
            "(40) zero temperature: no second phase, 1 − ∫|P_E x|²dµ at t = 60",
            "C31",
            1 - float(cold_E[-1]),
            0.0,
            1e-3,
            "A10: support in E",
            1 - float(np.sum((E.T @ E_V) ** 2)),
            "tokens on E_V",
        ),
        Check(
            "(40) zero temperature: share that ends at the pole opposite to π_E(x₀)",
            "E26",
            share,
            expected_share,
            min(4 * se, expected_share / 2),
            "angle between left and right eigenvector of VBᵀ over π",
            expected_share,
            "π_E#µ₀ as the limit, share 0",
        ),
        Check(
            "symmetric control, zero temperature: the same share",
            "C15",
            control_share,
            0.0,
            1e-3,
            "Lemma 9: π_E is conserved",
            expected_share,
            "the share of (40)",
        ),
    ]
    return Report(
        settings.record(
            n=n,
            seeds=seeds,
            beta=beta,
            step=STEP,
            zero_temperature_tokens=many,
            V39=COMPLEX_V.tolist(),
            QtK39=COMPLEX_B.tolist(),
            V40=REAL_V.tolist(),
            QtK40=REAL_B.tolist(),
            period39=period,
        ),
        checks,
        {
            "alignments": _fig5_panels(
                ts,
                axis,
                alignments(turning, plane),
                (np.append(grid, late), alignments(cold[: len(grid) + 1], I[:, :1])),
                period,
                speed,
                (on_E, on_V, control_V),
                (np.asarray(cold_real.ts, float), cold_E, cold_V),
                float(np.sum((E.T @ E_V) ** 2)),
            ),
            "spheres39": _with_path(ts, turning[0], [0.0, 4.0, 30.0, 31.5]),
            "spheres40": _with_path(ts, real[0], [0.0, 4.0, 8.0, 40.0]),
        },
        {
            "ts": ts,
            "axis39": axis,
            "speeds39": speeds,
            "E40": on_E,
            "EV40": on_V,
            "E40_symmetric": control_E,
            "EV40_symmetric": control_V,
            "crossing40": crossing,
            "crossing40_symmetric": control_crossing,
        },
        [
            _spectrum("(39)", COMPLEX_V, COMPLEX_B),
            _spectrum("(40)", REAL_V, REAL_B),
            f"(40): E_V overtakes E at t = {np.median(crossing):.3g} (median over seeds), with "
            f"symmetric VBᵀ at t = {np.median(control_crossing):.3g}, where two opposite clusters "
            "on E are left by fluctuations alone, the later the more tokens there are.",
            "Spheres: one seed; the curve is the path of one token up to that time. The plane "
            "E of (39) is reached (Prop. 3.4), no direction in it is kept.",
        ],
    )


def zero_temperature_period(V: np.ndarray, B: np.ndarray, nodes: int = 4096) -> float:
    """∮|Bᵀx|/⟨θ̂, VBᵀx⟩ dθ: the time of one turn of the zero-temperature flow on the circle
    in the plane of the first two axes, invariant under Bᵀ and V."""
    theta = 2 * np.pi * np.arange(nodes) / nodes
    x = np.stack([np.cos(theta), np.sin(theta), 0 * theta], axis=1)
    forward = np.stack([-np.sin(theta), np.cos(theta), 0 * theta], axis=1)
    u = x @ B
    speed = (forward * (u @ V.T)).sum(axis=1) / np.linalg.norm(u, axis=1)
    return float(np.mean(1 / speed) * 2 * np.pi)


def opposite_pole_share(V: np.ndarray, B: np.ndarray) -> float:
    """Share of uniform tokens on whose side ⟨l, x⟩ and ⟨r, x⟩ differ in sign, for the left and
    right eigenvectors of the simple real top eigenvalue of VBᵀ: e^{Mτ}x ~ e^{λτ}⟨l,x⟩r ends at
    sign⟨l,x⟩ r, where π_E(x) = sign⟨r,x⟩ r."""
    M = V @ B.T

    def top(A: np.ndarray) -> np.ndarray:
        values, vectors = np.linalg.eig(A)
        z = np.real(vectors[:, np.argmax(np.real(values))])
        return z / np.linalg.norm(z)

    return float(np.arccos(min(1.0, abs(top(M) @ top(M.T)))) / np.pi)


def _opposite(xs: np.ndarray, pole: np.ndarray) -> float:
    """Share of tokens (t, n, d) whose side of `pole` at the end is not that at the start."""
    return float(((xs[-1] @ pole > 0) != (xs[0] @ pole > 0)).mean())


def _turning_speed(ts: np.ndarray, xs: np.ndarray) -> np.ndarray:
    """Mean angular speed of the azimuth over tokens and time, for runs (r, t, n, d)."""
    angle = np.unwrap(np.arctan2(xs[..., 1], xs[..., 0]), axis=1)
    return (angle[:, -1] - angle[:, 0]).mean(axis=-1) / (ts[-1] - ts[0])


def _spectrum(name: str, V: np.ndarray, B: np.ndarray) -> str:
    def shown(A: np.ndarray) -> str:
        values = sorted(map(complex, np.linalg.eigvals(A)), key=lambda z: -z.real)
        words = (f"{z.real:.3g}" + (f"{z.imag:+.3g}i" if z.imag else "") for z in values)
        return ", ".join(words)

    return (
        f"{name}: V = {V.tolist()}, QᵀK = {B.tolist()}; eigenvalues of V: {shown(V)}; of "
        f"VBᵀ: {shown(V @ B.T)}. Chosen here: the text has lost the matrices."
    )


def _with_path(ts: np.ndarray, xs: np.ndarray, times: list[float]):
    shown = nearest_index(ts, times)
    start = int(np.abs(xs[0, :, 2] - 0.7).argmin())  # a token that starts high up
    paths = [xs[: i + 1, start] if i else None for i in shown]
    return snapshots(xs[shown], ts[shown], color=xs[0, :, 2], curves=paths)


def _fig5_panels(ts, axis, plane, cold_axis, period, speed, real, cold_real, overlap):
    on_E, on_V, control_V = real
    cold_ts, cold_E, cold_V = cold_real
    late = ts >= 40
    t = ts[late]
    # cos² of an angle that grows at the predicted speed, in phase with the measured.
    again = (cold_axis[0] >= 10) & (cold_axis[0] <= cold_axis[0][-1] - period)
    wave = np.exp(2j * speed * t)
    phase = np.angle(np.vdot(wave, axis[0, late] - axis[0, late].mean()))
    law = 0.5 + 0.5 * np.cos(2 * speed * t + phase)
    ylim = (0, 1.03)
    return panels(
        [
            Panel(
                "time t",
                "alignment, (39) at β = 5",
                [
                    Curve(ts, axis[0], "with e₁, one seed", "measured"),
                    Curve(ts, plane[0], "with the plane E", "measured2"),
                    Curve(t, law, "one axis at the speed of V", "theory"),
                ],
                ylim=ylim,
            ),
            Panel(
                "time t",
                "alignment, (39) at zero temp.",
                [
                    Curve(cold_axis[0], cold_axis[1], "with e₁", "measured"),
                    Curve(
                        cold_axis[0][again] + period,
                        cold_axis[1][again],
                        "the same, one period later",
                        "theory",
                    ),
                ],
                ylim=ylim,
            ),
            Panel(
                "time t",
                "alignment, (40) at β = 5",
                [
                    *bands(ts, on_E, "with E, 10–50–90 % of seeds", ON_E),
                    *bands(ts, on_V, r"with $E_V$, 10–50–90 % of seeds", ON_V),
                    Curve(
                        ts,
                        np.median(control_V, axis=0),
                        r"with $E_V$, symmetric control",
                        "theory2",
                    ),
                ],
                ylim=ylim,
            ),
            Panel(
                "time t",
                "alignment, (40) at zero temp.",
                [
                    Curve(cold_ts, cold_E, "with E", "measured", color=ON_E),
                    Curve(cold_ts, cold_V, r"with $E_V$", "measured", color=ON_V),
                    Curve(
                        cold_ts,
                        0 * cold_ts + overlap,
                        r"all tokens on E: $|\langle E, E_V\rangle|^2$",
                        "theory",
                    ),
                ],
                ylim=ylim,
            ),
        ]
    )
