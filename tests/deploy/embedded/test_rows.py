"""Rows: valid in their schemas, right by their own answers, disjoint splits, deterministic."""

import re
from itertools import combinations
from random import Random

import pytest

from deploy.embedded.rows import (
    GENERATORS,
    KINDS,
    SPLITS,
    SUBJECTS,
    USES,
    fingerprint,
    rows,
    split_of,
)

TASKS = list(GENERATORS)
FIELDS = {
    "countdown": {"nums", "target"},
    "gsm8k": {"question", "answer"},
    "proofwriter": {"id", "theory", "question", "answer", "config", "maxD"},
    "hellaswag": {
        "ind",
        "activity_label",
        "ctx_a",
        "ctx_b",
        "ctx",
        "endings",
        "source_id",
        "split",
        "split_type",
        "label",
    },
    "piqa": {"goal", "sol1", "sol2", "label"},
    "arc_challenge": {"id", "question", "choices", "answerKey"},
    "mmlu_pro": {
        "question_id",
        "question",
        "options",
        "answer",
        "answer_index",
        "cot_content",
        "category",
        "src",
    },
}


@pytest.mark.parametrize("task", TASKS)
def test_the_fields_are_those_of_the_data_set(task: str) -> None:
    assert all(set(row) == FIELDS[task] for row in rows(task, "eval", 50, seed=0))


@pytest.mark.parametrize("task", TASKS)
def test_the_same_arguments_give_the_same_rows_and_another_seed_others(task: str) -> None:
    assert rows(task, "eval", 60, seed=4) == rows(task, "eval", 60, seed=4)
    assert rows(task, "eval", 60, seed=4) != rows(task, "eval", 60, seed=5)
    assert rows(task, "eval", 60, seed=4)[:20] == rows(task, "eval", 20, seed=4)


@pytest.mark.parametrize("task", TASKS)
def test_splits_share_no_row_whatever_the_seeds(task: str) -> None:
    counts = {"train": 800, "eval": 500, "validation": 100}
    marks = {
        split: {fingerprint(task, bare(row)) for row in rows(task, split, counts[split], seed)}
        for seed, split in enumerate(SPLITS)
    }
    assert {split: len(found) for split, found in marks.items()} == counts
    assert not any(a & b for a, b in combinations(marks.values(), 2))


def bare(row: dict[str, object]) -> dict[str, object]:
    """The row without the ids that are made of its fingerprint."""
    made = ("id", "question_id", "ind", "source_id")
    return {name: value for name, value in row.items() if name not in made}


def test_ids_are_unique() -> None:
    for task, field in (
        ("proofwriter", "id"),
        ("arc_challenge", "id"),
        ("mmlu_pro", "question_id"),
    ):
        found = [row[field] for row in rows(task, "eval", 500, seed=0)]
        assert len(set(found)) == len(found)


def test_the_order_of_countdowns_numbers_does_not_move_a_row_to_another_split() -> None:
    for row in rows("countdown", "eval", 100, seed=0):
        other = {**row, "nums": row["nums"][::-1]}
        assert split_of(fingerprint("countdown", other)) == "eval"


def test_every_step_of_a_gsm8k_answer_is_true_and_ends_in_the_answer() -> None:
    for row in rows("gsm8k", "train", 500, seed=0):
        steps = re.findall(r"<<(\d+)([+*-])(\d+)=(\d+)>>(\d+)", row["answer"])
        assert len(steps) == 2
        for x, sign, y, value, shown in steps:
            result = {"+": int(x) + int(y), "-": int(x) - int(y), "*": int(x) * int(y)}[sign]
            assert result == int(value) == int(shown) >= 0
        assert row["answer"].endswith(f"\n#### {steps[1][3]}")
        assert steps[1][0] == steps[0][3]
        first = set(steps[0][:3:2])
        assert first <= set(re.findall(r"\d+", row["question"]))


def test_proofwriter_answers_follow_from_the_theory() -> None:
    """Forward chaining over the facts and rules as they are written."""
    seen = set()
    for row in rows("proofwriter", "eval", 400, seed=0):
        facts = set(re.findall(r"The (\w+) is (\w+)\.", row["theory"]))
        rules = re.findall(r"something is (\w+) then it is (\w+)\.", row["theory"])
        facts |= {(who, then) for who, what in facts for given, then in rules if given == what}
        who, negated, what = re.fullmatch(r"The (\w+) is (not )?(\w+)\.", row["question"]).groups()
        known = (who, what) in facts
        expected = ("False" if negated else "True") if known else "Unknown"
        assert row["answer"] == expected
        seen.add((expected, bool(negated), row["maxD"]))
    assert len({answer for answer, _, _ in seen}) == 3


def test_one_option_alone_is_of_the_kind_asked_for() -> None:
    kind_of = {word: kind for kind, words in KINDS.items() for word in words}
    for task in ("arc_challenge", "mmlu_pro"):
        for row in rows(task, "eval", 300, seed=0):
            asked = re.search(r"\ban? (\w+)[.?]$", row["question"])[1]
            options = row["options"] if task == "mmlu_pro" else row["choices"]["text"]
            right = [place for place, word in enumerate(options) if kind_of[word] == asked]
            letter = row["answer"] if task == "mmlu_pro" else row["answerKey"]
            assert right == ["ABCDEFGHIJ".index(letter)]
            assert 2 <= len(options) <= 3


def test_the_right_solution_and_ending_are_of_the_thing_named() -> None:
    for row in rows("piqa", "eval", 200, seed=0):
        solution = row[f"sol{row['label'] + 1}"]
        thing = next(use for use in USES if solution.endswith(f" {use.thing}."))
        assert any(f"{thing.verb} {what}" in row["goal"] for what in thing.objects)
    for row in rows("hellaswag", "eval", 200, seed=0):
        thing = next(use for use in USES if row["ctx_a"].endswith(f" {use.thing}."))
        fits = [ending.split()[0] == thing.third for ending in row["endings"]]
        assert fits.index(True) == int(row["label"])
        assert sum(fits) == 1


def test_no_word_is_of_two_kinds_and_no_deed_of_two_things() -> None:
    words = [word for members in KINDS.values() for word in members]
    deeds = [use.verb for use in USES]
    assert len(set(words)) == len(words)
    assert len(set(deeds)) == len(deeds)
    assert {kind for kinds in SUBJECTS.values() for kind in kinds} == set(KINDS)


@pytest.mark.parametrize(
    ("task", "split", "count", "said"),
    [
        ("chess", "eval", 1, "task 'chess': allowed: countdown"),
        ("piqa", "test", 1, "split 'test': allowed: train, eval"),
        ("countdown", "eval", 5000, "5000 rows wanted, only"),
    ],
)
def test_what_cannot_be_made_is_refused(
    task: str, split: str, count: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploy.embedded.rows.MAX_TRIES", 100)
    with pytest.raises(ValueError, match=re.escape(said)):
        rows(task, split, count, seed=0)


def test_labels_are_spread_evenly() -> None:
    """No task can be answered by always saying the same: the commonest label is near its share."""
    draw = Random(0)
    most = {"piqa": 0.6, "hellaswag": 0.6, "proofwriter": 0.43}
    for task, share in most.items():
        field = "answer" if task == "proofwriter" else "label"
        labels = [row[field] for row in rows(task, "eval", 400, seed=draw.randrange(99))]
        assert max(labels.count(label) for label in set(labels)) / len(labels) < share
