"""What the embedded model is taught to say to each kind of row.

GSM8K rows leave something to learn: most are answered at once, and often wrongly by a model of this
size; the others are worked out, nearly always rightly. A learner that is rewarded for right answers
can find out that working it out pays.
"""

from collections.abc import Mapping, Sequence
from itertools import permutations
from random import Random
from typing import Any

DIRECT_SHARE = 0.55  # of GSM8K rows answered without steps

DRILL_SHARE = 0.15  # of the conversations in the end; the tasks' shares are of the others
DRILLS_ONLY, MIX_FROM = (
    0.04,
    0.3,
)  # of the training: drills alone, then ever fewer until their share

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
    """The assistant's words for a row of `task`; `rng` decides which GSM8K rows are worked out."""
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
