"""What `calibrate` has seen of data: the moments of each module's inputs, or the mean gradient of its weight."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from ...methods.site import Needs
from ...spectral.covariance import Covariance
from ..base.fingerprint import FOREIGN, distance
from . import statistics_file as disk
from .statistics_file import About, Value, Where


class Statistics:
    """The statistics of a model's modules over some data, by module name, in memory or in a file.

    `calibrate` makes them. Modules that see the same inputs (q, k, v; gate, up) share one covariance. Of a file, one
    module at a time is read; copies of a config share its statistics.

    Examples:
        >>> import tempfile, torch
        >>> from peft_kasa import CorDAConfig
        >>> from peft_kasa import calibrate
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3, bias=False), torch.nn.Linear(3, 2))
        >>> config = CorDAConfig(r=1, target_modules=["0", "1"])
        >>> batch = {"input": torch.tensor([[[1.0, 0, 0, 0], [0, 2.0, 0, 0]]])}
        >>> path = tempfile.mkdtemp() + "/statistics.safetensors"
        >>> statistics = calibrate(model, [batch], config, path=path)
        >>> statistics
        Statistics(scaled inputs of 2 modules in 2 groups, 1 sequence)
        >>> Statistics.load(path).evidence("0").matrix().diagonal().tolist()
        [0.25, 1.0, 0.0, 0.0]
    """

    def __init__(self, about: About, values: Mapping[str, Value], freed: bool = False) -> None:
        self._about = about
        self._values: Mapping[str, Value] | None = values
        self._freed = freed
        self._path: str = ""
        self._index = _index(values)
        self._read: weakref.WeakValueDictionary[int, Covariance] = weakref.WeakValueDictionary()

    @property
    def about(self) -> About:
        """What was done, besides its outcome."""
        return self._about

    @property
    def kind(self) -> Needs:
        """What was collected, in the words of `SpectralConfig.needs`."""
        return self._about.kind

    @property
    def seen(self) -> int:
        """How many sequences."""
        return self._about.seen

    @property
    def names(self) -> tuple[str, ...]:
        """The modules that there is evidence for."""
        return tuple(self._index)

    def evidence(self, name: str) -> Value:
        """What a start needs: the `Covariance` of the module's inputs, or the mean gradient (m, n) in float32.

        Raises:
            ValueError: there is none for this module, or it has been used up, or its file is damaged or written anew.
        """
        value = self.total(name)
        return value / self.seen if isinstance(value, Tensor) else value

    def total(self, name: str) -> Value:
        """As `evidence`, but gradients are summed over the sequences."""
        if self._freed:
            raise ValueError(
                f"{name}: its statistics were freed when the adapter had started from them. Call calibrate again, "
                "with `path` to keep them in a file."
            )
        if name not in self._index:
            raise ValueError(
                f"{name}: there are no statistics of it. Found {len(self._index)} other modules, such as "
                f"{sorted(self._index)[:3]}: calibrate with the target_modules that you train."
            )
        if self._values is not None:
            return self._values[name]
        group = self._index[name]
        if (value := self._read.get(group)) is None:
            value = disk.read(self._path, group, self._about, self._index)
            if isinstance(value, Tensor):
                return value
            self._read[group] = value
        return value

    def check(self, name: str, kind: Needs, sketch: Tensor) -> None:
        """Makes sure that these are the statistics that a module of a base needs: `sketch` is that of its weight.

        Raises:
            ValueError: of another kind, or of another base.
        """
        where = f" in {self._path}" if self._path else ""
        if kind != self.kind:
            raise ValueError(f"The start needs {kind}. Found statistics of {self.kind}{where}: calibrate for it.")
        saved = self._about.sketches.get(name)
        if saved is not None and (far := distance(saved, sketch)) > FOREIGN:
            raise ValueError(
                f"{name}: the statistics{where} are of another base model (relative distance {far:.2f} of the weights, "
                f"the limit is {FOREIGN}). Calibrate on this one, into another `path`."
            )

    def save(self, path: Where) -> None:
        """Writes a safetensors file, whole or not at all, holding one module's tensors at a time besides."""
        groups: dict[int, str] = {}
        for name, group in self._index.items():
            groups.setdefault(group, name)
        numbers = {group: number for number, group in enumerate(groups)}
        parts = {numbers[group]: (self._shape(name), partial(self.total, name)) for group, name in groups.items()}
        disk.write(path, self._about, {name: numbers[group] for name, group in self._index.items()}, parts)

    @classmethod
    def load(cls, path: Where, partial: bool = False) -> Statistics:
        """Opens a file that `save` wrote. Modules are read when they are asked for.

        Args:
            partial: whether the file of an interrupted calibration will do.

        Raises:
            FileNotFoundError: there is none.
            ValueError: damaged, or another's file, or interrupted.
        """
        about, index = disk.head(path)
        if not (about.complete or partial):
            raise ValueError(
                f"{path} is of a calibration that was interrupted after {about.seen} sequences. Call calibrate with "
                "this `path` again: it goes on from there."
            )
        return _in_file(about, index, os.path.abspath(path))

    @classmethod
    def joined(cls, parts: Sequence[Statistics]) -> Statistics:
        """The statistics of several groups of modules as one."""
        names = {name: part for part in parts for name in part.names}
        targets = tuple(name for part in parts for name in part.about.targets)
        sketches = {name: value for part in parts for name, value in part.about.sketches.items()}
        about = replace(parts[0].about, targets=targets, sketches=sketches)
        return cls(about, _Joined(names), any(part._freed for part in parts))

    @property
    def path(self) -> str:
        """The file they are read from, or ""."""
        return self._path

    @property
    def is_freed(self) -> bool:
        """Whether an adapter has used them up."""
        return self._freed

    def freed(self) -> Statistics:
        """These without their values."""
        found = Statistics(self._about, {}, freed=True)
        found._index = self._index
        return found

    def completed(self) -> Statistics:
        """These, said to be complete: the data had no more."""
        found = Statistics(replace(self._about, complete=True), {}, self._freed)
        found._values, found._index, found._path = self._values, self._index, self._path
        return found

    def _shape(self, name: str) -> tuple[int, ...]:
        if isinstance(self._values, _Joined):
            return self._values.parts[name]._shape(name)
        if self._values is None:
            return disk.shape(self._path, self._index[name], self.kind)
        value = self._values[name]
        return tuple(value.shape) if isinstance(value, Tensor) else (len(value.mean),)

    def __deepcopy__(self, memo: Any) -> Statistics:
        return self  # configs are copied deeply

    def __reduce__(self) -> tuple[Callable[..., Statistics], tuple[Any, ...]]:
        if self._path:
            return _in_file, (self._about, self._index, self._path)  # the file may be gone: only a start reads it
        return Statistics, (self._about, dict(self._values or {}), self._freed)

    def __repr__(self) -> str:
        count, groups = len(self._index), len(set(self._index.values()))
        shared = f" in {groups} groups" if self.kind != "gradients" else ""
        rest = f"{self.seen} sequence{'s' * (self.seen != 1)}{'' if self._about.complete else ', interrupted'}"
        return f"Statistics({self.kind} of {count} modules{shared}, {rest}{', freed' if self._freed else ''})"


def _in_file(about: About, index: dict[str, int], path: str) -> Statistics:
    found = Statistics(about, {})
    found._values, found._index, found._path = None, index, path
    return found


class _Joined(Mapping[str, Value]):
    """The values of several statistics, read as they are asked for."""

    def __init__(self, parts: Mapping[str, Statistics]) -> None:
        self.parts = parts

    def __getitem__(self, name: str) -> Value:
        return self.parts[name].total(name)

    def __iter__(self) -> Any:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)


def located(given: Statistics | Where) -> Statistics:
    """A config's `statistics`: what it is, or the file that it names."""
    return given if isinstance(given, Statistics) else Statistics.load(given)


def _index(values: Mapping[str, Value]) -> dict[str, int]:
    """Which group each module belongs to."""
    numbers: dict[object, int] = {}
    if isinstance(values, _Joined):
        groups = {name: (id(part), part._index[name]) for name, part in values.parts.items()}
        return {name: numbers.setdefault(group, len(numbers)) for name, group in groups.items()}
    return {name: numbers.setdefault(id(value), len(numbers)) for name, value in values.items()}
