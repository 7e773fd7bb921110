"""The contract on SmolLM2-135M-Instruct, for every member, in fp32, bf16 and nf4: `pytest -m real`."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import effect
import pytest
import torch
from base_model import smollm2
from datasets import Dataset
from members import MEMBERS, Member
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

from peft_kasa import SpectralLinear, calibrate, export_lora
from peft_kasa.adapter.base.base_weight import BaseWeight
from peft_kasa.spectral import Engine

pytestmark = pytest.mark.real

KINDS = ["fp32", "bf16", "nf4"]
SOME = {  # all in fp32; one of each form elsewhere, since each takes half a minute
    "bf16": ("kasa", "svf", "corda", "lora_sb"),
    "nf4": ("kasa", "pissa", "svf", "svft", "lora_xs", "corda", "eva", "lora_sb"),
}
TEXTS = [f"Question: what is {i} plus {i + 3}? Answer: {2 * i + 3}." for i in range(24)]


def load(kind: str) -> Any:
    """The base, stored as `kind` says."""
    if kind != "nf4":
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[kind]
        return AutoModelForCausalLM.from_pretrained(smollm2(), dtype=dtype).eval()
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        smollm2(), quantization_config=quantization, dtype=torch.bfloat16, device_map="cpu"
    )
    return model.eval()


@torch.no_grad()
def logits(model: Any, training: bool = False) -> torch.Tensor:
    ids = torch.arange(1000, 1024)[None]
    return model.train(training)(input_ids=ids).logits


def digests(model: Any, layers: dict[str, Any]) -> dict[str, str]:
    """A hash of every base tensor's bits; quantised ones as they read back, which is after unpacking."""
    found = {}
    for name, layer in layers.items():
        weight = layer.base.matrix() if isinstance(layer, SpectralLinear) else BaseWeight(layer).matrix()
        found[name] = hashlib.sha256(weight.contiguous().numpy().tobytes()).hexdigest()
    for name, value in model.named_parameters():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if "peft_kasa_" not in name and plain.removesuffix(".weight") not in found:
            found[plain] = hashlib.sha256(value.detach().float().numpy().tobytes()).hexdigest()
    return found


def linears(model: Any) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if hasattr(m, "in_features") and n != "lm_head"}


def adapted(model: Any) -> dict[str, SpectralLinear]:
    return {m.name: m for m in model.modules() if isinstance(m, SpectralLinear)}


@dataclass
class Job:
    """One fine-tuning: a member on a base, before and after three steps of SFTTrainer."""

    member: Member
    kind: str
    base: torch.Tensor  # logits of the base
    start: torch.Tensor  # logits at step 0
    start_training: bool  # whether logits at step 0 in training mode, under dropout, were the base's
    bits: dict[str, str]
    model: Any
    after: torch.Tensor
    folder: str
    log: list[dict[str, Any]]


JOBS = [
    pytest.param((member, kind), id=f"{member}-{kind}", marks=pytest.mark.xdist_group(f"{member}-{kind}"))
    for kind in KINDS
    for member in MEMBERS
    if member.name in SOME.get(kind, (member.name,))
]


@pytest.fixture(scope="module", params=JOBS)
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Job:
    member, kind = request.param
    folder = tmp_path_factory.mktemp(f"{member.name}-{kind}")
    model = load(kind)
    base, bits = logits(model), digests(model, linears(model))
    given: dict[str, Any] = {"reference_truncation": True} if member.name == "kasa" else {}
    given |= {"statistics": None} if member.config_class.needs else {}
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    model = get_peft_model(model, member.config(r=8, dropout=0.1, task_type="CAUSAL_LM", **given))
    if member.config_class.needs:
        calibrate(model, TEXTS, tokenizer=tokenizer, batch_size=8)
    start, training = logits(model), logits(model, True)
    with model.disable_adapter():
        start_training = torch.equal(training, logits(model, True))
    arguments = SFTConfig(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        bf16=False,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    rows = Dataset.from_dict({"text": TEXTS})
    trainer = SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    model = trainer.model
    model.save_pretrained(str(folder / "adapter"))
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return Job(member, kind, base, start, start_training, bits, model, logits(model), str(folder / "adapter"), log)


def test_starts_at_the_base_and_learns(job: Job) -> None:
    assert torch.equal(job.start, job.base) == job.member.identity == job.start_training
    assert not torch.equal(job.after, job.start)
    assert job.log[-1]["loss"] < job.log[0]["loss"]
    assert ("penalty" in job.log[0]) == job.member.regularized


def test_the_base_is_as_it_was(job: Job) -> None:
    assert digests(job.model, adapted(job.model)) == job.bits
    assert len(adapted(job.model)) == 210
    with job.model.disable_adapter():
        assert torch.equal(logits(job.model), job.base)


def test_masters_are_float32(job: Job) -> None:
    assert {p.dtype for p in job.model.parameters() if p.requires_grad} == {torch.float32}


def test_kasa_is_kasa_on_every_base(job: Job) -> None:
    """What the adapter does at step 0 is minus the bottom of the weight as stored, by float64 LAPACK."""
    layer = adapted(job.model)["model.layers.10.self_attn.q_proj"]
    slots = layer.slots("default")
    if job.member.name != "kasa":
        assert "cut_left" not in slots
        return
    u, s, v = torch.linalg.svd(layer.base.matrix().double(), full_matrices=False)
    bottom, cut = (u[:, -8:] * s[-8:]) @ v[-8:], slots["cut_left"].double() @ slots["cut_right"].double()
    assert (bottom - cut).norm() < 1e-5 * bottom.norm()
    whole = adapted(job.model)["model.layers.10.self_attn.v_proj"]
    assert "cut_left" not in whole.slots("default")  # reference_truncation leaves 192 x 576 whole


@pytest.mark.parametrize("kind", KINDS)
def test_decomposing_after_an_evaluation_gives_the_same(kind: str) -> None:
    fresh, ran = load(kind), load(kind)
    name = "model.layers.7.mlp.up_proj"
    base = BaseWeight(ran.get_submodule(name))
    logits(ran)
    early, late = BaseWeight(fresh.get_submodule(name)).matrix(), base.matrix()
    assert torch.equal(early, late)
    assert all(torch.equal(a, b) for a, b in zip(Engine()(early, 8), Engine()(late, 8), strict=True))


FRESH = """
import sys, torch, test_real
from peft import PeftModel
def refuse(*args, **kwargs): raise AssertionError("a decomposition ran")
base = test_real.load(sys.argv[2])
if sys.argv[3] == "whole":  # a compact checkpoint's frames are computed
    torch.linalg.svd = torch.linalg.eigh = torch.linalg.qr = refuse
model = PeftModel.from_pretrained(base, sys.argv[1], low_cpu_mem_usage=True)
torch.save(test_real.logits(model), sys.argv[1] + "/logits.pt")
"""


def test_reload_is_exact_in_a_fresh_process(job: Job) -> None:
    paths = [os.path.dirname(os.path.abspath(module.__file__)) for module in (sys.modules[__name__], effect)]
    paths.append(os.path.dirname(os.path.abspath(sys.modules["base_model"].__file__ or "")))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    form = "whole" if job.model.peft_config["default"].keeps_frames else "compact"
    subprocess.run([sys.executable, "-c", FRESH, job.folder, job.kind, form], check=True, env=environment)
    assert torch.equal(torch.load(job.folder + "/logits.pt"), job.after)


def test_a_reloaded_adapter_lends_an_exact_reference(job: Job) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        model = PeftModel.from_pretrained(load(job.kind), job.folder, is_trainable=True)
    assert torch.equal(logits(model), job.after)
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    model.set_adapter("ref")
    assert torch.equal(logits(model), job.after)


def test_the_exported_lora_is_exact(job: Job, tmp_path: Path) -> None:
    report = export_lora(job.model, tmp_path)
    assert report.rank == 8 * job.member.export_rank
    again = logits(PeftModel.from_pretrained(load(job.kind), str(tmp_path))).float()
    bound = {"fp32": 1e-5, "bf16": 5e-2, "nf4": 5e-2}[job.kind]  # bf16 products round at other places
    expected = job.after.float()
    assert (again - expected).norm() <= bound * expected.norm()


def test_the_regulariser_acts_at_its_right_size(job: Job) -> None:
    if not job.member.regularized:
        assert not job.model.peft_config["default"].regularizes
        return
    config = job.model.peft_config["default"]
    kept = {name: getattr(config, name) for name in ("gamma", "reduction", "dropout")}
    config.gamma, config.reduction, config.dropout = 1.0, "sum", 0.0
    ids = torch.arange(2000, 2016)[None]
    ratio, _ = effect.effect(job.model, effect.loop([ids, ids + 30]))
    for name, value in kept.items():
        setattr(config, name, value)
    assert ratio == pytest.approx(1, abs=0.01)


def test_merging_is_undone_exactly(job: Job) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        job.model.merge_adapter()
    merged = logits(job.model).float()
    job.model.unmerge_adapter()
    assert digests(job.model, adapted(job.model)) == job.bits
    assert torch.equal(logits(job.model), job.after)
    bound = {"fp32": 1e-4, "bf16": 0.1, "nf4": 1.0}[job.kind]
    assert (merged - job.after.float()).norm() <= bound * job.after.float().norm()


def test_unloading_gives_the_base_back(job: Job) -> None:
    model = job.model.unload()
    assert not adapted(model)
    assert torch.equal(logits(model), job.base)
