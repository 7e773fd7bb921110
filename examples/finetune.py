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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # else torch slows down tenfold where another program needs a core too

import torch
from base_model import smollm2
from orders import Order, messages, score, train_and_held_out
from peft import PeftConfig, PeftModel
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BatchEncoding,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

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
EVAL_BATCH = 16


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
    probe = tokenize(tokenizer, held_out[:8], with_answers=True).to(base.device)
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


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.chat_template is None:
        sys.exit(f"{path} has no chat template; this example needs a chat model")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def load_base(args: argparse.Namespace, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The base model, on the GPU if there is one, in `dtype` or in bfloat16 where the machine computes in it."""
    if torch.cuda.is_available():
        device, has_bf16 = "cuda", torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        device, has_bf16 = "cpu", torch.cpu._is_avx512_bf16_supported()
    quantisation = None
    if args.load_in_4bit:
        quantisation = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    return AutoModelForCausalLM.from_pretrained(
        args.model,
        dtype=dtype or (torch.bfloat16 if has_bf16 or args.load_in_4bit else torch.float32),
        device_map=device,
        quantization_config=quantisation,
    ).eval()


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
        lr_scheduler_type="cosine",
        warmup_steps=max(1, args.steps // 10),
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        seed=args.seed,
        use_cpu=base.device.type == "cpu",
        dataloader_pin_memory=base.device.type != "cpu",
        bf16=False,  # no autocast: the base computes in the type it was loaded in, the adapter in float32
        gradient_checkpointing=False,  # True saves memory with a large model, and costs time
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
    loss = held_out_loss(model, tokenizer, rows, f"Loss {when}")
    answers = write_answers(model, tokenizer, rows[:ANSWER_ROWS], f"Answers {when}")
    return Results(loss, answers, *score(answers, rows[:ANSWER_ROWS]))


@torch.inference_mode()
def held_out_loss(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Order], bar: str) -> float:
    """The mean loss per token of the expected answers."""
    loss_sum = tokens = 0.0
    for batch in batches(rows, bar):
        chats = tokenize(tokenizer, batch, with_answers=True).to(model.device)
        prompt_lengths = tokenize(tokenizer, batch, with_answers=False)["attention_mask"].sum(dim=1).to(model.device)
        positions = torch.arange(chats["input_ids"].shape[1], device=model.device)
        in_answer = (positions >= prompt_lengths[:, None]) & chats["attention_mask"].bool()
        targets = chats["input_ids"].masked_fill(~in_answer, -100)[:, 1:]
        predictions = model(**chats).logits[:, :-1].float()
        loss_sum += torch.nn.functional.cross_entropy(
            predictions.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
        ).item()
        tokens += (targets != -100).sum().item()
    return loss_sum / tokens


@torch.inference_mode()
def write_answers(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Order], bar: str
) -> list[str]:
    """What the model answers (greedily) to the orders."""
    longest = max(len(tokenizer(row["record"])["input_ids"]) for row in rows)
    answers = []
    for batch in batches(rows, bar):
        prompts = tokenize(tokenizer, batch, with_answers=False, padding_side="left").to(model.device)
        output = model.generate(**prompts, do_sample=False, max_new_tokens=longest + 8)
        texts = tokenizer.batch_decode(output[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
        answers += [text.strip() for text in texts]
    return answers


def batches(rows: Sequence[Order], bar: str) -> Iterator[Sequence[Order]]:
    """`rows` in pieces, with a progress bar."""
    for start in tqdm(range(0, len(rows), EVAL_BATCH), desc=bar, unit="batch"):
        yield rows[start : start + EVAL_BATCH]


def tokenize(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Order], with_answers: bool, padding_side: str = "right"
) -> BatchEncoding:
    """The chats that ask for the records of `rows`, with the expected answers or up to where the answer starts."""
    chats = [messages(row) for row in rows]
    texts = [
        tokenizer.apply_chat_template(chat["prompt"] + chat["completion"], tokenize=False)
        if with_answers
        else tokenizer.apply_chat_template(chat["prompt"], tokenize=False, add_generation_prompt=True)
        for chat in chats
    ]
    return tokenizer(texts, padding=True, padding_side=padding_side, add_special_tokens=False, return_tensors="pt")


@torch.inference_mode()
def logits(model: torch.nn.Module, batch: BatchEncoding) -> torch.Tensor:
    return model(**batch).logits.float().cpu()


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
