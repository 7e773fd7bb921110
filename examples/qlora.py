"""QLoRA's recipe with a member of the family: the base in 4 bits (nf4), the adapter in float32, TRL's `SFTTrainer`.

An order written as one loose sentence becomes a short record (orders.py). The script

1. loads the base with bitsandbytes in nf4 and measures its loss on held-out orders,
2. trains an adapter that starts from the weights as they are stored in 4 bits, and measures again,
3. checks that what learns is float32 still, and that the 4-bit base has the bits it had,
4. saves the adapter, loads it onto a fresh copy of the base and checks that the logits are equal bit for bit.

    python examples/qlora.py
    python examples/qlora.py --method pissa --steps 60
    python examples/qlora.py --model Qwen/Qwen2.5-7B-Instruct --steps 500   # a GPU is used if there is one

On two CPU cores shared with other work it took 639 s, 179 s of it CPU time.
"""

import argparse
import os
import time
import warnings
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # else torch slows down tenfold where another program needs a core too

import torch
from base_model import smollm2
from chat import expect, load_model, load_tokenizer, logits, mean_loss, tokenize, trainer_settings
from datasets import Dataset
from finetune import METHODS
from orders import messages, train_and_held_out
from peft import PeftModel
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

from peft_kasa import SpectralLinear

HELD_OUT = 32


def main() -> None:
    args = parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # names that TRL still uses
    started = time.time()
    set_seed(0)
    model_path = args.model or smollm2()
    orders = train_and_held_out(args.steps * args.batch_size, HELD_OUT, seed=0)
    rows, held_out = ([messages(order) for order in part] for part in orders)
    tokenizer = load_tokenizer(model_path)
    base = load_model(model_path, four_bit=True)
    print(f"base: {base.get_memory_footprint() / 1e6:.0f} MB with 4-bit linear layers, on {base.device}")
    before = mean_loss(base, tokenizer, held_out)
    probe = tokenize(tokenizer, held_out[:4], with_answers=True)
    of_the_base = logits(base, probe)

    make_config, rank, rate, options = METHODS[args.method]
    trainer = SFTTrainer(
        model=base,
        args=SFTConfig(
            output_dir=str(args.output),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.lr or rate,
            warmup_steps=max(1, args.steps // 10),
            logging_steps=max(1, args.steps // 5),
            **trainer_settings(base.device),
        ),
        peft_config=make_config(r=rank, target_modules="all-linear", task_type="CAUSAL_LM", **options),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    model = trainer.model
    after = mean_loss(model, tokenizer, held_out)
    print(
        f"{args.method}: loss on {HELD_OUT} held-out orders {before:.3f} before, {after:.3f} after {args.steps} steps"
    )

    # TRL casts what learns to bfloat16 on a 4-bit base, where small steps vanish; here it is float32 again by step 1.
    learns = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    layers = sum(isinstance(module, SpectralLinear) for module in model.modules())
    print(f"{layers} adapted layers; what learns is {', '.join(map(str, learns))}")
    with model.disable_adapter():
        expect(torch.equal(logits(model, probe), of_the_base), "the 4-bit base has changed")

    model.save_pretrained(args.output)
    again = PeftModel.from_pretrained(load_model(model_path, four_bit=True), args.output)
    expect(torch.equal(logits(model, probe), logits(again, probe)), "loaded again, the adapter gives other logits")
    print(f"{args.output}: on a fresh 4-bit base, logits equal bit for bit; {time.time() - started:.0f} s in all")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hub id or a local folder; SmolLM2-135M-Instruct if left out")
    parser.add_argument("--method", choices=METHODS, default="pissa")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--lr", type=float, help="learning rate; the method's own if left out")
    parser.add_argument("--output", type=Path, default=Path("outputs/qlora"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
