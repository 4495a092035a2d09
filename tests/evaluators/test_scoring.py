"""`anchorage score`: lines in, lines out."""

import json
from pathlib import Path

import pytest

from agent.errors import UserError
from evaluators.task import score_lines
from evaluators.tasks import TASKS

CASES = Path(__file__).parent / "cases"


@pytest.mark.parametrize("name", TASKS)
def test_a_file_of_cases_is_scored_line_by_line(name: str) -> None:
    lines = (CASES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    scores = list(score_lines(TASKS[name], lines))
    wanted = [json.loads(line)["expected_reward"] for line in lines]
    assert [score["reward"] for score in scores] == wanted
    assert all(list(score) == ["reward", "format", "extracted"] for score in scores)


def test_scores_come_one_by_one_and_blank_lines_pass() -> None:
    line = json.dumps({"completion": "#### 1", "example": {"answer": "#### 1"}})
    scores = score_lines(TASKS["gsm8k"], ["\n", line, "not JSON"])
    assert next(scores) == {"reward": 1.0, "format": 1.0, "extracted": "1"}
    with pytest.raises(UserError, match="line 3: not JSON"):
        next(scores)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "line 1: not JSON"),
        ("[" * 100_000, "line 1: not JSON"),
        ("[]", "line 1: list; an object is wanted"),
        ('{"example": {}}', "line 1: completion is missing; a string is wanted"),
        ('{"completion": 3, "example": {}}', "line 1: completion is int; a string is wanted"),
        ('{"completion": "x"}', "line 1: example is missing; an object is wanted"),
        ('{"completion": "x", "example": "y"}', "line 1: example is str; an object is wanted"),
    ],
)
def test_a_malformed_line_is_told_by_its_number(line: str, told: str) -> None:
    with pytest.raises(UserError) as error:
        list(score_lines(TASKS["gsm8k"], [line]))
    assert str(error.value).startswith(told)
    assert "\n" not in str(error.value)


def test_an_example_without_its_answer_is_an_error_on_that_line_only() -> None:
    good = json.dumps({"completion": "#### 1", "example": {"answer": "#### 1"}})
    bad = json.dumps({"completion": "#### 1", "example": {"question": "?"}})
    first, second = score_lines(TASKS["gsm8k"], [bad, good])
    assert (first["reward"], first["error"]) == (0.0, "KeyError: 'answer'")
    assert second["reward"] == 1.0
