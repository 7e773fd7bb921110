"""Fine-tune a chat model with a peft_kasa adapter and TRL, and see what it learned; a few minutes on two CPU cores.

The task: an order written as one loose sentence becomes a short record (orders.py). The script

1. measures the base model on held-out orders (loss, answers right to the letter, right fields),
2. trains an adapter with TRL's `SFTTrainer`, nothing but its config being ours, and measures again,
3. saves the adapter, loads it onto a fresh copy of the base and checks that the logits are equal bit for bit,
4. writes the same change as a plain LoRA adapter, which PEFT alone loads onto the base.

    python examples/finetune.py                               # KaSA on SmolLM2-135M
    python examples/finetune.py --method pissa --steps 100
    python examples/finetune.py --model Qwen/Qwen2.5-0.5B-Instruct --load-in-4bit
"""

import argparse
import os
import re
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # else torch slows down tenfold where another program needs a core too

import torch
from base_model import smollm2
from chat import answers, load_model, load_tokenizer, logits, mean_loss, tokenize, trainer_settings
from orders import Order, messages, score, train_and_held_out
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from peft_kasa import KaSAConfig, LoRAXSConfig, MiLoRAConfig, PiSSAConfig, SORSAConfig, SVFitConfig, export_lora

try:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
except ImportError as error:
    sys.exit(f"This example needs TRL and datasets: pip install trl datasets ({error})")

METHODS: dict[str, tuple[type[PeftConfig], int, float, dict[str, Any]]] = {
    # name: its config, a rank and a learning rate that suit it, options
    "kasa": (KaSAConfig, 8, 2e-3, {"reference_truncation": True}),  # cuts nothing from k_proj and v_proj; see the docs
    "pissa": (PiSSAConfig, 8, 5e-4, {}),
    "milora": (MiLoRAConfig, 8, 2e-3, {}),
    "sorsa": (SORSAConfig, 8, 5e-4, {}),
    "lora_xs": (LoRAXSConfig, 32, 4e-3, {}),  # trains r * r numbers a module
    "svfit": (SVFitConfig, 128, 1e-1, {}),  # trains `r` numbers a module, the others r times its inputs and outputs
}
LOSS_ROWS = 64
ANSWER_ROWS = 48
SHOWN_ROWS = 3


def main() -> None:
    args = parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # names that TRL still uses
    warnings.filterwarnings(
        "ignore", message="The base is not the one"
    )  # the last check loads it in float32 on purpose
    started = time.time()
    set_seed(args.seed)
    train_rows, held_out = train_and_held_out(args.steps * args.batch_size, LOSS_ROWS, args.seed)

    args.model = args.model or smollm2()
    tokenizer = load_tokenizer(args.model)
    base = load_base(args)
    print(f"\n{args.method} on {args.model}: {base.dtype}, {base.device}{', 4-bit' * args.load_in_4bit}\n")

    before = evaluate(base, tokenizer, held_out, "before")
    model = train(base, tokenizer, train_rows, args)
    after = evaluate(model, tokenizer, held_out, "after")

    adapter, lora = args.output / "adapter", args.output / "lora"
    model.save_pretrained(adapter)
    report = export_lora(model, lora)

    # What was saved, on fresh copies of the base.
    probe = tokenize(tokenizer, [messages(row) for row in held_out[:8]], with_answers=True)
    if not torch.equal(logits(model, probe), logits(PeftModel.from_pretrained(load_base(args), adapter), probe)):
        sys.exit(f"{adapter}: loaded again, the adapter gives other logits")
    # In float32, so that what differs is the adapters and not bfloat16's rounding; a 4-bit base stays as it is.
    dtype = torch.bfloat16 if args.load_in_4bit else torch.float32
    ours = logits(PeftModel.from_pretrained(load_base(args, dtype), adapter), probe)
    plain = logits(PeftModel.from_pretrained(load_base(args, dtype), lora), probe)
    difference = (plain - ours).norm() / ours.norm()

    show_answers(held_out, before, after)
    show_table(before, after)
    print(f"\nadapter  {adapter}  (on a fresh base: logits equal bit for bit)")
    print(f"LoRA     {lora}  ({report})")
    print(f"         on a fresh base, by PEFT alone: logits differ by {difference:.1e}, relative, in {dtype}")
    print(f"\n{time.time() - started:.0f} s in all")


def parse_args() -> argparse.Namespace:
    """The command line, checked before any work starts."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog="Rank and learning rate are the method's own unless given."
    )
    parser.add_argument("--model", help="a Hub id or a local folder; SmolLM2-135M-Instruct if left out")
    parser.add_argument("--method", choices=METHODS, default="kasa", help="kasa if left out")
    parser.add_argument("--load-in-4bit", action="store_true", help="quantise the base to 4 bits with bitsandbytes")
    parser.add_argument("--r", type=whole_number, help="rank of the adapter")
    parser.add_argument("--steps", type=whole_number, default=60, help="60 if left out")
    parser.add_argument("--batch-size", type=whole_number, default=4, help="4 if left out")
    parser.add_argument("--lr", type=positive_number, help="learning rate")
    parser.add_argument("--output", type=Path, help="folder to write to; ./outputs/<method> if left out")
    parser.add_argument("--seed", type=int, default=0, help="0 if left out")
    args = parser.parse_args()

    if args.load_in_4bit and find_spec("bitsandbytes") is None:
        parser.error("--load-in-4bit needs bitsandbytes: pip install bitsandbytes")
    if args.model and not Path(args.model).is_dir() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", args.model):
        parser.error(f"--model {args.model}: no such folder, and no Hub id either")
    args.output = (args.output or Path("outputs") / args.method).absolute()
    if any(path.exists() and not path.is_dir() for path in (args.output, *args.output.parents)):
        parser.error(f"--output {args.output}: a file is in the way")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed {args.seed}: has to be from 0 to 2**32 - 1")
    _, rank, lr, _ = METHODS[args.method]
    args.r, args.lr = args.r or rank, args.lr or lr
    return args


def whole_number(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def positive_number(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{value} is not positive and finite")
    return value


def load_base(args: argparse.Namespace, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A fresh copy of the base model."""
    return load_model(args.model, dtype, args.load_in_4bit)


@dataclass
class Results:
    """What a model makes of the held-out orders."""

    loss: float
    answers: list[str]
    exact: float
    fields: float


def train(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Order], args: argparse.Namespace
) -> PeftModel:
    """Put an adapter on `base` and train it on `rows`, each once; only the answers count in the loss."""
    make_config, _, _, options = METHODS[args.method]
    settings = SFTConfig(
        output_dir=str(args.output),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.lr,
        warmup_steps=max(1, args.steps // 10),
        logging_steps=10,
        seed=args.seed,
        **trainer_settings(base.device),
    )
    trainer = SFTTrainer(
        model=base,
        args=settings,
        peft_config=make_config(r=args.r, target_modules="all-linear", task_type="CAUSAL_LM", **options),
        train_dataset=Dataset.from_list([messages(row) for row in rows]),
        processing_class=tokenizer,
    )
    trainer.model.print_trainable_parameters()
    trainer.train()
    return trainer.model.eval()


def evaluate(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Order], when: str) -> Results:
    """The model's loss on `rows`, and its answers to the first of them."""
    chats = [messages(row) for row in rows]
    loss = mean_loss(model, tokenizer, chats, f"Loss {when}")
    found = answers(model, tokenizer, chats[:ANSWER_ROWS], f"Answers {when}")
    return Results(loss, found, *score(found, rows[:ANSWER_ROWS]))


def show_answers(rows: Sequence[Order], before: Results, after: Results) -> None:
    print("\nHeld-out orders and the model's answers")
    for row, was, now in list(zip(rows, before.answers, after.answers, strict=False))[:SHOWN_ROWS]:
        print(f"\n  order     {row['text']}\n  expected  {row['record']}")
        print(f"  before    {' '.join(was.split())}\n  after     {' '.join(now.split())}")


def show_table(before: Results, after: Results) -> None:
    print(f"\n{'':<34}{'before':>9}{'after':>9}")
    print(f"{f'loss on {LOSS_ROWS} held-out orders':<34}{before.loss:>9.3f}{after.loss:>9.3f}")
    print(f"{f'right to the letter, of {ANSWER_ROWS}':<34}{before.exact:>9.1%}{after.exact:>9.1%}")
    print(f"{'right fields':<34}{before.fields:>9.1%}{after.fields:>9.1%}")


if __name__ == "__main__":
    main()
