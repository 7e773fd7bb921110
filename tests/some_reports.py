"""Reports of each kind, of the tiny model, with all that they can show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bases
from peft import get_peft_model

from peft_kasa import KaSAConfig, PiSSAConfig
from peft_kasa.report import inspect, spectrum
from peft_kasa.report.report import Report


def adapter(folder: Path, config: Any) -> str:
    """The folder of an adapter that has moved."""
    model = get_peft_model(bases.fresh(), config)
    bases.move(model)
    model.save_pretrained(str(folder))
    return str(folder)


def each_kind(folder: Path) -> dict[str, Report]:
    """Weights, an adapter by its files alone, and one beside its base and another adapter."""
    one = adapter(folder / "one", KaSAConfig(r=4, target_modules="all-linear"))
    other = adapter(folder / "other", PiSSAConfig(r=2, target_modules="all-linear"))
    return {
        "weights": spectrum(bases.fresh()),
        "files": inspect(one),
        "adapter": inspect(one, bases.fresh(), against=other),
    }
