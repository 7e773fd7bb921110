"""Statistics in a safetensors file, written and read one module at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...files import replacing
from ...methods.site import Needs
from ...spectral.covariance import Covariance
from ..base.fingerprint import SIDE

Value: TypeAlias = Covariance | Tensor  # of gradients: their sum over all sequences
Where: TypeAlias = str | os.PathLike[str]

FORMAT = "peft_kasa statistics 1"
DTYPES = {torch.float32: "F32", torch.float64: "F64"}
Part: TypeAlias = tuple[torch.dtype, tuple[int, ...], Callable[[], Tensor]]


@dataclass(frozen=True)
class About:
    """What was done, besides its outcome."""

    kind: Needs
    seen: int  # sequences
    complete: bool  # False: it was interrupted
    digest: str  # of the sequences, in their order
    labels_only: bool
    targets: tuple[str, ...]  # modules, some of which may have seen nothing
    sketches: Mapping[str, Tensor]  # by module: of the base weight (see fingerprint.py)


def write(
    path: Where,
    about: About,
    index: Mapping[str, int],
    groups: Mapping[int, tuple[tuple[int, ...], Callable[[], Value]]],
) -> None:
    """Writes a file, whole or not at all. `groups` has the shape, and what makes the value, of each group."""
    metadata, sketches = _metadata(about, index), _sketches(about)
    tensors: dict[str, Part] = {"sketches": (torch.float32, tuple(sketches.shape), lambda: sketches)}
    for group, (shape, value) in groups.items():
        tensors |= _parts(group, shape, value)
    with replacing(path) as folder:
        _stream(os.path.join(folder, os.path.basename(path)), tensors, metadata)


def head(path: Where) -> tuple[About, dict[str, int]]:
    """What was done, and the group of each module."""
    with _opened(path) as file:
        found = file.metadata() or {}
        if found.get("format") != FORMAT:
            raise ValueError(
                f"{path} holds no statistics of this version ({FORMAT!r}). Found {found.get('format')!r}: give the "
                "file that calibrate wrote, or another `path` to write one."
            )
        about, index = _about(found, file.get_tensor("sketches")), json.loads(found["modules"])
        _need(type(index) is dict and all(type(group) is int for group in index.values()), "modules")
        keys = {"sketches"} | {key for group in index.values() for key in _keys(group, about.kind)}
        if missing := keys - set(file.keys()):
            raise KeyError(sorted(missing)[0])
        return about, index


def read(path: str, group: int, about: About, index: Mapping[str, int]) -> Value:
    """The value of one group. Takes its own size, and a covariance half as much again.

    Raises:
        ValueError: damaged, or written anew since `head` has found this `about` and `index` in it.
    """
    kind = about.kind
    with _opened(path) as file:
        _check_same(path, file, about, index)
        sizes = [tuple(file.get_slice(key).get_shape()) for key in _keys(group, kind)]
        _need(_consistent(sizes), f"shapes {sizes} of group {group}")  # before anything of these sizes is made
        first, *rest = (file.get_tensor(key) for key in _keys(group, kind))
    if not all(torch.isfinite(part).all() for part in (first, *rest)):
        raise ValueError(f"{path} has NaN or infinite entries. Calibrate again, into another `path`.")
    if not rest:
        return first
    found = Covariance(len(rest[0]))
    found.mean, found.count = rest[0], rest[1].item()
    found.triangle.unpack(first)
    return found


def shape(path: str, group: int, kind: str) -> tuple[int, ...]:
    """(n,) of a covariance, (m, n) of a gradient."""
    with _opened(path) as file:
        return tuple(file.get_slice(_keys(group, kind)[kind != "gradients"]).get_shape())


def _metadata(about: About, index: Mapping[str, int]) -> dict[str, str]:
    return {
        "format": FORMAT,
        "kind": about.kind,
        "seen": str(about.seen),
        "complete": json.dumps(about.complete),
        "digest": about.digest,
        "labels_only": json.dumps(about.labels_only),
        "targets": json.dumps(about.targets),
        "modules": json.dumps(index),
    }


def _sketches(about: About) -> Tensor:
    """Of all targets, stacked: NaN for those that have none."""
    blank = torch.full((SIDE, SIDE), torch.nan)
    return torch.stack([about.sketches.get(name, blank) for name in about.targets])


def _check_same(path: str, file: Any, about: About, index: Mapping[str, int]) -> None:
    """Makes sure that a file is the one that was opened: its groups are found by number."""
    found, known = (file.metadata() or {}), _metadata(about, index)
    same = all(found.get(name) == text for name, text in known.items() if name != "complete")
    if not (same and torch.equal(file.get_tensor("sketches").nan_to_num(), _sketches(about).nan_to_num())):
        raise ValueError(
            f"{path} has been written anew since these statistics were opened. Set the config's `statistics` again, to "
            "this path or to what calibrate returned, or give each calibration a `path` of its own."
        )


def _about(found: Mapping[str, str], sketches: Tensor) -> About:
    """What the metadata say, which anyone may have written."""
    complete, labels_only, seen, targets = (
        json.loads(found[name]) for name in ("complete", "labels_only", "seen", "targets")
    )
    _need(type(complete) is bool and type(labels_only) is bool and type(seen) is int and seen >= 0, "flags or counts")
    _need(found["kind"] in get_args(Needs)[1:], "kind")
    _need(type(targets) is list and all(type(name) is str for name in targets), "targets")
    _need(tuple(sketches.shape) == (len(targets), SIDE, SIDE), "sketches")
    named = dict(zip(targets, sketches, strict=True))
    return About(found["kind"], seen, complete, found["digest"], labels_only, tuple(targets), named)  # type: ignore[arg-type]


def _consistent(sizes: Sequence[tuple[int, ...]]) -> bool:
    """Whether these are the shapes of a gradient (m, n), or of a covariance: packed, mean (n,), count."""
    first, *rest = sizes
    if not rest:
        return len(first) == 2
    n = rest[0][0] if len(rest[0]) == 1 else 0
    return n > 0 and first == (n * (n + 1) // 2,) and rest[1] == ()


def _need(holds: bool, what: str) -> None:
    if not holds:
        raise TypeError(f"its {what} are not what calibrate writes")


def _keys(group: int, kind: str) -> list[str]:
    parts = ("sum",) if kind == "gradients" else ("scatter", "mean", "count")
    return [f"{group}.{part}" for part in parts]


def _parts(group: int, shape: tuple[int, ...], value: Callable[[], Any]) -> dict[str, Part]:
    if len(shape) == 2:
        return {f"{group}.sum": (torch.float32, shape, value)}
    (n,) = shape
    return {
        f"{group}.scatter": (torch.float64, (n * (n + 1) // 2,), lambda: value().triangle.packed()),
        f"{group}.mean": (torch.float64, (n,), lambda: value().mean),
        f"{group}.count": (torch.float64, (), lambda: torch.tensor(value().count, dtype=torch.float64)),
    }


def _stream(path: str, tensors: Mapping[str, Part], metadata: Mapping[str, str]) -> None:
    """The safetensors format: the length of a JSON header, the header, the tensors' bytes."""
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for key, (dtype, size, _) in tensors.items():
        end = offset + dtype.itemsize * torch.Size(size).numel()
        header[key] = {"dtype": DTYPES[dtype], "shape": size, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for dtype, size, value in tensors.values():
            part = value().detach().cpu().contiguous()
            if part.dtype != dtype or part.shape != size:
                raise RuntimeError(f"{part.dtype} {tuple(part.shape)} is not the {dtype} {size} of the header")
            file.write(part.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _opened(path: Where) -> Iterator[Any]:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There are no statistics at {path}. Give calibrate this `path` to write them.")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, KeyError, TypeError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is damaged or not a file of statistics ({os.path.getsize(path)} bytes: {error}). Delete it and "
            "calibrate again, or give another `path`."
        ) from error
