"""Theorem 1 of *Quantifying concentration phenomena of mean-field transformers in the
low-temperature regime* (arXiv:2605.10931): how close µ_t^β comes to π_E#µ₀, and when.

The mean field itself is computed (`rings`): sampled tokens drift by sampling noise of order
√(2/n) whatever β is, which hides the law from β ≈ 50 on at n = 10⁴.
"""

import math
from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .. import sphere, theory
from ..attention import SelfAttention
from ..charts import Curve, Panel, panels, shades
from ..flow import solve
from ..limits import ZeroTemperature
from ..measures import Empirical, Uniform
from ..transport import wasserstein
from .report import Check, Report, slope
from .rings import Rings, tilted_nodes
from .settings import BadArgument, Settings

TILT = 0.5
B = np.array([1.0, 1, 1, 0.5])  # diagonals on R⁴; E = span(e₁, e₂, e₃)
V = np.ones(4)
GAP = 0.5  # of VBᵀ = diag(1, 1, 1, .5)
REDUCED = np.array([0, 1, 3])  # (x₁, r, x₄) stand for S³
EARLY, LATE = 2.0, 4.0  # times of comparisons: of the flows, of couplings
EPSILON = 0.05


def theorem1(settings: Settings) -> Report:
    """W₂(µ_t^β, π_E#µ₀) for β = 10 … 1000 on S³, dim E = 3, µ₀ = (1 + ½x₁)/|S³|.

    Two effects, as in the theorem: heights over E fall like e^{−t·gap} (later like e^{−t}),
    and tokens drift along E. The theorem bounds the drift by √(log β/β); for a smooth
    density its speed is |∇log µ|/β (E25), so that the least distance goes like log β/β."""
    betas = np.array([10.0, 30, 100, 300, 1000])
    betas = betas[1:4] if settings.quick else betas
    ts = np.linspace(0, 12 if settings.quick else 16, 49 if settings.quick else 65)
    width = 1.5 if settings.quick else 1.2  # spacing of nodes in widths of the kernel
    if settings.tokens is not None:
        least = 200
        if settings.tokens < least:
            raise BadArgument(
                f"Argument `tokens` must be at least {least} nodes at the largest β, but is "
                f"{settings.tokens}. Leave it out for a spacing of {width} kernel widths."
            )
        width = math.pi * math.sqrt(betas[-1] / (2 * settings.tokens))

    early = int(np.searchsorted(ts, EARLY))
    keep = sorted({early, int(np.searchsorted(ts, LATE)), len(ts) - 1})
    runs = [_run(beta, ts, width, keep) for beta in betas]
    total = np.array([r["total"] for r in runs])
    when, least = np.array([_lowest(ts, row) for row in total]).T
    cold_x, cold_w = tilted_nodes(TILT, _around(betas[-1], width))
    cold = _cold(cold_x, cold_w, ts)
    drift = _drift_speed()
    law = [_law(beta, cold["variance"][early]) for beta in betas]
    law_when, law_least = np.array([(t[v.argmin()], v.min()) for t, v in law]).T

    bound = theory.concentration_bound(
        np.eye(4),
        np.diag(B),
        np.diag(V),
        Uniform(4),
        p=2.0,
        minimum=(1 - TILT) / sphere.area(4),
        moment=theory.lyapunov_moment(4, 3, 2.0),  # x₁ does not change the law of heights
    )
    cold_bound = float(bound.C2) * np.exp(-float(bound.c) * ts)
    at30, at100 = (int(np.searchsorted(betas, b)) for b in (30, 100))
    fine = _run(30.0, ts, 0.75 * width, keep)
    # W₂ itself, all couplings allowed: tokens that share a target are one atom of it.
    exact, coupled = _exact(runs[0]["x"], runs[0]["w"], runs[0]["xs"][1])
    large = betas >= 30
    order = slope(np.log(np.log(betas) / betas)[large], np.log(least)[large])
    flows = np.array([_rms(r["w"], r["xs"][0] - r["cold"]) for r in runs])
    late, steady = ts >= 0.6 * ts[-1], (ts >= 2) & (ts <= 6)
    speed = betas[-1] * slope(ts[steady], runs[-1]["drift"][steady])
    window, law_window = (
        _window(*curve, EPSILON) for curve in ((ts, total[at100]), law[at100])
    )

    checks = [
        Check(
            "least W₂(µ_t^β, π_E#µ₀) over t is ∝ (log β/β)^q: exponent q, β ≥ 30",
            "C6, E25",
            order,
            1.0,
            0.2,
            "field error ∇log µ/β for smooth densities, time ∝ log β",
            0.5,
            "the bound's own order √(log β/β), q = ½",
        ),
        Check(
            f"least W₂ at β = {betas[-1]:g} over heights-and-drift law",
            "C6",
            float(least[-1] / law_least[-1]),
            1.0,
            0.15,
            "min over t of heights (Gaussian closure) and drift ∇log µ·t/β",
            float(least[-2] / least[-1]) - 1,
            "a distance that does not fall with β",
        ),
        Check(
            "its time grows like log β: slope over that of the law",
            "C6",
            slope(np.log(betas[large]), when[large])
            / slope(np.log(betas[large]), law_when[large]),
            1.0,
            0.15,
            "heights fall at the rate gap until width β^{−1/2}, then at 1",
            1.0,
            "a time that does not depend on β",
        ),
        Check(
            f"drift along E at β = {betas[-1]:g}, 2 ≤ t ≤ 6: β·speed",
            "E25",
            speed,
            drift,
            0.1 * drift,
            "‖∇log µ‖ along E where tokens attend, by quadrature",
            drift,
            "no drift, or one that β does not divide",
        ),
        Check(
            f"W₂(µ_t^β, ρ_t) at t = {EARLY:g} is ∝ β^q: exponent q, largest two β",
            "C9",
            slope(np.log(betas[-2:]), np.log(flows[-2:])),
            -1.0,
            0.1,
            "field error of order 1/β for smooth densities",
            0.5,
            "the bound's own order, q = −½",
        ),
        Check(
            "zero temperature: largest W₂(ρ_t, π_E#µ₀)/(C₂e^{−ct})",
            "C7",
            float((cold["height"] / cold_bound).max()),
            1.0,
            0.0,
            "Cor. 2 with C₂ = (C₂E₂(µ₀))^{1/2}, c = gap/σ_max(B)",
            float((cold["height"] / cold_bound).max()) * math.exp(float(bound.c) * ts[-1])
            - 1,
            "a distance that stays",
            "<",
        ),
        Check(
            "zero temperature: rate at which W₂(ρ_t, π_E#µ₀) falls",
            "C7",
            -slope(ts[late], np.log(cold["height"][late])),
            GAP,
            0.02,
            "heights fall like e^{−t·gap/|Bᵀx|}, |Bᵀx| = 1 on E",
            GAP,
            "the rate gap/σ_min(B), or none",
        ),
        Check(
            "zero temperature: π_E of each token stays (sup over t, tokens)",
            "C15",
            float(cold["moved"]),
            0.0,
            1e-4,
            "Lemma 9: d/dt π_E(x) = 0 for symmetric VBᵀ",
            float(runs[0]["drift"][-1]),
            "the drift at the smallest β",
        ),
        *[
            Check(
                f"{what} of the window W₂(µ_t^β, π_E#µ₀) ≤ {EPSILON:g} at β = 100",
                "C8",
                measured,
                expected,
                0.15 * expected,
                "the heights-and-drift law",
                expected,
                "no window",
            )
            for what, measured, expected in zip(("begin", "end"), window, law_window)
        ],
        Check(
            f"all couplings allowed / x_t coupled to π_E x₀: W₂, β = {betas[0]:g}, t = {LATE:g}",
            "C20",
            exact / coupled,
            1.0,
            0.01,
            "linear programme over all couplings",
            float(total[0].max() / least[0]) - 1,
            "a coupling that is far from the best",
        ),
        Check(
            "resolution: least W₂ at β = 30, ratio to 1.8 times as many nodes",
            "C6",
            float(least[at30] / _lowest(ts, fine["total"])[1]),
            1.0,
            0.02,
            "the same run with a spacing of nodes of 3/4",
            float(least[at30] / least[at100]) - 1,
            "a floor set by the nodes",
        ),
    ]
    proved = bound.window(EPSILON, betas[-1])
    notes = [
        f"The theorem's constants: C₁ = {float(bound.C1):.3g}, C = {float(bound.C):.3g}, "
        f"C₂ = {float(bound.C2):.3g}, c = {float(bound.c):.3g}; its window for ε = "
        f"{EPSILON:g} at β = {betas[-1]:g} is empty: {proved.reason}.",
        "V = I, QᵀK = VKᵀQ = diag(1, 1, 1, ½), µ₀ of density (1 + ½x₁)/|S³|.",
    ]
    return Report(
        settings.record(
            beta=betas.tolist(),
            V=V.tolist(),
            QtK=B.tolist(),
            tilt=TILT,
            nodes=[len(r["w"]) for r in runs],
        ),
        checks,
        {
            "distances": _distance_chart(
                betas, ts, total, cold["height"], cold_bound, law_window
            ),
            "least": _least(betas, least, when, law_least, law_when),
        },
        {
            "ts": ts,
            "beta": betas,
            "w2": total,
            "height": np.array([r["height"] for r in runs]),
            "drift": np.array([r["drift"] for r in runs]),
            "w2_zero_temperature": cold["height"],
            "law_least": law_least,
            "law_time": law_when,
            "w2_of_flows": flows,
        },
        notes,
    )


def _around(beta: float, width: float) -> int:
    """Nodes in the polar angle at a spacing of `width` kernel widths β^{−1/2}."""
    return 2 * math.ceil(math.pi * math.sqrt(beta) / width / 2) + 4


def _lowest(ts: np.ndarray, row: np.ndarray) -> tuple[float, float]:
    """(time, value) of the minimum of a curve: the parabola of its logarithm."""
    i = int(np.clip(row.argmin(), 1, len(ts) - 2))
    a, b, c = np.polyfit(ts[i - 1 : i + 2] - ts[i], np.log(row[i - 1 : i + 2]), 2)
    return ts[i] - b / (2 * a), math.exp(c - b**2 / (4 * a))


def _window(ts: np.ndarray, row: np.ndarray, level: float) -> tuple[float, float]:
    """When a curve falls to `level`, and when it rises to it again, linear in its logarithm
    between times; (∞, ∞): never."""
    below = np.flatnonzero(row <= level)
    if not below.size:
        return math.inf, math.inf

    def crossing(i: int) -> float:
        fall = np.log(row[i : i + 2] / level)
        return float(ts[i] + (ts[i + 1] - ts[i]) * fall[0] / (fall[0] - fall[1]))

    first, last = int(below[0]), int(below[-1])
    return (
        crossing(first - 1) if first else float(ts[0]),
        crossing(last) if last < len(ts) - 1 else math.inf,
    )


def _project(x: np.ndarray) -> np.ndarray:
    """π_E of reduced tokens (..., 3): height 0."""
    on = x * np.array([1.0, 1, 0])
    return on / np.linalg.norm(on, axis=-1, keepdims=True)


def _rms(w: np.ndarray, off: np.ndarray) -> np.ndarray | float:
    """(Σⱼ wⱼ|offⱼ|²)^{1/2}."""
    return np.sqrt((off**2).sum(axis=-1) @ w)


class _Distances(eqx.Module):
    """(∫|x_t − π_E x₀|²)^{1/2}, and of that heights |x − π_E x| and drift |π_E x_t − π_E x₀|."""

    end: Array

    def __call__(self, mu: Empirical) -> dict[str, Array]:
        flat = mu.points * jnp.array([1, 1, 0], mu.points.dtype)
        on = sphere.normalise(flat)
        off = {
            "total": mu.points - self.end,
            "height": mu.points - on,
            "drift": on - self.end,
        }
        return {k: jnp.sqrt(mu.mean(jnp.sum(v**2, axis=-1))) for k, v in off.items()}


def _run(beta: float, ts: np.ndarray, width: float, keep: Sequence[int]) -> dict:
    """The mean field at β: `_Distances` at all times, tokens at those of `keep`."""
    x, w = tilted_nodes(TILT, _around(beta, width))
    Q, K, D = np.eye(3), np.diag(B[REDUCED]), np.diag(V[REDUCED])
    run = solve(
        SelfAttention(Q, K, D, beta, Rings()),
        Empirical(x, w),
        ts,
        rtol=1e-5,
        atol=1e-7,
        observables={"d": _Distances(jnp.asarray(_project(x)))},
        save=keep,
    )
    seen = {k: np.asarray(v, float) for k, v in run.observed["d"].items()}
    cold = np.asarray(theory.zero_temperature_flow(x, EARLY, Q, K, D))
    return seen | {"x": x, "w": w, "xs": np.asarray(run.xs, float), "cold": cold}


def _cold(x: np.ndarray, w: np.ndarray, ts: np.ndarray) -> dict:
    """The zero-temperature flow of the same nodes."""
    Q, K, D = np.eye(3), np.diag(B[REDUCED]), np.diag(V[REDUCED])
    run = solve(ZeroTemperature(Q, K, D), Empirical(x, w), ts, rtol=1e-8, atol=1e-9)
    xs, end = np.asarray(run.xs, float), _project(x)
    near = np.abs(xs[..., 2]) < 1 - 1e-6  # π_E is not defined on E^⊥
    moved = np.where(near, np.linalg.norm(_project(xs) - end, axis=-1), 0).max()
    height = _rms(w, xs - end)
    return {"height": height, "moved": moved, "variance": xs[..., 2] ** 2 @ w}


def _exact(x: np.ndarray, w: np.ndarray, xt: np.ndarray) -> tuple[float, float]:
    """W₂ of (xt, w) and (π_E x, w) over all couplings, and with xt coupled to π_E x."""
    end = _project(x)
    atoms, index = np.unique(end.round(9), axis=0, return_inverse=True)
    masses = np.bincount(index.ravel(), weights=w)
    target = Empirical(atoms / np.linalg.norm(atoms, axis=1, keepdims=True), masses)
    source = Empirical(xt, w)
    found = wasserstein(source, target, p=2, cost="chordal", method="exact")
    return float(found.value), float(_rms(w, xt - end))


# ------------------------------------------------------- what is expected, in NumPy


def _drift_speed() -> float:
    """β times the speed along E of tokens that have come near, while heights are wider than
    the kernel: a token that started at the angle η to E attends to tokens at tan η' =
    (B₄/B₁) tan η (they keep this ratio), whose law along E is ∝ 1 + a cos η' z, z = x₁/|P_E x|,
    and moves with ∇log of it, over β. In L²(µ₀), by quadrature."""
    eta, v = np.polynomial.legendre.leggauss(80)
    eta, v = np.pi / 2 * eta[:, None], v[:, None] * np.cos(np.pi / 2 * eta[:, None]) ** 2
    z, w = np.polynomial.legendre.leggauss(80)
    a = TILT / np.sqrt(1 + (B[3] / B[0] * np.tan(eta)) ** 2)
    mass = v * w * (1 + TILT * np.cos(eta) * z)
    square = a**2 * (1 - z**2) / (1 + a * z) ** 2
    return math.sqrt((mass * square).sum() / mass.sum())


def _law(beta: float, variance: float) -> tuple[np.ndarray, np.ndarray]:
    """Times from `EARLY` on, and the law W₂² = s(t) + (C t/β)²: C as `_drift_speed`; s the
    variance of the heights, from its value at `EARLY` on by the Gaussian closure

        s' = 2s(V₄B₄βs/(1 + βs) − 1)

    (tilting a normal law of heights of variance s by e^{βB₄x₄y − βy²/2} gives the mean
    B₄x₄βs/(1 + βs); the weight −y²/2 is that of √(1 − y²) along E)."""
    h, C = 2e-3, _drift_speed() / beta
    ts = EARLY + h * np.arange(15_000)
    s = np.empty_like(ts)
    s[0] = variance

    def rate(s: float) -> float:
        return 2 * s * (V[3] * B[3] * beta * s / (1 + beta * s) - 1)

    for i in range(len(ts) - 1):
        s[i + 1] = s[i] + h * rate(s[i] + h / 2 * rate(s[i]))
    return ts, np.sqrt(s + (C * ts) ** 2)


# ------------------------------------------------------------------- pictures


def _distance_chart(betas, ts, total, cold, cold_bound, window):
    colors = shades(len(betas))
    curves = [
        Curve(ts, row, f"β = {b:g}", "measured", color=c)
        for b, row, c in zip(betas, total, colors)
    ]
    curves += [
        Curve(ts, cold, "β = ∞", "measured2"),
        Curve(ts, cold_bound, r"Cor. 2, $C_2e^{-ct}$", "theory"),
    ]
    label = r"$W_2(\mu^\beta_t,\ \pi_{E\#}\mu_0)$"
    top, bottom = 2 * cold_bound[0], 0.3 * total.min()
    spans = [(*window, f"law ≤ {EPSILON}, β = 100")]
    return panels(
        [Panel("time t", label, curves, yscale="log", ylim=(bottom, top), spans=spans)]
    )


def _least(betas, least, when, law_least, law_when):
    guide = np.sqrt(np.log(betas) / betas)
    guide = guide * least[0] / guide[0]
    return panels(
        [
            Panel(
                "inverse temperature β",
                r"least $W_2$ over t",
                [
                    Curve(betas, least, "mean field", "points"),
                    Curve(
                        betas, law_least, "heights and drift, no free constant", "theory"
                    ),
                    Curve(
                        betas,
                        guide,
                        r"order of the bound, $\sqrt{\log\beta/\beta}$",
                        "theory2",
                    ),
                ],
                xscale="log",
                yscale="log",
            ),
            Panel(
                "inverse temperature β",
                "time t",
                [
                    Curve(betas, when, "time of the least $W_2$", "points"),
                    Curve(betas, law_when, "heights and drift", "theory"),
                ],
                xscale="log",
                ylim=(0, None),
            ),
        ]
    )
