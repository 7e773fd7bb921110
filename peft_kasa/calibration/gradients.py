"""Gradients of the weights of modules, from one batch after another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.files.statistics_file import Value
from ..spectral.products import exact_products
from .batches import IGNORED, Batch
from .hooks import Device, input_of, removed, sparing

FP16_LOSS = 2.0**12  # gradients in float16 end at 6e-8: the loss is scaled by this power of 2, which rounds nothing


class Gradients:
    """The sum over sequences of the gradients of modules' weights, in one pass.

    A layer's gradient is dy^T x: weights themselves need none, so they may be quantised. The graph starts at the first
    module that is called: nothing is kept of what is below.

    Args: as for `Inputs`; `device=None`: where the weights are.
    """

    def __init__(
        self, model: nn.Module, modules: Mapping[str, nn.Module], device: Device, known: Mapping[str, Any]
    ) -> None:
        self.model, self.modules, self.device = model, modules, device
        self.totals: dict[str, Tensor] = {name: value.clone() for name, value in known.items()}
        self.dirty = False
        self._called: set[str] = set()
        self._reached: set[str] = set()
        self._factor = 1.0

    def take(self, batch: Batch) -> None:
        """Takes in a batch."""
        rows = len(next(iter(batch.values())))
        scale = FP16_LOSS if any(p.dtype == torch.float16 for p in self.model.parameters()) else 1.0
        self._factor = rows / scale
        self._called.clear()
        self._reached.clear()
        with torch.inference_mode(False), torch.no_grad():  # the modules' hooks switch gradients on
            loss = _loss(self.model(**_labelled(batch), **sparing(self.model, None)))
            if not torch.isfinite(loss).all():
                raise ValueError(f"The loss has to be finite. Found {loss.tolist()}: is there a token to predict?")
            if loss.requires_grad:
                with torch.enable_grad():
                    (loss * scale).backward()
        for name in self.modules:
            if name in self._called - self._reached:
                raise ValueError(
                    f"{name}: the loss gives it no gradient. A gradient needs outputs that the loss depends on, by "
                    "operations that can be differentiated: leave the module out (exclude_modules), or calibrate on "
                    "the base in float or 4 bits."
                )
        self.dirty = False

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Listens to the modules."""
        handles = [
            module.register_forward_hook(partial(self._seen, name), with_kwargs=True)
            for name, module in self.modules.items()
        ]
        with removed(handles):
            yield

    def values(self) -> dict[str, Value]:
        """What there is, by module: sums."""
        return {name: self.totals[name] for name in self.modules if name in self.totals}

    def _seen(self, name: str, _: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        x = input_of(args, kwargs)
        torch.set_grad_enabled(True)  # until `take` leaves its no_grad
        self._called.add(name)
        if output.requires_grad:
            output.register_hook(partial(self._add, name, x.detach(), x._version))
            return output
        if x.requires_grad:
            raise ValueError(
                f"{name}: no gradient passes through this layer as it is stored. Calibrate on the base in float, 4 or "
                "8 bits."
            )
        start = output.detach().requires_grad_()
        start.register_hook(partial(self._add, name, x.detach(), x._version))
        return start.clone()  # what comes next may write to it

    @torch.no_grad()
    def _add(self, name: str, x: Tensor, version: int, dy: Tensor) -> None:
        self._reached.add(name)
        if x._version != version:
            raise ValueError(
                f"{name}: its input is written to after it is used, so its gradient is lost. Leave it out."
            )
        m, n = dy.shape[-1], x.shape[-1]
        with exact_products(x.device.type):
            gradient = dy.reshape(-1, m).float().T @ x.reshape(-1, n).float()
        if not torch.isfinite(gradient.sum()) and (bad := int((~torch.isfinite(gradient)).sum())):
            raise ValueError(
                f"{name}: gradients have to be finite. Found {bad} NaN or infinite entries: load the base in bfloat16 "
                "or float32, or find the sequence that does this."
            )
        self.dirty = True
        if name not in self.totals:
            home = gradient.device if self.device is None else self.device
            self.totals[name] = torch.zeros(m, n, dtype=torch.float32, device=home)
        self.totals[name].add_(gradient.to(self.totals[name].device), alpha=self._factor)


def _labelled(batch: Batch) -> Batch:
    """With labels: the tokens themselves, unless there are others."""
    if "labels" in batch or "input_ids" not in batch:
        return batch
    labels = batch["input_ids"]
    if (mask := batch.get("attention_mask")) is not None:
        labels = labels.masked_fill(mask == 0, IGNORED)
    return batch | {"labels": labels}


def _loss(output: Any) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise ValueError(
            "The model has to return a loss where gradients are needed. Found none: take a model with a head, such as "
            "AutoModelForCausalLM, and data with `labels`."
        )
    return loss.mean()  # of several devices
