"""How the slots of a layer get their values: from the method's start, or from a file."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from ..methods.method import SpectralConfig, require
from ..methods.site import Site, Start
from ..spectral import Engine
from ..spectral.checksum import checksum
from ..spectral.plan import Outline, Solver
from ..spectral.products import exact_products
from . import slots as slot
from .base.fingerprint import FINGERPRINT, SIDE, sketch
from .base.sharding import whole
from .files import anchors, checkpoint
from .files.statistics import located
from .known import Adapter
from .slotted import Slotted

_settling = threading.RLock()


class Holder(nn.Module):
    """The slots of an adapter in a layer: float32 whatever the model is cast to, or masters, fingerprints and patterns
    would lose what they are for."""

    def _apply(self, fn: Any, recurse: bool = True) -> Holder:
        def moved(value: Tensor) -> Tensor:
            made = fn(value)
            return made if made.dtype == value.dtype else value.to(made.device)  # not rounded and widened again

        return super()._apply(moved, recurse)


class Filling(Slotted):
    """The part of a `SpectralLinear` that makes slots and gives them values."""

    def reserve(self, adapter: str, config: SpectralConfig) -> None:
        """Makes the slots of an adapter, without values: NaN until `start` or a file gives them."""
        m, n = self.out_features, self.in_features
        rank = given_rank(config, self.pattern_name) or config.r or min(m, n)
        scale = module_scale(config, self.pattern_name, rank)
        rule = f"{self.name}: r has to be at most min(out, in) = min({m}, {n}) (see rank_pattern, exclude_modules)"
        require(rank <= min(m, n), rule, rank)
        known = self.adapters[adapter] = Adapter(config, rank, scale)
        outline = Outline(torch.empty(m, n, device="meta"))
        start = self.start_at(adapter, outline.weight, outline)
        known.asks = outline.asked
        values = slot.pack(start)
        if not config.keeps_frames:
            values |= anchors.anchors(values, start.train)
        shapes = {name: tuple(value.shape) for name, value in values.items()} | {FINGERPRINT: (SIDE, SIDE)}
        self.peft_kasa_learnt[adapter], self.peft_kasa_frozen[adapter] = Holder(), Holder()
        for name, shape in shapes.items():
            empty = torch.full(shape, torch.nan, dtype=torch.float32, device=self.base.device)
            learns = name in start.train
            holder = self.peft_kasa_learnt if learns else self.peft_kasa_frozen
            holder[adapter].register_parameter(name, nn.Parameter(empty, requires_grad=learns))
            if learns:
                known.masters[name] = empty

    @torch.no_grad()
    def start(self, adapter: str, engine: Solver) -> None:
        """Gives the adapter its method's start, computed from the base weight."""
        self.fill(adapter, self._computed(adapter, engine))

    def fill(self, adapter: str, values: dict[str, Tensor]) -> None:
        """Gives the adapter the values of a start."""
        config, learnt = self.adapters[adapter].config, self.learnt(adapter)
        if not config.keeps_frames:
            values |= anchors.anchors(values, learnt)
        noise = None if config.init_weights else self._generator(adapter, "noise")
        for name, parameter in self.slots(adapter).items():
            parameter.copy_(values[name])
            if noise is not None and name in learnt:
                sample = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
                parameter.add_(sample.normal_(0, 0.05, generator=noise).to(parameter.device))

    @torch.no_grad()
    def frames(self, adapter: str, saved: Mapping[str, Tensor], engine: Solver) -> dict[str, Tensor]:
        """What a compact checkpoint leaves out: what is here if its anchors fit it, or else computed again.

        Raises:
            ValueError: the base weight does not give it; the message says what to do.
        """
        names, slots = checkpoint.left_out(self, adapter), self.slots(adapter)
        if not any(slots[name].is_meta or torch.isnan(slots[name]).any() for name in names):
            with suppress(ValueError):
                return anchors.aligned({name: slots[name] for name in names}, saved)
        values = self._computed(adapter, engine)
        try:
            return anchors.aligned({name: values[name] for name in names}, saved)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error

    def _rebuild(self, adapter: str) -> None:
        saved = {name: value for name, value in self.slots(adapter).items() if name.startswith(anchors.ANCHOR)}
        for name, value in self.frames(adapter, saved, Engine()).items():
            value = value.to(torch.float32, copy=True, memory_format=torch.contiguous_format)  # not a view of W
            self.peft_kasa_frozen[adapter].register_parameter(name, nn.Parameter(value, requires_grad=False))

    def remember(self, adapter: str) -> None:
        """Notes what the adapter starts from, to tell later whether it has been trained."""
        known = self.adapters[adapter]
        known.awaiting, known.start_checksums = False, self._state(adapter)

    def has_moved(self, adapter: str) -> bool:
        """Whether the adapter has values that are not its start's: it was trained, or came from a file."""
        known = self.adapters[adapter]
        return not known.awaiting and known.start_checksums != self._state(adapter)

    def _state(self, adapter: str) -> str:
        return repr([checksum(whole(value)) for value in self.peft_kasa_learnt[adapter].parameters()])

    def settle(self, adapter: str) -> None:
        """Makes sure that the adapter has values: a file's, checked, or else its method's start.

        Raises:
            ValueError: the method starts from statistics of data, and has none; or its ranks have not been chosen.
        """
        if not self.adapters[adapter].awaiting:
            return
        exact, inferred = exact_products(self.base.device.type), torch.inference_mode(False)
        with _settling, inferred, torch.no_grad(), exact:  # at a first forward pass, whatever it runs in
            if self.adapters[adapter].awaiting:  # no other thread was first
                self._settle(adapter)

    def _settle(self, adapter: str) -> None:
        known = self.adapters[adapter]
        if checkpoint.arrived(self, adapter):
            slots = self.slots(adapter)
            if any(torch.isnan(slots[name]).any() for name in checkpoint.left_out(self, adapter)):
                self._rebuild(adapter)
            known.awaiting = False
        elif known.uncalibrated:
            raise ValueError(
                f"{self.name}: adapter {adapter!r} ({known.config.name}) starts from {known.config.needs} of data and "
                f"has seen none. Call calibrate(model, data, adapter={adapter!r}) first. Where a trainer makes the "
                "adapter: calibrate(model, data, config), before the trainer is made."
            )
        elif known.config.rank_budget is not None and given_rank(known.config, self.pattern_name) is None:
            raise ValueError(
                f"{self.name}: the rank of adapter {adapter!r} has not been chosen (rank_budget), since its config was "
                "read from a file, to be filled from one. Give get_peft_model a new one: dataclasses.replace(config)."
            )
        else:
            self.start(adapter, Engine())
            self.remember(adapter)

    def _computed(self, adapter: str, engine: Solver) -> dict[str, Tensor]:
        """The slots of the start at the base weight, and the fingerprint of that."""
        weight = self.source(adapter)
        fingerprint = sketch(self.base.matrix(as_repacked=True))
        self._check_statistics(adapter, fingerprint)
        return slot.pack(self.start_at(adapter, weight, engine)) | {FINGERPRINT: fingerprint}

    def _check_statistics(self, adapter: str, fingerprint: Tensor) -> None:
        config = self.adapters[adapter].config
        if config.statistics is not None and config.needs:
            located(config.statistics).check(self.name, config.needs, fingerprint)

    def source(self, adapter: str) -> Tensor:
        """The weight (m, n) that the adapter starts from.

        What is left out of a checkpoint starts from a 4-bit weight as repacked, so that it comes out the same from a
        base that was evaluated before and from one that was not.
        """
        return self._intact(adapter, as_repacked=bool(checkpoint.left_out(self, adapter)))

    def _intact(self, adapter: str, as_repacked: bool = False) -> Tensor:
        """The base weight, which has to be there and finite."""
        weight = self.base.matrix(as_repacked)
        if weight.is_meta:
            raise ValueError(
                f"{self.name}: the base weight is on the meta device (offloaded, or not loaded yet), so {adapter!r} "
                "cannot start from it. Load the base onto a device first."
            )
        if not torch.isfinite(torch.linalg.vector_norm(weight)) and (bad := int((~torch.isfinite(weight)).sum())):
            raise ValueError(f"{self.name}: the base weight has {bad} NaN or infinite entries. Load an intact base.")
        return weight

    def _generator(self, adapter: str, use: str = "") -> torch.Generator:
        seed = self.adapters[adapter].config.seed
        return torch.Generator().manual_seed(zlib.crc32(f"{seed} {self.name} {use}".encode()))

    def site(self, adapter: str, weight: Tensor, engine: Solver) -> Site:
        """The layer as the adapter's method sees it."""
        known = self.adapters[adapter]
        evidence, sequences = None, 1
        if known.config.needs and not weight.is_meta and known.config.statistics is not None:
            known.config.statistics = located(known.config.statistics)
            evidence, sequences = known.config.statistics.evidence(self.name), known.config.statistics.seen
            seen = tuple(evidence.shape) if isinstance(evidence, Tensor) else (len(evidence.mean),)
            expected = tuple(weight.shape)[-len(seen) :]
            require(seen == expected, f"{self.name}: its statistics have to be of shape {expected}", seen)
        return Site(self.name, weight, known.rank, known.scale, self._generator(adapter), engine, evidence, sequences)

    @torch.no_grad()
    def shares(self, adapter: str, k: int, engine: Solver) -> Tensor:
        """What each of the k largest triples of the start's source holds of the whole, (k,): for `rank_budget`."""
        self._check_statistics(adapter, sketch(self.base.matrix(as_repacked=True)))
        site = self.site(adapter, self.source(adapter), engine)
        try:
            return self.adapters[adapter].config.shares(site, k)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error

    def start_at(self, adapter: str, weight: Tensor, engine: Solver) -> Start:
        """The method's start at a weight (m, n)."""
        try:
            return self.adapters[adapter].config.start(self.site(adapter, weight, engine))
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error


def given_rank(config: SpectralConfig, name: str) -> int | None:
    """The rank that rank_pattern gives a module, if any."""
    return _pattern(config.rank_pattern, name, None)


def module_scale(config: SpectralConfig, name: str, rank: int) -> float:
    """The scale s of a module that has this rank."""
    return config.scale(rank, _pattern(config.alpha_pattern, name, config.alpha))


def _pattern(patterns: dict[str, Any], name: str, default: Any) -> Any:
    return patterns.get(get_pattern_key(patterns.keys(), name), default)
