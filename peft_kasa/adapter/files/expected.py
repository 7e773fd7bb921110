"""Whether an adapter's file has the tensors that the layers of a model expect of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..keys import is_slot, module_of, slot_of

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Expected(NamedTuple):
    """A tensor that the file has to have."""

    name: str  # of the module
    slot: str
    shape: tuple[int, ...]
    rank: int | None  # r, where the config chooses it


def check_keys(method: str, expected: dict[str, Expected], state: dict[str, Tensor]) -> None:
    """Raises ValueError for slots, by their keys, that are missing or that nothing takes."""
    modules = {module_of(key) for key in expected}
    ours, theirs = ({slot_of(key) for key in keys if module_of(key) in modules} for keys in (expected, state))
    if theirs and ours != theirs:
        raise ValueError(
            f"{next(iter(expected.values())).name}: the adapter's file was saved by another method, variant or "
            f"save_frames. It has {', '.join(sorted(theirs))} of each module, and this adapter ({method}) takes "
            f"{', '.join(sorted(ours))}: use the config that it was saved with."
        )
    if missing := [key for key in expected if key not in state]:
        raise ValueError(
            f"{expected[missing[0]].name}: the adapter's file lacks {expected[missing[0]].slot} ({len(missing)} "
            "tensors missing in all). Its config targets modules that were not saved, or the file is damaged: save it "
            "again, or restore its own adapter_config.json."
        )
    if extra := [key for key in state if is_slot(key) and key not in expected]:
        name = module_of(extra[0]).removeprefix("base_model.model.")
        raise ValueError(
            f"{name}: the adapter's file has {slot_of(extra[0])}, which nothing in this model takes "
            f"({len(extra)} such tensors). Load it onto the base, and with the adapter_config.json, it came from."
        )


def check_value(name: str, slot: str, shape: tuple[int, ...], rank: int | None, found: Tensor) -> None:
    """Raises ValueError for a tensor of another shape or dtype, or with entries that are not finite."""
    if tuple(found.shape) != shape:
        raise ValueError(
            f"{name}: {slot} has to be of shape {shape}. Found {tuple(found.shape)} in the adapter's file: it was "
            "trained on another base model or with another r. Load the base that adapter_config.json names"
            f"{_other_rank(shape, rank, tuple(found.shape))}."
        )
    if found.dtype not in DTYPES:
        raise ValueError(f"{name}: {slot} has to be {DTYPES}. Found {found.dtype} in the adapter's file: use another.")
    if not torch.isfinite(found).all():
        raise ValueError(f"{name}: {slot} in the adapter's file has NaN or infinite entries. Use another checkpoint.")


def _other_rank(shape: tuple[int, ...], rank: int | None, found: tuple[int, ...]) -> str:
    """What to add to a remedy where a shape differs in the rank alone."""
    differing = {(ours, theirs) for ours, theirs in zip(shape, found, strict=False) if ours != theirs}
    same_rank = len(shape) == len(found) and len(differing) == 1 and {ours for ours, _ in differing} == {rank}
    return f", or give the config r={differing.pop()[1]}" if same_rank else ""
