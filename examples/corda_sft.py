"""CorDA through TRL's `SFTTrainer`: the adapter starts from what the model sees of the task.

The task is that of finetune.py: an order written as one loose sentence becomes a short record (orders.py). The script

1. runs the model over some training rows, once, and keeps the moments of its layers' inputs in a file (`calibrate`),
2. trains a CorDA adapter that starts from them with `SFTTrainer`, nothing but its config being ours,
3. saves the adapter, loads it onto a fresh copy of the base, where nothing of the data is needed any more, and checks
   that the logits are equal bit for bit.

    python examples/corda_sft.py                       # what the new task needs (the paper's IPA)
    python examples/corda_sft.py --mode knowledge      # away from what these rows need (KPA)
    python examples/corda_sft.py --model Qwen/Qwen2.5-7B-Instruct --output outputs/qwen  # a GPU is used if there is one

Run it twice: the second time the statistics are read from their file, and the model is not run over the rows again.
On two CPU cores shared with other work it took 906 s, 161 s of it CPU time.
"""

import argparse
import os
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # else torch slows down tenfold where another program needs a core too

import torch
from base_model import smollm2
from chat import expect, load_model, load_tokenizer, logits, mean_loss, tokenize, trainer_settings
from orders import messages, train_and_held_out
from peft import PeftModel
from transformers import set_seed

from peft_kasa import CorDAConfig, calibrate

try:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
except ImportError as error:
    sys.exit(f"This example needs TRL and datasets: pip install trl datasets ({error})")

BATCH = 4
HELD_OUT = 32
SAMPLES = 32  # rows that the start is made from; the paper takes 256 of 2048 tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hub id or a local folder; SmolLM2-135M-Instruct if left out")
    parser.add_argument("--mode", choices=["instruction", "knowledge"], default="instruction")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("outputs/corda"))
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps {args.steps}: has to be at least 1")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # names that TRL still uses
    args.output.mkdir(parents=True, exist_ok=True)
    started = time.time()
    set_seed(0)

    model_path = args.model or smollm2()
    orders = train_and_held_out(max(args.steps * BATCH, SAMPLES), HELD_OUT, seed=0)
    rows, held_out = ([messages(order) for order in part] for part in orders)
    tokenizer = load_tokenizer(model_path)
    model = load_model(model_path, torch.float32)
    before = mean_loss(model, tokenizer, held_out)

    config = CorDAConfig(task_type="CAUSAL_LM", r=8, mode=args.mode, target_modules="all-linear")
    path = args.output / "statistics.safetensors"
    found = calibrate(model, rows, config, tokenizer=tokenizer, samples=SAMPLES, batch_size=BATCH, path=path)
    print(f"{time.time() - started:5.0f} s  {found}, {path.stat().st_size / 1e6:.0f} MB in {path}")

    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(args.output),
            max_steps=args.steps,
            per_device_train_batch_size=BATCH,
            learning_rate=5e-4,
            warmup_steps=max(1, args.steps // 10),
            logging_steps=max(1, args.steps // 4),
            **trainer_settings(model.device),
        ),
        peft_config=config,  # the adapter starts here, from the config's statistics
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    print(f"{time.time() - started:5.0f} s  the adapter has started")
    trainer.train()
    trainer.save_model()
    after = mean_loss(trainer.model, tokenizer, held_out)
    print(f"{time.time() - started:5.0f} s  loss on held-out orders {before:.3f} before, {after:.3f} after")

    probe = tokenize(tokenizer, held_out[:8], with_answers=True)
    here = logits(trainer.model, probe)
    there = logits(PeftModel.from_pretrained(load_model(model_path, torch.float32), args.output), probe)
    expect(torch.equal(here, there), f"{args.output}: loaded again, the adapter gives other logits")
    moved = (here - logits(load_model(model_path, torch.float32), probe)).norm() / here.norm()
    print(f"{time.time() - started:5.0f} s  {args.output}: on a fresh base, logits equal bit for bit")
    print(f"         and {moved:.2f} of their norm away from the base model's")


if __name__ == "__main__":
    main()
