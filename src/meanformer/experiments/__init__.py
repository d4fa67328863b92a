"""The papers' experiments, each a function of `Settings` that returns a `Report`.

`REGISTRY` maps the names that the command knows to what they are and where they come
from."""

import dataclasses
from collections.abc import Callable

from . import multiscale_alignment, multiscale_heat
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
    )
}
