"""Sharing a sweep over the ranks of torch.distributed (torchrun, accelerate). `PEFT_KASA_SHARE=0` turns it off."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

logger = logging.getLogger(__name__)


def assigned(costs: Sequence[float], ranks: int) -> list[int]:
    """The owner of each job: the costliest first, each to the rank with least to do. The same on every rank.

    Examples:
        >>> assigned([1.0, 3.0, 2.0], 2)
        [1, 0, 1]
    """
    load, owners = [0.0] * ranks, [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        owners[index] = min(range(ranks), key=lambda rank: (load[rank], rank))
        load[owners[index]] += costs[index]
    return owners


def owners(jobs: Sequence[object], costs: Sequence[float]) -> list[int] | None:
    """The rank that runs each job. None where this rank runs all: there are no others, or they have other jobs.

    Args:
        jobs: a description of each, compared between ranks: ranks that were given other work each do their own.
        costs: of each, in any unit.
    """
    if not sharing():
        return None
    logger.info("waiting for the other ranks, to share %d decompositions (PEFT_KASA_SHARE=0 turns that off)", len(jobs))
    lists: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(lists, list(jobs))
    return assigned(costs, len(lists)) if all(other == lists[0] for other in lists) else None


def rank() -> int:
    """This process's rank; 0 without torch.distributed."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def agree(failure: BaseException | None) -> None:
    """Raises on every rank what failed on any, so that none waits for results that will not come."""
    texts: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(texts, None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    for other, text in enumerate(texts):
        if text is not None:
            raise RuntimeError(f"rank {other} could not decompose its share: {text}")


@torch.no_grad()
def exchange(results: Sequence[Sequence[Tensor]], owners: Sequence[int]) -> None:
    """Writes each job's results, tensors of one dtype, from its owner to all ranks."""
    for tensors, owner in zip(results, owners, strict=True):
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).to(_carrier(tensors[0].device))
        dist.broadcast(flat, owner)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


def sharing() -> bool:
    """Whether there are other ranks to share with."""
    if not dist.is_available() or not dist.is_initialized() or os.environ.get("PEFT_KASA_SHARE") == "0":
        return False
    return dist.get_world_size() > 1


def _carrier(device: torch.device) -> torch.device:
    """A device that the backend can send from: NCCL alone knows no CPU tensors, gloo alone no others everywhere."""
    backends = dist.get_backend_config() if hasattr(dist, "get_backend_config") else f"{device.type}:"
    if f"{device.type}:" in backends:
        return device
    return torch.device("cpu") if "cpu:" in backends else torch.device("cuda", torch.cuda.current_device())
