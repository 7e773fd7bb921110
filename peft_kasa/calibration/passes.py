"""One pass over data that can be interrupted and taken up again."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..adapter.base.fingerprint import FOREIGN, distance
from ..adapter.files.statistics import Statistics
from ..adapter.files.statistics_file import About
from ..methods.site import Needs
from .batches import Batch
from .gradients import Gradients
from .hooks import Device
from .inputs import Inputs
from .undisturbed import deferred, undisturbed

logger = logging.getLogger(__name__)

SAVE_EVERY = 180.0  # seconds, or ten times what saving takes
Collector: TypeAlias = Inputs | Gradients


@dataclass(frozen=True)
class Pass:
    """What all passes of a calibration have in common."""

    model: nn.Module
    batches: Callable[[], Iterator[Batch]]  # the data, from its beginning
    kind: Needs
    samples: int
    labels_only: bool
    device: Device
    progress: bool | None
    title: str

    def __call__(
        self, modules: Mapping[str, nn.Module], about: About, path: str, found: Statistics | None
    ) -> Statistics:
        """The statistics of these modules.

        Args:
            modules: base layers by name.
            about: what to collect of whom.
            path: where to keep it, every few minutes and at the end; "" for memory alone.
            found: what to go on with: it has seen the first sequences of the data.

        Raises:
            ValueError: the data is not what `found` has seen, cannot be used, or leaves a module out.
        """
        run = _Run(self, modules, about, path, found)
        statistics = run.through()
        for name in modules:
            if name not in statistics.names:
                raise ValueError(
                    f"{name}: it was never called by the {statistics.seen} sequences, so there are no statistics of it."
                    " Leave it out (exclude_modules), or give data that uses it."
                )
        return statistics

    def collector(self, modules: Mapping[str, nn.Module], known: Mapping[str, Any]) -> Collector:
        if self.kind == "gradients":
            return Gradients(self.model, modules, self.device, known)
        return Inputs(self.model, modules, self.kind, self.labels_only, self.device, known)


class _Run:
    """A pass while it runs."""

    def __init__(
        self, task: Pass, modules: Mapping[str, nn.Module], about: About, path: str, found: Statistics | None
    ) -> None:
        self.task, self.modules, self.about, self.path, self.found = task, modules, about, path, found
        self.before = found.seen if found else 0
        self.seen, self.saved = 0, self.before
        self.digest = ""
        self.collector: Collector | None = None
        self.clock, self.pause = time.monotonic(), SAVE_EVERY

    def through(self) -> Statistics:
        task = self.task
        hidden = None if task.progress is None else not task.progress  # tqdm's own None: where there is no terminal
        bar = tqdm(total=task.samples, desc=task.title, unit="sequence", leave=False, disable=hidden)
        try:
            with bar, ExitStack() as stack, deferred() as interrupted:
                for batch in task.batches():
                    fresh, digest = self._fresh(batch)
                    if fresh is not None:
                        self._take(fresh, stack)
                        self.seen += len(next(iter(fresh.values())))
                    self.digest = digest  # only now: what is saved has to be of the sequences that were taken in
                    bar.update(self.seen - bar.n)
                    if interrupted():
                        raise KeyboardInterrupt
                    if self.seen == task.samples:
                        break
                    if time.monotonic() - self.clock > self.pause:
                        self._save()
        except BaseException:
            if self._save():
                logger.warning("saved %s after %d sequences; the same call goes on from there", self.path, self.seen)
            raise
        if self.seen < self.before:
            self._refuse(f"it has seen {self.before} sequences, and the data has {self.seen}")
        if self.seen == 0:
            raise ValueError("Data has to have at least one sequence with tokens that count. Found none.")
        return self._result()

    def _fresh(self, batch: Batch) -> tuple[Batch | None, str]:
        """The rows of a batch that are new, and wanted; and the digest with all of its rows."""
        rows = min(len(next(iter(batch.values()))), self.task.samples - self.seen)
        old = min(rows, max(0, self.before - self.seen))
        digest = self.digest
        for row in range(rows):
            digest = _chained(digest, batch, row)
            if self.seen + row + 1 == self.before and self.found and digest != self.found.about.digest:
                self._refuse("it was made from other data, or data in another order, or another max_length")
        self.seen += old
        return (None if old == rows else {key: value[old:rows] for key, value in batch.items()}), digest

    def _take(self, batch: Batch, stack: ExitStack) -> None:
        if self.collector is None:
            if self.path and self.found and set(self.found.about.targets) > set(self.modules):
                self._refuse("it is of more modules than this call collects, and going on would lose them")
            known = {name: self.found.total(name) for name in self.modules if self.found and name in self.found.names}
            self.collector = self.task.collector(self.modules, known)
            stack.enter_context(undisturbed(self.task.model))
            stack.enter_context(self.collector.hooked())
        device = _device(self.task.model)
        self.collector.take({key: value.to(device) for key, value in batch.items()})

    def _result(self) -> Statistics:
        if self.collector is None and self.found is not None:
            if self.found.about.complete:
                return self.found
            statistics = self.found.completed()
        else:
            assert self.collector is not None
            statistics = Statistics(self._about(True), self.collector.values())
        if not self.path:
            return statistics
        statistics.save(self.path)
        return Statistics.load(self.path)

    def _about(self, complete: bool) -> About:
        return replace(self.about, seen=self.seen, complete=complete, digest=self.digest)

    def _save(self) -> bool:
        """Saves what is new, unless it is of half a batch. Whether it did."""
        if not self.path or self.collector is None or self.collector.dirty or self.seen <= self.saved:
            return False
        start = time.monotonic()
        Statistics(self._about(False), self.collector.values()).save(self.path)
        self.saved, self.clock = self.seen, time.monotonic()
        self.pause = max(SAVE_EVERY, 10 * (self.clock - start))
        return True

    def _refuse(self, reason: str) -> None:
        where = os.path.basename(self.path) if self.path else "a pass before"
        raise ValueError(
            f"{where} does not go with this call: {reason}. Give the data that it is of, not shuffled, or another "
            "`path`. (`statistics=` of the config takes a complete file as it is.)"
        )


def compatible(found: Statistics, about: About, path: str) -> None:
    """Makes sure that a file may be gone on with.

    Raises:
        ValueError: another kind, other modules, another base or other settings.
    """
    old = found.about
    remedy = "Give another `path`."
    if old.kind != about.kind:
        raise ValueError(f"{path} is of {old.kind}, and {about.kind} are needed. {remedy}")
    if old.labels_only != about.labels_only:
        raise ValueError(f"{path} is with labels_only={old.labels_only}. Found {about.labels_only}. {remedy}")
    if missing := [name for name in about.targets if name not in old.targets]:
        raise ValueError(f"{path} is not of {missing[0]} ({len(missing)} such modules). {remedy}")
    for name in about.targets:
        if (far := distance(old.sketches[name], about.sketches[name])) > FOREIGN:
            raise ValueError(
                f"{path} is of another base model: {name} differs by {far:.2f} of its norm, the limit is {FOREIGN}. "
                f"{remedy}"
            )


def _chained(before: str, batch: Batch, row: int) -> str:
    """A digest of a sequence and all before it, whatever the padding."""
    found = hashlib.sha256(before.encode())
    mask = batch["attention_mask"][row].bool() if "attention_mask" in batch else None
    for key in sorted(batch):
        value: Tensor = batch[key][row]
        if mask is not None and value.shape[:1] == mask.shape:
            value = value[mask]
        found.update(key.encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _device(model: nn.Module) -> torch.device:
    """Where a model takes its inputs."""
    places = (value.device for value in model.parameters() if value.device.type != "meta")
    return next(places, torch.device("cpu"))
