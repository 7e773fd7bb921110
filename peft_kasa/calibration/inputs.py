"""Moments of the inputs of modules, from one batch after another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.files.statistics_file import Value
from ..methods.site import Needs
from ..spectral.shared import Shared
from .batches import IGNORED, Batch
from .hooks import Device, accepts, input_of, removed, sparing


class Inputs:
    """Moments of the inputs of modules, in one pass.

    Args:
        model: what is called with a batch.
        modules: base layers by name.
        kind: "inputs", or "scaled inputs": each sequence is divided by its largest input first (CorDA).
        labels_only: count only tokens that are labels.
        device: where sums are kept. None: where the inputs are.
        known: what to go on with.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        kind: Needs,
        labels_only: bool,
        device: Device,
        known: Mapping[str, Any],
    ) -> None:
        self.model, self.modules = model, modules
        self.scaled, self.labels_only = kind == "scaled inputs", labels_only
        self.shared = Shared(device, known)
        self.dirty = False  # a batch has come in by half
        self._mask: Tensor | None = None
        self._rows = 0
        self._has_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))

    @torch.no_grad()
    def take(self, batch: Batch) -> None:
        """Takes in a batch."""
        self._mask, self._rows = self._counted(batch), len(next(iter(batch.values())))
        spare = {"labels"} if accepts(self.model, "input_ids") and not self._has_decoder else set()  # only for a loss
        given = {key: value for key, value in batch.items() if key not in spare}
        self.model(**given, **sparing(self.model, self.modules))
        self.dirty = False

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Listens to the modules."""
        handles = [
            module.register_forward_pre_hook(partial(self._seen, name), with_kwargs=True)
            for name, module in self.modules.items()
        ]
        with removed(handles):
            yield

    def values(self) -> dict[str, Value]:
        """What there is, by module."""
        return {name: stream for names, stream in self.shared.groups() for name in names}

    def _counted(self, batch: Batch) -> Tensor | None:
        """True for the tokens that count, or None for all."""
        mask = batch.get("attention_mask")
        mask = None if mask is None else mask.bool()
        if self.labels_only:
            if "labels" not in batch:
                raise ValueError("labels_only needs `labels` in the data. Found none: give prompts and completions.")
            learnt = batch["labels"] != IGNORED
            mask = learnt if mask is None else mask & learnt
        padded = mask is not None and not mask.all()
        if self._has_decoder and "decoder_input_ids" not in batch and "labels" in batch:
            padded |= bool((batch["labels"] == IGNORED).any())  # what the decoder reads is made of them
        if not padded:
            return None
        if self._has_decoder:
            raise ValueError("An encoder and a decoder need a batch without padding. Found some: take batch_size=1.")
        return mask

    def _seen(self, name: str, _: nn.Module, args: Any, kwargs: Any) -> None:
        x = input_of(args, kwargs)
        try:
            x, mask = self._fitted(x)
            if self.scaled:
                x = _divided(x, mask)
            self.dirty = True
            self.shared.update(name, x, mask)
        except ValueError as error:
            remedy = "" if torch.isfinite(x).all() else " Find the sequence of these, or load the base in float32."
            raise ValueError(f"{name}: {error}{remedy}") from error

    def _fitted(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The input with its sequences apart where that matters, and its mask."""
        mask, rows = self._mask, self._rows
        if mask is None:
            if not self.scaled or (x.ndim > 2 and len(x) == rows):
                return x, None
            if rows == 1:
                return x.reshape(1, -1, x.shape[-1]), None
        elif x.shape[:-1] == mask.shape:
            return x, mask
        elif x.ndim == 2 and len(x) == mask.numel():
            return x.reshape(*mask.shape, -1), mask
        place = "without padding" if mask is None else f"with a mask {tuple(mask.shape)}"
        raise ValueError(
            f"Inputs have to be of shape (batch, tokens, n) where sequences differ in what counts. Found "
            f"{tuple(x.shape)} {place}: take batch_size=1 (and not labels_only), or leave it out (exclude_modules)."
        )


def _divided(x: Tensor, mask: Tensor | None) -> Tensor:
    """Each sequence by the magnitude of its largest entry, in float32: (batch, ..., n). CorDA's largest is signed."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    shown = x if mask is None else x.masked_fill(~mask[..., None], -torch.inf)
    top = shown.flatten(1).amax(1)
    most = (x if mask is None else x.masked_fill(~mask[..., None], 0)).flatten(1).abs().amax(1)
    peak = torch.where(top <= 0, most, top)  # no entry above 0
    peak = torch.where(peak == 0, torch.ones_like(peak), peak)
    return x / peak.reshape(-1, *[1] * (x.ndim - 1))
