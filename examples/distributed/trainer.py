"""Fine-tune with TRL's SFTTrainer in several processes: DDP, or DeepSpeed ZeRO with a config from beside this file.

    torchrun --nproc-per-node 2 examples/distributed/trainer.py
    torchrun --nproc-per-node 2 examples/distributed/trainer.py --deepspeed examples/distributed/zero3.json

Nothing here is peculiar to peft_kasa but its config. At the end each process loads what was saved onto a fresh base and
compares the loss of a few orders with the trained model's. On a GPU, add --bf16.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # base_model, orders

import torch
from base_model import smollm2
from datasets import Dataset
from orders import messages, train_and_held_out
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import SFTConfig, SFTTrainer

from peft_kasa import KaSAConfig


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a folder or a name on the Hub; default: SmolLM2-135M-Instruct")
    parser.add_argument("--deepspeed", help="a DeepSpeed config")
    parser.add_argument("--output", default="outputs/distributed")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--bf16", action="store_true")
    return parser.parse_args()


def trainer(given: argparse.Namespace, model: str) -> SFTTrainer:
    """The trainer. It loads the model after its arguments are there, so that ZeRO-3 has it in parts from the start."""
    settings = SFTConfig(
        output_dir=given.output,
        max_steps=given.steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=given.accumulate,
        learning_rate=2e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        deepspeed=given.deepspeed,
        bf16=given.bf16,
        use_cpu=not torch.cuda.is_available(),
        model_init_kwargs={"dtype": torch.bfloat16 if given.bf16 else torch.float32},
    )
    orders, _ = train_and_held_out(64, 1, seed=0)
    return SFTTrainer(
        model=model,
        args=settings,
        train_dataset=Dataset.from_list([messages(order) for order in orders]),
        peft_config=KaSAConfig(r=8, target_modules="all-linear", reference_truncation=True),
    )


@torch.no_grad()
def loss_of(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """The loss of some token ids (rows, length)."""
    return model.eval()(input_ids=ids, labels=ids).loss.item()


def main() -> None:
    given = arguments()
    model = given.model or smollm2()
    made = trainer(given, model)
    made.train()
    made.save_model()
    ids = torch.tensor(made.train_dataset[0]["input_ids"])[None]
    trained = loss_of(made.model, ids.to(made.model.device))
    made.accelerator.wait_for_everyone()
    unset_hf_deepspeed_config()  # ZeRO-3 would have this one in parts as well
    base = AutoModelForCausalLM.from_pretrained(model, **made.args.model_init_kwargs)
    loaded = PeftModel.from_pretrained(base, given.output)
    if made.accelerator.is_main_process:
        print(
            f"loss of the trained model {trained:.7f}, of the saved adapter on a fresh base {loss_of(loaded, ids):.7f}"
        )


if __name__ == "__main__":
    main()
