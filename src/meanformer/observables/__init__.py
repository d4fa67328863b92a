"""Numbers read off tokens.

Each is a function of a measure (lower case), to be evaluated on snapshots, and an equinox
module of the same name in CamelCase, to be handed to `solve` and `unroll`:

    solve(field, x0, ts, observables={"E": observables.Energy(Q, K, beta)})

evaluates it while integrating and stores nothing else. A module checks its parameters once;
their arrays are leaves: differentiable, and new values compile nothing anew."""

from .alignment import (
    Alignment as Alignment,
    FoldOrder as FoldOrder,
    Lyapunov as Lyapunov,
    NematicOrder as NematicOrder,
    PolarOrder as PolarOrder,
    alignment as alignment,
    check_basis as check_basis,
    fold_order as fold_order,
    lyapunov as lyapunov,
    nematic_order as nematic_order,
    polar_order as polar_order,
    second_moment as second_moment,
)
from .clusters import (
    Clusters as Clusters,
    ClusterSet as ClusterSet,
    clusters as clusters,
)
from .distances import (
    TotalVariation as TotalVariation,
    Wasserstein as Wasserstein,
    angle_histogram as angle_histogram,
    equal_area_histogram as equal_area_histogram,
    total_variation as total_variation,
    total_variation_noise as total_variation_noise,
)
from .energies import (
    Energy as Energy,
    Interaction as Interaction,
    KernelEnergy as KernelEnergy,
    NormalisedEnergy as NormalisedEnergy,
    energy as energy,
    interaction as interaction,
    kernel_energy as kernel_energy,
    log_energy as log_energy,
    normalised_energy as normalised_energy,
)
from .geometry import (
    Cumulants as Cumulants,
    EffectiveRank as EffectiveRank,
    GramStatistics as GramStatistics,
    ParticipationRatio as ParticipationRatio,
    Rank as Rank,
    effective_rank as effective_rank,
    gram_statistics as gram_statistics,
    participation_ratio as participation_ratio,
    rank as rank,
)
from .spectra import (
    DistanceToModes as DistanceToModes,
    FourierSpectrum as FourierSpectrum,
    HarmonicSpectrum as HarmonicSpectrum,
    PowerSpectrum as PowerSpectrum,
    SobolevNorm as SobolevNorm,
    distance_to_modes as distance_to_modes,
    fourier_spectrum as fourier_spectrum,
    harmonic_spectrum as harmonic_spectrum,
    power_spectrum as power_spectrum,
    sobolev_norm as sobolev_norm,
)
