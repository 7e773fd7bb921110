"""What a model card says of adapters: their facts as a table, and how to load them with this package and without."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import transformers
from huggingface_hub import EvalResult

from ..adapter.base.sharding import whole_shape
from ..adapter.layer import SpectralLinear
from ..adapter.starting import layers_of
from ..methods.method import SpectralConfig
from ..peft_type import NAME
from .export import LoraExport

PACKAGE = "peft_kasa"


def text(
    model: Any,
    adapters: Sequence[str],
    base: str,
    where: str,
    lora: LoraExport | None,
    results: Iterable[EvalResult],
    root: str,
) -> str:
    """Our part of the card, in Markdown. See `card.write` for the arguments."""
    first = "default" if "default" in adapters else adapters[0]
    config = model.peft_config[first]
    opened = _base(model, base)
    native = f'model = PeftModel.from_pretrained(base, "{where}"{_subfolder(first, root)})'
    parts = [
        f"## {type(config).__name__.removesuffix('Config')} adapter",
        _table([["", *adapters], *_facts(model, adapters, base)]),
        "### Load it",
        f"`pip install {PACKAGE}`, then:",
        _code(_imports(config), "from peft import PeftModel", *opened, native),
        f"Without the package, PEFT stops with `KeyError: '{NAME}'`: install it, and import it before you load.",
        "### Load it without the package",
        *_without(opened, where, lora),
        *_metrics(results),
    ]
    return "\n\n".join(parts)


def _facts(model: Any, adapters: Sequence[str], base: str) -> list[list[str]]:
    """The table's rows: what, and its value for each adapter."""
    layers = {adapter: list(layers_of(model, adapter)) for adapter in adapters}
    configs: dict[str, SpectralConfig] = {adapter: model.peft_config[adapter] for adapter in adapters}
    rows = {
        "method": lambda a: _method(configs[a]),
        "base model": lambda a: base or type(model.get_base_model()).__name__,
        "base weights": lambda a: _storage(model, layers[a]),
        "rank": lambda a: _range(layer.adapters[a].rank for layer in layers[a]),
        "alpha": lambda a: "the method's own" if configs[a].alpha is None else f"{configs[a].alpha:g}",
        "scale": lambda a: _range(layer.adapters[a].scale for layer in layers[a]),
        "target modules": lambda a: ", ".join(f"`{name}`" for name in _targets(layers[a])),
        "adapted modules": lambda a: f"{len(layers[a]):,}",
        "parameters that learn": lambda a: f"{_learning(layers[a], a):,}",
        "also trained": lambda a: ", ".join(f"`{name}`" for name in configs[a].beyond),
    }
    table = [[what, *(value(adapter) for adapter in adapters)] for what, value in rows.items()]
    return [row for row in table if any(row[1:])]


def _method(config: SpectralConfig) -> str:
    link = f" ([arXiv:{config.paper}](https://arxiv.org/abs/{config.paper}))" if config.paper else ""
    return f"`{config.name}`{link}"


def _storage(model: Any, layers: list[SpectralLinear]) -> str:
    quantization = getattr(getattr(model.get_base_model(), "config", None), "quantization_config", None)
    if quantization is None:
        return ", ".join(sorted({str(layer.stored.dtype).removeprefix("torch.") for layer in layers}))
    known = quantization if isinstance(quantization, dict) else quantization.to_dict()
    kind = "4-bit" if known.get("load_in_4bit") else "8-bit" if known.get("load_in_8bit") else "quantised"
    return f"{kind} ({known.get('bnb_4bit_quant_type') if kind == '4-bit' else known.get('quant_method', 'unknown')})"


def _targets(layers: list[SpectralLinear]) -> list[str]:
    return sorted({layer.pattern_name.rpartition(".")[2] for layer in layers})


def _learning(layers: list[SpectralLinear], adapter: str) -> int:
    learnt = (value for layer in layers for value in layer.peft_kasa_learnt[adapter].parameters())
    return sum(whole_shape(value).numel() for value in learnt)


def _range(values: Iterable[float]) -> str:
    found = sorted(set(values))
    return f"{found[0]:g}" if len(found) == 1 else f"{found[0]:g} to {found[-1]:g}"


def _imports(config: SpectralConfig) -> str:
    """The package, or the module in which someone else's method is defined."""
    module = type(config).__module__
    module = PACKAGE if module.partition(".")[0] == PACKAGE else module
    return f"import {module}  # tells PEFT of this kind of adapter"


def _base(model: Any, base: str) -> list[str]:
    """Code that opens the base model."""
    kind = type(model.get_base_model()).__name__
    if not base:
        return ["", f"base = ...  # the {kind} that the adapter was trained on"]
    head = re.search(r"For\w+$", kind)
    auto = f"AutoModel{head[0] if head else ''}"
    kind = auto if hasattr(transformers, auto) else kind
    return [f"from transformers import {kind}", "", f'base = {kind}.from_pretrained("{base}")']


def _subfolder(adapter: str, root: str) -> str:
    return "" if adapter == root else f', subfolder="{adapter}"'


def _without(opened: list[str], where: str, lora: LoraExport | None) -> list[str]:
    if lora is None:
        return [
            "There is no plain LoRA here. Whoever has the package can make one: `peft_kasa.export_lora(model, folder)`."
        ]
    worst = max(lora.errors.values())
    loss = f"with a relative error of up to {worst:.1e} in a module's update" if worst else "exact up to rounding"
    loaded = f'model = PeftModel.from_pretrained(base, "{where}", subfolder="lora")'
    return [
        f"`lora/` holds the same adapter as a plain LoRA of rank {lora.rank}, {loss}. PEFT alone reads it, and so do "
        f"servers (vLLM: `--max-lora-rank {lora.max_lora_rank}`):",
        _code("from peft import PeftModel", *opened, loaded),
    ]


def _metrics(results: Iterable[EvalResult]) -> list[str]:
    rows = [
        [result.task_name or result.task_type, result.dataset_name, result.metric_name or result.metric_type, value]
        for result in results
        for value in [f"{result.metric_value}"]
    ]
    return ["### Results", _table([["task", "dataset", "metric", "value"], *rows])] if rows else []


def _table(rows: list[list[str]]) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)


def _code(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])
