"""Merging a whole model's adapters into its base weights: what is wrong is said before anything is merged."""

from __future__ import annotations

import logging
import warnings
from typing import Any

from peft.tuners.tuners_utils import BaseTuner

from .base.guarding import guard
from .choosing import check_known
from .layer import SpectralLinear
from .starting import all_layers, settle

logger = logging.getLogger(__name__)

NOTABLE_ROUNDING = 1e-2  # a merge that loses more of the update than this warns


class MergingModels(BaseTuner):
    """The part of a `SpectralModel` that merges and unloads."""

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As in PEFT; warns with what rounding to the base's storage lost, if that is notable."""
        check_known(self, adapter_names)
        settle(self.model, adapter_names or self.active_adapters)
        if safe_merge:
            _check_finite(list(all_layers(self.model)), adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)
        _report_rounding(list(all_layers(self.model)))

    def _unload_and_optionally_merge(self, merge: bool = True, safe_merge: bool = False, **kwargs: Any) -> Any:
        check_known(self, kwargs.get("adapter_names"))
        settle(self.model, (kwargs.get("adapter_names") or self.active_adapters) if merge else ())
        layers = list(all_layers(self.model))
        if merge and safe_merge:
            _check_finite(layers, kwargs.get("adapter_names"))
        if not merge:
            for layer in layers:
                layer.unmerge()
                layer.base.undo()
        guard(self.model, False)
        model = super()._unload_and_optionally_merge(merge=merge, safe_merge=safe_merge, **kwargs)
        if merge:
            _report_rounding(layers)
        return model


def _check_finite(layers: list[SpectralLinear], adapters: list[str] | None) -> None:
    """Before anything is merged, so that nothing is merged by half."""
    for layer in layers:
        for adapter in (name for name in adapters or layer.active_adapters if name in layer.adapters):
            for slot, value in layer.slots(adapter).items():
                if not value.isfinite().all():
                    raise ValueError(f"{layer.name}: {slot} of adapter {adapter!r} has NaN or infinite entries.")


def _report_rounding(layers: list[SpectralLinear]) -> None:
    layers = [layer for layer in layers if layer.merged]
    worst = max(layers, key=lambda layer: layer.merge_rounding, default=None)
    if worst is None or not worst.merge_rounding:
        return
    text = (
        f"Merged into {len(layers)} modules. Rounding to the base's storage lost up to {worst.merge_rounding:.1%} of "
        f"the update ({worst.name})."
    )
    if worst.merge_rounding > NOTABLE_ROUNDING:
        warnings.warn(text + " Keep the adapter, or export_lora it, where that matters.", stacklevel=3)
    else:
        logger.info(text)
