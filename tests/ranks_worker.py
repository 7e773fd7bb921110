"""One of the two processes of tests/test_sweep.py: decomposes, and writes what it has and what it computed itself.

ranks_worker.py FOLDER CASE...
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

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


def broken() -> str:
    """The error that a weight with a NaN gives, in this process as in the other."""
    bad = weights()
    bad["layers.1"][3, 3] = torch.nan
    try:
        Engine().many(bad, 2)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


def stacked() -> Any:
    """Takes small weights together on the CPU too."""
    return patch.multiple(stacks, _devices={"cpu"}, cuts=noted_together)


def shared(case: str, rank: int) -> tuple[dict[str, torch.Tensor], list[str]]:
    """What the two processes compute together, and the names of what each may have computed."""
    if case == "kasa":
        return kasa(), ["0", "1", "2", "3"]
    if case == "meta":  # one rank loads the model, and the others wait for it on the meta device
        with torch.device("meta") if rank else nullcontext():
            values = kasa()
        return ({} if rank else values), list(weights())
    if case == "together":
        with stacked():
            return flat(Engine().many(alike(), 2, "bottom")), ["(60, 40)", "(40, 60)"]
    own = weights()
    if rank and case == "different":  # the same names and shapes
        own["layers.1"] = torch.eye(300, 290)
    if rank and case == "more":
        own["more"] = torch.eye(5)
    with patch.dict(os.environ, {"PEFT_KASA_SHARE": "0"} if case == "unshared" else {}):
        return flat(Engine().many(own, 2, "bottom")), list(weights())


def alone(case: str) -> dict[str, torch.Tensor]:
    """The same by one process for itself."""
    if case in ("kasa", "meta"):
        return kasa()
    with stacked() if case == "together" else nullcontext():
        return flat(Engine().many(alike() if case == "together" else weights(), 2, "bottom"))


def main(folder: Path, *cases: str) -> None:
    rank = int(os.environ["RANK"])
    Engine._computed = noted  # type: ignore[method-assign]
    dist.init_process_group("gloo", rank=rank, world_size=2)
    found: dict[str, Any] = {}
    for case in cases:
        ran.clear()
        values, names = shared(case, rank)
        found[case] = {"values": values, "ran": list(ran), "names": names}
    error = broken()
    dist.barrier()  # a process that leaves early can break the other's last exchange
    dist.destroy_process_group()
    for case in cases:
        found[case]["alone"] = alone(case)
    torch.save({"error": error} | found, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
