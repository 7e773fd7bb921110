"""The SVD family of fine-tuning methods for Hugging Face PEFT: import this package and use its configs.

from peft import get_peft_model
from peft_kasa import KaSAConfig

model = get_peft_model(model, KaSAConfig(r=8, target_modules="all-linear"))
"""

import peft as _peft

from . import peft_type as _peft_type

_peft_type.require_peft(_peft.__version__)
_peft_type.add_member(_peft.PeftType, _peft_type.NAME)

from .adapter.files.statistics import Statistics  # noqa: E402
from .adapter.layer import SpectralLinear  # noqa: E402
from .adapter.requantize import Requantized, requantize  # noqa: E402
from .adapter.requantized_file import load_requantized, save_requantized  # noqa: E402
from .adapter.tuner import SpectralModel  # noqa: E402
from .calibration.calibrate import calibrate  # noqa: E402
from .methods import (  # noqa: E402
    CorDAConfig,
    EVAConfig,
    KaSAConfig,
    LoRANullConfig,
    LoRAOneConfig,
    LoRASBConfig,
    LoRAXSConfig,
    MiLoRAConfig,
    NLoRAConfig,
    PiSSAConfig,
    Site,
    SORSAConfig,
    SpectralAdapterConfig,
    SpectralConfig,
    Start,
    SVFConfig,
    SVFitConfig,
    SVFTConfig,
)
from .register import register as _register  # noqa: E402
from .sharing.export import LoraExport, export_lora, to_lora  # noqa: E402
from .sharing.federated import average_cores  # noqa: E402
from .sharing.from_lora import from_lora  # noqa: E402
from .sharing.hotswap import hotswap_adapter  # noqa: E402
from .sharing.hub import push_to_hub  # noqa: E402
from .training import callback as _callback  # noqa: E402
from .training import regularise as _regularise  # noqa: E402
from .training.groups import parameter_groups  # noqa: E402
from .training.regularise import penalty  # noqa: E402

_register()
_regularise.install()
_callback.install()

__version__ = "0.1.0"

__all__ = [
    "CorDAConfig",
    "EVAConfig",
    "LoRANullConfig",
    "LoRAOneConfig",
    "LoRASBConfig",
    "LoRAXSConfig",
    "NLoRAConfig",
    "SpectralAdapterConfig",
    "SVFConfig",
    "SVFTConfig",
    "KaSAConfig",
    "LoraExport",
    "MiLoRAConfig",
    "PiSSAConfig",
    "Requantized",
    "SORSAConfig",
    "SVFitConfig",
    "Site",
    "SpectralConfig",
    "SpectralLinear",
    "SpectralModel",
    "Start",
    "Statistics",
    "average_cores",
    "calibrate",
    "export_lora",
    "from_lora",
    "load_requantized",
    "hotswap_adapter",
    "parameter_groups",
    "penalty",
    "push_to_hub",
    "requantize",
    "save_requantized",
    "to_lora",
]
