"""The family as one table, computed from what each config does: `python -m peft_kasa.methods.table`."""

from __future__ import annotations

from dataclasses import fields
from typing import NamedTuple

import torch
from torch import Tensor

from ..spectral import Engine, LowRank
from ..spectral.covariance import Covariance
from .corda import CorDAConfig
from .lora_null import LoRANullConfig
from .method import SpectralConfig, methods
from .nlora import NLoRAConfig
from .site import Site, Start
from .spectral_adapter import SpectralAdapterConfig
from .svft import SVFTConfig

M, N = 48, 40  # of the weight that the table is computed on


class Row(NamedTuple):
    """One config's properties, in the order of the table's columns."""

    config: str
    source: str
    learns: str
    leaves: str
    identity: bool
    parameters: str
    export_rank: str


def row(config: SpectralConfig) -> Row:
    """The properties of a config, from its starts at a random weight.

    Examples:
        >>> from peft_kasa import LoRAXSConfig
        >>> from peft_kasa.methods.table import row
        >>> row(LoRAXSConfig(std=0.0))[2:]
        ('K', 'nothing', True, 'r²', 'r')
    """
    start = _start(config, 4)
    cut = start.displaced if isinstance(start.displaced, LowRank) else None
    both = start.displaced == "start" and {"left", "right"} <= set(start.train)
    rank = f"r + {cut.rank // 4 if cut.rank != 4 else ''}r".replace("r + r", "2r") if cut else "2r" if both else "r"
    return Row(
        _label(config),
        config.source,
        ", ".join({"left": "L", "core": "K", "right": "R"}[slot] for slot in start.train),
        "the start" if start.displaced == "start" else "other triples" if cut else "nothing",
        _is_identity(config, start),
        _parameters(config, start),
        rank if config.r is not None else rank.replace("r", "k"),
    )


def table() -> str:
    """All methods and their notable variants, in Markdown."""
    defaults = [known() for _, known in sorted(methods().items()) if known.__module__.startswith(__package__)]
    variants = [
        NLoRAConfig(variant="slora"),
        NLoRAConfig(variant="inttune"),
        NLoRAConfig(pseudo_inverse=True),
        SpectralAdapterConfig(variant="rotation"),
        SVFTConfig(pattern="banded", width=2),
        CorDAConfig(mode="knowledge"),
        LoRANullConfig(version=2),
    ]
    names = [
        "config",
        "source of the start",
        "learns",
        "leaves the base",
        "starts at the base",
        "parameters",
        "as LoRA",
    ]
    lines = [names, ["---"] * len(names)]
    for known in sorted([*defaults, *variants], key=lambda config: type(config).__name__.lower()):
        lines.append(["yes" if cell is True else "no" if cell is False else cell for cell in row(known)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _start(config: SpectralConfig, rank: int) -> Start:
    weight = torch.randn(M, N, generator=torch.Generator().manual_seed(0))
    return config.start(
        Site("", weight, rank, 1.0, torch.Generator().manual_seed(1), Engine(), _evidence(config.needs))
    )


def _evidence(needs: str) -> Covariance | Tensor | None:
    generator = torch.Generator().manual_seed(2)
    if needs == "gradients":
        return torch.randn(M, N, generator=generator)
    if not needs:
        return None
    inputs = Covariance(N)
    inputs.update(torch.randn(4 * N, N, generator=generator))
    return inputs


def _is_identity(config: SpectralConfig, start: Start) -> bool:
    if start.displaced is not None:
        return start.displaced == "start"
    core = config.core(start.trained.core, start.fixed, len(start.trained.right))
    return not start.trained._replace(core=core).dense().any()


def _parameters(config: SpectralConfig, start: Start) -> str:
    """As a formula in m, n and r, found from starts of several ranks."""
    k = "r" if config.r is not None else "k"
    sides = "".join(letter for slot, letter in (("left", "m"), ("right", "n")) if slot in start.train)
    terms = [f"{k} ({' + '.join(sides)})" if len(sides) == 2 else f"{k} {sides}"] if sides else []
    if "core" in start.train:
        sizes = [_start(config, rank).trained.core.numel() for rank in (5, 6, 7)]
        square = (sizes[2] - 2 * sizes[1] + sizes[0]) // 2
        linear = sizes[1] - sizes[0] - 11 * square
        constant = sizes[0] - 25 * square - 5 * linear
        terms += [f"{square if square > 1 else ''}{k}²"] * bool(square) + [f"{linear if linear > 1 else ''}{k}"] * bool(
            linear
        )
        terms += [str(constant)] * bool(constant)
    return " + ".join(terms).replace("+ -", "- ")


def _label(config: SpectralConfig) -> str:
    hidden = {"r", "alpha", "use_rslora", "rank_budget"}
    own = [field for field in fields(config) if field.name not in hidden and field.name in type(config).__annotations__]
    given = [(field.name, getattr(config, field.name)) for field in own if getattr(config, field.name) != field.default]
    return f"{type(config).__name__}({', '.join(f'{name}={value!r}' for name, value in given)})".replace("()", "")


if __name__ == "__main__":
    print(table())
