"""The papers' experiments, each a function of `Settings` that returns a `Report`.

`REGISTRY` maps the names that the command knows to what they are and where they come
from."""

import dataclasses
from collections.abc import Callable

from . import (
    concentration_energy,
    concentration_nonsymmetric,
    concentration_phases,
    concentration_pushforward,
    concentration_terminal,
    concentration_theorem,
    metastable_remainder,
    multiscale_alignment,
    multiscale_heat,
)
from .report import Check as Check, Report as Report
from .settings import BadArgument as BadArgument, Settings as Settings


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A name of the command."""

    name: str
    title: str
    source: str
    run: Callable[[Settings], Report]


REGISTRY: dict[str, Experiment] = {
    e.name: e
    for e in (
        Experiment(
            "multiscale/fig1a",
            "alignment on an axis: 10⁴ tokens collapse to two antipodal points",
            "arXiv:2509.25040, Figure 1, scenario 1a",
            multiscale_alignment.fig1a,
        ),
        Experiment(
            "multiscale/fig1b",
            "alignment on a rotating great circle, and how it is lost at finite β",
            "arXiv:2509.25040, Figure 1, scenario 1b",
            multiscale_alignment.fig1b,
        ),
        Experiment(
            "multiscale/fig2",
            "alignment, then backward diffusion into three clusters on the equator",
            "arXiv:2509.25040, Figure 2, scenario 2a",
            multiscale_heat.fig2,
        ),
        Experiment(
            "multiscale/fig3",
            "forward diffusion of 5·10⁴ tokens on the circle against the heat equation",
            "arXiv:2509.25040, Figure 3, scenario 2b",
            multiscale_heat.fig3,
        ),
        Experiment(
            "metastable/remainder",
            "what is left beside the dominant mode at T₁: |R|/n^(−1/4) falls, up to 10⁷ tokens",
            "arXiv:2410.23228, Theorem 4.2",
            metastable_remainder.remainder,
        ),
        Experiment(
            "concentration/fig1",
            "an initial law on S², and its push-forward on the circle of E",
            "arXiv:2605.10931, Figure 1",
            concentration_pushforward.fig1,
        ),
        Experiment(
            "concentration/fig2",
            "consensus on E_V and bipartite consensus on E_|V|: how tokens end",
            "arXiv:2605.10931, Figure 2",
            concentration_terminal.fig2,
        ),
        Experiment(
            "concentration/fig3",
            "two phases at β = 10: tokens on E first, on E_V later",
            "arXiv:2605.10931, Figure 3",
            concentration_phases.fig3,
        ),
        Experiment(
            "concentration/fig4",
            "W₂ to the push-forward falls and rises again; later for larger β, never at β = ∞",
            "arXiv:2605.10931, Figure 4",
            concentration_phases.fig4,
        ),
        Experiment(
            "concentration/fig5",
            "non-symmetric pairs: rotation without alignment, and two phases all the same",
            "arXiv:2605.10931, Figure 5",
            concentration_nonsymmetric.fig5,
        ),
        Experiment(
            "concentration/fig6",
            "gradient flow, maximised, V = B > 0: one cluster or two, by β",
            "arXiv:2605.10931, Figure 6",
            concentration_energy.fig6,
        ),
        Experiment(
            "concentration/fig7",
            "gradient flow, maximised, V = B < 0: two poles, the optimum at every β",
            "arXiv:2605.10931, Figure 7",
            concentration_energy.fig7,
        ),
        Experiment(
            "concentration/fig8",
            "gradient flow, minimised, V = −B, B > 0: alignment at large β only",
            "arXiv:2605.10931, Figure 8",
            concentration_energy.fig8,
        ),
        Experiment(
            "concentration/fig9",
            "gradient flow, minimised, V = −B, B < 0: one phase, two phases, or none after E",
            "arXiv:2605.10931, Figure 9",
            concentration_energy.fig9,
        ),
        Experiment(
            "concentration/fig10",
            "Conjecture 1 on many random diagonal pairs: which space of V wins, and when β decides",
            "arXiv:2605.10931, Figure 10",
            concentration_terminal.fig10,
        ),
        Experiment(
            "concentration/theorem1",
            "W₂(µ_t, π_E#µ₀) of the mean field for β = 10 … 1000 against its law",
            "arXiv:2605.10931, Theorem 1",
            concentration_theorem.theorem1,
        ),
    )
}
