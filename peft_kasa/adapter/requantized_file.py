"""A requantised base in a file of its own: written once, where an adapter's checkpoints are written often."""

from __future__ import annotations

import os
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..files import replacing
from ..methods.method import require
from .base.fingerprint import FINGERPRINT, SAME, SIDE, distance, sketch
from .base.fourbit import FourBit
from .files.source import check_readable
from .layer import SpectralLinear
from .requantize import check_base
from .slots import Product
from .starting import all_layers

FILE = "requantized.safetensors"


@torch.no_grad()
def save_requantized(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes the bases that `requantize` made to `requantized.safetensors` in a folder: the 4 bits and the float start
    beside them, about 0.5 byte a parameter and 4 r (m + n) bytes a module. The adapter is saved apart.

    Raises:
        ValueError: nothing in the model was requantised, or it is merged.

    Examples:
        >>> import os, tempfile, torch
        >>> from bitsandbytes.nn import Linear4bit
        >>> from peft import get_peft_model
        >>> from peft_kasa import PiSSAConfig, requantize, save_requantized
        >>> weight = torch.randn(64, 64)
        >>> base = torch.nn.Sequential(Linear4bit(64, 64, bias=False, quant_type="nf4"))
        >>> _ = base.load_state_dict({"0.weight": weight})
        >>> model = get_peft_model(base.to("cpu"), PiSSAConfig(r=8, target_modules=["0"]))
        >>> _ = requantize(model, {"0.weight": weight})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_requantized(model, folder)
        ...     os.listdir(folder)
        ['requantized.safetensors']
    """
    layers = [layer for layer in all_layers(model) if layer.base.first is not None]
    require(bool(layers), "a base has to be requantised before it is saved (peft_kasa.requantize)", "none")
    tensors: dict[str, Tensor] = {}
    for layer in layers:
        require(not layer.merged, f"{layer.name}: unmerge_adapter first", layer.merged_adapters)
        tensors |= {f"{layer.name}.{key}": value for key, value in _held(layer).items()}
    os.makedirs(path, exist_ok=True)
    with replacing(os.path.join(path, FILE)) as folder:
        save_file({key: value.cpu().contiguous() for key, value in tensors.items()}, os.path.join(folder, FILE))


@torch.no_grad()
def load_requantized(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Gives a model on the first 4-bit base the bases that `save_requantized` wrote, bit for bit.

    Raises:
        ValueError: the file is damaged, was made on another base or in another 4-bit format, does not fit it, or has
            modules that no adapter wraps. Nothing is changed then.

    Examples:
        >>> import tempfile, torch
        >>> from bitsandbytes.nn import Linear4bit
        >>> from peft import get_peft_model
        >>> from peft_kasa import PiSSAConfig, load_requantized, requantize, save_requantized
        >>> weight = torch.randn(64, 64)
        >>> def adapted():
        ...     base = torch.nn.Sequential(Linear4bit(64, 64, bias=False, quant_type="nf4"))
        ...     base.load_state_dict({"0.weight": weight})
        ...     return get_peft_model(base.to("cpu"), PiSSAConfig(r=8, target_modules=["0"]))
        >>> first, second = adapted(), adapted()
        >>> _ = requantize(first, {"0.weight": weight})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_requantized(first, folder)
        ...     load_requantized(second, folder)
        >>> torch.equal(*(model.base_model.model[0].base.matrix() for model in (first, second)))
        True
    """
    layers = {layer.name: layer for layer in all_layers(model)}
    check_readable(os.path.join(path, FILE))
    with safe_open(os.path.join(path, FILE), framework="pt") as file:
        found: dict[str, dict[str, Any]] = {}
        for key in file.keys():  # noqa: SIM118
            name, _, part = key.rpartition(".")
            found.setdefault(name, {})[part] = file.get_slice(key)
        for name, parts in found.items():
            require(name in layers, "the file's modules have to be wrapped by an adapter of the model", name)
            _check_parts(layers[name], parts)
        made = {
            name: _made(layers[name], {part: file.get_tensor(f"{name}.{part}") for part in parts})
            for name, parts in found.items()
        }
    for name, (held, correction) in made.items():
        layers[name].base.replace(held, correction)


def _held(layer: SpectralLinear) -> dict[str, Tensor]:
    base: Any = layer.base
    base.unpack()
    return base.four_bits().tensors() | {
        "up": base.correction.up,
        "down": base.correction.down,
        FINGERPRINT: sketch(base.first.matrix(as_repacked=True).float()),
    }


def _check_parts(layer: SpectralLinear, parts: dict[str, Any]) -> None:
    """Names and shapes, before anything is read."""
    check_base(layer)
    own: Any = layer.base.four_bits()
    k = parts["down"].get_shape()[0] if "down" in parts else 0
    m, n = layer.out_features, layer.in_features
    shapes = {key: list(value.shape) for key, value in own.tensors().items()}
    shapes |= {"up": [m, k], "down": [k, n], FINGERPRINT: [SIDE, SIDE]}
    given = {key: value.get_shape() for key, value in parts.items()}
    require(given == shapes, f"{layer.name}: {FILE} has to hold, of a base in this 4-bit format, {shapes}", given)


def _made(layer: SpectralLinear, parts: dict[str, Tensor]) -> tuple[FourBit, Product]:
    own: Any = layer.base.four_bits()
    for key, value in own.tensors().items():
        require(parts[key].dtype == value.dtype, f"{layer.name}: {key} has to be {value.dtype}", parts[key].dtype)
    floats = (value for value in parts.values() if value.is_floating_point())
    require(all(value.isfinite().all() for value in floats), f"{layer.name}: {FILE} has to be finite", "NaN or inf")
    same = torch.equal(parts["code"], own.scales.code.cpu())
    require(same, f"{layer.name}: {FILE} has to be of {own.scales.quant_type}, as the base is", "another code")
    away = distance(parts[FINGERPRINT], sketch(layer.base.matrix(as_repacked=True)))
    rule = (
        f"{layer.name}: {FILE} belongs to another 4-bit base. Load that one: the relative distance has to be <= {SAME}"
    )
    require(away <= SAME, rule, f"{away:.1e}")
    return own.filled(parts), Product(parts["up"].float(), None, parts["down"].float())
