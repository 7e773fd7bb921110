"""What stands in the place of an experts' parameter while their code runs: a stack of weights and its update."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from peft_kasa.adapter.experts.stack import Stack


def test_small_updates_survive_bfloat16() -> None:
    """Better than in W + update, rounded to bfloat16: what an expert adds to its outputs, as a least-squares fit."""
    generator = torch.Generator().manual_seed(0)
    x, base, up, down = (
        torch.randn(size, generator=generator) for size in ((32768, 64), (2, 96, 64), (2, 96, 4), (2, 4, 64))
    )
    stack, x = Stack(base.bfloat16(), up * 2e-3, down), x.bfloat16()
    update = (stack.up @ stack.down)[1]

    def error(weight: Any) -> float:
        moved = F.linear(x, weight).double() - F.linear(x, stack.base[1]).double()
        return ((torch.linalg.lstsq(x.double(), moved).solution.T - update).norm() / update.norm()).item()

    assert error(stack[1]) < 0.1
    assert error(stack.dense()[1]) > 0.3


def test_what_is_no_product_gets_the_sum() -> None:
    stack = Stack(torch.randn(2, 5, 4), torch.randn(2, 5, 3), torch.randn(2, 3, 4))
    dense, x = stack.dense(), torch.randn(2, 4, 6)
    assert len(stack) == 2
    assert stack.shape == dense.shape
    for found, expected in [
        (stack.sum(), dense.sum()),
        (torch.stack([stack, stack]), torch.stack([dense, dense])),
        (torch.einsum("eoi,ein->eon", stack, x), dense @ x),
        (stack @ x, dense @ x),
        (x.mT @ stack.transpose(1, 2), x.mT @ dense.mT),
        (stack[1, :2], dense[1, :2]),
        (stack[torch.tensor([1, 0, 1])] @ x[[0, 0, 1]], dense[[1, 0, 1]] @ x[[0, 0, 1]]),
        (stack.transpose(0, 1), dense.transpose(0, 1)),
    ]:
        torch.testing.assert_close(found, expected)
