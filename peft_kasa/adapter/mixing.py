"""Another adapter for each row of a batch: `adapter_names=` of PEFT's forward and generate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..methods.method import require
from .experts.expert import SpectralExpert
from .layer import SpectralLinear
from .naming import BASE
from .starting import all_layers, settle


@contextmanager
def by_row(tuner: Any, names: Sequence[str], repeats: int) -> Iterator[None]:
    """Within it, every row of a batch is computed with the adapter of its name.

    Args:
        tuner: a SpectralModel, in evaluation mode.
        names: of its adapters, or "__base__", in the order of the rows.
        repeats: how often `generate` repeats each row, next to itself. An encoder sees the rows before that.

    Raises:
        ValueError: training mode, merged adapters, an unknown name, or one that has to be calibrated first.
    """
    _check(tuner, names)
    settle(tuner.model, set(names))
    encoder = set(_encoder(tuner.model).modules())
    repeated = [name for name in names for _ in range(repeats)]
    with ExitStack() as stack:
        for module in _takers(tuner):
            stack.callback(_tell(module, names if module in encoder else repeated).remove)
        yield


def repeats(given: dict[str, Any]) -> int:
    """How often `generate` repeats each row, from its arguments."""
    config = given.get("generation_config")
    counts = (given.get(key) or getattr(config, key, None) for key in ("num_beams", "num_return_sequences"))
    return max(count or 1 for count in counts)


def _tell(module: nn.Module, names: Sequence[str]) -> RemovableHandle:
    return module.register_forward_pre_hook(partial(_with_names, names=names), with_kwargs=True)


def _with_names(module: Any, args: Any, kwargs: dict[str, Any], names: Sequence[str]) -> Any:
    having = module._get_available_adapters()  # PEFT's own modules know of no others
    return args, kwargs | {"adapter_names": [name if name in having else BASE for name in names]}


def _takers(tuner: nn.Module) -> list[nn.Module]:
    """What chooses by row: the family's layers, and PEFT's own of modules_to_save and trained tokens."""
    return [module for module in tuner.modules() if isinstance(module, SpectralLinear | AuxiliaryTrainingWrapper)]


def _encoder(model: Any) -> nn.Module:
    """The encoder of an encoder-decoder model; elsewhere, a module without any."""
    has_one = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return model.get_encoder() if has_one else nn.Module()


def _check(tuner: Any, names: Sequence[str]) -> None:
    listed = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    require(listed, "adapter_names has to be a list of names, one for each row of the batch", names)
    require(not tuner.training, "adapter_names is for inference: call model.eval() first", "a model in training mode")
    known = [*tuner.peft_config, BASE]
    unknown = sorted(set(names) - set(known))
    require(not unknown, f"adapter_names have to be of {known}", unknown)
    stacked = sorted({layer.pattern_name for layer in all_layers(tuner) if isinstance(layer, SpectralExpert)})
    rule = (
        "adapter_names needs a model without adapted experts (target_parameters), which are given tokens of any row: "
        "use set_adapter, one adapter a batch"
    )
    require(not stacked, rule, stacked[:1])
    merged = sorted({name for layer in all_layers(tuner) for name in layer.merged_adapters})
    require(not merged, "adapter_names needs adapters that are not merged: call unmerge_adapter first", merged)
