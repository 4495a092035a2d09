"""Reading marked blocks, and choices that are answered by a letter or a digit.

Extraction of a letter from L = A..E or A..J, after uppercasing:

    1. the first ``ANSWER IS (x)`` with x in L
    2. else the first ``ANSWER IS x``
    3. else the first x in L that is a word of its own

A letter that rule 2 or 3 finds at an end of a longer word (``ANSWER IS DON'T KNOW``, ``I'D SAY``)
is no choice, and nothing is read after it. Only ASCII letters and digits are answers; a word
boundary is Unicode's. Every search is linear in the text.
"""

import re
from collections.abc import Mapping, Sequence

from evaluators.task import Verdict


def last_block(text: str, opening: str = "<answer>", closing: str = "</answer>") -> str | None:
    """The inside of the last complete block, read from the left as a non-greedy match would.

    A block begins at the first opening mark after the previous block and ends at the next closing
    mark, so an opening mark left open belongs to the block that closes it.
    """
    inside, position = None, 0
    while (start := text.find(opening, position)) >= 0:
        start += len(opening)
        end = text.find(closing, start)
        if end < 0:
            return inside
        inside, position = text[start:end], end + len(closing)
    return inside


LETTERS = "ABCDEFGHIJ"

_PATTERNS: Mapping[int, tuple[re.Pattern[str], ...]] = {
    count: (
        re.compile(rf"ANSWER IS\s*\(([A-{LETTERS[count - 1]}])\)"),
        re.compile(rf"ANSWER IS\s+([A-{LETTERS[count - 1]}])"),
        re.compile(rf"\b([A-{LETTERS[count - 1]}])\b"),
    )
    for count in (5, 10)
}


_WORD_BEFORE = re.compile(r"\w['’]?$")
_WORD_AFTER = re.compile(r"['’]?\w")


def lettered(options: Sequence[str]) -> str:
    """Options as lines ``A: first``, ``B: second``; at most ten."""
    if len(options) > len(LETTERS):
        raise ValueError(f"options: {len(options)}; at most {len(LETTERS)}")
    return "\n".join(f"{LETTERS[place]}: {text}" for place, text in enumerate(options))


def numbered(options: Sequence[str], start: int) -> str:
    """Options as lines ``start: first``, ``start+1: second``."""
    return "\n".join(f"{number}: {text}" for number, text in enumerate(options, start))


def letter_sentence(letter: str) -> str:
    """The asked format of a lettered answer."""
    return f"The answer is ({letter})"


def next_letter(letter: str, count: int) -> str:
    """Another of the first ``count`` letters, never the given one (count >= 2)."""
    place = LETTERS[:count].find(letter) if len(letter) == 1 else -1
    return LETTERS[next_place(place, count)]


def next_place(place: int, count: int) -> int:
    """Another of the places 0..count - 1; ValueError where the given one is none of them.

    Rows come from clients, too, and a gold answer that no option has is none.
    """
    if not 0 <= place < count:
        raise ValueError(f"the answer is none of the {count} options")
    return (place + 1) % count


def letter_verdict(completion: str, gold: str, count: int) -> Verdict:
    """Read a letter among the first ``count`` (5 or 10); format is 1 where rule 1 found it."""
    text = completion.upper()
    matches = [pattern.search(text) for pattern in _PATTERNS[count]]
    match = next((match for match in matches if match), None)
    letter = match.group(1) if match and not in_word(text, match.start(1)) else None
    return Verdict(float(letter == gold), float(matches[0] is not None), letter)


def in_word(text: str, place: int) -> bool:
    """Whether the letter at ``place`` belongs to a longer word; an apostrophe joins letters."""
    before, after = text[:place], text[place + 1 :]
    return bool(_WORD_BEFORE.search(before[-2:]) or _WORD_AFTER.match(after[:2]))


def digit_verdict(completion: str, gold: str, pattern: re.Pattern[str]) -> Verdict:
    """Read the first match of ``pattern``; format is 1 where the digit stands alone."""
    match = pattern.search(completion)
    digit = match.group() if match else None
    alone = digit is not None and completion.strip() == digit
    return Verdict(float(digit == gold), float(alone), digit)
