"""The config that every method of the family is.

A method sees one weight at a time (a `Site`) and answers with the low-rank value that it trains and with what leaves
the base in exchange (a `Start`). Wrapping, quantised bases, saving, merging, export and regularisers are the same for
all of them.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from peft import PeftConfig, PeftType
from torch import Tensor

from ..files import replacing
from ..spectral import LowRank
from . import arguments, experts, typed
from .registry import methods as methods
from .registry import register, warn_of_reader
from .site import Needs, Site, Start
from .typed import choice as choice
from .typed import require as require


@dataclass(repr=False)
class SpectralConfig(arguments.Checked, PeftConfig):
    """The fields that every method of the family has. Use a subclass, such as `KaSAConfig`.

    Args:
        r: the rank k of `trained`, 1 <= r <= min(m, n) of each target. None: min(m, n).
        alpha: the update is scaled by s = alpha / r. None: the method's own scale.
        use_rslora: s = alpha / sqrt(r) instead (arXiv:2312.03732).
        dropout: probability of dropping an input of the update, 0 <= dropout < 1. What leaves the base is not dropped,
            unless it is the start: then the model still begins exactly at the base model.
        target_modules: names, a regular expression, or "all-linear". None: PEFT's defaults for the architecture.
        exclude_modules: names, or a regular expression, of modules to leave alone.
        layers_to_transform: as in PEFT's LoraConfig.
        layers_pattern: as in PEFT's LoraConfig.
        rank_pattern: r by module name or regular expression, as in PEFT's LoraConfig.
        alpha_pattern: alpha, likewise.
        modules_to_save: further modules to train in full and to save.
        trainable_token_indices: as in PEFT's LoraConfig.
        ensure_weight_tying: as in PEFT's LoraConfig, for modules_to_save and trainable_token_indices.
        bias: which biases of the base learn, in place: "none", "all", or "peft_kasa_only", those of the targets. They
            stay changed when the adapter is switched off, unloaded or deleted, as in PEFT.
        target_parameters: names, or ends of names, of stacked experts: parameters (experts, out, in), or (experts, in,
            out), each expert of which is adapted. Patterns know them by the parameter's name. As in LoraConfig, the
            fields that choose modules do not choose here, and target_modules is [] for the experts alone.
        seed: random starts depend on this and on the module's name, on nothing else.
        regularize: whether the method's regulariser acts at each optimiser step.
        reduction: whether the regulariser is the "mean" or the "sum" over modules.
        save_frames: whether a checkpoint holds what is frozen, too. False: only what learns; the rest is computed from
            the base weight again at loading, and refused where that is another. None: the method's own way.
        rank_budget: how the ranks are chosen, before the start. None: r for all. "variance": r times the number of
            modules is given to the largest shares of all (EVA, arXiv:2410.07170), and a module without any is left out.
            A number 0 < t < 1: each module's smallest rank whose triples hold the share t. A dictionary: the ranks by
            module name, as in rank_pattern. What rank_pattern names keeps its rank, and takes no part. Shares are of
            the squared singular values of what the start comes from: the weight, its inputs or its gradient.
        rank_spread: with a rank_budget, no module gets a rank above rank_spread * r.
        statistics: of the inputs or gradients, for methods that need them: what `calibrate` returned, or the path of
            its file. Not written to adapter_config.json.
        init_weights: False adds noise to the start, so that it is not the identity (PEFT's tests use it).
        method: the method's name, written to adapter_config.json. Leave it alone.

    Raises:
        ValueError: for a value of another type or out of range. TypeError: for an unknown argument.
    """

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""  # its arXiv number, for the model card
    default_scale: ClassVar[float] = 1.0
    needs: ClassVar[Needs] = ""  # what the start asks of data
    compact: ClassVar[bool] = False  # what save_frames=None means is its opposite

    r: int | None = 8
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
    ensure_weight_tying: bool = False
    bias: Literal["none", "all", "peft_kasa_only"] = "none"
    target_parameters: list[str] | None = None
    seed: int = 0
    regularize: bool = True
    reduction: Literal["mean", "sum"] = "mean"
    save_frames: bool | None = None
    rank_budget: Any = None
    rank_spread: float = 2.0
    statistics: Any = field(default=None, compare=False)
    init_weights: bool = True
    method: str = ""

    # Set where a config was read from a file: its slots then wait for the file's values (adapter/filling.py).
    from_file: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__dict__.get("name"):  # not an inherited one: a subclass without its own is no method by itself
            register(cls)

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
        typed.check_after(self._check, self)

    def _check(self) -> None:
        self._check_budget()
        for rank in (self.r, *self.rank_pattern.values()):
            require(rank is None or (type(rank) is int and rank >= 1), "r has to be a whole number of at least 1", rank)
        require(0 <= self.dropout < 1, "dropout has to be 0 <= dropout < 1", self.dropout)
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            number = isinstance(alpha, int | float) and 0 < alpha < math.inf
            require(alpha is None or number, "alpha has to be a finite number above 0", alpha)
        frames = "save_frames has to be True: what comes from data cannot be computed again at loading"
        require(not self.needs or self.keeps_frames, frames, self.save_frames)
        ignored = self.use_rslora and self.alpha is None and not self.alpha_pattern
        require(not ignored, "use_rslora needs alpha (without it the scale is the method's own)", self.alpha)
        require(self.reduction in ("mean", "sum"), "reduction has to be 'mean' or 'sum'", self.reduction)
        choice("bias", self.bias, ("none", "all", "peft_kasa_only"))
        self._check_targets()

    def _check_targets(self) -> None:
        if isinstance(self.target_modules, str):  # "all-linear" too: PEFT puts full names for it, and takes them all
            layered = self.layers_to_transform is not None or self.layers_pattern is not None
            require(not layered, "layers_to_transform needs target_modules as a list", self.target_modules)
        alone = bool(self.layers_pattern) and self.layers_to_transform is None
        require(not alone, "layers_pattern needs layers_to_transform, the numbers of the layers", self.layers_pattern)
        if refused := experts.refusal(self):
            require(False, *refused)

    def _check_budget(self) -> None:
        budget = self.rank_budget
        if isinstance(budget, dict):
            self.rank_pattern, self.rank_budget = {**self.rank_pattern, **budget}, None
            return
        known = budget in (None, "variance") or (isinstance(budget, float) and 0 < budget < 1)
        rule = "rank_budget has to be None, 'variance', a share between 0 and 1, or ranks by module name"
        require(known, rule, budget)
        require(budget != "variance" or self.r is not None, "rank_budget='variance' needs r, the mean rank", self.r)
        require(self.rank_spread >= 1, "rank_spread has to be at least 1", self.rank_spread)

    def scale(self, rank: int, alpha: float | None) -> float:
        """s for a module of this rank and alpha (after the patterns)."""
        if alpha is None:
            return self.default_scale
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    @property
    def source(self) -> str:
        """What the start is made of, in a few words: for tables."""
        return ""

    def start(self, site: Site) -> Start:
        """Where the method begins at one weight. May not branch on values: it also runs on the meta device."""
        raise NotImplementedError(f"{type(self).__name__} has to define `start`.")

    def caution(self, m: int, n: int, rank: int) -> str:
        """What to warn of where an adapter of this rank is about to start at a weight (m, n), if anything."""
        return ""

    def core(self, raw: Tensor, fixed: Tensor | None, size: int) -> Tensor:
        """The core (k,) or (k, k), k = size, of what learns in its place and of `Start.fixed`. The same, by default."""
        return raw

    @property
    def shapes_core(self) -> bool:
        """Whether the core is a function of what learns."""
        return type(self).core is not SpectralConfig.core

    @property
    def averages(self) -> bool:
        """Whether the core is linear in what learns, so that a mean of cores is the core of the mean."""
        return not self.shapes_core

    @property
    def keeps_frames(self) -> bool:
        """Whether a checkpoint of this config holds what is frozen."""
        return not self.compact if self.save_frames is None else self.save_frames

    def shares(self, site: Site, k: int) -> Tensor:
        """What each of the k largest triples of the start's source holds of the whole, (k,): see `rank_budget`."""
        if self.needs == "inputs" or self.needs == "scaled inputs":
            return site.inputs.axes(k, site.engine, centred=self.needs == "inputs").explained
        source = site.gradient if self.needs else site.weight
        return site.svd(k, of=source).s.double().square() / source.double().square().sum().clamp_min(1e-300)

    def penalty(self, trained: LowRank) -> Tensor | float:
        """The regulariser of one module, before its reduction. 0.0: the method has none."""
        return 0.0

    @property
    def regularizes(self) -> bool:
        """Whether this config has a regulariser and it is switched on."""
        return self.regularize and type(self).penalty is not SpectralConfig.penalty

    @property
    def beyond(self) -> list[str]:
        """What is trained besides the updates of the target modules, in words."""
        tokens = ["token embeddings"] if self.trainable_token_indices else []
        return sorted(set(self.modules_to_save or [])) + tokens + (["biases"] if self.bias != "none" else [])

    def to_dict(self) -> dict[str, Any]:
        """The fields as adapter_config.json holds them: sets become sorted lists, so that a file is reproducible."""
        fields = super().to_dict()
        del fields["statistics"]
        if fields["modules_to_save"]:  # PEFT appends a task's heads at every load
            fields["modules_to_save"] = list(dict.fromkeys(fields["modules_to_save"]))
        return {key: sorted(value) if isinstance(value, set) else value for key, value in fields.items()}

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Writes adapter_config.json whole or not at all."""
        warn_of_reader(self)
        with replacing(os.path.join(save_directory, "adapter_config.json")) as folder:
            super().save_pretrained(folder, **kwargs)

    def __repr__(self) -> str:
        shown = {key: value for key, value in vars(self).items() if key in type(self).__dataclass_fields__}
        defaults = {key: spec.default for key, spec in type(self).__dataclass_fields__.items()}
        hidden = {"method", "peft_type", "peft_version", "auto_mapping"}
        parts = (f"{k}={v!r}" for k, v in shown.items() if k not in hidden and v != defaults[k] and v != {})
        return f"{type(self).__name__}({', '.join(parts)})"
