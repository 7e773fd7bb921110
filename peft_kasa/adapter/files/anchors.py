"""What a compact checkpoint keeps of the frames it leaves out: enough to know them again, sign by sign.

A frame computed again from the weight may have other signs, and where singular values are close, other vectors: the
core that was learnt beside it would then act on the wrong ones. An anchor holds two seeded inner products of each
vector. They fix the sign, and where they differ by more than a thousandth of its norm the vector is refused: one that
has turned by a hundredth passes about once in ten thousand.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

ANCHOR = "anchor_"  # what the names of their slots start with
DOWN = ("left0", "left", "cut_left")  # vectors are columns
ACROSS = ("right0", "right", "cut_right")  # vectors are rows
PRODUCTS = 2
LIMIT = 1e-3


def anchors(slots: Mapping[str, Tensor], learnt: Collection[str]) -> dict[str, Tensor]:
    """The anchors (2, k) of all frames among these slots."""
    return {
        ANCHOR + name: _anchor(name, value)
        for name, value in slots.items()
        if name in (*DOWN, *ACROSS) and name not in learnt
    }


def left_out(names: Collection[str], kept: Collection[str]) -> set[str]:
    """The slots that a compact checkpoint does without: all but those in `kept`, anchors and `fixed`."""
    return {name for name in names if name not in kept and name != "fixed" and not name.startswith(ANCHOR)}


def aligned(frames: dict[str, Tensor], saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The frames with the signs of the saved anchors.

    Raises:
        ValueError: a vector differs by more than a thousandth of its norm, or is not finite.
    """
    result = dict(frames)
    for name, anchor in saved.items():
        slot = name.removeprefix(ANCHOR)
        frame, anchor = frames[slot], anchor.to(frames[slot])
        found = _anchor(slot, frame)
        sign = torch.where((found * anchor).sum(0) < 0, -1.0, 1.0).to(frame)
        norm = frame.norm(dim=0 if slot in DOWN else 1).nan_to_num(0.0) * PRODUCTS**0.5
        least = (norm.max() * 1e-6).clamp_min(torch.finfo(norm.dtype).tiny)
        missed = ((found * sign - anchor).norm(dim=0) / norm.clamp_min(least)).nan_to_num(torch.inf)
        if missed.max() > LIMIT:
            raise ValueError(
                f"{slot}, computed again from the base weight, differs from the one that was trained beside in vector "
                f"{int(missed.argmax())} (by {missed.max():.1e}, the limit is {LIMIT:.0e}). Load the base in the "
                "storage and on the kind of device it was trained with, or save with save_frames=True."
            )
        result[slot] = frame * (sign if slot in DOWN else sign[:, None])
    return result


def _anchor(name: str, frame: Tensor) -> Tensor:
    down = name in DOWN
    size = frame.shape[0 if down else 1]
    if frame.is_meta:
        return frame.new_empty(PRODUCTS, frame.shape[1 if down else 0])
    seed = torch.Generator().manual_seed(size)
    probe = torch.randn(PRODUCTS, size, generator=seed, dtype=torch.float32, device="cpu").to(frame.device)
    with torch.autocast(frame.device.type, enabled=False):
        return probe @ (frame if down else frame.T).float()
