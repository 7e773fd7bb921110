"""Which errors say that there is too little memory: torch's CPU allocator raises a plain RuntimeError."""

from __future__ import annotations

import torch

TEXTS = ("allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")  # of allocators; of cuBLAS, cuSOLVER


def memory_error(error: BaseException) -> type[RuntimeError | MemoryError] | None:
    """The kind of error to raise again where memory was too little, or None where it was something else.

    Examples:
        >>> from peft_kasa.spectral.memory import memory_error
        >>> memory_error(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
        <class 'MemoryError'>
    """
    if isinstance(error, torch.OutOfMemoryError):
        return torch.OutOfMemoryError
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(t in str(error) for t in TEXTS)):
        return MemoryError
    return None
