"""What the package promises, measured on SmolLM2-135M-Instruct: prints one line a figure.

    python examples/benchmarks/contract.py            # on a GPU if there is one; DDP always on two CPU processes

1. Base identity: after training and evaluating, how many of the base's tensors differ, and by how much its outputs do
   with the adapter disabled, for each member on fp32, bf16, nf4 and int8 bases.
2. The error of an update in bfloat16, by telescoped differences and by subtracting the start: layer 10's gate_proj,
   r = 16, updates of 1e-4.
3. Masters: the distance that 1,000 steps at lr 2e-5 cover after TRL's bfloat16 cast on a 4-bit base, over what float32
   covers; and the same with the masters left in bfloat16.
4. A regulariser's effective / intended gradient, for each way to train.
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import effect
import torch
from base_model import smollm2
from datasets import Dataset, disable_progress_bars
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, Trainer, TrainingArguments
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from peft_kasa import KaSAConfig, MiLoRAConfig, PiSSAConfig, SORSAConfig, SpectralLinear, SVFitConfig

MEMBERS = {"kasa": KaSAConfig, "pissa": PiSSAConfig, "milora": MiLoRAConfig, "sorsa": SORSAConfig, "svfit": SVFitConfig}
TARGETS = ["q_proj", "up_proj"]
NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
BASES: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": torch.float32},
    "bf16": {"dtype": torch.bfloat16},
    "nf4": {"dtype": torch.bfloat16, "quantization_config": NF4},
    "int8": {
        "dtype": torch.bfloat16,
        "quantization_config": BitsAndBytesConfig(load_in_8bit=True),
    },
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IDS = torch.arange(1000, 1032)[None]


def main() -> None:
    logging.disable_progress_bar()
    disable_progress_bars()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    print("base identity: tensors that differ, largest difference of the disabled model's logits")
    for kind in BASES:
        for name in MEMBERS:
            print(f"  {kind:5} {name:7}", *base_identity(kind, name))
    print("relative error of an update in bf16: telescoped, and the start subtracted")
    for name in ("pissa", "milora", "sorsa", "svfit"):
        print(f"  {name:7} {bf16_error(name, True):.2e}  {bf16_error(name, False):.2e}")
    print("distance covered / float32's after TRL's cast on nf4: as it is, and with bf16 masters")
    for name in MEMBERS:
        print(f"  {name:7} {masters(name):.4f}  {masters(name, torch.bfloat16):.4f}", flush=True)
    print("effective / intended gradient of the regulariser, and what is off its direction")
    for name, config in (("kasa", KaSAConfig), ("sorsa", SORSAConfig)):
        for way, step in ways().items():
            ratio, off = effect.effect(regularized(config), step)
            print(f"  {name:6} {way:28} {ratio:.4f}  {off:.1e}", flush=True)
        ratio, _ = effect.in_processes({name: make(config)}, batches(2))[name, "ddp"]
        print(f"  {name:6} {'DDP, 2 processes':28} {ratio:.4f}", flush=True)


def load(kind: str, device: str = DEVICE) -> Any:
    return AutoModelForCausalLM.from_pretrained(smollm2(), device_map=device, **BASES[kind]).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS.to(model.device)).logits.float().cpu()


def base_identity(kind: str, name: str) -> tuple[str, str]:
    base = load(kind)
    expected = logits(base)
    model = get_peft_model(base, MEMBERS[name](r=8, target_modules=TARGETS))
    layers = [module for module in model.modules() if isinstance(module, SpectralLinear)]
    before = [layer.base.matrix().clone() for layer in layers]
    optimizer = torch.optim.AdamW(effect.learning(model), lr=1e-3)
    for _ in range(2):
        effect.backward(model.train(), [IDS], lambda loss: loss)
        optimizer.step()
        optimizer.zero_grad()
        logits(model)
    differ = sum(not torch.equal(layer.base.matrix(), bits) for layer, bits in zip(layers, before, strict=True))
    with model.disable_adapter():
        largest = (logits(model) - expected).abs().max().item()
    return f"{differ} of {len(layers)}", f"{largest:.1f}"


def bf16_error(name: str, telescoped: bool) -> float:
    """Against float64, for inputs of N(0, 1)."""
    weight = load("bf16").model.layers[10].mlp.gate_proj
    model = get_peft_model(nn.Sequential(weight), MEMBERS[name](r=16, target_modules=["0"]))
    layer = model.base_model.model[0]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in effect.learning(model):
            parameter.add_(torch.empty(parameter.shape).normal_(0, 1e-4, generator=generator).to(parameter.device))
        x = torch.empty(256, layer.in_features).normal_(generator=generator).to(DEVICE, torch.bfloat16)
        slots = {slot: value.double() for slot, value in layer.slots("default").items()}
        start = [slots[f"{slot}0"] for slot in ("left", "core", "right")]
        now = [value + slots.get(slot, 0) for slot, value in zip(("left", "core", "right"), start, strict=True)]
        exact = x.double() @ ((now[0] * now[1]) @ now[2] - (start[0] * start[1]) @ start[2]).T
        found = layer.update(x, ["default"]) if telescoped else naive(x, now) - naive(x, start)
    return ((found.double() - exact).norm() / exact.norm()).item()


def naive(x: torch.Tensor, factors: list[torch.Tensor]) -> torch.Tensor:
    left, core, right = factors
    return x @ right.T.bfloat16() @ (left * core).T.bfloat16()


def masters(name: str, dtype: torch.dtype | None = None) -> float:
    """Away from the start, as after some training: near zero, bfloat16 is fine by itself."""
    model = get_peft_model(load("nf4"), MEMBERS[name](r=8, target_modules=["q_proj"], regularize=False))
    generator = torch.Generator().manual_seed(0)
    for parameter in effect.learning(model):
        parameter.data.add_(torch.empty(parameter.shape).normal_(0, 0.3, generator=generator).to(parameter.device))
    rows = Dataset.from_dict({"input_ids": IDS.tolist()})
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(folder, report_to="none", use_cpu=DEVICE == "cpu", bf16=False)
        tokenizer = AutoTokenizer.from_pretrained(smollm2())
        trainer = SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    for parameter in effect.learning(model):
        parameter.data = parameter.data.to(dtype or parameter.dtype)
    return effect.travelled(trainer)


def regularized(config: Any, device: str = DEVICE) -> Any:
    """A member with a regulariser strong enough to be seen beside the loss, away from its start."""
    strong = {"gamma": 1.0} | ({"beta": 1.0, "form": "paper"} if config is KaSAConfig else {})
    model = get_peft_model(load("fp32", device), config(r=8, target_modules=["q_proj"], **strong))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in effect.learning(model):
            parameter.add_(torch.empty(parameter.shape).normal_(0, 0.02, generator=generator).to(parameter.device))
    return model


class make:  # noqa: N801  (a function that can be pickled)
    def __init__(self, config: Any) -> None:
        self.config = config

    def __call__(self) -> Any:
        return regularized(self.config, "cpu")


def batches(count: int) -> list[torch.Tensor]:
    return [IDS + 40 * i for i in range(count)]


def ways() -> dict[str, effect.Step]:
    rows = Dataset.from_dict({"input_ids": [(IDS[0] + i).tolist() for i in range(8)]})
    labelled = rows.add_column("labels", rows["input_ids"])
    tokenizer = AutoTokenizer.from_pretrained(smollm2())

    def sft(model: Any, args: Any, **given: Any) -> SFTTrainer:
        return SFTTrainer(model, args, processing_class=tokenizer, **given)

    return {
        "loop": effect.loop(batches(1)),
        "loop, 4 accumulated": effect.loop(batches(4)),
        "loop, bf16 autocast": effect.loop(batches(1), torch.bfloat16),
        "fp16, scaler": effect.scaled(batches(1), fused=False),
        "fp16, scaler, fused": effect.scaled(batches(1), fused=True),
        "closure": effect.closure(batches(1)),
        "Trainer": effect.trainer(Trainer, TrainingArguments, labelled, 1),
        "Trainer, 4 accumulated": effect.trainer(Trainer, TrainingArguments, labelled, 4),
        "SFTTrainer": effect.trainer(sft, SFTConfig, rows, 1, bf16=False),
        "SFTTrainer, 4 accumulated": effect.trainer(sft, SFTConfig, rows, 4, bf16=False),
        "SFTTrainer, bf16": effect.trainer(sft, SFTConfig, rows, 1, bf16=True),
    }


if __name__ == "__main__":
    main()
