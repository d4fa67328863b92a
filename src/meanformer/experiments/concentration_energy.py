"""Figures 6–9 of *Quantifying concentration phenomena of mean-field transformers in the
low-temperature regime* (arXiv:2605.10931), App. C.3: the gradient-flow cases V = ±B.

Q = I, K = B = diag(b) on R³, tokens from the uniform law. With V = B attention increases the
energy E(µ) = (1/2β)∬e^{β⟨x,By⟩}dµdµ, with V = −B it decreases it. M = VBᵀ = ±B² has the
dominant direction E; E_V and E_|V| belong to the largest eigenvalue of V and to that of
largest modulus. The paper's matrices, β and number of tokens are lost: those here are chosen
so that every claim is seen.

For laws that are even (µ(A) = µ(−A)) the pairs (B, V) and (−B, −V) have the same field, so
that the four figures are two, which part by the odd part of µ: it grows in Figures 6 (small
β) and 9, and decays in 7 and 8. The uniform law is even; samples of it are so up to n^{−½}.
Runs from even samples (each token with its antipode) are therefore the control.
"""

import math

import numpy as np

from .. import theory
from .energy_cases import (
    EYE,
    SAVES,
    TURN,
    GradientCase,
    GradientFigure,
    along,
    least_energy,
    mode_variances,
    off,
    pole_energy,
)
from .report import Check, Report
from .settings import Settings

FIG6 = GradientCase(
    (1.0, 0.5, 0.25), 1, (0.25, 1.0, 4.0), 30.0, ((1.0, 0.5, 0.25), 0.25, 1)
)
FIG7 = GradientCase(
    (-1.0, -0.5, -0.25), 1, (0.5, 2.0, 8.0), 30.0, ((-1.0, -0.5, -0.25), 1.0, None)
)
FIG8 = GradientCase(
    (1.0, 0.8, 0.5), -1, (0.5, 4.0, 32.0), 42.0, ((1.0, 0.8, 0.1), 32.0, None)
)
FIG9 = GradientCase(
    (-1.0, -0.7, -0.15), -1, (0.25, 4.0, 16.0), 24.0, ((-1.0, -0.7, -0.15), 16.0, 0)
)


def fig6(settings: Settings) -> Report:
    """V = B > 0, the energy increases; its maximum is a Dirac at ±e₁, E = E_V = E_|V|.

    At small β the two clusters at ±e₁ attract each other around the sphere and end as one;
    for tanh(βλ₁) > λ₂/λ₁ they are stable, with half of the energy, near π_E#µ₀."""
    f = GradientFigure(FIG6, settings)
    small, _, large = FIG6.betas
    masses = np.stack([f.upper(g) for g in range(3)])
    single = np.abs(masses - 0.5) == 0.5
    crossed = [
        np.where(up > 0.5, x0 < 0, x0 > 0).mean()
        for up, x0 in zip(masses[0], f.xs[0, :, 0, :, f.E])
    ]
    expected_w2 = TURN * math.sqrt(np.median(crossed))
    rates = [theory.bipartite_rates(EYE[0], EYE, FIG6.B, FIG6.V, b) for b in FIG6.betas]
    apart = float(rates[0].apart.real.max())
    together = float(rates[2].together.real.max())
    merged = float(theory.consensus_rates(EYE[0], FIG6.V).growth)
    bipolar = float(pole_energy(np.array([0.5]), 1.0, large)[0]) / math.exp(large)
    checks = [
        Check(
            f"β = {small:g}: energy over that of the best state (median)",
            "C25, C32",
            f.median(f.ratio[0]),
            1.0,
            0.02,
            "`theory.energy_optimum`: one Dirac at ±e₁",
            0.5 * (1 - math.exp(-2 * small)),
            "two equal clusters",
        ),
        Check(
            f"β = {small:g}: share of samples that end as one Dirac",
            "C26, C32",
            float(single[0].mean()),
            1.0,
            0.25,
            f"two clusters are unstable: rate {apart:.2f} > 0 (`theory.bipartite_rates`)",
            1.0,
            "two clusters in every sample",
        ),
        Check(
            f"β = {small:g}: W₂ to π_E#µ₀ stays large (median)",
            "C32",
            f.median(f.w2[0]),
            expected_w2,
            0.3,
            "π√(share of tokens that start on the other side)",
            expected_w2,
            "convergence to π_E#µ₀",
        ),
        Check(
            f"β = {small:g}: rate towards the Dirac (median)",
            "C24",
            f.merging(0, 1),
            merged,
            0.05,
            "`theory.consensus_rates`: λ₂ − λ₁",
            0.5,
            "the rate −λ₁ within a cluster",
        ),
        Check(
            f"β = {small:g}: growth of an odd push on even clusters (median)",
            "C24",
            f.growth(1, 0.8 * FIG6.end),
            apart,
            0.1 * apart,
            "`theory.bipartite_rates`: λ₂ − λ₁tanh(βλ₁)",
            apart,
            "stable clusters",
        ),
        Check(
            f"β = {large:g}: energy over that of the best state (mean of samples)",
            "C25, C32",
            float(f.ratio[2, :, -1].mean()),
            bipolar,
            0.05,
            "two equal clusters: cosh(βλ₁)/e^{βλ₁}",
            0.5,
            "one Dirac",
        ),
        Check(
            f"β = {large:g}: energy / that of the observed masses at ±e₁ (worst sample)",
            "C25",
            float(np.abs(f.ratio[2, :, -1] / f.predicted_ratio(2) - 1).max()),
            0.0,
            1e-3,
            "(p² + q²)e^{βλ₁} + 2pq e^{−βλ₁}, in NumPy",
            0.5,
            "clusters of another size or width",
        ),
        Check(
            f"β = {large:g}: share of samples that end as one Dirac",
            "C26, C32",
            float(single[2].mean()),
            0.0,
            0.25,
            f"two clusters are stable: rate {float(rates[2].growth):.2f} < 0",
            1.0,
            "one Dirac in every sample",
        ),
        Check(
            f"β = {large:g}: W₂ to π_E#µ₀ from even starts (median)",
            "C32",
            f.median(f.w2[5]),
            0.0,
            0.02,
            "evenness keeps the sides; C32: near π_E#µ₀",
            expected_w2,
            "one Dirac",
        ),
        Check(
            f"β = {large:g} comes nearer than β = {small:g}: quotient of W₂ (medians)",
            "C32",
            f.median(f.w2[2]) / f.median(f.w2[0]),
            0.5,
            0.0,
            "at most half: tokens near the equator change sides, no others",
            0.5,
            "as far as the Dirac",
            "<",
        ),
        Check(
            f"β = {large:g}: rate at which the axis of the clusters turns to e₁ (median)",
            "C24",
            f.turning(5, 1),
            together,
            0.05,
            "`theory.bipartite_rates`: (λ₂ − λ₁)tanh(βλ₁)",
            together + 0.75,
            "the zero-temperature rate, the gap .75 of M",
        ),
    ]
    some = single[1].mean()
    notes = [
        f"At β = {FIG6.betas[1]:g} two equal clusters are stable (rate "
        f"{float(rates[1].growth):.2f}), unequal ones merge: {some:.0%} of the samples end "
        "as one Dirac, the others with unequal masses.",
        f"W₂ at β = {large:g} is that of tokens near the equator that changed sides, "
        f"{f.median(f.w2[2]):.2f} for n = {f.n}; even starts have none.",
    ]
    levels = (1, math.nan, bipolar, bipolar)
    return f.report(
        checks, notes, ratio=[("stable state", "theory", levels)], alignment=()
    )


def fig7(settings: Settings) -> Report:
    """V = B < 0, the energy increases; its maximum is ½(δ_z + δ_{−z}), z = e₁ of the smallest
    eigenvalue, which spans E = E_|V| (E_V is e₃). Reached at every β.

    Even laws move as in Figure 6; odd parts decay, so that nothing merges."""
    f = GradientFigure(FIG7, settings)
    rates = [theory.bipartite_rates(EYE[0], EYE, FIG7.B, FIG7.V, b) for b in FIG7.betas]
    sides = 1 / math.sqrt(2 * math.pi * f.n)  # E|p − ½| of a sample
    checks = []
    for i, beta in enumerate(FIG7.betas):
        ratio = float(f.ratio[i, :, -1].mean())
        start = float(np.median(f.ratio[i, :, 0]))
        uneven = 3 / f.n
        checks += [
            Check(
                f"β = {beta:g}: W₂ to π_E#µ₀ from even starts (median)",
                "C32",
                f.median(f.w2[3 + i]),
                0.0,
                0.02,
                "C32: π_E#µ₀ is the limit, as of the uniform law",
                TURN / math.sqrt(2),
                "one Dirac (as in Figure 6)",
            ),
            Check(
                f"β = {beta:g}: W₂² to π_E#µ₀ from samples (mean)",
                "C32",
                float((f.w2[i, :, -1] ** 2).mean()),
                1.5 * TURN**2 * sides,
                0.0,
                "1.5 π²E|p − ½|: the clusters even out the sample, p → ½",
                TURN**2 / 2 - 1.5 * TURN**2 * sides,
                "one Dirac (as in Figure 6)",
                "<",
            ),
            Check(
                f"β = {beta:g}: energy over that of the best state (mean of samples)",
                "C25, C32",
                ratio,
                1 - uneven,
                0.0,
                "1 at ½(δ_z + δ_{−z}), 4E(p − ½)² = 1/n less for a sample's masses, times 3",
                1 - uneven - max(start, 1 / (1 + math.exp(2 * beta))),
                "the energy at t = 0",
                ">",
            ),
            Check(
                f"β = {beta:g}: energy / that of the observed masses at ±e₁ (worst sample)",
                "C25",
                float(np.abs(f.ratio[i, :, -1] / f.predicted_ratio(i) - 1).max()),
                0.0,
                1e-3,
                "(p² + q²)e^{−β} + 2pq e^β over cosh β, in NumPy",
                1 - start,
                "the energy at t = 0",
            ),
        ]
    for beta, group in ((FIG7.betas[0], 3), (FIG7.extra[1], 6), (FIG7.betas[1], 4)):
        there = theory.bipartite_rates(EYE[0], EYE, FIG7.B, FIG7.V, beta)
        turning = float(there.together.real.max())
        checks.append(
            Check(
                f"β = {beta:g}: rate at which the axis of the clusters turns to e₁ (median)",
                "C24",
                f.turning(group, 1),
                turning,
                0.05,
                "`theory.bipartite_rates`: (λ₂ − λ₁)tanh(βλ₁)",
                turning + 0.75,
                "the zero-temperature rate, the gap .75 of M",
            )
        )
    notes = [
        "All rates at ½(δ_z + δ_{−z}) are negative: "
        + ", ".join(
            f"{float(r.growth):.2f} (β = {b:g})" for r, b in zip(rates, FIG7.betas)
        ),
        f"W₂ of samples does not vanish: about π√|p − p₀| ~ n^(−1/4), as masses p even out "
        f"(n = {f.n}). Even starts show the mean-field limit.",
    ]
    return f.report(checks, notes, ratio=[("best state", "theory", (1, 1, 1, 1))])


def fig8(settings: Settings) -> Report:
    """V = −B, B > 0, the energy decreases; E = E_V = e₃ of the smallest eigenvalue,
    E_|V| = e₁. The optimal state is not known in closed form (for the paper: unknown).

    It is one law: E is strictly convex for B > 0, and a quadratic programme finds it
    (`least_energy`). For β → 0 its second moments are ∝ B^{−2}; for β → ∞ it has a mode at
    each of ±e₃, normal with variances λ₃/(β(λ_k² − λ₃²))."""
    f = GradientFigure(FIG8, settings)
    small, middle, large = FIG8.betas
    b = f.b
    flat = b**-2 / (b**-2).sum()
    optimum = [least_energy(FIG8.b, beta) for beta in FIG8.betas]
    width = float(mode_variances(b, large).sum())
    sharp_b, sharp_beta, _ = FIG8.extra
    sharp = float(mode_variances(np.asarray(sharp_b), sharp_beta).sum())
    rest = off(f.xs, 2)
    checks = [
        Check(
            f"β = {small:g}: ∫x₃²dµ at the end (median)",
            "C32",
            1 - f.median(rest[0]),
            float(flat[2]),
            0.03,
            "β → 0: E − 1/2β ∝ tr (B·∫xxᵀdµ)² is least for ∫xxᵀdµ ∝ B^{−2}",
            1 - float(flat[2]),
            "full alignment",
        ),
        *[
            Check(
                f"β = {beta:g}: energy over the least possible (median)",
                "C25",
                1 / f.median(f.ratio[i]),
                1.0,
                0.02 if beta == large else 1e-3,
                "convex quadratic programme on a grid (SciPy), which knows no flow",
                1 / float(np.median(f.ratio[i, :, 0])) - 1,
                "the energy at t = 0",
            )
            for i, beta in enumerate(FIG8.betas)
        ],
        *[
            Check(
                f"β = {beta:g}: ∫x₃²dµ at the end against the best law (median)",
                "C26",
                1 - f.median(rest[i]),
                float(optimum[i][1][2]),
                0.015 if beta == small else 3e-3,
                "the same quadratic programme",
                1 - float(optimum[i][1][2]),
                "two Diracs at ±e₃",
            )
            for i, beta in enumerate(FIG8.betas)
        ],
        Check(
            f"β = {middle:g}: energy over that of ½(δ_z + δ_{{−z}}), z = e₃ (worst sample)",
            "C26",
            float(
                np.exp(f.log_energy[1, :, -1]).max()
                * (2 * middle / math.cosh(middle * b[2]))
            ),
            0.9,
            0.0,
            "below 1: the two modes are not Diracs",
            0.1,
            "two Diracs",
            "<",
        ),
        Check(
            f"β = {large:g}: 1 − ∫x₃²dµ at the end (median)",
            "C32",
            f.median(rest[2]),
            width,
            0.1 * width,
            "normal modes: Σ_k λ₃/(β(λ_k² − λ₃²))",
            width,
            "two Diracs at ±e₃",
        ),
        Check(
            f"λ₃ = {sharp_b[2]:g}, β = {large:g}: 1 − ∫x₃²dµ at the end (median)",
            "C26",
            f.median(rest[6]),
            sharp,
            0.1 * sharp,
            "the same law: modes sharpen as λ₃ → 0",
            width - sharp,
            f"the modes of λ₃ = {b[2]:g}",
        ),
        Check(
            f"β = {large:g}: W₂ to π_E#µ₀ from even starts (median)",
            "C32",
            f.median(f.w2[5]),
            math.sqrt(width),
            0.1 * math.sqrt(width),
            "√(Σ_k λ₃/(β(λ_k² − λ₃²))), to O(1/β)",
            f.median(f.w2[4]) - math.sqrt(width),
            f"the distance at β = {middle:g}",
        ),
        Check(
            f"β = {small:g}: W₂ to π_E#µ₀ does not fall (median)",
            "C32",
            f.median(f.w2[0]),
            math.sqrt(1 - flat[2]),
            0.0,
            "angle ≥ sine: W₂² ≥ 1 − ∫x₃²dµ, from B^{−2}",
            math.sqrt(1 - flat[2]),
            "convergence to π_E#µ₀",
            ">",
        ),
    ]
    notes = [
        "The ratio is min E/E, with the minimum from a quadratic programme: the paper plots "
        "none here, as no formula is known.",
        f"At β = {large:g} samples keep unequal masses at ±e₃ (the modes exchange tokens "
        "slowly), which costs up to "
        f"{1 - float(f.ratio[2, :, -1].min()):.1%} of energy.",
    ]
    modes = 1 - width
    return f.report(
        checks,
        notes,
        ratio=[("best law", "theory", (1, 1, 1, 1))],
        alignment=[
            (
                r"best law, $E$",
                "theory",
                [*(o[1][2] for o in optimum), 1],
            ),
            (r"normal modes, $E$", "theory2", [math.nan, math.nan, modes, 1]),
        ],
    )


def fig9(settings: Settings) -> Report:
    """V = −B, B < 0, the energy decreases; its minimum is a Dirac at z_min = e₁, which spans
    E_V = E_|V|, while E = e₃ is that of the eigenvalue nearest to 0.

    Even laws move as in Figure 8, to two modes at ±e₃. Odd parts grow there at the rate
    (λ₁² − λ₃²)/λ₁ (normal modes), and tokens leave for e₁: two phases. At small β the odd
    part wins at once, at β = ∞ never."""
    f = GradientFigure(FIG9, settings)
    small, _, large = FIG9.betas
    s = -f.b
    plateau = 1 - float(mode_variances(s, large).sum())
    growth = float((s[0] ** 2 - s[2] ** 2) / s[0])
    delta = theory.bipartite_rates(EYE[2], EYE, FIG9.B, FIG9.V, large)
    delta_growth = float(np.max(np.asarray(delta.apart.real)))
    merged = float(theory.consensus_rates(EYE[0], FIG9.V).growth)
    stop = SAVES // 2 + 1 if f.single else None
    in_E, in_V = along(f.xs, 2), along(f.xs, 0)
    peak = [float(np.median(in_E[g], axis=0).max()) for g in range(3)]
    crossing = np.median(
        [
            [_first(f.ts, v > e) for v, e in zip(in_V[g], in_E[g], strict=True)]
            for g in range(3)
        ],
        axis=1,
    )
    better = [_first(f.ts, np.median(f.ratio[g], axis=0) > 0.5) for g in range(3)]
    checks = [
        *[
            Check(
                f"β = {beta:g}: alignment with E_V at the end (median)",
                "C32",
                f.median(in_V[i]),
                1.0,
                0.02,
                "C26: the best state is δ at z_min; Conjecture 1",
                1.0,
                "alignment with E",
            )
            for i, beta in enumerate(FIG9.betas)
        ],
        *[
            Check(
                f"β = {beta:g}: energy of the best state over that at the end (median)",
                "C25, C32",
                f.median(f.ratio[i]),
                1.0,
                0.05,
                "`theory.energy_optimum`: δ at z_min",
                1 - math.exp(-beta * s[0]) / math.cosh(beta * s[2]),
                "two clusters on E",
            )
            for i, beta in enumerate(FIG9.betas)
        ],
        Check(
            f"β = {small:g} goes to E_V directly: peak of the alignment with E (median)",
            "C32",
            peak[0],
            1 / 3,
            0.1,
            "the uniform law has 1/3",
            plateau - 1 / 3,
            f"a first phase on E, as at β = {large:g}",
        ),
        Check(
            f"β = {large:g} goes to E first: peak of the alignment with E (median)",
            "C32",
            peak[2],
            plateau,
            0.2,
            "normal modes at ±e₃: 1 − Σ_k λ₃/(β(λ_k² − λ₃²)), were there time",
            plateau - 1 / 3,
            "no first phase",
        ),
        Check(
            f"β = {large:g}: the first phase without an odd part, 1 − ∫x₃²dµ (median)",
            "C32",
            f.median(off(f.xs[5, :, :stop], 2)),
            1 - plateau,
            0.1 * (1 - plateau),
            "even starts stay at the normal modes (float32: until rounding has grown)",
            1 - plateau,
            "two Diracs on E",
        ),
        Check(
            f"β = {large:g}: growth of an odd push on the modes (median)",
            "C24",
            f.growth(0, 8.0),
            growth,
            0.06,
            "normal modes: (λ₁² − λ₃²)/λ₁",
            delta_growth - growth,
            "two Diracs (`theory.bipartite_rates`)",
        ),
        Check(
            f"E_V overtakes E later: time at β = {large:g} over that at β = {small:g} (medians)",
            "C32",
            float(crossing[2] / crossing[0]),
            1.5,
            0.0,
            "two phases against one",
            0.5,
            "a time that does not depend on β",
            ">",
        ),
        Check(
            f"β = {large:g}: energy falls to twice the least after E_V has overtaken E (time)",
            "C32",
            float(better[2]),
            float(np.median(crossing[2])),
            0.0,
            "the second phase is where the energy is minimal",
            float(crossing[2]),
            "a minimum that is reached on E",
            ">",
        ),
        Check(
            f"β = {small:g}: rate towards the Dirac (median)",
            "C24",
            f.merging(0, 1),
            merged,
            0.05,
            "`theory.consensus_rates`: λ₂ − λ₁ of V",
            0.7,
            "the rate −λ₁ within a cluster",
        ),
        Check(
            f"β = ∞: best energy over that at any time, at β = {large:g} (largest)",
            "C32",
            float(f.cold_ratio.max()),
            0.0,
            0.01,
            "C32: flat, as tokens stay on E",
            f.median(f.ratio[2]),
            "a second phase",
        ),
    ]
    notes = [
        "Time at which E_V overtakes E (median over samples): "
        + ", ".join(f"{t:.1f} (β = {b:g})" for t, b in zip(crossing, FIG9.betas)),
        "It grows like log(n)/2 too: the odd part of a sample starts at n^(−1/2).",
    ]
    return f.report(
        checks,
        notes,
        ratio=[("best state", "theory", (1, 1, 1, math.nan))],
        alignment=[
            (r"normal modes, $E$", "theory", (math.nan, math.nan, plateau, 1)),
        ],
    )


def _first(ts: np.ndarray, seen: np.ndarray) -> float:
    """The first time after the start at which `seen`, ∞ if never."""
    hits = np.flatnonzero(seen & (ts > 1))
    return float(ts[hits[0]]) if hits.size else math.inf
