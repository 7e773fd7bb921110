"""The weights of a base model, read one at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..adapter.layer import SpectralLinear
from ..calibration.targets import inner
from ..methods.method import require


def layer_of(model: nn.Module, name: str) -> SpectralLinear:
    """A linear module of a model as a layer of the family without adapters, or the one that it is already.

    A new one stands beside the module: it is not put into the model.
    """
    found = inner(model).get_submodule(name)
    return found if isinstance(found, SpectralLinear) else SpectralLinear(found, name)


def weight_of(layer: SpectralLinear) -> Tensor:
    """The layer's weight (m, n) in float32, without what is merged into it.

    Raises:
        ValueError: it is not loaded, or not finite; the module is named.
    """
    require(not layer.base.absent, f"{layer.name}: the weight has to be loaded. Load the model first", "a meta tensor")
    weight = layer.original()
    bad = int((~torch.isfinite(weight)).sum())
    require(bad == 0, f"{layer.name}: the weight has to be finite. Load an intact model", f"{bad} entries that are not")
    return weight
