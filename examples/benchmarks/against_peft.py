"""This package beside PEFT's own KaSA, PiSSA and LoRA on SmolLM2-135M-Instruct, in one process: prints both figures.

    python examples/benchmarks/against_peft.py

Times are medians of alternating runs. What is compared: whether the base is the base again when the adapter is
disabled, what is on a 4-bit base, the time to wrap and to reload, whether a plain LoRA of it is right on the original
base, the time of a training step, and the gradient on a 4-bit base once an evaluation has run.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from contract import DEVICE, IDS, load, logits
from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora.config import KasaConfig
from transformers.utils import logging

from peft_kasa import KaSAConfig, PiSSAConfig, export_lora

Make = Callable[[], Any]  # a config

PAIRS: dict[str, tuple[Make, Make]] = {
    "kasa": (
        lambda: LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", kasa_config=KasaConfig()),
        lambda: KaSAConfig(r=8, target_modules="all-linear"),
    ),
    "pissa": (
        lambda: LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", init_lora_weights="pissa"),
        lambda: PiSSAConfig(r=8, target_modules="all-linear"),
    ),
}


def main() -> None:
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    print(f"{'':58} {'PEFT':>12} {'peft_kasa':>12}")
    for name, (theirs, ours) in PAIRS.items():
        row(f"{name}: disabled model, largest logit difference to the base", *map(disabled, (theirs, ours)))
        row(f"{name}: what learns on a 4-bit base", *map(on_four_bits, (theirs, ours)))
        row(f"{name}: seconds to wrap the model (median of 3)", *alternate(wrap, theirs, ours))
        row(f"{name}: seconds to reload the adapter (median of 3)", *alternate(reload, theirs, ours))
        row(f"{name}: plain LoRA on the original base, relative error", *map(as_lora, (theirs, ours)))
    lora = lambda: LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")  # noqa: E731
    pissa = PAIRS["pissa"][1]
    row("seconds a training step, LoRA against PiSSA, bf16 (median)", *steps(lora, pissa))
    row("gradient after an evaluation, nf4, LoRA against PiSSA", *map(gradient_error, (lora, pissa)))


def row(what: str, theirs: Any, ours: Any) -> None:
    ratio = f"  x {theirs / ours:.1f}" if isinstance(ours, float) and isinstance(theirs, float) and ours > 1e-3 else ""
    print(f"{what:58} {show(theirs):>12} {show(ours):>12}{ratio}", flush=True)


def show(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def move(model: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "diag" not in name and not name.endswith("core"):
                parameter.add_(torch.empty(parameter.shape).normal_(0, 2e-3, generator=generator).to(parameter.device))
    return model


def disabled(config: Make) -> float:
    expected = logits(load("fp32"))
    model = get_peft_model(load("fp32"), config())
    with model.disable_adapter():
        return (logits(model) - expected).abs().max().item()


def on_four_bits(config: Make) -> str:
    try:
        model = get_peft_model(load("nf4"), config())
    except (TypeError, ValueError) as error:
        return type(error).__name__
    learnt = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    part = -3 if "lora_A" in learnt[0] else -1
    return "/".join(sorted({name.split(".")[part].removeprefix("lora_") for name in learnt}))


def alternate(measure: Callable[[Make], float], theirs: Make, ours: Make) -> tuple[float, float]:
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(3):
        for config, found in zip((theirs, ours), times, strict=True):
            found.append(measure(config))
    return statistics.median(times[0]), statistics.median(times[1])


def wrap(config: Make) -> float:
    base = load("fp32")
    begin = time.perf_counter()
    get_peft_model(base, config())
    return time.perf_counter() - begin


def reload(config: Make) -> float:
    with tempfile.TemporaryDirectory() as folder:
        get_peft_model(load("fp32"), config()).save_pretrained(folder)
        base = load("fp32")
        begin = time.perf_counter()
        PeftModel.from_pretrained(base, folder)
        return time.perf_counter() - begin


def as_lora(config: Make) -> float | str:
    model = move(get_peft_model(load("fp32"), config()))
    expected = logits(model)
    if isinstance(config(), LoraConfig):
        try:
            lora, state = convert_to_lora(model, rank=16)
        except (TypeError, ValueError):
            return "refused"
        again = get_peft_model(load("fp32"), lora)
        set_peft_model_state_dict(again, state)
    else:
        with tempfile.TemporaryDirectory() as folder:
            export_lora(model, folder)
            again = PeftModel.from_pretrained(load("fp32"), folder)
    return ((logits(again) - expected).norm() / expected.norm()).item()


def steps(theirs: Make, ours: Make) -> tuple[float, float]:
    models = [get_peft_model(load("bf16"), config()).train() for config in (theirs, ours)]
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-4) for m in models]
    ids = IDS.repeat(4, 2).to(DEVICE)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(8):
        for model, optimizer, found in zip(models, optimizers, times, strict=True):
            begin = time.perf_counter()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(time.perf_counter() - begin)
    return statistics.median(times[0]), statistics.median(times[1])


def gradient_error(config: Make) -> float:
    gradients = []
    for evaluated in (False, True):
        torch.manual_seed(0)
        model = move(get_peft_model(load("nf4"), config()))
        if evaluated:
            logits(model)
        ids = IDS.to(DEVICE)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    return ((gradients[1] - gradients[0]).norm() / gradients[0].norm()).item()


if __name__ == "__main__":
    main()
