"""Federated fine-tuning (Fed-SB, arXiv:2502.15436): clients train cores in common frames; the server averages exactly.

LoRA-SB trains r x r numbers a module, between frames that all clients have. So a client sends r * r numbers a module
where LoRA sends r (m + n), and the mean of the cores is the mean of the updates, without any error. Here each client
has orders from cities of its own (orders.py), and not equally many. The script

1. makes the common start from a few public orders (`calibrate`: the frames are of a gradient) and saves it,
2. in each round, lets each client go on from the common adapter with its own orders, and save what it got,
3. averages the cores by the sizes of the clients' data (`average_cores`), and measures the mean on held-out orders.

    python examples/federated.py
    python examples/federated.py --clients 5 --rounds 6 --steps 8
    python examples/federated.py --model Qwen/Qwen2.5-7B-Instruct --rounds 9 --steps 50  # a GPU is used if there is one

On two CPU cores shared with other work it took 916 s, 167 s of it CPU time.
"""

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # else torch slows down tenfold where another program needs a core too

import torch
from base_model import smollm2
from chat import Chat, load_model, load_tokenizer, mean_loss, train
from orders import fields, messages, train_and_held_out
from peft import PeftModel, get_peft_model
from transformers import set_seed

from peft_kasa import LoRASBConfig, SpectralLinear, average_cores, calibrate, hotswap_adapter

BATCH = 4
PUBLIC = 16  # orders that the frames come from
HELD_OUT = 32


def main() -> None:
    args = parse_args()
    started = time.time()
    set_seed(0)
    model_path, mean = args.model or smollm2(), args.output / "mean"
    tokenizer = load_tokenizer(model_path)
    public, shares, held_out = data(args)
    base = load_model(model_path, torch.float32)
    print(f"base model: loss {mean_loss(base, tokenizer, held_out):.3f} on {HELD_OUT} held-out orders")

    model = get_peft_model(base, LoRASBConfig(r=args.r, target_modules="all-linear", task_type="CAUSAL_LM"))
    calibrate(model, public, tokenizer=tokenizer, samples=PUBLIC, batch_size=BATCH)
    model.save_pretrained(mean)
    sent, of_lora = bytes_sent(model)
    print(f"a client sends {sent:,} bytes a round; LoRA of rank {args.r} would send {of_lora:,}, {of_lora / sent:.0f}x")

    for round_ in range(1, args.rounds + 1):
        folders = []
        for client, rows in enumerate(shares):
            # In a real federation each client holds a model of its own; here one model takes each one's place in turn.
            hotswap_adapter(model, mean)
            now = rows[(round_ - 1) * args.steps * BATCH :] + rows
            losses = train(model, tokenizer, now[: args.steps * BATCH], args.lr, BATCH)
            folders.append(args.output / f"client{client}")
            model.save_pretrained(folders[-1])
            print(f"  round {round_}, client {client} ({len(rows)} orders): loss {losses[0]:.3f} -> {losses[-1]:.3f}")
        average_cores(folders, mean, weights=[len(rows) for rows in shares])
        hotswap_adapter(model, mean)
        loss, traffic = mean_loss(model, tokenizer, held_out), 2 * sent * len(shares)  # there and back
        print(f"round {round_}: the mean's loss {loss:.3f} on held-out orders; {traffic:,} bytes there and back")
    print(f"the federation's adapter is in {mean}; {time.time() - started:.0f} s in all")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hub id or a local folder; SmolLM2-135M-Instruct if left out")
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="of a client in a round, with 4 orders each")
    parser.add_argument("--r", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--output", type=Path, default=Path("outputs/federated"))
    return parser.parse_args()


def data(args: argparse.Namespace) -> tuple[list[Chat], list[list[Chat]], list[Chat]]:
    """Public orders, each client's own, and held-out ones. No city is in two clients' orders."""
    found, held_out = train_and_held_out(PUBLIC + args.clients * args.rounds * args.steps * BATCH, HELD_OUT, seed=0)
    private = found[PUBLIC:]
    cities = sorted({fields(order["record"])["city"] for order in private})
    client_of = {city: index % args.clients for index, city in enumerate(cities)}
    shares: list[list[Chat]] = [[] for _ in range(args.clients)]
    for order in private:
        shares[client_of[fields(order["record"])["city"]]].append(messages(order))
    return [messages(order) for order in found[:PUBLIC]], shares, [messages(order) for order in held_out]


def bytes_sent(model: PeftModel) -> tuple[int, int]:
    """What a client sends in a round, in float32: its cores; and what LoRA's two factors of this rank would be."""
    layers = [module for module in model.modules() if isinstance(module, SpectralLinear)]
    cores = [layer.slots("default")["core"] for layer in layers]
    lora = sum(
        core.shape[0] * (layer.in_features + layer.out_features) for core, layer in zip(cores, layers, strict=True)
    )
    return 4 * sum(core.numel() for core in cores), 4 * lora


if __name__ == "__main__":
    main()
