"""`peft-kasa decompose`: a method's decompositions of a model, ahead, into the disk cache."""

from __future__ import annotations

import os
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import get_peft_model

from peft_kasa_cli.output import Output

from ..adapter.starting import layers_of
from ..files import check_writable
from ..methods.method import SpectralConfig
from ..spectral.cache import Cache, entries, failures, located
from .configs import build_config
from .models import load_model

VARIABLE = "PEFT_KASA_CACHE"


def run(args: Namespace, out: Output) -> None:
    """Starts the method on the model with the cache on: what it holds is read, the rest is computed and kept."""
    config = build_config(args.method, {"r": args.r, "target_modules": _targets(args.target_modules)}, args.set)
    _check(config)
    cache = located(args.cache) or located(None) or located(True)
    assert cache is not None
    check_writable(str(cache.folder), inside=True)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    _check_device(device)
    out.note(f"loading {args.model}")
    model = load_model(args.model, args.dtype, device=device)
    failures.pop(cache.folder, None)
    before, began = {entry.key for entry in entries(cache.folder)}, time.monotonic()
    with _caching(cache):
        adapted = get_peft_model(model, config)  # type: ignore[arg-type]  # shows its own progress
    asked = sum(len(layer.adapters["default"].asks) for layer in layers_of(adapted, "default"))
    new = [entry for entry in entries(cache.folder) if entry.key not in before]
    if problem := failures.get(cache.folder):
        reason = f"{problem.strerror}, after {len(new)} of the decompositions; run again, it goes on from there"
        raise OSError(problem.errno, reason, str(cache.folder)) from problem
    written = sum(entry.bytes for entry in new)
    data = {
        "cache": str(cache.folder),
        "method": config.name,
        "decompositions": asked,
        "computed": len(new),
        "reused": asked - len(new),
        "bytes": written,
        "worst_error": max((entry.error for entry in new), default=0.0),
        "seconds": round(time.monotonic() - began, 3),
    }
    line = (
        f"{asked} decompositions for {config.name}: {data['computed']} computed, {data['reused']} there already, in "
        f"{data['seconds']:.1f} s. {written / 1e6:.1f} MB added to {cache.folder}"
    )
    if asked:
        out.result(data, line, f"Train with {VARIABLE}={cache.folder}, the same arguments, dtype and kind of device.")
    else:
        out.result(data, f"{config.name} starts without decompositions: there is nothing to compute ahead.")


def _targets(names: list[str]) -> list[str] | str:
    return names[0] if len(names) == 1 and names[0] == "all-linear" else names


def _check(config: SpectralConfig) -> None:
    if config.needs:
        raise ValueError(
            f"{config.name} starts from {config.needs} of data, so nothing can be decomposed ahead. "
            "`calibrate(path=...)` keeps what it gathers in a file."
        )


def _check_device(name: str) -> None:
    try:
        torch.zeros(1, device=name).item()  # a number: the meta device has none
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(
            f"--device has to be one that works here, see `peft-kasa doctor`. Found {name}: {reason}."
        ) from error


@contextmanager
def _caching(cache: Cache) -> Iterator[None]:
    """The engines of adapters ask the environment where the cache is."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = str(cache.folder)
    try:
        yield
    finally:
        os.environ.pop(VARIABLE)
        if before is not None:
            os.environ[VARIABLE] = before
