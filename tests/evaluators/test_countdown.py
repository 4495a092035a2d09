"""Countdown's own parser: against an independent oracle, hostile text, and exhaustive search."""

import ast
import re
import time
from collections.abc import Callable
from fractions import Fraction
from itertools import permutations, product
from random import Random

import pytest

from evaluators.task import judge
from evaluators.tasks import TASKS
from evaluators.tasks.countdown import evaluate, gold, solve, verify

TASK = TASKS["countdown"]
BOUND_S = 0.05  # the bound for a hostile answer

OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
}


def oracle(text: str) -> Fraction | None:
    """The value by Python's own grammar, walked over exact fractions; None where it has none."""
    if not re.fullmatch(r"[0-9+*/() -]+", text):
        return None
    try:
        return walk(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ZeroDivisionError, LookupError):
        return None


def walk(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int(value)):
            return Fraction(value)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -walk(operand)
        case ast.BinOp(left=left, op=op, right=right):
            return OPERATORS[type(op)](walk(left), walk(right))
    raise LookupError(ast.dump(node))


def expression(draw: Random, numbers: list[int]) -> str:
    """A random expression over the numbers, in this order, with brackets, signs and spaces."""
    if len(numbers) == 1:
        text = str(numbers[0])
    else:
        cut = draw.randint(1, len(numbers) - 1)
        left, right = expression(draw, numbers[:cut]), expression(draw, numbers[cut:])
        text = f"{left}{draw.choice([' ', ''])}{draw.choice('+-*/')}{draw.choice([' ', ''])}{right}"
    if draw.random() < 0.3:
        text = f"({text})"
    return f"-{text}" if draw.random() < 0.1 else text


def damaged(draw: Random, text: str) -> str:
    """The text with one to three characters put in, taken out or replaced."""
    for _ in range(draw.randint(1, 3)):
        at = draw.randint(0, len(text))
        text = text[:at] + draw.choice(["", *"0123456789+-*/() "]) + text[at + draw.randint(0, 1) :]
    return text


def test_10_000_random_expressions_agree_with_the_oracle() -> None:
    draw = Random(7)
    agreed = valid = right = 0
    for _ in range(10_000):
        numbers = [draw.randint(0, 99) for _ in range(draw.randint(1, 6))]
        text = expression(draw, draw.sample(numbers, len(numbers)))
        text = damaged(draw, text) if draw.random() < 0.4 else text
        value = oracle(text)
        target = (
            value if value is not None and draw.random() < 0.7 else Fraction(draw.randint(0, 99))
        )
        used = sorted(int(digits) for digits in re.findall("[0-9]+", text))
        wanted = value is not None and used == sorted(numbers) and value == target
        row = {"nums": numbers, "target": float(target)}
        assert evaluate(text) == value, text
        assert verify(f"<answer>{text}</answer>", row).reward == float(wanted), (text, row)
        agreed, valid, right = agreed + 1, valid + (value is not None), right + wanted
    assert agreed == 10_000
    assert 5_000 < valid < 9_500  # both kinds are well represented
    assert 3_000 < right < 8_000


def test_values_near_the_target_are_judged_by_the_tolerance() -> None:
    for difference, reward in ((0.0, 1.0), (9e-6, 1.0), (-9e-6, 1.0), (2e-5, 0.0), (-2e-5, 0.0)):
        row = {"nums": [7, 3], "target": 7 / 3 + difference}
        assert verify("<answer>7 / 3</answer>", row).reward == reward


def reachable(numbers: tuple[int, ...]) -> set[Fraction]:
    """Every value the numbers can make, by joining every ordered split of every order."""
    if len(numbers) == 1:
        return {Fraction(numbers[0])}
    values = set()
    for order in permutations(numbers):
        for cut in range(1, len(numbers)):
            for a, b in product(reachable(order[:cut]), reachable(order[cut:])):
                values |= {a + b, a - b, a * b} | ({a / b} if b else set())
    return values


@pytest.mark.parametrize("numbers", [(6,), (2, 5), (2, 3, 7), (4, 4, 9), (0, 5, 8), (1, 2, 5, 7)])
def test_solve_finds_exactly_the_reachable_targets(numbers: tuple[int, ...]) -> None:
    values = reachable(numbers)
    for target in range(-20, 130):
        found = solve(numbers, Fraction(target))
        assert (found is not None) == (target in values)
        if found is not None:
            row = {"nums": list(numbers), "target": target}
            assert verify(f"<answer>{found}</answer>", row).reward == 1.0


def test_gold_of_an_unsolvable_row_is_refused() -> None:
    with pytest.raises(ValueError, match="1,1=50: no solution"):
        gold({"nums": [1, 1], "target": 50})


def test_the_key_ignores_the_order_of_the_numbers() -> None:
    one, other = {"nums": [3, 1, 2], "target": 6}, {"nums": [1, 2, 3], "target": 6}
    assert TASK.key(one) == TASK.key(other) != TASK.key({"nums": [1, 2, 3], "target": 7})


ROW = {"nums": [3, 5, 2], "target": 17}
HOSTILE = [
    "9**9**9**9",
    "9**9**9**9**9**9",
    "3.5*2",
    "3,5*2",
    "10//3",
    "17//1",
    "3*5+2//1",
    "-" * 100_000 + "3*5+2",
    "--" * 50 + "3*5+2" + " " * 2_000,
    "~" * 1_000 + "17",
    "(" * 100_000 + "3*5+2" + ")" * 100_000,
    "(" * 300 + "3*5+2" + ")" * 300,
    "(" * 100_000,
    ")" * 100_000,
    "()" * 50_000,
    "3*5+2" + "*" * 100_000,
    "3*5+2" + "+0" * 50_000,
    "3*5+2" + "*1" * 50_000,
    "3*5+2" + "/1" * 50_000,
    "9" * 100_000,
    "9" * 1_000_000,
    "9" * 4_301,
    "*".join(["9" * 50] * 2_000),
    "3*5+2" + " " * 1_000_000,
    " " * 1_000_000,
    "x" * 1_000_000,
    "3*5\n+2",
    "3*5+2\n#",
    "3*5+2\x00",
    "3*5+2\u200b",
    "3*5+2\ud800",
    "\udfff\ud800" * 1_000,
    "٣*٥+٢",
    "３*５+２",
    "3×5+2",
    "3·5+2",
    "３*5+2",
    "²*5+3",
    "३*५+२",
    '__import__("os").system("id")',
    "().__class__.__bases__[0].__subclasses__()",
    "exec('1')",
    "eval('17')",
    "open('/etc/hostname').read()",
    "lambda: 17",
    "[x for x in (17,)][0]",
    "17 if 3*5*2 else 0",
    "3*5+2 #",
    "3*5+2;17",
    "3*5+2==17",
    "17or 3*5*2",
    "3*5|2",
    "3*5^2",
    "3<<5>>2",
    "3*5%2",
    "3*5+02",
    "3*5+2e0",
    "3*5+2j",
    "3_0*5+2",
    "0x3*5+2",
    "0b11*5+2",
    "3*5+2L",
    "3/(5-5)*2",
    "1/0",
    "3*5+(2",
    "3*5)+2",
    "3 5 2",
    "3**5**2",
    "(3)(5)+2",
    "3*5++2",
    "+3*5+2",
    "<answer>3*5+2",
    "a" * 50_000 + "!" + "a" * 50_000,
    "3*5+2=17",
    "",
    " ",
]
AROUND = [
    "<answer>" * 100_000,
    "</answer>" * 100_000,
    "<answer></answer>" * 50_000,
    "<answer>3*5+2" * 50_000,
    "<answer>" + "<" * 1_000_000,
    "3*5+2" * 200_000,
]


def test_there_are_at_least_sixty_hostile_answers() -> None:
    assert len({*HOSTILE, *AROUND}) >= 60
    assert verify("<answer>3*5+2</answer>", ROW).reward == 1.0  # what they try to pass for


@pytest.mark.parametrize("number", range(len(HOSTILE) + len(AROUND)))
def test_a_hostile_answer_scores_0_at_once(number: int) -> None:
    answers = [f"<answer>{text}</answer>" for text in HOSTILE] + AROUND
    started = time.thread_time()
    verdict = judge(TASK, answers[number], ROW)
    taken_s = time.thread_time() - started
    assert (verdict.reward, verdict.error) == (0.0, None)
    assert taken_s < BOUND_S


@pytest.mark.parametrize(
    "row",
    [
        {"nums": [3, 5, 2], "target": "1e999999999"},
        {"nums": [3, 5, 2], "target": "nan"},
        {"nums": [3, 5, 2], "target": None},
        {"nums": [3, 5, 2]},
        {"nums": "352", "target": 17},
        {"nums": [[3], 5, 2], "target": 17},
        {"nums": None, "target": 17},
        {},
    ],
)
def test_a_hostile_row_earns_nothing(row: dict[str, object]) -> None:
    started = time.thread_time()
    assert judge(TASK, "<answer>3*5+2</answer>", row).reward == 0.0
    assert time.thread_time() - started < BOUND_S
