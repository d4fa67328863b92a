"""The second table of docs/accuracy.md: how much the inequalities of the papers give away."""

SECOND = """
## Inequalities on simulated runs

Slack = bound/measured, never below 1 (up to rounding). "Runs" is the smallest slack measured on
random cases: for the field, d = 2, 3, 5 with 4 seeds each, Gaussian Q, K, V, β = 1 … 100,
60 tokens, four times; for Lemma 7 and Prop. 8, d = 3 … 6 with 3 seeds each, symmetric M,
dim E = 2, 64 tokens, t = 0, 0.5, 2. The named cases are those in which
an inequality is nearly attained. The slacks are not measured anew by the program; the tests (in
`tests/`) hold the inequalities.

| inequality | runs | named case | tests |
|---|---|---|---|
"""
BOUNDS, LYAPUNOV = "test_theory_bounds.py", "test_theory_lyapunov.py"
SLACKS = [
    (
        "speed of the field (A32)",
        "1.02, 1.01, 1.20 (d = 2, 3, 5)",
        "1.000: all mass at one point, at 90°",
        BOUNDS,
        "field_bounds_hold_along_runs",
        "field_bounds_are_nearly_attained_by_two_antipodal_tokens",
    ),
    (
        "slope of the field (A32)",
        "2.86, 1.76, 4.58",
        "1.0025: ½δ_z + ½δ_−z, β = 10",
        BOUNDS,
        "field_bounds_hold_along_runs",
        "field_bounds_are_nearly_attained_by_two_antipodal_tokens",
    ),
    (
        "second derivative of the field (A32)",
        "5.3, 7.3, 16.8",
        "1.35: z and −z with weights (1 ± 1/√3)/2, β = 10",
        BOUNDS,
        "field_bounds_hold_along_runs",
        "field_bounds_are_nearly_attained_by_two_antipodal_tokens",
    ),
    (
        "quantitative Laplace principle (C10)",
        "1.29, 1.09, 1.09",
        "1.295: a grain of mass 10⁻⁸ at v, β = 200",
        BOUNDS,
        "laplace_principle_holds_along_runs",
        "laplace_bound_is_nearly_attained_by_a_grain_at_the_target",
    ),
    (
        "largest density along the flow (C17)",
        "1.10, 1.24, 1.15 at t = 0.05 on three circles, 967, 2·10⁸, 9.1 at t = 0.5",
        "1.010 (rate at t = 0): uniform law on S¹, V = diag(1, −1), β = 50",
        BOUNDS,
        "density_bounds_hold_on_the_circle",
        "density_bound_is_nearly_attained_by_a_contracting_field",
    ),
    (
        "smallest density along the flow (C17)",
        "1.02, 1.24, 1.15 at t = 0.05 on the same circles, 356, 2·10⁸, 9.4 at t = 0.5",
        "—",
        BOUNDS,
        "density_bounds_hold_on_the_circle",
    ),
    (
        "distance of the flows at β and at β = ∞ (C18)",
        "16.7, 44.6, 8.74 at t = 0.05 on the same circles",
        "8.74: the third circle, β = 5",
        BOUNDS,
        "stability_bound_holds_on_the_circle",
    ),
    (
        "Lemma 7 of *concentration*, ∫‖x − π_E x‖²dµ ≤ E₂ (C12)",
        "1.39",
        "1.012: d = 3, dim E = 2, B orthogonal, t = 4",
        LYAPUNOV,
        "lemma_7_and_proposition_8_hold_along_the_flow",
        "proposition_8_and_lemma_7_are_sharp_in_a_simulation",
    ),
    (
        "Lemma 7 with the best constant, for E₁, E₂, E₃ (`wasserstein_from_lyapunov`)",
        "1.18",
        "1.000: one token, p ≥ 2",
        LYAPUNOV,
        "lemma_7_and_proposition_8_hold_along_the_flow",
        "wasserstein_bound_is_attained_by_a_point_mass_and_never_exceeds_the_diameter",
    ),
    (
        "Prop. 8 of *concentration*, decay of E₁, E₂, E₃ (C13)",
        "1.04",
        "1.000: two eigenvalues, B orthogonal; 1.055 for three, t = 4",
        LYAPUNOV,
        "lemma_7_and_proposition_8_hold_along_the_flow",
        "proposition_8_and_lemma_7_are_sharp_in_a_simulation",
    ),
]


def table_of_slacks() -> str:
    rows = []
    for inequality, runs, named, file, *tests in SLACKS:
        names = ", ".join(f"`{file}::test_{test}`" for test in tests)
        rows.append(f"| {inequality} | {runs} | {named} | {names} |")
    return "\n".join(rows) + "\n"
