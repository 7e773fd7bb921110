"""One paper a file. A method says where it starts at one weight; everything else is shared."""

from .kasa import KaSAConfig
from .method import SpectralConfig, methods
from .milora import MiLoRAConfig
from .pissa import PiSSAConfig
from .site import Site, Start
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
