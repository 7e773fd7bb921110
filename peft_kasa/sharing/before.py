"""A model as it was before an adapter was put on it."""

from __future__ import annotations

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn


class Before:
    """Remembers what PEFT changes besides wrapping the target layers: what learns, and modules trained in full."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.learnt = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self.wrapped = {path for path, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)}

    def restore(self) -> None:
        """Puts it back."""
        for path, module in list(self.model.named_modules()):
            if isinstance(module, AuxiliaryTrainingWrapper) and path not in self.wrapped:
                parent, _, child = path.rpartition(".")
                setattr(self.model.get_submodule(parent), child, module.original_module)
        for parameter, learnt in self.learnt:
            parameter.requires_grad_(learnt)
