"""CorDA through TRL's `SFTTrainer`: the adapter starts from what the model sees of the task; two to three minutes.

The task is that of finetune.py: an order written as one loose sentence becomes a short record (orders.py). The script

1. runs the model over some training rows, once, and keeps the moments of its layers' inputs in a file (`calibrate`),
2. trains a CorDA adapter that starts from them with `SFTTrainer`, nothing but its config being ours,
3. saves the adapter, loads it onto a fresh copy of the base, where nothing of the data is needed any more, and checks
   that the logits are equal bit for bit.

    python examples/corda_sft.py                       # what the new task needs (the paper's IPA)
    python examples/corda_sft.py --mode knowledge      # away from what these rows need (KPA)

Run it twice: the second time the statistics are read from their file, and the model is not run over the rows again.
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
from orders import messages, train_and_held_out
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed

from peft_kasa import CorDAConfig, calibrate

try:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
except ImportError as error:
    sys.exit(f"This example needs TRL and datasets: pip install trl datasets ({error})")

BATCH = 4
SAMPLES = 32  # rows that the start is made from; the paper takes 256 of 2048 tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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

    train_rows, held_out = train_and_held_out(max(args.steps * BATCH, SAMPLES), 8, seed=0)
    rows = [messages(row) for row in train_rows]
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    model = load_base()

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
            lr_scheduler_type="cosine",
            warmup_steps=max(1, args.steps // 10),
            logging_steps=5,
            save_strategy="no",
            report_to="none",
            use_cpu=model.device.type == "cpu",
            dataloader_pin_memory=model.device.type != "cpu",
            bf16=False,  # no autocast: the base computes in the type it was loaded in, the adapter in float32
            gradient_checkpointing=False,
        ),
        peft_config=config,  # the adapter starts here, from the config's statistics
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    print(f"{time.time() - started:5.0f} s  the adapter has started")
    trainer.train()
    trainer.save_model()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"{time.time() - started:5.0f} s  loss {losses[0]:.3f} in the first steps, {losses[-1]:.3f} in the last")

    chats = [row["prompt"] + row["completion"] for row in map(messages, held_out)]
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    probe = tokenizer.apply_chat_template(chats, padding=True, return_tensors="pt", return_dict=True)
    probe = probe.to(model.device)
    here = logits(trainer.model, probe)
    there = logits(PeftModel.from_pretrained(load_base(), args.output), probe)
    if not torch.equal(here, there):
        sys.exit(f"{args.output}: loaded again, the adapter gives other logits")
    moved = (here - logits(load_base(), probe)).norm() / here.norm()
    print(f"{time.time() - started:5.0f} s  {args.output}: on a fresh base, logits equal bit for bit")
    print(f"         and {moved:.2f} of their norm away from the base model's")


def load_base() -> PreTrainedModel:
    """The base model in float32, on the GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32, device_map=device).eval()


@torch.inference_mode()
def logits(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model.eval()(**batch).logits.float().cpu()


if __name__ == "__main__":
    main()
