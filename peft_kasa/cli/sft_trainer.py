"""TRL's trainer, which leaves whole checkpoints and whole results alone."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import SFTTrainer

from peft_kasa_cli.interrupts import finishing

from ..files import temporary_folder

CARD = "README.md"


class WholeSFTTrainer(SFTTrainer):
    """Ctrl-C waits until a checkpoint, or the result, is written. A second one, or an error, drops what was begun."""

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        checkpoint = Path(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        writes = self.args.should_save
        with finishing():
            if writes:  # or an older one of this name would seem to be whole while it is written over
                (checkpoint / TRAINER_STATE_NAME).unlink(missing_ok=True)
            try:
                super()._save_checkpoint(*args, **kwargs)
            except BaseException:
                if writes and not is_whole(checkpoint):
                    shutil.rmtree(checkpoint, ignore_errors=True)
                raise

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Writes adapter, tokenizer and card into a folder beside, and then moves them into their place."""
        target = Path(output_dir or self.args.output_dir)
        if not self.args.should_save:
            super()._save(str(target), state_dict)
            return
        target.mkdir(parents=True, exist_ok=True)
        with finishing(), temporary_folder(str(target), ".saving.") as beside:
            made = Path(beside, target.resolve().name)  # a new card has the folder's name for its title
            made.mkdir()
            if (target / CARD).is_file():  # what users wrote there is kept
                shutil.copy(target / CARD, made)
            super()._save(str(made), state_dict)
            _move(made, target)


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint has all that Trainer writes: its own state comes last."""
    try:
        TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    except (OSError, ValueError):
        return False
    return True


def _move(made: Path, target: Path) -> None:
    """Puts every file of a folder into the place of the one of its name."""
    for path in sorted(made.rglob("*")):
        place = target / path.relative_to(made)
        if path.is_dir():
            place.mkdir(exist_ok=True)
        else:
            os.replace(path, place)
