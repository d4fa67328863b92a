"""Figures 3 and 4 of *Quantifying concentration phenomena of mean-field transformers in the
low-temperature regime* (arXiv:2605.10931): tokens concentrate on the dominant space E of
VKᵀQ first, and on that of V, E_V, later.

The paper's matrices and sizes are lost; these show its claims: V = diag(1, ½, .1), QᵀK =
diag(½, 2, ½), so that VKᵀQ = diag(½, 1, .05), E = span(e₂), E_V = span(e₁).
"""

import math

import jax
import numpy as np

from .. import theory
from ..charts import Curve, Panel, panels
from ..layers import unroll
from ..limits import ZeroTemperature
from ..measures import Empirical
from ..plotting import snapshots
from ..transport import wasserstein
from .instances import ON_E, ON_V, bands, uniform_starts, unroll_all
from .report import Check, Report, slope
from .settings import Settings

STEP = 0.05
V = np.diag([1.0, 0.5, 0.1])
B = np.diag([0.5, 2.0, 0.5])
I = np.eye(3)
E, E_V = 1, 0  # the axes e₂ and e₁


def _runs(
    beta: float, x0: jax.Array, layers: int, every: int
) -> tuple[np.ndarray, np.ndarray]:
    """Times and tokens (seeds, t, n, 3) of Algorithm 1, at β = ∞ of Algorithm 2."""
    if math.isfinite(beta):
        seeds = len(x0)
        every_V, every_B = (np.broadcast_to(m, (seeds, 3, 3)) for m in (V, B))
        betas = np.full(seeds, beta)
        return unroll_all(x0, every_V, every_B, betas, layers, STEP, every)
    field, save = ZeroTemperature(I, B, V), range(0, layers + 1, every)
    xs = jax.vmap(lambda x: unroll(field, x, layers, STEP, save=save).xs)(x0)
    return STEP * np.arange(0, layers + 1, every), np.asarray(xs, float)


def _crossings(ts: np.ndarray, a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each seed the time at which the alignment with E, a[..., E] of a (seeds, t, 3), is
    largest, and the first time after it at which that with E_V is larger (∞: never)."""
    peak = a[..., E].argmax(axis=1)
    later = (a[..., E_V] > a[..., E]) & (np.arange(len(ts)) >= peak[:, None])
    cross = np.where(later.any(axis=1), ts[later.argmax(axis=1)], np.inf)
    return ts[peak], cross


def _delay(ratio: float) -> float:
    """By how much later the transition comes at a temperature lower by `ratio`.

    While a cluster on E is wider than the kernel, β^{−1/2}, tokens follow the zero-temperature
    flow, and x₁ falls at r = (M₂ − M₁)/|Be₂|; then clusters move as a whole, and x₁ grows at
    g = V₁ − V₂ from an amplitude smaller by ratio^{−1/2}: ½ log(ratio)(1/r + 1/g)."""
    M = V @ B
    fall, growth = (M[1, 1] - M[0, 0]) / B[1, 1], V[0, 0] - V[1, 1]
    return 0.5 * math.log(ratio) * (1 / fall + 1 / growth)


# -------------------------------------------------------- Figure 3


def fig3(settings: Settings) -> Report:
    """Two phases at β = 10: concentration on E = span(e₂), then on E_V = span(e₁).

    The first is that of Theorem 1. It is left because clusters move as one token does,
    ẋ = P_xVx, along the top eigenvector of V (Conjecture 1)."""
    beta, layers, every = 10.0, 500, 4
    n = settings.count(paper=500, quick=300, minimum=100)
    seeds = 6 if settings.quick else 16
    x0 = uniform_starts(settings.key, seeds, n)
    ts, xs = _runs(beta, x0, layers, every)
    a = (xs**2).mean(axis=2)  # alignments with e₁, e₂, e₃
    peak, cross = _crossings(ts, a)
    late = ts >= ts[-1] - 5
    falls = [-slope(ts[late], 0.5 * np.log(row[late, E])) for row in a]
    one_sided = np.abs((np.sign(xs[:, -1, :, E_V])).mean(axis=1))
    z = np.eye(3)[E_V]
    rate = -float(theory.bipartite_rates(z, I, B, V, beta).together.real.max())
    checks = [
        Check(
            "alignment with E at its largest, median over seeds",
            "C30",
            float(np.median(a[..., E].max(axis=1))),
            0.9,
            0.0,
            "Theorem 1 at t of order log β; margin for β = 10, n tokens",
            0.9 - 1 / 3,
            "the uniform law, 1/3",
            ">",
        ),
        Check(
            f"alignment with E_V at t = {ts[-1]:g}, least over seeds",
            "C30",
            float(a[:, -1, E_V].min()),
            0.99,
            0.0,
            "Conjecture 1: E_V carries the only stable states",
            0.99,
            "tokens that stay on E",
            ">",
        ),
        Check(
            "E first, E_V later: least time between peak and crossing",
            "C30",
            float((cross - peak).min()),
            0.5,
            0.0,
            "order of the phases, in every seed",
            0.5,
            "one phase",
            ">",
        ),
        Check(
            "rate at which what is left on E dies in the end, median",
            "C22",
            float(np.median(falls)),
            rate,
            0.05,
            "spectrum of (SA) at the state on E_V: tanh(β⟨z,Bz⟩)(λ₁ − λ₂)",
            rate,
            "a third phase",
        ),
    ]
    middle = int(np.argsort(cross)[seeds // 2])
    t_mid = (peak[middle] + cross[middle]) / 2
    moments = [0.0, peak[middle], (t_mid + 2 * cross[middle]) / 3, ts[-1]]
    shown = [int(np.abs(ts - t).argmin()) for t in moments]
    side = xs[middle, -1, :, E_V].mean()  # look from where the tokens end
    view = (-25.0 if side > 0 else 155.0, 25.0)
    curves = [
        *bands(ts, a[..., E], r"with $E$ = span$(e_2)$", ON_E),
        *bands(ts, a[..., E_V], r"with $E_V$ = span$(e_1)$", ON_V),
        Curve(ts[[0, -1]], [1 / 3, 1 / 3], "uniform law", "theory2"),
    ]
    return Report(
        settings.record(
            n=n, beta=beta, step=STEP, layers=layers, seeds=seeds, **_matrices()
        ),
        checks,
        {
            "spheres": snapshots(
                xs[middle, shown], ts[shown], view=view, color=xs[middle, 0, :, E_V]
            ),
            "alignments": panels([Panel("time t", "alignment, mean |P x|²", curves)]),
        },
        {
            "ts": ts,
            "alignments": a,
            "peak": peak,
            "cross": cross,
            "snapshots": xs[middle, shown],
        },
        [
            "Spheres: colour is x₁ at t = 0. Bands: 10–90 % over "
            f"{seeds} seeds; line: median. Seeds that end on one pole only: "
            f"{int((one_sided > 0.999).sum())} of {seeds}."
        ],
    )


def _matrices() -> dict:
    return {"V": np.diag(V).tolist(), "QtK": np.diag(B).tolist()}


# -------------------------------------------------------- Figure 4


def fig4(settings: Settings) -> Report:
    """Moderate, large and infinite β: W₂(µ_t, π_E#µ₀) falls, and rises again; later for
    larger β, never at β = ∞ (Algorithm 2, the zero-temperature flow).

    W₂ with chords, between the tokens and π_E of the same tokens at t = 0."""
    betas = {5.0: "β = 5", 20.0: "β = 20", math.inf: "β = ∞"}
    n = settings.count(paper=300, quick=200, minimum=100)
    seeds, layers, every = (9, 640, 20) if settings.quick else (15, 640, 10)
    x0 = uniform_starts(settings.key, seeds, n)
    sides = np.where(np.asarray(x0)[..., E] > 0, 1.0, -1.0)
    target = sides[..., None] * np.eye(3)[E]  # π_E x₀
    runs = {beta: _runs(beta, x0, layers, every) for beta in betas}
    ts = runs[5.0][0]
    a = {beta: (xs**2).mean(axis=2) for beta, (_, xs) in runs.items()}
    w2 = {beta: _distances(xs, target) for beta, (_, xs) in runs.items()}
    dip = {beta: w.min(axis=1) for beta, w in w2.items()}
    (_, cross5), (peak20, cross20) = (_crossings(ts, a[b]) for b in (5.0, 20.0))
    cold = w2[math.inf]
    closed = np.stack(
        [
            theory.zero_temperature_flow(x0[0], t, I, B, V, panels=64)
            for t in (4.0, 8.0, 16.0)
        ]
    )
    at = [int(np.abs(ts - t).argmin()) for t in (4.0, 8.0, 16.0)]
    cold_law = (closed[..., E] ** 2).mean(axis=1)
    delay = _delay(20 / 5)
    root2 = math.sqrt(2)
    checks = [
        Check(
            "W₂ dips deeper for larger β: least at β = 20 / at β = 5, median",
            "C30, C6",
            float(np.median(dip[20.0] / dip[5.0])),
            0.85,
            0.0,
            "Theorem 1: the least W₂ falls with β; margin for the noise of n tokens",
            0.15,
            "a depth that does not depend on β, 1",
            "<",
        ),
        Check(
            "W₂ rises again, β = 20: median at the end",
            "C30",
            float(np.median(w2[20.0][:, -1])),
            root2,
            0.01,
            "chords between ±e₁ and ±e₂ are √2",
            root2 - float(np.median(dip[20.0])),
            "tokens that stay near π_E#µ₀",
        ),
        Check(
            "the second phase comes later at β = 20 than at β = 5: median delay",
            "C30",
            float(np.median(cross20 - cross5)),
            delay,
            0.3 * delay,
            "½ log(4)(|Be₂|/(M₂−M₁) + 1/(V₁−V₂)): narrowing to β^{−1/2}, then growth",
            delay,
            "no delay",
        ),
        Check(
            "β = ∞: no second phase, alignment with E at the end, least over seeds",
            "C30",
            float(a[math.inf][:, -1, E].min()),
            0.995,
            0.0,
            "Cor. 2: W₂(ρ_t, π_E#µ₀) → 0",
            0.9,
            "the second phase",
            ">",
        ),
        Check(
            "β = ∞: alignment with E follows the closed form (t = 4, 8, 16)",
            "A8, C28",
            float(np.abs(a[math.inf][0, at, E] - cold_law).max()),
            0.0,
            0.02,
            "x = e^{Mτ}x₀/|·| with its time change",
            float(cold_law[1] - cold_law[0]),
            "the alignment four units of time earlier",
        ),
        Check(
            "β = ∞: W₂ at the end, median",
            "C20",
            float(np.median(cold[:, -1])),
            0.0,
            0.06,
            "Cor. 2",
            float(np.median(cold[:, 0])),
            "W₂ of the uniform tokens",
        ),
    ]
    colors = dict(zip(betas, ("#0072B2", "#009E73", "#D55E00")))
    distance, alignment = [], []
    for beta, label in betas.items():
        distance += bands(ts, w2[beta], label, colors[beta])
        alignment += bands(ts, a[beta][..., E], f"{label}, $E$", colors[beta])
        mean = np.median(a[beta][..., E_V], axis=0)
        alignment.append(Curve(ts, mean, f"{label}, $E_V$", "theory", color=colors[beta]))
    distance.append(
        Curve(ts[[0, -1]], [root2, root2], r"$\pm e_1$ to $\pm e_2$", "theory2")
    )
    spans = [
        (float(np.median(peak20)), float(np.median(cross20)), "β = 20, peak to cross")
    ]
    return Report(
        settings.record(
            n=n, beta=[5, 20, "inf"], step=STEP, layers=layers, seeds=seeds, **_matrices()
        ),
        checks,
        {
            "phases": panels(
                [
                    Panel(
                        "time t",
                        r"$W_2(\mu_t,\ \pi_{E\#}\mu_0)$",
                        distance,
                        spans=spans,
                        ylim=(0, 1.55),
                    ),
                    Panel("time t", "alignment, mean |P x|²", alignment, ylim=(0, 1.02)),
                ]
            )
        },
        {
            "ts": ts,
            **{f"w2_{_name(b)}": w for b, w in w2.items()},
            **{f"alignments_{_name(b)}": v for b, v in a.items()},
        },
        [
            f"Bands: 10–90 % over {seeds} seeds; lines: medians. Delay of the crossing from "
            f"β = 5 to 20: {np.round(np.sort(cross20 - cross5), 1).tolist()}."
        ],
    )


def _name(beta: float) -> str:
    return "infinite" if math.isinf(beta) else f"{beta:g}"


def _distances(xs: np.ndarray, target: np.ndarray) -> np.ndarray:
    """W₂ (seeds, t) of tokens (seeds, t, n, 3) to targets (seeds, n, 3), with chords."""
    return np.array(
        [
            [
                float(
                    wasserstein(
                        Empirical(x, check=False),
                        Empirical(y, check=False),
                        p=2,
                        cost="chordal",
                        method="exact",
                    ).value
                )
                for x in run
            ]
            for run, y in zip(xs, target)
        ]
    )
