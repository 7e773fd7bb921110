"""What listening to a model's modules has in common, whatever is made of what they say."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Device: TypeAlias = torch.device | str | None


@contextmanager
def removed(handles: list[Any]) -> Iterator[None]:
    """Takes hooks off, whatever happens."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def input_of(args: Any, kwargs: Any) -> Tensor:
    """What a module was called with."""
    return args[0] if args else next(iter(kwargs.values()))


def accepts(model: nn.Module, name: str) -> bool:
    """Whether the model takes an argument of this name."""
    forward: Callable[..., Any] = model.forward
    return name in inspect.signature(forward).parameters


def sparing(model: nn.Module, modules: Mapping[str, nn.Module] | None) -> dict[str, Any]:
    """Arguments that spare work: no cache and, unless the head itself is a target or its loss is needed, one logit."""
    given: dict[str, Any] = {"use_cache": False} if accepts(model, "use_cache") else {}
    if modules is not None and accepts(model, "logits_to_keep") and hasattr(model, "get_output_embeddings"):
        head = model.get_output_embeddings()
        if all(module is not head and getattr(head, "base_layer", None) is not module for module in modules.values()):
            given["logits_to_keep"] = 1
    return given
