"""Experts of a stack by the names that files give their tensors."""

from __future__ import annotations

import re
from contextlib import suppress

from torch import nn

from ..adapter.experts.expert import ExpertWeight, SpectralExpert, unsupported
from ..adapter.experts.wrapper import SpectralExperts

STACKED = re.compile(r"(?P<owner>.+)\.adapted\.(?P<parameter>\w+)\.(?P<index>\d+)")


def pattern_name(name: str) -> str:
    """What the patterns of a config are matched with: of an expert, the full name of its stack.

    Examples:
        >>> from peft_kasa.report.experts import pattern_name
        >>> pattern_name("layers.0.experts.adapted.down_proj.2"), pattern_name("layers.0.q_proj")
        ('layers.0.experts.down_proj', 'layers.0.q_proj')
    """
    found = STACKED.fullmatch(name)
    return f"{found['owner']}.{found['parameter']}" if found else name


def expert_of(model: nn.Module, name: str) -> SpectralExpert | None:
    """A fresh layer around one matrix of a stack, which stays as it is. None: the model has no such expert."""
    if (found := STACKED.fullmatch(name)) is None:
        return None
    with suppress(AttributeError, IndexError):
        owner = model.get_submodule(found["owner"])
        owner = owner.base_layer if isinstance(owner, SpectralExperts) else owner  # type: ignore[assignment]
        if unsupported(owner, found["parameter"]) is None:
            weight = ExpertWeight(owner, found["parameter"], int(found["index"]))
            return SpectralExpert(weight, pattern_name(name))
    return None
