"""Whether a folder may be written, and writing it whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..files import check_writable, replacing


def check_free(out: str, overwrite: bool, *sources: str | None) -> None:
    """Makes sure, before any work, that a folder may be written, or replaced as a whole.

    Args:
        out: the folder.
        overwrite: whether it may hold an adapter or a model. Nothing else is ever replaced.
        sources: what is read. Neither it, nor a folder that holds it, nor one that holds the current one is replaced.

    Raises:
        ValueError: it may not.
    """
    path = Path(out)
    _check_apart(path, {source: f"what would be read ({source})" for source in sources if source})
    _check_apart(path, {os.getcwd(): "the folder that you work in"})
    _check_no_file(path)
    if path.is_dir() and any(path.iterdir()):
        if not overwrite:
            raise ValueError(f"{out} is there already, and not empty. Name another folder, or pass --overwrite.")
        if not holds_model(path):
            raise ValueError(
                f"{out} holds neither an adapter nor a model: --overwrite replaces nothing else. Name another folder."
            )
    check_writable(out)


def check_training(out: str, base: str, goes_on: bool) -> None:
    """Makes sure, before any work, that a training may write into a folder, beside what else it holds.

    Args:
        out: the folder.
        base: the model that is trained: never its own folder.
        goes_on: whether `out` may hold an adapter, a model or checkpoints.

    Raises:
        ValueError: it may not.
    """
    path = Path(out)
    _check_no_file(path)
    if path.exists() and os.path.exists(base) and path.samefile(base):
        raise ValueError(f"{out} is what would be read ({base}). Name another folder as --output_dir.")
    if not goes_on and (holds_model(path) or any(path.glob("checkpoint-*"))):
        raise ValueError(
            f"{out} holds a training's files already. Name another folder as --output_dir, go on with "
            "--resume_from_checkpoint, or pass --overwrite."
        )
    check_writable(out, inside=True)


def holds_model(path: Path) -> bool:
    """Whether `save_pretrained` of an adapter or of a model has written into a folder."""
    model = (path / "config.json").is_file() and any(path.glob("*.safetensors"))
    return model or (path / "adapter_config.json").is_file()


@contextmanager
def whole_folder(out: str, overwrite: bool) -> Iterator[str]:
    """Yields an empty folder, which takes the place of `out`, or of what `out` is a link to, at the end.

    An exception leaves what stood there.
    """
    check_free(out, overwrite)
    path = os.path.realpath(out)
    with replacing(path) as beside:
        made = os.path.join(beside, os.path.basename(path))
        os.mkdir(made)
        yield made


def size(folder: str) -> int:
    """The bytes of all files in a folder."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def _check_no_file(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file. Name a folder.")


def _check_apart(path: Path, others: dict[str, str]) -> None:
    """Refuses a folder that is one of these, or holds it."""
    for other, what in others.items():
        if not path.exists() or not os.path.exists(other):
            continue
        kept = Path(os.path.realpath(other))
        if any(path.samefile(folder) for folder in (kept, *kept.parents)):
            relation = "is" if path.samefile(kept) else "holds"
            raise ValueError(f"{path} {relation} {what}. Name another folder to write.")
