"""Every extraction against hand-written verdicts, real rows and random text."""

import json
import os
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluators.loading import read_file, rows
from evaluators.task import Task, judge, row_problem
from evaluators.tasks import TASKS

HERE = Path(__file__).parent
SOAK = os.environ.get("ANCHORAGE_SOAK") == "1"
BOUND_S = 0.1  # of CPU for 100 kB, as the issue asks
BIG_CHARS = 100_000

# Words that extractions look for, so that random text comes near them.
PIECES = [
    *("<answer>", "</answer>", "####", "\\boxed{", "}", "</think>", "Answer:", "Final answer"),
    *("The answer is (", "ANSWER IS ", "True", "false", "Unknown", "COMPLY", "refuse", "(", ")"),
    *("-", "+", "*", "/", "**", "//", " ", "\n", "\t", ",", "$", "%", ".", "0", "1", "2", "3"),
    *("7", "44", "A", "b", "I", "J", "é", "İ", "ß", "\ud800", "\x00", "٣", "²", "1/2", "9" * 50),
]
TEXTS = st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=30).map("".join))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@cache
def example(task: Task) -> dict[str, Any]:
    """The row of the task's first case."""
    found: dict[str, Any] = read(HERE / "cases" / f"{task.name}.jsonl")[0]["example"]
    return found


# Later decisions than the shared cases': white space around an expression is not part of it, and
# of every task's answers what follows the thinking is read.
SUPERSEDED = {
    ("countdown", "<answer>\n44 + 19 + 35\n</answer>"),
    ("hellaswag", "<think>0 is odd</think>3"),
}


def disagreements(task: Task, path: Path) -> list[str]:
    found = []
    for case in read(path):
        if path.parent != HERE / "cases" and (task.name, case["completion"]) in SUPERSEDED:
            continue
        verdict = judge(task, case["completion"], case["example"])
        if verdict.reward != case["expected_reward"] or verdict.error:
            found.append(f"{case['why']}: {verdict}")
    return found


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_our_own_cases(task: Task) -> None:
    assert disagreements(task, HERE / "cases" / f"{task.name}.jsonl") == []


def test_every_task_has_at_least_fifteen_cases_of_both_kinds() -> None:
    for name in TASKS:
        rewards = [case["expected_reward"] for case in read(HERE / "cases" / f"{name}.jsonl")]
        assert len(rewards) >= 15
        assert set(rewards) == {0.0, 1.0}


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_only_what_follows_the_thinking_is_read(task: Task) -> None:
    cases = read(HERE / "cases" / f"{task.name}.jsonl")
    row = next(case["example"] for case in cases if not row_problem(task, case["example"]))
    gold, wrong = task.gold(row), task.wrong(row)
    assert judge(task, f"<think>\n{wrong}\n</think>\n\n{gold}", row).reward == 1.0
    assert judge(task, f"<think>\n{gold}\n</think>\n\n{wrong}", row).reward == 0.0


def test_the_shared_cases(real_rows: Path | None) -> None:
    folder = real_rows.parent / "cases" if real_rows else HERE / "cases"
    found = {path.stem: disagreements(TASKS[path.stem], path) for path in folder.glob("*.jsonl")}
    assert len(found) >= 7
    assert {name: texts for name, texts in found.items() if texts} == {}


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_gold_scores_1_and_wrong_scores_0_on_every_row(task: Task, real_rows: Path | None) -> None:
    folder = real_rows or HERE / "rows"
    files = sorted((folder / task.name).glob("*.jsonl"))
    every = [row for file in files for row in read_file(file)] or rows(task, "eval")
    for row in every:
        gold, wrong = judge(task, task.gold(row), row), judge(task, task.wrong(row), row)
        assert (gold.reward, gold.format, gold.error) == (1.0, 1.0, None), row
        assert (wrong.reward, wrong.error) == (0.0, None), row
        assert gold.extracted is not None


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_every_row_has_a_key_of_its_own(task: Task, real_rows: Path | None) -> None:
    folder = real_rows or HERE / "rows"
    for file in sorted((folder / task.name).glob("*.jsonl")):
        keys = [task.key(row) for row in read_file(file)]
        assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
@settings(max_examples=2000 if SOAK else 60, deadline=None)
@given(text=TEXTS)
def test_no_text_makes_an_extraction_fail(task: Task, text: str) -> None:
    verdict = judge(task, text, example(task))
    assert verdict.error is None
    assert verdict.reward in (0.0, 1.0)
    assert verdict.format in (0.0, 1.0)
    assert verdict == judge(task, text, example(task))
    if verdict.reward:
        assert verdict.extracted is not None


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
@settings(max_examples=200 if SOAK else 12, deadline=None)
@given(unit=TEXTS.filter(bool), end=TEXTS)
def test_100_kilobytes_are_read_within_the_bound(task: Task, unit: str, end: str) -> None:
    text = (unit * (BIG_CHARS // len(unit)))[: BIG_CHARS - len(end)] + end
    assert cpu_s(task, text) < BOUND_S


FORMATS = [
    ("countdown", "<answer>1 + 1</answer>", 1.0),  # a well-formed expression, whatever its value
    ("countdown", "<answer>1 +</answer>", 0.0),
    ("countdown", "1 + 1", 0.0),
    ("gsm8k", "so\n#### 1,234", 1.0),
    ("gsm8k", "#### -3.5", 1.0),
    ("gsm8k", "#### \u22123.5", 1.0),
    ("gsm8k", "#### 18 eggs", 0.0),
    ("gsm8k", "\\boxed{18}", 0.0),
    ("gsm8k", "18", 0.0),
    ("proofwriter", "so\nAnswer: unknown", 1.0),
    ("proofwriter", "Answer: unknown.\nSo it is.", 1.0),
    ("proofwriter", "Answer: maybe", 0.0),
    ("proofwriter", "Answer: True or False", 0.0),
    ("proofwriter", "Final answer: True", 0.0),
    ("proofwriter", "True", 0.0),
    ("hellaswag", " 3\n", 1.0),
    ("hellaswag", "3.", 0.0),
    ("piqa", "1", 1.0),
    ("piqa", "Solution 1", 0.0),
    ("arc_challenge", "So the answer is (B).", 1.0),
    ("arc_challenge", "The answer is B", 0.0),
    ("mmlu_pro", "The answer is (J).", 1.0),
    ("mmlu_pro", "J", 0.0),
    ("refusal", "REFUSE: no", 1.0),
    ("refusal", "I REFUSE", 0.0),
]


@pytest.mark.parametrize(("name", "completion", "wanted"), FORMATS)
def test_the_format_reward_asks_for_the_asked_form(
    name: str, completion: str, wanted: float
) -> None:
    assert judge(TASKS[name], completion, example(TASKS[name])).format == wanted


# Repetitions on which a careless pattern backtracks quadratically.
BOMBS = [
    *("<answer>", "<answer></answer>", "####", "#### ", "\\boxed{", "\\boxed{{", "\\boxed{{}"),
    *("Answer:", "Answer: ", "answer ", "final ", "Final answer", "Answer: a", "true ", "True\n"),
    *("ANSWER IS ", "ANSWER IS (", "The answer is\n", " ", "\n", "\t", "a", "a ", ".", "!?", "("),
    *("true or ", "true,", "true /", "'d ", "answer is a", "\u2212", "} \\boxed{", "answer:\n"),
    *("1,", "9", "1/", "-", "\x1c", "\u2028", "ß", "ﬃ", "$", "((", "1 ", "comply_", "\r\n"),
]


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_repetitions_are_read_within_the_bound(
    task: Task, scale: Callable[[int, int], int]
) -> None:
    slow = {}
    for number, unit in enumerate(BOMBS):
        text = unit * (BIG_CHARS // len(unit))
        wholes = [f"Answer: {text}1", f"final answer{text}1", f"<answer>{text}\x00x1", text]
        for place in range(scale(1, 4)):  # in short runs one of the four, in turn
            whole = wholes[(number + place) % len(wholes)]
            taken_s = cpu_s(task, whole)
            if taken_s > BOUND_S:
                slow[unit, whole[:8]] = taken_s
    assert slow == {}


def cpu_s(task: Task, text: str) -> float:
    """Seconds of CPU that a verdict takes; a slow look is repeated once."""
    for _ in range(2):
        started = time.thread_time()
        judge(task, text, example(task))
        taken_s = time.thread_time() - started
        if taken_s < BOUND_S:
            break
    return taken_s
