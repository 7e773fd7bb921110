"""A stack of weights with an update beside it, in the place of the parameter while the experts' own code runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ALIGNED = 16  # grouped products take inner sizes of a multiple of 16 bytes
# The same of the base and of the sum, or, of the address, as well aligned: code asks for nothing else of it.
FACTS = ("data_ptr", "device", "dim", "dtype", "is_cuda", "ndim", "shape", "size")


class Stack:
    """base (..., p, q) + up (..., p, k) @ down (..., k, q), added up only where code asks for the sum.

    Where the experts' code takes one expert, or multiplies, the two parts are multiplied apart, as in a linear layer:
    W + update in bfloat16 would lose more of a small update, and be a second copy of all experts in the graph.
    Other functions of torch's, and attributes, get the sum, in the dtype of the base.

    Args:
        base: the parameter, or a part of it. It is read, never written.
        up, down: the update's factors, float32.

    Examples:
        >>> import torch
        >>> from peft_kasa.adapter.experts.stack import Stack
        >>> stack = Stack(torch.zeros(2, 4, 3), torch.ones(2, 4, 1), torch.ones(2, 1, 3))
        >>> torch.nn.functional.linear(torch.ones(5, 3), stack[1])[0]
        tensor([3., 3., 3., 3.])
        >>> stack.sum().item()
        24.0
    """

    def __init__(self, base: Tensor, up: Tensor, down: Tensor) -> None:
        self.base, self.up, self.down = base, up, down

    def dense(self) -> Tensor:
        """The sum, rounded once to the dtype of the base."""
        return (self.up @ self.down + self.base).to(self.base.dtype)

    def transpose(self, dim0: int, dim1: int) -> Any:
        """As a tensor's; of the last two dimensions, a stack."""
        last = {self.base.ndim - 1, self.base.ndim - 2}
        if {dim0 % self.base.ndim, dim1 % self.base.ndim} != last:
            return self.dense().transpose(dim0, dim1)
        return Stack(self.base.mT, self.down.mT, self.up.mT)

    def __getitem__(self, index: Any) -> Any:
        if self.base.ndim < 3 or not isinstance(index, int | slice | Tensor):
            return self.dense()[index]
        return Stack(self.base[index], self.up[index], self.down[index])

    def __len__(self) -> int:
        return len(self.base)

    def __matmul__(self, other: Any) -> Any:
        return torch.matmul(self, other)  # type: ignore[call-overload]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("base", "up", "down"):
            raise AttributeError(name)
        return getattr(self.base if name in FACTS else self.dense(), name)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        stacks = [isinstance(value, Stack) for value in args]
        if stacks[:2] == [False, True] and function is F.linear:
            return _linear(*args, **kwargs)
        if function in PRODUCTS and stacks == [False, True] and kwargs.keys() <= {"offs"}:
            return _product(function, args[0], args[1], kwargs)
        if function in PRODUCTS and stacks == [True, False] and not kwargs:
            weight, x = args
            return function(weight.base, x) + function(weight.up.to(x.dtype), function(weight.down.to(x.dtype), x))
        return function(*map(_summed, args), **{name: _summed(value) for name, value in kwargs.items()})


def _linear(x: Tensor, weight: Stack, bias: Tensor | None = None) -> Tensor:
    update = F.linear(F.linear(x, weight.down.to(x.dtype)), weight.up.to(x.dtype))
    return F.linear(x, weight.base, bias) + update


def _product(function: Callable[..., Tensor], x: Tensor, weight: Stack, kwargs: dict[str, Any]) -> Tensor:
    """function(x, weight) for one that is linear in the weight and multiplies from the right."""
    up, down = weight.up.to(x.dtype), weight.down.to(x.dtype)
    if "offs" in kwargs:  # a grouped product
        missing = -up.shape[-1] % ALIGNED
        up, down = F.pad(up, (0, missing)), F.pad(down, (0, 0, 0, missing))
    return function(x, weight.base, **kwargs) + function(function(x, up, **kwargs), down, **kwargs)


def _summed(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(map(_summed, value))
    return value.dense() if isinstance(value, Stack) else value


def _products() -> set[Any]:
    """What multiplies by a matrix, or by the matrix of each row's expert, and is linear in it."""
    grouped = [getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None)]
    plain = [torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__]
    return {function for function in (*plain, *grouped) if function is not None}


PRODUCTS = _products()
