"""Refined triples against torch's SVD in float64."""

from __future__ import annotations

import logging

import pytest
import torch
from spectra import LOW, exact, normal
from torch import Tensor

from peft_kasa.spectral.refine import refined


def steep(m: int, n: int, power: float) -> Tensor:
    """Singular values from 1 to 10^-power, evenly on a logarithmic scale."""
    k = min(m, n)
    u, v = torch.linalg.qr(normal(m, k)).Q, torch.linalg.qr(normal(n, k, seed=1)).Q
    return u * 10 ** -torch.linspace(0, power, k, dtype=torch.float64) @ v.T


@pytest.mark.parametrize("shape", [(300, 400), (400, 300)], ids=str)
def test_refined_triples_are_exact_beside_their_own_singular_values(
    shape: tuple[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    """The last of the 20 is 1e-4 of the first, and what an engine leaves 1e-5 of it."""
    a, truth = steep(*shape, 60.0), exact(steep(*shape, 60.0), 20, "top")
    rough = truth.u + 0.1 * normal(shape[0], 20, seed=2) / shape[0] ** 0.5
    with caplog.at_level(logging.INFO, logger="peft_kasa.spectral.refine"):
        u, s = refined(a, rough)
    assert not caplog.records
    assert torch.allclose(s, truth.s, rtol=1e-9)
    assert ((u * truth.u).sum(0).abs() > 1 - 1e-12).all()
    assert torch.allclose(u.T @ u, torch.eye(20).double(), atol=1e-12)


def test_what_does_not_converge_takes_a_full_svd_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    a = normal(40, 30)
    with caplog.at_level(logging.INFO, logger="peft_kasa.spectral.refine"):
        u, s = refined(a, normal(40, 6, seed=1))
    (record,) = caplog.records
    assert record.getMessage() == "the 6 largest triples of (40, 30) did not converge: taking a full float64 SVD"
    assert torch.allclose(s, exact(a, 6, "top").s)
    assert torch.allclose(a.T @ u, (exact(a, 30, "top").v[:6].T * s) * (u.T @ exact(a, 6, "top").u).diagonal())


def test_triples_of_nothing_are_no_reason_for_a_full_svd(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="peft_kasa.spectral.refine"):
        assert refined(LOW @ LOW.T, normal(20, 5))[1][3:].max() < 1e-12
    assert not caplog.records


@pytest.mark.parametrize("a", [torch.zeros(9, 7), torch.eye(7), LOW @ LOW.T, torch.ones(1, 1)], ids=len)
def test_refining_deficient_matrices_keeps_bases_orthonormal(a: Tensor) -> None:
    for k in range(min(a.shape) + 1):
        u, s = refined(a.double(), normal(len(a), k))
        assert torch.allclose(u.T @ u, torch.eye(k).double(), atol=1e-10)
        assert torch.allclose(s, torch.linalg.svdvals(a.double())[:k], atol=1e-10 * a.norm().item())
