"""Numbers only: low-rank values, cuts of a spectrum, and the engine that computes them. Imports nothing of PEFT."""

from .engine import Engine
from .lowrank import LowRank
from .spectrum import Spectrum

__all__ = ["Engine", "LowRank", "Spectrum"]
