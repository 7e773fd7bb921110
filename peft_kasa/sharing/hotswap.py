"""Another adapter's values in the place of one that is loaded, without a new module or a recompilation."""

from __future__ import annotations

import os
from dataclasses import fields
from typing import Any

from peft import PeftConfig, set_peft_model_state_dict
from peft.utils import load_peft_weights

from ..adapter.files import source
from ..adapter.filling import module_scale
from ..adapter.layer import SpectralLinear
from ..adapter.starting import adapted
from ..methods.method import SpectralConfig, require


def hotswap_adapter(
    model: Any, path: str | os.PathLike[str], adapter_name: str = "default", torch_device: Any = None, **kwargs: Any
) -> None:
    """Copies the values of a saved adapter into those of a loaded one, in place: a compiled model stays compiled.

    PEFT's `peft.utils.hotswap.hotswap_adapter` does this for LoRA and refuses all other types. Here both adapters have
    to be of one method and of the same shapes; nothing is padded. What the file gives is checked as at loading.

    Args:
        model: a PeftModel with the adapter, or what torch.compile made of it.
        path: the folder, or the Hub's name, of the saved adapter.
        adapter_name: the adapter whose values are replaced. It keeps its name.
        torch_device: where the file is read to. None: the CPU.
        **kwargs: subfolder, revision, cache_dir, token: as in PEFT's from_pretrained.

    Raises:
        ValueError: another method, variant, scale, shape, save_frames or base, a merged adapter, one that trains more
            than its updates, a damaged file or a pickle. The loaded adapter is left as it was.

    Examples:
        >>> import tempfile, torch
        >>> from peft import get_peft_model
        >>> from peft_kasa import PiSSAConfig, hotswap_adapter
        >>> base = torch.nn.Sequential(torch.nn.Linear(8, 6))
        >>> model = get_peft_model(base, PiSSAConfig(r=2, target_modules=["0"]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(folder)
        ...     hotswap_adapter(model, folder)
    """
    model = getattr(model, "_orig_mod", model)
    layers = list(adapted(model, adapter_name).values())
    config: Any = PeftConfig.from_pretrained(path, **kwargs)
    _check(model.peft_config[adapter_name], config, os.fspath(path))
    for layer in layers:
        _check_scale(layer, adapter_name, config)
    source.check(path, **kwargs)
    state = load_peft_weights(os.fspath(path), device=torch_device or "cpu", **kwargs)
    set_peft_model_state_dict(model, state, adapter_name=adapter_name)


def _check(loaded: SpectralConfig, config: Any, path: str) -> None:
    """The method's own fields have to be the same: the layers go on with the loaded adapter's."""
    rule = f"{path}: the adapter has to be a {type(loaded).__name__}"
    require(type(config) is type(loaded), rule, type(config).__name__)
    own = {field.name for field in fields(config)} - {field.name for field in fields(SpectralConfig)}
    for name in sorted(own):
        rule = f"{path}: {name} has to be {getattr(loaded, name)!r}, as in the loaded adapter"
        require(getattr(config, name) == getattr(loaded, name), rule, getattr(config, name))
    rule = f"{path}: save_frames has to be {loaded.keeps_frames}, as in the loaded adapter (or use load_adapter)"
    require(config.keeps_frames == loaded.keeps_frames, rule, config.keeps_frames)
    more = loaded.beyond + config.beyond
    require(not more, f"{path}: an adapter that is swapped has to train its updates only. Use load_adapter", more)


def _check_scale(layer: SpectralLinear, adapter: str, config: SpectralConfig) -> None:
    known = layer.adapters[adapter]
    scale = module_scale(config, layer.pattern_name, known.rank)
    rule = f"{layer.name}: the scale (alpha, r, use_rslora) has to be {known.scale:g}, as in the loaded adapter"
    require(scale == known.scale, rule, scale)
