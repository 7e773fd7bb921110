"""Numbers and pictures of weights and of saved adapters. Importing `peft_kasa` does not import this."""

from .adapters import AdapterReport
from .inspecting import inspect
from .weights import SpectrumReport, spectrum

__all__ = ["AdapterReport", "SpectrumReport", "inspect", "spectrum"]
