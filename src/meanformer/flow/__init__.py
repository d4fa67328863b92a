"""Continuous time: `solve` integrates a field on the sphere, `diffuse` one with noise. The
only package that imports diffrax."""

from .noise import GeodesicEuler as GeodesicEuler, diffuse as diffuse
from .ode import solve as solve
from .projected import Projected as Projected
from .splitting import LieTrotter as LieTrotter
