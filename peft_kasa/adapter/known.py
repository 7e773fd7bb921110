"""What a layer knows of an adapter."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..methods.method import SpectralConfig
from ..spectral.plan import Ask


@dataclass
class Adapter:
    """What a layer knows of one adapter besides its tensors."""

    config: SpectralConfig
    rank: int
    scale: float
    awaiting: bool = True  # its slots have no values yet: a file or the method's start will give them
    start_checksums: str = ""  # of what learns, at the start; none where a file gave the values
    asks: list[Ask | None] = field(default_factory=list)  # the cuts that its start takes, None for other matrices
    peers: int = 1  # how many modules this adapter has in the model: what a mean runs over
    trained: bool = False  # a forward pass has asked for its gradients
    masters: dict[str, Tensor] = field(default_factory=dict)  # the learning slots' own float32 storage, no copies
    gathered: dict[str, Tensor] = field(default_factory=dict)  # copies of what ZeRO-3 has in parts and does not save

    @property
    def uncalibrated(self) -> bool:
        """Whether it waits for statistics of data."""
        return self.awaiting and bool(self.config.needs) and self.config.statistics is None
