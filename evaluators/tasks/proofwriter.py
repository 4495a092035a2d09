"""ProofWriter: does a statement follow from facts and rules? True, False or Unknown.

Read: the last line that is ``Answer: word``; else the last non-empty line when it is one word
(after an optional ``Final answer`` or ``Answer``); else the last of true, false, unknown as a word.
Punctuation may follow the word. The word a line gave is final, valid or not. Labels in a row
(``True or False``) are one reading, and no label where they differ. Format: an ``Answer: word``
line with a valid label decides.
"""

import re

from evaluators.task import Row, Source, Task, Verdict, content_key

LABELS = {"true": "True", "false": "False", "unknown": "Unknown"}
PUNCTUATION = ".!?,:;"

TEMPLATE = """\
{theory}
Statement: {question}
True, False or Unknown (cannot be shown)? Think, then end with "Answer: " and the word."""

# Each run of spaces is followed by something it cannot match, so that every search is linear.
_LABEL = r"(?:true|false|unknown)\b"
_LABELS = re.compile(rf"(?i)\b{_LABEL}(?:(?:[\s,/|]|\bor\b|\band\b)+{_LABEL})*")
_LINE = re.compile(r"(?im)^[^\S\n]*answer[^\S\n]*:(.*)$")
_LENIENT = re.compile(r"(?i)(?:(?:final\s+)?answer(?:\s*:|\s)\s*)?([a-z]+)[\s.!?,:;]*")
_WORD = re.compile(r"(?i)[a-z]+")


def word_in(completion: str) -> tuple[str, bool]:
    """The word that answers ("" without one), and whether an ``Answer:`` line gave it."""
    lines = (line[1].rstrip(f"{PUNCTUATION} \t\r").strip() for line in _LINE.finditer(completion))
    answers = [line for line in lines if _WORD.fullmatch(line) or _LABELS.fullmatch(line)]
    if answers:
        return one_label(answers[-1]), True
    last_line = completion.rstrip().rpartition("\n")[2].strip()
    if lenient := _LENIENT.fullmatch(last_line):
        return lenient[1], False
    labels = _LABELS.findall(completion)
    return (one_label(labels[-1]) if labels else ""), False


def one_label(words: str) -> str:
    """The word of a reading; "" for several labels that differ."""
    several = {word.lower() for word in _WORD.findall(words)} - {"or", "and"}
    return several.pop() if len(several) == 1 else ""


def canonical(word: str) -> str | None:
    """One of the three labels, or None."""
    return LABELS.get(word.strip().lower())


def answer(row: Row) -> str:
    """The row's label, whatever its case."""
    label = canonical(str(row["answer"]))
    if label is None:
        raise ValueError(f"answer {row['answer']!r}: {', '.join(LABELS.values())} are allowed")
    return label


def verify(completion: str, row: Row) -> Verdict:
    """Reward 1 when the word read is the row's label."""
    word, in_line = word_in(completion)
    label = canonical(word)
    right = label is not None and label == answer(row)
    return Verdict(float(right), float(in_line and label is not None), label)


def wrong(row: Row) -> str:
    """Another label."""
    labels = list(LABELS.values())
    return f"Answer: {labels[(labels.index(answer(row)) + 1) % 3]}"


TASK = Task(
    name="proofwriter",
    source=Source("tasksource/proofwriter"),
    key=lambda row: content_key(row["theory"], row["question"]),
    fields=lambda row: {"theory": row["theory"], "question": row["question"]},
    template=TEMPLATE,
    verify=verify,
    gold=lambda row: f"Answer: {answer(row)}",
    wrong=wrong,
    target=True,
    format_weight=0.1,
)
