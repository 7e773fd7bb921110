"""One paper a file. A method says where it starts at one weight; everything else is shared."""

from .kasa import KaSAConfig
from .method import Site, SpectralConfig, Start, methods
from .milora import MiLoRAConfig
from .pissa import PiSSAConfig
from .sorsa import SORSAConfig
from .svfit import SVFitConfig

__all__ = [
    "KaSAConfig",
    "MiLoRAConfig",
    "PiSSAConfig",
    "SORSAConfig",
    "SVFitConfig",
    "Site",
    "SpectralConfig",
    "Start",
    "methods",
]
