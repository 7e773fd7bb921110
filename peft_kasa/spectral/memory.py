"""Which errors say that there is too little memory: torch's CPU allocator raises a plain RuntimeError."""

from __future__ import annotations

import re

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


def reason(error: BaseException) -> str:
    """The first line of an error, without where in torch's source it was raised.

    Examples:
        >>> from peft_kasa.spectral.memory import reason
        >>> reason(RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. can't allocate memory"))
        "can't allocate memory"
    """
    line = str(error).partition("\n")[0].strip().rstrip(".")
    return re.sub(r"^\[enforce fail at .*?\] .*?\. ", "", line) or type(error).__name__
