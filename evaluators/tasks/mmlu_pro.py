"""MMLU-Pro: exam questions with up to ten options, five worked examples of the same category.

Read: a letter A-J (evaluators/choice.py). The examples come from the validation split, whose
``cot_content`` shows the reasoning and ends in the asked format.
"""

from evaluators.choice import letter_sentence, letter_verdict, lettered, next_letter
from evaluators.task import Row, Source, Task

TEMPLATE = """\
{question}
{options}
Think step by step, then end with "The answer is (X)"."""


def answer(row: Row) -> str:
    """The gold letter, whatever its case."""
    return str(row["answer"]).strip().upper()


def demonstrate(row: Row) -> str:
    """An example's reasoning without its leading ``A:``, or the bare answer where it has none."""
    reasoning = str(row.get("cot_content") or "").strip().removeprefix("A:").strip()
    return reasoning or letter_sentence(answer(row))


TASK = Task(
    name="mmlu_pro",
    source=Source(
        "TIGER-Lab/MMLU-Pro",
        train_split=None,
        shots_split="validation",
        revision="527feea0afed1de15a8c115abf7be4c912123315",
    ),
    key=lambda row: str(row["question_id"]),
    fields=lambda row: {"question": row["question"], "options": lettered(row["options"])},
    template=TEMPLATE,
    verify=lambda completion, row: letter_verdict(completion, answer(row), 10),
    gold=lambda row: letter_sentence(answer(row)),
    wrong=lambda row: letter_sentence(next_letter(answer(row), len(row["options"]))),
    shots=5,
    shot_group=lambda row: str(row["category"]),
    demonstrate=demonstrate,
)
