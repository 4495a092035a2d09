"""Held-out rows are recognised in what clients send, however they are spelt.

A text becomes a skeleton, its letters and digits in a row: "Ada's shop sells 12 pens." ->
``adasshopsells12pens``. Case, width, accents, white space, punctuation, invisible characters and
look-alike letters leave no trace in it. Digits stay as they are, because rows of one template
differ in their numbers and are different problems.

A row is cut into pieces, its sentences. A text holds the row where

    the text has the row's numbers, in their order or each between its old neighbours, and
    each piece stands in the text in a place of its own, as it is or with words put into it

so that words before, after and between change nothing, nor does another order of the sentences.
Other words are another row: of 64 signs of a row at most one may be missing.
"""

import html
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluators.task import Row, Task

SHORT = 12  # signs; a shorter piece must stand in the text as it is
SPARED = 64  # signs of a row of which one may be missing
BLOCK = 6  # signs by which a piece is found again after an insertion
GAP = 120  # longest insertion, and at most a piece's own length or a quarter of this
CONTEXT = 5  # signs beside a number
GRAM = 6  # bytes of a gram of the index
SEGMENT = 32  # bytes of a row for which the index keeps one gram
VOTES = 0.4  # share of a row's indexed grams a text must have before the two are compared
THOROUGH = 20  # candidates compared in full; beyond these only rows that are mostly unchanged
BUCKET_BITS = 20  # size of the table that counts grams

Grams = NDArray[np.uint64]
Blocks = list[tuple[int, int]]  # start and end in a text

_FILLERS = dict.fromkeys(map(ord, "\u115f\u1160\u3164\uffa0"))  # invisible, yet letters
_CAPITALS = str.maketrans("ΗΝΥ", "HNY")  # capitals whose small letters look like other letters
_ALIKE = str.maketrans(
    "авекмнорстухѕіјһԁԛԝґαβεζηικνορτυχωγօոսցհɑꞵæœßþ",
    "abekmhopctyxsijhdqwrabezniknoptuxwyonughabaobp",
)
_SAME = str.maketrans({"i": "l", "m": "rn", "w": "vv"})  # I and l, m and rn, w and vv look the same
_NAMED_LETTER = re.compile(r"(?:LATIN|INDICATOR).*?\b([A-Z])\b")  # of a Unicode name
_THOUSANDS = re.compile(r"(?<=\d)[,'](?=\d{3}(?!\d))")
_ZERO = re.compile(r"(?<=\d)o(?![^\W\d_])")  # 1O pens
_ONE = re.compile(r"(?<=\d)[il](?=\d)")  # 1l2 pens
_TOKEN = re.compile(r"[^\W\d_]+|\d+")
_DIGITS = re.compile(r"\d+")
_SENTENCE_END = re.compile(r"(?<=[.?!])\s+")
_OPTION_LABEL = re.compile(r"^\s*(?:[A-J]|\d+)\s*[:.)]\s+")


class _Fold(dict[int, str]):
    """A table for ``str.translate``: what each character is in a skeleton, found when it is met."""

    def __missing__(self, code: int) -> str:
        self[code] = folded = _folded(chr(code))
        return folded


def _folded(sign: str) -> str:
    """The plain letter or digit a character looks like; "" for marks and format characters."""
    kind = unicodedata.category(sign)
    if kind[0] == "M" or kind == "Cf":
        return ""
    if kind == "Nd":
        return str(unicodedata.digit(sign))
    alike = sign.translate(_ALIKE)
    named = _NAMED_LETTER.search(unicodedata.name(sign, "")) if not alike.isascii() else None
    return named[1].lower() if named else alike


_FOLD = _Fold()


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A text's letters and digits in a row, and its numbers, one for each run of digits."""

    text: str
    numbers: tuple[str, ...]


def skeleton(text: str) -> Skeleton:
    """What is left of a text when everything is gone that can be spelt otherwise."""
    text = html.unescape(text)
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text).translate(_CAPITALS)
        text = unicodedata.normalize("NFKD", text.casefold()).translate(_FILLERS).translate(_FOLD)
    text = _ZERO.sub("0", _THOUSANDS.sub("", text.casefold()))
    tokens = _TOKEN.findall(_ONE.sub("1", text))
    return Skeleton("".join(tokens).translate(_SAME), tuple(t for t in tokens if t.isdigit()))


def row_text(task: Task, row: Row) -> str:
    """What a row of a task asks: its fields, a line each."""
    return "\n".join(task.fields(row).values())


@dataclass(frozen=True, slots=True)
class HeldRow:
    """A held-out row: its task, its key, its skeleton and those of its sentences, by field."""

    task: str
    key: str
    whole: Skeleton
    fields: tuple[tuple[Skeleton, ...], ...]

    @property
    def pieces(self) -> list[str]:
        """The sentences of all fields, longest first."""
        return sorted((piece.text for field in self.fields for piece in field), key=len)[::-1]


def held_row(task: Task, row: Row) -> HeldRow:
    """One row as it is looked for; letters and numbers of options are left out."""
    fields = []
    for text in task.fields(row).values():
        lines = text.splitlines()
        lines = [_OPTION_LABEL.sub("", line) for line in lines] if len(lines) > 1 else lines
        sentences = [skeleton(part) for line in lines for part in _SENTENCE_END.split(line)]
        fields.append(tuple(each for each in sentences if each.text))
    return HeldRow(task.name, task.key(row), skeleton(row_text(task, row)), tuple(fields))


class HeldOut:
    """Rows that no round may train on, and whether a text holds one of them.

    The index of 10,000 rows takes about a second to make, after ``add`` and before the next
    ``hit``; looking a text up takes a millisecond or less where rows differ in their words, and a
    few where they are combinations of the same few words.
    """

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str], HeldRow] = {}
        self._index: _Index | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, task: Task, rows: Iterable[Row]) -> None:
        """Hold these rows out; a row that was added before changes nothing."""
        for row in rows:
            if (task.name, task.key(row)) not in self._rows:
                self._rows[task.name, task.key(row)] = held_row(task, row)
                self._index = None

    def hit(self, text: str) -> HeldRow | None:
        """The held-out row that a text holds, None without one."""
        if self._index is None:
            self._index = _Index(list(self._rows.values()))
        return self._index.find(skeleton(text))


def leaks(held_out: HeldOut, texts: Iterable[str]) -> dict[str, int]:
    """How many of these training texts hold a held-out row, by the task of the held-out row."""
    counts: defaultdict[str, int] = defaultdict(int)
    for text in texts:
        if (row := held_out.hit(text)) is not None:
            counts[row.task] += 1
    return dict(counts)


class _Index:
    """Rows by a few of their grams, so that a text is compared with few of them."""

    def __init__(self, rows: list[HeldRow]) -> None:
        self._lettered = [row for row in rows if not _only_numbers(row)]
        self._whole = {row.whole: row for row in reversed(self._lettered)}
        numbers = {_sorted_numbers(row): row for row in reversed(rows) if _only_numbers(row)}
        self._numbers = {key: row for key, row in numbers.items() if any(key)}
        self._shapes = sorted({tuple(map(len, key)) for key in self._numbers})
        self._index_grams([grams(row.pieces) for row in self._lettered])

    def _index_grams(self, by_row: list[Grams]) -> None:
        """Keep the rarest gram of each segment of each row: of a name or number, not the template.

        How often a gram occurs is counted in buckets, which needs no memory for the grams; where
        two share a bucket the choice is a little worse, no more.
        """
        counts = np.zeros(1 << BUCKET_BITS, np.int64)
        for row in by_row:
            np.add.at(counts, _buckets(row), 1)
        chosen = [
            np.unique([part[np.argmin(counts[_buckets(part)])] for part in _segments(row)])
            for row in by_row
        ]
        self._wanted = np.array([max(1, round(VOTES * len(row))) for row in chosen], np.int64)
        owners = np.repeat(np.arange(len(chosen)), [len(row) for row in chosen])
        flat = np.concatenate([np.zeros(0, np.uint64), *chosen]).astype(np.uint64)
        order = np.argsort(flat, kind="stable")
        self._grams, self._owners = flat[order], owners[order]

    def find(self, sent: Skeleton) -> HeldRow | None:
        """The first row that the text holds, those with most grams in common before others."""
        if (row := self._whole.get(sent) or self._by_numbers(sent.numbers)) is not None:
            return row
        for rank, place in enumerate(self._candidates(grams([sent.text]))):
            row = self._lettered[place]
            if (rank < THOROUGH or _mostly_as_it_is(sent, row)) and _holds(sent, row):
                return row
        return None

    def _by_numbers(self, numbers: Sequence[str]) -> HeldRow | None:
        """A row of numbers alone whose fields stand in the text one after another.

        The numbers of one field may stand in any order: a Countdown problem stays the same.
        """
        for shape in self._shapes:
            for start in range(len(numbers) - sum(shape) + 1):
                if (row := self._numbers.get(_cut(numbers, start, shape))) is not None:
                    return row
        return None

    def _candidates(self, sent: Grams) -> Iterator[int]:
        """Rows of which the text has enough indexed grams, best first."""
        sent = np.unique(sent)
        low, high = (np.searchsorted(self._grams, sent, side) for side in ("left", "right"))
        met = [self._owners[a:b] for a, b in zip(low, high, strict=True) if a < b]
        if not met:
            return
        rows, votes = np.unique(np.concatenate(met), return_counts=True)
        enough = votes >= self._wanted[rows]
        rows, votes = rows[enough], votes[enough]
        yield from (int(place) for place in rows[np.argsort(-votes, kind="stable")])


def grams(texts: Iterable[str]) -> Grams:
    """Every GRAM bytes in a row of each text, as numbers, in order."""
    parts = [np.zeros(0, np.uint64)]
    for text in texts:
        signs = np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8).astype(np.uint64)
        count = len(signs) - GRAM + 1
        if count > 0:
            shifted = [signs[i : i + count] << np.uint64(8 * i) for i in range(GRAM)]
            parts.append(np.bitwise_or.reduce(shifted))
    return np.concatenate(parts)


def _buckets(values: Grams) -> NDArray[np.int64]:
    """Multiplicative hash: the top bits of gram * 2^64 / golden ratio."""
    hashed = values * np.uint64(0x9E3779B97F4A7C15)
    return (hashed >> np.uint64(64 - BUCKET_BITS)).astype(np.int64)


def _segments(row: Grams) -> list[Grams]:
    """A row's grams in runs of about SEGMENT; at least three where it has three."""
    if not len(row):
        return []
    return np.array_split(row, min(len(row), max(3, len(row) // SEGMENT)))


def _only_numbers(row: HeldRow) -> bool:
    return not row.whole.text.strip("0123456789")


def _sorted_numbers(row: HeldRow) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(sorted(n for piece in field for n in piece.numbers)) for field in row.fields)


def _cut(numbers: Sequence[str], start: int, shape: tuple[int, ...]) -> tuple[tuple[str, ...], ...]:
    """Numbers from ``start`` on in groups of these sizes, each sorted."""
    groups = []
    for size in shape:
        groups.append(tuple(sorted(numbers[start : start + size])))
        start += size
    return tuple(groups)


def _mostly_as_it_is(sent: Skeleton, row: HeldRow) -> bool:
    """Whether half of a row's pieces stand in the text unchanged; rules most rows out cheaply."""
    pieces = row.pieces
    return 2 * sum(piece in sent.text for piece in pieces) >= len(pieces) - 1


def _holds(sent: Skeleton, row: HeldRow) -> bool:
    """Whether the text holds the numbers and every piece of a row, each piece in its own place.

    Longest pieces first: what matched is taken out of the text, so that a statement which is also
    a part of the theory before it is not found there.
    """
    if not _has_numbers(sent, row):
        return False
    spared = max(1, len(row.whole.text) // SPARED)
    text, pieces = _without_fields(sent.text, row)
    for piece in pieces:
        place = _aligned(text, piece, spared)
        if place is None:
            return False
        blocks, missing = place
        spared -= missing
        for start, end in blocks:
            text = _without(text, start, end)
    return True


def _without_fields(text: str, row: HeldRow) -> tuple[str, list[str]]:
    """The text without the fields that stand in it whole, and the pieces of the others."""
    missing: list[str] = []
    for field in sorted(row.fields, key=lambda field: -sum(len(piece.text) for piece in field)):
        whole = "".join(piece.text for piece in field)
        if (start := text.find(whole)) >= 0:
            text = _without(text, start, start + len(whole))
        else:
            missing += [piece.text for piece in field]
    return text, sorted(missing, key=len, reverse=True)


def _without(text: str, start: int, end: int) -> str:
    """The text with a line break for each sign from start to end: no piece is found across it."""
    return text[:start] + "\n" * (end - start) + text[end:]


def _has_numbers(sent: Skeleton, row: HeldRow) -> bool:
    """The row's numbers in their order, or each between the signs it stood between."""
    there = iter(sent.numbers)
    if all(number in there for number in row.whole.numbers):
        return True
    if not set(row.whole.numbers) <= set(sent.numbers):
        return False
    return all(context in sent.text for piece in row.pieces for context in _contexts(piece))


def _contexts(piece: str) -> Iterator[str]:
    for number in _DIGITS.finditer(piece):
        yield piece[max(0, number.start() - CONTEXT) : number.end() + CONTEXT]


def _aligned(text: str, piece: str, spared: int) -> tuple[Blocks, int] | None:
    """Where a piece stands in the text and how many of its signs are missing there.

    It stands in blocks with insertions between them, from any place where it begins.

    Returns:
        (blocks, signs missing), None where it does not stand or lacks more than ``spared``.
    """
    if (start := text.find(piece)) >= 0:
        return [(start, start + len(piece))], 0
    if len(piece) < SHORT:
        return None
    for length in (BLOCK, BLOCK // 2):
        for missing in range(spared + 1):
            head = piece[missing : missing + length]
            start = -1 if _DIGITS.search(piece[:missing]) else text.find(head)
            while start >= 0:
                if place := _followed(text, start, piece, missing, spared):
                    return place
                start = text.find(head, start + 1)
    return None


def _followed(
    text: str, at: int, piece: str, missing: int, spared: int
) -> tuple[Blocks, int] | None:
    """The piece from its sign ``missing`` on against the text from ``at`` on, block by block.

    A digit is never missing: 2 for 12 is another problem.
    """
    blocks: Blocks = []
    done = missing
    while done < len(piece):
        length = _common(text, at, piece, done)
        blocks.append((at, at + length))
        at, done = at + length, done + length
        while done < len(piece) and (place := _next_block(text, at, piece, done)) < 0:
            if missing == spared or piece[done].isdigit():
                return None
            done, missing = done + 1, missing + 1
        at = place if done < len(piece) else at
    return (blocks, missing) if len(blocks) <= 2 + len(piece) // SHORT else None


def _next_block(text: str, at: int, piece: str, done: int) -> int:
    """Where the text goes on with the piece after an insertion, -1 if nowhere near."""
    reach = at + min(GAP, max(GAP // 4, len(piece)))
    for length in (BLOCK, BLOCK // 2):
        head = piece[done : done + length]
        if (place := text.find(head, at, reach + len(head))) >= 0:
            return place
    return -1


def _common(text: str, at: int, piece: str, done: int) -> int:
    """How many signs text[at:] and piece[done:] have in common at their beginnings."""
    length = 0
    while (
        done + length < len(piece) and text[at + length : at + length + 1] == piece[done + length]
    ):
        length += 1
    return length
