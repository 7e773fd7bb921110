"""What KaSA's cut does to a model before any training: the loss of SmolLM2-135M-Instruct on three texts, as a table.

    python examples/benchmarks/kasa_cut.py            # a few minutes on two CPU cores
    python examples/benchmarks/kasa_cut.py --quick    # the base and two cuts

KaSA starts from W less its t smallest singular triples, t = r = 8 here, and learns nothing yet (L = 0): a row is the
model with that cut. The texts are one sentence, a paragraph, and 512 tokens of the repository's licence. float32.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from base_model import smollm2
from peft import get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from peft_kasa import KaSAConfig

RANK = 8
SENTENCE = "The ferry to the islands leaves twice a day, but in winter it often stays in the harbour."
PARAGRAPH = (
    "Bread is made of flour, water, salt and yeast. The dough is kneaded until it is smooth and left in a warm place, "
    "where the yeast turns sugar into gas and the dough rises. Then it is shaped and baked in a hot oven. Steam in the "
    "first minutes keeps the crust soft, so that the loaf can grow before it sets."
)
LICENCE = Path(__file__).resolve().parents[2] / "LICENSE"
OTHERS = ["q_proj", "k_proj", "o_proj", "gate_proj"]
WITHOUT_V = [*OTHERS, "up_proj", "down_proj"]
CUTS: dict[str, dict[str, Any]] = {
    "all linear layers": {"target_modules": "all-linear"},
    "all, `reference_truncation=True`": {"target_modules": "all-linear", "reference_truncation": True},
    "PEFT's default targets, `q_proj` and `v_proj`": {},
    "the same, `reference_truncation=True`": {"reference_truncation": True},
    "`v_proj` alone": {"target_modules": ["v_proj"]},
    "`up_proj` alone": {"target_modules": ["up_proj"]},
    "`down_proj` alone": {"target_modules": ["down_proj"]},
    **{f"`{name}` alone": {"target_modules": [name]} for name in OTHERS},
    "all but `v_proj`": {"target_modules": WITHOUT_V},
    **{f"all, `truncation={t}`": {"target_modules": "all-linear", "truncation": t} for t in (4, 2, 1, 0)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the base and two cuts")
    cuts = list(CUTS.items())[: 2 if parser.parse_args().quick else None]
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    texts = [
        tokenizer(text, return_tensors="pt").input_ids[:, :512] for text in (SENTENCE, PARAGRAPH, LICENCE.read_text())
    ]
    base = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)
    print("| cut | " + " | ".join(f"{ids.shape[1]} tokens" for ids in texts) + " |")
    print("|---" * (1 + len(texts)) + "|")
    show("nothing (the base model)", losses(base, texts))
    for name, settings in cuts:
        model = get_peft_model(base, KaSAConfig(r=RANK, **settings))
        show(name, losses(model, texts))
        base = model.unload()


@torch.no_grad()
def losses(model: Any, texts: list[Tensor]) -> list[float]:
    """The mean loss a token of each text, (1, tokens)."""
    return [model.eval()(input_ids=ids, labels=ids).loss.item() for ids in texts]


def show(name: str, row: list[float]) -> None:
    print(f"| {name} | " + " | ".join(f"{loss:.2f}" for loss in row) + " |", flush=True)


if __name__ == "__main__":
    main()
