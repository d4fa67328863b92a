"""Solvers of diffrax on the sphere."""

import diffrax as dfx
import jax.numpy as jnp

from .. import sphere
from ..attention import LayerStack


class Projected(dfx.AbstractWrappedSolver):
    """Any diffrax solver, with each step ended on the sphere: y ← y/|y|.

    With a field that normalises its argument (as `solve` sees to) the last stage of a
    first-same-as-last method stays exact, and the order of the solver is kept."""

    solver: dfx.AbstractSolver

    @property
    def term_structure(self):
        return self.solver.term_structure

    @property
    def interpolation_cls(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.solver.interpolation_cls

    @property
    def term_compatible_contr_kwargs(self):
        return self.solver.term_compatible_contr_kwargs

    @property
    def scan_kind(self):  # read by ForwardMode and DirectAdjoint
        return getattr(self.solver, "scan_kind", "lax")

    @property
    def root_finder(self):  # read by PIDController
        return self.solver.root_finder  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def root_find_max_steps(self):
        return self.solver.root_find_max_steps  # pyright: ignore

    def order(self, terms):
        return self.solver.order(terms)

    def strong_order(self, terms):
        return self.solver.strong_order(terms)

    def error_order(self, terms):
        return self.solver.error_order(terms)

    def init(self, terms, t0, t1, y0, args):
        return self.solver.init(terms, t0, t1, y0, args)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        if isinstance(args, tuple) and isinstance(args[0], LayerStack):
            # All stages belong to this layer, also where the next begins at t1; a stage
            # kept from the step before may not.
            args, made_jump = (
                (args[0].at(jnp.asarray(t0 + (t1 - t0) / 2)), *args[1:]),
                True,
            )
        y1, error, dense, state, result = self.solver.step(
            terms, t0, t1, y0, args, solver_state, made_jump
        )
        return sphere.normalise(y1), error, dense, state, result

    def func(self, terms, t0, y0, args):
        return self.solver.func(terms, t0, y0, args)
