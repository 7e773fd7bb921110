"""What the tests of calibration share: sequences, and what is compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peft_kasa.adapter.files.statistics import Statistics

LENGTHS = (8, 5, 12, 7, 3, 9)
LAYER = "model.layers.0."
ALL = {"r": 2, "target_modules": "all-linear"}


def sequences(seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, 64, (n,), generator=generator).tolist()} for n in LENGTHS]


ROWS = sequences()


def seen_by(model: nn.Module, rows: list[dict[str, Any]]) -> dict[str, list[Tensor]]:
    """The inputs of every linear layer, sequence after sequence, in float64."""
    found: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: found.setdefault(name, []).append(args[0][0].double())
        )
        for name, module in model.named_modules()
        if hasattr(module, "in_features")
    ]
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row["input_ids"]]))
    for handle in handles:
        handle.remove()
    return found


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert ((found - expected).norm() / expected.norm()).item() <= tolerance


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def equal(a: Statistics, b: Statistics) -> bool:
    """Bit for bit."""
    if a.names != b.names or a.seen != b.seen:
        return False
    for name in a.names:
        one, two = a.evidence(name), b.evidence(name)
        same = (
            torch.equal(one, two)
            if isinstance(one, Tensor)
            else torch.equal(one.triangle.packed(), two.triangle.packed())
            and torch.equal(one.mean, two.mean)
            and one.count == two.count
        )
        if not same:
            return False
    return True


def forbidden(*_: Any, **__: Any) -> None:
    raise AssertionError("the model was run")
