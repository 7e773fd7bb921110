"""One layer's part in a batch whose rows have adapters of their own (see mixing.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..methods.method import require


def mixed(result: Tensor, x: Tensor, names: Sequence[str], layer: Any) -> Tensor:
    """The base's result and, for each row, the update of its own adapter; rows of one adapter are computed together.

    Args:
        result: of the base layer, (rows, ..., m).
        x: its input, (rows, ..., n).
        names: an adapter a row. Those that the layer has not, and the base's, leave their rows as they are.

    Raises:
        ValueError: the layer sees another number of rows.
    """
    rule = (
        f"{layer.name}: adapter_names has to have an entry for each of the {len(x)} rows that this module is given "
        "(num_beams and num_return_sequences are counted where they are passed to generate)"
    )
    require(len(names) == len(x), rule, len(names))
    rows = {
        name: [row for row, other in enumerate(names) if other == name]
        for name in dict.fromkeys(names)
        if name in layer.adapters
    }
    if not rows:
        return result
    updated = [layer.updated(result[chosen], x[chosen], [name]) for name, chosen in rows.items()]
    order = torch.tensor([row for chosen in rows.values() for row in chosen], device=result.device)
    return result.index_copy(0, order, torch.cat(updated))
