"""Decompositions kept on disk, off by default: one safetensors file for each weight and its settings."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load, save
from torch import Tensor

from ..files import replacing
from .checksum import checksum
from .spectrum import Spectrum

logger = logging.getLogger(__name__)

VERSION = 1  # of the algorithms; another number gives other keys, so that old entries are not found
STALE = 3600.0  # seconds after which a writer's temporary folder is taken for abandoned
SUFFIX = ".kasa.safetensors"
NAME = re.compile(rf"(\.?)[0-9a-f]{{32}}{re.escape(SUFFIX)}(.*)")
Where = str | os.PathLike[str] | bool | None
failures: dict[Path, OSError] = {}  # the first of each folder that an entry could not be written to


class Cache:
    """A folder of decompositions, for several processes at once. Where the disk fails it is as if it were empty.

    Examples:
        >>> import tempfile, torch
        >>> from peft_kasa.spectral import Engine
        >>> from peft_kasa.spectral.cache import Cache, clear, entries
        >>> cache, weight = Cache(tempfile.mkdtemp()), torch.diag(torch.tensor([16.0, 4.0, 1.0]))
        >>> key = cache.key(weight, {"k": 2, "end": "top", "algorithm": "gram"})
        >>> cache.load(key, shape=(3, 3), k=2) is None
        True
        >>> cache.store(key, Engine()(weight, 2), 0.0, {"end": "top", "algorithm": "gram"})
        >>> cut, error = cache.load(key, shape=(3, 3), k=2)
        >>> cut.s.tolist(), error
        ([16.0, 4.0], 0.0)
        >>> entries(cache.folder)  # doctest: +ELLIPSIS
        [Entry(top 2 of 3 x 3 by gram, error 0.0e+00, 0.0 MB, ...)]
        >>> clear(cache.folder)
        1
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(os.path.abspath(folder))

    def key(self, w: Tensor, settings: Mapping[str, object]) -> str:
        """32 hexadecimal digits for a weight (m, n) and all that its decomposition depends on.

        They count every entry and its place, the shape, the dtype, `VERSION`, and each setting by its `repr`.
        Strides and device do not count: name the device in the settings where it matters.
        """
        texts = {name: repr(value) for name, value in settings.items()}
        return _digest(VERSION, checksum(w), list(w.shape), str(w.dtype), texts)

    def load(self, key: str, shape: tuple[int, int], k: int) -> tuple[Spectrum, float] | None:
        """The k triples of a weight (m, n), on the CPU, and the error stored with them.

        None where there is no entry, or where it is damaged or another's, which is logged. Never raises.
        """
        path = self.folder / f"{key}{SUFFIX}"
        if not os.path.exists(path):
            return None
        try:
            data = path.read_bytes()  # `safe_open` opens a file twice, while others may replace it, and maps it
            cut, about = Spectrum(**load(data)), _about(data)
            found = _entry(path, about)
            if (found.key, found.shape, found.k, about["checksum"]) != (key, tuple(shape), k, _seal(cut, about)):
                raise ValueError(f"damaged, or not the {k} triples of {key}: {about}")
            return cut, found.error
        except Exception as problem:  # damaged bytes raise whatever their reader stumbles on
            logger.info("ignoring the cached decomposition %s: %s", path, problem)
            return None

    def store(self, key: str, cut: Spectrum, error: float, note: Mapping[str, str]) -> None:
        """Writes triples, on any device, and their error: whole or not at all, in the place of an older entry.

        Of the texts in `note`, `entries` shows `end` and `algorithm`. Where the disk fails, this is warned of once.
        """
        cut = Spectrum(*(part.detach().cpu().clone(memory_format=torch.contiguous_format) for part in cut))
        facts = {"key": key, "shape": json.dumps([len(cut.u), cut.v.shape[1]]), "k": str(len(cut.s))}
        about = {**note, **facts, "error": repr(float(error)), "created": repr(time.time())}
        data = save(cut._asdict(), {**about, "checksum": _seal(cut, about)})
        try:
            with replacing(self.folder / f"{key}{SUFFIX}") as fresh:
                Path(fresh, f"{key}{SUFFIX}").write_bytes(data)
        except OSError as problem:
            if self.folder not in failures:
                failures[self.folder] = problem
                logger.warning("no decompositions can be cached in %s, going on without: %s", self.folder, problem)

    def __repr__(self) -> str:
        return f"Cache({str(self.folder)!r})"


class Entry(NamedTuple):
    """What `entries` tells of a decomposition on disk."""

    key: str
    shape: tuple[int, int]  # (m, n) of the weight
    k: int
    end: str  # "top" or "bottom"; like `algorithm`, "" where the note had none
    algorithm: str
    error: float
    bytes: int  # of the file
    path: Path
    created: float  # seconds since 1970, UTC

    def __repr__(self) -> str:
        what = f"{self.end} {self.k} of {self.shape[0]} x {self.shape[1]} by {self.algorithm or '?'}".lstrip()
        size, when = f"{self.bytes / 1e6:.1f} MB", time.strftime("%Y-%m-%d %H:%M", time.gmtime(self.created))
        return f"Entry({what}, error {self.error:.1e}, {size}, {when}, {self.key[:8]})"


def located(where: Where = None) -> Cache | None:
    """The cache in a folder, or None for no cache.

    Args:
        where: a folder; `False` for none; `True` for `peft_kasa/decompositions` in `$XDG_CACHE_HOME` or `~/.cache`.
            `None` asks the environment variable `PEFT_KASA_CACHE`: a folder, "1" or "true"; unset, empty, "0" or
            "false" for none.

    Examples:
        >>> from peft_kasa.spectral.cache import located
        >>> located("decompositions").folder.name, located(False)
        ('decompositions', None)
    """
    if where is None:
        value = os.environ.get("PEFT_KASA_CACHE", "").strip()
        where = {"0": False, "false": False, "1": True, "true": True}.get(value.lower(), value)
    if where is True:
        where = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "peft_kasa", "decompositions")
    return Cache(os.path.expanduser(where)) if where else None


def entries(where: Where = None) -> list[Entry]:
    """The entries of a cache, oldest first, by their headers alone. Those that cannot be read are left out.

    `where` is as in `located`, but `None` means the default folder where the environment names none.

    Examples:
        >>> from peft_kasa.spectral.cache import entries
        >>> entries("/nowhere")
        []
    """
    found = []
    for path in [path for path, abandoned in _ours(where) if not abandoned]:
        try:
            with path.open("rb") as file:
                found.append(_entry(path, _about(file.read(1 << 20))))
        except Exception as problem:  # as in `load`
            logger.info("leaving out %s: %s", path, problem)
    return sorted(found, key=lambda entry: entry.created)


def clear(where: Where = None) -> int:
    """Removes a cache's entries, damaged ones too, and what writers left that died over an hour ago. Counts them.

    `where` is as in `entries`. Other files stay, and so does the folder. Raises OSError where one cannot be removed.

    Examples:
        >>> from peft_kasa.spectral.cache import clear
        >>> clear("/nowhere")
        0
    """
    ours = list(_ours(where))
    for path, abandoned in ours:
        shutil.rmtree(path) if abandoned else path.unlink(missing_ok=True)
    return len(ours)


def _ours(where: Where) -> Iterator[tuple[Path, bool]]:
    """Entries, and the temporary folders that were abandoned (True)."""
    cache = located(where) or (located(True) if where is None else None)
    for path in sorted(cache.folder.iterdir()) if cache and cache.folder.is_dir() else ():
        if match := NAME.fullmatch(path.name):
            with suppress(FileNotFoundError):  # a writer's folder goes when it is done
                if not any(match.groups()) and path.is_file():
                    yield path, False
                elif all(match.groups()) and path.is_dir() and time.time() - path.stat().st_mtime > STALE:
                    yield path, True


def _about(data: bytes) -> dict[str, str]:
    """The metadata of a safetensors file, from its first bytes."""
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]


def _entry(path: Path, about: Mapping[str, str]) -> Entry:
    (m, n), k, size = json.loads(about["shape"]), int(about["k"]), path.stat().st_size
    told = about.get("end", ""), about.get("algorithm", ""), float(about["error"])
    return Entry(about["key"], (m, n), k, *told, size, path, float(about["created"]))


def _seal(cut: Spectrum, about: Mapping[str, str]) -> str:
    told = {name: text for name, text in about.items() if name != "checksum"}
    return _digest(told, [(str(part.dtype), list(part.shape), checksum(part)) for part in cut])


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
