"""The family, a row a member: what each property test needs to know of it. Properties themselves know no names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import bases

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
    SpectralConfig,
    SVFConfig,
    SVFitConfig,
    SVFTConfig,
)


@dataclass(frozen=True)
class Member:
    """One member of the family, or a variant of one."""

    name: str
    config_class: type[SpectralConfig]
    identity: bool  # the model's output is the base model's at step 0
    export_rank: int  # of the exact LoRA, in units of r
    learns: tuple[str, ...]  # slots
    core: Callable[[int], int] = lambda r: r  # how many numbers learn in the core, if it learns
    defaults: dict[str, Any] = field(default_factory=dict)
    paper: dict[str, Any] = field(default_factory=dict)  # the same as options of tests/reference
    regularized: bool = False
    random: bool = False  # its start depends on the seed
    rate: float = 0.02  # at which Adam learns a fixed batch
    label: str = ""

    def config(self, **given: Any) -> SpectralConfig:
        """A config of small rank on the attention and MLP projections, with statistics of the tests' models."""
        needs = self.config_class.needs
        evidence = {"statistics": bases.statistics(needs)} if needs else {}
        return self.config_class(**({"r": 4, "target_modules": "all-linear"} | evidence | self.defaults | given))

    def parameters(self, m: int, n: int, r: int) -> int:
        """How many numbers learn in a module."""
        sizes = {"left": m * r, "core": self.core(r), "right": r * n}
        return sum(sizes[slot] for slot in self.learns)

    def __str__(self) -> str:
        return self.label or self.name


INTTUNE = {"variant": "inttune"}
FACTORS, TRIPLES, CORE = ("left", "right"), ("left", "core", "right"), ("core",)


def square(r: int) -> int:
    return r * r


MEMBERS = [
    Member("kasa", KaSAConfig, False, 2, TRIPLES, regularized=True, random=True),
    Member("pissa", PiSSAConfig, True, 2, FACTORS),
    Member("milora", MiLoRAConfig, True, 2, FACTORS),
    Member("sorsa", SORSAConfig, True, 2, TRIPLES, regularized=True),
    Member("svfit", SVFitConfig, True, 1, CORE, rate=0.5),
    Member("svf", SVFConfig, True, 1, CORE, rate=0.5),
    Member(
        "svft",
        SVFTConfig,
        True,
        1,
        CORE,
        lambda r: r * 3 - 2 + 1,
        {"pattern": "banded", "width": 1},
        {"kind": "banded", "width": 1, "gate": True},
        rate=0.5,
    ),
    Member("lora_xs", LoRAXSConfig, True, 1, CORE, square, {"std": 0.0}, {"std": 0.0}, rate=0.1),
    Member("nlora", NLoRAConfig, False, 1, TRIPLES, square),
    Member(
        "spectral_adapter",
        SpectralAdapterConfig,
        True,
        1,
        CORE,
        lambda r: 2 * r * r + r,
        {"variant": "rotation"},
        {"variant": "rotation"},
        rate=0.5,
    ),
    Member("corda", CorDAConfig, True, 2, FACTORS),
    Member("lora_null", LoRANullConfig, True, 2, FACTORS),
    Member("eva", EVAConfig, True, 1, FACTORS, defaults={"rank_budget": None}),
    Member("lora_sb", LoRASBConfig, False, 1, CORE, square, rate=0.1),
    Member("lora_one", LoRAOneConfig, False, 1, FACTORS),
]

VARIANTS = [  # what else a config can be: against the papers, and the contract on one base
    Member("svf", SVFConfig, True, 1, CORE, defaults={"form": "gate"}, paper={"form": "gate"}, label="svf gate"),
    Member("svft", SVFTConfig, True, 1, CORE, lambda r: r + 1, paper={"gate": True}, label="svft plain"),
    Member(
        "svft",
        SVFTConfig,
        True,
        1,
        CORE,
        lambda r: r * 3 - 2,
        {"pattern": "top_k", "width": 1, "gate": False},
        {"kind": "top_k", "width": 1},
        label="svft top_k",
    ),
    Member(
        "svft",
        SVFTConfig,
        False,
        1,
        CORE,
        lambda r: r * 3 - 2 + 1,
        {"pattern": "random", "width": 1, "init": "reference"},
        random=True,
        label="svft random",
    ),
    Member("lora_xs", LoRAXSConfig, False, 1, CORE, square, random=True, label="lora_xs noisy"),
    Member(
        "lora_xs",
        LoRAXSConfig,
        True,
        1,
        CORE,
        square,
        {"std": 0.0, "sigma": "left"},
        {"std": 0.0, "sigma": "output"},
        label="lora_xs left",
    ),
    Member(
        "nlora", NLoRAConfig, False, 1, CORE, square, {"variant": "inttune"}, {"variant": "inttune"}, label="inttune"
    ),
    Member(
        "nlora",
        NLoRAConfig,
        True,
        1,
        TRIPLES,
        square,
        {"variant": "slora"},
        {"variant": "slora"},
        False,
        True,
        label="slora",
    ),
    Member(
        "nlora",
        NLoRAConfig,
        True,
        2,
        TRIPLES,
        square,
        {"pseudo_inverse": True},
        {"pseudo_inverse": True},
        label="nlora pinv",
    ),
    Member("spectral_adapter", SpectralAdapterConfig, True, 2, TRIPLES, label="spectral_adapter additive"),
    Member("pissa", PiSSAConfig, True, 2, FACTORS, defaults={"part": "middle"}, label="pissa middle"),
    Member("milora", MiLoRAConfig, True, 2, FACTORS, defaults={"part": "random"}, random=True, label="milora random"),
    Member(
        "corda",
        CorDAConfig,
        True,
        2,
        FACTORS,
        defaults={"mode": "knowledge"},
        paper={"part": "bottom"},
        label="corda kpa",
    ),
    Member("corda", CorDAConfig, True, 2, FACTORS, defaults={"power": 0.5}, paper={"power": 0.5}, label="corda root"),
    Member("lora_null", LoRANullConfig, True, 1, ("left",), defaults={"version": 2}, label="lora_null v2"),
]

REGULARIZED = [member for member in MEMBERS if member.regularized]
IDENTICAL = [member for member in MEMBERS if member.identity]
FORMS = list({member.learns: member for member in reversed(MEMBERS)}.values())  # one for each set of slots that learn
