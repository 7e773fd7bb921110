"""Federated averaging of adapters whose cores alone learn, without any error (Fed-SB)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..adapter.files import source
from ..adapter.files.config_file import AdapterConfigFile
from ..adapter.keys import FROZEN, LEARNT, slot_of
from ..files import replacing
from ..methods.method import require
from ..peft_type import NAME


def average_cores(
    folders: Sequence[str | os.PathLike[str]], into: str | os.PathLike[str], weights: Sequence[float] | None = None
) -> None:
    """Averages saved adapters that share their frames, and saves the mean as an adapter.

    With L and R the same on all clients, mean(L K_i R) = L mean(K_i) R: the mean of the updates is an adapter of the
    same rank, exactly. Averaging LoRA's two factors is not. Sums are taken in float64.

    Args:
        folders: of adapters saved by `save_pretrained`, all from one start: LoRA-SB, LoRA-XS, SVFit, SVF, IntTune, SVFT
            with `gate=False`.
        into: the folder of the mean, made if need be. Its config is the first adapter's.
        weights: of the adapters, such as the sizes of their data. None: all the same.

    Raises:
        ValueError: another method or fields than the first's, more learnt than a linear core, frames that differ, a
            file that is missing, damaged or a pickle; the message names the folder and the tensor. Nothing is written
            then.

    Examples:
        >>> import tempfile, torch
        >>> from peft import get_peft_model
        >>> from peft_kasa import LoRAXSConfig, average_cores
        >>> base, folder = torch.nn.Sequential(torch.nn.Linear(8, 6)), tempfile.mkdtemp()
        >>> model = get_peft_model(base, LoRAXSConfig(r=2, target_modules=["0"]))
        >>> core = model.base_model.model[0].slots("default")["core"]
        >>> for client, value in enumerate([1.0, 3.0]):  # each trains, and sends its core
        ...     _ = core.data.fill_(value)
        ...     model.save_pretrained(f"{folder}/client{client}")
        >>> average_cores([f"{folder}/client0", f"{folder}/client1"], f"{folder}/mean")
        >>> model.load_adapter(f"{folder}/mean", "mean")
        <All keys matched successfully>
        >>> model.base_model.model[0].slots("mean")["core"].unique().item()
        2.0
    """
    require(len(folders) > 0, "folders has to name at least one adapter", folders)
    weights = [1.0] * len(folders) if weights is None else weights
    require(len(weights) == len(folders), f"weights has to have {len(folders)} entries, one a folder", len(weights))
    positive = min(weights) >= 0 and 0 < sum(weights) < float("inf")
    require(positive, "weights have to be finite numbers of at least 0, and one above it", weights)
    first, config = _read(folders[0])
    total = {key: torch.zeros(value.shape, dtype=torch.float64) for key, value in first.items() if LEARNT in key}
    for folder, weight in zip(folders, weights, strict=True):
        state, other = _read(folder)
        _check_alike(folder, config, other, first, state)
        for key in total:
            total[key] += state[key].double() * (weight / sum(weights))
    mean = first | {key: value.to(first[key].dtype) for key, value in total.items()}
    os.makedirs(into, exist_ok=True)
    with replacing(os.path.join(into, SAFETENSORS_WEIGHTS_NAME)) as made:
        save_file(mean, os.path.join(made, SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})
    with replacing(os.path.join(into, CONFIG_NAME)) as made:
        shutil.copyfile(Path(folders[0]) / CONFIG_NAME, os.path.join(made, CONFIG_NAME))


def _read(folder: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        config = json.loads((Path(folder) / CONFIG_NAME).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} has no {CONFIG_NAME} that can be read ({error}). Name folders that save_pretrained wrote."
        ) from error
    require(isinstance(config, dict), f"{folder}: {CONFIG_NAME} has to hold an object", type(config).__name__)
    require(config.get("peft_type") == NAME, f"{folder}: peft_type has to be {NAME}", config.get("peft_type"))
    source.check(folder)
    state = load_file(Path(folder) / SAFETENSORS_WEIGHTS_NAME)
    learnt = sorted({slot_of(key) for key in state if LEARNT in key})
    rule = f"{folder}: only cores may learn, since the mean of several factors is not the mean of their products"
    require(learnt == ["core"], rule, learnt)
    rule = f"{folder}: the core has to be linear in what learns, or the mean is not the mean of the updates"
    require(AdapterConfigFile(**config).averages, rule, f"{config['method']} with a gate or a rotation")
    return state, config


def _check_alike(
    folder: str | os.PathLike[str],
    config: dict[str, Any],
    other: dict[str, Any],
    first: dict[str, Tensor],
    state: dict[str, Tensor],
) -> None:
    for field in ("method", "r", "alpha", "use_rslora", "rank_pattern", "alpha_pattern"):
        rule = f"{folder}: {field} has to be {config.get(field)!r}, as in the first adapter"
        require(config.get(field) == other.get(field), rule, other.get(field))
    if odd := sorted(first.keys() ^ state.keys()):
        raise ValueError(f"{folder}: {odd[0]} is in one adapter and not in the other. Train the same modules.")
    for key, value in first.items():
        if LEARNT in key:
            require(
                state[key].shape == value.shape, f"{folder}: {key} has to be {tuple(value.shape)}", state[key].shape
            )
            require(bool(state[key].isfinite().all()), f"{folder}: {key} has to be finite", "NaN or infinite entries")
        elif not torch.equal(value, state[key]):
            reason = (
                "so the cores do not belong to the same frames. Give all clients one start: save it once, and let each "
                "go on from there."
                if FROZEN in key
                else "and only cores are averaged. Train without modules_to_save, trainable_token_indices and bias."
            )
            raise ValueError(f"{folder}: {key} differs from the first adapter's, {reason}")
