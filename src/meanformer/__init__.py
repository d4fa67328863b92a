"""meanformer: how tokens move through a deep transformer, simulated and predicted."""

import importlib

from . import sphere as sphere
from . import harmonics as harmonics
from . import special as special
from .measures import AzimuthElevation as AzimuthElevation
from .measures import Empirical as Empirical
from .measures import HeatKernel as HeatKernel
from .measures import Mixture as Mixture
from .measures import Uniform as Uniform
from .measures import VonMisesFisher as VonMisesFisher
from .measures import WrappedNormal as WrappedNormal
from .partition import Auto as Auto
from .partition import Blockwise as Blockwise
from .partition import Dense as Dense
from .partition import Harmonic as Harmonic
from .attention import LayerStack as LayerStack
from .attention import SelfAttention as SelfAttention
from .attention import TimeDependent as TimeDependent
from .attention import UnnormalizedSelfAttention as UnnormalizedSelfAttention
from .kernels import KernelInteraction as KernelInteraction
from .blocks import Block as Block
from .blocks import CausalSelfAttention as CausalSelfAttention
from .blocks import FeedForward as FeedForward
from .blocks import MultiHead as MultiHead
from .limits import Hardmax as Hardmax
from .limits import ZeroTemperature as ZeroTemperature
from .consensus import PolarizedConsensus as PolarizedConsensus
from .trajectory import load as load
from .trajectory import Trajectory as Trajectory
from .flow import diffuse as diffuse
from .flow import solve as solve
from .layers import unroll as unroll
from . import transport as transport
from .transport import wasserstein as wasserstein
from . import observables as observables
from . import theory as theory

_PLOTTING = ("plot", "animate")  # matplotlib is imported when they are first used


def __getattr__(name: str):
    if name in _PLOTTING:
        return getattr(importlib.import_module(".plotting", __name__), name)
    if name in ("plotting", "charts", "experiments"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_PLOTTING, "plotting", "charts", "experiments"])
