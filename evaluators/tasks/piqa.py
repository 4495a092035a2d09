"""PIQA: which of two solutions reaches the goal?

Read: the first 1 or 2 that is a word of its own. Format: nothing but that digit. The published
label is 0 or 1, the answer is label + 1; the test split has no labels.
"""

import re

from evaluators.choice import digit_verdict, next_place, numbered
from evaluators.task import Row, Source, Task, content_key

TEMPLATE = """\
{goal}
{solutions}
Which solution works? Reply with its number only."""

_DIGIT = re.compile(r"\b[12]\b")


def answer(row: Row) -> str:
    """1 or 2 from the label 0 or 1."""
    return str(int(row["label"]) + 1)


TASK = Task(
    name="piqa",
    source=Source(
        "ybisk/piqa",
        "plain_text",
        eval_split="validation",
        revision="142c51238b3ca2bc61e9a075913871b8b600e8e1",  # its parquet conversion
    ),
    key=lambda row: content_key(row["goal"], row["sol1"], row["sol2"]),
    fields=lambda row: {
        "goal": row["goal"],
        "solutions": numbered([row["sol1"], row["sol2"]], 1),
    },
    template=TEMPLATE,
    verify=lambda completion, row: digit_verdict(completion, answer(row), _DIGIT),
    gold=answer,
    wrong=lambda row: str(next_place(int(row["label"]), 2) + 1),
    max_tokens=16,
)
