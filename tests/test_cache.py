"""The disk cache: keys that tell weights apart, whole entries or none, and a disk that may fail."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from peft_kasa.spectral import Engine, Spectrum, cache, checksum
from peft_kasa.spectral.cache import Cache, clear, entries, located

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
NOTE = {"end": "top", "algorithm": "gram"}
KEY = "0123456789abcdef" * 2
OTHER = "f" * 32
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def key(w: Tensor, **settings: object) -> str:
    return Cache("unused").key(w, settings)


def bits(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(BITS[x.element_size()])


def same(one: Spectrum, other: Spectrum) -> bool:
    return all(a.dtype == b.dtype and torch.equal(bits(a), bits(b)) for a, b in zip(one, other, strict=True))


def random_cut(m: int = 6, n: int = 5, k: int = 2, seed: int = 0) -> Spectrum:
    return Spectrum(normal(m, k, seed=seed), normal(k, seed=seed + 1), normal(k, n, seed=seed + 2))


def path_of(folder: Path, name: str = KEY) -> Path:
    return folder / f"{name}.kasa.safetensors"


def load(folder: Path, name: str = KEY, shape: tuple[int, int] = (6, 5), k: int = 2) -> tuple[Spectrum, float] | None:
    return Cache(folder).load(name, shape=shape, k=k)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of tens of entries are then summed in as many pieces as large ones."""
    monkeypatch.setattr(checksum, "LANES", 4)
    monkeypatch.setattr(checksum, "BLOCK", 64)


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A folder with one entry, KEY."""
    Cache(tmp_path).store(KEY, random_cut(), 0.5, NOTE)
    return tmp_path


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A default folder that is not the user's."""
    monkeypatch.delenv("PEFT_KASA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "peft_kasa" / "decompositions"


# Keys: the same -------------------------------------------------------------------------------------------------

VIEWS: dict[str, Any] = {
    "transposed": lambda w: w.T,
    "columns": lambda w: w[:, 1:6],
    "rows from an odd offset": lambda w: w[1:],
    "rows of an odd number": lambda w: w[:7, :3],
    "every other": lambda w: w[::2, ::3],
    "transposed columns": lambda w: w[:, 2:].T,
    "one row": lambda w: w[3:4],
    "one column": lambda w: w[:, 3:4],
    "expanded": lambda w: w[:1].expand(5, -1),
    "part of three dimensions": lambda w: w.view(3, 3, 7)[:, 1],
    "parameter": torch.nn.Parameter,
}


@each_dtype
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.usefixtures("small_pieces")
def test_a_view_has_the_key_of_its_copy(view: Any, dtype: torch.dtype) -> None:
    seen = view(normal(9, 7, dtype=dtype))
    assert key(seen) == key(seen.detach().clone(memory_format=torch.contiguous_format))


def test_a_view_of_many_pieces_has_the_key_of_its_copy() -> None:
    """Without smaller pieces."""
    w = normal(1000, 1011)
    assert w.numel() * 4 > 8 * 5 * checksum.LANES
    assert key(w.T) == key(w.T.contiguous()) != key(w)
    assert key(w[:, 5:]) == key(w[:, 5:].contiguous())


def test_a_key_is_the_same_tomorrow() -> None:
    """On every machine and torch: entries would be lost silently."""
    w = torch.arange(401 * 1001.0).view(401, 1001)
    assert key(w, k=2, end="top", tolerance=1e-9) == "8e88ed89040efa595c4dfb20b3997595"


def test_a_key_does_not_depend_on_the_order_of_settings() -> None:
    assert key(normal(3, 4), k=1, end="top") == key(normal(3, 4), end="top", k=1)


def test_keys_are_made_under_any_mode_and_write_nothing() -> None:
    w = torch.nn.Parameter(normal(5, 6))
    expected = key(w)
    checksum._odd.cache_clear()
    with torch.inference_mode(), torch.device("meta"):
        assert key(w) == expected
        assert key(w.clone()) == expected
    assert key(w) == expected
    assert torch.equal(w, normal(5, 6))


def test_a_key_takes_one_thread_and_gives_the_others_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of short sums: to hand them between threads takes seconds on shared cores."""
    before, seen = torch.get_num_threads(), []
    words = checksum._words

    def watched(x: Tensor) -> Any:
        seen.append(torch.get_num_threads())
        return words(x)

    monkeypatch.setattr(checksum, "_words", watched)
    torch.set_num_threads(2)
    try:
        key(normal(5, 6))
        assert (seen, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(before)


def test_a_key_takes_little_memory() -> None:
    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
                self.bytes = max(self.bytes, out.untyped_storage().nbytes())
            return out

    whole = normal(4200, 1001)
    for w in (whole, whole.T, whole[:, 1:]):
        with Largest() as largest:
            key(w)
        assert 0 < largest.bytes <= checksum.BLOCK < whole.numel() * 4 / 2


# Keys: another --------------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.usefixtures("small_pieces")
def test_every_bit_of_every_entry_counts(dtype: torch.dtype) -> None:
    w = normal(5, 7, dtype=dtype)
    width = torch.finfo(dtype).bits
    found = {key(w)}
    for i, j, bit in itertools.product(range(5), range(7), range(width)):
        changed = w.clone()
        mask = 1 << bit if bit < width - 1 else -(1 << bit)
        changed.view(BITS[width // 8])[i, j] ^= mask
        found.add(key(changed))
    assert len(found) == 1 + 5 * 7 * width


@each_dtype
@pytest.mark.usefixtures("small_pieces")
def test_the_place_of_every_entry_counts(dtype: torch.dtype) -> None:
    w = torch.arange(1, 36).view(5, 7).to(dtype)
    found = {key(w)}
    for one, other in itertools.combinations(range(35), 2):
        swapped = w.clone().view(-1)
        swapped[[one, other]] = swapped[[other, one]]
        found.add(key(swapped.view(5, 7)))
    assert len(found) == 1 + 35 * 34 // 2


@each_dtype
@pytest.mark.usefixtures("small_pieces")
def test_pairs_of_signs_do_not_cancel(dtype: torch.dtype) -> None:
    """The highest bit is the one that sums modulo 2^64 lose first."""
    w = normal(5, 7, dtype=dtype)
    for start in (w, w.abs()):
        found = {key(start), key(-start)}
        for one, other in itertools.combinations(range(35), 2):
            changed = start.clone().view(-1)
            changed[[one, other]] *= -1
            found.add(key(changed.view(5, 7)))
        assert len(found) == 2 + 35 * 34 // 2


@each_dtype
@pytest.mark.usefixtures("small_pieces")
def test_weights_of_two_values_have_keys_of_their_own(dtype: torch.dtype) -> None:
    """Bits that differ in few places, in many entries."""
    some = torch.rand(300, 4, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    for one, other in ((1.0, -1.0), (0.0, -0.0), (0.0, 1.0), (0.0, 2.0), (1.0, 2.0)):
        weights = torch.where(some, one, other).to(dtype)
        assert len({key(w) for w in weights}) == len(some.view(300, 24).unique(dim=0))


def test_entries_count_far_inside_and_at_the_borders_of_pieces() -> None:
    """Without smaller pieces."""
    w = torch.zeros(900, 1001)
    found = {key(w)}
    edge = 2 * checksum.LANES
    for place in (0, 1, edge - 2, edge - 1, edge, edge + 1, 2 * edge, 3 * edge + 7, w.numel() - 2, w.numel() - 1):
        changed = w.clone()
        changed.view(-1)[place] = 1.0
        found.add(key(changed))
    assert len(found) == 11


@pytest.mark.usefixtures("small_pieces")
def test_arrangements_of_the_same_entries_have_keys_of_their_own() -> None:
    w = normal(8, 8)
    arranged = [w, w.T, w.flip(0), w.flip(1), w.roll(1, 0), w.roll(1, 1), w.view(4, 16), w.view(16, 4), w.view(1, 64)]
    assert len({key(x) for x in arranged}) == len(arranged)


def test_the_shape_and_the_dtype_count_where_the_bits_are_equal() -> None:
    zeros = [torch.zeros(shape) for shape in ((2, 6), (3, 4), (4, 3), (1, 12), (12, 1), (3, 5))]
    assert len({key(x) for x in zeros}) == len(zeros)
    assert len({key(torch.zeros(4, 4, dtype=dtype)) for dtype in DTYPES}) == len(DTYPES)


def test_each_setting_and_the_version_count(monkeypatch: pytest.MonkeyPatch) -> None:
    w = normal(3, 4)
    settings: list[dict[str, object]] = [
        {},
        {"k": 1},
        {"k": 1.0},
        {"k": "1"},
        {"k": True},
        {"k": 2},
        {"r": 1},
        {"k": 1, "end": "top"},
        {"k": 1, "end": "bottom"},
        {"k": 1, "end": None},
        {"k": "1, 'end': 'top'"},
        {"k": 1, "tolerance": 1e-9},
        {"k": 1, "tolerance": 1.0000000000000001e-9 * (1 + 2**-52)},
    ]
    found = {key(w, **each) for each in settings}
    monkeypatch.setattr(cache, "VERSION", cache.VERSION + 1)
    found |= {key(w, **each) for each in settings}
    assert len(found) == 2 * len(settings)


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


# A disk that fails ----------------------------------------------------------------------------------------------


def goes_on(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two stores warn once, and there is no entry."""
    for name in (KEY, OTHER):
        Cache(folder).store(name, random_cut(), 0.5, NOTE)
        assert load(folder, name) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(folder) in caplog.text


@pytest.mark.parametrize("below", [False, True])
def test_a_folder_that_is_a_file_is_warned_of(tmp_path: Path, below: bool, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    folder = file / "below" if below else file
    goes_on(folder, caplog)
    assert (entries(folder), clear(folder)) == ([], 0)
    assert file.read_text() == "mine"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="the system has no folder that nobody can write to")
def test_a_folder_that_cannot_be_made_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    goes_on(Path("/proc/self/peft_kasa"), caplog)


def test_a_full_disk_is_warned_of_and_nothing_is_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # files end after 100 bytes, as on a full disk
    try:
        goes_on(tmp_path, caplog)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EACCES])
def test_a_failure_leaves_the_older_entry(
    stored: Path, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        for seed in (5, 6):
            Cache(stored).store(KEY, random_cut(seed=seed), 0.5, NOTE)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    loaded = load(stored)
    assert loaded is not None
    assert same(loaded[0], random_cut())


def test_an_entry_that_is_a_folder_is_ignored_and_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (path_of(tmp_path) / "mine").mkdir(parents=True)
    Cache(tmp_path).store(KEY, random_cut(), 0.5, NOTE)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert load(tmp_path) is None
    assert (entries(tmp_path), clear(tmp_path)) == ([], 0)
    assert (path_of(tmp_path) / "mine").exists()


# Where it is ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, "", " ", "0", "false", "False"])
def test_the_environment_leaves_it_off(home: Path, value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if value is not None:
        monkeypatch.setenv("PEFT_KASA_CACHE", value)
    assert located() is None
    assert located(None) is None


@pytest.mark.parametrize("value", ["1", "true", "True", " TRUE "])
def test_the_environment_turns_on_the_default_folder(home: Path, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_KASA_CACHE", value)
    found = located()
    assert found is not None
    assert found.folder == home


def test_the_environment_names_a_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_KASA_CACHE", "~/one two")
    monkeypatch.setenv("HOME", "/nobody")
    assert repr(located()) == "Cache('/nobody/one two')"
    assert located(False) is None
    assert repr(located("/given")) == "Cache('/given')"
    assert repr(located(Path("/given"))) == "Cache('/given')"
    assert repr(located(True)) == f"Cache({str(home)!r})"


@pytest.mark.parametrize("value", [None, ""])
def test_the_default_folder_is_in_the_home(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/nobody")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if value is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert repr(located(True)) == "Cache('/nobody/.cache/peft_kasa/decompositions')"


def test_a_folder_stays_where_it_is_when_the_process_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = Cache("relative")
    monkeypatch.chdir("/")
    assert found.folder == tmp_path / "relative"


def test_asking_makes_no_folder(home: Path) -> None:
    found = located(True)
    assert found is not None
    assert found.load(KEY, shape=(6, 5), k=2) is None
    assert (entries(True), clear(True)) == ([], 0)
    assert not home.exists()


# Listing and clearing -------------------------------------------------------------------------------------------


def test_entries_tell_what_is_kept(tmp_path: Path) -> None:
    before = time.time()
    Cache(tmp_path).store(OTHER, random_cut(6, 5, 2), 2e-9, NOTE)
    Cache(tmp_path).store(KEY, random_cut(7, 4, 3), 0.5, {"end": "bottom"})
    first, second = entries(tmp_path)
    assert first[:6] == (OTHER, (6, 5), 2, "top", "gram", 2e-9)
    assert second[:6] == (KEY, (7, 4), 3, "bottom", "", 0.5)
    assert (first.path, first.bytes) == (path_of(tmp_path, OTHER), path_of(tmp_path, OTHER).stat().st_size)
    assert before <= first.created <= second.created <= time.time()
    day = time.strftime("%Y-%m-%d %H:%M", time.gmtime(first.created))
    assert repr(first) == f"Entry(top 2 of 6 x 5 by gram, error 2.0e-09, 0.0 MB, {day}, ffffffff)"
    assert repr(second).startswith("Entry(bottom 3 of 7 x 4 by ?, error 5.0e-01, 0.0 MB, ")


def foreign(folder: Path) -> list[Path]:
    """What looks almost like the cache's own."""
    names = ["model.safetensors", f"{KEY}.safetensors", f"{KEY[1:]}.kasa.safetensors", f"my{KEY}.kasa.safetensors"]
    names += [f"{KEY}.kasa.safetensors.bak", f".{KEY}.kasa.safetensors", f".{KEY}.kasa.safetensors.file", "a.txt"]
    files = [folder / name for name in names]
    for path in files:
        path.write_text("mine")
    fresh, folders = folder / f".{OTHER}.kasa.safetensors.new", [folder / "folder", folder / f".{KEY}.folder"]
    for path in [fresh, *folders]:
        path.mkdir()
        (path / "file").write_text("mine")
    for path in [*files, *folders]:
        os.utime(path, (0, 0))
    return sorted([*files, fresh, *folders])


def test_clear_takes_its_own_and_leaves_the_rest(stored: Path) -> None:
    others = foreign(stored)
    Cache(stored).store(OTHER, random_cut(), 0.5, NOTE)
    path_of(stored, OTHER).write_text("damaged")
    abandoned = stored / f".{KEY}.kasa.safetensors.abcd1234"
    abandoned.mkdir()
    (abandoned / "part").write_text("")
    os.utime(abandoned, (time.time() - 2 * cache.STALE,) * 2)
    assert [entry.key for entry in entries(stored)] == [KEY]
    assert clear(stored) == 3
    assert sorted(stored.iterdir()) == others
    assert all((path / "file" if path.is_dir() else path).read_text() == "mine" for path in others)
    assert (entries(stored), clear(stored)) == ([], 0)


def test_writers_that_die_are_cleared_by_the_name_that_they_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[str] = []

    def fail(source: str, _: object) -> None:
        left.append(Path(source).parent.name)
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "replace", fail)
    Cache(tmp_path).store(KEY, random_cut(), 0.5, NOTE)
    (tmp_path / left[0]).mkdir()
    assert clear(tmp_path) == 0
    os.utime(tmp_path / left[0], (0, 0))
    assert clear(tmp_path) == 1


def test_a_temporary_folder_that_goes_meanwhile_is_no_error(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passing = stored / f".{KEY}.kasa.safetensors.abcd1234"
    passing.mkdir()
    is_dir = Path.is_dir

    def gone_after(path: Path, **options: Any) -> bool:
        answer = is_dir(path, **options)
        if path == passing and answer:
            path.rmdir()
        return answer

    monkeypatch.setattr(Path, "is_dir", gone_after)
    assert len(entries(stored)) == 1
    assert clear(stored) == 1


def test_without_a_folder_they_take_the_environments_or_the_default(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Cache(home).store(KEY, random_cut(), 0.5, NOTE)
    Cache(tmp_path / "named").store(OTHER, random_cut(), 0.5, NOTE)
    assert [entry.key for entry in entries()] == [KEY]
    assert (entries(False), clear(False)) == ([], 0)
    monkeypatch.setenv("PEFT_KASA_CACHE", str(tmp_path / "named"))
    assert [entry.key for entry in entries()] == [OTHER]
    assert clear() == 1
    assert [entry.key for entry in entries(True)] == [KEY]
    monkeypatch.delenv("PEFT_KASA_CACHE")
    assert clear() == 1
