"""Tests run in float64 unless they say otherwise, draw no windows and repeat exactly."""

import gc
import os
from pathlib import Path

import hypothesis
import jax
import pytest

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


def _memory_maps():
    """How many regions of memory this process has mapped (0 where that is not known)."""
    try:
        return len(Path("/proc/self/maps").read_bytes().splitlines())
    except OSError:
        return 0


@pytest.fixture(autouse=True, scope="module")
def room_for_programs():
    """Each compiled program maps memory; Linux allows 65530 regions to a process, and XLA
    dies at the limit without a word. Programs of earlier files are forgotten in time."""
    if _memory_maps() > 20_000:
        jax.clear_caches()
        gc.collect()
