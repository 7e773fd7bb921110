"""The disk cache: whole entries or none, damaged and foreign files, several processes."""

from __future__ import annotations

import itertools
import logging
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from caching import KEY, NOTE, OTHER, key, load, normal, path_of, random_cut, same
from safetensors import safe_open
from safetensors.torch import save_file

from peft_kasa.spectral import Engine, Spectrum, cache
from peft_kasa.spectral.cache import Cache, entries


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A folder with one entry, KEY."""
    Cache(tmp_path).store(KEY, random_cut(), 0.5, NOTE)
    return tmp_path


# Entries --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["top", "bottom"])
@pytest.mark.parametrize("shape", [(1, 1), (9, 4), (4, 9), (7, 7)], ids=str)
def test_what_is_loaded_is_what_was_stored(tmp_path: Path, shape: tuple[int, int], end: Any) -> None:
    w = normal(*shape)
    for k in range(min(shape) + 1):
        cut = Engine()(w, k, end)
        name = key(w, k=k)
        assert Cache(tmp_path).load(name, shape=shape, k=k) is None
        Cache(tmp_path).store(name, cut, k / 3, {"end": end})
        loaded = Cache(tmp_path).load(name, shape=shape, k=k)
        assert loaded is not None
        assert same(loaded[0], cut)
        assert loaded[1] == k / 3


def test_every_bit_of_triples_comes_back(tmp_path: Path) -> None:
    odd = torch.tensor([[-0.0, 1e-45], [float("nan"), float("-inf")]])
    cut = Spectrum(odd, torch.tensor([3e38, 0.1]), odd.T)
    Cache(tmp_path).store(KEY, cut, float("inf"), {})
    loaded = load(tmp_path, shape=(2, 2))
    assert loaded is not None
    assert same(loaded[0], cut)
    assert loaded[1] == float("inf")


def test_views_of_one_storage_and_parameters_are_stored(tmp_path: Path) -> None:
    whole = normal(8, 8).requires_grad_()
    cut = Spectrum(whole[:6, ::4], whole[0, :2], whole.T[:2, :5])
    Cache(tmp_path).store(KEY, cut, 0.0, {})
    loaded = load(tmp_path)
    assert loaded is not None
    assert same(loaded[0], cut)
    assert not any(part.requires_grad for part in loaded[0])


def test_entries_pass_under_a_meta_device(tmp_path: Path) -> None:
    cut = random_cut()
    with torch.device("meta"):
        Cache(tmp_path).store(KEY, cut, 0.0, NOTE)
        loaded = load(tmp_path)
    assert loaded is not None
    assert same(loaded[0], cut)


def test_what_is_loaded_is_no_map_of_the_file(stored: Path) -> None:
    loaded = load(stored)
    assert loaded is not None
    with path_of(stored).open("r+b") as file:
        file.write(b"\0" * path_of(stored).stat().st_size)
    assert same(loaded[0], random_cut())


def test_a_later_entry_takes_the_place_of_an_earlier_one(stored: Path) -> None:
    Cache(stored).store(KEY, random_cut(seed=5), 0.25, NOTE)
    loaded = load(stored)
    assert loaded is not None
    assert same(loaded[0], random_cut(seed=5))
    assert [path.name for path in stored.iterdir()] == [path_of(stored).name]


# Entries that are not to be used --------------------------------------------------------------------------------


def ignored_and_rewritten(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger=cache.__name__):
        assert load(folder) is None
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert KEY in caplog.text
    Cache(folder).store(KEY, random_cut(), 0.5, NOTE)
    loaded = load(folder)
    assert loaded is not None
    assert same(loaded[0], random_cut())


def test_no_entry_is_not_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert load(tmp_path) is None
        assert load(tmp_path / "missing") is None
    assert not caplog.records


def test_a_flipped_bit_anywhere_is_noticed(stored: Path) -> None:
    whole = path_of(stored).read_bytes()
    for place, bit in itertools.product(range(len(whole)), (0, 5)):
        path_of(stored).write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
        assert load(stored) is None, (place, bit)
        entries(stored)
    path_of(stored).write_bytes(whole)
    assert load(stored) is not None


def test_a_cut_anywhere_is_noticed(stored: Path) -> None:
    whole = path_of(stored).read_bytes()
    for length in range(0, len(whole), 3):
        path_of(stored).write_bytes(whole[:length])
        assert load(stored) is None
        entries(stored)
    path_of(stored).write_bytes(whole + b"\0")
    assert load(stored) is None


DAMAGE: dict[str, Any] = {
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "flipped": lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])),
    "zeros": lambda path: path.write_bytes(b"\0" * 500),
    "a large number first": lambda path: path.write_bytes(b"\xff" * 500),
    "text": lambda path: path.write_text("not an entry"),
    "no metadata": lambda path: save_file(random_cut()._asdict(), path),
    "other metadata": lambda path: save_file(random_cut()._asdict(), path, {"format": "pt"}),
    "other tensors": lambda path: save_file({"w": torch.ones(2)}, path, {"key": KEY}),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_and_foreign_files_are_ignored_and_rewritten(
    stored: Path, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    damage(path_of(stored))
    ignored_and_rewritten(stored, caplog)


def test_an_entry_under_another_key_is_ignored_and_rewritten(stored: Path, caplog: pytest.LogCaptureFixture) -> None:
    Cache(stored).store(OTHER, random_cut(seed=9), 0.5, NOTE)
    path_of(stored, OTHER).replace(path_of(stored))
    ignored_and_rewritten(stored, caplog)


@pytest.mark.parametrize(("shape", "k"), [((7, 5), 2), ((6, 4), 2), ((5, 6), 2), ((6, 5), 1), ((6, 5), 3)], ids=str)
def test_an_entry_of_another_size_is_ignored_and_rewritten(
    tmp_path: Path, shape: tuple[int, int], k: int, caplog: pytest.LogCaptureFixture
) -> None:
    Cache(tmp_path).store(KEY, random_cut(*shape, k), 0.5, NOTE)
    ignored_and_rewritten(tmp_path, caplog)


@pytest.mark.parametrize("change", [{"error": "0.25"}, {"end": "bottom"}, {"new": "text"}], ids=str)
def test_the_checksum_covers_what_is_told_of_the_triples(stored: Path, change: dict[str, str]) -> None:
    with safe_open(path_of(stored), framework="pt") as file:
        about = file.metadata()
    save_file(random_cut()._asdict(), path_of(stored), about)
    assert load(stored) is not None
    save_file(random_cut()._asdict(), path_of(stored), {**about, **change})
    assert load(stored) is None


# Several processes ----------------------------------------------------------------------------------------------

WRITER = """
import logging, sys, types
import torch
for name in ("peft_kasa", "peft_kasa.spectral"):  # without what they import, PEFT for one, which takes seconds
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [sys.argv[1] + name.removeprefix("peft_kasa").replace(".", "/")]
from peft_kasa.spectral.cache import Cache
from peft_kasa.spectral.spectrum import Spectrum

logging.basicConfig(level=logging.INFO)
cache, me = Cache(sys.argv[2]), int(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
for turn in range(30):
    value = 100.0 * me + turn
    for name, loads in (("f" * 32, 10), (str(me) * 32, 1)):
        cut = Spectrum(torch.full((300, 4), value), torch.full((4,), value), torch.full((4, 200), value))
        cache.store(name, cut, value, {})
        for _ in range(loads):
            loaded = cache.load(name, (300, 200), 4)
            assert loaded is not None
            assert all((part == loaded[1]).all() for part in loaded[0])
"""


def test_processes_that_store_at_once_leave_whole_entries(tmp_path: Path) -> None:
    package = str(Path(cache.__file__).parents[1])
    start = [sys.executable, "-c", WRITER, package, str(tmp_path)]
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    writers: list[Any] = [subprocess.Popen([*start, str(me)], text=True, **pipes) for me in (1, 2, 3)]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    while any(writer.poll() is None for writer in writers):
        assert all(len(entry.key) == 32 for entry in entries(tmp_path))
        time.sleep(0.01)
    for writer in writers:
        assert (writer.communicate()[1], writer.returncode) == ("", 0)  # nothing was logged
    names = ["1" * 32, "2" * 32, "3" * 32, OTHER]
    assert sorted(tmp_path.iterdir()) == [path_of(tmp_path, name) for name in names]
    for name in names:
        loaded = load(tmp_path, name, (300, 200), 4)
        assert loaded is not None
        assert loaded[1] % 100 == 29


def test_threads_share_a_cache(tmp_path: Path) -> None:
    """As those of a sweep do."""
    weights = [normal(20, 30, seed=seed) for seed in range(4)]
    expected = [key(w) for w in weights]

    def run(turn: int) -> bool:
        name = Cache(tmp_path).key(weights[turn % 4], {})
        Cache(tmp_path).store(name, random_cut(seed=turn % 4), turn, {})
        loaded = load(tmp_path, name)
        return name == expected[turn % 4] and loaded is not None and same(loaded[0], random_cut(seed=turn % 4))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(100)))
    assert sorted(tmp_path.iterdir()) == sorted(path_of(tmp_path, name) for name in expected)
