"""The biases of the base that an adapter trains in place (`bias=`), by name."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ...methods.method import SpectralConfig


def trained_biases(model: nn.Module, targets: set[str], config: SpectralConfig) -> set[str]:
    """The names, in a model, of the biases that learn beside an adapter of these target modules (by path)."""
    named = {name for name, _ in model.named_parameters() if name.split(".")[-1] == "bias"}
    named = {name for name in named if ".modules_to_save." not in name}  # those are the adapter's own
    if config.bias == "peft_kasa_only":
        return named & {f"{path}.base_layer.bias".removeprefix(".") for path in targets}
    return named if config.bias == "all" else set()


def check_biases(names: set[str], state: Mapping[str, Tensor]) -> None:
    """Raises ValueError where an adapter's file lacks a bias that it trained."""
    if missing := sorted(name for name in names if name not in state):
        raise ValueError(
            f"{missing[0].removeprefix('base_model.model.')}: the adapter's file lacks this bias, and its config says "
            f"that it was trained ({len(missing)} missing in all). Restore the file, and its adapter_config.json."
        )
