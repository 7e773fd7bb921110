"""The decompositions beside what users run today, in one process and in turn: times, errors and memory.

    python examples/benchmarks/decomposition.py                    # tens of minutes on two CPU cores
    python examples/benchmarks/decomposition.py --quick            # tiny sizes, seconds: shows that it runs
    python examples/benchmarks/decomposition.py --only "2048x2048 bottom"
    python examples/benchmarks/decomposition.py --cuda             # Llama-7B's shapes on a GPU, below nine minutes

1. Single weights: the top or bottom k triples, against torch.linalg.svd in float32, torch.svd_lowrank as PEFT's
   `pissa_niter_16` calls it, and scikit-learn's randomized_svd. Errors are against a float64 SVD.
2. Whole models: `get_peft_model` with KaSA and PiSSA on all linear layers, against PEFT's own; and how far what leaves
   the base is from the truth.
3. Weights with their inputs: CorDA's smallest triples against PEFT's, EVA's axes against PEFT's incremental PCA.
4. The memory that a cut of a 4-bit or 8-bit layer takes, in a process of its own.

Writes decomposition.json and decomposition.svg to --out. With --quick only if --out is given.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matrices
import on_cuda
import torch
from matrices import End, activations, ends, llm_like, outer
from measured import OURS, Row, alternately, draw, resident, save, show
from torch import Tensor, nn

from peft_kasa.spectral import Engine, LowRank, Spectrum
from peft_kasa.spectral.covariance import Covariance
from peft_kasa.spectral.sources import damped, oriented

OUT = Path(__file__).resolve().parents[2] / "docs" / "benchmarks"
SVD = "torch.linalg.svd"
ENGINE = Engine(precision="float64", cache=False, progress=False)
RANK = 8  # of the models and of CorDA
EXACT = 1e-10  # the tolerance where the gate is an angle; the defaults aim at values and norms
AXES = 16  # of EVA, which looks at twice as many
STORED = {"nf4": matrices.four_bit, "int8": matrices.eight_bit}  # of the layers whose cuts' memory is measured

Job = tuple[str, Callable[[], "Row | None"]]


class Weight(NamedTuple):
    m: int
    n: int
    end: End
    k: int
    gate: dict[str, float]
    target: float
    clock: str = "wall"


TOP, BOTTOM, ANGLE = {"dW": 1e-4, "sigma": 1e-6}, {"sigma": 1e-8, "dropped": 1e-9}, {"sine": 1e-8}
WEIGHTS = [
    Weight(4096, 4096, "top", 16, TOP, 45),
    Weight(4096, 4096, "top", 128, TOP, 15),
    Weight(4096, 4096, "bottom", 8, BOTTOM, 20),
    Weight(4096, 4096, "bottom", 64, BOTTOM, 12),
    Weight(4096, 11008, "top", 16, TOP, 60, "cpu"),
    Weight(4096, 11008, "bottom", 8, BOTTOM, 15, "cpu"),
    Weight(2048, 2048, "top", 16, TOP, 16),
    Weight(2048, 2048, "bottom", 8, BOTTOM, 12),
    Weight(1024, 4096, "bottom", 8, ANGLE, 8),
    Weight(1024, 4096, "top", 128, ANGLE, 6),
]
QUICK = [
    Weight(320, 320, "top", 8, TOP, 1),
    Weight(320, 320, "bottom", 4, BOTTOM, 1),
    Weight(128, 320, "bottom", 4, BOTTOM, 1, "cpu"),
    Weight(128, 320, "top", 16, ANGLE, 1),
]


def main() -> None:
    args = arguments()
    warnings.simplefilter("ignore")
    logging.basicConfig(level=logging.WARNING)
    torch.manual_seed(0)  # torch.svd_lowrank draws from it
    file = "decomposition-cuda" if args.cuda else "decomposition"
    out = args.out or (None if args.quick else OUT)
    rows: list[Row] = []
    for row in on_cuda.rows(args.quick, args.repeats) if args.cuda else on_cpu(args):
        show(row)
        rows.append(row)
        if out:  # after each, so that what is interrupted keeps what it has
            saved = save(rows, out / f"{file}.json", fresh=not args.only)
    if out and rows:
        draw(saved, out / f"{file}.svg")
        print(f"\nWrote {file}.json and {file}.svg")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: the figures mean nothing")
    parser.add_argument("--cuda", action="store_true", help="Llama-7B's shapes on a GPU instead")
    parser.add_argument("--only", default="", help="only cases whose title contains this (not --cuda)")
    parser.add_argument("--repeats", type=int, help="runs of each (default 5, quick 2); at most 2 of what takes 5 s")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="of the single weights")
    parser.add_argument("--out", type=Path, help="folder for the JSON and the plot (default docs/benchmarks)")
    args = parser.parse_args()
    args.repeats = args.repeats or (2 if args.quick else 5)
    return args


def on_cpu(args: argparse.Namespace) -> Iterator[Row]:
    warm_up()
    for title, measure in [*weights(args), *models(args), *sources(args), *memory(args)]:
        row = measure() if args.only in title else None
        if row is not None:
            yield row


def warm_up() -> None:
    w = llm_like(300, 300)
    for end in ("top", "bottom"):
        ENGINE(w, 4, end)
    torch.linalg.svd(w)


# 1. Single weights


def weights(args: argparse.Namespace) -> Iterator[Job]:
    for case in QUICK if args.quick else WEIGHTS:
        for seed in args.seeds:
            name = f"{case.m}x{case.n} {case.end} {case.k}" + (f", seed {seed}" if seed != 1 else "")
            yield f"weights: {name}", partial(weight, name, case, seed, args.repeats)


def weight(name: str, case: Weight, seed: int, repeats: int) -> Row:
    w, k, end = llm_like(case.m, case.n, seed), case.k, case.end
    true = outer(ends(w)[end], k, end)
    work: dict[str, Callable[[Any], Spectrum]] = {SVD: lambda _: matrices.by_svd(w, k, end)}
    if end == "top":
        work["torch.svd_lowrank, niter 16"] = lambda _: matrices.by_svd_lowrank(w, k)
        if (randomized := matrices.randomized_svd()) is not None:
            work["randomized_svd"] = lambda _: randomized(w, k)
    engine = replace(ENGINE, tolerance=EXACT) if case.gate is ANGLE else ENGINE
    work[OURS] = lambda _: engine(w, k, end)
    clocks, cuts = alternately(work, repeats)
    found = {key: matrices.errors(w, cut, true, end) for key, cut in cuts.items()}
    return Row("weights", name, clocks, found, case.gate, case.target, SVD, case.clock)


# 2. Whole models


def models(args: argparse.Namespace) -> Iterator[Job]:
    for name in ("SmolLM2-135M", "Gemma-270M"):
        for method in ("kasa", "pissa"):
            yield f"models: {name} {method}", partial(model, name, method, args)


def model(name: str, method: str, args: argparse.Namespace) -> Row | None:
    from against_peft import PAIRS
    from peft import get_peft_model

    base = loaded(name, args.quick)
    if base is None:
        return None
    theirs, ours = PAIRS[method]
    work = {
        "PEFT": lambda fresh: get_peft_model(fresh, theirs()),
        OURS: lambda fresh: get_peft_model(fresh, ours()),
    }
    clocks, wrapped = alternately(work, args.repeats, prepare=lambda: copy.deepcopy(base))
    found = {key: {"kept": kept_error(base, made, method)} for key, made in wrapped.items()}
    gate, target = ({"kept": 1e-7}, 6.0) if (name, method) == ("Gemma-270M", "kasa") else ({}, None)
    return Row("models", f"{name} {method}", clocks, found, gate, target, "PEFT")


def loaded(name: str, quick: bool) -> Any:
    from base_model import smollm2
    from gemma import gemma
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = smollm2() if name.startswith("SmolLM2") else gemma()
    if folder is None:
        return None
    made = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if quick:
        made.model.layers = made.model.layers[:1]
    return made


@torch.no_grad()
def kept_error(base: nn.Module, wrapped: Any, method: str) -> float:
    """Of what is left of the base beside what learns, over the weight's norm: the worst of about eight modules."""
    names = [name for name, module in base.model.named_modules(prefix="model") if isinstance(module, nn.Linear)]
    worst = 0.0
    for name in names[:: max(1, len(names) // 8)]:
        before = base.get_submodule(name).weight.detach()
        end: End = "bottom" if method == "kasa" else "top"
        true = outer(ends(before)[end], RANK, end).split().dense()
        found = taken(wrapped.base_model.model.get_submodule(name), before, method)
        worst = max(worst, ((found - true).norm() / before.double().norm()).item())
    return worst


def taken(layer: Any, before: Tensor, method: str) -> Tensor:
    """What a method took out of a base weight, in float64: PEFT rewrites the base, ours subtracts beside it."""
    if not hasattr(layer, "lowrank"):
        return before.double() - layer.base_layer.weight.double()
    value = layer.lowrank("default").scaled(-1) if method == "kasa" else layer.value("default")
    return LowRank(*(part.double() for part in value)).dense()


# 3. Weights with their inputs


def sources(args: argparse.Namespace) -> Iterator[Job]:
    shapes = [(160, 128, 1e-7)] if args.quick else [(640, 2048, 1e-7), (2048, 640, 1e-7), (2048, 2048, 1e-4)]
    for m, n, gate in shapes:  # Gemma-270M's down_proj and gate_proj, and a square one
        name = f"CorDA {m}x{n} bottom {RANK}"
        yield f"sources: {name}", partial(corda, name, m, n, gate, args.repeats)
    n, batches, tokens = (128, 3, 256) if args.quick else (2048, 16, 2048)
    name = f"EVA {n}, {batches} batches"
    yield f"sources: {name}", partial(eva, name, n, batches, tokens, args.repeats)


def corda(name: str, m: int, n: int, gate: float, repeats: int) -> Row | None:
    """B A at the start, against the definition in float64: the last triples of W C, with C's inverse."""
    try:
        from peft.tuners.lora.corda import collect_eigens_for_layer
    except ImportError as error:  # it needs attrs, which PEFT does not ask for
        print(f"CorDA is left out: {error}")
        return None
    w, c = llm_like(m, n), matrices.covariance(n)
    linear = nn.Linear(n, m, bias=False, dtype=torch.float32)
    linear.weight.data, linear.covariance_matrix = w, c
    share = matrices.damping(c)
    engine = Engine(cache=False)

    def theirs(_: None) -> Tensor:
        all_of_it = collect_eigens_for_layer(linear, None)  # it reads nothing of a config
        u, s, v = (part[..., -RANK:] for part in (all_of_it.U_WC, all_of_it.S_WC, all_of_it.V_WC))
        return (u * s) @ v.T

    work = {"PEFT": theirs, OURS: lambda _: oriented(w, damped(c, share), RANK, "bottom", engine).dense()}
    clocks, products = alternately(work, repeats)
    wide = damped(c, share)
    last = outer(Spectrum(*torch.linalg.svd(w.double() @ wide, full_matrices=False)), RANK, "bottom")
    true = last.split().dense() @ torch.linalg.inv(wide)
    found = {key: {"product": ((x.double() - true).norm() / true.norm()).item()} for key, x in products.items()}
    return Row("sources", name, clocks, found, {"product": gate}, 4, "PEFT")


def eva(name: str, n: int, batches: int, tokens: int, repeats: int) -> Row:
    """The leading axes of a stream of inputs less their mean; PEFT's EVA runs its incremental PCA with `lowrank`."""
    from peft.utils.incremental_pca import IncrementalPCA

    stream = [activations(tokens, n, seed) for seed in range(batches)]
    engine = Engine(cache=False)

    def theirs(lowrank: bool, _: None) -> Tensor:
        pca = IncrementalPCA(n_components=2 * AXES, copy=True, lowrank=lowrank, lowrank_seed=42)
        for x in stream:
            pca.partial_fit(x)
        return pca.components_[:AXES]

    def ours(_: None) -> Tensor:
        seen = Covariance(n)
        for x in stream:
            seen.update(x)
        return seen.axes(2 * AXES, engine, centred=True).v[:AXES]

    work: dict[str, Callable[[Any], Tensor]] = {"PEFT, full SVDs": partial(theirs, False)}
    work |= {"PEFT, as EVA runs it": partial(theirs, True), OURS: ours}
    clocks, axes = alternately(work, repeats)
    mean = sum(x.sum(0, dtype=torch.float64) for x in stream) / (batches * tokens)
    scatter = sum((x.double() - mean).T @ (x.double() - mean) for x in stream)
    true = torch.linalg.eigh(scatter).eigenvectors[:, -AXES:]
    found = {key: {"sine": matrices.sine(v.double().T, true).item()} for key, v in axes.items()}
    return Row("sources", name, clocks, found, {"sine": 1e-5}, 15, "PEFT, as EVA runs it")


# 4. Memory


def memory(args: argparse.Namespace) -> Iterator[Job]:
    if not Path("/proc/self/status").is_file() or not importlib.util.find_spec("bitsandbytes"):
        print("Memory is left out: it needs /proc and bitsandbytes")
        return
    m, n = (320, 640) if args.quick else (4096, 11008)
    cases: list[tuple[End, int]] = [("bottom", 8), ("top", 16)]
    for stored in STORED:
        for end, k in cases:
            name = f"{m}x{n} {stored} {end} {k}"
            yield f"memory: {name}", partial(peak, name, stored, m, n, k, end)


def peak(name: str, stored: str, m: int, n: int, k: int, end: End) -> Row:
    """What reading and decomposing a quantised layer adds to the resident memory of a fresh process, at most."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "layer.pt"
        torch.save(STORED[stored](llm_like(m, n)).state_dict(), file)
        with get_context("spawn").Pool(1) as pool:  # making the layer took more than decomposing it: not in there
            extra = pool.apply(peak_here, (file, stored, m, n, k, end))
    return Row("memory", name, {}, {OURS: {"MB": extra}}, {"MB": 1000.0})


def peak_here(file: Path, stored: str, m: int, n: int, k: int, end: End) -> float:
    from peft_kasa.adapter.base.base_weight import BaseWeight

    warm_up()
    layer = matrices.requantized(stored, m, n, torch.load(file, weights_only=True))
    before = resident("VmRSS")
    ENGINE(BaseWeight(layer).matrix(), k, end)
    return resident("VmHWM") - before


if __name__ == "__main__":
    main()
