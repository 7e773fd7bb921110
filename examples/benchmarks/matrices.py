"""Weights and inputs like a language model's, the float64 truth about them, and how far a cut is from it."""

from __future__ import annotations

import math
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from base_model import cache_home
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_kasa.spectral import Spectrum

End = Literal["top", "bottom"]
KEPT = 128  # triples at each end of the spectrum that a kept truth holds
SMALL = 1024  # smaller dimension below which a truth is computed again


def llm_like(m: int, n: int, seed: int = 1, device: str = "cpu") -> Tensor:
    """(m, n) float32, rounded to bfloat16 as checkpoints are: a power law above a bulk.

    The bulk is N(0, 0.02^2) with log-normal scales of rows and columns: if square, it reaches down to almost 0, if not,
    it ends at an edge. Above it are 512 random terms of rank one (or min(m, n) / 4), whose sizes fall like i^-0.55 from
    six times the bulk's upper edge.
    """
    rng = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, device=device)

    bulk = 0.02 * normal(m, n) * torch.exp(0.25 * normal(m, 1)) * torch.exp(0.25 * normal(1, n))
    terms = min(512, min(m, n) // 4)
    sizes = 6 * 0.02 * (math.sqrt(m) + math.sqrt(n)) * torch.arange(1, terms + 1, device=device) ** -0.55
    u, v = torch.linalg.qr(normal(m, terms)).Q, torch.linalg.qr(normal(n, terms)).Q
    return ((u * sizes) @ v.T + bulk).bfloat16().float()


def activations(tokens: int, n: int, seed: int = 1) -> Tensor:
    """(tokens, n) float32 inputs of a layer: correlated, channels of many sizes, three of them huge, with a mean.

    The seed draws the tokens; their distribution is one for each n.
    """
    fixed, rng = torch.Generator().manual_seed(n), torch.Generator().manual_seed(1000 + seed)
    mixing = torch.arange(1, n // 4 + 1)[:, None] ** -0.5 * torch.randn(n // 4, n, generator=fixed)
    sizes, mean = torch.exp(0.5 * torch.randn(n, generator=fixed)), 0.2 * torch.randn(n, generator=fixed)
    sizes[:3] *= torch.tensor([30.0, 15.0, 10.0])
    x = torch.randn(tokens, n // 4, generator=rng) @ mixing / math.sqrt(n // 4) + torch.randn(tokens, n, generator=rng)
    return (x + mean) * sizes


def covariance(n: int) -> Tensor:
    """(n, n) float32, the mean of x x^T over 8 n tokens: of full rank."""
    x = activations(8 * n, n).double()
    return (x.T @ x / len(x)).float()


def four_bit(w: Tensor) -> nn.Module:
    """A bitsandbytes layer that holds the weight in nf4, on its device."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    layer = Linear4bit(w.shape[1], w.shape[0], bias=False, quant_type="nf4", device="meta")
    layer.weight = Params4bit(w.bfloat16().cpu(), requires_grad=False, quant_type="nf4")
    return layer.to(w.device)


def eight_bit(w: Tensor) -> nn.Module:
    """A bitsandbytes layer that holds the weight in int8 with a scale a row, on its device."""
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    layer = Linear8bitLt(w.shape[1], w.shape[0], bias=False, has_fp16_weights=False, device="meta")
    layer.weight = Int8Params(w.bfloat16().cpu(), requires_grad=False, has_fp16_weights=False).to(w.device)
    return layer


def requantized(stored: str, m: int, n: int, state: dict[str, Tensor]) -> nn.Module:
    """The layer that `four_bit` ("nf4") or `eight_bit` ("int8") made, from its state dict: on the CPU, no copy."""
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    rest = dict(state)
    weight = rest.pop("weight")
    if stored == "nf4":
        layer = Linear4bit(n, m, bias=False, quant_type="nf4", device="meta")
        layer.weight = Params4bit.from_prequantized(weight, rest, device="cpu")
        return layer
    layer = Linear8bitLt(n, m, bias=False, has_fp16_weights=False, device="meta")
    layer.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False, CB=weight, SCB=rest["SCB"])
    return layer


def damping(c: Tensor) -> float:
    """The share that PEFT's CorDA damps a covariance with: doubled until its float32 inverse is good enough for it."""
    share = 0.01
    while True:
        matrix = c + torch.diag(share * c.diagonal().mean().expand(len(c)))
        if torch.dist(matrix @ torch.linalg.inv(matrix), torch.eye(len(c))) < 0.05:
            return share
        share *= 2


def by_svd(w: Tensor, k: int, end: End) -> Spectrum:
    """What users run today."""
    return outer(Spectrum(*torch.linalg.svd(w, full_matrices=False)), k, end)


def by_svd_lowrank(w: Tensor, k: int) -> Spectrum:
    """As PEFT calls it for `init_lora_weights="pissa_niter_16"`."""
    u, s, v = torch.svd_lowrank(w, k, niter=16)
    return Spectrum(u, s, v.T)


def randomized_svd() -> Callable[[Tensor, int], Spectrum] | None:
    """scikit-learn's, if it can be imported."""
    try:
        from sklearn.utils.extmath import randomized_svd as run
    except ImportError:
        return None
    return lambda w, k: Spectrum(*map(torch.from_numpy, run(w.numpy(), k, random_state=0)))


def ends(w: Tensor) -> dict[str, Spectrum]:
    """Up to 128 triples of each end, by a full float64 SVD; large ones take minutes and are kept on disk."""
    if min(w.shape) < SMALL:
        return _ends(w)
    bits = zlib.crc32(w.cpu().contiguous().numpy())
    file = cache_home() / "truth" / f"{w.shape[0]}x{w.shape[1]}-{bits:08x}.safetensors"
    if not file.is_file():
        print(f"Computing the truth of a {w.shape[0]}x{w.shape[1]} weight (once) ...", flush=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        found = {f"{end}.{key}": part for end, cut in _ends(w).items() for key, part in cut._asdict().items()}
        scratch = file.with_suffix(".part")
        save_file(found, scratch)
        scratch.replace(file)
    kept = load_file(file)
    return {end: Spectrum(*(kept[f"{end}.{key}"] for key in Spectrum._fields)) for end in ("top", "bottom")}


def _ends(w: Tensor) -> dict[str, Spectrum]:
    u, s, v = torch.linalg.svd(w.detach().double(), full_matrices=False)
    whole = Spectrum(u.cpu(), s.cpu(), v.cpu())
    return {"top": outer(whole, KEPT, "top"), "bottom": outer(whole, KEPT, "bottom")}


def outer(whole: Spectrum, k: int, end: End) -> Spectrum:
    """The first or the last k triples, as copies that do not hold the rest."""
    part = slice(0, k) if end == "top" else slice(max(len(whole.s) - k, 0), len(whole.s))
    kept = (whole.u[:, part], whole.s[part], whole.v[part])
    return Spectrum(*(x.clone(memory_format=torch.contiguous_format) for x in kept))


def errors(w: Tensor, found: Spectrum, true: Spectrum, end: End) -> dict[str, float]:
    """How far a cut is from the truth.

    dW: of the product of the cut, over the norm of W. sigma: the largest relative error of a singular value. sine: of
    the largest angle between the subspaces, left or right. dropped (bottom): the norm of W in the subspace found, above
    the least there is, relative to it.
    """
    found, true = (Spectrum(*(part.detach().cpu().double() for part in cut)) for cut in (found, true))
    # The difference is one matrix of rank 2k. The norm of its triangular factors' product cancels nothing.
    left = torch.linalg.qr(torch.cat([found.u * found.s, -true.u * true.s], 1), mode="r").R
    right = torch.linalg.qr(torch.cat([found.v, true.v]).T, mode="r").R
    measured = {
        "dW": (left @ right.T).norm() / torch.linalg.vector_norm(w, dtype=torch.float64).cpu(),
        "sigma": ((found.s - true.s).abs() / true.s).max(),
        "sine": torch.maximum(sine(found.u, true.u), sine(found.v.T, true.v.T)),
    }
    if end == "bottom":
        wide = w.cpu().double()
        m, n = w.shape  # on the smaller side: the larger has directions of its own that W maps to 0
        image = _basis(found.u).T @ wide if m <= n else wide @ _basis(found.v.T)
        measured["dropped"] = image.norm() / true.s.norm() - 1
    return {name: value.item() for name, value in measured.items()}


def sine(found: Tensor, true: Tensor) -> Tensor:
    """Of the largest principal angle between the columns of `found` and orthonormal columns."""
    basis = _basis(found)
    return torch.linalg.matrix_norm(basis - true @ (true.T @ basis), 2)


def _basis(x: Tensor) -> Tensor:
    return torch.linalg.qr(x).Q
