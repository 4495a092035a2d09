"""An own task to copy: the answer is one exact JSON value.

Copy this file and its rows, name the copy in the settings, and train on it:

    [tasks]
    target = "json_answer"
    files = ["my_tasks/json_answer.py:TASK"]

``anchorage task check my_tasks/json_answer.py:TASK`` says whether the copy keeps a task's contract.
Rows lie beside the file, one JSON object a line: ``{"id", "question", "answer"}``. Whatever the
model says before it, the last line that is JSON is read.
"""

import json
from typing import Any

from evaluators.task import Row, Source, Task, Verdict

MAX_CHARS = 2000  # of the line that is parsed
MAX_BRACKETS = 200  # of one kind, which bounds the depth


def last_value(completion: str) -> tuple[str | None, Any]:
    """The text and the value of the last line that is JSON; (None, None) without one."""
    whole = slice(int(len(completion) > 2 * MAX_CHARS), None)  # not a first line cut in two
    for line in reversed(completion[-2 * MAX_CHARS :].split("\n")[whole]):
        text = line.strip()
        if text and len(text) <= MAX_CHARS and max(map(text.count, "[{")) <= MAX_BRACKETS:
            try:
                return text, json.loads(text)
            except ValueError:
                continue
    return None, None


def same(value: Any, wanted: Any) -> bool:
    """Equal as JSON: keys in any order, and true is not 1."""
    return json.dumps(value, sort_keys=True) == json.dumps(wanted, sort_keys=True)


def verify(completion: str, row: Row) -> Verdict:
    """Reward 1 for the exact value; format 1 for any JSON value."""
    text, value = last_value(completion)
    return Verdict(float(text is not None and same(value, row["answer"])), float(bool(text)), text)


TASK = Task(
    name="json_answer",
    source=Source("", eval_split="train", file="json_answer.jsonl"),  # one file, split by hash
    key=lambda row: str(row["id"]),
    fields=lambda row: {"question": row["question"]},
    template="{question}\nReply with JSON on one line.",
    verify=verify,
    gold=lambda row: json.dumps(row["answer"]),
    wrong=lambda row: json.dumps({"not": row["answer"]}),
    target=True,
    format_weight=0.1,
    max_tokens=128,
)
