"""GSM8K: word problems whose answer is one number after ``####``.

Region: the last 4096 characters, of them what follows the last ``</think>`` if there is one. Text
read, the first of these that states a number: the last ``#### ...`` line with a number, the last
``\\boxed{...}``, the last ``<answer>`` block, the whole region. A box that is opened after a
finished one and never closed takes the answer back: nothing is read. Number: without ``, $ %`` an
exact fraction a/b, else the first number; a reward wants |number - gold| < 1e-6. Format: the last
``####`` is followed by a number and nothing else.
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

_MINUS_SIGNS = "\u2212\u2010\u2011\u2012\u2013\ufe63\uff0d"  # minus, hyphens, dashes, wide minus
_PLAIN = str.maketrans(dict.fromkeys(",$%", "") | dict.fromkeys(_MINUS_SIGNS, "-"))
RETRACTED = "(an open box)"
_BOX = "\\boxed{"
_BRACE = re.compile(r"\\boxed\{|[{}]")
_FRACTION = re.compile(r"\s*([-+]?[0-9]+)\s*/\s*([-+]?[0-9]+)\s*")
_NUMBER = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)")


def region_of(completion: str) -> str:
    """What is searched at all."""
    return completion[-REGION_CHARS:].rpartition("</think>")[2]


def after_hashes(region: str) -> str | None:
    """The line after the last ``####`` that states a number (it may begin below the mark)."""
    before, mark, after = region.rpartition("####")
    while mark:
        line = after.lstrip().split("\n", 1)[0]
        if states_number(line):
            return line
        before, mark, after = before.rpartition("####")
    return None


def last_boxed(region: str) -> str | None:
    """The inside of the last ``\\boxed{...}`` that is closed, braces balanced; one pass.

    None without one, and RETRACTED where a box is opened after it and never closed.
    """
    opened: list[tuple[int, bool]] = []  # where an inside begins, whether a box's
    last = (-1, -1)
    for brace in _BRACE.finditer(region):
        if brace.group() != "}":
            opened.append((brace.end(), brace.group() == _BOX))
        elif opened:
            start, boxed = opened.pop()
            last = max(last, (start, brace.start())) if boxed else last
    if last[0] < 0:
        return None
    retracted = any(boxed and start > last[1] for start, boxed in opened)
    return RETRACTED if retracted else region[last[0] : last[1]]


def answer_text(region: str) -> str:
    """The most explicit text that states a number; RETRACTED where an open box took it back."""
    if (line := after_hashes(region)) is not None:
        return line
    boxed = last_boxed(region)
    for text in (boxed, last_block(region)):
        if text is not None and (states_number(text) or text == RETRACTED):
            return text
    return region


def states_number(text: str) -> bool:
    """Whether there is a number in a text, be it one with a zero denominator."""
    return _NUMBER.search(text.translate(_PLAIN)) is not None


def number_in(text: str) -> Fraction | None:
    """The number a text states, exactly; None without one and for a zero denominator."""
    text = text.translate(_PLAIN)
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
    line = (after_hashes(region) or "").translate(_PLAIN).strip()
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
