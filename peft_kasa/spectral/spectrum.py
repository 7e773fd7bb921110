"""A cut of a singular value decomposition."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .lowrank import LowRank


class Spectrum(NamedTuple):
    """k singular triples of an (m, n) matrix, by descending singular value: `u @ diag(s) @ v`.

    Signs are fixed: the entry of largest magnitude in each column of `u` is positive.

    Examples:
        >>> import torch
        >>> from peft_kasa.spectral import Engine
        >>> cut = Engine()(torch.diag(torch.tensor([16.0, 4.0, 1.0])), 2, end="top")
        >>> cut.s.tolist()
        [16.0, 4.0]
        >>> cut.scaled(0.25).balanced().dense().diagonal().tolist()
        [4.0, 1.0, 0.0]
    """

    u: Tensor  # (m, k), orthonormal columns
    s: Tensor  # (k,), descending
    v: Tensor  # (k, n), orthonormal rows

    def scaled(self, factor: float) -> Spectrum:
        """The same triples with every singular value times a number."""
        return self._replace(s=self.s * factor)

    def split(self) -> LowRank:
        """The singular values in the core: left = u, core = s, right = v."""
        return LowRank(self.u, self.s, self.v)

    def balanced(self) -> LowRank:
        """The square roots of the singular values on both sides: left = u sqrt(s), right = sqrt(s) v."""
        return self.split().balanced()

    def signed(self) -> Spectrum:
        """The same triples with canonical signs."""
        if self.u.numel() == 0:
            return self
        pivot = self.u.abs().argmax(dim=0, keepdim=True)
        sign = torch.where(self.u.gather(0, pivot)[0] < 0, -1.0, 1.0).to(self.u.dtype)
        return Spectrum(self.u * sign, self.s, self.v * sign[:, None])

    def stored(self, device: torch.device, dtype: torch.dtype) -> Spectrum:
        """The same triples on a device, in a dtype.

        Raises:
            ValueError: singular values beyond the dtype.
        """
        if len(self.s) and not self.s[0] <= torch.finfo(dtype).max:
            raise ValueError(
                f"`w` has to have singular values that {dtype} holds. Found {self.s[0]:.1e}: ask for "
                'Engine(precision="float64"), or scale `w`.'
            )
        return Spectrum(*(part.to(device, dtype).contiguous() for part in self))

    def __repr__(self) -> str:
        return f"Spectrum({self.u.shape[0]} x {len(self.s)} x {self.v.shape[1]})"
