"""The verb: a weight, or a model's weights, to cuts of their spectra."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from . import rules, stacks
from .algorithms import ALGORITHMS, Operator, error
from .cache import located
from .checksum import checksum
from .products import exact_products
from .spectrum import Spectrum
from .sweep import Job, sweep
from .threads import limited
from .weights import End, check, of_zero, scaled

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Engine:
    """Computes the top or the bottom k singular triples of a matrix, or of all matrices of a model.

    The algorithm follows from the shape, k and the end (`peft_kasa.spectral.rules`). Every answer is measured; where it
    misses the gate the next, slower algorithm runs and this is logged, down to LAPACK in float64.
    The same weight, settings and name give the same bits on one device. The exception: on CUDA, without a cache and
    with "auto", `many` and the starts of adapters take four or more small weights of one shape together, and bits may
    depend on which.

    Args:
        algorithm: "auto", or a name in `peft_kasa.spectral.algorithms.ALGORITHMS` to begin with.
        precision: dtype of the answer. The work is the same.
        device: where to compute. None: where the weight is (on MPS, which has no float64: the CPU).
        seed: of the random starts, together with the name given to each weight.
        tolerance: the gate: max |W^T u - s v| over the triples, relative to the largest s among them.
            None: 3e-6 at the top, 1e-5 at the bottom.
        cache: a folder that keeps results, True for the default one, False for none. None: `PEFT_KASA_CACHE` says.
        workers: how many weights of a model at a time. None: as many as the threads that torch may use allow, up to 8.
        progress: whether `many` shows a progress bar. None: on a terminal.

    Examples:
        >>> import torch
        >>> from peft_kasa.spectral import Engine
        >>> weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
        >>> bottom = Engine()(weight, 1, end="bottom")
        >>> torch.allclose(bottom.s, torch.linalg.svdvals(weight)[-1:])
        True
        >>> Engine().many({"a": weight, "b": weight.T}, 2)
        {'a': Spectrum(6 x 2 x 4), 'b': Spectrum(4 x 2 x 6)}
    """

    algorithm: str = "auto"
    precision: Literal["float32", "float64"] = "float32"
    device: str | torch.device | None = None
    seed: int = 0
    tolerance: float | None = None
    cache: str | Path | bool | None = None
    workers: int | None = None
    progress: bool | None = None

    def __post_init__(self) -> None:
        known = ("auto", *ALGORITHMS)
        if self.algorithm not in known:
            raise ValueError(f"`algorithm` has to be one of {', '.join(known)}. Found {self.algorithm!r}.")
        if self.precision not in ("float32", "float64"):
            raise ValueError(f"`precision` has to be 'float32' or 'float64'. Found {self.precision!r}.")
        if self.tolerance is not None and not self.tolerance >= 0:
            raise ValueError(f"`tolerance` has to be >= 0. Found {self.tolerance}.")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"`workers` has to be >= 1. Found {self.workers}.")

    @torch.no_grad()
    def __call__(self, w: Tensor, k: int, end: End = "top", name: str = "") -> Spectrum:
        """The k largest (`end="top"`) or smallest (`end="bottom"`) triples of `w`, on its device.

        Args:
            w: (m, n), floating point, finite, not on the meta device.
            k: 0 <= k <= min(m, n).
            end: which end of the spectrum.
            name: of the weight: it enters the seed and the log.

        Raises:
            ValueError: the rule, what was found, and what to do.
        """
        check(w, k, end)
        chain = self._chain(w.shape[0], w.shape[1], k, end)
        dtype = getattr(torch, self.precision)
        if k == 0:
            m, n = w.shape
            return Spectrum(*(w.new_empty(shape, dtype=dtype) for shape in ((m, 0), (0,), (0, n))))
        cache = located(self.cache)
        key = cache.key(w, self._settings(w, k, end, name)) if cache else ""
        found = cache.load(key, shape=(w.shape[0], w.shape[1]), k=k) if cache else None
        if found is None:
            cut, missed, algorithm = self._computed(w, k, end, name, chain)
            if cache:
                cache.store(key, cut, missed, {"end": end, "algorithm": algorithm})
        else:
            cut = found[0]
        return cut.stored(w.device, dtype)

    def many(self, weights: Mapping[str, Tensor], k: int, end: End = "top") -> dict[str, Spectrum]:
        """The cuts of many weights by name, several at a time; under torch.distributed each rank computes its share.

        Args:
            weights: (m, n) each, as for one; under torch.distributed the same on every rank.
            k: 0 <= k <= min(m, n) of each.
            end: which end of the spectrum.

        Raises:
            ValueError: as for one, with the weight's name.
        """
        for name, w in weights.items():
            try:
                check(w, k, end)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        dtype = getattr(torch, self.precision)
        cuts = {
            name: Spectrum(*(w.new_empty(shape, dtype=dtype) for shape in ((len(w), k), (k,), (k, w.shape[1]))))
            for name, w in weights.items()
        }

        def one(name: str) -> None:
            try:
                fill(name, self(weights[name], k, end, name))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error

        def fill(name: str, cut: Spectrum) -> None:
            for empty, part in zip(cuts[name], cut, strict=True):
                empty.copy_(part)

        def together(names: list[str]) -> None:
            for name, cut in self.together({name: weights[name] for name in names}, k, end).items():
                fill(name, cut)

        jobs = []
        for names in self.groups(weights, k):
            w = weights[names[0]]
            jobs.append(
                Job(
                    ", ".join(names),
                    (w.shape[0], w.shape[1]),
                    torch.device(self.device or w.device),
                    partial(one, names[0]) if len(names) == 1 else partial(together, names),
                    [part for name in names for part in cuts[name]],
                    partial(self._about, [weights[name] for name in names], k, end),
                    len(names),
                )
            )
        sweep(jobs, "decomposing", self.workers, self.progress)
        return cuts

    def groups(self, weights: Mapping[str, Tensor], k: int) -> list[list[str]]:
        """The names by what `together` should take at once: small ones of one shape on CUDA; others alone."""
        if self.algorithm != "auto" or located(self.cache) is not None:  # an entry is what one weight alone gives
            return [[name] for name in weights]
        return stacks.groups(weights, k, self.device)

    @torch.no_grad()
    def together(self, weights: Mapping[str, Tensor], k: int, end: End = "top") -> dict[str, Spectrum]:
        """The cuts of weights of one shape on one device, in one batch; those that miss the gate there, one by one."""
        first = next(iter(weights.values()))
        device, dtype = torch.device(self.device or first.device), getattr(torch, self.precision)
        found = stacks.cuts(list(weights.values()), k, end, self._tolerance(end), device)
        cuts = {}
        for (name, w), cut in zip(weights.items(), found, strict=True):
            if cut is None:
                logger.info("%s: not with the others of its shape, trying alone", name)
                try:
                    cut = self(w, k, end, name)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from error
            cuts[name] = cut.stored(w.device, dtype)
        return cuts

    def _chain(self, m: int, n: int, k: int, end: str) -> tuple[str, ...]:
        chain = rules.chain(m, n, k, end)
        if self.algorithm == "auto":
            return chain
        if misfit := rules.misfit(self.algorithm, m, n, k, end):
            raise ValueError(f"{misfit}. Found shape {(m, n)}, k = {k}, end {end!r}. Leave `algorithm` at 'auto'.")
        return (self.algorithm, *(name for name in ("gram", "lapack64") if name != self.algorithm))

    def _settings(self, w: Tensor, k: int, end: str, name: str) -> dict[str, object]:
        bits = {
            "tolerance": self._tolerance(end),
            "seed": self._seed(name),
            "device": torch.device(self.device or w.device).type,
        }
        return {"k": k, "end": end, "algorithm": self.algorithm, **bits}

    def _tolerance(self, end: str) -> float:
        return rules.TOLERANCE[end] if self.tolerance is None else self.tolerance

    def _about(self, weights: list[Tensor], k: int, end: str) -> object:
        return [(checksum(w), str(w.dtype), self.precision, self._settings(w, k, end, "")) for w in weights]

    def _seed(self, name: str) -> int:
        return zlib.crc32(f"{self.seed} {name}".encode())

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(self._seed(name))

    def _computed(self, w: Tensor, k: int, end: str, name: str, chain: tuple[str, ...]) -> tuple[Spectrum, float, str]:
        """The cut in float64, its error, and the algorithm that it came from."""
        device = torch.device(self.device or w.device)
        w = w.detach().to("cpu" if device.type == "mps" else device)
        w, exponent = scaled(w)
        tag, tolerance = f"{name}: " if name else "", self._tolerance(end)
        with limited(rules.threads(*w.shape)), exact_products(w.device.type):
            op = Operator(w)
            if op.norm == 0:
                return of_zero(w, k), 0.0, "none"
            for algorithm in chain:
                last = algorithm == chain[-1]
                try:
                    found = ALGORITHMS[algorithm](op, k, end, tolerance, self._generator(name))
                    missed = error(op, found)
                except torch.linalg.LinAlgError as failure:
                    if last:
                        raise
                    logger.info("%s%s failed (%s), trying a slower algorithm", tag, algorithm, failure)
                    continue
                if missed <= tolerance:
                    break
                then = "and there is nothing more exact" if last else "trying a slower algorithm"
                logger.log(
                    logging.WARNING if last else logging.INFO,
                    *("%s%s: error %.1e above %.1e, %s", tag, algorithm, missed, tolerance, then),
                )
        cut = Spectrum(found.v.T, found.s, found.u) if op.turned else Spectrum(found.u.T, found.s, found.v)
        return (
            cut._replace(s=torch.ldexp(cut.s, torch.tensor(exponent, device=cut.s.device))).signed(),
            missed,
            algorithm,
        )
