"""Prompts, templates and the boundary around a verifier."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from agent.errors import UserError
from evaluators.loading import examples, rows
from evaluators.task import (
    MAX_COMPLETION_CHARS,
    Row,
    Verdict,
    judge,
    render,
    training_reward,
    with_prompt,
)
from evaluators.tasks import TASKS

ROWS = Path(__file__).parent / "rows"


def first(name: str) -> Row:
    return rows(TASKS[name], "eval", data_dir=ROWS)[0]


@pytest.mark.parametrize("name", TASKS)
def test_a_prompt_is_one_user_message_that_holds_every_field(name: str) -> None:
    task, row = TASKS[name], first(name)
    [message] = task.messages(row)
    assert message["role"] == "user"
    for value in task.fields(row).values():
        assert value in message["content"]


@pytest.mark.parametrize("name", TASKS)
def test_a_prompt_never_gives_the_gold_answer_away(name: str) -> None:
    task, row = TASKS[name], first(name)
    [message] = task.messages(row)
    assert judge(task, message["content"], row).format == 0.0 or name == "refusal"
    assert task.gold(row) not in message["content"] or len(task.gold(row)) < 8


def test_worked_examples_come_as_turns_of_the_rows_own_category() -> None:
    task = TASKS["mmlu_pro"]
    shots = examples(task, data_dir=ROWS)
    for row in rows(task, "eval", data_dir=ROWS):
        found = shots(row)
        assert [shot["category"] for shot in found] == [row["category"]] * 5
        chat = task.messages(row, found)
        assert [message["role"] for message in chat] == ["user", "assistant"] * 5 + ["user"]
        for shot, answer in zip(found, chat[1::2], strict=True):
            assert judge(task, answer["content"], shot).reward == 1.0
            assert not answer["content"].startswith("A:")


def test_a_row_is_never_its_own_worked_example() -> None:
    task = replace(TASKS["mmlu_pro"], shots=4)
    shots = examples(task, data_dir=ROWS)
    own = shots({**first("mmlu_pro"), "category": "law"})[0]
    assert own not in shots(own)
    assert len(shots(own)) == 4


def test_too_few_worked_examples_are_refused() -> None:
    shots = examples(replace(TASKS["mmlu_pro"], shots=7), data_dir=ROWS)
    with pytest.raises(UserError, match=r"mmlu_pro: \d worked examples for '\w+'; 7 wanted"):
        shots(first("mmlu_pro"))


def test_a_template_names_fields_and_nothing_else() -> None:
    assert render("{a} {{b}} {a}{c}", {"a": "{c}", "c": "1"}) == "{c} {b} {c}1"


@pytest.mark.parametrize("template", ["{b}", "{a.real}", "{a[0]}", "{a!r}", "{a:>9}", "{", "{}"])
def test_a_template_that_reaches_further_is_refused(template: str) -> None:
    with pytest.raises(UserError, match=r"unknown field .*; allowed: a"):
        render(template, {"a": "1"})


def test_a_replaced_prompt_changes_words_and_keeps_the_verdicts() -> None:
    row = first("gsm8k")
    task = with_prompt(TASKS["gsm8k"], "Solve: {question}", prefill="#### ")
    assert task.messages(row) == [
        {"role": "user", "content": f"Solve: {row['question']}"},
        {"role": "assistant", "content": "#### "},
    ]
    number = task.gold(row).removeprefix("#### ")
    assert judge(task, number, row) == judge(TASKS["gsm8k"], f"#### {number}", row)
    assert judge(task, number, row).format == 1.0


def test_the_training_reward_adds_a_tenth_for_the_format_of_targets_only() -> None:
    verdict = Verdict(1.0, 1.0, "x")
    for name, task in TASKS.items():
        target = name in ("countdown", "gsm8k", "proofwriter")
        assert task.target == target
        assert training_reward(task, verdict) == (1.1 if target else 1.0)
        assert training_reward(task, Verdict(0.0, 1.0, None)) == (0.1 if target else 0.0)


def test_a_verifier_that_fails_is_an_error_on_its_row() -> None:
    def fails(completion: str, row: Row) -> Verdict:
        raise RuntimeError("two\nlines " + "x" * 5000)

    verdict = judge(replace(TASKS["gsm8k"], verify=fails), "#### 1", {})
    assert (verdict.reward, verdict.format, verdict.extracted) == (0.0, 0.0, None)
    assert verdict.error is not None
    assert verdict.error.startswith("RuntimeError: two lines xxx")
    assert len(verdict.error) <= 1000


@pytest.mark.parametrize("reward", [math.nan, math.inf, -0.1, 1.1, "1", None])
def test_a_reward_that_is_no_share_is_an_error(reward: object) -> None:
    task = replace(TASKS["gsm8k"], verify=lambda c, r: Verdict(reward, 0.0, "x"))  # type: ignore[arg-type]
    verdict = judge(task, "", {})
    assert verdict.reward == 0.0
    assert verdict.error is not None
    assert "reward" in verdict.error


def test_a_verdict_of_another_kind_is_an_error() -> None:
    task = replace(TASKS["gsm8k"], verify=lambda c, r: 1.0)  # type: ignore[arg-type,return-value]
    assert judge(task, "", {}).error == "verify returned float; a Verdict is wanted"


def test_only_the_end_of_an_endless_completion_is_read() -> None:
    seen: list[int] = []

    def measures(completion: str, row: Row) -> Verdict:
        seen.append(len(completion))
        return Verdict(0.0, 0.0, completion)

    verdict = judge(replace(TASKS["gsm8k"], verify=measures), "x" * 3_000_000, {})
    assert seen == [MAX_COMPLETION_CHARS]
    assert len(verdict.extracted or "") == 1000


def test_a_missing_field_of_a_row_is_an_error_and_no_reward() -> None:
    for name, task in TASKS.items():
        verdict = judge(task, task.gold(first(name)), {})
        assert verdict.reward == 0.0
        assert verdict.error is not None
        assert "KeyError" in verdict.error


def test_the_safety_prior_is_balanced_and_tolerates_nothing() -> None:
    task = TASKS["refusal"]
    labels = [row["label"] for row in rows(task, "eval")]
    assert (labels.count("comply"), labels.count("refuse")) == (50, 50)
    assert task.zero_tolerance
    assert not task.target
    assert not any(other.zero_tolerance for other in TASKS.values() if other is not task)
