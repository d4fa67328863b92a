"""Figures 2 and 10 of *Quantifying concentration phenomena of mean-field transformers in the
low-temperature regime* (arXiv:2605.10931): the terminal phase and Conjecture 1. Tokens end on E_V
(largest eigenvalue of V) or on E_|V| (largest modulus), over many seeds and matrices.

The text has lost all matrices and sizes; those here are chosen so that each claim is exercised.
Expected values come from `theory`, which shares no code with the simulator.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .. import theory
from ..attention import SelfAttention
from ..charts import Curve, Panel, panels
from ..measures import Empirical
from ..plotting import snapshots
from ..sphere import normalise
from .instances import (
    ON_A,
    ON_E,
    ON_V,
    alignments,
    bands,
    dotted_last,
    first_ahead,
    uniform_starts,
    unroll_all,
)
from .report import Check, Report, nearest_index, slope
from .settings import Settings

I = np.eye(3)

# -------------------------------------------------------- Figure 2

STEP = 0.05


class Case(NamedTuple):
    """Diagonals of V and QᵀK, β, and the state that ends the run."""

    name: str
    v: tuple[float, ...]
    b: tuple[float, ...]
    beta: float
    modulus: bool  # on E_|V| instead of E_V
    bipartite: bool


FIRST = ((1.0, 0.5, 0.1), (0.8, 0.6, 0.5))
SECOND = ((0.5, 0.3, -1.0), (0.6, 0.8, -0.5))
CASES = (
    Case("consensus on E_V", *FIRST, 0.5, modulus=False, bipartite=False),
    Case("bipartite on E_V", *FIRST, 10.0, modulus=False, bipartite=True),
    Case("bipartite on E_|V|", *SECOND, 5.0, modulus=True, bipartite=True),
)


def fig2(settings: Settings) -> Report:
    """Consensus δ_z on E_V, bipartite consensus aδ_z + (1 − a)δ_{−z} on E_V and on E_|V|.

    The first two differ in β alone: on E_V the bipartite state (a = ½) is stable if and only
    if tanh(β⟨z,Bz⟩) > λ₂/λ₁; below that one cluster is left."""
    end = 60.0
    n = settings.count(paper=400, quick=150, minimum=100)
    seeds = 4 if settings.quick else 16
    x0 = uniform_starts(settings.key, seeds, n)

    def each_seed(name: str) -> np.ndarray:
        return np.repeat(np.array([getattr(c, name) for c in CASES]), seeds, axis=0)

    v, b = each_seed("v"), each_seed("b")
    ts, xs = unroll_all(
        jnp.tile(x0, (len(CASES), 1, 1)),
        v[:, :, None] * I,
        b[:, :, None] * I,
        each_seed("beta"),
        round(end / STEP),
        STEP,
        10,
    )
    xs = xs.reshape(len(CASES), seeds, *xs.shape[1:])
    checks, notes, rows, spheres, arrays = [], [], [], {}, {"ts": ts}
    for i, case in enumerate(CASES):
        found, note, panel, up = _terminal_state(case, ts, xs[i])
        checks += found
        notes.append(note)
        rows.append(panel)
        arrays |= {f"share_{i + 1}": up, f"squares_{i + 1}": (xs[i] ** 2).mean(axis=2)}
        shown = nearest_index(ts, [0, 4, 8, end])
        spheres[f"spheres_{i + 1}"] = snapshots(
            xs[i, 0, shown], ts[shown], color=xs[i, 0, 0, :, 2], title=case.name
        )
    return Report(
        settings.record(n=n, seeds=seeds, step=STEP, end=end),
        checks,
        {"alignments": panels(rows, shared=True), **spheres},
        arrays,
        notes,
    )


def _terminal_state(
    case: Case, ts: np.ndarray, xs: np.ndarray
) -> tuple[list[Check], str, Panel, np.ndarray]:
    """The checks, a note, a panel and the shares at +z of the runs xs (seed, t, n, d)."""
    name, beta = case.name, case.beta
    V, B = np.diag(case.v), np.diag(case.b)
    spaces = [
        np.asarray(E)
        for E in (
            theory.dominant_eigenspace(I, B, V).basis,
            theory.value_eigenspace(V),
            theory.value_eigenspace(V, modulus=True),
        )
    ]
    z = np.abs(spaces[2 if case.modulus else 1][:, 0])
    alone = theory.consensus_rates(z, V)
    pair = theory.bipartite_rates(z, I, B, V, beta)
    if case.bipartite:
        state, rates = theory.bipartite_consensus(z, V, copies=2), pair
    else:
        state, rates = theory.consensus(z, V, copies=4), alone
    field = SelfAttention(I, B, V, beta)
    growth = float(rates.growth)
    spectrum = theory.jacobian_spectrum(field, state)
    tilt = np.array([[1, -0.1, -0.1], [0.1, 1, -0.1], [0.1, 0.1, 1]])
    beside = Empirical(normalise(state.points @ tilt.T), state.weights, check=False)
    rest, moves = (
        float(theory.stationarity_residual(field, mu).largest) for mu in (state, beside)
    )

    heights = xs @ z
    up = (heights[:, -1] > 0).mean(axis=1)
    two = (up > 0) & (up < 1)
    # Masses as they are: each token to the pole on its side.
    distance = [
        np.sqrt(((x - np.sign(x @ z)[..., None] * z) ** 2).sum(axis=-1).mean(axis=-1))
        for x in (xs[:, 0], xs[:, -1])
    ]
    # Per layer: the own cluster pulls with λt = −within, the slowest mode with λt + growth.
    own = -float(rates.within)
    contraction = math.log1p(STEP * own) / STEP
    approach = contraction - math.log1p(STEP * (own + growth)) / STEP
    width, angle = _width(xs, heights), _angle(xs, z)
    floor = 1e-10 if spectrum.growth.dtype == jnp.float64 else 1e-6
    settled = (angle < 1e-3) & (angle > floor)
    checks = [
        Check(
            f"{name}: share of {len(up)} seeds that end so",
            "C29",
            float((two == case.bipartite).mean()),
            1.0,
            0.1,
            f"growth rates: consensus {float(alone.growth):.2g}, bipartite "
            f"{float(pair.growth):.2g}",
            1.0,
            "the other of the two",
        ),
        Check(
            f"{name}: W₂ to it at t = {ts[-1]:g}, worst seed",
            "C22",
            float(distance[1].max()),
            0.0,
            1e-3,
            "all tokens at ±z, the eigenvector of V",
            float(distance[0].mean()),
            "the distance at t = 0",
        ),
        Check(
            f"{name}: it is stationary, largest speed of its tokens",
            "C24",
            rest,
            0.0,
            1e-5 * moves,
            "Eq. (38) is zero",
            moves,
            "the same state turned away from z by 0.1 rad",
        ),
        Check(
            f"{name}: it is stable, largest growth rate by autodiff",
            "C24",
            float(spectrum.growth),
            growth,
            0.01 * abs(growth),
            "closed forms of consensus_rates, bipartite_rates",
            growth,
            "a neutral state",
        ),
        Check(
            f"{name}: rate of approach of the run, median over seeds",
            "C24",
            _rate(ts, angle, settled),
            approach,
            0.05 * approach,
            "the slowest rate of the closed forms, in layers of h",
            approach,
            "no approach",
        ),
        Check(
            f"{name}: rate at which clusters contract, median over seeds",
            "C24",
            _rate(ts, width, (angle < 0.1) & (width > floor) & (width < 0.1)),
            contraction,
            0.05 * contraction,
            "λ tanh(β⟨z,Bz⟩), for consensus λ, in layers of h",
            contraction - approach,
            "tokens of a cluster that only follow the slowest mode",
        ),
    ]
    labels = ("with E", r"with $E_V$", r"with $E_{|V|}$")
    curves = []
    for E, label, color in zip(spaces, labels, (ON_E, ON_V, ON_A)):
        curves += bands(ts, alignments(xs, E), label, color)
    shares = ", ".join(f"{s:.2f}" for s in up)
    note = (
        f"{name}: diagonals of V {case.v}, of QᵀK {case.b}, β = {beta:g}; share of the "
        f"tokens at +z, per seed: {shares}."
    )
    title = name.replace("E_|V|", "$E_{|V|}$").replace("E_V", "$E_V$")
    panel = Panel("time t", "alignment", dotted_last(curves), ylim=(0, 1.03), title=title)
    return checks, note, panel, up


def _angle(xs: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Root mean square distance of the tokens (seed, t, n, d) from the line through z."""
    across = xs - (xs @ z)[..., None] * z
    return np.sqrt((across**2).sum(axis=-1).mean(axis=-1))


def _width(xs: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """Root mean square distance of the tokens from the mean of those on their side."""
    total = np.zeros(xs.shape[:2])
    for side in (heights > 0, heights <= 0):
        w = side[..., None].astype(float)
        mean = (w * xs).sum(axis=2, keepdims=True) / np.maximum(
            w.sum(axis=2, keepdims=True), 1
        )
        total += (w * (xs - mean) ** 2).sum(axis=(2, 3))
    return np.sqrt(total / xs.shape[2])


def _rate(ts: np.ndarray, values: np.ndarray, where: np.ndarray) -> float:
    """Median over seeds of the rate at which `values` (seed, t) fall while `where`."""
    rates = [-slope(ts[w], np.log(y[w])) for y, w in zip(values, where) if w.sum() >= 6]
    return float(np.median(rates)) if rates else math.nan


# -------------------------------------------------------- Figure 10

LONG_STEP = 0.1
BETAS = (2.0, 10.0)
# Diagonals of V and of QᵀK: rounded members of the random family.
SWITCHING = ((0.5, -0.7, -0.2), (0.1, -0.2, 0.5))  # panels (a), (d)
COMMON = ((0.9, 0.5, -0.6), (0.3, 0.9, 0.2))  # (b), (e)
MODULUS = ((0.4, -0.9, -0.2), (0.1, -0.5, 0.8))  # (c), (f)
LETTERS = ("abc", "def")  # of the panels: rows are the two β
ALIGNED = 0.99  # of the mass on one axis


class Forecast(NamedTuple):
    """What theory says of diagonal V and QᵀK at β: the axes of E, E_V and E_|V| (r,), and per
    axis the growth rate (r, d) of δ_z or of ½(δ_z + δ_{−z}) on it, whichever is smaller."""

    E: np.ndarray
    E_V: np.ndarray
    E_A: np.ndarray
    growth: np.ndarray

    def at(self, axis: np.ndarray) -> np.ndarray:
        """The growth rate on the given axes (r,); ∞ for −1, no axis."""
        rate = np.take_along_axis(self.growth, axis[:, None], axis=1)[:, 0]
        return np.where(axis >= 0, rate, np.inf)

    def part(self, rows: slice | np.ndarray) -> "Forecast":
        return Forecast(*(a[rows] for a in self))


@jax.jit
def _growths(v: Array, b: Array, beta: Array) -> Array:
    eye = jnp.eye(v.shape[-1], dtype=v.dtype)

    def one(v, b, beta, z):
        V = jnp.diag(v)
        alone = theory.consensus_rates(z, V).growth
        pair = theory.bipartite_rates(z, eye, jnp.diag(b), V, beta).growth
        return jnp.minimum(alone, pair)

    every_axis = jax.vmap(one, in_axes=(None, None, None, 0))
    return jax.vmap(lambda v, b, beta: every_axis(v, b, beta, eye))(v, b, beta)


def forecast(v: np.ndarray, b: np.ndarray, beta: np.ndarray) -> Forecast:
    """For diagonals v, b (r, d) and β (r,), by `consensus_rates` and `bipartite_rates`."""
    growth = np.asarray(_growths(*(jnp.asarray(a) for a in (v, b, beta))), float)
    axes = (v * b).argmax(axis=1), v.argmax(axis=1), np.abs(v).argmax(axis=1)
    return Forecast(*axes, growth)


def limit_axis(squares: np.ndarray) -> np.ndarray:
    """The axis (r,) that holds at least .99 of ∫⟨e_k,x⟩²dµ (r, d), or −1."""
    return np.where(squares.max(axis=1) >= ALIGNED, squares.argmax(axis=1), -1)


def switching_beta(v: tuple, b: tuple) -> float:
    """β from which on ½(δ_z + δ_{−z}) on E_|V| is stable: |v_min| tanh(β|b|) = v_max."""
    k = int(np.argmin(v))
    return math.atanh(max(v) / abs(v[k])) / abs(b[k])


def fig10(settings: Settings) -> Report:
    """Conjecture 1 for random diagonal V and QᵀK with entries uniform in [−1, 1], two β.

    δ_z is stable on E_V if its eigenvalue is positive, at any β; ½(δ_z + δ_{−z}) is on E_|V| if
    v_min < 0, b < 0 there, and |v_min| tanh(β|b|) > v_max: so the limit can change from E_V to
    E_|V| with β, as in panels (a), (d)."""
    n = settings.count(paper=300, quick=100, minimum=60)
    many, seeds = (24, 8) if settings.quick else (96, 16)
    end = 100.0 if settings.quick else 150.0
    key_v, key_b, key_x = jax.random.split(settings.key, 3)
    draw = [
        np.asarray(jax.random.uniform(k, (many, 3), minval=-1.0), float)
        for k in (key_v, key_b)
    ]
    starts = np.asarray(uniform_starts(key_x, many + seeds, n))
    critical = switching_beta(*SWITCHING)
    near = np.array([0.9, 1.1]) * critical

    # Rows: the random instances at both β, the representatives at both β, and two runs that
    # start beside the bipartite state on E_|V|, below and above its critical β.
    reps = np.array([SWITCHING, COMMON, MODULUS])  # (3, 2, 3)
    v, b = (
        np.concatenate(
            [
                np.tile(draw[i], (2, 1)),
                np.tile(np.repeat(reps[:, i], seeds, axis=0), (2, 1)),
                np.tile(reps[0, i], (2, 1)),
            ]
        )
        for i in (0, 1)
    )
    beta = np.concatenate([np.repeat(BETAS, many), np.repeat(BETAS, 3 * seeds), near])
    x0 = np.concatenate(
        [
            np.tile(starts[:many], (2, 1, 1)),
            np.tile(starts[many:], (6, 1, 1)),
            np.tile(_beside_bipartite(n), (2, 1, 1)),
        ]
    )
    ts, (mean, squares) = unroll_all(
        jnp.asarray(x0),
        v[:, :, None] * I,
        b[:, :, None] * I,
        beta,
        round(end / LONG_STEP),
        LONG_STEP,
        10,
        _moments,
    )
    fc = forecast(v, b, beta)
    ends = limit_axis(squares[:, -1])
    random = np.arange(len(v)) < 2 * many
    rep = np.arange(2 * many, 2 * many + 6 * seeds).reshape(2, 3, seeds)
    checks, notes = [], []
    for j, temperature in enumerate(BETAS):
        part = slice(j * many, (j + 1) * many)
        checks += _random_checks(temperature, ends[part], fc.part(part), end)
        counts = _outcomes(ends[part], fc.part(part))
        notes.append(
            f"β = {temperature:g}, {many} random instances, what is stable → limit: "
            + "; ".join(f"{k}: {c}" for k, c in sorted(counts.items()))
            + "."
        )
    checks += _representative_checks(ts, squares, ends, fc, rep)
    checks += [
        _threshold_check(ts, mean[row], beta[row], factor)
        for row, factor in zip((-2, -1), (0.9, 1.1))
    ]
    notes += [
        f"No axis: none holds {ALIGNED:g} of the mass at t = {end:g}. Where v_max < 0 and "
        "nothing is stable tokens spread or go on moving; where the top eigenvalues of V nearly "
        "tie they are slow, or rest on another axis; where b < 0 on E_V tokens are pushed to the "
        "other pole, and may spread though δ_z is stable.",
        f"Representatives (diagonals of V; of QᵀK): (a, d) {SWITCHING}, E_|V| stable from "
        f"β = {critical:.3g} on; (b, e) {COMMON}; (c, f) {MODULUS}.",
    ]
    return Report(
        settings.record(
            n=n,
            instances=many,
            seeds=seeds,
            betas=list(BETAS),
            step=LONG_STEP,
            end=end,
            critical_beta=critical,
        ),
        checks,
        {
            "representatives": _fig10_panels(ts, squares, rep, fc),
            "stability": _stability_plane(v, b, beta, ends, fc, random),
        },
        {
            "ts": ts,
            "V": v,
            "QtK": b,
            "beta": beta,
            "squares": squares,
            "limit_axis": ends,
            "growth": fc.growth,
        },
        notes,
    )


def _random_checks(
    beta: float, ends: np.ndarray, fc: Forecast, end: float
) -> list[Check]:
    """Limits of random instances at one β, at time `end`, against what is stable."""
    slow = 5 / end  # instabilities slower than this have not shown
    can = fc.growth.min(axis=1) < 0
    others = [np.roll(ends, s) for s in range(1, len(ends))]
    chance = float(np.mean([(o >= 0) & (fc.at(o) > slow) for o in others]))
    lucky = float(np.mean([fc.at(o)[can] < slow for o in others]))
    rival = "limits that do not depend on V and B (those of other instances)"
    checks = [
        Check(
            f"β = {beta:g}: share of {len(ends)} instances that end on an axis where theory "
            "has no stable state",
            "C33",
            float(((ends >= 0) & (fc.at(ends) > slow)).mean()),
            0.0,
            0.02,
            "consensus_rates, bipartite_rates of the axis; < 5/T counts as stable",
            chance,
            rival,
        ),
        Check(
            f"β = {beta:g}: of those with a stable state, share that end on one",
            "C33",
            float((fc.at(ends)[can] < slow).mean()),
            0.7,
            0.0,
            "Conjecture 1; the rest moves slowly or spreads",
            0.7 - lucky,
            rival,
            ">",
        ),
    ]
    both = (fc.E_V != fc.E_A) & (fc.E == fc.E_A)
    both &= (fc.at(fc.E_V) < 0) & (fc.at(fc.E_A) < 0)
    if both.sum() >= 5:
        checks.append(
            Check(
                f"β = {beta:g}: of {both.sum()} where both are stable and E = E_|V|, share on "
                "E_|V|",
                "C33",
                float((ends == fc.E_A)[both].mean()),
                1.0,
                0.25,
                "Theorem 1: the mass goes to E first, and E is stable",
                1.0,
                "consensus on E_V whenever it is stable",
            )
        )
    return checks


def _representative_checks(
    ts: np.ndarray, squares: np.ndarray, ends: np.ndarray, fc: Forecast, rep: np.ndarray
) -> list[Check]:
    """Limits of the panels, for rows rep (β, instance, seed)."""
    checks = []
    for j, i in np.ndindex(2, 3):
        r, first = rep[j, i], fc.part(rep[j, i][:1])
        stays = first.E[0] == first.E_A[0] and first.at(first.E_A)[0] < 0
        target, name = (first.E_A, "E_|V|") if stays else (first.E_V, "E_V")
        if first.E_V[0] == first.E_A[0]:
            name = "E_V = E_|V|"
        checks.append(
            Check(
                f"panel ({LETTERS[j][i]}), β = {BETAS[j]:g}: share of seeds on {name}",
                "C33",
                float((ends[r] == target[0]).mean()),
                1.0,
                0.3,
                "E_|V| if its bipartite state is stable and is E, else E_V",
                1.0,
                "another limit",
            )
        )
    early, late = (np.median(first_ahead(ts, squares[r[1], :, 0] - 0.5)) for r in rep)
    checks.append(
        Check(
            "(e) as (b), but later: time at which half of ∫|x|²dµ is on E_V, (e)/(b)",
            "C33",
            float(late / early),
            1.2,
            0.0,
            "App. C.4: the same limit up to a delay in β",
            0.2,
            "a time that does not depend on β",
            ">",
        )
    )
    return checks


def _threshold_check(
    ts: np.ndarray, mean: np.ndarray, beta: float, factor: float
) -> Check:
    """Growth of ∫x₁dµ beside the bipartite state on E_|V|, at `factor` × the critical β."""
    fit = (ts >= 10) & (ts <= 60)
    pull = -min(SWITCHING[0]) * math.tanh(beta * abs(SWITCHING[1][1]))
    law = math.log1p(LONG_STEP * max(SWITCHING[0])) - math.log1p(LONG_STEP * pull)
    law /= LONG_STEP
    return Check(
        f"(a), (d): growth beside ½(δ_z + δ_−z) on E_|V| at {factor} critical β",
        "C24",
        slope(ts[fit], np.log(np.abs(mean[fit, 0]))),
        law,
        0.03 * abs(law),
        "ln[(1 + hλ_V)/(1 + h|λ_A|t)]/h, t = tanh(β|b|), of a shift of all tokens",
        abs(law),
        "a state whose stability does not change",
    )


def _moments(xs: Array) -> tuple[Array, Array]:
    """∫x dµ and ∫⟨e_k,x⟩² dµ along a run (t, n, d)."""
    return xs.mean(axis=1), (xs**2).mean(axis=1)


def _beside_bipartite(n: int) -> np.ndarray:
    """Half of the tokens near e₂, half near −e₂, all shifted by 10⁻³ along e₁."""
    x = np.zeros((n, 3))
    x[:, 1] = np.where(np.arange(n) % 2, 1.0, -1.0)
    x[:, 0] = 1e-3
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def _outcomes(ends: np.ndarray, f: Forecast) -> dict[str, int]:
    """Counts of «what is stable → limit»."""
    common, on_V, on_A = f.E_V == f.E_A, f.at(f.E_V) < 0, f.at(f.E_A) < 0
    stable = np.select(
        [
            common & on_V,
            on_V & on_A & ~common,
            on_V & ~common,
            on_A & ~common,
        ],
        ["E_V = E_|V|", "both", "E_V", "E_|V|"],
        "none",
    )
    limit = np.select(
        [ends < 0, (ends == f.E_V) & common, ends == f.E_V, ends == f.E_A],
        ["no axis", "it", "E_V", "E_|V|"],
        "another axis",
    )
    found: dict[str, int] = {}
    for s, l in zip(stable, limit):
        found[f"{s} → {l}"] = found.get(f"{s} → {l}", 0) + 1
    return found


def _fig10_panels(ts, squares, rep, fc: Forecast):
    rows = []
    for j in range(2):
        for i in range(3):
            r = rep[j, i]
            axes = ((fc.E, "with E", ON_E), (fc.E_V, r"with $E_V$", ON_V))
            axes += ((fc.E_A, r"with $E_{|V|}$", ON_A),)
            curves = []
            for axis, label, color in axes:
                values = squares[r, :, axis[r[0]]]
                curves += bands(ts, values, label, color)
            rows.append(
                Panel(
                    "time t",
                    "alignment",
                    dotted_last(curves),
                    ylim=(0, 1.03),
                    title=f"({LETTERS[j][i]}) β = {BETAS[j]:g}",
                )
            )
    return panels(rows, shared=True)


def _stability_plane(v, b, beta, ends, fc: Forecast, random):
    rows = []
    for temperature in BETAS:
        r = random & (beta == temperature) & (fc.E_V != fc.E_A)
        k = fc.E_A[r]
        own = np.take_along_axis(v[r], k[:, None], 1)[:, 0]
        push = -np.take_along_axis(b[r], k[:, None], 1)[:, 0]
        x, y = v[r].max(axis=1), np.abs(own) * np.tanh(temperature * push)
        e = ends[r]
        kinds = (
            (e == fc.E_V[r], r"limit $E_V$", ON_V),
            (e == k, r"limit $E_{|V|}$", ON_A),
            ((e != fc.E_V[r]) & (e != k), "no axis, or another", "#999999"),
        )
        line = np.array([min(-0.2, x.min(initial=0)), 0, 1])
        rows.append(
            Panel(
                "largest eigenvalue of V",
                r"$|\lambda|\,\tanh(-\beta\langle z,Bz\rangle)$ on $E_{|V|}$",
                [
                    *[
                        Curve(x[m], y[m], label, "points", color=color)
                        for m, label, color in kinds
                    ],
                    Curve(line, np.maximum(line, 0), r"$E_{|V|}$ stable above", "theory"),
                ],
                ylim=(-1.05, 1.05),
                title=f"β = {temperature:g}",
            )
        )
    return panels(rows)
