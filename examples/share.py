"""Share an adapter on the Hub and load it from there, with the package and without; by default on a Hub of one's own.

Without `--endpoint` the script starts a small server on loopback that speaks the Hub's language (hub_server.py): no
account is needed, and nothing leaves the machine. The pushing and the loading each run in a process of their own:

1. `push` makes an adapter, moves it away from its start, and pushes it: native files at the root, the same as a plain
   LoRA in `lora/`, and a model card with a metric;
2. `load` loads both onto fresh copies of the base, and checks them against the pushed adapter's logits;
3. the script shows the repository's files and the card.

    python examples/share.py
    python examples/share.py --endpoint https://huggingface.co --repo me/pissa-smollm2       # after `hf auth login`

A real model: `--model HuggingFaceTB/SmolLM2-1.7B-Instruct`; the GPU is used if there is one.
On two CPU cores shared with other work it took 250 s, 44 s of it CPU time.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # else torch slows down tenfold where another program needs a core too

import torch
from base_model import smollm2
from chat import Chat, load_model, load_tokenizer, logits, mean_loss, tokenize
from hub_server import serving
from huggingface_hub import EvalResult, HfApi, hf_hub_download
from orders import messages, orders
from peft import PeftModel, get_peft_model
from transformers import BatchEncoding

from peft_kasa import PiSSAConfig, push_to_hub


def main() -> None:
    args = parse_args()
    if args.do:
        return {"push": push, "load": load}[args.do](args)
    started = time.time()
    with tempfile.TemporaryDirectory() as folder, endpoint(args.endpoint, folder) as environment:
        for do in ("push", "load"):
            command = [sys.executable, __file__, do, "--repo", args.repo, "--model", args.model or smollm2()]
            finished = subprocess.run([*command, "--expected", str(Path(folder) / "logits.pt")], env=environment)
            if finished.returncode:
                sys.exit(f"`{do}` failed: see above")
    print(f"\n{time.time() - started:.0f} s in all")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", nargs="?", choices=["push", "load"], help="one half alone; both if left out")
    parser.add_argument("--endpoint", help="of a Hub; one on loopback if left out")
    parser.add_argument("--repo", default="me/pissa-smollm2")
    parser.add_argument("--model", help="a Hub id or a local folder; SmolLM2-135M-Instruct if left out")
    parser.add_argument("--expected", type=Path, default=Path("outputs/share-logits.pt"))
    return parser.parse_args()


@contextmanager
def endpoint(given: str | None, home: str) -> Iterator[dict[str, str]]:
    """The environment in which huggingface_hub, as it is imported, takes the endpoint for the Hub."""
    if given:
        yield os.environ | {"HF_ENDPOINT": given}
        return
    with serving() as hub:
        yield os.environ | hub.environment | {"HF_HOME": home}


def push(args: argparse.Namespace) -> None:
    """Pushes an adapter. `push_to_hub` is the whole of it; the rest makes something to push."""
    model = get_peft_model(
        load_model(args.model, torch.float32), PiSSAConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:  # as training would
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 1e-3 * noise.to(parameter.device)
    loss = mean_loss(model, load_tokenizer(args.model), held_out())
    result = EvalResult("text-generation", "orders", "Orders", metric_type="loss", metric_value=round(loss, 3))
    url = push_to_hub(model, args.repo, metrics=[result])
    print(f"pushed: {url}")
    args.expected.parent.mkdir(parents=True, exist_ok=True)
    torch.save(logits(model, probe(args.model)), args.expected)


def load(args: argparse.Namespace) -> None:
    """Loads it as users with the package do, and as users with PEFT alone do."""
    expected, batch = torch.load(args.expected), probe(args.model)
    own = PeftModel.from_pretrained(load_model(args.model, torch.float32), args.repo)
    if not torch.equal(logits(own, batch), expected):
        sys.exit(f"{args.repo}: loaded, the adapter gives other logits than before")
    print(f"loaded with peft_kasa ({own.peft_config['default'].peft_type.value}): logits equal bit for bit")
    plain = PeftModel.from_pretrained(load_model(args.model, torch.float32), args.repo, subfolder="lora")
    difference = (logits(plain, batch) - expected).norm() / expected.norm()
    print(f"loaded by PEFT alone ({plain.peft_config['default'].peft_type.value}): logits differ by {difference:.1e}")
    print(f"\n{args.repo}: {', '.join(HfApi().list_repo_files(args.repo))}\n")
    print(Path(hf_hub_download(args.repo, "README.md")).read_text())


def held_out() -> list[Chat]:
    return [messages(order) for order in orders(8, 0, "held-out")]


def probe(model: str) -> BatchEncoding:
    return tokenize(load_tokenizer(model), held_out(), with_answers=True)


if __name__ == "__main__":
    main()
