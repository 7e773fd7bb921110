"""Several adapters of different methods on one loaded base: switch, mix in a batch, add up, delete, merge, unload.

None of them writes to the base, so none is in another's way. Three learn three tasks on the same messages (orders.py):
KaSA to write the order's record, PiSSA to name the city, LoRA-XS to answer with the customer's name. The script

1. trains them, one after the other, on one base, and measures each on each task,
2. answers a batch whose rows are each another adapter's (`adapter_names`), and checks it against one at a time,
3. adds two of them up with weights into a new adapter, exactly (`add_weighted_adapter`), and deletes the sources,
4. merges that one into the base's weights, unloads all adapters, and checks that the base has the bits it had.

    python examples/several_adapters.py
    python examples/several_adapters.py --model Qwen/Qwen2.5-7B-Instruct --steps 200   # a GPU is used if there is one

On two CPU cores shared with other work it took 834 s, 165 s of it CPU time.
"""

import argparse
import os
import time

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # else torch slows down tenfold where another program needs a core too

import torch
from base_model import smollm2
from chat import Chat, answers, expect, load_model, load_tokenizer, logits, mean_loss, tokenize, train
from orders import Order, fields, train_and_held_out
from peft import PeftModel, get_peft_model
from transformers import PreTrainedTokenizerBase, set_seed

from peft_kasa import KaSAConfig, LoRAXSConfig, PiSSAConfig

ALL = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
ADAPTERS = {  # by task: a config and a learning rate
    "record": (KaSAConfig(r=8, reference_truncation=True, **ALL), 2e-3),
    "city": (PiSSAConfig(r=8, **ALL), 5e-4),
    "name": (LoRAXSConfig(r=32, **ALL), 4e-3),
}
BATCH = 4
HELD_OUT = 8


def main() -> None:
    args = parse_args()
    started = time.time()
    set_seed(0)
    tokenizer = load_tokenizer(args.model or smollm2())
    orders, held_out = train_and_held_out(args.steps * BATCH, HELD_OUT, seed=0)
    base = load_model(args.model or smollm2(), torch.float32)
    probe = tokenize(tokenizer, [chat(order, "record") for order in held_out], with_answers=False)
    of_the_base = logits(base, probe)

    model = adapted(base, tokenizer, orders)
    print("Loss of each adapter on each task")
    for name in ADAPTERS:
        model.set_adapter(name)
        losses = {task: mean_loss(model, tokenizer, [chat(order, task) for order in held_out]) for task in ADAPTERS}
        print(f"  {name:<8}" + "".join(f"{task} {loss:6.3f}    " for task, loss in losses.items()))

    mixed(model, tokenizer, held_out[0])
    added(model, probe)
    merged(model, probe)
    base = model.unload()
    expect(torch.equal(logits(base, probe), of_the_base), "the base has changed")
    print(f"\nunloaded: the base has the bits it had; {time.time() - started:.0f} s in all")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hub id or a local folder; SmolLM2-135M-Instruct if left out")
    parser.add_argument("--steps", type=int, default=12, help="of each adapter, with 4 orders each")
    return parser.parse_args()


def chat(order: Order, task: str) -> Chat:
    """The order's text, without an instruction, and what the adapter of a task has to answer."""
    reply = order["record"] if task == "record" else fields(order["record"])[task]
    return {
        "prompt": [{"role": "user", "content": order["text"]}],
        "completion": [{"role": "assistant", "content": reply}],
    }


def adapted(base: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, orders: list[Order]) -> PeftModel:
    """The base with all adapters, each trained on its task: only the active one learns."""
    model = None
    for name, (config, rate) in ADAPTERS.items():
        if model is None:
            model = get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        model.set_adapter(name)
        losses = train(model, tokenizer, [chat(order, name) for order in orders], rate, BATCH)
        print(f"trained {name:<8} {config.method:<8} loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return model


def mixed(model: PeftModel, tokenizer: PreTrainedTokenizerBase, order: Order) -> None:
    """One order, answered by the base and by each adapter in one batch; and the logits against one at a time."""
    names = ["__base__", *ADAPTERS]
    rows = [chat(order, "record")] * len(names)
    print(f"\nA batch in which each row has another adapter\n  {order['text']}")
    for name, answer in zip(names, answers(model, tokenizer, rows, adapter_names=names), strict=True):
        print(f"  {name:<10}{' '.join(answer.split())}")
    batch = tokenize(tokenizer, rows, with_answers=False).to(model.device)
    with torch.inference_mode():
        together = model(**batch, adapter_names=names).logits.float().cpu()
    for name, row in zip(names[1:], together[1:], strict=True):
        model.set_adapter(name)
        expect(torch.allclose(logits(model, batch)[0], row, atol=1e-3), f"{name} answers otherwise in a batch")


def added(model: PeftModel, probe: dict[str, torch.Tensor]) -> None:
    """A new adapter whose update is 0.7 times one's and 0.3 times another's; it needs them no more."""
    errors = model.add_weighted_adapter(["record", "city"], [0.7, 0.3], "both", combination_type="cat")
    model.set_adapter("both")
    before = logits(model, probe)
    for name in ADAPTERS:
        model.delete_adapter(name)
    expect(torch.equal(logits(model, probe), before), "the sum still needs its sources")
    print(f"\nadded up into one adapter: largest relative error of an update {max(errors.values()):.0e}")
    print(f"adapters left: {list(model.peft_config)}")


def merged(model: PeftModel, probe: dict[str, torch.Tensor]) -> None:
    """Merged, the model runs at the base's speed; unmerging puts the base's bits back."""
    before = logits(model, probe)
    model.merge_adapter()
    difference = (logits(model, probe) - before).norm() / before.norm()
    model.unmerge_adapter()
    print(f"merged into the base's weights: logits differ by {difference:.0e}, relative")


if __name__ == "__main__":
    main()
