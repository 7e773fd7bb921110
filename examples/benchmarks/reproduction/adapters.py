"""A contender's adapter on a base model; those that start from data are calibrated on training rows first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from contenders import METHODS
from peft import get_peft_model

from peft_kasa import calibrate

CONTENDERS = {method.name: method for method in METHODS}
CALIBRATION = 64  # training rows


def adapted(name: str, rank: int, seed: int, base: Any, rows: Sequence[Any], **given: Any) -> Any:
    """`base` with the contender's adapter at that rank; `rows` as `calibrate` takes them, `given` for the config."""
    method = CONTENDERS[name].at(rank)
    if method.ours:
        given["seed"] = seed
    config = method.config(**given)
    if method.statistics:
        calibrate(base, rows, config, samples=CALIBRATION, progress=False)
    return get_peft_model(base, config)
