"""DPO with TRL's `DPOTrainer`: the model with its adapter switched off is the reference, and costs no second model.

Methods of the family do not write to the base, so the reference is the base model, bit for bit, before and after the
training; and those that start at the base start at a KL divergence of exactly zero, and at a loss of log 2.
The pairs prefer an answer in one or two words to the same answer in a sentence. The script

1. measures KL(policy, reference) and how many held-out pairs the policy puts in the right order,
2. trains an adapter with `DPOTrainer`, nothing but its config being ours, and measures again,
3. checks that the reference is the base model still.

    python examples/dpo.py
    python examples/dpo.py --method kasa --steps 40
    python examples/dpo.py --model Qwen/Qwen2.5-7B-Instruct --steps 40 --lr 2e-5   # a GPU is used if there is one

On two CPU cores shared with other work it took 599 s, 121 s of it CPU time.
"""

import argparse
import math
import os
import time
import warnings
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # else torch slows down tenfold where another program needs a core too

import torch
from base_model import smollm2
from chat import Chat, answers, expect, load_model, load_tokenizer, logits, mean_loss, tokenize, trainer_settings
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, set_seed
from trl import DPOConfig, DPOTrainer

from peft_kasa import KaSAConfig, MiLoRAConfig, PiSSAConfig, SORSAConfig

METHODS = {  # each starts at the base: KaSA does where it cuts nothing
    "pissa": (PiSSAConfig, {}),
    "milora": (MiLoRAConfig, {}),
    "sorsa": (SORSAConfig, {}),
    "kasa": (KaSAConfig, {"truncation": 0}),
}
PAIRS = """What is the capital of Norway? | Oslo | The capital city of Norway is Oslo, in the south of the country.
What colour is grass? | Green | The colour of grass is usually green, because of its chlorophyll.
How many legs has a spider? | Eight | A spider has eight legs, which sets it apart from insects.
Who wrote Hamlet? | Shakespeare | Hamlet is a famous play that was written by William Shakespeare.
Which planet is the largest? | Jupiter | The largest planet of our solar system is the gas giant Jupiter.
What do bees make? | Honey | Bees are well known for making honey from the nectar of flowers.
What is the opposite of hot? | Cold | The opposite of the word hot would be the word cold.
Which month comes after May? | June | The month that comes right after May in the calendar is June.
What freezes to ice? | Water | Ice is what you get when water is cooled below zero degrees.
How many days has a week? | Seven | There are seven days in a week, from Monday to Sunday.
What is the capital of France? | Paris | The capital city of France is Paris, which lies on the Seine.
Which animal barks? | Dog | The animal that is best known for its barking is the dog.
What is two plus three? | Five | If you add two and three, the sum that you get is five.
What do cows drink? | Water | Just like most other animals, grown cows drink water.
Which metal is liquid at room temperature? | Mercury | The metal that is liquid at room temperature is mercury.
What is the opposite of up? | Down | The opposite of the direction up would be the direction down."""
HELD_OUT = 4


def main() -> None:
    args = parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # names that TRL still uses
    started = time.time()
    set_seed(0)
    model_path = args.model or smollm2()
    rows = [pair(line) for line in PAIRS.splitlines()]
    train, held_out = rows[:-HELD_OUT], rows[-HELD_OUT:]
    tokenizer = load_tokenizer(model_path)
    base = load_model(model_path, torch.float32)
    probe = tokenize(tokenizer, [chat(row, "chosen") for row in held_out], with_answers=True)
    of_the_base = logits(base, probe)

    make_config, options = METHODS[args.method]
    trainer = DPOTrainer(
        model=base,
        args=DPOConfig(
            output_dir=str(args.output),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.lr,
            logging_steps=1,
            **trainer_settings(base.device),
        ),
        peft_config=make_config(r=8, target_modules="all-linear", task_type="CAUSAL_LM", **options),
        train_dataset=Dataset.from_list(train),
        processing_class=tokenizer,
    )
    model = trainer.model
    show(model, tokenizer, held_out, probe, "before")
    expect(kl(model, probe) == 0, "the policy does not start at the reference")
    trainer.train()
    show(model, tokenizer, held_out, probe, "after")

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"\nDPO loss: {losses[0]:.6f} at the first step (log 2 = {math.log(2):.6f}), {losses[-1]:.3f} at the last")
    with model.disable_adapter():
        expect(torch.equal(logits(model, probe), of_the_base), "the reference is not the base model")
    print(f"the reference is the base model still, bit for bit; {time.time() - started:.0f} s in all")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hub id or a local folder; SmolLM2-135M-Instruct if left out")
    parser.add_argument("--method", choices=METHODS, default="pissa")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--output", type=Path, default=Path("outputs/dpo"))
    return parser.parse_args()


def pair(line: str) -> Chat:
    """A row of preferences as TRL takes it."""
    question, *replies = line.split(" | ")
    chosen, rejected = ([{"role": "assistant", "content": reply}] for reply in replies)
    return {"prompt": [{"role": "user", "content": question}], "chosen": chosen, "rejected": rejected}


def chat(row: Chat, which: str) -> Chat:
    """The question with one of its two answers."""
    return {"prompt": row["prompt"], "completion": row[which]}


@torch.no_grad()
def kl(model: PeftModel, probe: dict[str, torch.Tensor]) -> float:
    """KL(policy, reference) per token of the probe, where the reference is the model without its adapter."""
    policy = logits(model, probe).log_softmax(-1)
    with model.disable_adapter():
        reference = logits(model, probe).log_softmax(-1)
    per_token = (policy.exp() * (policy - reference)).sum(-1)
    return per_token[probe["attention_mask"].cpu().bool()].mean().item()


def show(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, rows: list[Chat], probe: dict[str, torch.Tensor], when: str
) -> None:
    """The divergence, the order of the held-out pairs, and an answer."""
    chosen, rejected = (
        [mean_loss(model, tokenizer, [chat(row, which)]) for row in rows] for which in ("chosen", "rejected")
    )
    right = sum(good < bad for good, bad in zip(chosen, rejected, strict=True))
    print(
        f"\n{when}: KL(policy, reference) = {kl(model, probe):.6f} per token; {right} of {len(rows)} in the right order"
    )
    question = rows[0]["prompt"][0]["content"]
    print(f"  {question}  ->  {answers(model, tokenizer, [chat(rows[0], 'rejected')])[0]}")


if __name__ == "__main__":
    main()
