"""The disk cache: a disk that may fail, where the folder is, listing and clearing."""

from __future__ import annotations

import errno
import os
import resource
import time
from pathlib import Path
from typing import Any

import pytest
from caching import KEY, NOTE, OTHER, load, path_of, random_cut, same

from peft_kasa.spectral import cache
from peft_kasa.spectral.cache import Cache, clear, entries, located


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
