"""Tests run in float64 unless they say otherwise, draw no windows and repeat exactly."""

import os

import hypothesis
import jax

jax.config.update("jax_enable_x64", True)
os.environ["MPLBACKEND"] = "Agg"

hypothesis.settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=20,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("repeatable")
