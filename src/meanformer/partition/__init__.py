"""The one primitive: the log-partition of a measure and its gradient, the barycentre.

    L_µ(u) = log ∫ e^{⟨u,y⟩} dµ(y),      ∇L_µ(u) = ∫ y e^{⟨u,y⟩} dµ / ∫ e^{⟨u,y⟩} dµ.

Every vector field of the library is made of these two. A partition is a way to compute
them: `Dense` and `Blockwise` over all pairs, exact to rounding; `Harmonic` in nearly linear
time to a tolerance, on S¹ and S²; `Auto` chooses."""

from .auto import Auto as Auto
from .harmonic import Harmonic as Harmonic
from .sums import (
    AbstractPartition as AbstractPartition,
    Blockwise as Blockwise,
    Dense as Dense,
    in_blocks as in_blocks,
)
