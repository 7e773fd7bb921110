"""One stream of second moments for modules that see the same inputs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .covariance import Covariance


class _Seen(NamedTuple):
    """The last batch, and what it made of which stream for which names."""

    x: Tensor
    mask: Tensor | None
    weight: float
    before: Covariance | None
    after: Covariance
    names: set[str]


class Shared:
    """One `Covariance` for all names that have seen the same inputs: q, k and v, or gate and up.

    What a name reads is always the sum over its own updates. Two names share it while each update of the one comes next
    to an update of the other with the same values; from the first that differs on, each has its own. Values are
    compared, not addresses: memory is used again, and tensors are written to. That costs a copy of x, and for names
    that share, one copy of the matrix a pass.

    Args:
        device: where the sums are kept. None: where the inputs are.
        known: streams to go on with, by name; names that share one have the same object.

    Examples:
        >>> import torch
        >>> from peft_kasa.spectral.shared import Shared
        >>> shared, x = Shared(), torch.tensor([[1.0, 3.0], [3.0, 1.0]])
        >>> for name, value in {"q": x, "k": x, "o": 2 * x}.items():
        ...     shared.update(name, value)
        >>> shared.groups()
        [(('q', 'k'), Covariance(2, count=2)), (('o',), Covariance(2, count=2))]
        >>> shared["o"].matrix().diagonal().tolist()
        [40.0, 40.0]
    """

    def __init__(self, device: torch.device | str | None = None, known: Mapping[str, Covariance] | None = None) -> None:
        self.device = device
        self._of: dict[str, Covariance] = dict(known or {})
        self._last: _Seen | None = None

    @torch.inference_mode(False)
    def update(self, name: str, x: Tensor, mask: Tensor | None = None, weight: float = 1) -> None:
        """`Covariance.update` for one name."""
        before, last = self._of.get(name), self._last
        known = last is not None and name not in last.names and last.before is before and last.weight == weight
        if last is None or not (known and _same(last.x, x) and _same(last.mask, mask)):
            owners = sum(other is before for other in self._of.values())
            if before is None:
                home = "cpu" if x.device.type == "mps" else x.device  # MPS has no float64
                after = Covariance(x.shape[-1], self.device or home)
            else:
                after = before if owners == 1 else copy.deepcopy(before)
            after.update(x, mask, weight)
            kept = None if mask is None else mask.clone()
            last = self._last = _Seen(x.detach().clone(), kept, weight, before, after, set())
        last.names.add(name)
        self._of[name] = last.after

    def groups(self) -> list[tuple[tuple[str, ...], Covariance]]:
        """Each stream once, with the names that read it, in the order of their first update."""
        names: dict[int, list[str]] = {}
        for name, stream in self._of.items():
            names.setdefault(id(stream), []).append(name)
        return [(tuple(group), self._of[group[0]]) for group in names.values()]

    def __getitem__(self, name: str) -> Covariance:
        if name not in self._of:
            raise ValueError(f"{name!r} has seen no inputs. Found inputs of {sorted(self._of)}.")
        return self._of[name]


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return (a.dtype, a.device, a.shape) == (b.dtype, b.device, b.shape) and torch.equal(a, b)
