"""Runs axolotl_plugin.py through axolotl's own plugin manager, schema and adapter loader on a tiny model.

python examples/integrations/check_axolotl.py        # where axolotl is installed
"""

import sys
import tempfile
from pathlib import Path

import torch
from axolotl.integrations.base import PluginManager
from axolotl.loaders.adapter import load_adapter
from axolotl.utils.config import merge_input_args
from axolotl.utils.dict import DictDefault
from transformers import LlamaConfig, LlamaForCausalLM

PLUGIN = "axolotl_plugin.SpectralPlugin"
IDS = torch.arange(8)[None]
GIVEN = {"adapter": "kasa", "lora_r": 2, "lora_target_linear": True, "spectral": {"truncation": 1}}


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    manager = PluginManager.get_instance()
    manager.register(PLUGIN)
    assert PLUGIN in manager.plugins
    assert manager.supports_adapter("kasa")
    schema, _ = merge_input_args()
    assert "spectral" in schema.model_fields, "the YAML's `spectral` is not in the schema"

    model, config = load_adapter(tiny(), DictDefault(GIVEN), "kasa")
    assert (config.method, config.r, config.truncation) == ("kasa", 2, 1)
    nothing, same = load_adapter(tiny(), DictDefault(GIVEN), "kasa", config_only=True)
    assert nothing is None
    assert (same.method, same.r, same.truncation) == ("kasa", 2, 1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again, _ = load_adapter(tiny(), DictDefault(GIVEN | {"lora_model_dir": folder}), "kasa", inference=True)
    assert torch.equal(again.eval()(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)
    print("axolotl: adapter: kasa is in the schema, is put on a model, learns, is saved and loaded")


def tiny() -> LlamaForCausalLM:
    """The same tiny model at each call."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes))


if __name__ == "__main__":
    main()
