"""Synthetic rows in seven tasks' Hugging Face schemas, made on demand from small word tables.

`rows(task, split, count, seed)` is pure: the same arguments give the same rows. A row belongs to
the split that the hash of its content names (eval 30 %, validation 10 %, train 60 %), so splits are
disjoint whatever the seeds, and rows of one call never repeat.

The word tables are closed and true. A model of a million parameters can hold these facts and
combine them in rows it never saw: prior knowledge that forgetting would damage.
"""

from collections.abc import Callable, Iterator
from hashlib import sha256
from itertools import islice
from random import Random
from typing import Any, NamedTuple


class Use(NamedTuple):
    """A thing and what it is for: `Use("broom", "sweep", "sweeps", ("the floor", ...))`."""

    thing: str
    verb: str
    third: str  # third person singular of the verb
    objects: tuple[str, ...]


KINDS: dict[str, tuple[str, ...]] = {
    "animal": ("cat", "dog", "cow", "horse", "sheep", "goat", "fox", "wolf"),
    "bird": ("owl", "duck", "hen", "crow", "swan", "eagle", "robin", "goose"),
    "fruit": ("apple", "pear", "plum", "peach", "grape", "lemon", "cherry", "mango"),
    "colour": ("red", "blue", "green", "yellow", "brown", "black", "white", "purple"),
    "metal": ("iron", "gold", "silver", "copper", "tin", "zinc", "nickel", "lead"),
    "planet": ("Mars", "Venus", "Saturn", "Jupiter", "Earth", "Neptune", "Uranus", "Mercury"),
    "drink": ("tea", "milk", "juice", "water", "coffee", "cocoa", "cider", "wine"),
    "garment": ("shirt", "coat", "hat", "sock", "glove", "scarf", "skirt", "belt"),
    "tree": ("oak", "pine", "birch", "elm", "maple", "willow", "ash", "cedar"),
    "vehicle": ("car", "bus", "train", "truck", "bicycle", "ship", "plane", "tram"),
}

# MMLU-Pro's categories and the kinds of thing each asks about.
SUBJECTS: dict[str, tuple[str, ...]] = {
    "biology": ("animal", "bird", "tree"),
    "chemistry": ("metal", "drink"),
    "physics": ("planet", "vehicle"),
    "health": ("fruit", "drink"),
    "business": ("garment", "vehicle"),
    "other": ("colour", "fruit"),
}

USES: tuple[Use, ...] = (
    Use("knife", "cut", "cuts", ("the bread", "the cake", "the rope")),
    Use("broom", "sweep", "sweeps", ("the floor", "the yard", "the hall")),
    Use("hammer", "hit", "hits", ("the nail", "the peg", "the post")),
    Use("spade", "dig", "digs", ("a hole", "a ditch", "the garden")),
    Use("brush", "paint", "paints", ("the wall", "the fence", "the door")),
    Use("needle", "sew", "sews", ("a dress", "a button", "a curtain")),
    Use("pen", "write", "writes", ("a letter", "a note", "a story")),
    Use("sponge", "wash", "washes", ("the plate", "the cup", "the bowl")),
    Use("oven", "bake", "bakes", ("a pie", "a bun", "a pizza")),
    Use("ladder", "reach", "reaches", ("the roof", "the attic", "the loft")),
    Use("key", "open", "opens", ("the lock", "the gate", "the safe")),
    Use("kettle", "boil", "boils", ("some water", "the tea water", "an egg")),
)

NAMES: tuple[tuple[str, str], ...] = (
    ("Anna", "She"),
    ("Ben", "He"),
    ("Carla", "She"),
    ("David", "He"),
    ("Emma", "She"),
    ("Frank", "He"),
    ("Grace", "She"),
    ("Henry", "He"),
    ("Iris", "She"),
    ("Jack", "He"),
)

ITEMS: tuple[str, ...] = (
    "pens",
    "books",
    "cards",
    "coins",
    "cakes",
    "shells",
    "stamps",
    "balls",
    "eggs",
    "stones",
)
HOLDERS: tuple[str, ...] = ("boxes", "bags", "jars", "trays")

BEINGS: tuple[str, ...] = ("cat", "dog", "cow", "fox", "bear", "lion", "mouse", "rabbit")
QUALITIES: tuple[str, ...] = ("red", "big", "kind", "cold", "young", "rough", "nice", "green")


def a(noun: str) -> str:
    """The noun with its indefinite article: `a("oak") == "an oak"`."""
    return f"an {noun}" if noun[0] in "aeiouAEIOU" and noun != "Uranus" else f"a {noun}"


Row = dict[str, Any]
SPLITS = ("train", "eval", "validation")
LETTERS = "ABCDEFGHIJ"
MAX_TRIES = 5_000  # draws without a new row before the space counts as exhausted


def rows(task: str, split: str, count: int, seed: int) -> list[Row]:
    """The first `count` rows that seed `seed` draws for `split` of `task`, none twice."""
    if task not in GENERATORS:
        raise ValueError(f"task {task!r}: allowed: {', '.join(GENERATORS)}")
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: allowed: {', '.join(SPLITS)}")
    drawn = up_to(task, split, count, seed)
    if len(drawn) < count:
        raise ValueError(f"{task}/{split}: {count} rows wanted, only {len(drawn)} can be made")
    return drawn


def up_to(task: str, split: str, count: int, seed: int) -> list[Row]:
    """As `rows`, but fewer where fewer can be made."""
    return list(islice(_distinct(task, split, seed), count))


def split_of(fingerprint: str) -> str:
    """The split of a row, by the first byte of its fingerprint (60, 30 and 10 per cent)."""
    first = int(fingerprint[:2], 16)
    if first < 154:
        return "train"
    return "eval" if first < 231 else "validation"


def fingerprint(task: str, row: Row) -> str:
    """Hex digest of what makes the row the row it is; the order of Countdown's numbers is not."""
    nums = sorted(row["nums"]) if task == "countdown" else None
    content = sorted((k, str(v)) for k, v in row.items() if k != "nums")
    return sha256(repr((task, nums, content)).encode()).hexdigest()


def _distinct(task: str, split: str, seed: int) -> Iterator[Row]:
    rng = Random(f"{task}/{split}/{seed}")
    seen: set[str] = set()
    tries = 0
    while tries < MAX_TRIES:
        row = GENERATORS[task](rng)
        mark = fingerprint(task, row)
        tries += 1
        if split_of(mark) == split and mark not in seen:
            seen.add(mark)
            tries = 0
            yield _named(task, row, mark)


def _named(task: str, row: Row, mark: str) -> Row:
    """The row with the id its schema asks for, taken from its content."""
    number = int(mark[8:16], 16)
    match task:
        case "proofwriter" | "arc_challenge":
            return {"id": f"embedded-{mark[:16]}", **row}
        case "mmlu_pro":
            return {"question_id": number, **row}
        case "hellaswag":
            return {"ind": number, **row, "source_id": f"embedded~{mark[:16]}"}
        case _:
            return row


# --- the three targets -------------------------------------------------------------------------


def countdown(rng: Random) -> Row:
    """Three small numbers and a target that + - * can make of them."""
    while True:
        x, y, z = (rng.randint(1, 15) for _ in range(3))
        target = rng.choice((x + y + z, x + y - z, x - y - z, x * y + z, x * y - z))
        if 1 <= target <= 99:
            nums = [x, y, z]
            rng.shuffle(nums)
            return {"nums": nums, "target": target}


def gsm8k(rng: Random) -> Row:
    """A word problem of two steps; the answer works both out, as the data set's answers do."""
    (first, pronoun), (second, _) = rng.sample(NAMES, 2)
    things, holder = rng.choice(ITEMS), rng.choice(HOLDERS)
    question, steps = rng.choice(PROBLEMS)(rng, first, second, pronoun, things, holder)
    lines = [f"{text}={value}>>{value}" for text, value in steps]
    worked = f"First <<{lines[0]}.\nThen <<{lines[1]}."
    return {"question": question, "answer": f"{worked}\n#### {steps[-1][1]}"}


Steps = tuple[tuple[str, int], tuple[str, int]]
Problem = Callable[[Random, str, str, str, str, str], tuple[str, Steps]]


def _gain_then_lose(
    rng: Random, first: str, _second: str, pronoun: str, things: str, _holder: str
) -> tuple[str, Steps]:
    x, y = rng.randint(3, 12), rng.randint(2, 9)
    z = rng.randint(1, min(9, x + y - 1))
    text = (
        f"{first} has {x} {things}. {pronoun} buys {y} more and gives away {z}. "
        f"How many {things} does {first} have now?"
    )
    return text, ((f"{x}+{y}", x + y), (f"{x + y}-{z}", x + y - z))


def _two_gains(
    rng: Random, first: str, second: str, _pronoun: str, things: str, _holder: str
) -> tuple[str, Steps]:
    x, y, z = (rng.randint(2, 9) for _ in range(3))
    text = (
        f"{first} has {x} {things}. {second} gives {first} {y} and Zoe gives {first} {z}. "
        f"How many {things} does {first} have now?"
    )
    return text, ((f"{x}+{y}", x + y), (f"{x + y}+{z}", x + y + z))


def _filled_and_more(
    rng: Random, first: str, _second: str, _pronoun: str, things: str, holder: str
) -> tuple[str, Steps]:
    x, y, z = rng.randint(2, 6), rng.randint(2, 6), rng.randint(2, 9)
    text = (
        f"{first} fills {x} {holder} with {y} {things} each and has {z} {things} left over. "
        f"How many {things} are there in all?"
    )
    return text, ((f"{x}*{y}", x * y), (f"{x * y}+{z}", x * y + z))


def _filled_and_lost(
    rng: Random, first: str, second: str, _pronoun: str, things: str, holder: str
) -> tuple[str, Steps]:
    x, y = rng.randint(2, 6), rng.randint(2, 6)
    z = rng.randint(1, min(9, x * y - 1))
    text = (
        f"{first} has {x} {holder} with {y} {things} each. {second} takes {z} {things}. "
        f"How many {things} are left?"
    )
    return text, ((f"{x}*{y}", x * y), (f"{x * y}-{z}", x * y - z))


def _more_than(
    rng: Random, first: str, second: str, _pronoun: str, things: str, _holder: str
) -> tuple[str, Steps]:
    x, y = rng.randint(2, 12), rng.randint(2, 9)
    text = (
        f"{first} has {x} {things}. {second} has {y} more than {first}. "
        f"How many {things} do they have together?"
    )
    return text, ((f"{x}+{y}", x + y), (f"{x + y}+{x}", x + y + x))


PROBLEMS: tuple[Problem, ...] = (
    _gain_then_lose,
    _two_gains,
    _filled_and_more,
    _filled_and_lost,
    _more_than,
)


def proofwriter(rng: Random) -> Row:
    """Two facts, two rules of one condition, and a statement to judge; at most one rule deep."""
    first, second = rng.sample(BEINGS, 2)
    given, other, proved, far, stranger = rng.sample(QUALITIES, 5)
    facts = [f"The {first} is {given}.", f"The {second} is {other}."]
    rules = [
        f"If something is {given} then it is {proved}.",
        f"If something is {other} then it is {far}.",
    ]
    rng.shuffle(facts)
    rng.shuffle(rules)
    answer = rng.choice(("True", "False", "Unknown"))
    # Unknown: what nothing speaks of.
    claim = stranger if answer == "Unknown" else rng.choice((given, proved))
    negated = answer == "False" or (answer == "Unknown" and rng.random() < 0.5)
    return {
        "theory": " ".join(facts + rules),
        "question": f"The {first} is {'not ' if negated else ''}{claim}.",
        "answer": answer,
        "config": "embedded",
        "maxD": int(claim == proved),
    }


# --- the prior tasks ---------------------------------------------------------------------------


def hellaswag(rng: Random) -> Row:
    """Someone takes a thing; the other ending belongs to another thing."""
    uses = rng.sample(USES, 2)
    label = rng.randrange(2)
    name, pronoun = rng.choice(NAMES)
    opening = rng.choice(("takes", "picks up", "holds", "finds"))
    before = f"{name} {opening} {a(uses[label].thing)}."
    return {
        "activity_label": "Housework",
        "ctx_a": before,
        "ctx_b": pronoun,
        "ctx": f"{before} {pronoun}",
        "endings": [f"{use.third} {rng.choice(use.objects)}." for use in uses],
        "split": "val",
        "split_type": "indomain",
        "label": str(label),
    }


def piqa(rng: Random) -> Row:
    """A goal and two things, one of which serves it."""
    uses = rng.sample(USES, 2)
    label = rng.randrange(2)
    goal = rng.choice(
        ("How do I {}?", "I want to {}.", "What do I need to {}?", "{}", "Help me {}.")
    ).format(_deed(rng, uses[label]))
    frame = rng.choice(("Use {}.", "Take {}.", "Get {}.", "Find {}."))
    sol1, sol2 = (frame.format(a(use.thing)) for use in uses)
    return {"goal": goal, "sol1": sol1, "sol2": sol2, "label": label}


def _deed(rng: Random, use: Use) -> str:
    return f"{use.verb} {rng.choice(use.objects)}"


def arc_challenge(rng: Random) -> Row:
    """Which of these is a metal? Two choices, one of them of the kind."""
    question, texts, place, _ = _one_of_kind(rng, tuple(KINDS), 2)
    letters = list(LETTERS[: len(texts)])
    choices = {"text": texts, "label": letters}
    return {"question": question, "choices": choices, "answerKey": letters[place]}


def mmlu_pro(rng: Random) -> Row:
    """The same kind of question within a subject, with a worked answer and two or three options."""
    category = rng.choice(tuple(SUBJECTS))
    size = rng.choice((2, 2, 3))
    question, texts, place, kind = _one_of_kind(rng, SUBJECTS[category], size)
    letter = LETTERS[place]
    return {
        "question": question,
        "options": texts,
        "answer": letter,
        "answer_index": place,
        "cot_content": f"A: {texts[place]} is {a(kind)}. The answer is ({letter}).",
        "category": category,
        "src": "embedded",
    }


def _one_of_kind(rng: Random, kinds: tuple[str, ...], size: int) -> tuple[str, list[str], int, str]:
    """A question, its options, the place of the right one, and the kind in question."""
    kind = rng.choice(kinds)
    strangers = [word for other, words in KINDS.items() if other != kind for word in words]
    texts = rng.sample(strangers, size - 1)
    place = rng.randrange(size)
    texts.insert(place, rng.choice(KINDS[kind]))
    frame = rng.choice(("Which of these is {}?", "Find {}.", "Which word names {}?"))
    return frame.format(a(kind)), texts, place, kind


GENERATORS: dict[str, Callable[[Random], Row]] = {
    "countdown": countdown,
    "gsm8k": gsm8k,
    "proofwriter": proofwriter,
    "hellaswag": hellaswag,
    "piqa": piqa,
    "arc_challenge": arc_challenge,
    "mmlu_pro": mmlu_pro,
}
