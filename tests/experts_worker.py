"""One of the two processes of tests/test_experts_distributed.py: stacked experts under DDP and FSDP2, and their files.

torchrun --nproc-per-node 2 tests/experts_worker.py FOLDER
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

RANK = int(os.environ["RANK"])
if os.environ.get("PYTHONHASHSEED") != str(RANK + 1):  # sets have another order in each process then
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"PYTHONHASHSEED": str(RANK + 1)})

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from bases import logits, tokens  # noqa: E402
from distributed_worker import adam, ddp, fsdp  # noqa: E402
from peft import PeftModel  # noqa: E402
from test_experts import adapted, mixtral  # noqa: E402
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict  # noqa: E402

from peft_kasa import PiSSAConfig, to_lora  # noqa: E402

STEPS = 2


def build() -> Any:
    return adapted(mixtral(), PiSSAConfig, target_modules=["q_proj"], save_frames=False)


def alone() -> Any:
    """Trained in one process on the rows of both."""
    model = build().train()
    optimizer = adam(model)
    for seed in range(STEPS):
        ids = tokens(4, seed=seed)
        sum(model(input_ids=rows, labels=rows).loss / 2 for rows in (ids[0::2], ids[1::2])).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def together(way: Callable[..., Any]) -> Any:
    model = build().train()
    step = way(model)
    for seed in range(STEPS):
        step(tokens(4, seed=seed)[RANK::2])
    return model


def main(folder: str) -> None:
    dist.init_process_group("gloo")
    expected = alone()
    for way in (ddp, fsdp):
        model = together(way)
        for (name, value), found in zip(to_lora(expected)[1].items(), to_lora(model)[1].values(), strict=True):
            torch.testing.assert_close(found, value, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: name + text)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if RANK == 0:
        model.save_pretrained(folder, state_dict=state)
    dist.barrier()
    again = PeftModel.from_pretrained(mixtral(), folder)  # its frames are computed again, half of them by each process
    torch.testing.assert_close(logits(again), logits(expected), atol=1e-5, rtol=1e-4)
    dist.destroy_process_group()
    print("well", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
