"""`decomposition.py --cuda`: Llama-7B's linear layers on a GPU, against a loop over torch.linalg.svd in float32.

The loop is timed on one layer (seven weights) and counted 32 times; ours also runs over all 224 weights. Then come 120
weights of 576x576, as a small model has them, which `Engine.many` takes together on CUDA: against one by one. What the
time allowed does not suffice for (the float64 truth of a large weight on a card with slow float64) is left out and said
so.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from matrices import End, by_svd, ends, errors, four_bit, llm_like, outer
from measured import OURS, Clock, Row, alternately
from torch import Tensor

from peft_kasa.spectral import Engine, Spectrum

ALLOWED = 480  # seconds for everything
COUNT = 32  # layers
SMALL = (120, 576)  # weights, and their sides
SVD = "torch.linalg.svd"
SQUARE, TALL, WIDE = (4096, 4096), (11008, 4096), (4096, 11008)
LAYER = {"q": SQUARE, "k": SQUARE, "v": SQUARE, "o": SQUARE, "gate": TALL, "up": TALL, "down": WIDE}
TOP, BOTTOM = {"dW": 1e-4, "sigma": 1e-6}, {"sigma": 1e-8, "dropped": 1e-9}
CUTS: list[tuple[End, int, dict[str, float], float, float]] = [  # and the target ratio, and seconds for the model
    ("top", 16, TOP, 200, 1.5),
    ("bottom", 8, BOTTOM, 60, 6.0),
]
ENGINE = Engine(precision="float64", cache=False, progress=False)

Layer = dict[str, Tensor]


def rows(quick: bool, repeats: int) -> Iterator[Row]:
    """Without a GPU: nothing, or with `quick` the same on the CPU."""
    begin = time.monotonic()
    if not torch.cuda.is_available() and not quick:
        print("There is no CUDA device")
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(describe(device), flush=True)
    shapes = {name: (m // 32, n // 32) for name, (m, n) in LAYER.items()} if quick else LAYER
    layer = {name: llm_like(*shape, seed, device) for seed, (name, shape) in enumerate(shapes.items())}
    count = 2 if quick else COUNT
    warm_up(layer, device)
    svds = Clock()
    for row in whole(layer, count, repeats):
        svds = row.clocks.get(SVD, svds)
        yield row
    yield from from_four_bits(layer, svds, repeats)
    yield from small(*((6, 96) if quick else SMALL), device, repeats)
    yield from single(layer, svds, repeats, lambda: ALLOWED - (time.monotonic() - begin))


def describe(device: str) -> str:
    if device == "cpu":
        return "No GPU: tiny sizes on the CPU"
    card = torch.cuda.get_device_properties(0)
    tf32 = "on" if torch.backends.cuda.matmul.allow_tf32 else "off"
    return f"{card.name}, {card.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}, TF32 for products {tf32}"


def synced(run: Callable[[], Any]) -> Callable[[Any], Any]:
    """For `alternately`: what a GPU was given before is not counted, what it still has to do is."""

    def timed(_: Any) -> Any:
        result = run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return result

    return timed


def warm_up(layer: Layer, device: str) -> None:
    """Libraries load and choose their kernels at the first call of a shape."""
    torch.linalg.svd(torch.randn(512, 512, device=device))
    for end, k, *_ in CUTS:
        ENGINE.many(layer, k, end)
    synced(lambda: None)(None)


def whole(layer: Layer, count: int, repeats: int) -> Iterator[Row]:
    """One layer and all layers, from float32 and from bfloat16 weights."""
    stored = {"fp32": layer, "bf16": {name: w.bfloat16() for name, w in layer.items()}}
    work = {SVD: synced(lambda: [by_svd(w, 1, "top") for w in layer.values()])}
    for end, k, *_ in CUTS:
        for dtype, weights in stored.items():
            work[f"{end} {k} {dtype}"] = synced(partial(ENGINE.many, weights, k, end))
            work[f"{end} {k} {dtype}, one at a time"] = synced(partial(one_at_a_time, weights, k, end))
    clocks, _ = alternately(work, repeats)
    for end, k, _, target, seconds in CUTS:
        for dtype, weights in stored.items():
            case = f"{end} {k} {dtype}"
            yield Row("cuda", f"one layer, {case}", {SVD: clocks[SVD], OURS: clocks[case]}, {})
            apart = clocks[f"{case}, one at a time"]
            yield Row("cuda", f"one layer, one weight at a time, {case}", {SVD: clocks[SVD], OURS: apart}, {})
            everything = {f"{name} {i}": w for name, w in weights.items() for i in range(count)}
            often = min(repeats, 3) if count * min(clocks[case].wall) < 10 else 1
            ours, _ = alternately({OURS: synced(partial(ENGINE.many, everything, k, end))}, often)
            baseline = f"{SVD}, one layer x {count}"
            yield Row(
                "cuda",
                f"{len(everything)} weights, {case}",
                {baseline: clocks[SVD].times(count), **ours},
                {OURS: {"seconds": min(ours[OURS].wall)}},
                {"seconds": seconds},
                target,
                baseline,
            )


def one_at_a_time(weights: Layer, k: int, end: End) -> list[Spectrum]:
    return [ENGINE(w, k, end, name) for name, w in weights.items()]


def from_four_bits(layer: Layer, svds: Clock, repeats: int) -> Iterator[Row]:
    """One layer in nf4, read and decomposed; and what that adds to the memory in use."""
    if not importlib.util.find_spec("bitsandbytes"):
        print("nf4 is left out: it needs bitsandbytes")
        return
    from peft_kasa.adapter.base.base_weight import BaseWeight

    cuda = torch.cuda.is_available()
    held = [BaseWeight(four_bit(w)) for w in layer.values()]
    for end, k, *_ in CUTS:
        before = torch.cuda.memory_allocated() if cuda else 0
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        work = {OURS: synced(partial(read_and_cut, held, k, end))}
        clocks, _ = alternately(work, repeats)
        extra = {"MB": (torch.cuda.max_memory_allocated() - before) / 1e6} if cuda else {}
        yield Row("cuda", f"one layer, {end} {k} nf4", {SVD: svds, **clocks}, {OURS: extra}, {"MB": 1000})


def read_and_cut(held: list[Any], k: int, end: End) -> list[Spectrum]:
    return [ENGINE(base.matrix(), k, end) for base in held]


def svds_of(weights: Layer, k: int, end: End) -> list[Spectrum]:
    return [by_svd(w, k, end) for w in weights.values()]


def small(count: int, side: int, device: str, repeats: int) -> Iterator[Row]:
    """Small weights of one shape: together, one after the other, and by torch's SVD. On the CPU none go together."""
    weights = {str(seed): llm_like(side, side, seed, device) for seed in range(count)}
    for end, k, gate, *_ in CUTS:
        work: dict[str, Callable[[Any], Any]] = {
            SVD: synced(partial(svds_of, weights, k, end)),
            "one by one": synced(partial(one_at_a_time, weights, k, end)),
            OURS: synced(partial(ENGINE.many, weights, k, end)),
        }
        for run in work.values():
            run(None)  # kernels are chosen at the first call of a shape
        clocks, cuts = alternately(work, repeats)
        found: dict[str, dict[str, float]] = {}
        for w, *both in list(zip(weights.values(), cuts["one by one"], cuts[OURS].values(), strict=True))[:4]:
            true = outer(ends(w)[end], k, end)
            for name, cut in zip(("one by one", OURS), both, strict=True):
                worst = found.setdefault(name, {})
                worst.update({key: max(value, worst.get(key, 0.0)) for key, value in errors(w, cut, true, end).items()})
        yield Row("cuda", f"{count} weights of {side}x{side}, {end} {k}", clocks, found, gate, None, "one by one")


def single(layer: Layer, svds: Clock, repeats: int, left: Callable[[], float]) -> Iterator[Row]:
    """A weight of each shape, if there is time, and with errors if there is enough of it for a float64 SVD."""
    slower = seconds(torch.float64, layer) / seconds(torch.float32, layer)
    for w in {w.shape: w for w in layer.values()}.values():
        shape = "{}x{}".format(*w.shape)
        if left() < svds.wall[0]:
            print(f"\n{shape} is left out: {left():.0f} s are left")
            continue
        most = max(k for _, k, *_ in CUTS)
        work = {SVD: synced(partial(both_ends, w, most))}
        for end, k, *_ in CUTS:
            work[f"{end} {k}"] = synced(partial(ENGINE, w, k, end))
        clocks, cuts = alternately(work, repeats)
        needed = 2 * slower * clocks[SVD].wall[0] + 20
        true = ends(w) if needed < left() else {}
        if not true:
            print(f"\n{shape}: no errors, as a float64 SVD would take about {needed:.0f} s and {left():.0f} s are left")
        for end, k, gate, *_ in CUTS:
            both = {SVD: outer(cuts[SVD][end], k, end), OURS: cuts[f"{end} {k}"]}
            found = {name: errors(w, cut, outer(true[end], k, end), end) for name, cut in both.items()} if true else {}
            yield Row("cuda", f"{shape} {end} {k}", {SVD: clocks[SVD], OURS: clocks[f"{end} {k}"]}, found, gate)


def both_ends(w: Tensor, k: int) -> dict[str, Spectrum]:
    whole = Spectrum(*torch.linalg.svd(w, full_matrices=False))
    return {"top": outer(whole, k, "top"), "bottom": outer(whole, k, "bottom")}


def seconds(dtype: torch.dtype, layer: Layer) -> float:
    """Of an SVD of the first 1024 rows and columns of a weight: what float64 costs on this card."""
    w = next(iter(layer.values()))[:1024, :1024].to(dtype).contiguous()
    clocks, _ = alternately({SVD: synced(lambda: torch.linalg.svd(w))}, 2)
    return min(clocks[SVD].wall)
