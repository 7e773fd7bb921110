"""Any adapter as a plain LoRA on the original base."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import BASES, load, logits, move, tokens
from members import MEMBERS, Member
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForSequenceClassification

from peft_kasa import LoraExport, export_lora, to_lora

each_member = pytest.mark.parametrize("member", MEMBERS, ids=str)

WITHOUT = """
import sys, torch
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "peft_kasa": raise ImportError("not here")
sys.meta_path.insert(0, Refuse())
from peft import PeftModel
from transformers import LlamaForCausalLM
base, *folders = sys.argv[1:]
ids = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(0))
for folder in folders:
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), folder).eval()
    torch.save(model(input_ids=ids).logits.detach(), folder + "/logits.pt")
"""


def trained(member: Member, folder: str, kind: str = "fp32", **given: object) -> PeftModel:
    model = get_peft_model(load(folder, kind), member.config(**given))
    move(model)
    return model


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@torch.no_grad()
def outputs(model: PeftModel) -> torch.Tensor:
    """Logits in training mode, without dropout. For an evaluation bitsandbytes rounds the inputs of 4-bit layers to
    bfloat16 on some CPUs, which makes a difference of 1e-7 between two adapters one of 1e-5."""
    return model.train()(input_ids=tokens()).logits.float()


@pytest.fixture(scope="module")
def exported(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[LoraExport, torch.Tensor]]:
    """By member, its export, whose folder has the logits of a process without this package, and the adapter's own."""
    folder, found = tmp_path_factory.mktemp("exported"), {}
    for member in MEMBERS:
        model = trained(member, tiny, alpha=6, rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6})
        found[str(member)] = export_lora(model, folder / str(member)), logits(model)
    paths = [report.path for report, _ in found.values()]
    subprocess.run([sys.executable, "-c", WITHOUT, tiny, *paths], check=True)
    return found


@each_member
def test_exact_in_a_process_without_this_package(member: Member, exported: Any) -> None:
    report, expected = exported[str(member)]
    assert report.rank == 6 * member.export_rank
    assert relative(torch.load(Path(report.path) / "logits.pt"), expected) <= 1e-5


@each_member
@pytest.mark.parametrize("kind", BASES)
def test_exact_on_every_base(member: Member, kind: str, tiny: str, tmp_path: Path) -> None:
    model = trained(member, tiny, kind)
    expected = outputs(model)
    export_lora(model, tmp_path)
    again = outputs(PeftModel.from_pretrained(load(tiny, kind), str(tmp_path)))
    assert relative(again, expected) <= {"bf16": 6e-2, "fp16": 1e-2}.get(kind, 1e-5)


@each_member
def test_server_safe_by_default(member: Member, tiny: str, tmp_path: Path) -> None:
    model = trained(member, tiny, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 5}, alpha=3, use_rslora=True)
    report = export_lora(model, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    rank = 4 * member.export_rank
    assert written["peft_type"] == "LORA"
    assert (written["r"], written["lora_alpha"], report.rank, report.max_lora_rank) == (rank, rank, rank, 8)
    assert (written["rank_pattern"], written["alpha_pattern"]) == ({}, {})
    assert (written["use_rslora"], written["bias"], written["modules_to_save"]) == (False, "none", None)
    assert written["init_lora_weights"] is True
    assert not written["use_dora"]
    names = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert sorted(written["target_modules"]) == names
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 28
    assert {key.split(".")[-2] for key in tensors} == {"lora_A", "lora_B"}
    assert {min(value.shape) for value in tensors.values()} == {rank}
    assert "exact" in str(report)


@each_member
def test_ranks_of_each_module_where_asked(member: Member, tiny: str, tmp_path: Path) -> None:
    model = trained(member, tiny, rank_pattern={"q_proj": 2})
    lora, tensors, _ = to_lora(model, uniform=False)
    rank = member.export_rank
    assert lora.r == 4 * rank
    assert lora.rank_pattern == {f"model.layers.{i}.self_attn.q_proj": 2 * rank for i in (0, 1)} == lora.alpha_pattern
    assert tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape == (2 * rank, 64)
    export_lora(model, tmp_path, uniform=False)
    assert relative(logits(PeftModel.from_pretrained(load(tiny), str(tmp_path))), logits(model)) <= 1e-5


@each_member
def test_truncation_is_optimal_and_reports_its_error(member: Member, tiny: str, tmp_path: Path) -> None:
    model = trained(member, tiny)
    report = export_lora(model, tmp_path, rank=3)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for name, error in report.errors.items():
        exact = model.get_submodule(f"base_model.model.{name}").get_delta_weight("default").detach().double()
        key = f"base_model.model.{name}.lora_"
        kept = tensors[key + "B.weight"].double() @ tensors[key + "A.weight"].double()
        s = torch.linalg.svdvals(exact)
        assert error == pytest.approx((s[3:].norm() / s.norm()).item(), rel=1e-4)
        assert ((kept - exact).norm() / exact.norm()).item() == pytest.approx(error, rel=1e-4)
    worst = max(report.errors, key=report.errors.__getitem__)
    assert f"error up to {report.errors[worst]:.1e} ({worst})" in str(report)


def test_only_some_layers_are_named_in_full(tiny: str, tmp_path: Path) -> None:
    model = trained(MEMBERS[1], tiny, target_modules=["q_proj"], layers_to_transform=[1])
    export_lora(model, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["target_modules"] == ["model.layers.1.self_attn.q_proj"]
    assert relative(logits(PeftModel.from_pretrained(load(tiny), str(tmp_path))), logits(model)) <= 1e-5


def test_what_servers_do_not_take_is_refused_with_the_way_out(tiny: str, tmp_path: Path) -> None:
    model = trained(MEMBERS[1], tiny, modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match=r"also trains \['lm_head'\].*uniform=False"):
        export_lora(model, tmp_path)
    assert not os.listdir(tmp_path)
    export_lora(model, tmp_path, uniform=False)
    assert relative(logits(PeftModel.from_pretrained(load(tiny), str(tmp_path))), logits(model)) <= 1e-5


def test_a_head_that_peft_names_again_is_named_once(tmp_path: Path) -> None:
    """PEFT adds "classifier" and "score" to those of a classifier's config each time that it is wrapped or loaded."""
    given = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    base = LlamaForSequenceClassification(LlamaConfig(**sizes, num_attention_heads=4, num_labels=1, pad_token_id=0))
    model = get_peft_model(base, MEMBERS[1].config(r=2, target_modules=["q_proj"], **given))
    with pytest.raises(ValueError, match=r"also trains \['classifier', 'score'\]"):
        export_lora(model, tmp_path)
    export_lora(model, tmp_path, uniform=False)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["classifier", "score"]


def test_bad_arguments(tiny: str, tmp_path: Path) -> None:
    model = trained(MEMBERS[1], tiny)
    with pytest.raises(ValueError, match=r"one of the family's in this model: \['default'\]. Found 'other'"):
        export_lora(model, tmp_path, adapter="other")
    with pytest.raises(ValueError, match="The model has no adapter of peft_kasa: wrap it with get_peft_model first"):
        export_lora(load(tiny), tmp_path)
    with pytest.raises(ValueError, match=r"rank has to be at least 1\. Found 0"):
        export_lora(model, tmp_path, rank=0)
    with pytest.raises(ValueError, match=r"rank has to be a whole number\. Found 1\.5"):
        export_lora(model, tmp_path, rank=1.5)  # type: ignore[arg-type]


def test_the_adapters_own_folder_is_not_overwritten(tiny: str, tmp_path: Path) -> None:
    model = trained(MEMBERS[1], tiny)
    model.save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="holds an adapter of the family: export to another folder"):
        export_lora(model, tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(load(tiny), str(tmp_path))), logits(model))


def test_a_rank_that_no_server_takes_is_refused(tmp_path: Path) -> None:
    wide = torch.nn.Sequential(torch.nn.Linear(300, 300))
    model = get_peft_model(wide, MEMBERS[1].config(r=260, target_modules=["0"]))
    with pytest.raises(ValueError, match=r"exact LoRA has rank 520 \(0\), above 512.*rank=.*merge_and_unload"):
        export_lora(model, tmp_path)
    assert export_lora(model, tmp_path, rank=128).rank == 128
