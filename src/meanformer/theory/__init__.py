"""Predictions of the papers as functions of (Q, K, V, β, µ₀, n, d). Nothing here calls a
vector field or a solver, so that comparing a simulation with it is a test.

Conventions: B = QᵀK, u = Bᵀx, M = VBᵀ = VKᵀQ; E is the dominant space of M. Time is that of
the flow. One module per subject; all names are reached as `theory.name`, and `predict`
makes one report of them."""

from .alignment import (
    AlignmentRates as AlignmentRates,
    DominantSpace as DominantSpace,
    alignment_quantiles as alignment_quantiles,
    alignment_rates as alignment_rates,
    alignment_time as alignment_time,
    axis_fraction as axis_fraction,
    cluster_contraction_rate as cluster_contraction_rate,
    dominant_eigenspace as dominant_eigenspace,
    project_to_dominant as project_to_dominant,
)
from .assumptions import (
    AbstractFinding as AbstractFinding,
    ConcentrationMoment as ConcentrationMoment,
    GradientFlow as GradientFlow,
    RegularDensity as RegularDensity,
    ScalarOnDominant as ScalarOnDominant,
    SymmetricDominance as SymmetricDominance,
    Verdict as Verdict,
    concentration_moment as concentration_moment,
    gradient_flow as gradient_flow,
    invertible_matrices as invertible_matrices,
    invertible_product as invertible_product,
    regular_density as regular_density,
    scalar_on_dominant as scalar_on_dominant,
    separated_clusters as separated_clusters,
    supported_on_dominant as supported_on_dominant,
    symmetric_dominance as symmetric_dominance,
)
from .bounds import (
    DobrushinConstants as DobrushinConstants,
    FieldBounds as FieldBounds,
    cap_mass as cap_mass,
    density_range as density_range,
    dobrushin_constants as dobrushin_constants,
    field_bounds as field_bounds,
    laplace_principle_bound as laplace_principle_bound,
    log_dobrushin_bound as log_dobrushin_bound,
    zero_temperature_lipschitz as zero_temperature_lipschitz,
)
from .concentration import (
    BestTime as BestTime,
    ConcentrationBound as ConcentrationBound,
    DensityBounds as DensityBounds,
    FieldError as FieldError,
    Window as Window,
    barycentre_error_bound as barycentre_error_bound,
    concentration_bound as concentration_bound,
    density_bounds as density_bounds,
    field_error as field_error,
    limit_density_rate as limit_density_rate,
    stability_bound as stability_bound,
    w2_bound as w2_bound,
)
from .designs import (
    DesignStrength as DesignStrength,
    Leakage as Leakage,
    design_strength as design_strength,
    leakage as leakage,
    triple_product as triple_product,
)
from .diffusion_limits import (
    barenblatt_density as barenblatt_density,
    heat_residual as heat_residual,
    log_usa_speed as log_usa_speed,
    porous_medium_velocity as porous_medium_velocity,
    rescaled_field as rescaled_field,
    rescaled_field_correction as rescaled_field_correction,
    rescaled_field_limit as rescaled_field_limit,
)
from .equiangular import (
    equiangular_rate as equiangular_rate,
    equiangular_time as equiangular_time,
)
from .grenier import (
    GrenierExpansion as GrenierExpansion,
    grenier_expansion as grenier_expansion,
)
from .heat import (
    CollapsedMixture as CollapsedMixture,
    HeatMixture as HeatMixture,
    blow_up_time as blow_up_time,
    closure_variance as closure_variance,
    continue_past_collapse as continue_past_collapse,
    heat_multiplier as heat_multiplier,
    heat_time as heat_time,
    heat_variance as heat_variance,
    log_smoothing_multipliers as log_smoothing_multipliers,
    wrapped_mixture_density as wrapped_mixture_density,
    wrapped_mixture_mass as wrapped_mixture_mass,
)
from .heat_end import (
    BackwardTime as BackwardTime,
    HeatPhaseEnd as HeatPhaseEnd,
    heat_phase_end as heat_phase_end,
    largest_backward_time as largest_backward_time,
    noise_time as noise_time,
    sampling_noise as sampling_noise,
)
from .lyapunov import (
    alignment_constant as alignment_constant,
    lyapunov_decay as lyapunov_decay,
    lyapunov_moment as lyapunov_moment,
    wasserstein_from_lyapunov as wasserstein_from_lyapunov,
)
from .merging import (
    ClosestPair as ClosestPair,
    MergeSequence as MergeSequence,
    PairingWindow as PairingWindow,
    closest_pair as closest_pair,
    merge_sequence as merge_sequence,
    pairing_limit as pairing_limit,
    pairing_window as pairing_window,
)
from .metastability import (
    MostUnstable as MostUnstable,
    antipodal_growth as antipodal_growth,
    dobrushin_rate as dobrushin_rate,
    growth_rate_curve as growth_rate_curve,
    growth_rates as growth_rates,
    kernel_growth_rates as kernel_growth_rates,
    mode_jumps as mode_jumps,
    most_unstable as most_unstable,
)
from .pairing import (
    merge_point as merge_point,
    merge_time as merge_time,
    pair_angle as pair_angle,
    pair_speed as pair_speed,
    pairing_limit_angle as pairing_limit_angle,
    pairing_limit_time as pairing_limit_time,
)
from .perturbations import (
    ExitTimes as ExitTimes,
    cluster_positions as cluster_positions,
    exit_times as exit_times,
    fourier_coefficients as fourier_coefficients,
    linear_flow as linear_flow,
    sobolev_norm as sobolev_norm,
)
from .prediction import (
    AlignmentPhase as AlignmentPhase,
    HeatPhase as HeatPhase,
    PairingPhase as PairingPhase,
    Prediction as Prediction,
    predict as predict,
)
from .ring import (
    RingMode as RingMode,
    height_amplification as height_amplification,
    height_growth_rate as height_growth_rate,
    height_variance as height_variance,
    most_unstable_ring_mode as most_unstable_ring_mode,
    plane_instability_time as plane_instability_time,
    ring_growth_rate as ring_growth_rate,
)
from .stationary import (
    ClusterRates as ClusterRates,
    EnergyOptimum as EnergyOptimum,
    JacobianSpectrum as JacobianSpectrum,
    StationarityResidual as StationarityResidual,
    bipartite_consensus as bipartite_consensus,
    bipartite_rates as bipartite_rates,
    consensus as consensus,
    consensus_rates as consensus_rates,
    eigenvector_mixture as eigenvector_mixture,
    energy_optimum as energy_optimum,
    equilibrium_residual as equilibrium_residual,
    jacobian_spectrum as jacobian_spectrum,
    oja_flow as oja_flow,
    stationarity_residual as stationarity_residual,
    value_eigenspace as value_eigenspace,
)
from .tilted import (
    Cumulants as Cumulants,
    VonMisesFisherCoefficients as VonMisesFisherCoefficients,
    cumulants as cumulants,
    field_terms as field_terms,
    log_laplace_asymptotic as log_laplace_asymptotic,
    log_laplace_integral as log_laplace_integral,
    log_normaliser as log_normaliser,
    tilted_measure as tilted_measure,
    vmf_coefficients as vmf_coefficients,
    vmf_cumulants as vmf_cumulants,
)
from .zero_temperature import (
    Pushforward as Pushforward,
    zero_temperature_flow as zero_temperature_flow,
    zero_temperature_pushforward as zero_temperature_pushforward,
)
