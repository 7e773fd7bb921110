"""One of the two processes of tests/test_sweep.py: decomposes, and writes what it has and what it computed itself."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from peft_kasa.spectral import Engine, stacks

ran: list[str] = []
computed = Engine._computed


def noted(self: Engine, w: Any, k: int, end: str, name: str, chain: Any) -> Any:
    ran.append(name)
    return computed(self, w, k, end, name, chain)


def noted_together(weights: Any, *rest: Any) -> Any:
    ran.append(str(tuple(weights[0].shape)))
    return cuts(weights, *rest)


cuts = stacks.cuts


def alike() -> dict[str, torch.Tensor]:
    return {
        f"layers.{index}": torch.randn(shape, generator=torch.Generator().manual_seed(index))
        for index, shape in enumerate([(60, 40), (40, 60)] * 5)
    }


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    return {
        f"layers.{index}": torch.randn(shape, generator=torch.Generator().manual_seed(seed + index))
        for index, shape in enumerate([(60, 40), (300, 290), (40, 60), (280, 280), (50, 50)])
    }


def flat(cuts: Any) -> dict[str, torch.Tensor]:
    return {f"{name}.{i}": part for name, cut in cuts.items() for i, part in enumerate(cut)}


def kasa() -> dict[str, torch.Tensor]:
    from peft import get_peft_model

    from peft_kasa import KaSAConfig

    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(m, n) for m, n in ((30, 40), (40, 20), (20, 50), (50, 10))))
    wrapped = get_peft_model(model, KaSAConfig(r=3, target_modules=["0", "1", "2", "3"]))  # type: ignore[arg-type]
    return {name: value.detach().clone() for name, value in wrapped.named_parameters()}


def main(case: str, folder: Path) -> None:
    rank = int(os.environ["RANK"])
    Engine._computed = noted  # type: ignore[method-assign]
    dist.init_process_group("gloo", rank=rank, world_size=2)
    names = list(weights())
    if case == "kasa":
        values, names = kasa(), ["0", "1", "2", "3"]
    elif case == "broken":
        bad = weights()
        bad["layers.1"][3, 3] = torch.nan
        try:
            Engine().many(bad, 2)
        except (ValueError, RuntimeError) as error:
            print(error)
            dist.barrier()  # a process that leaves early can break the other's last exchange
            dist.destroy_process_group()
            sys.exit(3)
    elif case == "meta":
        with torch.device("meta") if rank else nullcontext():
            values = kasa()
        values = {} if rank else values
    elif case in ("different", "more"):
        own = weights() | ({"more": torch.eye(5)} if rank else {})
        if case == "different":  # the same names and shapes
            own = weights() | ({"layers.1": torch.eye(300, 290)} if rank else {})
        values = flat(Engine().many(own, 2, "bottom"))
    elif case == "together":
        stacks._devices, stacks.cuts = {"cpu"}, noted_together
        values, names = flat(Engine().many(alike(), 2, "bottom")), ["(60, 40)", "(40, 60)"]
    else:
        values = flat(Engine().many(weights(), 2, "bottom"))
    here = list(ran)
    dist.destroy_process_group()
    given = alike() if case == "together" else weights()
    alone = kasa() if case in ("kasa", "meta") else flat(Engine().many(given, 2, "bottom"))
    torch.save({"values": values, "alone": alone, "ran": here, "names": names}, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
