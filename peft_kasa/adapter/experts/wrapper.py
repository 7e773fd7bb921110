"""The one wrapper around an experts' module: its stacks, with the adapters' updates, while its own code runs."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

from ...methods.method import SpectralConfig
from ..base.sharding import in_zero3
from .expert import ExpertWeight, SpectralExpert, is_transposed, joint, unsupported
from .stack import Stack

ALONE = RLock()  # what one thread shows in the place of a parameter, another would take for it
TORCH = (None, "eager", "grouped_mm", "batched_mm")  # what transformers calls code that calls torch


class SpectralExperts(nn.Module):
    """An experts' module of which some stacked parameters are adapted, a `SpectralExpert` a matrix.

    The experts' own code computes, whichever it is. While it runs it finds a `Stack` in the place of each parameter:
    an attribute of the instance hides the parameter, which itself is not touched. Threads take turns. Activation
    checkpointing goes around this module: within the experts' own code, what is computed again would lack the updates.

    Args:
        base_layer: the experts' module.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapted = nn.ModuleDict()  # by parameter, a list of experts

    def experts(self, parameter: str) -> list[SpectralExpert]:
        """Those of a stack, in its order; none if it is not adapted."""
        return list(self.adapted[parameter]) if parameter in self.adapted else []  # type: ignore[arg-type]

    def reserve(self, parameter: str, name: str, adapter: str, config: SpectralConfig) -> None:
        """Makes the slots of an adapter for every expert of a stack, the parameter's full name being `name`."""
        if parameter not in self.adapted:
            count = len(getattr(self.base_layer, parameter))
            weights = [ExpertWeight(self.base_layer, parameter, index) for index in range(count)]
            self.adapted[parameter] = nn.ModuleList([SpectralExpert(weight, name) for weight in weights])
        for expert in self.experts(parameter):
            expert.reserve(adapter, config)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with nullcontext() if torch.compiler.is_compiling() else ALONE, ExitStack() as shown:
            for parameter in self.adapted:
                if (stack := self._updated(parameter)) is not None:
                    shown.enter_context(_shown(self.base_layer, parameter, stack))
            return self.base_layer(*args, **kwargs)

    def _updated(self, parameter: str) -> Stack | Tensor | None:
        """What the experts' code is to find, if adapters act on the stack."""
        experts, base = self.experts(parameter), getattr(self.base_layer, parameter)
        acting = [expert.acting() for expert in experts]
        if not acting[0]:
            return None
        if in_zero3(base):
            raise ValueError(f"{experts[0].pattern_name}: stacked experts cannot be adapted with ZeRO-3. Use ZeRO-2.")
        up, down = joint(experts, acting[0])
        stack = Stack(base, down.mT, up.mT) if is_transposed(self.base_layer) else Stack(base, up, down)
        return stack if self._multiplies_by_torch() else stack.dense()

    def _multiplies_by_torch(self) -> bool:
        """Whether the experts' code is known to make its products with torch's functions: other kernels read memory."""
        kernel = getattr(getattr(self.base_layer, "config", None), "_experts_implementation", None)
        return kernel in TORCH and not torch.compiler.is_compiling()

    def __getattr__(self, name: str) -> Any:
        """The experts' own attributes, for code that reads them."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def get_base_layer(self) -> nn.Module:
        """The experts' module."""
        return self.base_layer

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """As PEFT asks of layers that are not unloaded one by one: the experts' module, with or without the updates."""
        for expert in (expert for parameter in self.adapted for expert in self.experts(parameter)):
            if merge:
                expert.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.base_layer

    def tidy(self) -> None:
        """Forgets the stacks that no adapter is left on."""
        for parameter in list(self.adapted):
            if not any(expert.adapters for expert in self.experts(parameter)):
                del self.adapted[parameter]


def adapt(
    parent: nn.Module, child: str, module: nn.Module, name: str, parameter: str, adapter: str, config: SpectralConfig
) -> None:
    """Gives every expert of a stack the slots of an adapter, and wraps the experts' module if it is not yet.

    Args:
        parent, child, module: where the parameter was found: in an experts' module, or in what wraps it.
        name: the parameter's full name.
        parameter: its last part.

    Raises:
        TypeError: not a stack of matrices in float.
    """
    wrapper = next((found for found in (module, parent) if isinstance(found, SpectralExperts)), None)
    base = module if wrapper is None else wrapper.base_layer
    if reason := unsupported(base, parameter):
        raise TypeError(f"{name}: {reason}.")
    new = wrapper or SpectralExperts(base)
    new.reserve(parameter, name, adapter, config)
    if wrapper is None:
        setattr(parent, child, new)


def check_plain(model: nn.Module, names: Collection[str] | None) -> None:
    """Raises TypeError where a parameter of these names is a parametrization: PEFT would pass it by."""
    for path, module in model.named_modules():
        for parameter in getattr(module, "parametrizations", ()):
            if any(f".{path}.{parameter}".endswith(f".{name}") for name in names or ()):
                raise TypeError(f"{path}.{parameter}: {unsupported(module, parameter)}.")


def stacks(model: nn.Module) -> tuple[str, ...]:
    """Where the adapters of stacked experts are: what paths of theirs begin with."""
    return tuple(f"{path}.adapted." for path, module in model.named_modules() if isinstance(module, SpectralExperts))


def tidy(model: nn.Module) -> None:
    """Puts the experts' modules that no adapter is left on back in their places."""
    for path, module in list(model.named_modules()):
        if isinstance(module, SpectralExperts):
            module.tidy()
            if not module.adapted:
                parent, _, child = path.rpartition(".")
                setattr(model.get_submodule(parent), child, module.base_layer)


@contextmanager
def _shown(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Within it, the module's attribute of this name is the value."""
    module.__dict__[name] = value
    try:
        yield
    finally:
        del module.__dict__[name]
