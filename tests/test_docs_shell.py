"""Every fenced block of the pages is of a kind that a test runs or reads; so are commands in the text and in tables.

Python blocks run in test_docs.py, and `peft-kasa` in console blocks in test_transcripts.py.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
import sys

import pytest
import yaml
from commands import KINDS, check, commands
from fences import PAGES, ROOT, blocks, prose
from transformers.integrations import HfDeepSpeedConfig

from peft_kasa.methods import methods

TYPED = [(str(block), command) for block in blocks("bash", "console") for command in commands(block)]
INLINE = re.compile(rf"`((?:[A-Z_]+=\S+ )*(?:{'|'.join(map(re.escape, KINDS))}) [^`]+)`")
MENTIONED = [
    (str(page.relative_to(ROOT)), " ".join(text.split())) for page in PAGES for text in INLINE.findall(prose(page))
]
ROW = re.compile(r"^\|.*`(python examples/\S+)` \|.*`(--[^`]*)` \|$", re.M)
ON_A_GPU = [("on a GPU", " ".join(row)) for row in ROW.findall((ROOT / "examples" / "README.md").read_text())]


def test_every_block_is_of_a_kind() -> None:
    kinds = {"python", "bash", "console", "json", "yaml", "modelfile"}
    assert not [str(block) for block in blocks() if block.kind not in kinds]
    assert sum(page.read_text().count("```") for page in PAGES) == 2 * len(blocks())


def test_there_are_commands_of_each_place() -> None:
    assert min(len(TYPED), len(MENTIONED), len(ON_A_GPU)) > 8


@pytest.mark.parametrize(("where", "command"), TYPED + MENTIONED + ON_A_GPU)
def test_a_command_can_be_given(where: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])  # scripts add to it
    check(command)


def test_the_json_is_the_config_of_the_example() -> None:
    (block,) = blocks("json")
    assert json.loads(block.text) == json.loads((ROOT / "examples" / "distributed" / "zero3.json").read_text())
    assert HfDeepSpeedConfig(json.loads(block.text)).is_zero3()


def test_yaml_can_be_read_and_our_plugin_reads_all_that_axolotls_has() -> None:
    files = [yaml.safe_load(block.text) for block in blocks("yaml")]
    (given,) = (file for file in files if "adapter" in file)
    source = (ROOT / "examples" / "integrations" / "axolotl_plugin.py").read_text()
    classes = [node.name for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    assert {name.removeprefix("axolotl_plugin.") for name in given.pop("plugins")} <= set(classes)
    assert all(re.search(rf"\bcfg\.{name}\b", source) for name in given)
    methods()[given["adapter"]](**given["spectral"])


def test_the_modelfile_names_what_was_converted() -> None:
    (block,) = blocks("modelfile")
    made = [shlex.split(command)[-1] for _, command in TYPED if "--outfile" in command]
    named = dict(line.split(" ./") for line in block.text.splitlines())
    assert named == {"FROM": made[0], "ADAPTER": made[1]}
