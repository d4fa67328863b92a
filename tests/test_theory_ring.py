"""The rotating ring against independent computations: SciPy's ODE solver and quadrature."""

import mpmath
import numpy as np
import pytest
import scipy.integrate

from meanformer import theory


@pytest.mark.parametrize("k", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("beta", [0.5, 30.0, 400.0])
def test_ring_rate_against_mpmath(k, beta):
    """k sin(kπ/2) d/dκ(I_k/I_0) with mpmath's Bessel functions and derivative."""
    with mpmath.workdps(40):
        slope = mpmath.diff(lambda b: mpmath.besseli(k, b) / mpmath.besseli(0, b), beta)
        exact = float(k * mpmath.sin(k * mpmath.pi / 2) * slope)
    np.testing.assert_allclose(
        theory.ring_growth_rate(k, beta), exact, rtol=1e-10, atol=1e-17
    )


def test_height_law_is_the_solution_of_its_equations():
    """x̄' = (1 − 2βσ²)x̄ and (σ²)' = −4βσ⁴ against SciPy."""
    beta, s0, t = 30.0, 0.005, 3.0
    out = scipy.integrate.solve_ivp(
        lambda _, y: [(1 - 2 * beta * y[1]) * y[0], -4 * beta * y[1] ** 2],
        (0, t),
        [1.0, s0],
        rtol=1e-11,
        atol=1e-13,
    )
    np.testing.assert_allclose(
        theory.height_amplification(s0, t, beta), out.y[0, -1], rtol=1e-9
    )
    np.testing.assert_allclose(
        theory.height_variance(s0, t, beta), out.y[1, -1], rtol=1e-9
    )
    np.testing.assert_allclose(theory.height_growth_rate(beta, s0), 1 - 2 * beta * s0)
