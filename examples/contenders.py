"""What compare_methods.py compares: a row a method, with the learning rates that it may choose from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from peft import LoraConfig, PeftConfig

from peft_kasa import (
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
    SORSAConfig,
    SpectralAdapterConfig,
    SVFConfig,
    SVFitConfig,
    SVFTConfig,
)

SPREAD = (1 / 3, 1.0, 3.0)  # the candidate learning rates, as multiples of the middle one


@dataclass(frozen=True)
class Method:
    """A method as a user would ask for it.

    `statistics` names what it is calibrated on, and with: "task" or "general" text, "inputs", "scaled inputs" or
    "gradients". Those that are not `ours` are PEFT's own, each on a base loaded afresh.
    """

    name: str
    title: str
    make: Callable[..., PeftConfig]
    rate: float
    statistics: str = ""
    ours: bool = True
    random: bool = False  # whether the start depends on the seed

    @property
    def rates(self) -> list[float]:
        """The candidate learning rates."""
        return [float(f"{self.rate * factor:.2g}") for factor in SPREAD]

    def config(self, **given: Any) -> Any:
        """Its config for all linear layers but the head."""
        return self.make(target_modules="all-linear", **given)


LORA = partial(LoraConfig, r=8, lora_alpha=16)

METHODS = [
    Method("lora", "LoRA (PEFT)", LORA, 4e-3, ours=False, random=True),
    Method("kasa", "KaSA", partial(KaSAConfig, r=8, reference_truncation=True), 4e-3, random=True),
    Method("pissa", "PiSSA", partial(PiSSAConfig, r=8), 1e-3),
    Method("milora", "MiLoRA", partial(MiLoRAConfig, r=8), 4e-3),
    Method("sorsa", "SORSA", partial(SORSAConfig, r=8), 1e-3),
    Method("svfit", "SVFit r=128", SVFitConfig, 1e-1),
    Method("lora_xs", "LoRA-XS r=32", partial(LoRAXSConfig, r=32), 4e-3, random=True),
    Method("nlora", "NLoRA", partial(NLoRAConfig, r=8), 1e-3),
    Method("slora", "SLoRA", partial(NLoRAConfig, r=8, variant="slora"), 4e-3, random=True),
    Method("inttune", "IntTune r=32", partial(NLoRAConfig, r=32, variant="inttune"), 2e-2),
    Method("nlora_inverse", "NLoRA, pseudo-inverse", partial(NLoRAConfig, r=8, pseudo_inverse=True), 3e-5),
    Method(
        "inttune_inverse",
        "IntTune r=32, pseudo-inverse",
        partial(NLoRAConfig, r=32, variant="inttune", pseudo_inverse=True),
        2e-2,
    ),
    Method("additive", "Spectral Adapter, additive", partial(SpectralAdapterConfig, r=8), 1e-3),
    Method("rotation", "Spectral Adapter, rotation", partial(SpectralAdapterConfig, r=8, variant="rotation"), 2e-2),
    Method("corda_instruction", "CorDA, instruction", partial(CorDAConfig, r=8), 1e-3, "task: scaled inputs"),
    Method(
        "corda_knowledge",
        "CorDA, knowledge",
        partial(CorDAConfig, r=8, mode="knowledge"),
        4e-3,
        "general: scaled inputs",
    ),
    Method("lora_null_1", "LoRA-Null v1", partial(LoRANullConfig, r=8), 4e-3, "general: scaled inputs"),
    Method("lora_null_2", "LoRA-Null v2", partial(LoRANullConfig, r=8, version=2), 4e-3, "general: scaled inputs"),
    Method("eva", "EVA", partial(EVAConfig, r=8), 2e-3, "task: inputs"),
    Method("lora_sb", "LoRA-SB r=32", partial(LoRASBConfig, r=32), 1e-2, "task: gradients"),
    Method("lora_one", "LoRA-One", partial(LoRAOneConfig, r=8), 1e-3, "task: gradients"),
    Method("dora", "DoRA (PEFT)", partial(LORA, use_dora=True), 4e-3, ours=False, random=True),
    Method(
        "peft_pissa",
        "PiSSA (PEFT)",
        partial(LoraConfig, r=8, lora_alpha=8, init_lora_weights="pissa"),
        1e-3,
        ours=False,
    ),
    Method("svf", "SVF", SVFConfig, 2e-2),
    Method("svft_plain", "SVFT, plain", SVFTConfig, 1e-1),
    Method("svft_banded", "SVFT, banded 4", partial(SVFTConfig, pattern="banded", width=4), 3e-2),
]
