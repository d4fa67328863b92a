"""Wasserstein distances W_p(µ, ν) = (min over couplings of ∫ c(x, y)^p dπ)^{1/p} on S^{d−1},
for c the geodesic distance (an angle) or the chordal one, |x − y| ≤ angle ≤ (π/2) |x − y|.

method    computes                           error                  time; memory       auto
--------  ---------------------------------  ---------------------  -----------------  ---------
circle    W_p on S¹, geodesic, any p ≥ 1;    rounding               n log n; n         d = 2 and
          p = 1, 2: against `Uniform(2)`,                                              geodesic
          and up to rotations
exact     W_p by an optimal plan, made on    rounding; for weights  about n³; n m      n m ≤
          the host: assignment, or for       the dual gap, a bound                     2000²
          weights network simplex (POT),
          or linear programme (small n m)
sinkhorn  S_ε^{1/p}, S_ε the Sinkhorn        a bound, from          n m per iteration; above
          divergence of the cost c^p         lower ≤ W_p ≤ upper    n · block
sliced    the mean over random lines         one standard error     n log n per image; never
          (chordal) or great circles                                n
          (geodesic): another distance

`Distance.method` says which was used; for exact it is "assignment", "network simplex" or
"linear programme". Entropy blurs at the scale ε^{1/p}: below it a Sinkhorn value says
little, which its `error` shows. `lower` is often nearer to W_p than the value. The chordal
sliced distance is at most W_p, but for the noise of its mean.
"""

from .distance import Distance as Distance, wasserstein as wasserstein
