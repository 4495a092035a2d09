"""Evaluations: whole or not at all, resumed without asking twice, scored again without a model."""

import json
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from agent.errors import UserError
from evaluators.loading import examples, rows
from evaluators.runner import (
    Shots,
    evaluate,
    harness_of,
    read_samples,
    rescore,
    write_samples,
)
from evaluators.stats import wilson
from evaluators.summary import discordance, rescored, summaries
from evaluators.task import Message, Row, Task, with_prompt
from evaluators.tasks import TASKS

ROWS = Path(__file__).parent / "rows"
NAMES = ("gsm8k", "hellaswag", "mmlu_pro", "proofwriter")


@dataclass(frozen=True, slots=True)
class Answer:
    text: str
    tokens: int
    finish: str = "stop"


class Model:
    """Answers by the prompt alone: right on about half of the prompts; remembers every prompt."""

    def __init__(self, fail_at: int | None = None, salt: str = "") -> None:
        self.asked: list[str] = []
        self.batches: list[int] = []
        self.fail_at, self.salt = fail_at, salt

    def __call__(self, chats: list[list[Message]], max_tokens: list[int]) -> Sequence[Answer]:
        if self.fail_at is not None and len(self.batches) >= self.fail_at:
            raise ConnectionError("the engine is gone")
        self.batches.append(len(chats))
        self.asked += [json.dumps(chat) for chat in chats]
        return [self.answer(chat, limit) for chat, limit in zip(chats, max_tokens, strict=True)]

    def answer(self, chat: list[Message], limit: int) -> Answer:
        drawn = sha256((self.salt + json.dumps(chat)).encode()).digest()
        finish = "length" if drawn[1] < 64 else "stop"
        text = ("The answer is (A)", "0", "#### 24", "Answer: True", "\ud800?")[drawn[0] % 5]
        return Answer(text, min(drawn[2], limit), finish)


@pytest.fixture
def tasks_rows() -> list[tuple[Task, Sequence[Row]]]:
    return [(TASKS[name], rows(TASKS[name], "eval", data_dir=ROWS)) for name in NAMES]


@pytest.fixture
def shots() -> dict[str, Shots]:
    return {"mmlu_pro": examples(TASKS["mmlu_pro"], data_dir=ROWS)}


def run(
    tasks_rows: Sequence[tuple[Task, Sequence[Row]]], model: Model, out: Path, **changed: Any
) -> list[dict[str, Any]]:
    wanted: dict[str, Any] = {"digest": "d1", "harness": "h1", "batch_rows": 3}
    return evaluate(tasks_rows, model, out=out, **(wanted | changed))


def test_one_row_a_sample_in_the_given_order(
    tasks_rows: list[tuple[Task, Sequence[Row]]], tmp_path: Path
) -> None:
    model, out = Model(), tmp_path / "deep" / "eval.parquet"
    samples = run(tasks_rows, model, out)
    wanted = [(task.name, task.key(row)) for task, found in tasks_rows for row in found]
    assert [(sample["task"], sample["example_id"]) for sample in samples] == wanted
    assert read_samples(out) == samples
    assert [file.name for file in out.parent.iterdir()] == ["eval.parquet"]
    assert {sample["digest"] for sample in samples} == {"d1"}
    assert {sample["harness_hash"] for sample in samples} == {"h1"}
    assert sum(model.batches) == len(samples)
    assert max(model.batches) == 3
    assert {sample["reward"] for sample in samples} == {0.0, 1.0}


def test_a_finished_evaluation_is_read_and_nothing_is_asked(
    tasks_rows: list[tuple[Task, Sequence[Row]]], tmp_path: Path
) -> None:
    first = run(tasks_rows, Model(), tmp_path / "eval.parquet")
    again = Model()
    assert run(tasks_rows, again, tmp_path / "eval.parquet") == first
    assert again.asked == []


@pytest.mark.parametrize("fail_at", [0, 1, 3])
def test_a_failed_evaluation_goes_on_without_asking_twice(
    tasks_rows: list[tuple[Task, Sequence[Row]]], tmp_path: Path, fail_at: int
) -> None:
    whole = Model()
    run(tasks_rows, whole, tmp_path / "whole.parquet")
    broken, rest = Model(fail_at=fail_at), Model()
    with pytest.raises(ConnectionError):
        run(tasks_rows, broken, tmp_path / "eval.parquet")
    assert not (tmp_path / "eval.parquet").exists()
    run(tasks_rows, rest, tmp_path / "eval.parquet")
    assert broken.asked + rest.asked == whole.asked
    assert broken.batches + rest.batches == whole.batches
    assert same_bytes(tmp_path, "whole", "eval")


def same_bytes(folder: Path, *names: str) -> bool:
    return len({(folder / f"{name}.parquet").read_bytes() for name in names}) == 1


class Mortal(Model):
    """Answers two batches, telling a file what it was asked, then kills its process."""

    def __init__(self, told: Path) -> None:
        super().__init__()
        self.told = told

    def __call__(self, chats: list[list[Message]], max_tokens: list[int]) -> Sequence[Answer]:
        if len(self.batches) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        found = super().__call__(chats, max_tokens)
        with self.told.open("a") as told:
            told.writelines(json.dumps(chat) + "\n" for chat in chats)
        return found


def test_killing_an_evaluation_half_way_and_resuming_gives_the_same_parquet(
    tasks_rows: list[tuple[Task, Sequence[Row]]], tmp_path: Path
) -> None:
    whole = Model()
    run(tasks_rows, whole, tmp_path / "whole.parquet")
    out, told = tmp_path / "eval.parquet", tmp_path / "asked"
    child = os.fork()
    if child == 0:
        try:
            run(tasks_rows, Mortal(told), out)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    asked = told.read_text().splitlines()
    rest = Model()
    run(tasks_rows, rest, out)
    assert len(asked) == 6
    assert asked + rest.asked == whole.asked
    assert same_bytes(tmp_path, "whole", "eval")


def test_a_row_half_written_at_the_kill_is_asked_again_and_no_other(
    tasks_rows: list[tuple[Task, Sequence[Row]]], tmp_path: Path
) -> None:
    whole = run(tasks_rows, Model(), tmp_path / "whole.parquet")
    with pytest.raises(ConnectionError):
        run(tasks_rows, Model(fail_at=2), tmp_path / "eval.parquet")
    part = tmp_path / "eval.parquet.part.jsonl"
    part.write_bytes(part.read_bytes()[:-100])
    again, rest = Model(fail_at=1), Model()
    with pytest.raises(ConnectionError):
        run(tasks_rows, again, tmp_path / "eval.parquet")
    assert again.batches == [1]
    assert run(tasks_rows, rest, tmp_path / "eval.parquet") == whole
    assert len(rest.asked) == len(whole) - 6
    assert same_bytes(tmp_path, "whole", "eval")


@pytest.mark.parametrize("changed", [{"digest": "d2"}, {"harness": "h2"}])
def test_another_model_or_harness_never_mixes_in(
    tasks_rows: list[tuple[Task, Sequence[Row]]], tmp_path: Path, changed: dict[str, str]
) -> None:
    with pytest.raises(ConnectionError):
        run(tasks_rows, Model(fail_at=1), tmp_path / "half.parquet")
    run(tasks_rows, Model(), tmp_path / "done.parquet")
    for name in ("half", "done"):
        with pytest.raises(UserError, match=r"remove it or choose another file"):
            run(tasks_rows, Model(), tmp_path / f"{name}.parquet", **changed)


def test_other_rows_are_not_taken_for_the_same_evaluation(
    tasks_rows: list[tuple[Task, Sequence[Row]]], tmp_path: Path
) -> None:
    run(tasks_rows, Model(), tmp_path / "eval.parquet")
    with pytest.raises(UserError, match="holds other rows"):
        run(tasks_rows[:1], Model(), tmp_path / "eval.parquet")


def test_a_row_twice_is_refused_before_anything_is_asked(
    tasks_rows: list[tuple[Task, Sequence[Row]]], tmp_path: Path
) -> None:
    model = Model()
    with pytest.raises(UserError, match=r"gsm8k: example '.*' twice"):
        run([*tasks_rows, tasks_rows[0]], model, tmp_path / "eval.parquet")
    assert model.asked == []


def test_a_completion_for_every_prompt_or_none(
    tasks_rows: list[tuple[Task, Sequence[Row]]], tmp_path: Path
) -> None:
    model = Model()
    with pytest.raises(UserError, match="2 completions for 3 prompts"):
        evaluate(
            tasks_rows,
            lambda chats, limits: model(chats, limits)[:-1],
            digest="d",
            harness="h",
            out=tmp_path / "eval.parquet",
            batch_rows=3,
        )


def test_worked_examples_reach_the_model(
    tasks_rows: list[tuple[Task, Sequence[Row]]], shots: dict[str, Shots], tmp_path: Path
) -> None:
    model = Model()
    run(tasks_rows, model, tmp_path / "eval.parquet", shots=shots)
    lengths = [len(json.loads(chat)) for chat in model.asked]
    wanted = [11 if task.name == "mmlu_pro" else 1 for task, found in tasks_rows for _ in found]
    assert lengths == wanted


def test_progress_counts_rows_up_to_the_end_also_after_a_resume(
    tasks_rows: list[tuple[Task, Sequence[Row]]], tmp_path: Path
) -> None:
    total = sum(len(found) for _, found in tasks_rows)
    with pytest.raises(ConnectionError):
        run(tasks_rows, Model(fail_at=2), tmp_path / "eval.parquet")
    seen: list[tuple[int, int]] = []
    out = tmp_path / "eval.parquet"
    run(tasks_rows, Model(), out, progress=lambda done, of: seen.append((done, of)))
    assert seen == [*((done, total) for done in range(6, total, 3)), (total, total)]


def test_the_harness_hash_names_everything_that_changes_a_score(
    tasks_rows: list[tuple[Task, Sequence[Row]]], shots: dict[str, Shots]
) -> None:
    task, found = tasks_rows[0]
    settings = {"max_num_seqs": 64}
    variants = [
        harness_of([(task, found)], settings),
        harness_of([(task, found)], {"max_num_seqs": 32}),
        harness_of([(task, found[::-1])], settings),
        harness_of([(task, found[:-1])], settings),
        harness_of([(with_prompt(task, "{question}"), found)], settings),
        harness_of([(replace(task, prefill="#### "), found)], settings),
        harness_of([(replace(task, version="other"), found)], settings),
        harness_of([(replace(task, max_tokens=7), found)], settings),
        harness_of(tasks_rows, settings),
        harness_of(tasks_rows, settings, shots),
    ]
    assert len(set(variants)) == len(variants)
    assert variants[0] == harness_of([(task, list(found))], dict(settings))
    assert all(len(variant) == 64 for variant in variants)


def test_rescoring_equals_scoring_and_follows_a_changed_extraction(
    tasks_rows: list[tuple[Task, Sequence[Row]]], tmp_path: Path
) -> None:
    samples = run(tasks_rows, Model(), tmp_path / "eval.parquet")
    assert rescore(tmp_path / "eval.parquet", TASKS) == samples
    task, found = tasks_rows[0]
    given = run([(replace(task, prefill="#### 24"), found)], Model(), tmp_path / "given.parquet")
    assert {row["extracted"] for row in given} >= {"24"}
    assert rescore(tmp_path / "given.parquet", TASKS) == given
    hellaswag = replace(TASKS["hellaswag"], verify=TASKS["piqa"].verify)
    changed = rescored(samples, TASKS | {"hellaswag": hellaswag})
    differing = {new["task"] for old, new in zip(samples, changed, strict=True) if old != new}
    assert differing == {"hellaswag"}
    with pytest.raises(UserError, match="sample of task 'gsm8k'; allowed: piqa"):
        rescore(tmp_path / "eval.parquet", {"piqa": TASKS["piqa"]})


def test_a_summary_counts_what_the_samples_say(
    tasks_rows: list[tuple[Task, Sequence[Row]]], tmp_path: Path
) -> None:
    samples = run(tasks_rows, Model(), tmp_path / "eval.parquet")
    found = summaries(samples)
    assert list(found) == list(NAMES)
    for name, summary in found.items():
        own = [sample for sample in samples if sample["task"] == name]
        right = sum(sample["reward"] for sample in own)
        assert summary.n == len(own)
        assert summary.accuracy == right / len(own)
        assert (summary.low, summary.high) == wilson(int(right), len(own))
        assert summary.mean_tokens == sum(sample["tokens"] for sample in own) / len(own)
        cut = [sample for sample in own if sample["finish"] == "length"]
        assert summary.truncation_rate == len(cut) / len(own)
        assert summary.errors == 0
    assert summaries([]) == {}


def test_an_uncounted_token_and_a_failed_verifier_are_told_apart_from_zero(
    tasks_rows: list[tuple[Task, Sequence[Row]]], tmp_path: Path
) -> None:
    samples = run(tasks_rows[:1], Model(), tmp_path / "eval.parquet")
    odd = [sample | {"tokens": None} for sample in samples]
    odd[0] = odd[0] | {"error": "it failed", "reward": 0.0}
    write_samples(tmp_path / "odd.parquet", odd)
    [summary] = summaries(read_samples(tmp_path / "odd.parquet")).values()
    assert (summary.mean_tokens, summary.errors) == (None, 1)


def test_discordance_counts_both_directions_and_every_changed_text(
    tasks_rows: list[tuple[Task, Sequence[Row]]], tmp_path: Path
) -> None:
    one = run(tasks_rows, Model(), tmp_path / "one.parquet")
    same = run(tasks_rows, Model(), tmp_path / "same.parquet")
    other = run(tasks_rows, Model(salt="x"), tmp_path / "other.parquet")
    for found in discordance(one, same).values():
        assert (found.b, found.c, found.texts, found.rate) == (0, 0, 0, 0.0)
    there, back = discordance(one, other), discordance(other, one)
    assert sum(found.texts for found in there.values()) > 0
    for name, found in there.items():
        assert (found.b, found.c) == (back[name].c, back[name].b)
        accuracy = {s.task: s.accuracy for s in summaries(other).values()}[name]
        before = {s.task: s.accuracy for s in summaries(one).values()}[name]
        assert (found.c - found.b) / found.n == pytest.approx(accuracy - before)


def test_evaluations_of_other_rows_are_not_compared(
    tasks_rows: list[tuple[Task, Sequence[Row]]], tmp_path: Path
) -> None:
    one = run(tasks_rows, Model(), tmp_path / "one.parquet")
    with pytest.raises(UserError, match="1 rows stand in only one evaluation"):
        discordance(one, one[:-1])


def test_the_parquet_has_the_promised_columns(
    tasks_rows: list[tuple[Task, Sequence[Row]]], tmp_path: Path
) -> None:
    run(tasks_rows, Model(), tmp_path / "eval.parquet")
    columns = pq.read_schema(tmp_path / "eval.parquet").names
    promised = "task example_id prompt_hash completion extracted reward format tokens finish error"
    assert columns[:12] == [*promised.split(), "harness_hash", "digest"]
