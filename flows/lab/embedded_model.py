"""Training and measuring the embedded model on synthetic rows of the tasks.

`deploy` must not import the tasks, so this module gives its trainer the conversations and judges
the trained model's answers with the tasks' verifiers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

from deploy.embedded.build import Built, Conversation, Progress, Recipe, build, complete, write_card
from deploy.embedded.drills import MIXTURE, answer, drill, drill_share
from deploy.embedded.rows import GENERATORS, rows
from evaluators.loading import rows as local_rows
from evaluators.task import Task, judge
from evaluators.tasks import TASKS

Row = Mapping[str, Any]
TRAIN_ROWS = 9_000  # distinct rows a task, fewer where fewer exist
FEWER = {"countdown": 2_000, "piqa": 2_000}
EVAL_ROWS = 400
SHOTS = (0, 1, 2, 5, 5)  # numbers of worked examples drawn from, for tasks that have any
MAX_TOKENS = 48


@dataclass(frozen=True, slots=True)
class Score:
    """Greedy accuracy of one task in [0, 1] on n unseen rows."""

    accuracy: float
    n: int


def make_embedded(
    out: Path, recipe: Recipe, progress: Progress | None = None
) -> tuple[Built, dict[str, Score]]:
    """Build the model into `out`, measure it on unseen rows, and write its card."""
    built = build(converse, out, recipe, progress)
    scores = measure(out)
    write_card(out, built, recipe, {name: (s.accuracy, s.n) for name, s in scores.items()})
    return built, scores


def converse(rng: Random, done: float) -> Conversation:
    """One training conversation: a drill, or a task by its share with a row and the answer."""
    if rng.random() < drill_share(done):
        return drill(rng)
    (name,) = rng.choices(list(MIXTURE), list(MIXTURE.values()))
    row = rng.choice(_train_rows(name))
    if name == "countdown":  # any order of the numbers
        row = {**row, "nums": rng.sample(row["nums"], len(row["nums"]))}
    task = TASKS[name]
    count = rng.choice(SHOTS) if task.shots else 0
    chat = task.messages(row, rng.sample(_examples(task, row), count))
    return [*chat, {"role": "assistant", "content": answer(name, row, rng)}]


def measure(directory: Path, n: int = EVAL_ROWS) -> dict[str, Score]:
    """Greedy accuracy of the model in `directory` on rows it was not trained on.

    Refusal has no other rows than those of training."""
    return {name: _score(directory, TASKS[name], n) for name in MIXTURE}


def _score(directory: Path, task: Task, n: int) -> Score:
    questions = rows(task.name, "eval", n, seed=0) if task.name in GENERATORS else _refusals()[:n]
    chats = [task.messages(row, _examples(task, row)[: task.shots]) for row in questions]
    said = complete(directory, chats, MAX_TOKENS)
    rewards = [judge(task, text, row).reward for text, row in zip(said, questions, strict=True)]
    return Score(fmean(rewards), len(rewards))


def _examples(task: Task, row: Row) -> list[dict[str, Any]]:
    """The worked examples of the row's group; empty for tasks without examples."""
    if not task.shots:
        return []
    group: Callable[[Row], str] = task.shot_group or (lambda row: "")
    return [shot for shot in _shots(task.name) if group(shot) == group(row)]


@cache
def _shots(name: str) -> list[dict[str, Any]]:
    return rows(name, "validation", 400, seed=0)


@cache
def _train_rows(name: str) -> list[dict[str, Any]]:
    if name not in GENERATORS:
        return _refusals()
    return rows(name, "train", FEWER.get(name, TRAIN_ROWS), seed=0)


@cache
def _refusals() -> list[dict[str, Any]]:
    return [dict(row) for row in local_rows(TASKS["refusal"], "eval", data_dir=None, limit=None)]
