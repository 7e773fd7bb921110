"""Which packages are installed, and whether their versions are those that the package asks for."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version

OPTIONAL = ("trl>=1.0", "datasets", "bitsandbytes", "gguf", "deepspeed", "torchao")


def versions() -> list[dict[str, Any]]:
    """A row a package: its name, version, what is required of it, whether it is needed, and its state: "ok", "absent"
    or "too old"."""
    try:
        needed = [Requirement(text) for text in requires("peft_kasa") or []]
    except PackageNotFoundError:  # run from a copy that is not installed
        needed = [
            Requirement(text) for text in ("torch>=2.6", "peft>=0.21", "transformers>=5.0", "accelerate", "safetensors")
        ]
    base = [*(known for known in needed if known.marker is None), Requirement("rich")]  # which this command needs
    optional = [Requirement(text) for text in OPTIONAL]
    return [_python(), *(_row(known, True) for known in base), *(_row(known, False) for known in optional)]


def _python() -> dict[str, Any]:
    found = ".".join(map(str, sys.version_info[:3]))
    state = "ok" if sys.version_info >= (3, 10) else "too old"
    return {"package": "python", "version": found, "required": ">=3.10", "needed": True, "state": state}


def _row(known: Requirement, needed: bool) -> dict[str, Any]:
    try:
        found = version(known.name)
    except PackageNotFoundError:
        found = None
    fits = found is not None and known.specifier.contains(Version(found), prereleases=True)
    state = "ok" if fits else "absent" if found is None else "too old"
    return {"package": known.name, "version": found, "required": str(known.specifier), "needed": needed, "state": state}
