"""What adapters add to a weight, as a value; writing that into the base weight, and putting the exact bits back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor

from ..spectral import LowRank
from ..spectral.products import exact_products
from . import slots as slot
from .base.sharding import in_parts
from .filling import Filling


class Merging(Filling):
    """The part of a `SpectralLinear` that knows its update, merges it, and takes it back.

    The merged weight is original + the joint update of all merged adapters, rounded once to the base's dtype, or
    requantised once. `merge_rounding` tells what that lost, relative to the update. While merged, the original is kept:
    on the CPU where it is float, as it stands where it is quantised.
    """

    merge_rounding: float = 0.0
    _original: Any = None

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
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
    def unmerge(self) -> None:
        """Puts the original weight back, bit for bit."""
        if self.merged_adapters:
            self.base.restore(self._original)
        self._original, self.merged_adapters, self.merge_rounding = None, [], 0.0

    @torch.no_grad()
    def original(self) -> Tensor:
        """The base weight (m, n) in float32 without what is merged into it."""
        if not (names := list(self.merged_adapters)):
            return self.base.matrix(as_repacked=True)
        self.unmerge()
        weight = self.base.matrix(as_repacked=True).clone()
        self.merge(adapter_names=names)
        return weight

    def value(self, adapter: str) -> LowRank:
        """What learns, as it is now: left (m, k), core, right (k, n), differentiable (but for ZeRO-3's)."""
        self.settle(adapter)
        slots, config = self.whole_slots(adapter), self.adapters[adapter].config
        if slot.through_base(slots):
            slots = slots | {"left0": self.original().to(slots["right0"].device) @ slots["right0"].float().T}
        return slot.value(slots, config)

    def lowrank(self, *adapters: str) -> LowRank:
        """The whole update of these adapters together, the base not included: exact, and of low rank."""
        for name in adapters:
            self.settle(name)
        every = {name: self.whole_slots(name) for name in adapters}
        with exact_products(self.base.device.type):
            weight = self.original() if any(map(slot.through_base, every.values())) else None
            return self.joint(every, weight).lowrank()

    def joint(self, every: Mapping[str, slot.Slots], weight: Tensor | None) -> slot.Product:
        """The whole update of adapters with these slots, which `torch.vmap` may stack.

        Args:
            every: the slots by adapter.
            weight: the base weight (m, n) in float32, where a left factor is made of it.
        """
        parts = []
        for name, slots in every.items():
            product = self._product(name, slots)
            if slot.through_base(slots):
                product = product._replace(up=weight @ product.up)  # type: ignore[operator]
            parts.append(product)
        if (cut := slot.largest_cut(every.values())) is not None:
            parts.append(slot.Product(-cut.up.float(), None, cut.down.float()))
        return slot.join(parts)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The adapter's update in float32 and in the layout of the base weight: (out, in), Conv1D's (in, out)."""
        with exact_products(self.base.device.type):
            dense = self.lowrank(adapter).dense()
        return dense.T if self.base.transposed else dense

    def _product(self, adapter: str, slots: slot.Slots) -> slot.Product:
        known = self.adapters[adapter]
        return slot.update(slots, known.config, known.scale)
