"""What the pages show of `peft-kasa` is what it prints: its words on a tiny model, and all of it on the real one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from base_model import smollm2
from fences import blocks
from test_examples import make_chat_model
from transcripts import laid_out, paragraphs, stage, told, transcripts

from peft_kasa.methods import registry

SHOWN = transcripts()
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
OF_THE_MODEL = {r"model\.layers\.[\w.]+": "MODULE", NUMBER.pattern: "#", r"# [kMG]?B": "# B"}
OF_THE_MACHINE = {r"\bin [\d.]+ s\b": "in a while"}

DOCTOR = "peft-kasa doctor"
TOLD = [one for one in SHOWN if SHOWN[one]]  # for the others, it is enough that they run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return on(make_chat_model(str(tmp_path_factory.mktemp("model"))), tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return on(smollm2(), tmp_path_factory.mktemp("real"))


def on(model: str, folder: Path) -> dict[str, str]:
    """What all commands print, with this model for SmolLM2."""
    ours = {name: config for name, config in registry.methods().items() if config.__module__.startswith("peft_kasa.")}
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        patched.setattr(registry, "_METHODS", ours)  # without those of other tests
        stage(model)
        return told(SHOWN)


def masked(text: str, masks: dict[str, str]) -> str:
    for pattern, name in masks.items():
        text = re.sub(pattern, name, text)
    return text


def words(text: str) -> list[list[str]]:
    """Of each paragraph the words that do not depend on the model; of a table, its head's."""
    return [head(group) or masked("\n".join(group), OF_THE_MODEL).split() for group in paragraphs(text)]


def head(group: list[str]) -> list[str]:
    """A table's words above its rule, in order, since columns may be folded elsewhere."""
    rules = [place for place, line in enumerate(group) if set(line.strip()) == {"─"}]
    return sorted(masked("\n".join(group[: rules[0]]), OF_THE_MODEL).split()) if rules else []


def names(text: str) -> list[str]:
    """The first cells of a text's tables."""
    return [re.split(" {2,}", line.strip())[0] for group in paragraphs(text) if head(group) for line in group]


def test_each_command_is_shown_once() -> None:
    prompts = [line for block in blocks("console") for line in block.text.splitlines() if line[:12] == "$ peft-kasa "]
    assert len(prompts) == len(SHOWN) > 10


@pytest.mark.parametrize("command", TOLD)
def test_the_page_has_the_commands_words(command: str, tiny: dict[str, str]) -> None:
    assert words(SHOWN[command]) == words(tiny[command])


def test_the_page_has_all_that_doctor_looks_at(tiny: dict[str, str]) -> None:
    assert names(SHOWN[DOCTOR]) == names(tiny[DOCTOR])


@pytest.mark.real
@pytest.mark.xdist_group("transcripts")
@pytest.mark.parametrize("command", [one for one in TOLD if one != DOCTOR])
def test_the_page_is_what_the_command_prints(command: str, real: dict[str, str]) -> None:
    """To the letter, and to a hundredth of each number, since processors round differently."""
    page, now = (masked(text, OF_THE_MACHINE) for text in (SHOWN[command], laid_out(real[command], SHOWN[command])))
    assert NUMBER.sub("#", page).split() == NUMBER.sub("#", now).split()
    assert numbers(page) == pytest.approx(numbers(now), rel=1e-2, abs=1e-5)


def numbers(text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in NUMBER.findall(text)]
