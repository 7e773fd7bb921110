"""Which layers can be adapted."""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import resolve_quantization_backend
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D


def unsupported(layer: nn.Module) -> str | None:
    """Why a layer cannot be adapted, or None if it can."""
    if isinstance(layer, BaseTunerLayer):
        return "another PEFT method has wrapped it already. Unload that first"
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads this weight without calling the layer, so an adapter would have no effect"
    if hasattr(layer, "parametrizations"):
        return "its weight is a parametrization of another. Remove that first (torch.nn.utils.parametrize)"
    if isinstance(getattr(layer, "weight", None), DTensor):
        return "its weight is sharded already, and adapters would not be. Shard the model after get_peft_model"
    if isinstance(layer, nn.Linear | Conv1D) and resolve_quantization_backend(layer) is None:
        return None
    backend = resolve_quantization_backend(layer)
    if backend is None or backend.layer_type != "linear":
        return f"{type(layer).__name__} is not a linear layer. Choose Linear, Conv1D or quantised linear layers"
    if not backend.supports_merge:
        return f"{backend.backend_name} weights cannot be read back, which a decomposition needs"
    return None
