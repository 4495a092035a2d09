"""Rows from files and the hub: which split, which subset, in which order."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from agent.errors import UserError
from evaluators.loading import EVAL_SHARE, examples, in_eval_share, rows
from evaluators.plugins import pinned
from evaluators.task import Row, Source
from evaluators.tasks import TASKS

ROWS = Path(__file__).parent / "rows"
GSM8K = TASKS["gsm8k"]


def problems(count: int) -> list[dict[str, str]]:
    return [{"question": f"Question {n}?", "answer": f"#### {n}"} for n in range(count)]


def write(folder: Path, name: str, found: Sequence[Row]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in found)
    if name.endswith(".gz"):
        (folder / name).write_bytes(gzip.compress(text.encode()))
    elif name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(list(found)), folder / name)
    else:
        (folder / name).write_text(text, encoding="utf-8")


def questions(found: Sequence[Row]) -> set[str]:
    return {row["question"] for row in found}


@pytest.mark.parametrize("name", ["test.jsonl", "test.jsonl.gz", "test.parquet", "eval.jsonl"])
def test_every_file_kind_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    write(tmp_path / "gsm8k", name, problems(30))
    found = rows(GSM8K, "eval", data_dir=tmp_path)
    assert sorted(found, key=str) == sorted(problems(30), key=str)


@pytest.mark.parametrize("name", [name for name in TASKS if name != "refusal"])
def test_rows_of_every_task_load_from_the_published_file_names(name: str) -> None:
    found = rows(TASKS[name], "eval", data_dir=ROWS)
    assert len(found) == len({TASKS[name].key(row) for row in found}) >= 3


def test_a_subset_depends_on_the_seed_alone_and_smaller_ones_nest(tmp_path: Path) -> None:
    write(tmp_path / "gsm8k", "test.jsonl", problems(200))
    write(tmp_path / "turned" / "gsm8k", "test.jsonl", problems(200)[::-1])
    ten = rows(GSM8K, "eval", data_dir=tmp_path, limit=10, seed=3)
    assert ten == rows(GSM8K, "eval", data_dir=tmp_path, limit=50, seed=3)[:10]
    assert ten == rows(GSM8K, "eval", data_dir=tmp_path / "turned", limit=10, seed=3)
    other = rows(GSM8K, "eval", data_dir=tmp_path, limit=10, seed=4)
    assert questions(other) != questions(ten)


def test_one_split_is_divided_by_hash_without_overlap(tmp_path: Path) -> None:
    task = TASKS["countdown"]
    found = [{"nums": [n, n + 1, 2 * n], "target": n} for n in range(1, 1001)]
    write(tmp_path / "countdown", "train.jsonl", found)
    train = {task.key(row) for row in rows(task, "train", data_dir=tmp_path)}
    evaluation = {task.key(row) for row in rows(task, "eval", data_dir=tmp_path)}
    assert train | evaluation == {task.key(row) for row in found}
    assert train & evaluation == set()
    assert abs(len(evaluation) - 1000 * EVAL_SHARE) < 60  # more than 4 standard deviations
    assert all(in_eval_share(key) for key in evaluation)


def test_two_files_are_two_splits_and_none_is_divided() -> None:
    for name, trained, tested in (("countdown", 3, 6), ("gsm8k", 2, 4)):
        assert len(rows(TASKS[name], "train", data_dir=ROWS)) == trained
        assert len(rows(TASKS[name], "eval", data_dir=ROWS)) == tested


def test_one_problem_twice_is_one_row(tmp_path: Path) -> None:
    write(tmp_path / "gsm8k", "test.jsonl", problems(5) + problems(5))
    assert len(rows(GSM8K, "eval", data_dir=tmp_path)) == 5


def test_hellaswag_rows_that_share_ind_stay_apart() -> None:
    found = rows(TASKS["hellaswag"], "eval", data_dir=ROWS)
    assert len({row["ind"] for row in found}) < len(found) == 4


@pytest.mark.parametrize(
    ("name", "split", "told"),
    [
        ("gsm8k", "test", "split 'test': allowed: train, eval"),
        ("mmlu_pro", "train", "never trained on"),
        ("refusal", "train", "never trained on"),
        ("hellaswag", "train", r"no rows in .*hellaswag; wanted one of train\.jsonl"),
    ],
)
def test_a_split_that_is_not_there_is_told_in_one_line(name: str, split: str, told: str) -> None:
    with pytest.raises(UserError, match=told) as error:
        rows(TASKS[name], split, data_dir=ROWS)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"question": 1}\n{oops\n', "line 2: not JSON"),
        ("[1]\n", "line 1: list; an object"),
        ("", "no eval rows"),
    ],
)
def test_a_broken_file_is_told_by_its_line(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").write_text(text)
    with pytest.raises(UserError, match=told):
        rows(GSM8K, "eval", data_dir=tmp_path)


def test_rows_beside_an_own_task_are_divided_by_hash(tmp_path: Path) -> None:
    write(tmp_path, "own.jsonl", problems(100))
    source = Source("", eval_split="train", file=str(tmp_path / "own.jsonl"))
    task = replace(GSM8K, source=source)
    train, evaluation = rows(task, "train"), rows(task, "eval")
    assert questions(train) | questions(evaluation) == questions(problems(100))
    assert questions(train) & questions(evaluation) == set()
    assert len(evaluation) > 5


class Hub(ModuleType):
    """The library's one function that is used: it remembers what it was asked, or fails."""

    def __init__(self, found: Sequence[Row] | Exception) -> None:
        super().__init__("datasets")
        self.found = found
        self.asked: dict[str, Any] = {}

    def load_dataset(self, hub_id: str, config: str | None, **named: str) -> Sequence[Row]:
        self.asked = {"hub_id": hub_id, "config": config, **named}
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


def test_the_hub_is_asked_for_the_pinned_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(problems(3))
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert questions(rows(GSM8K, "eval")) == questions(problems(3))
    assert hub.asked == {
        "hub_id": "openai/gsm8k",
        "config": "main",
        "split": "test",
        "revision": GSM8K.source.revision,
    }
    own = pinned({"gsm8k": GSM8K}, {"gsm8k": "f" * 40})["gsm8k"]
    rows(own, "train")
    assert (hub.asked["split"], hub.asked["revision"]) == ("train", "f" * 40)
    with pytest.raises(UserError, match="revision for task 'gsm9k'; allowed: gsm8k"):
        pinned({"gsm8k": GSM8K}, {"gsm9k": "f" * 40})


def test_a_failing_hub_is_one_line_that_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", Hub(ConnectionError("no\nroute")))
    with pytest.raises(UserError, match=r"openai/gsm8k.*ConnectionError: no route") as error:
        rows(GSM8K, "eval")
    assert "<data_dir>/gsm8k/test.jsonl" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.integration
def test_an_unreachable_hub_is_one_line_that_names_the_way_out() -> None:
    code = (
        "from evaluators.loading import rows\n"
        "from evaluators.tasks import TASKS\n"
        "from agent.errors import UserError\n"
        "try: rows(TASKS['gsm8k'], 'eval')\n"
        "except UserError as error: print(error)"
    )
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": os.devnull + "/none"}
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=offline
    ).stdout.strip()
    assert told.count("\n") == 0
    assert "openai/gsm8k" in told
    assert "<data_dir>/gsm8k/test.jsonl" in told


def test_every_hub_source_is_pinned_to_a_commit_where_one_is_known() -> None:
    pinned = {name for name, task in TASKS.items() if len(task.source.revision) == 40}
    assert pinned == set(TASKS) - {"proofwriter", "refusal"}


def test_worked_examples_ask_for_few_keys_however_long_the_split(tmp_path: Path) -> None:
    """A key of an own task is a call of another process: 500 rows x 2 examples, not 500 x 500."""
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    own = problems(500)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    asked: list[Row] = []

    def key(row: Row) -> str:
        asked.append(row)
        return str(row["question"])

    shots = examples(replace(GSM8K, shots=2, key=key), data_dir=tmp_path)
    assert [shot["question"] for shot in shots(own[0])] == ["Question 1?", "Question 2?"]
    assert [shot["question"] for shot in shots(own[9])] == ["Question 0?", "Question 1?"]
    assert len(asked) == (1 + 3) + (1 + 2)
