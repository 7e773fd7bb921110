"""The options of `peft-kasa sft` that are ours, as TRL's parser takes them: a dataclass beside TRL's own."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from ..methods.method import SpectralConfig
from .configs import build_config


@dataclass
class AdapterArguments:
    """Which method of the family is trained, and how it is set up."""

    _argument_group_name = "adapter"

    method: str = field(default="kasa", metadata={"help": "see `peft-kasa methods`"})
    r: int | None = field(default=None, metadata={"help": "the rank (default: the method's own)"})
    alpha: float | None = field(default=None, metadata={"help": "the scale is alpha / r (default: the method's own)"})
    dropout: float | None = field(default=None, metadata={"help": "of the update's inputs"})
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"], metadata={"help": "names of modules"})
    exclude_modules: list[str] | None = field(default=None, metadata={"help": "names of modules to leave alone"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "further modules to train in full"})
    options: list[str] = field(
        default_factory=list,
        metadata={"help": "NAME=VALUE ...: further arguments of the method, see `peft-kasa methods METHOD`"},
    )
    statistics: str | None = field(
        default=None, metadata={"help": "a file of `calibrate`, made if need be, for methods that start from data"}
    )
    overwrite: bool = field(
        default=False, metadata={"help": "write into output_dir although it holds an adapter, a model or checkpoints"}
    )
    calibration_samples: int = field(default=256, metadata={"help": "rows of the training data that it is made from"})

    def config(self, use_rslora: bool = False) -> SpectralConfig:
        """The method's config.

        Raises:
            ValueError: an unknown method or argument, or a value that does not fit it.
        """
        targets = "all-linear" if self.target_modules == ["all-linear"] else self.target_modules
        given: dict[str, Any] = {name: getattr(self, name) for name in ("r", "alpha", "dropout", "exclude_modules")}
        given |= {"target_modules": targets, "modules_to_save": self.modules_to_save, "task_type": "CAUSAL_LM"}
        given["use_rslora"] = use_rslora or None
        return build_config(self.method, given, self.options)


def parsed(parser: Any, words: list[str]) -> Any:
    """What TRL's parser makes of a command line: its dataclasses, and the words that none of them takes.

    Raises:
        ValueError: options that do not go together; of bf16, TRL's default, in the terms of the command.
    """
    try:
        return parser.parse_args_and_config(words, return_remaining_strings=True)
    except ValueError as error:
        if "bf16/gpu" not in str(error):
            raise
        raise ValueError(
            "Training is in bf16 by default, and no GPU here can do that. Pass --use_cpu --bf16 False to train on the "
            "CPU, or --bf16 False for an older GPU."
        ) from error


def check_no_lora(arguments: Any) -> None:
    """Raises ValueError where TRL's own options of a LoRA were given: they would be ignored."""
    for known in fields(arguments):
        default = known.default if known.default is not MISSING else known.default_factory()  # type: ignore[misc, operator]
        ours = known.name.startswith("lora_") or known.name in ("use_peft", "use_dora")
        if ours and getattr(arguments, known.name) != default:
            raise ValueError(
                f"--{known.name} is of TRL's LoRA, which is not trained here. Use --method, --r, --alpha, --dropout, "
                "--target_modules, --modules_to_save and --options."
            )
