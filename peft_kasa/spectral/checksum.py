"""A checksum of a tensor's bits, computed where the tensor is."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from .threads import limited

LANES = 1 << 16  # words of 64 bits that are summed at a time, in a core's cache
BLOCK = 1 << 22  # bytes of a weight that are copied at a time where it is not contiguous


def checksum(x: Tensor) -> list[int]:
    """Two sums of 64 bits over every bit of a tensor and its place, computed on its device, whatever its strides.

    Another value in one place always shows, in several but for chance. 64 MB take about 20 ms, and under 30 MB beside.
    """
    x = x.detach() if x.ndim == 2 else x.detach().reshape(1, -1)
    lanes = min(LANES, x.numel() * x.element_size() // 8 + 1)
    sums, mixed = (torch.zeros(size, dtype=torch.int64, device=x.device) for size in ((2, lanes), lanes))
    with limited(1):  # hundreds of short sums: to hand them between threads on shared cores takes seconds
        for place, piece in enumerate(_words(x)):
            # Two changes of bit 63 alone would cancel, whatever their odd factors: with the upper half added to the
            # lower, one bit on, finite words that differ, by a sign or by two as well, differ in lower bits too.
            word = torch.bitwise_right_shift(piece, 31, out=mixed[: len(piece)]).add_(piece)
            for total, factor in zip(sums, _odd(f"piece {place}", 2).tolist(), strict=True):
                total[: len(piece)].add_(word, alpha=factor)
    return (sums * _odd("lanes", 2 * LANES).view(2, LANES)[:, :lanes].to(x.device)).sum(1).tolist()


def _words(x: Tensor) -> Iterator[Tensor]:
    """The bits of a matrix, row after row, at most LANES words of 64 bits at a time."""
    width = x.element_size()
    for block in x.split(max(8, BLOCK // (x.shape[1] * width) // 8 * 8)) if x.numel() else ():
        block = block if block.stride(1) == 1 else block.T.contiguous().T  # torch is slow to transpose a slice itself
        flat = block.contiguous().view(-1)
        if len(flat) * width % 8 or flat.storage_offset() * width % 8:
            flat = torch.nn.functional.pad(flat, (0, -len(flat) % (8 // width)))
        yield from flat.view(torch.int64).split(LANES)


@functools.lru_cache(4096)
def _odd(name: str, count: int) -> Tensor:
    return torch.frombuffer(bytearray(hashlib.shake_128(name.encode()).digest(8 * count)), dtype=torch.int64) | 1
