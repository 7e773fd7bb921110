"""Numbers only: low-rank values, cuts of a spectrum, and the engine that computes them. Imports nothing of PEFT.

`sources`, `covariance` and `shared` are for what is decomposed besides weights; `cache` lists and clears what is kept.
"""

from .engine import Engine
from .lowrank import LowRank
from .spectrum import Spectrum

__all__ = ["Engine", "LowRank", "Spectrum"]
