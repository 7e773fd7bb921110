"""Products as exact as their dtype, whatever the caller has switched on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def exact_products(device: str) -> Iterator[None]:
    """float32 products as float32 within autocast, and where TF32 or bf16 is allowed: those round to 1e-3."""
    modern = hasattr(torch.backends.cuda.matmul, "fp32_precision")  # torch 2.9; the older switch then raises if mixed
    parts = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul] if modern else []
    before = [part.fp32_precision for part in parts] if modern else [torch.get_float32_matmul_precision()]
    try:
        for part in parts:
            part.fp32_precision = "ieee"
        if not modern:
            torch.set_float32_matmul_precision("highest")
        with torch.autocast("cpu" if device == "meta" else device, enabled=False):
            yield
    finally:
        for part, precision in zip(parts, before, strict=False):
            part.fp32_precision = precision
        if not modern:
            torch.set_float32_matmul_precision(before[0])
