"""Fine-tune in a loop of your own in several processes: DDP, or FSDP2 with --shard.

    torchrun --nproc-per-node 2 examples/distributed/loop.py --shard

At the end the saved adapter is loaded onto a fresh base, and its loss compared with the trained model's.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # base_model, orders

import torch
import torch.distributed as dist
from base_model import smollm2
from orders import messages, train_and_held_out
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_kasa import SORSAConfig, penalty


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a folder or a name on the Hub; default: SmolLM2-135M-Instruct")
    parser.add_argument("--shard", action="store_true", help="FSDP2 instead of DDP")
    parser.add_argument("--output", default="outputs/distributed-loop")
    parser.add_argument("--steps", type=int, default=10)
    return parser.parse_args()


def rows(model: str, count: int) -> list[Tensor]:
    """Token ids (1, length) of orders and their records."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    chats = (messages(order) for order in train_and_held_out(count, 1, seed=0)[0])
    texts = (tokenizer.apply_chat_template(chat["prompt"] + chat["completion"], tokenize=False) for chat in chats)
    return [tokenizer(text, return_tensors="pt").input_ids for text in texts]


def sharded(model: PeftModel) -> nn.Module:
    """FSDP2: each block in parts, and what is left with the whole. The adapter has to be there already."""
    for block in model.get_base_model().model.layers:
        fully_shard(block)
    return fully_shard(model)


def train(wrapped: nn.Module, model: PeftModel, batches: list[Tensor]) -> None:
    """One step a batch; the regulariser acts at the optimiser's step. The optimiser comes after the wrapping."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    for step, ids in enumerate(batches):
        loss = wrapped(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        regulariser = penalty(model)  # in parts, every process has to ask for it
        if dist.get_rank() == 0:
            print(f"step {step} loss {loss:.4f} penalty {regulariser:.2e}", flush=True)


@torch.no_grad()
def loss_of(model: nn.Module, ids: Tensor) -> float:
    """The loss of some token ids (rows, length)."""
    return model.eval()(input_ids=ids, labels=ids).loss.item()


def main() -> None:
    given = arguments()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    source = given.model or smollm2()
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).to(device)
    model = get_peft_model(base, SORSAConfig(r=8, target_modules="all-linear"))
    batches = [ids.to(device) for ids in rows(source, given.steps * ranks)]
    wrapped = sharded(model) if given.shard else DistributedDataParallel(model)
    train(wrapped, model, batches[rank::ranks])
    model.save_pretrained(given.output, is_main_process=rank == 0)  # every process calls it, the first one writes
    trained = loss_of(model, batches[0])
    dist.barrier()
    if rank == 0:
        fresh = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).to(device)
        loaded = loss_of(PeftModel.from_pretrained(fresh, given.output), batches[0])
        print(f"loss of the trained model {trained:.7f}, of the saved adapter on a fresh base {loaded:.7f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
