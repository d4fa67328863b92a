"""The benchmark suite: cases, contenders, the harness, the records and what is made of them.

`meanformer bench` runs it; scripts of `benchmarks/` use the harness (`in_turn`, `compiled`,
`record`) for questions of their own."""

from .cases import CASES as CASES, Case as Case, Target as Target, chosen as chosen
from .measure import compiled as compiled, in_turn as in_turn, record as record
from .picture import plot as plot, write as write
from .report import read as read
from .suite import Options as Options, run_suite as run_suite
