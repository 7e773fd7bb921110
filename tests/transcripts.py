"""What the pages show of `peft-kasa`: commands, and what they print. This makes it anew on SmolLM2, in a minute:

python tests/transcripts.py
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from fences import BLOCK, PAGES, ROOT, blocks

sys.path.extend([str(ROOT), str(ROOT / "examples")])

import torch
from base_model import smollm2
from chat import load_model, load_tokenizer, train
from orders import messages, orders
from peft import LoraConfig, get_peft_model

from peft_kasa_cli import main, output

SHOWN = re.compile(r"^\$ (?P<command>peft-kasa (?:.*\\\n)*.*)\n(?P<told>(?:(?!\$ ).*\n)*)", re.M)
CUT = "  ..."  # a page leaves out the rest of a table
HOME = "/home/me"  # the page's name for the folder that commands run in
WIDTH = 118  # columns that fit a page


def transcripts() -> dict[str, str]:
    """What the pages show after each `peft-kasa` command."""
    return {one["command"]: one["told"] for block in blocks("console") for one in SHOWN.finditer(block.text)}


def stage(model: str) -> None:
    """Puts what the commands read into the working folder: a model, orders, and PEFT's LoRA that has learnt a few."""
    Path("smollm2").symlink_to(model)
    rows = [messages(order) for order in orders(64, seed=0)]
    Path("orders.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    torch.manual_seed(0)
    lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj"])
    learner = get_peft_model(load_model("smollm2", torch.float32), lora)
    train(learner, load_tokenizer("smollm2"), rows[:5], lr=5e-4, batch_size=1)
    learner.save_pretrained("lora")


def told(commands: Iterable[str]) -> dict[str, str]:
    """What they print, run in the working folder; `sft` first, whose adapter others read."""
    return {one: printed(one) for one in sorted(commands, key=lambda one: " sft " not in one)}


def printed(command: str) -> str:
    """Its standard output, on a page's width, without what is this machine's alone.

    Raises:
        RuntimeError: the exit code is not 0.
    """
    arguments = shlex.split(command.replace("\\\n", " "))[1:]
    kept, wide, output.WIDE = os.dup(1), output.WIDE, WIDTH
    with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
        try:
            os.dup2(file.fileno(), 1)
            code = main(arguments)
            sys.stdout.flush()
        finally:
            os.dup2(kept, 1)
            os.close(kept)
            output.WIDE = wide
        if code:
            raise RuntimeError(f"{command}: exit code {code}")
        file.seek(0)
        return file.read().replace(os.getcwd(), HOME).replace(platform.release(), "...")


def paragraphs(text: str) -> list[list[str]]:
    """Lines without spaces at their ends, in groups that empty lines divide."""
    lines = "\n".join(line.rstrip() for line in text.splitlines())
    return [group.splitlines() for group in re.split(r"\n{2,}", lines.strip("\n"))]


def laid_out(text: str, page: str) -> str:
    """What was printed as the page shows it: not at all, or with tables that are cut where the page cuts them."""
    if not page:
        return ""
    groups = paragraphs(text)
    for group, like in zip(groups, paragraphs(page), strict=False):
        if like[-1] == CUT:
            group[len(like) - 1 :] = [CUT]
    return "\n\n".join("\n".join(group) for group in groups) + "\n"


def renew() -> None:
    """Puts what the commands print now into the pages."""
    shown = transcripts()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        stage(smollm2())
        now = {one: laid_out(text, shown[one]) for one, text in told(shown).items()}
        os.chdir(ROOT)

    def renewed(block: re.Match[str]) -> str:
        return SHOWN.sub(lambda one: f"$ {one['command']}\n{now.get(one['command'], one['told'])}", block[0])

    for page in PAGES:
        page.write_text(BLOCK.sub(renewed, page.read_text()))


if __name__ == "__main__":
    renew()
