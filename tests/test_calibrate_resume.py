"""What survives an interruption of a calibration, and which files are gone on with."""

from __future__ import annotations

import copy
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import load, logits, move, stack
from calibrating import ALL, LAYER, ROWS, equal, forbidden, hooks, sequences
from peft import get_peft_model
from transformers import LlamaForCausalLM

from peft_kasa import CorDAConfig, EVAConfig, LoRAOneConfig, LoRASBConfig, calibrate
from peft_kasa.adapter.files.statistics import Statistics
from peft_kasa.calibration import passes

# Interruptions and files ----------------------------------------------------------------------------------------


class CutError(Exception):
    pass


def cut(after: int, error: type[BaseException] = CutError) -> Iterator[dict[str, Any]]:
    yield from ROWS[:after]
    raise error


class CutAtTheThird:
    """Rows that break off when they are read for the third time."""

    def __init__(self) -> None:
        self.read = 0

    def __iter__(self) -> Iterator[Any]:
        self.read += 1
        return cut(3) if self.read == 3 else iter(ROWS)


@pytest.mark.parametrize("config_class", [CorDAConfig, LoRASBConfig])
@pytest.mark.parametrize("size", [1, 2])
def test_a_calibration_goes_on_where_it_stopped_to_the_same_bits(
    config_class: Any, size: int, tiny: str, tmp_path: Path
) -> None:
    path, model = tmp_path / "s", load(tiny)

    class Failing:
        def __iter__(self) -> Iterator[Any]:
            return cut(4, KeyboardInterrupt)

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, Failing(), config_class(**ALL), path=path, batch_size=size)
    assert hooks(model) == 0
    with pytest.raises(ValueError, match="interrupted after 4 sequences"):
        Statistics.load(path)
    calls = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    config = config_class(**ALL)
    found = calibrate(model, ROWS, config, path=path, batch_size=size)
    handle.remove()
    assert len(calls) == 2 // size
    assert config.statistics is found
    assert equal(found, calibrate(load(tiny), ROWS, config_class(**ALL), batch_size=size))
    assert equal(Statistics.load(path), found)


def test_ctrl_c_waits_for_the_end_of_the_batch(tiny: str, tmp_path: Path) -> None:
    path, model = tmp_path / "s", load(tiny)
    handler, calls = signal.getsignal(signal.SIGINT), []

    def interrupting(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)

    handle = model.model.layers[1].register_forward_pre_hook(interrupting)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, ROWS, CorDAConfig(**ALL), path=path)
    handle.remove()
    assert hooks(model) == 0
    assert signal.getsignal(signal.SIGINT) is handler
    assert Statistics.load(path, partial=True).seen == 3
    assert equal(calibrate(model, ROWS, CorDAConfig(**ALL), path=path), calibrate(model, ROWS, CorDAConfig(**ALL)))


def test_a_second_ctrl_c_does_not_wait(tiny: str, tmp_path: Path) -> None:
    model = load(tiny)

    def interrupting(*_: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    handle = model.model.layers[1].register_forward_pre_hook(interrupting)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, ROWS, CorDAConfig(**ALL), path=tmp_path / "s")
    handle.remove()
    assert hooks(model) == 0
    assert not (tmp_path / "s").exists()


def test_half_a_batch_is_never_saved(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in the middle of the model leaves the last whole state on disk."""
    monkeypatch.setattr(passes, "SAVE_EVERY", 0.0)
    path, model, calls = tmp_path / "s", load(tiny), []

    def failing(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise CutError

    handle = model.model.layers[1].register_forward_pre_hook(failing)
    with pytest.raises(CutError):
        calibrate(model, ROWS, EVAConfig(**ALL), path=path)
    handle.remove()
    assert hooks(model) == 0
    assert 1 <= Statistics.load(path, partial=True).seen <= 3
    assert equal(calibrate(model, ROWS, EVAConfig(**ALL), path=path), calibrate(model, ROWS, EVAConfig(**ALL)))


def test_an_error_before_the_first_module_leaves_what_was_taken_in(tiny: str, tmp_path: Path) -> None:
    path, model, calls = tmp_path / "s", load(tiny), []

    def failing(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise CutError

    handle = model.model.embed_tokens.register_forward_pre_hook(failing)
    with pytest.raises(CutError):
        calibrate(model, ROWS, EVAConfig(**ALL), path=path)
    handle.remove()
    assert Statistics.load(path, partial=True).seen == 3
    assert equal(calibrate(model, ROWS, EVAConfig(**ALL), path=path), calibrate(model, ROWS, EVAConfig(**ALL)))


def test_an_interrupted_adapter_still_asks_for_its_data(tiny: str) -> None:
    model = get_peft_model(load(tiny), LoRASBConfig(**ALL))
    with pytest.raises(CutError):
        calibrate(model, CutAtTheThird(), memory=70_000)
    with pytest.raises(ValueError, match=r"Call calibrate\(model, data"):
        logits(model)
    calibrate(model, ROWS, memory=70_000)
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("config_class", [EVAConfig, LoRAOneConfig])
def test_ranks_are_chosen_over_all_modules(config_class: Any, tiny: str) -> None:
    model = get_peft_model(load(tiny), config_class(**ALL | {"rank_budget": 0.5}))
    calibrate(model, ROWS, memory=1)
    assert len(set(model.peft_config["default"].rank_pattern.values())) > 1
    assert logits(model).isfinite().all()


def test_groups_of_gradients_go_on_where_they_stopped(tiny: str, tmp_path: Path) -> None:
    path = tmp_path / "g"
    model = get_peft_model(load(tiny), LoRASBConfig(**ALL))
    with pytest.raises(CutError):
        calibrate(model, CutAtTheThird(), path=path, memory=70_000)
    assert not path.exists()
    parts = sorted(tmp_path.iterdir())
    assert [Statistics.load(part, partial=True).seen for part in parts] == [6, 6, 3]
    calls: list[int] = []
    handle = model.get_base_model().register_forward_pre_hook(lambda *_: calls.append(1))
    found = calibrate(model, ROWS, path=path, memory=70_000)
    handle.remove()
    groups = 1 + max(int(part.name.split("-of-")[1]) for part in parts) - 1
    assert len(calls) == 6 * (groups - 3) + 3
    assert [path.name for path in tmp_path.iterdir()] == ["g"]
    assert set(found.names) == set(calibrate(load(tiny), ROWS, LoRASBConfig(**ALL)).names)
    assert model.peft_config["default"].statistics is found


@pytest.mark.parametrize("config_class", [EVAConfig, LoRASBConfig])
@pytest.mark.parametrize("memory", [1, 2**30])
def test_a_complete_file_is_reused_without_the_model(config_class: Any, memory: int, tiny: str, tmp_path: Path) -> None:
    path, model = tmp_path / "s", load(tiny)
    found = calibrate(model, ROWS, config_class(**ALL), path=path, memory=memory)
    stamp = path.stat().st_mtime_ns
    model.register_forward_pre_hook(forbidden)
    again = calibrate(model, ROWS, config_class(**ALL), path=path, memory=memory)
    assert equal(again, found)
    fewer = calibrate(model, ROWS, config_class(r=2, target_modules=["q_proj"]), path=path)
    assert f"{LAYER}self_attn.q_proj" in fewer.names
    assert path.stat().st_mtime_ns == stamp


def test_a_file_grows_with_samples(tiny: str, tmp_path: Path) -> None:
    path, model = tmp_path / "s", load(tiny)
    assert calibrate(model, ROWS, EVAConfig(**ALL), path=path, samples=2).seen == 2
    found = calibrate(model, ROWS, EVAConfig(**ALL), path=path, samples=5)
    assert equal(found, calibrate(model, ROWS[:5], EVAConfig(**ALL)))
    with pytest.raises(ValueError, match=r"is of 5 sequences. Found samples=4"):
        calibrate(model, ROWS, EVAConfig(**ALL), path=path, samples=4)


def test_a_file_of_something_else_is_refused_by_name(tiny: str, tmp_path: Path) -> None:
    path, model = tmp_path / "s", load(tiny)
    few = {"r": 2, "target_modules": ["q_proj"]}
    calibrate(model, ROWS, EVAConfig(**few), path=path)
    with pytest.raises(ValueError, match="s is of inputs, and scaled inputs are needed"):
        calibrate(model, ROWS, CorDAConfig(**few), path=path)
    with pytest.raises(ValueError, match=r"s is not of model\.layers\.0\.self_attn\.k_proj"):
        calibrate(model, ROWS, EVAConfig(**ALL), path=path)
    with pytest.raises(ValueError, match="labels_only=False"):
        calibrate(model, ROWS, EVAConfig(**few), path=path, labels_only=True)
    for data in (sequences(1), list(reversed(ROWS)), ROWS[:3]):
        with pytest.raises(ValueError, match="s does not go with this call: it"):
            calibrate(model, data, EVAConfig(**few), path=path)
    torch.manual_seed(7)
    other = LlamaForCausalLM(model.config)
    with pytest.raises(ValueError, match=r"another base model: model\.layers\.0\.self_attn\.q_proj differs"):
        calibrate(other, ROWS, EVAConfig(**few), path=path)
    with pytest.raises(ValueError, match="another base model"):
        get_peft_model(other, EVAConfig(**few, statistics=str(path)))


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"x" * 64])
def test_a_damaged_file_is_refused(damage: Callable[[bytes], bytes], tiny: str, tmp_path: Path) -> None:
    path = tmp_path / "s"
    found = calibrate(load(tiny), ROWS, EVAConfig(**ALL), path=path)
    path.write_bytes(damage(path.read_bytes()))
    for use in (lambda: Statistics.load(path), lambda: found.evidence(found.names[0])):
        with pytest.raises(ValueError, match=r"damaged or not a file of statistics.*another `path`"):
            use()
    with pytest.raises(FileNotFoundError, match="no statistics at"):
        Statistics.load(tmp_path / "absent")


def test_anothers_file_is_refused(tiny: str) -> None:
    with pytest.raises(ValueError, match="holds no statistics of this version"):
        Statistics.load(f"{tiny}/model.safetensors")


def test_copies_share_and_pickles_keep(tiny: str, tmp_path: Path) -> None:
    config = EVAConfig(**ALL)
    found = calibrate(load(tiny), ROWS, config)
    assert copy.deepcopy(config).statistics is found
    assert equal(pickle.loads(pickle.dumps(found)), found)
    found.save(tmp_path / "s")
    saved = Statistics.load(tmp_path / "s")
    assert equal(saved, found)
    assert equal(pickle.loads(pickle.dumps(saved)), found)
    assert (tmp_path / "s").stat().st_size < 0.6 * 8 * (6 * 64**2 + 2 * 128**2)
    with pytest.raises(ValueError, match=r"nowhere: there are no statistics.*14 other modules"):
        saved.evidence("nowhere")


def test_a_run_that_goes_on_takes_its_ranks_from_the_file(tiny: str, tmp_path: Path) -> None:
    """A trainer that resumes makes the adapter from the script's config, uncalibrated, and loads the file into it."""
    model = get_peft_model(load(tiny), EVAConfig(**ALL))
    calibrate(model, ROWS)
    move(model)
    model.save_pretrained(str(tmp_path))
    ranks = model.peft_config["default"].rank_pattern
    assert len(ranks) < 14
    again = get_peft_model(load(tiny), EVAConfig(**ALL))
    again.load_adapter(str(tmp_path), "default", is_trainable=True)
    assert again.peft_config["default"].rank_pattern == ranks
    assert torch.equal(logits(again), logits(model))


def test_a_file_of_more_modules_is_not_gone_on_with_for_fewer(tmp_path: Path) -> None:
    path, data = tmp_path / "s", [{"input": torch.randn(1, 8, 24)} for _ in range(8)]
    calibrate(stack(), data, CorDAConfig(target_modules=["0", "2"]), path=path, samples=4)
    with pytest.raises(ValueError, match="going on would lose them"):
        calibrate(stack(), data, CorDAConfig(target_modules=["0"]), path=path, samples=8)
    assert set(Statistics.load(path).names) == {"0", "2"}


@pytest.mark.parametrize("change", ["data", "base", "modules"])
@pytest.mark.parametrize("pickled", [False, True])
def test_a_file_that_was_written_anew_is_not_read_for_the_old_one(change: str, pickled: bool, tmp_path: Path) -> None:
    path, data = tmp_path / "s", [{"input": torch.randn(1, 8, 24)} for _ in range(4)]
    config, model = CorDAConfig(r=2, target_modules=["0", "2"]), stack()
    calibrate(model, data, config, path=path)
    if pickled:
        config = pickle.loads(pickle.dumps(config))
    path.unlink()
    if change == "base":
        torch.nn.init.normal_(model[0].weight)
    more = {"target_modules": ["4", "0", "2"] if change == "modules" else ["0", "2"]}
    calibrate(model, data[1:] if change == "data" else data, CorDAConfig(r=2, **more), path=path)
    with pytest.raises(ValueError, match=r"s has been written anew since these statistics were opened"):
        get_peft_model(stack(), config)
    config.statistics = str(path)
    if change != "base":
        get_peft_model(stack(), config)


@pytest.mark.parametrize(
    ("place", "message"), [("there", "has to be of a file. Found .*there, a folder"), ("file/s", "cannot be written")]
)
def test_a_path_that_cannot_be_written_is_known_before_any_work(place: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("")
    model = stack()
    model.register_forward_pre_hook(forbidden)
    with pytest.raises(ValueError, match=message):
        calibrate(model, [{"input": torch.randn(1, 8, 24)}], CorDAConfig(target_modules=["0"]), path=tmp_path / place)
    assert sorted(os.listdir(tmp_path)) == ["file", "there"]


def test_statistics_are_unpickled_without_their_file(tmp_path: Path) -> None:
    path = tmp_path / "s"
    model = get_peft_model(stack(), CorDAConfig(r=2, target_modules=["0", "2"]))
    calibrate(model, [{"input": torch.randn(1, 8, 24)}], path=path)
    pickled = pickle.dumps(model)
    path.unlink()
    x = torch.randn(3, 24)
    assert torch.equal(pickle.loads(pickled)(x), model(x))
