"""The family in ms-swift: `--external_plugins ms_swift_plugin.py --tuner_type kasa`, or another method's name.

Rank, dropout, targets and modules_to_save are ms-swift's own arguments. Its lora_alpha is not read: it is 32 unless
given, which would replace the method's own scale unasked. Any field of the method's config, alpha too, can be set in
the environment as JSON:

    PEFT_KASA_OPTIONS='{"reference_truncation": true}' swift sft --tuner_type kasa --lora_rank 8 ...
"""

from __future__ import annotations

import json
import os
from typing import Any

from peft import get_peft_model
from swift.pipelines.train.tuner import get_target_modules
from swift.tuner_plugin import PeftTuner, tuners_map

from peft_kasa import SpectralConfig
from peft_kasa.methods import methods


class SpectralTuner(PeftTuner):
    """A new adapter of the method that --tuner_type names; saving and loading are PEFT's."""

    @staticmethod
    def prepare_model(args: Any, model: Any) -> Any:
        return get_peft_model(model, spectral_config(args, model))


def spectral_config(args: Any, model: Any) -> SpectralConfig:
    """ms-swift's arguments, then PEFT_KASA_OPTIONS, as the method's config."""
    given = {
        "r": args.lora_rank,
        "dropout": args.lora_dropout,
        "target_modules": get_target_modules(args, model),
        "modules_to_save": args.modules_to_save or None,
    }
    options = json.loads(os.environ.get("PEFT_KASA_OPTIONS", "{}"))
    return methods()[args.tuner_type](task_type="CAUSAL_LM", **(given | options))


tuners_map.update(dict.fromkeys(methods(), SpectralTuner))
