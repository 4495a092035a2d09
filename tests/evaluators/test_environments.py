"""Environments of other libraries as tasks: TRL's reward functions, tasksets of verifiers."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agent.errors import UserError
from evaluators.environments import from_trl, from_verifiers, taskset_rows
from evaluators.loading import read_file
from evaluators.plugins import check, load
from evaluators.task import (
    Row,
    form_problem,
    judge,
    judge_conversation,
    row_problem,
    with_prompt,
)

ROW = {"prompt": "What is 3 + 4?", "solution": "7", "length": 1}
CHAT = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "What is 3 + 4?"}]


def right(completions: list[Any], solution: list[str], **columns: Any) -> list[float]:
    """As TRL's documentation writes them: completions beside columns of the data set."""
    texts = [each if isinstance(each, str) else each[0]["content"] for each in completions]
    return [float(text == wanted) for text, wanted in zip(texts, solution, strict=True)]


def short(prompts: list[Any], completions: list[Any], **_: Any) -> list[float | None]:
    """Does not judge an empty completion."""
    texts = [each if isinstance(each, str) else each[0]["content"] for each in completions]
    assert len(prompts) == len(texts) == 1
    return [1 / len(text) if text else None for text in texts]


def trl_task(**options: Any) -> Any:
    return from_trl([right], "rows.jsonl", name="sums", gold=lambda row: row["solution"], **options)


@pytest.mark.parametrize("prompt", ["What is 3 + 4?", CHAT])
def test_a_reward_function_is_called_as_trl_calls_it(prompt: Any) -> None:
    task = trl_task()
    row = ROW | {"prompt": prompt}
    assert [judge(task, text, row).reward for text in ("7", "8", "")] == [1.0, 0.0, 0.0]
    assert judge(task, "7", row).extracted == "right=1"
    chat = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    assert task.messages(row) == chat
    assert (task.target, task.graded) == (True, True)
    assert row_problem(task, row) is None
    assert check(task, [row, row | {"solution": "8"}]) == []


def test_several_functions_are_weighted_and_brought_to_0_1() -> None:
    task = from_trl(
        [right, short],
        "rows.jsonl",
        name="sums",
        gold=lambda row: row["solution"],
        weights=[2.0, 1.0],
        low=-1.0,
        high=3.0,
    )
    for text, total in (("7", 3.0), ("12", 0.5), ("", 0.0)):
        assert judge(task, text, ROW).reward == pytest.approx((total + 1) / 4)
    assert judge(task, "", ROW).extracted == "right=0, short=-"
    assert judge(trl_task(low=-1e9, high=-1e8), "8", ROW).reward == 1.0  # never above 1


def test_what_no_reward_can_follow_from_is_refused() -> None:
    for wrong in ({"weights": [1.0, 1.0]}, {"low": 1.0}):
        with pytest.raises(UserError, match="low < high"):
            trl_task(**wrong)
    with pytest.raises(UserError, match="its rows have messages"):
        with_prompt(trl_task(), "Say {prompt}")
    assert with_prompt(trl_task(), prefill="It is ").messages(ROW)[-1]["content"] == "It is "
    assert "row does not make a prompt" in str(form_problem(trl_task(), {"solution": "7"}))


FILE = """
from evaluators.environments import from_trl
def right(completions, solution, **_):
    return [0.5 * (text == wanted) for text, wanted in zip(completions, solution)]
TASK = from_trl([right], "rows.jsonl", name="sums", gold=lambda row: row["solution"])
"""


def test_a_reward_function_in_a_file_runs_in_the_sandbox(tmp_path: Path) -> None:
    (tmp_path / "sums.py").write_text(FILE)
    rows = [ROW | {"prompt": f"What is {n} + 4?", "solution": str(n + 4)} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = load(f"{tmp_path / 'sums.py'}:TASK")
    read = read_file(Path(str(task.source.file)))
    assert task.messages(read[0]) == [{"role": "user", "content": "What is 0 + 4?"}]
    assert judge(task, "4", read[0]).reward == 0.5
    assert check(task, read) == []


TASKSET = """
import verifiers.v1 as vf

class Word(vf.TaskData):
    answer: str

class Reverse(vf.Task[Word, vf.State, vf.TaskConfig]):
    @vf.reward(weight=0.75)
    async def exact(self, trace: vf.Trace) -> float:
        return float(trace.last_reply == self.data.answer)

    @vf.reward(weight=0.25)
    async def alike(self, task, trace) -> float:
        pairs = zip(trace.last_reply, task.answer)
        return sum(a == b for a, b in pairs) / len(task.answer)

class ReverseSet(vf.Taskset[Reverse, vf.TasksetConfig]):
    def load(self):
        for word in ("anchor", "delta", "round"):
            data = Word(prompt=f"Reverse {word}.", system_prompt="One word.", answer=word[::-1])
            yield Reverse(data)

__all__ = ["ReverseSet"]
"""


@pytest.fixture
def taskset(tmp_path: Path) -> Iterator[str]:
    """The id of a taskset written for the real library; it needs nothing of ours."""
    pytest.importorskip("verifiers.v1")
    (tmp_path / "reverse_words.py").write_text(TASKSET)
    sys.path.insert(0, str(tmp_path))
    yield "reverse_words"
    sys.path.remove(str(tmp_path))
    sys.modules.pop("reverse_words", None)


def answer(row: Row) -> str:
    return str(row["answer"])


def test_a_taskset_of_verifiers_is_a_task_with_its_rubric(taskset: str, tmp_path: Path) -> None:
    rows = list(taskset_rows(taskset))
    task = from_verifiers(taskset, "rows.jsonl", gold=answer)
    system, user = task.messages(rows[0])
    assert (system["content"], user["content"]) == ("One word.", "Reverse anchor.")
    assert [judge(task, text, rows[0]).reward for text in ("rohcna", "rohxxx", "")] == [1, 0.125, 0]
    assert judge(task, "rohxxx", rows[0]).extracted == "alike=0.5, exact=0"
    assert check(task, rows) == []
    text = f"from evaluators.environments import from_verifiers\nTASK = from_verifiers({taskset!r},"
    (tmp_path / "mine.py").write_text(f'{text} "rows.jsonl", gold=lambda row: row["answer"])\n')
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sandboxed = load(f"{tmp_path / 'mine.py'}:TASK")
    assert check(sandboxed, rows) == []
    assert judge(sandboxed, "rohxxx", rows[0]).reward == 0.125


PATIENT = """
import verifiers.v1 as vf

class Number(vf.TaskData):
    answer: str

class Guess(vf.Task[Number, vf.State, vf.TaskConfig]):
    @vf.reward(weight=1.0)
    async def soon(self, trace: vf.Trace) -> float:
        asked = sum(len(each.tool_calls or ()) for each in trace.assistant_messages)
        told = [each.content for each in trace.tool_messages]
        right = trace.last_reply == self.data.answer and told == ["higher"] * asked
        return float(right) / trace.num_turns

class GuessSet(vf.Taskset[Guess, vf.TasksetConfig]):
    def load(self):
        yield Guess(Number(prompt="Guess my number.", answer="7"))

__all__ = ["GuessSet"]
"""


def test_a_conversation_is_judged_by_the_tasksets_rewards_over_all_turns(taskset: str) -> None:
    """Three answers, one of them a tool call, in a plain process and in the sandbox."""
    folder = Path(sys.path[0])
    (folder / "guess.py").write_text(PATIENT)
    rows = list(taskset_rows("guess"))
    text = "from evaluators.environments import from_verifiers\nTASK = from_verifiers('guess',"
    (folder / "guessing.py").write_text(f"{text} 'rows.jsonl')\n")
    call = {"id": "c", "type": "function", "function": {"name": "ask", "arguments": "{}"}}
    opening = {"role": "user", "content": "Guess my number."}
    turns: list[dict[str, Any]] = [
        {"role": "assistant", "content": "5"},
        {"role": "user", "content": "No."},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "higher"},
        {"role": "assistant", "content": "7"},
    ]
    for task in (from_verifiers("guess", "rows.jsonl"), load(f"{folder / 'guessing.py'}:TASK")):
        assert judge(task, "7", rows[0]).reward == 1
        whole = judge_conversation(task, [opening, *turns], rows[0])
        assert (whole.error, whole.reward) == (None, pytest.approx(1 / 3))
        assert judge_conversation(task, [opening, *turns[:1], turns[1], *turns[:1]], rows[0]) == (
            replace(whole, reward=0.0, extracted="soon=0")
        )
    sys.modules.pop("guess", None)
