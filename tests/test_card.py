"""The model card that a save writes: its metadata, and one part of the text."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from bases import BASES, fresh, load, stack
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError
from members import MEMBERS, Member
from peft import PeftModel, get_peft_model
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from peft_kasa import PiSSAConfig
from peft_kasa.sharing import card, hub

each_member = pytest.mark.parametrize("member", MEMBERS, ids=str)
KASA = MEMBERS[0]


def saved(folder: Path, model: PeftModel) -> ModelCard:
    model.save_pretrained(str(folder))
    return ModelCard.load(folder / "README.md")


def load_as(name: str) -> LlamaForCausalLM:
    """The tiny model as if it came from the Hub."""
    base = fresh()
    base.config._name_or_path = name
    return base


def cell(text: str, row: str) -> str:
    found = re.search(rf"^\| {row} \| (.*?) \|", text, re.M)
    assert found, row
    return found[1]


@each_member
def test_a_save_tells_the_facts(member: Member, tiny: str, tmp_path: Path) -> None:
    model = get_peft_model(load(tiny), member.config(rank_pattern={"q_proj": 2}, alpha=6.0))
    found = saved(tmp_path, model)
    assert (found.data.library_name, found.data.tags[:2]) == ("peft", ["peft_kasa", member.name])
    assert cell(found.text, "method").startswith(f"`{member.name}` ([arXiv:{member.config_class.paper}]")
    assert cell(found.text, "rank") == "2 to 4"
    assert cell(found.text, "alpha") == "6"
    assert cell(found.text, "scale") == "1.5 to 3"
    assert cell(found.text, "parameters that learn") == f"{model.get_nb_trainable_parameters()[0]:,}"
    assert "`q_proj`" in cell(found.text, "target modules")


@pytest.mark.parametrize("kind", BASES)
def test_a_path_of_this_machine_stays_here(kind: str, tiny: str, tmp_path: Path) -> None:
    found = saved(tmp_path / "mine", get_peft_model(load(tiny, kind), KASA.config()))
    assert found.data.base_model is None
    assert tiny not in found.content
    assert str(tmp_path) not in found.content
    stored = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "nf4": "4-bit (nf4)", "int8": "8-bit"}
    assert cell(found.text, "base weights").startswith(stored[kind])


def test_a_folder_that_looks_like_an_id_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = get_peft_model(load_as("me/tiny"), KASA.config())
    assert saved(tmp_path / "one", model).data.base_model == "me/tiny"
    (tmp_path / "me" / "tiny").mkdir(parents=True)
    assert saved(tmp_path / "two", model).data.base_model is None


def test_saving_again_changes_nothing(tiny: str, tmp_path: Path) -> None:
    model = get_peft_model(load(tiny), KASA.config())
    assert saved(tmp_path, model).content == saved(tmp_path, model).content


def test_a_users_card_keeps_its_words_and_metadata(tmp_path: Path) -> None:
    own = "---\nlicense: mit\ntags:\n- own\npipeline_tag: text-ranking\n---\n# Mine\n\nBefore.\n"
    (tmp_path / "README.md").write_text(own)
    model = get_peft_model(stack(), KASA.config(target_modules=["0"]))
    saved(tmp_path, model)
    path = tmp_path / "README.md"
    path.write_text(path.read_text() + "\nAfter \\1 it.\n")
    found = saved(tmp_path, model)
    assert found.text.strip().startswith("# Mine\n\nBefore.")
    assert found.text.strip().endswith("After \\1 it.")
    assert (found.data.license, found.data.pipeline_tag) == ("mit", "text-ranking")
    assert found.data.tags == ["own", "peft_kasa", "kasa"]


def test_results_of_the_same_metric_are_replaced_and_others_stay(tmp_path: Path) -> None:
    model = get_peft_model(stack(), KASA.config(target_modules=["0"]))
    for value, metric in ((1, "loss"), (2, "bleu"), (3, "loss")):
        result = EvalResult("text-generation", "e2e", "E\\2E", metric, value)
        card.write(tmp_path, model, ["default"], "me/x", metrics=[result])
    found = saved(tmp_path, model)
    assert {result.metric_type: result.metric_value for result in found.data.eval_results} == {"bleu": 2, "loss": 3}
    assert "| text-generation | E\\2E | loss | 3 |" in found.text
    with pytest.raises(ValueError, match=r"metrics have to be huggingface_hub\.EvalResult.*Found 'loss'"):
        card.write(tmp_path, model, ["default"], metrics={"loss": 1})  # type: ignore[arg-type]


def test_several_adapters_have_a_column_each(tmp_path: Path) -> None:
    model = get_peft_model(stack(), KASA.config(target_modules=["0"]))
    model.add_adapter("second", PiSSAConfig(r=2, target_modules=["2"], modules_to_save=["4"]))
    found = saved(tmp_path, model)
    assert "|  | default | second |" in found.text
    assert {"kasa", "pissa"} <= set(found.data.tags)
    assert "| also trained |  | `4` |" in found.text


@dataclass(repr=False)
class TeamConfig(PiSSAConfig):
    name = "team"
    paper = ""


def test_a_method_of_someone_elses_is_imported_from_where_it_is(tmp_path: Path) -> None:
    text = saved(tmp_path, get_peft_model(stack(), TeamConfig(r=2, target_modules=["0"]))).text
    assert cell(text, "method") == "`team`"
    assert f"import {__name__}  # tells PEFT" in text


def test_the_code_on_the_card_runs(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = saved(tmp_path / "adapter", get_peft_model(load_as("me/tiny"), KASA.config())).text
    (tmp_path / "me").mkdir()
    (tmp_path / "me" / "tiny").symlink_to(tiny)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S):
        exec(block, names)
    assert isinstance(names["model"], PeftModel)


def test_a_trainers_card_has_our_part(tiny: str, tmp_path: Path) -> None:
    model = get_peft_model(load(tiny), KASA.config())
    trainer = Trainer(model, TrainingArguments(str(tmp_path), report_to="none", use_cpu=True))
    trainer.save_model()
    trainer.create_model_card(model_name="mine")
    found = ModelCard.load(tmp_path / "README.md")
    assert "## KaSA adapter" in found.text
    assert "peft_kasa" in found.data.tags


def test_the_card_is_of_the_adapters_that_are_saved(tmp_path: Path) -> None:
    model = get_peft_model(stack(), PiSSAConfig(r=2, target_modules=["0"]))
    model.add_adapter("other", KASA.config(r=2, target_modules=["2"]))
    model.save_pretrained(str(tmp_path), True, ["other"])
    found = ModelCard.load(tmp_path / "README.md")
    assert f'"{tmp_path.name}", subfolder="other"' in found.text
    assert "PiSSA" not in found.text
    assert (tmp_path / "other" / "adapter_model.safetensors").is_file()


def test_a_card_that_cannot_be_read_stops_no_save(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\ntags: [\n---\nMine.\n")
    model = get_peft_model(stack(), PiSSAConfig(r=2, target_modules=["0"]))
    with pytest.warns(UserWarning, match=r"README.md was left as it is"):
        model.save_pretrained(str(tmp_path))
    assert "Mine." in (tmp_path / "README.md").read_text()
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_a_hub_out_of_reach_costs_no_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_reach(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("no connection")

    (tmp_path / "README.md").write_text("Mine.")
    monkeypatch.setattr(hub, "hf_hub_download", out_of_reach)
    with pytest.raises(LocalEntryNotFoundError):
        hub._fetch_card(str(tmp_path), "me/kasa", None, None)
    assert (tmp_path / "README.md").read_text() == "Mine."


def test_no_adapter_takes_the_place_of_the_export() -> None:
    model = get_peft_model(stack(), PiSSAConfig(r=2, target_modules=["0"]), adapter_name="lora")
    with pytest.raises(ValueError, match="an adapter named 'lora' would lie where the export does"):
        model.push_to_hub("me/kasa")
