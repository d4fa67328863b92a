"""Predictions of the papers as functions of (Q, K, V, β, µ₀, n, d). Nothing here calls a
vector field or a solver, so that comparing a simulation with it is a test.

Conventions: B = QᵀK, u = Bᵀx, M = VBᵀ = VKᵀQ; E is the dominant space of M. Time is that of
the flow. One module per phase; all names are reached as `theory.name`."""

from .alignment import (
    DominantSpace as DominantSpace,
    axis_fraction as axis_fraction,
    cluster_contraction_rate as cluster_contraction_rate,
    dominant_eigenspace as dominant_eigenspace,
    project_to_dominant as project_to_dominant,
    zero_temperature_flow as zero_temperature_flow,
)
from .heat import (
    blow_up_time as blow_up_time,
    closure_variance as closure_variance,
    heat_variance as heat_variance,
    wrapped_mixture_density as wrapped_mixture_density,
    wrapped_mixture_mass as wrapped_mixture_mass,
)
from .ring import (
    height_amplification as height_amplification,
    height_growth_rate as height_growth_rate,
    height_variance as height_variance,
    ring_growth_rate as ring_growth_rate,
)
