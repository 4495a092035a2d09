"""HellaSwag: which of four endings continues the text?

Read: the first character 0-3 anywhere. Format: nothing but that digit. ``ind`` is not unique
across the sources, so a row is known by its content.
"""

import re

from evaluators.choice import digit_verdict, next_place, numbered
from evaluators.task import Row, Source, Task, content_key

TEMPLATE = """\
{ctx}
{endings}
Which ending fits best? Reply with its number only."""

_DIGIT = re.compile(r"[0-3]")


def label(row: Row) -> str:
    """The gold index as published, a string or an integer 0..3."""
    return str(int(row["label"]))


TASK = Task(
    name="hellaswag",
    source=Source(
        "Rowan/hellaswag",
        eval_split="validation",
        revision="218ec52e09a7e7462a5400043bb9a69a41d06b76",
    ),
    key=lambda row: content_key(row["ctx"], *row["endings"]),
    fields=lambda row: {"ctx": row["ctx"], "endings": numbered(row["endings"], 0)},
    template=TEMPLATE,
    verify=lambda completion, row: digit_verdict(completion, label(row), _DIGIT),
    gold=label,
    wrong=lambda row: str(next_place(int(row["label"]), len(row["endings"]))),
    max_tokens=16,
)
