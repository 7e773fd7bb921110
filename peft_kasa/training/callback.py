"""What transformers' Trainer, and so TRL's, is told of the family. No user code is needed."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer import DEFAULT_CALLBACKS

from ..adapter.base.sharding import in_zero3, wholes
from ..adapter.starting import all_layers
from .held import Held, stepped_by_zero
from .regularise import penalty, regularized, warn_unheld


class SpectralCallback(TrainerCallback):
    """Restores float32 masters, checks that the optimiser holds them, and logs the regulariser as `penalty`.

    TRL casts everything that learns to bfloat16 on 4- and 8-bit bases, where steps of 1e-5 then round away.
    """

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        restore_masters(model, args)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        restore_masters(model, args)
        if model is None or optimizer is None:
            return
        warn_unmoved(model)
        keep_frozen(model, args.should_save)
        terms = [(layer, name) for layer in all_layers(model) for name in regularized(layer)]
        if not terms:
            return
        held = Held(optimizer)
        unheld = [term for term in terms if not any(p in held or stepped_by_zero(p) for p in term[0].learning(term[1]))]
        if unheld:
            warn_unheld(unheld)

    def on_log(self, args: Any, state: Any, control: Any, model: Any = None, logs: Any = None, **_: Any) -> None:
        if model is None or not logs or "loss" not in logs or not any(map(regularized, all_layers(model))):
            return
        with torch.no_grad():
            logs["penalty"] = penalty(model).item()
        if state.log_history:
            state.log_history[-1]["penalty"] = logs["penalty"]


def restore_masters(model: nn.Module | None, args: Any = None) -> None:
    """Makes the slots that learn float32 again, as the same parameters. DeepSpeed keeps masters of its own."""
    if model is None or getattr(args, "deepspeed", None) or getattr(args, "deepspeed_plugin", None):
        return
    for layer in all_layers(model):
        for adapter in layer.adapters:
            for name, parameter in layer.slots(adapter).items():
                if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
                    parameter.data = _master(parameter, layer.adapters[adapter].masters.get(name))


def warn_unmoved(model: nn.Module) -> None:
    """Warns where nothing of a model with adapters of the family learns: gradient checkpointing lets that train on."""
    names = sorted({name for layer in all_layers(model) for name in layer.active_adapters})
    if names and not any(parameter.requires_grad for parameter in model.parameters()):
        warnings.warn(
            f"No parameter of adapter {', '.join(map(repr, names))} learns, nor any other of the model: training will "
            "change nothing. Load the adapter with is_trainable=True.",
            stacklevel=2,
        )


def keep_frozen(model: nn.Module, here: bool) -> None:
    """Copies to the CPU, if `here`, what is frozen and ZeRO-3 has in parts.

    Trainer saves from one process what DeepSpeed gathers for it, and that is only what learns.
    """
    for layer in all_layers(model):
        for adapter, known in layer.adapters.items():
            frozen = dict(layer.peft_kasa_frozen[adapter].named_parameters())
            if any(map(in_zero3, frozen.values())):
                whole = wholes(frozen)
                known.gathered = {name: value.detach().to("cpu", copy=True) for name, value in whole.items() if here}


def _master(parameter: nn.Parameter, kept: torch.Tensor | None) -> torch.Tensor:
    """The float32 values before the cast, where they are still at hand and are what was cast."""
    if kept is not None and kept.device == parameter.device and torch.equal(kept.to(parameter.dtype), parameter.data):
        return kept
    return parameter.data.float()


def install() -> None:
    """Adds the callback to those that every Trainer starts with, once."""
    if SpectralCallback not in DEFAULT_CALLBACKS:
        DEFAULT_CALLBACKS.append(SpectralCallback)
