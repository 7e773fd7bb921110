"""`peft-kasa methods`: the family, or one of its methods."""

from __future__ import annotations

import inspect
import re
from argparse import Namespace
from dataclasses import MISSING, Field, fields
from typing import Any

import torch
import transformers

from peft_kasa_cli.output import Output, table

from ..methods.method import SpectralConfig, methods
from ..methods.table import row
from .configs import HIDDEN, build_config, config_class
from .counting import learns, shapes
from .models import load_config

COLUMNS = {  # by what `_described` calls them; papers are in the JSON, and in one method's
    "method": "method",
    "source": "starts from",
    "learns": "learns",
    "leaves": "leaves the base",
    "identity": "at the base",
    "parameters": "a module",
    "export_rank": "as LoRA",
}


def run(args: Namespace, out: Output) -> None:
    """Shows the table of the family, or one method's arguments."""
    if args.name is None:
        _family(args, out)
    else:
        _one(config_class(args.name), args, out)


def _family(args: Namespace, out: Output) -> None:
    sizes = _sizes(args.model) if args.model else None
    data = [_described(build_config(name, {"r": args.r}), sizes) for name in sorted(methods())]
    columns = COLUMNS | ({"r": "r", "count": "in this model"} if sizes else {})
    rows = [[fact[key] for key in columns] for fact in data]
    out.result(data, table(list(columns.values()), rows), _legend(args.model))


def _legend(model: str | None) -> str:
    lines = "m outputs, n inputs, rank r, k = min(m, n). L, K, R: left factor, core, right factor."
    lines += " One method: peft-kasa methods kasa"
    return lines + (f"\nin this model: numbers that learn in all linear layers of {model}" if model else "")


def _described(config: SpectralConfig, sizes: Any) -> dict[str, Any]:
    facts = row(config)._asdict()
    facts = {"method": config.name, "paper": f"arXiv:{config.paper}", **facts, "data": config.needs, "r": config.r}
    return facts | ({"count": learns(config, sizes)} if sizes else {})


def _sizes(model: str) -> Any:
    """The shapes of a model's linear layers, from its config."""
    config = load_config(model)
    name = (config.architectures or [""])[0]
    kind = getattr(transformers, name, None)
    with torch.device("meta"):
        made = kind(config) if kind else transformers.AutoModelForCausalLM.from_config(config)
    return shapes(made, build_config("pissa", {"target_modules": "all-linear"}))


def _one(kind: type[SpectralConfig], args: Namespace, out: Output) -> None:
    config = build_config(kind.name, {"r": args.r})
    facts = _described(config, _sizes(args.model) if args.model else None)
    arguments = [_argument(field, kind) for field in sorted(fields(kind), key=_order(kind)) if field.name not in HIDDEN]
    summary = " ".join(inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0].split())
    data = facts | {"class": kind.__name__, "summary": summary, "arguments": arguments}
    shown = [(fact["name"], fact["default"], fact["what"]) for fact in arguments]
    labels = {"source": "starts from", "leaves": "leaves the base", "identity": "starts at the base model"}
    lines = [
        (labels.get(key, key.replace("_", " ")), value)
        for key, value in facts.items()
        if key != "config" and value != ""
    ]
    out.result(
        data,
        f"{kind.__name__}, arXiv:{kind.paper} (https://arxiv.org/abs/{kind.paper})\n\n{summary}\n",
        table(["", ""], lines),
        table(["argument", "default", "what it is"], shown),
    )


def _order(kind: type[SpectralConfig]) -> Any:
    """The method's own arguments first."""
    own = set(inspect.get_annotations(kind))
    return lambda field: (field.name not in own, field.name not in ("r", "alpha"))


def _argument(field: Field[Any], kind: type[SpectralConfig]) -> dict[str, Any]:
    default = field.default if field.default is not MISSING else field.default_factory()  # type: ignore[misc, operator]
    told = next((text for known in kind.__mro__ if (text := _told(known).get(field.name))), "as in PEFT's LoraConfig")
    return {"name": field.name, "default": default, "what": told}


def _told(kind: type) -> dict[str, str]:
    """What the docstring of a config says of each argument."""
    doc = inspect.cleandoc(kind.__dict__.get("__doc__") or "")
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", doc, re.M | re.S)
    entries = re.findall(r"^    ([\w, ]+): (.*?)(?=^    \w|\Z)", section[1] if section else "", re.M | re.S)
    return {name: " ".join(text.split()) for names, text in entries for name in names.split(", ")}
