"""Matrices, streams, and engines to decompose them, plainly in float64: for the tests of `peft_kasa.spectral`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from peft_kasa.spectral import Spectrum
from peft_kasa.spectral.covariance import Covariance


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def error(found: Tensor, truth: Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return ((found.double() - truth).norm() / truth.norm()).item()


def exact(w: Tensor, k: int, end: str) -> Spectrum:
    """An engine that answers in float64, by torch's SVD."""
    u, s, v = torch.linalg.svd(w.double(), full_matrices=False)
    part = slice(0, k) if end == "top" else slice(len(s) - k, len(s))
    return Spectrum(u[:, part], s[part], v[part])


def noise(w: Tensor, k: int, end: str) -> Spectrum:
    """An engine that knows nothing."""
    return Spectrum(normal(w.shape[0], k), normal(k), normal(k, w.shape[1]))


def by_gram(w: Tensor, k: int, end: str) -> Spectrum:
    """An engine that answers in float64, by the Gram matrix, which spans the square of what W does."""
    if w.shape[0] < w.shape[1]:
        u, s, v = by_gram(w.T, k, end)
        return Spectrum(v.T, s, u.T)
    vectors = torch.linalg.eigh(w.T @ w).eigenvectors
    vectors = vectors[:, :k] if end == "bottom" else vectors[:, len(vectors) - k :]
    u, s, v = torch.linalg.svd(w @ vectors, full_matrices=False)
    return Spectrum(u, s, v @ vectors.T)


def inputs(tokens: int, n: int, seed: int = 0) -> Tensor:
    """float64, as language models have them: correlated, channels of many sizes, some huge, with a mean."""
    x = normal(tokens, n // 4, seed=seed) * torch.arange(1, n // 4 + 1) ** -0.5 @ normal(n // 4, n, seed=1000)
    x = (x + normal(tokens, n, seed=seed + 1)) * torch.exp(0.5 * normal(n, seed=1001))
    x[:, :3] = x[:, :3] * torch.tensor([80.0, 30.0, 10.0]) + torch.tensor([1000.0, -300.0, 10.0])
    return x


def covariance(n: int) -> Tensor:
    x = inputs(8 * n, n)
    return x.T @ x / len(x)


def weight(m: int, n: int) -> Tensor:
    """A power law above a bulk, as trained weights have it."""
    k = min(m, n) // 4
    return normal(m, n) + 3 * normal(m, k, seed=1) * torch.arange(1, k + 1) ** -0.55 @ normal(k, n, seed=2)


# Streams -------------------------------------------------------------------------------------------------------


def stream(batches: list[Tensor], **given: Any) -> Covariance:
    made = Covariance(batches[0].shape[-1], **given)
    for batch in batches:
        made.update(batch)
    return made


def same(a: Covariance, b: Covariance, rtol: float = 1e-6) -> bool:
    pairs = ((a.mean, b.mean), (a.triangle.packed(), b.triangle.packed()))
    return math.isclose(a.count, b.count) and all(torch.allclose(x, y, rtol=rtol, atol=rtol) for x, y in pairs)


LOW = normal(20, 3)
X = normal(9, 4)
