"""What the comparisons compare: a row a method, with the learning rates that it may choose from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
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

RANK = 8
SPREAD = (1 / 3, 1.0, 3.0)  # the candidate learning rates, as multiples of the middle one


@dataclass(frozen=True)
class Method:
    """A method as a user would ask for it.

    `statistics` names what it is calibrated on, and with: "task" or "general" text, "inputs", "scaled inputs" or
    "gradients". Those that are not `ours` are PEFT's own, each on a base loaded afresh.
    """

    name: str
    plain_title: str
    make: Callable[..., PeftConfig]
    rate: float
    statistics: str = ""
    ours: bool = True
    random: bool = False  # whether the start depends on the seed
    rank: int | None = RANK  # None: it has none

    @property
    def title(self) -> str:
        """Its title, with the rank where that is not the others'."""
        head, comma, tail = self.plain_title.partition(",")
        return self.plain_title if self.rank in (RANK, None) else f"{head} r={self.rank}{comma}{tail}"

    @property
    def rates(self) -> list[float]:
        """The candidate learning rates."""
        return [float(f"{self.rate * factor:.2g}") for factor in SPREAD]

    def config(self, **given: Any) -> Any:
        """Its config for all linear layers but the head, unless other targets are given."""
        rank = {} if self.rank is None else {"r": self.rank}
        return self.make(**{"target_modules": "all-linear", **rank, **given})

    def at(self, rank: int) -> Method:
        """The same method at another rank, if it has one."""
        return self if self.rank is None else replace(self, rank=rank)


def lora(r: int, **given: Any) -> LoraConfig:
    """PEFT's LoRA with alpha = 2 r."""
    return LoraConfig(r=r, lora_alpha=2 * r, **given)


def peft_pissa(r: int, **given: Any) -> LoraConfig:
    """PEFT's PiSSA, which has alpha = r."""
    return LoraConfig(r=r, lora_alpha=r, init_lora_weights="pissa", **given)


def beyond(found: dict[float, float]) -> list[float]:
    """The rate to try next, three times beyond the best one if that is the least or the greatest; else none."""
    best = min(found, key=found.__getitem__)
    factor = {min(found): 1 / 3, max(found): 3.0}.get(best)
    return [] if factor is None else [float(f"{best * factor:.2g}")]


METHODS = [
    Method("lora", "LoRA (PEFT)", lora, 4e-3, ours=False, random=True),
    Method("kasa", "KaSA", partial(KaSAConfig, reference_truncation=True), 4e-3, random=True),
    Method("pissa", "PiSSA", PiSSAConfig, 1e-3),
    Method("milora", "MiLoRA", MiLoRAConfig, 4e-3),
    Method("sorsa", "SORSA", SORSAConfig, 1e-3),
    Method("svfit", "SVFit", SVFitConfig, 1e-1, rank=128),
    Method("lora_xs", "LoRA-XS", LoRAXSConfig, 4e-3, random=True, rank=32),
    Method("nlora", "NLoRA", NLoRAConfig, 1e-3),
    Method("slora", "SLoRA", partial(NLoRAConfig, variant="slora"), 4e-3, random=True),
    Method("inttune", "IntTune", partial(NLoRAConfig, variant="inttune"), 2e-2, rank=32),
    Method("nlora_inverse", "NLoRA, pseudo-inverse", partial(NLoRAConfig, pseudo_inverse=True), 3e-5),
    Method(
        "inttune_inverse",
        "IntTune, pseudo-inverse",
        partial(NLoRAConfig, variant="inttune", pseudo_inverse=True),
        2e-2,
        rank=32,
    ),
    Method("additive", "Spectral Adapter, additive", SpectralAdapterConfig, 1e-3),
    Method("rotation", "Spectral Adapter, rotation", partial(SpectralAdapterConfig, variant="rotation"), 2e-2),
    Method("corda_instruction", "CorDA, instruction", CorDAConfig, 1e-3, "task: scaled inputs"),
    Method(
        "corda_knowledge",
        "CorDA, knowledge",
        partial(CorDAConfig, mode="knowledge"),
        4e-3,
        "general: scaled inputs",
    ),
    Method("lora_null_1", "LoRA-Null v1", LoRANullConfig, 4e-3, "general: scaled inputs"),
    Method("lora_null_2", "LoRA-Null v2", partial(LoRANullConfig, version=2), 4e-3, "general: scaled inputs"),
    Method("eva", "EVA", EVAConfig, 2e-3, "task: inputs"),
    Method("lora_sb", "LoRA-SB", LoRASBConfig, 1e-2, "task: gradients", rank=32),
    Method("lora_one", "LoRA-One", LoRAOneConfig, 1e-3, "task: gradients"),
    Method("dora", "DoRA (PEFT)", partial(lora, use_dora=True), 4e-3, ours=False, random=True),
    Method("peft_pissa", "PiSSA (PEFT)", peft_pissa, 1e-3, ours=False),
    Method("svf", "SVF", SVFConfig, 2e-2, rank=None),
    Method("svft_plain", "SVFT, plain", SVFTConfig, 1e-1, rank=None),
    Method("svft_banded", "SVFT, banded 4", partial(SVFTConfig, pattern="banded", width=4), 3e-2, rank=None),
]
