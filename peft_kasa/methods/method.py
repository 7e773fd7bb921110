"""The contract between a method of the family and everything that runs it: `Site`, `Start`, `SpectralConfig`.

A method sees one weight at a time (a `Site`) and answers with the low-rank value that it trains and with what leaves
the base in exchange (a `Start`). Wrapping, quantised bases, saving, merging, export and regularisers are the same for
all of them.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import torch
from peft import PeftConfig, PeftType
from torch import Tensor

from ..files import replacing
from ..spectral import Engine, LowRank, Spectrum
from ..spectral.engine import End

Slot: TypeAlias = Literal["left", "core", "right"]


class Site(NamedTuple):
    """One weight as a method sees it. On the meta device nothing has a value and every answer has only its shape."""

    name: str  # the module's name: in every error, and in every seed
    weight: Tensor  # (m, n) float32, dequantised already
    rank: int  # after rank_pattern, at most min(m, n)
    scale: float  # s = alpha / r, after alpha_pattern
    generator: torch.Generator  # seeded by the config's seed and the module's name
    engine: Engine

    def svd(self, k: int, end: End = "top") -> Spectrum:
        """The k largest (`end="top"`) or smallest (`end="bottom"`) singular triples of the weight."""
        if self.weight.is_meta:
            m, n = self.weight.shape
            return Spectrum(*(self.weight.new_empty(shape) for shape in ((m, k), (k,), (k, n))))
        return self.engine(self.weight, k, end, self.name)

    def zeros(self, *shape: int) -> Tensor:
        """Zeros on the weight's device."""
        return self.weight.new_zeros(shape)

    def ones(self, *shape: int) -> Tensor:
        """Ones on the weight's device."""
        return self.weight.new_ones(shape)

    def normal(self, *shape: int) -> Tensor:
        """Samples of N(0, 1) from the site's own generator, the same on every device."""
        return self._sampled(self.weight.new_empty(0, device="cpu").new_empty(shape).normal_, shape)

    def kaiming_uniform(self, *shape: int) -> Tensor:
        """Samples of U(-b, b) with b = 1 / sqrt(columns): what LoRA and KaSA start their A from."""
        bound = 1 / math.sqrt(shape[-1])
        empty = self.weight.new_empty(0, device="cpu").new_empty(shape)
        return self._sampled(lambda generator: empty.uniform_(-bound, bound, generator=generator), shape)

    def _sampled(self, sample: Any, shape: tuple[int, ...]) -> Tensor:
        if self.weight.is_meta:
            return self.weight.new_empty(shape)
        return sample(generator=self.generator).to(self.weight.device)


class Start(NamedTuple):
    """Where a method begins at one site: y = W x + (scale * trained - displaced) x.

    `displaced` is what leaves the base. `"start"` means scale * trained as it is now, so the model begins exactly at
    the base model. A `LowRank` means the r smallest or largest triples of the weight; where several active adapters
    take such a cut from one weight, it leaves once and the largest wins. `None` means that nothing leaves.
    """

    trained: LowRank
    train: tuple[Slot, ...]
    displaced: LowRank | Literal["start"] | None = None


_METHODS: dict[str, type[SpectralConfig]] = {}


def methods() -> dict[str, type[SpectralConfig]]:
    """The config class of each method, by the `method` field that its adapter_config.json carries."""
    return dict(_METHODS)


@dataclass(repr=False)
class SpectralConfig(PeftConfig):
    """The fields that every method of the family has. Use a subclass, such as `KaSAConfig`.

    Args:
        r: the rank k of `trained`, 1 <= r <= min(m, n) of each target.
        alpha: the update is scaled by s = alpha / r. None: the method's own scale, whatever the rank.
        use_rslora: s = alpha / sqrt(r) instead (arXiv:2312.03732).
        dropout: probability of dropping an input of the update, 0 <= dropout < 1. What leaves the base is not dropped,
            unless it is the start: then the model still begins exactly at the base model.
        target_modules: names, a regular expression, or "all-linear". None: PEFT's defaults for the architecture.
        exclude_modules: names, or a regular expression, of modules to leave alone.
        layers_to_transform, layers_pattern: as in PEFT's LoraConfig.
        rank_pattern, alpha_pattern: r and alpha by module name or regular expression, as in PEFT's LoraConfig.
        modules_to_save: further modules to train in full and to save.
        trainable_token_indices: as in PEFT's LoraConfig.
        seed: random starts depend on this and on the module's name, on nothing else.
        regularize: whether the method's regulariser acts at each optimiser step.
        reduction: whether the regulariser is the "mean" or the "sum" over modules.
        init_weights: False adds noise to the start, so that it is not the identity (PEFT's tests use it).
        method: the method's name, written to adapter_config.json. Leave it alone.

    Raises:
        ValueError: for a value out of range, with the rule and what was found.
    """

    name: ClassVar[str] = ""
    default_scale: ClassVar[float] = 1.0

    r: int = 8
    alpha: float | None = None
    use_rslora: bool = False
    dropout: float = 0.0
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    seed: int = 0
    regularize: bool = True
    reduction: Literal["mean", "sum"] = "mean"
    init_weights: bool = True
    method: str = ""

    # Set where a config was read from a file: its slots then wait for the file's values (adapter/layer.py).
    from_file: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.name:
            _METHODS[cls.name] = cls

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.name:
            raise TypeError("`SpectralConfig` is the base of the family. Use a method's config, such as `KaSAConfig`.")
        if self.method not in ("", self.name):
            raise ValueError(
                f"`method` of {type(self).__name__} is {self.name!r}. Found {self.method!r}: leave it out."
            )
        self.method = self.name
        self.peft_type = PeftType.PEFT_KASA  # type: ignore[attr-defined]  # see peft_type.py
        for names in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, names), list):
                setattr(self, names, set(value))
        self._check()

    def _check(self) -> None:
        for rank in (self.r, *self.rank_pattern.values()):
            require(type(rank) is int and rank >= 1, "r has to be a whole number of at least 1", rank)
        require(0 <= self.dropout < 1, "dropout has to be 0 <= dropout < 1", self.dropout)
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            number = isinstance(alpha, int | float) and alpha > 0
            require(alpha is None or number, "alpha has to be a number above 0", alpha)
        ignored = self.use_rslora and self.alpha is None and not self.alpha_pattern
        require(not ignored, "use_rslora needs alpha (without it the scale is the method's own)", self.alpha)
        require(isinstance(self.seed, int), "seed has to be a whole number", self.seed)
        require(self.reduction in ("mean", "sum"), "reduction has to be 'mean' or 'sum'", self.reduction)
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            layered = self.layers_to_transform is not None or self.layers_pattern is not None
            require(not layered, "layers_to_transform needs target_modules as a list", self.target_modules)

    def scale(self, rank: int, alpha: float | None) -> float:
        """s for a module of this rank and alpha (after the patterns)."""
        if alpha is None:
            return self.default_scale
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def start(self, site: Site) -> Start:
        """Where the method begins at one weight. May not branch on values: it also runs on the meta device."""
        raise NotImplementedError(f"{type(self).__name__} has to define `start`.")

    def penalty(self, trained: LowRank) -> Tensor | float:
        """The regulariser of one module, before its reduction. 0.0: the method has none."""
        return 0.0

    @property
    def regularizes(self) -> bool:
        """Whether this config has a regulariser and it is switched on."""
        return self.regularize and type(self).penalty is not SpectralConfig.penalty

    def to_dict(self) -> dict[str, Any]:
        """The fields as adapter_config.json holds them: sets become sorted lists, so that a file is reproducible."""
        return {key: sorted(value) if isinstance(value, set) else value for key, value in super().to_dict().items()}

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Writes adapter_config.json whole or not at all."""
        with replacing(os.path.join(save_directory, "adapter_config.json")) as folder:
            super().save_pretrained(folder, **kwargs)

    def __repr__(self) -> str:
        shown = {key: value for key, value in vars(self).items() if key in type(self).__dataclass_fields__}
        defaults = {key: spec.default for key, spec in type(self).__dataclass_fields__.items()}
        hidden = {"method", "peft_type", "peft_version", "auto_mapping"}
        parts = (f"{k}={v!r}" for k, v in shown.items() if k not in hidden and v != defaults[k] and v != {})
        return f"{type(self).__name__}({', '.join(parts)})"


def require(holds: bool, rule: str, found: object) -> None:
    """Raises ValueError with the rule and what was found."""
    if not holds:
        raise ValueError(f"{rule}. Found {found!r}.")
