"""The verb for methods that start from data: runs a model over it and keeps what their starts need."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.base.base_weight import BaseWeight
from ..adapter.base.fingerprint import SIDE, sketch
from ..adapter.budget import start_adapter
from ..adapter.files.statistics import Statistics
from ..adapter.files.statistics_file import About, Where
from ..adapter.layer import SpectralLinear
from ..adapter.starting import adapter_names, layers_of, start_layers
from ..files import check_writable
from ..methods.method import SpectralConfig
from ..methods.site import Needs
from ..spectral import triangle
from .batches import Batch, Reread, batches
from .passes import Pass, compatible
from .targets import inner, targets

MEMORY = 2**30  # bytes of mean gradients, where no more is said


def calibrate(
    model: nn.Module,
    data: Any,
    adapter: str | SpectralConfig = "default",
    *,
    tokenizer: Any = None,
    samples: int = 256,
    batch_size: int = 1,
    max_length: int = 2048,
    path: Where | None = None,
    device: torch.device | str | None = "cpu",
    memory: int | None = None,
    labels_only: bool = False,
    progress: bool | None = None,
) -> Statistics:
    """Gives a method that starts from data what it needs: the moments of inputs, or the mean gradients of weights.

    The model runs in evaluation mode with its adapters off, and is left as it was. Padding does not count. Moments do
    not depend on the batch size; modules with the same inputs share them. The mean gradient is that of the loss that
    the model returns, each batch counted by its sequences.

    Args:
        model: a model with an adapter (from `get_peft_model`, `add_adapter`, ...), which starts at the end of this; or,
            with a config for `adapter`, one that has none yet.
        data: texts, rows or batches: see `batches`. It may be needed more than once, in the same order.
        adapter: its name; or a config, of which `statistics` are then set, for `get_peft_model(model, config)` or
            TRL's `SFTTrainer(peft_config=config)`.
        tokenizer: for texts, messages, prompts and completions.
        samples: at most so many sequences.
        batch_size: of rows, not of batches that come as such.
        max_length: likewise.
        path: a file to keep the statistics in. It is saved every few minutes and when interrupted, and the same call
            goes on from there, or reuses it where it is complete. Memory is free of it afterwards.
        device: where sums are kept. None: where the inputs or weights are.
        memory: bytes of moments or mean gradients that are held at once: one pass over the data for each such group of
            modules, whose starts are computed before the next. None: 2**30 for gradients, any for moments, in one pass.
            A config without `path` needs all at once, and so does a rank_budget, which compares all modules.
        labels_only: only tokens that are labels count as inputs (EVA's way in PEFT).
        progress: whether to show a bar. None: on a terminal.

    Returns:
        What the adapter has started from, and what `statistics` of the config is. Without a `path`, gradients, and
        moments where `memory` is given, are freed once an adapter that is there has started from them: `statistics` is
        None then. Where a config is given, they live as long as it refers to them, for it may start other adapters.

    Raises:
        ValueError: the method needs no data; data that cannot be used; a module that it never calls, or that gets no
            gradient; NaN or infinity; a file of something else. Each names the module or the file, and the remedy.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from peft_kasa import CorDAConfig
        >>> from peft_kasa import calibrate
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4))
        >>> model = get_peft_model(model, CorDAConfig(r=2, target_modules=["0", "2"]))
        >>> calibrate(model, [{"input": torch.randn(4, 5, 8)}])
        Statistics(scaled inputs of 2 modules in 2 groups, 4 sequences)
    """
    if samples < 1 or (memory is not None and memory < 1):
        raise ValueError(f"`samples` and `memory` have to be at least 1. Found {samples} and {memory}.")
    config, layers = _subject(model, adapter)
    if hasattr(data, "__next__"):  # it can be read once only
        data = Reread(data)

    def stream() -> Iterator[Batch]:
        return batches(data, tokenizer, batch_size, max_length, config.needs == "gradients")

    title = f"{config.name}: {config.needs}"
    task = Pass(inner(model), stream, config.needs, samples, labels_only, device, progress, title)
    modules = {layer.name: layer.base_layer for layer in layers} or targets(model, config)
    path = "" if path is None else os.fsdecode(path)
    bounded = memory is not None or config.needs == "gradients"
    streamed = bounded and (path or layers) and config.rank_budget is None
    if config.needs == "gradients" and not streamed:
        _warn_of_size(modules)
    groups = _groups(modules, memory or MEMORY, config.needs) if streamed else [list(modules)]
    work = _Work(task, modules, _sketches(modules), path)
    before = config.statistics
    parts: list[Statistics] = []
    try:
        for number, names in enumerate(groups):
            part = work(names, f"{path}.{number}-of-{len(groups)}" if path and len(groups) > 1 else path)
            if parts and part.about.digest != parts[0].about.digest:
                raise ValueError("Data has to come in the same order each time. Found another: turn shuffling off.")
            if layers:
                config.statistics = part
                _start(model, str(adapter), [layer for layer in layers if layer.name in names])
            parts.append(part.freed() if layers and bounded and not path else part)
        whole = parts[0] if len(parts) == 1 else work.joined(parts)
    except BaseException:
        config.statistics = before
        raise
    config.statistics = None if whole.is_freed else whole
    return whole


class _Work:
    """The passes of one calibration, each for some of the modules, and their files."""

    def __init__(self, task: Pass, modules: Mapping[str, nn.Module], sketches: Mapping[str, Tensor], path: str) -> None:
        self.task, self.modules, self.sketches, self.path = task, modules, sketches, path
        if os.path.isdir(path):
            raise ValueError(f"`path` has to be of a file. Found {path}, a folder: name a file in it.")
        self.whole = self._reopened(path, list(modules))
        if path and not (self.whole and self.whole.about.complete):  # a complete one may be read alone
            check_writable(path)

    def __call__(self, names: list[str], path: str) -> Statistics:
        """The statistics of these modules, kept in a file of this path if that is not empty."""
        found = self.whole or self._reopened(path, names)
        return self.task({name: self.modules[name] for name in names}, self._about(names), path, found)

    def joined(self, parts: list[Statistics]) -> Statistics:
        """One for all; its file takes the place of those of the parts."""
        whole = Statistics.joined(parts)
        if self.path and any(part is not self.whole for part in parts):
            whole.save(self.path)
            for part in parts:
                if part.path != os.path.abspath(self.path):
                    os.unlink(part.path)
        return Statistics.load(self.path) if self.path else whole

    def _reopened(self, path: str, names: list[str]) -> Statistics | None:
        if not (path and os.path.exists(path)):
            return None
        found = Statistics.load(path, partial=True)
        compatible(found, self._about(names), path)
        if found.seen > self.task.samples:
            raise ValueError(
                f"{path} is of {found.seen} sequences. Found samples={self.task.samples}: give another `path`."
            )
        return found

    def _about(self, names: list[str]) -> About:
        sketches = {name: self.sketches[name] for name in names}
        return About(self.task.kind, 0, False, "", self.task.labels_only, tuple(names), sketches)


def _subject(model: nn.Module, adapter: str | SpectralConfig) -> tuple[SpectralConfig, list[SpectralLinear]]:
    """The config, and the layers of an adapter that is there already."""
    if isinstance(adapter, SpectralConfig):
        layers, config = [], adapter
    elif isinstance(adapter, str):
        if adapter not in (there := adapter_names(model)):
            raise ValueError(
                f"The model has no adapter {adapter!r} of peft_kasa. Found {there}: name one of these, or give the "
                "config that you will make one with."
            )
        layers = list(layers_of(model, adapter))
        config = layers[0].adapters[adapter].config
    else:
        raise TypeError(f"`adapter` has to be a name or a config of peft_kasa. Found {type(adapter).__name__}.")
    if not config.needs:
        raise ValueError(
            f"{config.name} starts from the weights alone, so there is nothing to calibrate. Found {config!r}."
        )
    if any(layer.has_moved(str(adapter)) for layer in layers):
        raise ValueError(
            f"Adapter {adapter!r} has been trained, or came from a file, and calibrating would start it afresh. Add "
            "another for that."
        )
    return config, layers


def _start(model: nn.Module, adapter: str, layers: list[SpectralLinear]) -> None:
    if layers[0].adapters[adapter].config.rank_budget is None:
        start_layers(layers, adapter)
    else:  # chooses ranks first, over all modules
        start_adapter(model, adapter, again=True)


def _warn_of_size(modules: Mapping[str, nn.Module]) -> None:
    """Where mean gradients are all held at once, and are many."""
    if (held := sum(4 * math.prod(_shape(module)) for module in modules.values())) > MEMORY:
        warnings.warn(
            f"All mean gradients are held at once: {held / 1e9:.1f} GB. With `path`, or on an adapter that is there "
            "already, and without a rank_budget, they are streamed.",
            stacklevel=3,
        )


def _groups(modules: Mapping[str, nn.Module], memory: int, kind: Needs) -> list[list[str]]:
    """Neighbours whose statistics fit the memory together, whatever they share."""
    groups: list[list[str]] = []
    room = 0
    for name, module in modules.items():
        m, n = _shape(module)
        size = 4 * m * n if kind == "gradients" else triangle.size(n)
        if not groups or size > room:
            groups.append([])
            room = memory
        groups[-1].append(name)
        room -= size
    return groups


def _shape(module: Any) -> tuple[int, int]:
    """(out, in) of a layer, however its weight is stored."""
    if hasattr(module, "in_features"):
        return module.out_features, module.in_features
    n, m = module.weight.shape  # Conv1D
    return m, n


@torch.no_grad()
def _sketches(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """What tells the base: NaN, which tells nothing, of weights that are not there."""
    found = {}
    for name, module in modules.items():
        weight = BaseWeight(module).matrix(as_repacked=True)
        found[name] = torch.full((SIDE, SIDE), torch.nan) if weight.is_meta else sketch(weight)
    return found
