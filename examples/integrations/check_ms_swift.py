"""Runs ms_swift_plugin.py through ms-swift's own arguments and tuner code on a small model.

python examples/integrations/check_ms_swift.py MODEL        # where ms-swift is installed; MODEL: the folder of a Llama
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from swift.arguments import SftArguments
from swift.pipelines.train.tuner import TunerMixin
from swift.tuner_plugin import tuners_map

PLUGIN = Path(__file__).with_name("ms_swift_plugin.py")
IDS = torch.arange(8)[None]


def main() -> None:
    os.environ["PEFT_KASA_OPTIONS"] = json.dumps({"reference_truncation": True})
    with tempfile.TemporaryDirectory() as folder:
        args = SftArguments(
            model=sys.argv[1],
            model_type="llama",
            template="chatml",
            dataset=["none"],
            torch_dtype="float32",
            external_plugins=[str(PLUGIN)],
            tuner_type="kasa",
            lora_rank=2,
            lora_dropout=0.0,
            output_dir=folder,
            report_to=[],
        )
        model = TunerMixin.prepare_model(args, args.get_model_processor()[0])
        config = model.peft_config["default"]
        assert (config.method, config.r, config.reference_truncation) == ("kasa", 2, True)
        model(input_ids=IDS, labels=IDS).loss.backward()
        tuners_map["kasa"].save_pretrained(model, folder)
        again = tuners_map["kasa"].from_pretrained(args.get_model_processor()[0], folder)
        assert torch.equal(again.eval()(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)
    print("ms-swift: --tuner_type kasa is taken, is put on a model, learns, is saved and loaded")


if __name__ == "__main__":
    main()
