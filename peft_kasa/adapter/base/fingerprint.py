"""A sketch of a weight: small enough to be saved with an adapter, good enough to tell the base it belongs to."""

from __future__ import annotations

import torch
from torch import Tensor

FINGERPRINT = "fingerprint"  # the slot
SIDE = 8  # the sketch is SIDE x SIDE numbers

SAME = 1e-5  # relative distance below which two weights count as one: rounding of the sketch itself is about 1e-7
FOREIGN = 0.25  # above it, it is another weight: bf16 storage is at 2e-3, int8 at 1e-2, nf4 at 9e-2, strangers at 1.4


@torch.no_grad()
def sketch(weight: Tensor) -> Tensor:
    """`G^T weight H` for fixed Gaussian G (m, 8) and H (n, 8): (8, 8) float32, on the CPU.

    The relative distance of two sketches estimates `|W1 - W2|_F / |W1|_F` to within about a third, whatever the shape.
    """
    m, n = weight.shape
    left, right = (
        torch.randn(size, SIDE, generator=torch.Generator().manual_seed(size), dtype=torch.float32, device="cpu")
        for size in (m, n + 1)
    )
    with torch.autocast(weight.device.type, enabled=False):
        return (left.to(weight).T @ weight @ right[:n].to(weight)).float().cpu()


def distance(saved: Tensor, found: Tensor) -> float:
    """Relative distance of two sketches."""
    saved, found = saved.float().cpu(), found.float().cpu()
    scale = torch.maximum(saved.norm(), found.norm())
    return ((saved - found).norm() / scale).item() if scale > 0 else 0.0
