"""The family, a row a member: what each property test needs to know of it. Properties themselves know no names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft_kasa import KaSAConfig, MiLoRAConfig, PiSSAConfig, SORSAConfig, SpectralConfig, SVFitConfig


@dataclass(frozen=True)
class Member:
    """One member of the family."""

    name: str
    config_class: type[SpectralConfig]
    identity: bool  # the model's output is the base model's at step 0
    export_rank: int  # of the exact LoRA, in units of r
    learns: tuple[str, ...]  # slots
    regularized: bool
    defaults: dict[str, Any] = field(default_factory=dict)

    def config(self, **given: Any) -> SpectralConfig:
        """A config of small rank on the attention and MLP projections."""
        return self.config_class(**({"r": 4, "target_modules": "all-linear"} | self.defaults | given))

    def parameters(self, m: int, n: int, r: int) -> int:
        """How many numbers learn in a module."""
        sizes = {"left": m * r, "core": r, "right": r * n}
        return sum(sizes[slot] for slot in self.learns)

    def __str__(self) -> str:
        return self.name


MEMBERS = [
    Member("kasa", KaSAConfig, False, 2, ("left", "core", "right"), True),
    Member("pissa", PiSSAConfig, True, 2, ("left", "right"), False),
    Member("milora", MiLoRAConfig, True, 2, ("left", "right"), False),
    Member("sorsa", SORSAConfig, True, 2, ("left", "core", "right"), True),
    Member("svfit", SVFitConfig, True, 1, ("core",), False),
]

REGULARIZED = [member for member in MEMBERS if member.regularized]
IDENTICAL = [member for member in MEMBERS if member.identity]
