"""Bytes of each method's checkpoint, with frames and without, from the shapes of its slots alone: no model is loaded.

python examples/benchmarks/sizes.py
"""

from __future__ import annotations

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_kasa import SpectralConfig, SpectralLinear
from peft_kasa.adapter.files.checkpoint import left_out
from peft_kasa.methods import methods

MODELS = {
    "SmolLM2-135M": LlamaConfig(
        vocab_size=64,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
    ),
    "LLaMA-2-7B": LlamaConfig(vocab_size=64, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32),
}


def size(shape: LlamaConfig, config: SpectralConfig) -> int:
    """Bytes of all tensors that a checkpoint of all linear layers would hold."""
    with torch.device("meta"):
        model = get_peft_model(LlamaForCausalLM(shape), config)
    layers = [layer for layer in model.modules() if isinstance(layer, SpectralLinear)]
    kept = [
        value
        for layer in layers
        for name, value in layer.slots("default").items()
        if name not in left_out(layer, "default")
    ]
    return sum(4 * value.numel() for value in kept)


def main() -> None:
    print("| r = 8, all linear layers, MB |" + "".join(f" {name} | without frames |" for name in MODELS))
    print("|---|" + "---|---|" * len(MODELS))
    for name, known in sorted(methods().items()):
        cells = []
        for shape in MODELS.values():
            given = {"target_modules": "all-linear"} | ({} if known().r is None else {"r": 8})
            cells.append(f"{size(shape, known(save_frames=True, **given)) / 1e6:,.1f}")
            cells.append("-" if known.needs else f"{size(shape, known(save_frames=False, **given)) / 1e6:,.1f}")
        print(f"| {name}{' (default: without)' if known.compact else ''} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
