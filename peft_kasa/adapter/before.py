"""Models as they were before an adapter was put on them: what a refused adapter leaves behind."""

from __future__ import annotations

import weakref

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn


class Before:
    """Remembers what PEFT changes besides wrapping the target layers: what learns, and modules trained in full.

    By name: nothing of the model is kept alive.
    """

    def __init__(self, model: nn.Module) -> None:
        self.learnt = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self.wrapped = {path: module._get_available_adapters() for path, module in _wrappers(model).items()}

    def restore(self, model: nn.Module, adapter: str) -> None:
        """Puts it back, in a model that the adapter's layers have been taken out of."""
        for path, module in _wrappers(model).items():
            if path not in self.wrapped:
                parent, _, child = path.rpartition(".")
                setattr(model.get_submodule(parent), child, module.original_module)
            elif adapter not in self.wrapped[path]:
                module.delete_adapter(adapter, [name for name in module.active_adapters if name != adapter])
        for name, parameter in model.named_parameters():
            if name in self.learnt:
                parameter.requires_grad_(self.learnt[name])


def _wrappers(model: nn.Module) -> dict[str, AuxiliaryTrainingWrapper]:
    return {path: module for path, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)}


_before: weakref.WeakKeyDictionary[nn.Module, dict[str, Before]] = weakref.WeakKeyDictionary()


def note(model: nn.Module, adapter: str) -> None:
    """Remembers a model as it is without the adapter that it is about to get."""
    _before.setdefault(model, {})[adapter] = Before(model)


def restore(model: nn.Module, adapter: str) -> None:
    """Makes a model, or one within it, what it was when that was noted, if it was."""
    for module in list(model.modules()):
        if (before := _before.get(module, {}).pop(adapter, None)) is not None:
            before.restore(module, adapter)
