"""What is measured of a spectrum. All take singular values (k,), descending, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from ..spectral.weights import scaled


def singular_values(weight: Tensor) -> Tensor:
    """All singular values (min(m, n),) of a weight (m, n), descending, in float64.

    They are the roots of the eigenvalues of the smaller Gram matrix, made and solved in float64: each is right to 2e-8
    of the largest, a third of what float32 rounds off a weight, and those above a thousandth of it to 1e-10
    of themselves.

    Raises:
        ValueError: NaN or infinite entries.
    """
    weight, exponent = scaled(weight.detach())
    weight = weight.to("cpu" if weight.device.type == "mps" else weight.device, torch.float64)
    m, n = weight.shape
    gram = weight @ weight.T if m <= n else weight.T @ weight
    values = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0).sqrt().cpu()
    return torch.ldexp(values, torch.tensor(exponent))


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of the values' shares of their sum (Roy & Vetterli 2007): 1 to k, 0 for a zero matrix.

    Examples:
        >>> import torch
        >>> from peft_kasa.report.measures import effective_rank
        >>> round(effective_rank(torch.tensor([2.0, 2.0, 0.0])), 6)
        2.0
    """
    total = values.sum()
    return torch.special.entr(values / total).sum().exp().item() if total > 0 else 0.0


def stable_rank(values: Tensor) -> float:
    """The squared Frobenius norm over the squared largest value: 1 to k, 0 for a zero matrix."""
    shares = energies(values)
    return (1 / shares[0]).item() if len(shares) and shares[0] > 0 else 0.0


def energies(values: Tensor) -> Tensor:
    """Each triple's share (k,) of the squared Frobenius norm; zeros for a zero matrix."""
    largest = values.max() if len(values) else torch.tensor(0.0)
    if not largest > 0:
        return torch.zeros_like(values)
    squares = (values / largest).square()
    return squares / squares.sum()


def energy(values: Tensor, rank: int) -> float:
    """The share of the squared Frobenius norm that the `rank` largest triples hold."""
    return energies(values)[:rank].sum().item()


def tail_energy(values: Tensor, rank: int) -> float:
    """The share that the `rank` smallest triples hold, summed by itself: it may be far below 1e-16."""
    return energies(values)[max(len(values) - rank, 0) :].sum().item()


def rank_for(values: Tensor, share: float) -> int:
    """The smallest rank whose triples hold this share, 0 < share <= 1; 0 for a zero matrix."""
    held = energies(values).cumsum(0)
    if not len(held) or held[-1] == 0:
        return 0
    return min(int((held < share * held[-1]).sum()) + 1, len(held))
