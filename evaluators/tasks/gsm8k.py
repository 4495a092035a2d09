"""GSM8K: word problems whose answer is one number after ``####``.

Region: the last 4096 characters, of them what follows the last ``</think>`` if there is one. Text
read: the last ``#### ...``, else the last ``\\boxed{...}``, else the last ``<answer>`` block, else
the whole region. Number: without ``, $ %`` an exact fraction a/b, else the first number; a reward
wants |number - gold| < 1e-6. Format: the last ``####`` is followed by a number and nothing else.
"""

import re
from fractions import Fraction

from evaluators.choice import last_block
from evaluators.task import Row, Source, Task, Verdict, content_key

REGION_CHARS = 4096
TOLERANCE = Fraction(1, 1_000_000)

TEMPLATE = """\
{question}
Think step by step, then end with "#### number"."""

_STRIPPED = str.maketrans("", "", ",$%")
_BRACE = re.compile(r"\\boxed\{|[{}]")
_FRACTION = re.compile(r"\s*([-+]?[0-9]+)\s*/\s*([-+]?[0-9]+)\s*")
_NUMBER = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)")


def region_of(completion: str) -> str:
    """What is searched at all."""
    return completion[-REGION_CHARS:].rpartition("</think>")[2]


def after_hashes(region: str) -> str | None:
    """The line after the last ``####`` that has one (the line may begin below the mark)."""
    before, mark, after = region.rpartition("####")
    while mark:
        if after.strip():
            return after.lstrip().split("\n", 1)[0]
        before, mark, after = before.rpartition("####")
    return None


def last_boxed(region: str) -> str | None:
    """The inside of the last ``\\boxed{...}`` that is closed, braces balanced; one pass."""
    opened: list[tuple[int, bool]] = []  # where an inside begins, whether a box's
    last = (-1, -1)
    for brace in _BRACE.finditer(region):
        if brace.group() != "}":
            opened.append((brace.end(), brace.group() != "{"))
        elif opened:
            start, boxed = opened.pop()
            last = max(last, (start, brace.start())) if boxed else last
    return region[last[0] : last[1]] if last[0] >= 0 else None


def answer_text(region: str) -> str:
    """The most explicit answer: after ####, else boxed, else in a block, else everything."""
    if (line := after_hashes(region)) is not None:
        return line
    if (boxed := last_boxed(region)) is not None:
        return boxed
    block = last_block(region)
    return region if block is None else block


def number_in(text: str) -> Fraction | None:
    """The number a text states, exactly; None without one and for a zero denominator."""
    text = text.translate(_STRIPPED)
    if fraction := _FRACTION.fullmatch(text):
        above, below = int(fraction[1]), int(fraction[2])
        return Fraction(above, below) if below else None
    number = _NUMBER.search(text)
    return Fraction(number.group()) if number else None


def gold_number(row: Row) -> Fraction:
    """The number after the last ``####`` of the row's answer."""
    number = number_in(str(row["answer"])[-REGION_CHARS:].rpartition("####")[2])
    if number is None:
        raise ValueError("gsm8k: no number after #### in the row's answer")
    return number


def verify(completion: str, row: Row) -> Verdict:
    """Reward 1 when the number read equals the gold number."""
    region = region_of(completion)
    number = number_in(answer_text(region))
    if number is None:
        return Verdict(0.0, 0.0, None)
    line = (after_hashes(region) or "").translate(_STRIPPED).strip()
    right = abs(number - gold_number(row)) < TOLERANCE
    return Verdict(float(right), float(bool(_NUMBER.fullmatch(line))), str(number))


def gold(row: Row) -> str:
    """The gold number in the asked format."""
    return f"#### {row['answer'].rpartition('####')[2].strip()}"


def wrong(row: Row) -> str:
    """One more than the gold number."""
    return f"#### {gold_number(row) + 1}"


TASK = Task(
    name="gsm8k",
    source=Source("openai/gsm8k", "main", revision="e53f048856ff4f594e959d75785d2c2d37b678ee"),
    key=lambda row: content_key(row["question"]),
    fields=lambda row: {"question": row["question"]},
    template=TEMPLATE,
    verify=verify,
    gold=gold,
    wrong=wrong,
    target=True,
    format_weight=0.1,
)
