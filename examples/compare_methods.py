"""All members of the family on one loaded SmolLM2-135M, one after another, and PEFT's LoRA, DoRA and PiSSA beside them.

Each learns to turn an order into a record (orders.py) in a short loop of AdamW, from several seeds. Measured: what
learns, the checkpoint, the start, a step, the memory, and what was learnt: the loss and the share of held-out orders
that are right to the last token (teacher-forced, so the answers need no generation), and the loss on other text.

    python examples/compare_methods.py                                 # about an hour on two quiet CPU cores
    python examples/compare_methods.py --methods kasa lora --seeds 0   # some of it; what is measured already stays
    python examples/compare_methods.py --report                        # the table and the plot again, no run

Every figure goes into the JSON file as soon as it is known, and another call goes on from there.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # else torch slows down tenfold where another program needs a core too
os.environ["PEFT_KASA_CACHE"] = "0"  # or the second start of a method would not be a start
sys.path.append(str(Path(__file__).resolve().parent / "benchmarks"))

import torch
from base_model import cache_home, smollm2
from compare_report import report
from contenders import METHODS, Method, beyond
from measured import commit, machine, versions
from orders import Order, orders
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from peft_kasa import NLoRAConfig, calibrate, penalty
from peft_kasa.adapter.files.checkpoint import left_out
from peft_kasa.adapter.starting import layers_of

Row = dict[str, list[int]]
DTYPE = torch.bfloat16
HELD_OUT, VALIDATION, CALIBRATION, GENERAL = 32, 8, 64, 8  # rows
RATE_SEED, CALIBRATION_SEED, HELD_OUT_SEED = 1000, 2000, 0
LONGEST = 64  # tokens of general text
WIDER = 3  # learning rates beyond the first three, where one at the edge is the best
IDLE = "idle"  # an adapter that keeps the base wrapped
FOLDER = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"


def main() -> None:
    args = parse_args()
    warnings.simplefilter("ignore")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    book = Book(args)
    if not args.report:
        bench = Bench(book, args)
        # The first seed of all comes first. Then the others: a start that no seed changes serves them all.
        for seeds in [[]] if args.rates_only else [args.seeds[:1], args.seeds[1:]]:
            for method in METHODS:
                if method.name in args.methods:
                    bench.attempt(method, seeds)
                    report(book.data, args.output)
        bench.check_base()
    report(book.data, args.output, plot=True)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [method.name for method in METHODS]
    parser.add_argument("--methods", nargs="+", choices=names, default=names, metavar="METHOD", help=", ".join(names))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="0 1 2 if left out")
    parser.add_argument("--steps", type=int, default=20, help="20 if left out")
    parser.add_argument("--batch-size", type=int, default=4, help="4 if left out")
    parser.add_argument("--rate-steps", type=int, default=5, help="steps with each candidate learning rate")
    parser.add_argument("--rates-only", action="store_true", help="only choose the learning rates")
    parser.add_argument("--report", action="store_true", help="only write the table and the plot again")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder for compare_methods.{json,md,svg}")
    return parser.parse_args()


class Book:
    """What was measured, on disk after each figure."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.file = args.output / "compare_methods.json"
        settings = {
            "steps": args.steps,
            "batch_size": args.batch_size,
            "rate_steps": args.rate_steps,
            "rate_seed": RATE_SEED,
            "wider": WIDER,
            "held_out": HELD_OUT,
            "calibration": CALIBRATION,
            "base": "SmolLM2-135M-Instruct",
            "dtype": str(DTYPE).removeprefix("torch."),
        }
        empty: dict[str, Any] = {"machine": machine(), "versions": versions(), "commit": commit(), "settings": settings}
        empty |= {"base": {}, "calibration": {}, "rates": {}, "starts": {}, "runs": [], "failed": {}}
        self.data = json.loads(self.file.read_text()) if self.file.is_file() else empty
        if self.data["settings"] != settings and not args.report:
            sys.exit(f"{self.file} was made with {self.data['settings']}: give another --output, or remove it.")

    def save(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.file.with_suffix(".part")
        scratch.write_text(json.dumps(rounded(self.data), indent=1) + "\n")
        scratch.replace(self.file)

    def has(self, method: Method, seed: int) -> bool:
        return any(run["method"] == method.name and run["seed"] == seed for run in self.data["runs"])


class Bench:
    """One loaded base for all members of the family, and another for each adapter of PEFT's own."""

    def __init__(self, book: Book, args: argparse.Namespace) -> None:
        self.book, self.args, self.started = book, args, time.time()
        self.tokenizer = AutoTokenizer.from_pretrained(smollm2())
        self.held_out = self.rows(orders(HELD_OUT, HELD_OUT_SEED, "held-out"))
        self.validation = self.rows(orders(VALIDATION, RATE_SEED + 1))
        texts = general_texts()
        self.general = [self.text(text) for text in texts[:GENERAL]]
        self.calibration = {
            "task": self.rows(orders(CALIBRATION, CALIBRATION_SEED)),
            "general": [self.text(text) for text in texts[GENERAL : GENERAL + CALIBRATION]],
        }
        self.base = load()
        self.digest = digest(self.base)
        self.files = cache_home() / "compare_methods"
        if not book.data["base"]:
            book.data["base"] = self.judged(self.base)
            book.save()
        self.calibrate_all()
        self.family = get_peft_model(self.base, NLoRAConfig(r=1, variant="slora", target_modules="all-linear"), IDLE)
        self.family.requires_grad_(False)

    def say(self, text: str) -> None:
        print(f"[{time.time() - self.started:6.0f} s] {text}", flush=True)

    def rows(self, found: Sequence[Order]) -> list[Row]:
        """Tokens of an order and its record; the record's are the labels."""
        rows = []
        for order in found:
            asked = self.tokenizer(order["text"] + "\n")["input_ids"]
            answer = [*self.tokenizer(order["record"])["input_ids"], self.tokenizer.eos_token_id]
            rows.append({"input_ids": asked + answer, "labels": [-100] * len(asked) + answer})
        return rows

    def text(self, text: str) -> Row:
        ids = self.tokenizer(text)["input_ids"][:LONGEST]
        return {"input_ids": ids, "labels": list(ids)}

    def calibrate_all(self) -> None:
        """The statistics that the methods need, once each, in files."""
        for method in METHODS:
            what = method.statistics
            known = what in self.book.data["calibration"] and self.path(what).is_file()
            if what and method.name in self.args.methods and not known:
                self.path(what).parent.mkdir(parents=True, exist_ok=True)
                self.path(what).unlink(missing_ok=True)
                rows = self.calibration[what.split(": ")[0]]
                seconds, _ = timed(
                    lambda rows=rows, method=method, what=what: calibrate(
                        self.base,
                        rows,
                        method.config(),
                        samples=len(rows),
                        batch_size=4,
                        path=self.path(what),
                        progress=False,
                    )
                )
                size = self.path(what).stat().st_size
                self.book.data["calibration"][what] = {**seconds, "bytes": size, "sequences": len(rows)}
                self.book.save()
                self.say(f"calibrated {what}: {seconds['wall']:.1f} s, {size / 1e6:.0f} MB")

    def path(self, what: str) -> Path:
        return self.files / f"{what.replace(': ', '-').replace(' ', '-')}.safetensors"

    def attempt(self, method: Method, seeds: Sequence[int]) -> None:
        """The choice of the learning rate, if it is not made yet, and the runs that are missing; or what went wrong."""
        work: list[tuple[int, Callable[[Method, int, Any], None]]] = []
        if method.name not in self.book.data["rates"]:
            work.append((RATE_SEED, self.choose_rate))
        work += [(seed, self.run) for seed in seeds if not self.book.has(method, seed)]
        try:
            for part in [[item] for item in work] if method.random else [work] if work else []:
                self.with_adapter(method, part)
            self.book.data["failed"].pop(method.name, None)
        except Exception as error:
            traceback.print_exc()
            self.book.data["failed"][method.name] = f"{type(error).__name__}: {error}"
        self.book.save()

    def with_adapter(self, method: Method, work: list[tuple[int, Callable[[Method, int, Any], None]]]) -> None:
        """Starts an adapter, does each work from this start, takes the adapter away."""
        gc.collect()
        torch.manual_seed(work[0][0])
        given: dict[str, Any] = {"seed": work[0][0]} if method.ours else {}
        if method.statistics:
            given["statistics"] = str(self.path(method.statistics))
        config, base = method.config(**given), self.family if method.ours else load()
        try:
            if method.ours:
                seconds, _ = timed(lambda: base.add_adapter(method.name, config))
                base.set_adapter(method.name)
                model = base
            else:
                seconds, model = timed(lambda: get_peft_model(base, config, adapter_name=method.name))
            self.book.data["starts"].setdefault(method.name, []).append(seconds)
            learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
            start = [parameter.detach().clone() for parameter in learning]
            for seed, do in work:
                restore(learning, start)
                do(method, seed, model)
        finally:
            if method.ours and method.name in self.family.peft_config:
                self.family.set_adapter(IDLE)
                self.family.delete_adapter(method.name)
            self.family.requires_grad_(False)

    def choose_rate(self, method: Method, seed: int, model: Any) -> None:
        """Some steps with each rate from the same start; the least loss on orders of their own.

        Where the least or the greatest rate wins, the next one beyond it is tried too, up to WIDER times.
        """
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        start = [parameter.detach().clone() for parameter in learning]
        found: dict[float, float] = {}
        open_rates = list(method.rates)
        while open_rates:
            restore(learning, start)
            rate = open_rates.pop(0)
            self.train(model, self.batches(seed, self.args.rate_steps), rate)
            loss = self.answers(model, self.validation)["loss"]
            found[rate] = loss if math.isfinite(loss) else 1e9
            if not open_rates and len(found) < len(method.rates) + WIDER:
                open_rates = beyond(found)
        chosen = min(found, key=found.__getitem__)
        losses = {f"{rate:g}": loss for rate, loss in found.items()}
        self.book.data["rates"][method.name] = {"losses": losses, "chosen": chosen}
        self.book.save()
        self.say(f"{method.title}: rate {chosen:g} of " + ", ".join(f"{r:g}: {x:.3f}" for r, x in found.items()))

    def run(self, method: Method, seed: int, model: Any) -> None:
        """One row of figures."""
        begun = time.time()
        rate = self.book.data["rates"][method.name]["chosen"]
        batches = self.batches(seed, self.args.steps)
        row: dict[str, Any] = {"method": method.name, "seed": seed, "rate": rate}
        if not any("trainable" in run for run in self.book.data["runs"] if run["method"] == method.name):
            row |= self.sizes(model, method)
            row["loss_at_start"] = self.answers(model, self.held_out)["loss"]
            row["saved_for_backward"] = saved_for_backward(model, max(batches, key=lambda b: b["input_ids"].numel()))
        row["step"] = self.train(model, batches, rate)
        row |= self.judged(model)
        if method.ours and model.peft_config[method.name].regularizes:
            row["penalty"] = penalty(model, method.name).item()
            row["penalty_gradient"] = penalty_gradient(model)
            if not row["penalty_gradient"] > 0:
                raise RuntimeError(f"the regulariser of {method.name} does not act")
        self.book.data["runs"].append(row)
        self.book.save()
        started = self.book.data["starts"][method.name][-1]["wall"]
        self.say(
            f"{method.title}, seed {seed}: loss {row['loss']:.3f}, {row['exact']:.0%} right, other text "
            f"{row['general_loss']:.3f}; start {started:.1f} s, step {row['step']['wall']:.2f} s "
            f"(CPU {row['step']['cpu']:.2f}); {time.time() - begun:.0f} s in all"
        )

    def batches(self, seed: int, steps: int) -> list[dict[str, Tensor]]:
        """Orders of about one length in each, in random order."""
        size = self.args.batch_size
        rows = sorted(self.rows(orders(steps * size, seed)), key=lambda row: len(row["input_ids"]))
        chunks = [padded(rows[i : i + size]) for i in range(0, len(rows), size)]
        random.Random(seed).shuffle(chunks)
        return chunks

    def train(self, model: Any, batches: list[dict[str, Tensor]], rate: float) -> dict[str, float]:
        """A plain loop of AdamW; the median seconds of a step. Regularisers act in `optimizer.step`."""
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(learning, lr=rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: cosine(done, len(batches)))
        model.train()
        clocks = []
        for batch in batches:
            clock, _ = timed(lambda batch=batch: step(model, batch, optimizer))
            schedule.step()
            clocks.append(clock)
        model.eval()
        return {key: statistics.median(clock[key] for clock in clocks) for key in clocks[0]}

    def judged(self, model: Any) -> dict[str, float]:
        found = self.answers(model, self.held_out)
        return found | {"general_loss": self.answers(model, self.general)["loss"]}

    @torch.inference_mode()
    def answers(self, model: Any, rows: Sequence[Row]) -> dict[str, float]:
        """Loss a token, and the share of rows and of tokens that are right where all before it was given."""
        model.eval()
        loss = right = tokens = exact = 0.0
        ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
        for i in range(0, len(ordered), 8):
            batch = padded(ordered[i : i + 8])
            predicted, targets, places = predictions(model, batch)
            loss += nn.functional.cross_entropy(predicted, targets, reduction="sum").item()
            hits = predicted.argmax(-1) == targets
            right += hits.sum().item()
            tokens += len(targets)
            exact += sum(bool(hits[places == row].all()) for row in range(len(batch["input_ids"])))
        return {"loss": loss / tokens, "exact": exact / len(rows), "tokens": right / tokens}

    def sizes(self, model: Any, method: Method) -> dict[str, Any]:
        """Numbers that learn, bytes in memory and on disk."""
        mine = [(name, p) for name, p in model.named_parameters() if f".{method.name}." in name]
        learning = sum(p.numel() for _, p in mine if p.requires_grad)
        held = sum(p.numel() * p.element_size() for _, p in mine)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder, selected_adapters=[method.name], save_embedding_layers=False)
            saved = sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))
        found: dict[str, Any] = {"trainable": learning, "adapter_bytes": held, "checkpoint": saved}
        # AdamW: the gradient and two moments of each number that learns, in float32
        found["optimizer_bytes"] = 12 * learning
        if method.ours:
            config = model.peft_config[method.name]
            found["saves_frames"] = config.keeps_frames
            found["checkpoint_other"] = None if method.statistics else self.other_size(method, not config.keeps_frames)
        return found

    def other_size(self, method: Method, frames: bool) -> int:
        """Bytes of tensors in a checkpoint with the other `save_frames`; nothing is computed for it."""
        name = f"{method.name}_other"
        self.family.add_adapter(name, method.config(save_frames=frames), low_cpu_mem_usage=True)
        total = 0
        for layer in layers_of(self.family, name):
            without = left_out(layer, name)
            total += sum(4 * value.numel() for slot, value in layer.slots(name).items() if slot not in without)
        self.family.delete_adapter(name)
        self.family.set_adapter(method.name)
        return total

    def check_base(self) -> None:
        """After all adapters came and went, the base is what it was."""
        same = digest(self.base) == self.digest
        self.book.data["base_untouched"] = same
        self.book.save()
        self.say(f"base weights are {'the same, bit for bit' if same else 'OTHERS THAN BEFORE'}")


def cosine(done: int, steps: int) -> float:
    """The share of the learning rate: half of it in the first step, then down to nearly 0."""
    return 0.5 if not done else (1 + math.cos(math.pi * done / steps)) / 2


@torch.no_grad()
def restore(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def step(model: Any, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    predicted, targets, _ = predictions(model, batch)
    nn.functional.cross_entropy(predicted, targets).backward()
    optimizer.step()
    optimizer.zero_grad()


def predictions(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits where there is a label, the labels, and the row of each.

    The head is applied there alone. Padding is at the end, where a causal model needs no mask.
    """
    whole = model.get_base_model() if hasattr(model, "peft_config") else model
    hidden = whole.model(input_ids=batch["input_ids"], use_cache=False).last_hidden_state[:, :-1]
    targets = batch["labels"][:, 1:]
    chosen = targets != -100
    return whole.lm_head(hidden[chosen]).float(), targets[chosen], chosen.nonzero()[:, 0]


def padded(rows: Sequence[Row]) -> dict[str, Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    pad = {"input_ids": 0, "labels": -100}
    return {
        key: torch.tensor([row[key] + [filler] * (longest - len(row[key])) for row in rows])
        for key, filler in pad.items()
    }


def saved_for_backward(model: Any, batch: dict[str, Tensor]) -> int:
    """Bytes that one forward pass keeps for the backward pass, weights not counted."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        predicted, targets, _ = predictions(model, batch)
        nn.functional.cross_entropy(predicted, targets)
    return sum(kept.values())


def penalty_gradient(model: Any) -> float:
    """The norm of what an optimiser's step finds in the gradients though the loss gave none: the regulariser's."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.SGD(learning, lr=0.0)
    optimizer.step()
    norm = math.sqrt(sum(parameter.grad.square().sum().item() for parameter in learning))
    optimizer.zero_grad()
    return norm


def timed(work: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Seconds on the wall and of this process on all its cores; and what the work returned."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}, result


def load() -> Any:
    return AutoModelForCausalLM.from_pretrained(smollm2(), dtype=DTYPE).eval()


def digest(model: nn.Module) -> str:
    """Of the base weights, whatever wraps them."""
    total = hashlib.sha256()
    for name, value in model.named_parameters():
        if ".peft_kasa_" not in name:
            total.update(value.detach().contiguous().view(torch.int16).numpy())
    return total.hexdigest()


def general_texts() -> list[str]:
    """English that has nothing to do with orders and is on every machine: what Python says of its modules."""

    def found() -> Iterator[str]:
        for name in sorted(sys.stdlib_module_names):
            if not name.startswith("_") and name not in ("antigravity", "this", "idlelib", "turtledemo"):
                try:
                    text = (importlib.import_module(name).__doc__ or "").strip()
                except ImportError:
                    continue
                if len(text) > 250:
                    yield text

    texts = list(found())
    random.Random(0).shuffle(texts)
    return texts


def rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()
