"""Lie–Trotter splitting in continuous time."""

import diffrax as dfx

from .. import sphere
from ..blocks import parts


class LieTrotter(dfx.AbstractSolver):
    """One step of `solver` with the first part of a `Block` alone, then one with the next
    from where it ended: the splitting of a transformer's layers, with error O(h) for a
    `solver` of any order. For `solve(block, x0, ts, step=h, solver=LieTrotter(Tsit5()))`.

    A field that is no `Block` has one part, and this is `solver`. Fixed steps only.

    **Arguments:** `solver`, any diffrax solver for ordinary equations (default
    `Tsit5()`). **Source:** *multiscale*, Remark 2.1."""

    solver: dfx.AbstractSolver = dfx.Tsit5()

    term_structure = dfx.AbstractTerm
    interpolation_cls = dfx.LocalLinearInterpolation

    def order(self, terms):
        return 1

    def init(self, terms, t0, t1, y0, args):
        return None

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        del solver_state, made_jump
        field, *rest = args
        y, result = y0, dfx.RESULTS.successful
        for part in parts(field):
            alone = (part, *rest)
            state = self.solver.init(terms, t0, t1, y, alone)
            y, _, _, _, outcome = self.solver.step(
                terms, t0, t1, y, alone, state, made_jump=True
            )
            y = sphere.normalise(y)
            result = dfx.RESULTS.where(dfx.is_okay(result), outcome, result)
        return y, None, {"y0": y0, "y1": y}, None, result

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)
