"""Countdown: combine every given number once with + - * / and brackets into the target.

Reward: the last ``<answer>`` block, without white space around it, holds only ``0-9 + - * / ( )``
and spaces, its integers are exactly the given multiset, and |value - target| < 1e-5 in exact
fractions. Format: the block is a well-formed expression, whatever its value.

The language is bounded and our own (no ``eval``):

    sum     = product (("+" | "-") product)*
    product = factor (("*" | "/") factor)*
    factor  = "-" factor | "(" sum ")" | integer without a leading zero
"""

import re
from collections.abc import Iterator, Sequence
from fractions import Fraction

from evaluators.choice import last_block
from evaluators.task import Row, Source, Task, Verdict

MAX_CHARS = 1000  # of one expression
MAX_DEPTH = 64  # operators and brackets waiting at once
MAX_NUMBERS = 5  # of a row: the search for six takes seconds
MAX_NUMBER = 10**9
TOLERANCE = Fraction(1, 100_000)

TEMPLATE = """\
Numbers: {nums}
Target: {target}
Use every number once with + - * / ( ). Think, then answer in <answer> </answer>."""

_ALLOWED = re.compile(r"[0-9+\-*/() ]+")
_SYMBOL = re.compile(r"[0-9]+|[+\-*/()]")
_STRENGTH = {"(": 0, "+": 1, "-": 1, "*": 2, "/": 2, "neg": 3}


def evaluate(text: str) -> Fraction | None:
    """The exact value, or None for whatever is not an expression of the language above.

    Shunting-yard: values and waiting operators on two stacks, no recursion. Where an operand is
    due only an integer, ``(`` or ``-`` may come; after one only an operator or ``)``.
    """
    if len(text) > MAX_CHARS or not _ALLOWED.fullmatch(text):
        return None
    values: list[Fraction] = []
    waiting: list[str] = []
    operand_due = True
    for symbol in _SYMBOL.findall(text):
        read = _read_operand if operand_due else _read_operator
        due_next = read(symbol, values, waiting)
        if due_next is None or len(waiting) > MAX_DEPTH:
            return None
        operand_due = due_next
    if operand_due or not _reduce(values, waiting, 1) or waiting:
        return None
    return values[0]


def _read_operand(symbol: str, values: list[Fraction], waiting: list[str]) -> bool | None:
    """Whether an operand is due next, None for a symbol that cannot stand here."""
    if symbol in ("(", "-"):
        waiting.append("(" if symbol == "(" else "neg")
        return True
    if not symbol.isdigit() or (symbol[0] == "0" and len(symbol) > 1):
        return None
    values.append(Fraction(int(symbol)))
    return False


def _read_operator(symbol: str, values: list[Fraction], waiting: list[str]) -> bool | None:
    """Whether an operand is due next, None for a symbol that cannot stand here."""
    if symbol == ")":
        if not _reduce(values, waiting, 1) or not waiting:
            return None
        waiting.pop()
        return False
    if symbol not in ("+", "-", "*", "/") or not _reduce(values, waiting, _STRENGTH[symbol]):
        return None
    waiting.append(symbol)
    return True


def _reduce(values: list[Fraction], waiting: list[str], strength: int) -> bool:
    """Apply the waiting operators that bind at least as strongly; False on division by zero."""
    while waiting and _STRENGTH[waiting[-1]] >= strength:
        operator, right = waiting.pop(), values.pop()
        left = Fraction(0) if operator == "neg" else values.pop()
        if operator == "/" and right == 0:
            return False
        values.append(_apply(operator, left, right))
    return True


def _apply(operator: str, left: Fraction, right: Fraction) -> Fraction:
    """left operator right; a sign ("neg") is a subtraction from 0."""
    if operator in ("-", "neg"):
        return left - right
    if operator == "+":
        return left + right
    return left * right if operator == "*" else left / right


def numbers_of(row: Row) -> list[int]:
    """The given numbers; some exports hold them as text."""
    numbers = row["nums"]
    if isinstance(numbers, str):
        raise TypeError(f"nums {numbers[:80]!r}: a list is wanted")
    return [int(number) if isinstance(number, str) else number for number in numbers]


def target_of(row: Row) -> Fraction:
    """The target as a number: published rows hold integers, floats, and strings of numbers.

    A string with an exponent goes through float, which bounds it.
    """
    target = row["target"]
    if isinstance(target, int) or "/" in str(target):
        return Fraction(target)
    return Fraction(float(target))


def verify(completion: str, row: Row) -> Verdict:
    """Reward 1 when the last answer block uses exactly the numbers and reaches the target."""
    block = last_block(completion)
    block = block and block.strip()
    if not block:
        return Verdict(0.0, 0.0, block)
    value = evaluate(block)
    if value is None:
        return Verdict(0.0, 0.0, block[:MAX_CHARS])
    used = sorted(int(number) for number in re.findall(r"[0-9]+", block))
    right = used == sorted(numbers_of(row)) and abs(value - target_of(row)) < TOLERANCE
    return Verdict(float(right), 1.0, block)


def solve(numbers: Sequence[int], target: Fraction) -> str | None:
    """An expression for the target by exhaustive search; 5 numbers take under a tenth of a second.

    Every value that a proper part of the numbers can make is listed with one expression for it. Of
    the last join one side and the result are known, so that its other side is looked up, not tried:
    of 5 numbers that leaves the values of 4 to be listed, of which there are some thousands.
    """
    if len(numbers) == 1:
        return str(numbers[0]) if numbers[0] == target else None
    everything = (1 << len(numbers)) - 1
    made = {1 << i: {Fraction(n): str(n)} for i, n in enumerate(numbers)}  # part, as bits -> values
    for part in sorted(range(1, everything), key=int.bit_count):
        if part not in made:
            made[part] = dict(
                joined
                for left, right in _splits(part)
                for one in made[left].items()
                for other in made[right].items()
                for joined in _joined(one, other)
            )
    for left, right in _splits(everything):
        for one in made[left].items():
            for other, form in _last(one, target):
                if other in made[right]:
                    return form.format(made[right][other])
        if not target and Fraction(0) in made[left]:
            return f"({made[left][Fraction(0)]} * {next(iter(made[right].values()))})"
    return None


def _last(one: tuple[Fraction, str], target: Fraction) -> Iterator[tuple[Fraction, str]]:
    """Each value that joins with this one to the target, and the expression but for its own."""
    a, text = one
    yield target - a, f"({text} + {{}})"
    yield a - target, f"({text} - {{}})"
    yield target + a, f"({{}} - {text})"
    if a:
        yield target / a, f"({text} * {{}})"
        yield target * a, f"({{}} / {text})"
        if target:
            yield a / target, f"({text} / {{}})"


def _splits(part: int) -> Iterator[tuple[int, int]]:
    """Each way to cut a set of bits in two, the smaller side first; of equal ones each once."""
    left = (part - 1) & part
    while left:
        right = part ^ left
        if (left.bit_count(), left) < (right.bit_count(), right):
            yield left, right
        left = (left - 1) & part


def _joined(
    one: tuple[Fraction, str], other: tuple[Fraction, str]
) -> Iterator[tuple[Fraction, str]]:
    """Every way to join two values."""
    (a, left), (b, right) = one, other
    yield a + b, f"({left} + {right})"
    yield a - b, f"({left} - {right})"
    yield b - a, f"({right} - {left})"
    yield a * b, f"({left} * {right})"
    if b:
        yield a / b, f"({left} / {right})"
    if a:
        yield b / a, f"({right} / {left})"


def gold(row: Row) -> str:
    """A solution in the asked format.

    Rows come from clients, too: what would search for minutes is refused before the search.
    """
    numbers = numbers_of(row)
    _check_size(numbers)
    solution = solve(numbers, target_of(row))
    if solution is None:
        raise ValueError(f"countdown {key(row)}: no solution")
    expression = solution[1:-1] if len(numbers) > 1 else solution
    return f"<answer>{expression}</answer>"


def _check_size(numbers: Sequence[object]) -> None:
    for number in numbers:
        if not isinstance(number, int) or abs(number) > MAX_NUMBER:
            raise ValueError(f"nums: {str(number)[:20]!r}; allowed: integers up to {MAX_NUMBER}")
    if not 1 <= len(numbers) <= MAX_NUMBERS:
        raise ValueError(f"nums: {len(numbers)} numbers; allowed: 1 to {MAX_NUMBERS}")


def wrong(row: Row) -> str:
    """Every number used once, and another value."""
    tries = (sign.join(map(str, numbers_of(row))) for sign in (" + ", " * ", " - "))
    miss = next(text for text in tries if evaluate(text) != target_of(row))
    return f"<answer>{miss}</answer>"


def key(row: Row) -> str:
    """The problem itself, whatever the order of its numbers: ``19,35,44=98``."""
    return f"{','.join(map(str, sorted(numbers_of(row))))}={row['target']}"


def fields(row: Row) -> dict[str, str]:
    """The numbers, separated by spaces, and the target."""
    return {"nums": " ".join(map(str, numbers_of(row))), "target": str(row["target"])}


TASK = Task(
    name="countdown",
    source=Source(
        "Jiayi-Pan/Countdown-Tasks-3to4",
        eval_split="train",  # the one split there is, divided by hash
        revision="408f70d177020686d34a56bba5952feb45aaaee4",
    ),
    key=key,
    fields=fields,
    template=TEMPLATE,
    verify=verify,
    gold=gold,
    wrong=wrong,
    target=True,
    format_weight=0.1,
)
