"""One paper a file. A method says where it starts at one weight; everything else is shared."""

from .corda import CorDAConfig
from .eva import EVAConfig
from .kasa import KaSAConfig
from .lora_null import LoRANullConfig
from .lora_one import LoRAOneConfig
from .lora_sb import LoRASBConfig
from .lora_xs import LoRAXSConfig
from .method import SpectralConfig, methods
from .milora import MiLoRAConfig
from .nlora import NLoRAConfig
from .pissa import PiSSAConfig
from .site import Site, Start
from .sorsa import SORSAConfig
from .spectral_adapter import SpectralAdapterConfig
from .svf import SVFConfig
from .svfit import SVFitConfig
from .svft import SVFTConfig

__all__ = [
    "CorDAConfig",
    "EVAConfig",
    "KaSAConfig",
    "LoRANullConfig",
    "LoRAOneConfig",
    "LoRASBConfig",
    "LoRAXSConfig",
    "MiLoRAConfig",
    "NLoRAConfig",
    "PiSSAConfig",
    "SORSAConfig",
    "SVFConfig",
    "SVFTConfig",
    "SVFitConfig",
    "Site",
    "SpectralAdapterConfig",
    "SpectralConfig",
    "Start",
    "methods",
]
