"""A saved adapter, read without its base: its config, its tensors by module, and their updates of the weights."""

from __future__ import annotations

import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor

from ..adapter.files import source
from ..adapter.layer import SpectralLinear
from ..methods.method import require
from ..spectral import LowRank

ROOT = "base_model.model."  # what PEFT puts before each name in a file


class AdapterFile(ABC):
    """What `config` and tensors say, for one kind of adapter."""

    def __init__(self, path: str, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.path, self.fields, self.tensors = path, fields, tensors

    @property
    @abstractmethod
    def method(self) -> str:
        """Its name."""

    @cached_property
    @abstractmethod
    def slots(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of each module by their names in it."""

    @abstractmethod
    def rank(self, name: str) -> int:
        """r of a module."""

    @abstractmethod
    def learns(self, key: str) -> bool:
        """Whether what the file holds under this key was trained."""

    @abstractmethod
    def update(self, name: str, layer: SpectralLinear | None = None) -> LowRank | None:
        """What the adapter adds to a module's weight (m, n). None: that takes the base weight, and none is given.

        Raises:
            ValueError: the base weight is another, or of another shape. It names the module.
        """

    @property
    def trained(self) -> int:
        """How many numbers were trained."""
        return sum(value.numel() for key, value in self.tensors.items() if self.learns(key))

    @property
    def facts(self) -> dict[str, Any]:
        """What there is to say of it as a whole."""
        targets = self.fields.get("target_modules")
        return {
            "path": self.path,
            "method": self.method,
            "base_model": self.fields.get("base_model_name_or_path"),
            "target_modules": sorted(targets) if isinstance(targets, list) else targets,
            "ranks": sorted({self.rank(name) for name in self.slots}),
            "modules": len(self.slots),
            "trained": self.trained,
            "stored": sum(value.numel() for value in self.tensors.values()),
            "bytes": os.path.getsize(os.path.join(self.path, SAFETENSORS_WEIGHTS_NAME)),
            "dtypes": sorted({str(value.dtype).removeprefix("torch.") for value in self.tensors.values()}),
        }

    def found(self, pattern: str) -> Iterator[tuple[str, str, Tensor]]:
        """The module, the group "slot" and the tensor of each key that is `ROOT`, a module's name and a pattern."""
        for key, value in self.tensors.items():
            if match := re.fullmatch(re.escape(ROOT) + r"(?P<module>.+?)\." + pattern, key):
                yield match["module"], match["slot"], value


def read_files(path: str | os.PathLike[str]) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """The path, config and tensors of an adapter's folder.

    Raises:
        ValueError: it is no such folder; a file is damaged or a pickle; a tensor is not finite, which is named.
    """
    path = os.fspath(path)
    config = Path(path) / CONFIG_NAME
    rule = (
        f"{path} has to be the folder of a saved adapter, with a {CONFIG_NAME}. For one on the Hub, download it first"
    )
    require(config.is_file(), f"{rule}: huggingface_hub.snapshot_download", "no such file")
    fields = _fields(config)
    files = sorted(name for name in os.listdir(path) if name.startswith("adapter_model."))
    require(
        bool(files), f"{path} has to hold {SAFETENSORS_WEIGHTS_NAME}. Save the adapter again", sorted(os.listdir(path))
    )
    source.check(path)
    tensors = load_file(os.path.join(path, SAFETENSORS_WEIGHTS_NAME))
    for key, value in tensors.items():
        bad = int((~value.isfinite()).sum())
        rule = f"{path}: {key.removeprefix(ROOT)} has to be finite. Use another checkpoint"
        require(bad == 0, rule, f"{bad} NaN or infinite entries")
    return path, fields, tensors


def _fields(config: Path) -> dict[str, Any]:
    try:
        fields = json.loads(config.read_text())
    except ValueError as error:
        raise ValueError(f"{config} is damaged ({error}). Restore it from its source.") from error
    require(isinstance(fields, dict), f"{config} has to hold an object", type(fields).__name__)
    return fields
