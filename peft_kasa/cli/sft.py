"""`peft-kasa sft`: TRL's supervised fine-tuning, with any method of the family for its adapter."""

from __future__ import annotations

import os
import time
from argparse import Namespace
from typing import Any

from transformers import set_seed
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser

from peft_kasa_cli.exits import UsageError
from peft_kasa_cli.output import Output

from .folders import check_training
from .models import load_config
from .sft_arguments import AdapterArguments, check_no_lora, parsed
from .sft_parts import begun, rows
from .sft_trainer import WholeSFTTrainer

PARTS = (ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig, AdapterArguments)
USAGE = "peft-kasa sft --model_name_or_path MODEL --dataset_name DATA --output_dir OUT [--method kasa] [--r 8] [...]"


def run(args: Namespace, out: Output) -> None:
    """Trains, saves the adapter in output_dir, and says where it is and how the loss went."""
    parser: Any = TrlParser(PARTS, prog="peft-kasa sft", usage=USAGE)  # type: ignore[arg-type]
    if {"-h", "--help"} & set(args.rest):
        parser.print_help(out.stream)
        return
    _require_output(parser)
    script, training, base, mixture, ours, unknown = parsed(parser, args.rest)
    if unknown:
        raise UsageError(f"sft has no such options: {' '.join(unknown)}. See peft-kasa sft --help")
    check_no_lora(base)
    config = ours.config(base.use_rslora)
    if base.model_name_or_path is None or not (script.dataset_name or mixture.datasets):
        raise UsageError("sft needs --model_name_or_path and --dataset_name")
    base.model_name_or_path = os.path.expanduser(base.model_name_or_path)
    _check_known(base, training)
    goes_on = ours.overwrite or bool(training.resume_from_checkpoint)
    check_training(training.output_dir, base.model_name_or_path, goes_on)
    train, held_out = rows(script, mixture, training.eval_strategy != "no")
    set_seed(training.seed)
    started = time.monotonic()
    model, tokenizer, quantized = begun(training, base, ours, config, train)
    trainer = WholeSFTTrainer(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=config,
        quantization_config=quantized,
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model(training.output_dir)
    if training.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
    if trainer.is_world_process_zero():
        _report(trainer, ours.method, time.monotonic() - started, out)


def _require_output(parser: Any) -> None:
    """On the command line or in the YAML file: TRL's own default would be a folder that nobody named."""
    for action in parser._actions:
        if action.dest == "output_dir":
            action.required = True


def _check_known(base: ModelConfig, training: SFTConfig) -> None:
    """Raises ValueError, before any work, where there is no such model, or transformers does not know it."""
    more = {"revision": base.model_revision} if base.model_revision else {}
    load_config(base.model_name_or_path or "", trust_remote_code=training.trust_remote_code, **more)


def _report(trainer: Any, method: str, seconds: float, out: Output) -> None:
    logs = trainer.state.log_history
    losses = [entry["loss"] for entry in logs if "loss" in entry]
    mean = next((entry["train_loss"] for entry in reversed(logs) if "train_loss" in entry), None)
    learns = sum(value.numel() for value in trainer.model.parameters() if value.requires_grad)
    data = {
        "path": trainer.args.output_dir,
        "method": method,
        "learns": learns,
        "steps": trainer.state.global_step,
        "mean_loss": mean,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "seconds": round(seconds, 3),
    }
    told = "" if mean is None else f", mean loss {mean:.4f}"
    line = f"{data['path']}: {method} after {data['steps']} steps in {seconds:.0f} s, {learns:,} numbers learnt{told}"
    out.result(data, line)
