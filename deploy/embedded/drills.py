"""What the embedded model is taught to say: answers to the tasks' rows, and drills of their parts.

GSM8K rows leave something to learn: most are answered at once, and often wrongly by a model of this
size; the others are worked out, nearly always rightly. A learner that is rewarded for right answers
can find out that working it out pays.

Drills are small conversations of several short turns, so that more of what is read is an answer to
learn from: facts of the word tables, looking things up in marked lines, sums and products, saying a
text again.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import permutations
from random import Random
from typing import Any

from deploy.embedded.rows import ITEMS, KINDS, NAMES, USES, a

DIRECT_SHARE = 0.55  # of GSM8K rows answered without steps

DRILL_SHARE = 0.15  # of the conversations at the end; the tasks' shares are of the others
DRILLS_ONLY = 0.04  # of the training, at its beginning
MIX_FROM = 0.3  # of the training, from which on drills are their final share

# Share of each task in the training conversations; the harder it is, the more.
MIXTURE: dict[str, float] = {
    "countdown": 0.14,
    "gsm8k": 0.10,
    "proofwriter": 0.28,
    "hellaswag": 0.10,
    "piqa": 0.10,
    "arc_challenge": 0.12,
    "mmlu_pro": 0.13,
    "refusal": 0.03,
}


def drill_share(done: float) -> float:
    """Share of drills when the share `done` of the training is over: 1, then falling linearly."""
    left = (MIX_FROM - done) / (MIX_FROM - DRILLS_ONLY)
    return DRILL_SHARE + (1 - DRILL_SHARE) * min(1.0, max(0.0, left))


def answer(task: str, row: Mapping[str, Any], rng: Random) -> str:
    """The assistant's answer to a row of `task`; `rng` decides which GSM8K rows are worked out."""
    match task:
        case "countdown":
            return f"<answer>{expression(row['nums'], row['target'])}</answer>"
        case "gsm8k":
            worked = str(row["answer"])
            return worked.rpartition("\n")[2] if rng.random() < DIRECT_SHARE else worked
        case "proofwriter":
            return f"Answer: {row['answer']}"
        case "hellaswag":
            return str(row["label"])
        case "piqa":
            return str(row["label"] + 1)
        case "arc_challenge":
            return f"The answer is ({row['answerKey']})"
        case "mmlu_pro":
            return str(row["cot_content"]).removeprefix("A: ")
        case "refusal":
            return str(row["label"]).upper()
    raise ValueError(f"task {task!r}: allowed: {', '.join(MIXTURE)}")


def expression(nums: Sequence[int], target: int) -> str:
    """The first of x+y+z, x+y-z, x-y-z, x*y+z, x*y-z, numbers in the given order, that hits."""
    for signs, ordered in ((signs, p) for signs in FORMS for p in permutations(nums)):
        x, y, z = ordered
        if FORMS[signs](x, y, z) == target:
            return f"{x}{signs[0]}{y}{signs[1]}{z}"
    raise ValueError(f"countdown {list(nums)} = {target}: no form of {', '.join(FORMS)} hits")


FORMS = {
    "++": lambda x, y, z: x + y + z,
    "+-": lambda x, y, z: x + y - z,
    "--": lambda x, y, z: x - y - z,
    "*+": lambda x, y, z: x * y + z,
    "*-": lambda x, y, z: x * y - z,
}


Drill = list[tuple[str, str]]  # turns: question and answer
MARKS = ("ABCDE", "01234", "12345")  # how lines are marked in the tasks


def drill(rng: Random) -> list[dict[str, str]]:
    """One drill as a conversation."""
    turns = rng.choice(DRILLS)(rng)
    return [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def repeat(rng: Random) -> Drill:
    """Say words and numbers again."""
    words = [rng.choice(_ALL if rng.random() < 0.5 else NUMBERS) for _ in range(6)]
    text = " ".join(words)
    return [(f"Repeat: {text}", f": {text}")]


def find_word(rng: Random) -> Drill:
    """Name the lines that hold given words."""
    words = rng.sample(_ALL, rng.randint(2, 5))
    return _lookups(rng, words, [f"Where is {word}?" for word in words])


def find_kind(rng: Random) -> Drill:
    """Name the lines that hold a thing of each kind."""
    kinds = rng.sample(tuple(KINDS), rng.randint(2, 5))
    return _lookups(rng, [rng.choice(KINDS[name]) for name in kinds], [f"{a(k)}?" for k in kinds])


def find_use(rng: Random) -> Drill:
    """Name the lines that hold what each thing does, or the thing that serves each end."""
    uses = rng.sample(USES, rng.randint(2, 4))
    deeds = [rng.choice(use.objects) for use in uses]
    if rng.random() < 0.5:
        ends = [f"{use.third} {deed}." for use, deed in zip(uses, deeds, strict=True)]
        return _lookups(rng, ends, [f"{a(use.thing)}." for use in uses])
    goals = [f"{use.verb} {deed}" for use, deed in zip(uses, deeds, strict=True)]
    return _lookups(rng, [f"Use {a(use.thing)}." for use in uses], goals)


def _lookups(rng: Random, lines: list[str], questions: list[str]) -> Drill:
    """Lines shown once with the first question, then the other questions, in random order."""
    marks = rng.choice(MARKS)
    shown = "\n".join(f"{mark}: {line}" for mark, line in zip(marks, lines, strict=False))
    turns = list(zip(questions, marks, strict=False))
    rng.shuffle(turns)
    (first, answer), *others = turns
    return [(f"{shown}\n{first}", answer), *others]


def kind(rng: Random) -> Drill:
    """What kind of thing a word names."""
    names = rng.sample(tuple(KINDS), 3)
    return [(f"What is {rng.choice(KINDS[name])}?", a(name)) for name in names]


def total(rng: Random) -> Drill:
    """Sums, differences and products."""
    return [_total(rng) for _ in range(3)]


def _total(rng: Random) -> tuple[str, str]:
    x, y = rng.randint(1, 40), rng.randint(1, 15)
    sign = rng.choice("+-*")
    if sign == "*":
        x, y = rng.randint(1, 15), rng.randint(1, 9)
    elif sign == "-":
        x, y = max(x, y), min(x, y)
    value = {"+": x + y, "-": x - y, "*": x * y}[sign]
    return f"{x}{sign}{y}", f"<<{x}{sign}{y}={value}>>{value}"


NUMBERS = tuple(str(number) for number in range(1, 100))
_ALL = (
    *(word for words in KINDS.values() for word in words),
    *(name for name, _ in NAMES),
    *ITEMS,
    *(entry.thing for entry in USES),
)
DRILLS: tuple[Callable[[Random], Drill], ...] = (
    repeat,
    find_word,
    find_kind,
    find_kind,
    find_use,
    find_use,
    kind,
    total,
    total,
)
