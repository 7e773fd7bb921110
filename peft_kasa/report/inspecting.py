"""`inspect`: what a saved adapter is, what it does to the weights, and how it compares with another."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress

import torch
from torch import nn
from tqdm.auto import tqdm

from ..adapter.layer import SpectralLinear
from ..adapter.supported import unsupported
from ..calibration.targets import inner
from ..methods.method import require
from ..peft_type import NAME
from .adapter_file import ROOT, AdapterFile, read_files
from .adapters import AdapterReport, ModuleUpdate
from .base_layers import weight_of
from .experts import expert_of
from .family_file import FamilyFile
from .lora_file import LoraFile
from .naming import Place, places
from .updates import beside, between, decomposed

KINDS: dict[str, type[AdapterFile]] = {NAME: FamilyFile, "LORA": LoraFile}


@torch.no_grad()
def inspect(
    adapter_path: str | os.PathLike[str],
    base: nn.Module | None = None,
    against: str | os.PathLike[str] | None = None,
    *,
    progress: bool | None = None,
) -> AdapterReport:
    """What a saved adapter is, and what it does to the weights: see `AdapterReport.rows`.

    From its files alone; with a base, beside its weights as well, at the price of a whole SVD of each. The base is not
    changed. Adapters of the family and plain LoRAs of PEFT are read.

    Args:
        adapter_path: the folder that `save_pretrained` or `export_lora` wrote.
        base: the model that the adapter is for, with its weights loaded.
        against: the folder of another adapter of the same modules, to compare with.
        progress: whether to show a bar. None: on a terminal.

    Raises:
        ValueError: no adapter's folder, an adapter that is not plain, a damaged file, NaN or infinite entries, or a
            base that it does not fit; what is at fault is named.

    Examples:
        >>> import tempfile, torch
        >>> from peft import get_peft_model
        >>> from peft_kasa import KaSAConfig
        >>> from peft_kasa.report import inspect
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 6)), KaSAConfig(r=2, target_modules=["0"]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(folder)
        ...     report = inspect(folder)
        >>> report.facts["method"], report.facts["trained"], report.rows()[0]["update_rank"]
        ('kasa', 30, 2)
    """
    one, other = _opened(adapter_path), None if against is None else _opened(against)
    names = _ordered(one.slots, base)
    where = places(names)
    modules = [
        _module(one, other, name, where[name], base)
        for name in tqdm(
            names, "updates", unit="module", leave=False, disable=None if progress is None else not progress
        )
    ]
    only = sorted(one.slots.keys() ^ other.slots.keys()) if other else []
    return AdapterReport(one.facts, modules, base is not None, other.facts if other else None, only)


def _ordered(names: Iterable[str], base: nn.Module | None) -> list[str]:
    """In the model's order where it is known (files hold names by letters), else with numbers in theirs."""
    known = {name: index for index, (name, _) in enumerate(inner(base).named_modules())} if base is not None else {}
    parts = {name: [(not part.isdigit(), part.zfill(9)) for part in name.split(".")] for name in names}
    return sorted(parts, key=lambda name: (known.get(name, len(known)), parts[name]))


def _opened(path: str | os.PathLike[str]) -> AdapterFile:
    path, fields, tensors = read_files(path)
    kind = fields.get("peft_type")
    require(kind in KINDS, f"{path}: peft_type has to be {' or '.join(KINDS)}", kind)
    opened = KINDS[kind](path, fields, tensors)  # type: ignore[index]
    _ = opened.slots  # what is wrong with them is said before any work
    return opened


def _module(
    one: AdapterFile, other: AdapterFile | None, name: str, place: Place, base: nn.Module | None
) -> ModuleUpdate:
    update = one.update(name, _layer(base, name))
    trained = sum(
        value.numel() for key, value in one.tensors.items() if key.startswith(f"{ROOT}{name}.") and one.learns(key)
    )
    found = ModuleUpdate(name, place, one.rank(name), trained)
    if update is None:
        return found
    spectrum = decomposed(update)
    layer = _layer(base, name)
    second = other.update(name, _layer(base, name)) if other and name in other.slots else None
    return ModuleUpdate(
        *(name, place, one.rank(name), trained),
        shape=(len(update.left), update.right.shape[1]),
        values=spectrum.s,
        beside=None if layer is None else beside(spectrum, weight_of(layer), one.rank(name), name),
        between=None if second is None else between(update, second),
    )


def _layer(base: nn.Module | None, name: str) -> SpectralLinear | None:
    """A fresh layer around the base's module, which stays as it is."""
    if base is None:
        return None
    if (expert := expert_of(inner(base), name)) is not None:
        return expert
    found = None
    with suppress(AttributeError):
        found = inner(base).get_submodule(name)
    require(found is not None, f"{name}: the base does not fit the adapter. It has no such module", type(base).__name__)
    if isinstance(found, SpectralLinear):
        require(not found.merged, f"{name}: the base has to be unmerged. Call unmerge_adapter", found.merged_adapters)
        found = found.base_layer
    reason = unsupported(found)  # type: ignore[arg-type]
    require(reason is None, f"{name}: the base does not fit the adapter", reason)
    return SpectralLinear(found, name)  # type: ignore[arg-type]
