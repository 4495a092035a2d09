"""The task of docs/tasks.md that knows no answers: checked, served, verified, and trained on."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import exchange
import httpx
import pytest

from agent.errors import UserError
from evaluators.plugins import check
from evaluators.runner import record
from evaluators.task import Row, Task, Verdict, judge, row_problem
from flows.learn.collect import collect_rows
from flows.service import Service
from flows.show.review import Moved, examples

PAGE = Path(__file__).parents[3] / "docs" / "tasks.md"
COUNT = 6


def documented() -> str:
    """The page's task."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (text,) = (block for block in blocks if 'name="steps"' in block)
    return str(text)


class Stepwise(httpx.MockTransport):
    """An engine that is right for every other question."""

    def __init__(self, rows: list[Row]) -> None:
        super().__init__(self.handle)
        self._answers = {row["question"]: row["answer"] for row in rows}
        self._asked = 0

    def handle(self, request: httpx.Request) -> httpx.Response:
        question = json.loads(request.content)["messages"][-1]["content"].split("\n")[0]
        self._asked += 1
        text = self._answers[question] if self._asked % 2 else "#### 7"
        usage = {"prompt_tokens": 60, "completion_tokens": 4, "total_tokens": 64}
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        return httpx.Response(200, json={"id": "x", "choices": [choice], "usage": usage})


def asked(rows: list[Row]) -> list[dict[str, str]]:
    return [{"question": row["question"]} for row in rows]  # no answer is in them


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> tuple[Service, list[Row]]:
    """A home whose target has no gold, after requests through its endpoint."""
    rows = exchange.questions(60 + COUNT)
    root = tmp_path_factory.mktemp("steps")
    service = exchange.desk(root, asked(rows[COUNT:]), "steps", documented())
    with exchange.connected(service, Stepwise(rows)) as client:
        for row in asked(rows[:COUNT]):
            about: Any = {"task": "steps", "example": json.dumps(row)}
            messages: Any = [{"role": "user", "content": exchange.told(row)}]
            client.chat.completions.create(model="anchorage", messages=messages, metadata=about)
    return service, rows


def test_its_check_finds_nothing_and_its_verifier_tells_answers_apart(
    steps: tuple[Service, list[Row]],
) -> None:
    service, rows = steps
    task = service.task("steps")
    assert (task.gold, task.wrong) == (None, None)
    assert check(task, asked(rows[:20])) == []
    for row in rows[:20]:
        bare = {"question": row["question"]}
        assert row_problem(task, bare) is None
        assert judge(task, row["answer"], bare).reward == 1
        assert judge(task, row["answer"].replace("=", "=1"), bare).reward == 0
        assert judge(task, "Then <<1001+1=1002>>1002.\n#### 1002", bare).reward == 0


def test_its_traffic_is_verified_and_trained_on(steps: tuple[Service, list[Row]]) -> None:
    service, rows = steps
    verdicts = service.experience.rows("steps")
    assert sorted(each.reward for each in verdicts) == [0.0] * 3 + [1.0] * 3
    collected = collect_rows(service, "steps", COUNT + 4)
    assert (collected.from_traffic, sum(collected.counts().values())) == (COUNT, 0)
    sent = {each.row["question"] for each in collected.asked[:COUNT]}
    assert sent == {row["question"] for row in rows[:COUNT]}


def test_a_verifier_of_the_prompt_as_sent_judges_single_requests_too(tmp_path: Path) -> None:
    """Rewarded is whoever asked politely, which the row does not say."""
    polite = 'lambda messages, row: Verdict(float("Please" in messages[-2]["content"]), 1.0, None)'
    text = documented().replace("    target=True,", f"    target=True,\n    converse={polite},")
    rows = exchange.questions(20)
    service = exchange.desk(tmp_path, asked(rows[2:]), "steps", text)
    with exchange.connected(service, Stepwise(rows)) as client:
        for row, ending in zip(asked(rows[:2]), ("", "\nPlease."), strict=True):
            about: Any = {"task": "steps", "example": json.dumps(row)}
            messages: Any = [{"role": "user", "content": row["question"] + ending}]
            client.chat.completions.create(model="anchorage", messages=messages, metadata=about)
    assert [each.reward for each in service.experience.rows("steps")] == [0.0, 1.0]
    assert collect_rows(service, "steps", 4).from_traffic == 2


@pytest.mark.parametrize(
    ("change", "problem", "line"),
    [
        ({}, None, None),
        ({"verify": lambda text, row: Verdict(1.0, 1.0, text)}, "the empty answer scores 1; less "
         "than 1 is wanted", "the empty answer '' scores 1; 0 is wanted"),
        ({"wrong": lambda row: "<<1+1=2>>2.\n#### 2"}, "the wrong answer scores 1; less than 1 is "
         "wanted", "scores 1; 0 is wanted"),
        ({"graded": True, "verify": lambda text, row: Verdict(1.0, 1.0, text)}, "the empty answer "
         "scores 1; less than 1 is wanted", "scores 1; less than 1 is wanted"),
        ({"graded": True, "verify": lambda text, row: Verdict(0.4, 1.0, text)}, None, None),
    ],
)  # fmt: skip
def test_an_answer_that_is_none_may_not_earn_all(
    change: dict[str, Any], problem: str | None, line: str | None
) -> None:
    names: dict[str, Any] = {}
    exec(documented(), names)
    task: Task = replace(names["TASK"], **change)
    row = {"question": "1 pen and 1 more: how many?"}
    assert row_problem(task, row) == problem
    problems = check(task, [row])
    assert any(line in each for each in problems) if line else problems == []


def test_what_shows_a_gold_answer_goes_on_without_one() -> None:
    names: dict[str, Any] = {}
    exec(documented(), names)
    task: Task = names["TASK"]
    sample: dict[str, Any] = {
        "task": "steps", "example_id": "1", "prompt": "[]", "completion": "#### 2",
        "extracted": "2", "reward": 0.0, "example": "{}", "format": 1.0,
    }  # fmt: skip
    page = examples([Moved("a question", "", sample, sample | {"reward": 1.0})], [])
    assert "a question" in page
    assert "gold" not in page
    assert record(0, sample, task)["target"] == ""  # type: ignore[arg-type]
    with pytest.raises(UserError, match="worked examples need demonstrate or gold"):
        task.worked({})
