"""Pushing to the Hub and loading from it, over HTTP, against a server on loopback; each step in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import bases
import pytest
import torch
from hub_server import Hub, serving
from huggingface_hub import ModelCard
from members import MEMBERS, Member

each_member = pytest.mark.parametrize("member", MEMBERS, ids=str)

PUSH = """
import sys, torch
import bases, peft_kasa
from huggingface_hub import EvalResult, HfApi
from members import MEMBERS
from peft import get_peft_model
from transformers import AutoModelForCausalLM

out = {}
bases.fresh().push_to_hub("me/tiny")
result = EvalResult("text-generation", "e2e_nlg", "E2E", "loss", 1.42)
for member in MEMBERS:
    base = AutoModelForCausalLM.from_pretrained("me/tiny")
    model = get_peft_model(base, member.config(task_type="CAUSAL_LM"))
    bases.move(model)
    out[member.name] = bases.logits(model)
    peft_kasa.push_to_hub(model, f"me/{member.name}", metrics=[result], commit_message="Trained")
    if member.name == "kasa":
        model.push_to_hub("me/plain", tags=["mine"])
        peft_kasa.push_to_hub(model, "me/short", rank=4, revision="v1")
        model.add_adapter("second", member.config(r=2))
        model.push_to_hub("me/two")
        peft_kasa.push_to_hub(model, "me/second", "second")
        card = "---\\nlicense: mit\\ntags: [own]\\n---\\n# My words\\n\\nKeep | this.\\n"
        HfApi().upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id="me/short")
        peft_kasa.push_to_hub(model, "me/short")
        out["links"] = HfApi().list_repo_files("me/short")
        model.push_to_hub("me/short")
torch.save(out, sys.argv[1])
"""

LOAD = """
import sys, torch
import bases, peft_kasa
from members import MEMBERS
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM

out = {}
for name in [*[member.name for member in MEMBERS], "plain"]:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("me/tiny"), f"me/{name}")
    out[name] = bases.logits(model)
out["auto"] = bases.logits(AutoPeftModelForCausalLM.from_pretrained("me/kasa"))
out["revision"] = bases.logits(AutoPeftModelForCausalLM.from_pretrained("me/short", revision="v1"))
native = AutoModelForCausalLM.from_pretrained("me/tiny")
native.load_adapter("me/kasa")  # transformers' own loader
out["transformers"] = bases.logits(native)
for repo, options in {"me/two": {"subfolder": "second"}, "me/second": {}, "me/pickled": {}, "me/empty": {}}.items():
    try:
        model.load_adapter(repo, repo.replace("/", "_"), **options)
        out[repo] = model.peft_config[repo.replace("/", "_")].r
    except ValueError as error:
        out[repo] = str(error)
torch.save(out, sys.argv[1])
"""

WITHOUT = """
import sys, torch
sys.modules["peft_kasa"] = None  # any import of it fails
from peft import PeftModel
from transformers import AutoModelForCausalLM

out, ids = {}, torch.load(sys.argv[2])
for name in [*sys.argv[3].split(), "native"]:
    base = AutoModelForCausalLM.from_pretrained("me/tiny").eval()
    try:
        where = {"subfolder": "lora"} if name != "native" else {}
        model = PeftModel.from_pretrained(base, f"me/{name if where else 'kasa'}", **where)
        with torch.no_grad():
            out[name] = model(input_ids=ids).logits
    except KeyError as error:
        out[name] = repr(error)
torch.save(out, sys.argv[1])
"""


class Trip(NamedTuple):
    """What the pushing process had, and what the others found."""

    hub: Hub
    pushed: dict[str, Any]
    loaded: dict[str, Any]
    without: dict[str, Any]

    def card(self, repo: str, tmp_path: Path) -> ModelCard:
        path = tmp_path / "README.md"
        path.write_bytes(self.hub.repos[repo]["main"]["README.md"])
        return ModelCard.load(path)


@pytest.fixture(scope="module")
def trip(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trip]:
    folder = tmp_path_factory.mktemp("hub")
    here = os.path.dirname(os.path.abspath(__file__))
    path = os.pathsep.join([here, os.path.dirname(here)])
    with serving() as hub:
        environment = os.environ | hub.environment | {"HF_HOME": str(folder / "home"), "PYTHONPATH": path}

        def process(code: str, name: str, *arguments: str) -> dict[str, Any]:
            out = str(folder / name)
            subprocess.run([sys.executable, "-c", code, out, *arguments], check=True, env=environment)
            return torch.load(out)

        pushed = process(PUSH, "pushed")
        config = hub.repos["me/kasa"]["main"]["adapter_config.json"]
        hub.repos["me/pickled"] = {"main": {"adapter_config.json": config, "adapter_model.bin": b"pickle"}}
        hub.repos["me/empty"] = {"main": {"adapter_config.json": config}}
        torch.save(bases.tokens(), folder / "ids")
        names = " ".join(member.name for member in MEMBERS)
        loaded = process(LOAD, "loaded")
        yield Trip(hub, pushed, loaded, process(WITHOUT, "without", str(folder / "ids"), names))


@each_member
def test_what_comes_back_is_what_was_pushed(member: Member, trip: Trip) -> None:
    assert torch.equal(trip.loaded[member.name], trip.pushed[member.name])


@each_member
def test_without_the_package_the_export_gives_the_same(member: Member, trip: Trip) -> None:
    torch.testing.assert_close(trip.without[member.name], trip.pushed[member.name], atol=1e-5, rtol=1e-5)


def test_every_way_to_load_gives_the_same(trip: Trip) -> None:
    for way in ("plain", "auto", "revision", "transformers"):
        assert torch.equal(trip.loaded[way], trip.pushed["kasa"]), way


def test_without_the_package_the_error_names_it_and_the_card_tells_what_to_install(trip: Trip, tmp_path: Path) -> None:
    assert trip.without["native"] == "KeyError('PEFT_KASA')"
    text = trip.card("me/kasa", tmp_path).text
    assert "KeyError: 'PEFT_KASA'" in text
    assert "pip install peft_kasa" in text
    assert 'PeftModel.from_pretrained(base, "me/kasa", subfolder="lora")' in text


def test_an_adapter_goes_to_the_root_and_its_export_to_lora(trip: Trip) -> None:
    weights = {"adapter_config.json", "adapter_model.safetensors"}
    files = {"README.md", ".gitattributes", *weights}
    exported = files | {f"lora/{name}" for name in weights}
    assert set(trip.hub.repos["me/kasa"]["main"]) == set(trip.hub.repos["me/second"]["main"]) == exported
    assert set(trip.hub.repos["me/plain"]["main"]) == files
    assert set(trip.hub.repos["me/two"]["main"]) == files | {f"second/{name}" for name in weights}
    assert (trip.loaded["me/two"], trip.loaded["me/second"]) == (2, 2)


@each_member
def test_the_config_says_what_it_says_in_a_folder(member: Member, trip: Trip) -> None:
    config = json.loads(trip.hub.repos[f"me/{member.name}"]["main"]["adapter_config.json"])
    assert config["base_model_name_or_path"] == "me/tiny"
    assert (config["peft_type"], config["method"]) == ("PEFT_KASA", member.name)
    assert "statistics" not in config


@each_member
def test_the_card_has_what_the_hub_reads(member: Member, trip: Trip, tmp_path: Path) -> None:
    card = trip.card(f"me/{member.name}", tmp_path)
    assert (card.data.library_name, card.data.base_model) == ("peft", "me/tiny")
    assert {"peft_kasa", member.name, "transformers", "base_model:adapter:me/tiny"} == set(card.data.tags)
    assert card.data.pipeline_tag == "text-generation"
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("loss", 1.42)
    assert f"arXiv:{member.config_class.paper}" in card.text


def test_a_plain_push_adds_tags_and_promises_no_export(trip: Trip, tmp_path: Path) -> None:
    card = trip.card("me/plain", tmp_path)
    assert "mine" in card.data.tags
    assert 'subfolder="lora"' not in card.text
    assert "More Information Needed" not in card.text


def test_the_card_states_the_error_of_a_shorter_export(trip: Trip) -> None:
    text = trip.hub.repos["me/short"]["v1"]["README.md"].decode()
    assert "plain LoRA of rank 4, with a relative error of up to" in text


def test_a_card_that_was_there_keeps_its_words(trip: Trip, tmp_path: Path) -> None:
    card = trip.card("me/short", tmp_path)
    assert card.text.strip().startswith("# My words\n\nKeep | this.\n")
    assert card.data.license == "mit"
    assert card.data.tags[0] == "own"
    assert card.text.count("## KaSA adapter") == 1


def test_a_push_without_export_takes_an_old_one_away(trip: Trip) -> None:
    assert "lora/adapter_config.json" in trip.pushed["links"]
    assert not any(name.startswith("lora/") for name in trip.hub.repos["me/short"]["main"])


def test_a_pickle_on_the_hub_is_refused_unread(trip: Trip) -> None:
    assert "me/pickled" in trip.loaded["me/pickled"]
    assert "adapter_model.safetensors alone" in trip.loaded["me/pickled"]
    assert "has no adapter_model.safetensors" in trip.loaded["me/empty"]
    assert not any(line.startswith("GET") and line.endswith("adapter_model.bin") for line in trip.hub.log)
