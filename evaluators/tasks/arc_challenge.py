"""ARC-Challenge: school science questions with three to five options.

Read: a letter A-E (evaluators/choice.py). Published labels are letters in most rows and 1-5 in
some; they are shown and read as letters.
"""

from evaluators.choice import LETTERS, letter_sentence, letter_verdict, lettered, next_letter
from evaluators.task import Row, Source, Task

TEMPLATE = """\
{question}
{options}
Reply with "The answer is (X)"."""

LETTER_OF = {str(number): letter for number, letter in enumerate(LETTERS[:5], 1)}


def answer(row: Row) -> str:
    """The gold letter, from a letter or from 1..5."""
    gold = str(row["answerKey"]).strip().upper()
    return LETTER_OF.get(gold, gold)


def options(row: Row) -> list[str]:
    """The options' texts; as many as there are labels."""
    texts, labels = row["choices"]["text"], row["choices"]["label"]
    if len(texts) != len(labels):
        raise ValueError(f"choices: {len(texts)} texts, {len(labels)} labels")
    return list(texts)


TASK = Task(
    name="arc_challenge",
    source=Source(
        "allenai/ai2_arc",
        "ARC-Challenge",
        revision="210d026faf9955653af8916fad021475a3f00453",
    ),
    key=lambda row: str(row["id"]),
    fields=lambda row: {
        "question": row["question"],
        "options": lettered(options(row)),
    },
    template=TEMPLATE,
    verify=lambda completion, row: letter_verdict(completion, answer(row), 5),
    gold=lambda row: letter_sentence(answer(row)),
    wrong=lambda row: letter_sentence(next_letter(answer(row), len(options(row)))),
    max_tokens=64,
)
