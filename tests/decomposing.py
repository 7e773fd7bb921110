"""What the tests of the engine share: matrices, and the truth in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from peft_kasa.spectral import Spectrum

quick = settings(deadline=None, max_examples=60, derandomize=True)
SHAPES = [(1, 1), (1, 9), (9, 1), (6, 6), (7, 12), (12, 7), (40, 33)]
ENDS = ["top", "bottom"]
each_end = pytest.mark.parametrize("end", ENDS)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)

sizes = st.integers(1, 12)
seeds = st.integers(0, 1000)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def truth(w: Tensor, k: int, end: str) -> tuple[Tensor, Tensor, Tensor]:
    """The same triples by torch's SVD in float64."""
    u, s, v = torch.linalg.svd(w.double(), full_matrices=False)
    part = slice(0, k) if end == "top" else slice(len(s) - k, len(s))
    return u[:, part], s[part], v[part]


def check(cut: Spectrum, w: Tensor, k: int) -> None:
    """What holds of every answer: shapes, float32, finite, orthonormal, descending, canonical signs."""
    m, n = w.shape
    assert (cut.u.shape, cut.s.shape, cut.v.shape) == ((m, k), (k,), (k, n))
    assert all(part.dtype == torch.float32 and torch.isfinite(part).all() for part in cut)
    u, s, v = (part.double() for part in cut)
    assert torch.allclose(u.T @ u, torch.eye(k).double(), atol=1e-6)
    assert torch.allclose(v @ v.T, torch.eye(k).double(), atol=1e-6)
    assert (s.diff() <= 0).all()
    assert (s >= 0).all()
    assert (u.amax(0) >= u.abs().amax(0) * (1 - 1e-6)).all() if k else True  # ties in float32 apart


def check_exact(cut: Spectrum, w: Tensor, k: int, end: str) -> None:
    """The singular values, and the part of the matrix that the triples make, are torch's."""
    check(cut, w, k)
    u, s, v = truth(w, k, end)
    norm = w.double().norm()
    assert torch.allclose(cut.s.double(), s, rtol=1e-6, atol=1e-7 * norm.item())
    assert ((cut.u * cut.s).double() @ cut.v.double() - (u * s) @ v).norm() <= 1e-6 * norm


SPECTRA = {  # of singular values, by place in (0, 1]
    "flat": lambda x: torch.ones_like(x),
    "linear": lambda x: 1 - x + 1e-3,
    "power law": lambda x: (512 * x) ** -0.55,
    "cliff": lambda x: torch.where(x < 0.1, 1.0, 1e-4),
    "steps": lambda x: (x * 8).ceil() / 8,
    "rank 20": lambda x: (x < 20 / 290).double(),
    "exponential": lambda x: 10 ** (-5 * x),
}


def of_spectrum(m: int, n: int, name: str, seed: int = 0) -> Tensor:
    k = min(m, n)
    values = SPECTRA[name](torch.linspace(1 / k, 1, k, dtype=torch.float64))
    u, v = (torch.linalg.qr(normal(size, k, seed=seed + size, dtype=torch.float64)).Q for size in (m, n))
    return (u * values.sort(descending=True).values) @ v.T


def same_bits(a: Spectrum, b: Spectrum) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
