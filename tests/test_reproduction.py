"""What decides the figures of the reproduction benchmarks: splits, order, rates, what is kept, tests, scores."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from decimal import Decimal
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import load
from datasets import Dataset
from reproduction.classifier import Settings, Trials
from reproduction.generator import Settings as Causal
from reproduction.generator import Trials as CausalTrials
from reproduction.paired import compare, holm
from reproduction.report import Measure, lines, place, table
from reproduction.results import Results
from reproduction.scores import exact_match, number, overlap
from reproduction.sentences import Sentence, generated, key, rated, splits
from reproduction.study import TUNING_SEED, Study
from reproduction.texts import TASKS, Example
from reproduction.texts import Splits as Texts
from scipy import stats
from test_regularisers import _tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

ACCURACY = Measure("test_accuracy", "accuracy, %", 100)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny encoder with a tokenizer of the made-up sentences' words."""
    folder = tmp_path_factory.mktemp("encoder")
    words = sorted({word for sentence in generated(200) for word in sentence.text.split()})
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


def trials(encoder: str, kind: type[Trials] = Trials, **given: Any) -> Trials:
    settings = Settings(encoder, **{"train": 48, "epochs": 3, "batch_size": 8, "rank": 4, **given})
    return kind(settings, generated(200), 40, 40)


def test_no_text_is_in_two_splits() -> None:
    shown = [Sentence("A fine film!", 1), Sentence("a fine film", 1), Sentence("Dull.", 0), Sentence("Flat", 0)]
    found = splits([*shown, *generated(60)], 20, 20)
    texts = [{key(sentence.text) for sentence in split} for split in found]
    assert list(map(len, texts)) == [len(found.pool), 20, 20] == [23, 20, 20]
    assert all(not one & other for one, other in combinations(texts, 2))
    with pytest.raises(ValueError, match="40 rows to hold out"):
        splits(generated(40), 20, 20)


def test_what_is_held_out_does_not_depend_on_the_order_of_a_file() -> None:
    assert splits(generated(60)[::-1], 20, 20) == splits(generated(60), 20, 20)


def test_seeds_draw_other_rows_of_the_pool() -> None:
    found = splits(generated(60), 10, 10)
    first, second = found.training(20, 0), found.training(20, 1)
    assert first == found.training(20, 0)
    assert set(first) != set(second)
    assert {*first, *second} <= set(found.pool)


def test_ratings_become_labels(tmp_path: Path) -> None:
    file = tmp_path / "rated.txt"
    file.write_text("1\t2.5\tGood.\n2\t0.4\tSo so.\n3\t-0.6\tBad.\n")
    assert rated(file) == [("Good.", 1), ("Bad.", 0)]
    file.write_text("1\tGood.\n")
    with pytest.raises(ValueError, match="line 1"):
        rated(file)


def test_all_contenders_have_the_same_data_order_head_and_dropout(encoder: str) -> None:
    """Adapters that start at the base and hardly learn leave what the head alone learns, to rounding."""
    one = trials(encoder, head_rate=1e-2)
    found = {name: one(name, 1e-12, 0, True) for name in ("head", "lora", "dora", "peft_pissa", "pissa", "sorsa")}
    for name, figures in found.items():
        assert figures["test_loss"] == pytest.approx(found["head"]["test_loss"], abs=1e-4), name
    assert abs(one("head", 1e-12, 1, True)["test_loss"] - found["head"]["test_loss"]) > 1e-3


def test_equal_ranks_and_one_encoder(encoder: str) -> None:
    one = trials(encoder)
    learns = {name: one(name, 1e-3, 0, False)["trainable"] for name in ("head", "lora", "pissa", "kasa", "lora_xs")}
    added = {name: count - learns["head"] for name, count in learns.items()}
    assert added == {"head": 0, "lora": 4 * 4 * 64, "pissa": 4 * 4 * 64, "kasa": 4 * 4 * 65, "lora_xs": 4 * 16}


def test_a_contender_that_needs_data_is_calibrated_on_training_rows(encoder: str) -> None:
    assert math.isfinite(trials(encoder)("corda_instruction", 1e-3, 0, True)["test_loss"])


class Worsening(Trials):
    """Each time that it is asked, the loss is higher by one."""

    asked = 0

    def scores(self, model: Any, rows: Sequence[Sentence]) -> dict[str, float]:
        found = super().scores(model, rows)
        self.asked += 1
        return found | {"loss": found["loss"] + self.asked}


def test_the_test_split_is_scored_at_the_best_epoch(encoder: str) -> None:
    """The first one, where losses rise. The test split is the validation split here, so the figures are the same."""
    one = trials(encoder, kind=Worsening)
    one.data = one.data._replace(test=one.data.validation)
    figures = one("lora", 3e-2, 0, True)
    assert figures["epoch"] == 1
    assert figures["test_loss"] - 4 == pytest.approx(figures["validation_loss"] - 1, abs=1e-5)
    assert figures["test_accuracy"] == figures["validation_accuracy"]


def valley(best: float, calls: list[tuple[str, float, int, bool]]) -> Any:
    """Trials whose validation loss is least at a rate."""

    def trial(name: str, rate: float, seed: int, test: bool) -> dict[str, Any]:
        calls.append((name, rate, seed, test))
        return {"validation_loss": abs(math.log(rate / best)), "trainable": 1} | (
            {"test_accuracy": 0.5} if test else {}
        )

    return trial


@pytest.mark.parametrize(("best", "expected"), [(3e-3, 3e-3), (3e-2, 3e-2), (1e-4, 1.1e-4)])
def test_rates_beyond_the_grid_are_tried_while_the_best_is_at_its_edge(
    best: float, expected: float, tmp_path: Path
) -> None:
    calls: list[Any] = []
    Study(valley(best, calls), Results(tmp_path / "x.jsonl", {}, {}), [1e-3, 3e-3, 1e-2])(["a"], [0, 1])
    tuned = {rate for _, rate, seed, _ in calls if seed == TUNING_SEED}
    assert {1e-3, 3e-3, 1e-2} <= tuned
    assert min(tuned) < expected < max(tuned)
    assert [call for call in calls if call[2] != TUNING_SEED] == [("a", expected, 0, True), ("a", expected, 1, True)]
    assert not any(test for _, _, seed, test in calls if seed == TUNING_SEED)  # the test split chooses nothing


def test_a_rate_that_ends_in_nan_is_not_chosen(tmp_path: Path) -> None:
    def trial(name: str, rate: float, seed: int, test: bool) -> dict[str, Any]:
        return {"validation_loss": math.nan if rate > 1e-3 else 1 - rate}

    assert Study(trial, Results(tmp_path / "x.jsonl", {}, {}), [1e-3, 3e-3])(["a"], []) is None
    assert Study(trial, Results(tmp_path / "x.jsonl", {}, {}), [1e-3, 3e-3]).rate("a") == 1e-3


def test_an_interrupted_study_goes_on_from_its_file(tmp_path: Path) -> None:
    file, calls = tmp_path / "x.jsonl", list[Any]()

    def interrupted(name: str, rate: float, seed: int, test: bool) -> dict[str, Any]:
        if (name, seed) == ("b", 1):
            raise KeyboardInterrupt
        return valley(3e-3, [])(name, rate, seed, test)

    with pytest.raises(KeyboardInterrupt):
        Study(interrupted, Results(file, {"r": 8}, {}), [1e-3, 3e-3, 1e-2])(["a", "b"], [0, 1])
    with file.open("a") as out:
        out.write('{"kind": "run", "meth')  # a line that was cut short
    results = Results(file, {"r": 8}, {"commit": "another"})
    Study(valley(3e-3, calls), results, [1e-3, 3e-3, 1e-2])(["a", "b"], [0, 1])
    assert calls == [("b", 3e-3, 1, True)]
    assert Results(file, {"r": 8}, {}).rows == results.rows
    with pytest.raises(SystemExit, match="'r': 8"):
        Results(file, {"r": 16}, {})
    with pytest.raises(ValueError, match=str(TUNING_SEED)):
        Study(valley(3e-3, calls), results, [1e-3])(["a"], [TUNING_SEED])


def test_paired_tests_are_those_of_common_seeds() -> None:
    mine = {0: 0.80, 1: 0.83, 2: 0.85, 3: 0.80, 4: 0.84, 9: 0.0}
    peers = {0: 0.79, 1: 0.80, 2: 0.80, 3: 0.81, 4: 0.80, 8: 1.0}
    found = compare(mine, peers)
    pairs = [[of[seed] for seed in range(5)] for of in (mine, peers)]
    expected = stats.ttest_rel(*pairs)
    assert found.seeds == 5
    assert found.t_test == pytest.approx(expected.pvalue)
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx(
        expected.confidence_interval()
    )
    assert found.wilcoxon == pytest.approx(6 / 32)  # of 32 signs: none, or one of the two least, on either side
    assert compare(peers, mine).mean == -found.mean
    with pytest.raises(ValueError, match="two seeds"):
        compare({0: 1.0}, peers)


def test_five_seeds_cannot_go_below_a_sixteenth_by_signed_ranks() -> None:
    assert compare({i: 1.0 + i for i in range(5)}, dict.fromkeys(range(5), 0.0)).wilcoxon == 2 / 2**5
    assert compare({0: 1.0, 1: 1.0}, {0: 1.0, 1: 1.0}).t_test == 1


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.6]) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3 + 4 = 7\n#### 7", "7"),
        ("#### 1,200 dollars", "1200"),
        ("we get 12, then 15.50.", "15.50"),
        ("-3", "-3"),
        ("#### $5 or 6", "5"),
        ("#### none", None),
        ("no number", None),
    ],
)
def test_final_numbers(text: str, expected: str | None) -> None:
    assert number(text) == (None if expected is None else Decimal(expected))


def test_exact_match_is_of_numbers() -> None:
    references = [["#### 7"], ["#### 1000"], ["#### 3"]]
    assert exact_match(["7.0", "it is 1,000", "no"], references) == {"exact_match": pytest.approx(2 / 3)}


def test_overlap_counts_all_references() -> None:
    said = "the mill serves cheap italian food"
    refs = [[said, "something else"], ["blue spice is a pub"]]
    best = overlap([said, "blue spice is a pub"], refs)
    assert best["bleu"] == pytest.approx(100)
    assert best["rouge_l"] == pytest.approx(1)
    worse = overlap([said, "blue spice is not a pub at all"], refs)
    assert worse["bleu"] < 100
    assert worse["rouge_l"] == pytest.approx((1 + 10 / 13) / 2)  # five words in order, of five and of eight


def files(folder: Path) -> None:
    few = 'mr,ref\nname[A],One A.\nname[A],An A.\n"name[B], x[1]",One B.\nname[C],C.\nname[D],D.\nname[E],E.\n'
    (folder / "devset.csv").write_text(few)
    (folder / "testset_w_refs.csv").write_text("mr,ref\nname[C],C it is.\nname[C],It is C.\n")
    rows = [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(4)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "test.jsonl").write_text(json.dumps(rows[3]) + "\n")


@pytest.mark.parametrize("task", TASKS)
def test_no_prompt_is_in_two_splits(task: str, tmp_path: Path) -> None:
    files(tmp_path)
    for folder, validation in ((tmp_path, 1), (None, 16)):
        found = TASKS[task](folder, validation)
        prompts = [{example.prompt for example in split} for split in found]
        assert all(prompts)
        assert all(not one & other for one, other in combinations(prompts, 2))
        assert len(found.validation) == validation == len(prompts[1])
        assert found.training(50, 3) == found.training(50, 3) != found.training(50, 4)
        once = found.training(len(found.train), 0)
        assert sorted(once) == sorted(found.train)


def test_e2e_keeps_all_references(tmp_path: Path) -> None:
    files(tmp_path)
    assert TASKS["e2e"](tmp_path, 1).test == [("Data: name[C]\nSentence:", " C it is.", ("C it is.", "It is C."))]


def test_the_report_says_what_the_rows_say(tmp_path: Path) -> None:
    runs = {"lora": [0.7, 0.8, 0.75], "kasa": [0.75, 0.86, 0.8]}
    rows = [{"kind": "rate", "method": name, "rate": 1e-3, "validation_loss": 1.0} for name in runs]
    rows += [
        {
            "kind": "run",
            "method": name,
            "rate": 1e-3,
            "seed": seed,
            "test_accuracy": value,
            "trainable": 10,
            "seconds": {"cpu": 1.0},
        }
        for name, values in runs.items()
        for seed, value in enumerate(values)
    ]
    found = lines(rows, {"lora": "LoRA", "kasa": "KaSA"}, ACCURACY)
    first = table(found, [ACCURACY]).splitlines()[2]
    assert first.startswith("| KaSA | 10 | 0.001* | 80.3 ± 5.5 | +5.3 ± 1.4 | 0.0039 | 0.0039 | 0.25 | 3 |")
    page = tmp_path / "page.md"
    page.write_text("Before\n<!-- x -->\nold\n<!-- /x -->\nafter\n")
    for _ in range(2):
        place(page, "x", "new")
    assert page.read_text() == "Before\n<!-- x -->\n\nnew\n\n<!-- /x -->\nafter\n"
    with pytest.raises(ValueError, match="<!-- y -->"):
        place(page, "y", "new")


def test_losses_are_measured_on_the_tokens_that_sft_trains_on(tiny: str, tmp_path: Path) -> None:
    """A causal model's trials: tokens and labels are SFTTrainer's, and a step with them learns."""
    load(tiny).save_pretrained(tmp_path / "model")
    _tokenizer().save_pretrained(tmp_path / "model")
    rows = [Example(f"{i} 2 3", f" {i + 1} 5", (f"{i + 1} 5",)) for i in range(12)]
    settings = Causal(str(tmp_path / "model"), "e2e", rank=4, steps=2, batch_size=4, new_tokens=3)
    one = CausalTrials(settings, Texts(rows[:8], rows[8:10], rows[10:]))
    arguments = SFTConfig(str(tmp_path), completion_only_loss=True, bf16=False, report_to="none", use_cpu=True)
    data = Dataset.from_list([{"prompt": rows[0].prompt, "completion": rows[0].completion}])
    trainer = SFTTrainer(load(tiny), arguments, train_dataset=data, processing_class=_tokenizer())
    batch = next(iter(trainer.get_train_dataloader()))
    assert one.encoded(rows[0]) == {key: batch[key][0].tolist() for key in ("input_ids", "labels")}
    found = [one(name, 1e-2, 0, True) for name in ("lora", "pissa", "lora")]
    assert found[0] == found[2] != found[1]
    assert {"validation_loss", "test_loss", "test_bleu", "test_rouge_l", "trainable"} == set(found[0])
