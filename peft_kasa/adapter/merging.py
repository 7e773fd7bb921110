"""Writing an update into the base weight, and putting the exact bits back."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor

from ..spectral.products import exact_products
from .base.sharding import in_parts


class Merging:
    """`merge` and `unmerge` of a layer.

    The merged weight is original + the joint update of all merged adapters, rounded once to the base's dtype, or
    requantised once. `merge_rounding` tells what that lost, relative to the update. While merged, the original is kept:
    on the CPU where it is float, as it stands where it is quantised.
    """

    merge_rounding: float = 0.0
    _original: Any = None

    @torch.no_grad()
    def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merges these adapters, or the active ones, into the base weight.

        Raises:
            ValueError: with `safe_merge`, where the result is not finite; or where processes hold the base weight in
                parts. The layer is left unmerged.
        """
        if in_parts(self.stored):
            raise ValueError(
                f"{self.name}: the base weight is in parts over several processes (FSDP2, ZeRO-3, tensor parallelism), "
                "which merging cannot write. Save the adapter and merge it in one process, or export_lora it."
            )
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.adapters]
        if not names:
            return
        names = [*self.merged_adapters, *names]
        self.unmerge()
        with exact_products(self.base.device.type):
            update = self.lowrank(*names).dense()
        merged = self.base.exact() + update
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(f"{self.name}: merging {names} gives NaN or infinite entries. The adapter seems broken.")
        self._original = self.base.overwrite(merged, self)
        self.merged_adapters = names
        lost = (self.base.exact() - merged).norm() / update.norm()
        self.merge_rounding = lost.nan_to_num(posinf=0.0).item()

    @torch.no_grad()
    def unmerge(self: Any) -> None:
        """Puts the original weight back, bit for bit."""
        if self.merged_adapters:
            self.base.restore(self._original)
        self._original, self.merged_adapters, self.merge_rounding = None, [], 0.0

    @torch.no_grad()
    def original(self: Any) -> Tensor:
        """The base weight (m, n) in float32 without what is merged into it."""
        if not (names := list(self.merged_adapters)):
            return self.base.matrix(as_repacked=True)
        self.unmerge()
        weight = self.base.matrix(as_repacked=True).clone()
        self.merge(adapter_names=names)
        return weight
