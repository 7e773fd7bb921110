"""What the tests of the disk cache share: keys, triples, bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from peft_kasa.spectral import Spectrum
from peft_kasa.spectral.cache import Cache

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
NOTE = {"end": "top", "algorithm": "gram"}
KEY = "0123456789abcdef" * 2
OTHER = "f" * 32
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def key(w: Tensor, **settings: object) -> str:
    return Cache("unused").key(w, settings)


def bits(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(BITS[x.element_size()])


def same(one: Spectrum, other: Spectrum) -> bool:
    return all(a.dtype == b.dtype and torch.equal(bits(a), bits(b)) for a, b in zip(one, other, strict=True))


def random_cut(m: int = 6, n: int = 5, k: int = 2, seed: int = 0) -> Spectrum:
    return Spectrum(normal(m, k, seed=seed), normal(k, seed=seed + 1), normal(k, n, seed=seed + 2))


def path_of(folder: Path, name: str = KEY) -> Path:
    return folder / f"{name}.kasa.safetensors"


def load(folder: Path, name: str = KEY, shape: tuple[int, int] = (6, 5), k: int = 2) -> tuple[Spectrum, float] | None:
    return Cache(folder).load(name, shape=shape, k=k)
