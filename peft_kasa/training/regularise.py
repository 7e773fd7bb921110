"""Regularisers that act in every trainer: their gradient is added where every optimiser steps.

A loss term would not do: TRL's trainers never read `outputs.loss`, and accumulation divides it. The global pre-step
hook of torch sees each step once, whatever computed the loss, after accumulation, averaging over processes and
clipping.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from ..adapter.known import Adapter
from ..adapter.layer import SpectralLinear, living
from ..adapter.slots import LEARNABLE
from ..adapter.starting import all_layers, settle
from ..spectral import LowRank
from .held import Held, stepped_by_zero

Term = tuple[SpectralLinear, str]  # a layer and one of its adapters

_claimed: weakref.WeakSet[SpectralLinear] = weakref.WeakSet()  # layers that some optimiser has regularised
# By optimiser that has stepped: layers that were trained then, and in no optimiser that had stepped
_suspected: weakref.WeakKeyDictionary[Optimizer, weakref.WeakSet[SpectralLinear]] = weakref.WeakKeyDictionary()
_warned: weakref.WeakSet[SpectralLinear] = weakref.WeakSet()


def penalty(model: nn.Module, adapter: str | None = None) -> Tensor:
    """The regulariser of a model's adapters as it is now: a scalar, differentiable, 0 where there is none.

    It acts by itself at every optimiser step (`regularize=False` in the config switches that off), so it need not be
    added to a loss. The `adapter`, if given, is counted whether it is active and switched on or not; without it, the
    active adapters whose regulariser is on are.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from peft_kasa import SORSAConfig, penalty
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 6)), SORSAConfig(r=2, target_modules=["0"]))
        >>> penalty(model).item() < 1e-4  # SORSA starts orthonormal
        True
    """
    settle(model)
    if adapter is None:
        terms = [(layer, name) for layer in all_layers(model) for name in regularized(layer)]
    else:
        terms = [(layer, adapter) for layer in all_layers(model) if adapter in layer.adapters]
        if not terms:
            raise ValueError(f"`adapter` has to be one of the family's in this model. Found {adapter!r}.")
    values = [_term(*term) for term in terms]
    return sum(
        (value.to(values[0].device) for value in values), torch.zeros((), device=values[0].device if values else None)
    )


def install() -> None:
    """Registers the hook with torch, once."""
    global _handle
    if _handle is None:
        _handle = register_optimizer_step_pre_hook(_before_step)


_handle: Any = None


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    terms = _terms(optimizer)
    if not terms:
        return None
    if closure := kwargs.get("closure"):  # where it was, as a step may take it by name alone
        return args, kwargs | {"closure": _regularized_closure(closure, terms, optimizer)}
    if len(args) > 1 and args[1] is not None:
        return (args[0], _regularized_closure(args[1], terms, optimizer), *args[2:]), kwargs
    _add_gradient(terms, optimizer)
    return None


def _terms(optimizer: Optimizer) -> list[Term]:
    """The layers and adapters whose regulariser is on and whose parameters this optimiser steps."""
    every = [(layer, name) for layer in living() for name in regularized(layer)]
    if not every:
        return []
    held = Held(optimizer)
    terms, unheld = [], []
    for layer, name in every:
        if any(parameter in held for parameter in layer.learning(name)):
            terms.append((layer, name))
        elif layer.adapters[name].trained and not any(map(stepped_by_zero, layer.learning(name))):
            unheld.append((layer, name))
    _claimed.update(layer for layer, _ in terms)
    _suspect(unheld, optimizer)
    return sorted(terms, key=lambda term: (term[0].name, term[1]))


def regularized(layer: SpectralLinear) -> list[str]:
    """The layer's active adapters that learn and whose regulariser is on."""
    active = (name for name in layer.active_adapters if name in layer.adapters)
    known = ((name, layer.adapters[name]) for name in active)
    return [name for name, a in known if a.config.regularizes and not a.awaiting and layer.learning(name)]


def _term(layer: SpectralLinear, adapter: str) -> Tensor:
    return _penalties(layer.adapters[adapter], layer.value(adapter))


def _penalties(known: Adapter, value: LowRank) -> Tensor:
    """The regulariser of one module, or of each of several alike, stacked along a first dimension."""
    count = known.peers if known.config.reduction == "mean" else 1

    def penalty_of(value: LowRank) -> Tensor:
        return torch.as_tensor(known.config.penalty(value), dtype=value.left.dtype, device=value.left.device)

    every = penalty_of if value.left.ndim == 2 else torch.vmap(penalty_of)
    with torch.autocast(value.left.device.type, enabled=False):
        return every(value) / count


def _add_gradient(terms: list[Term], optimizer: Optimizer, with_value: bool = False) -> Tensor | float:
    """Adds the gradient to the `.grad` of what this optimiser holds, at the size it will take it for.

    Returns the penalty, if asked for, of those terms that did not have it yet: a closure may be handed on by one
    optimiser to another, as a subclass hands it to `super().step`, and is wrapped by each.
    """
    held = Held(optimizer)
    total: Tensor | float = 0.0
    scale = getattr(optimizer, "grad_scale", None)  # a fused optimiser unscales by itself: GradScaler sets this
    for alike in _alike(terms):
        values, gradients = _gradients(alike)
        for index, (layer, name) in enumerate(alike):
            own = [None if gradient is None else gradient[index] for gradient in gradients]
            if _add_term(layer.slots(name), own, held, scale) and with_value:
                total = total + values[index]
    return total


def _add_term(slots: Any, gradients: list[Tensor | None], held: Held, scale: Tensor | None) -> bool:
    """Whether a gradient by left, core or right was added."""
    found = False
    for slot, gradient in zip(LEARNABLE, gradients, strict=True):
        parameter = slots.get(slot)
        if gradient is None or parameter is None or not parameter.requires_grad:
            continue
        if parameter not in held or _has_it(parameter):
            continue
        added = gradient if scale is None else gradient * scale.to(gradient)
        if not held.add_to_flat(parameter, added):
            _add(parameter, added)
        found = True
    return found


def _alike(terms: list[Term]) -> list[list[Term]]:
    """Terms by shape, place and config: those of a group are computed at once, hundreds of small ones being slow."""
    groups: dict[Any, list[Term]] = {}
    for layer, name in terms:
        known, slots = layer.adapters[name], layer.slots(name)
        device = next(iter(slots.values())).device
        key = (id(known.config), known.peers, known.rank, layer.in_features, layer.out_features, device)
        groups.setdefault(key, []).append((layer, name))
    return list(groups.values())


def _gradients(alike: list[Term]) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The penalty of each of a group, and its gradient by left, core and right, with a first dimension for the terms.

    By the values is by the slots: a slot is its value, or its difference to a constant.
    """
    layer, name = alike[0]
    with torch.no_grad():
        values = [layer.value(name) for layer, name in alike]
    with torch.enable_grad():
        stacked = LowRank(*(torch.stack(parts).requires_grad_() for parts in zip(*values, strict=True)))
        each = _penalties(layer.adapters[name], stacked)
        if not each.requires_grad:  # a constant
            return each, (None, None, None)
        return each.detach(), torch.autograd.grad(each.sum(), stacked, allow_unused=True)


def _add(parameter: Tensor, gradient: Tensor) -> None:
    gradient = gradient.to(parameter.dtype)
    if isinstance(parameter, DTensor):
        gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
    parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad.add_(gradient)
    _added[parameter] = (TensorWeakRef(parameter.grad), parameter.grad._version)


# Where it went, so that an optimiser inside another's step does not add it again: the gradient, and its version then.
_added: Any = WeakTensorKeyDictionary()


def _has_it(parameter: Tensor) -> bool:
    if parameter.grad is None or parameter not in _added:
        return False
    gradient, version = _added[parameter]
    return gradient() is parameter.grad and parameter.grad._version == version


def _regularized_closure(closure: Callable[[], Any], terms: list[Term], optimizer: Optimizer) -> Callable[[], Any]:
    """A closure zeroes the gradients itself, so the regulariser's comes after it, at each call."""

    def with_gradient() -> Any:
        loss = closure()
        added = torch.as_tensor(_add_gradient(terms, optimizer, with_value=True))
        if isinstance(loss, Tensor):
            return loss + added.to(loss)
        return loss if loss is None else loss + added.item()

    return with_gradient


def _suspect(unheld: list[Term], optimizer: Optimizer) -> None:
    """Warns at the second step of an optimiser where none so far has held layers that are being trained; once for each
    layer. One that is a parameter's own may step, in a backward pass, before those of other layers have at all.
    """
    before = _suspected.setdefault(optimizer, weakref.WeakSet())
    certain = [term for term in unheld if term[0] in before and term[0] not in _claimed | _warned]
    before.update(layer for layer, _ in unheld)
    if certain:
        warn_unheld(certain)
        _warned.update(layer for layer, _ in certain)


def warn_unheld(terms: Iterable[Term]) -> None:
    """Warns that the regulariser of these has no optimiser to act through."""
    layer, name = next(iter(terms))
    warnings.warn(
        f"{layer.name}: the parameters of adapter {name!r} are in no optimiser that has stepped so far, so its "
        f"regulariser ({layer.adapters[name].config.name}) has not acted. Give them to one that does, or set "
        f"regularize=False and add `peft_kasa.penalty(model, {name!r})` to the loss yourself.",
        stacklevel=2,
    )
