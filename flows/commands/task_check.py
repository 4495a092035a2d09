"""Whether a task can be used: its contract, how many rows it has, what the gate can do with them.

A task is judged on up to half of its evaluation rows; the other half is for sealed draws. As a
prior task it holds every candidate where even one that answers each row as the anchor does cannot
pass; as a target where even one that turns every row from wrong to right cannot.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

from agent.config import kept, load
from agent.errors import UserError
from agent.home import Home
from evaluators import loading, plugins
from evaluators.gate import GateRules, Tables, decide
from evaluators.samples import Sample
from evaluators.sandbox import protections
from evaluators.stats import mean_interval
from evaluators.task import Row, Task, judge
from evaluators.tasks import TASKS
from flows.learn.evaluate import open_count
from flows.service import Service
from flows.session import Session
from flows.show.terminal import Reporter

MOST_ROWS = 5000  # no task is told to have more
OTHER = "another task"


@dataclass(frozen=True, slots=True)
class RowCounts:
    """Rows of a task by use."""

    training: int
    gate: int
    sealed: int


def check_task(
    spec: str, limit: int, home: Path | None, ask_model: bool, progress: Reporter
) -> dict[str, Any]:
    """A task's mistakes, row counts, what the gate can do with them, and the base model's answers.

    Args:
        spec: Name of a task, or path/to/file.py:TASK.
        limit: Rows to check, and to ask, at most.
        home: Its settings count; it is not made where it is not there.
        ask_model: Whether the home's base model answers rows of the task.
        progress: Receives progress.
    """
    # An own file is loaded as it is; a built-in task is asked with the home's prompts and rows.
    service = _service(home)
    own = ":" in spec
    task = plugins.load(spec, hidden=[service.home.root]) if own else service.task(spec)

    def rows(split: loading.Split, count: int) -> list[Row]:
        if not own:
            return service.rows(task.name, split, count)
        return loading.rows(task, split, data_dir=service.settings.tasks.data_dir, limit=count)

    checked = rows("eval", limit)
    counts = count_rows(service, task, rows)
    rules = GateRules.of(
        service.settings.gate,
        graded=frozenset({task.name} if task.graded else ()),
        zero_tolerance=frozenset({task.name} if task.zero_tolerance else ()),
    )
    sandbox = None if task.name in TASKS else protections()
    document = {
        "task": task.name,
        "rows": len(checked),
        "counts": asdict(counts),
        "gate": gate_lines(task, counts, rules),
        "problems": plugins.check(task, checked),
        "sandbox": sandbox and sandbox.lines(),
    }
    if ask_model:
        document["model"] = _asked(service, task, checked, progress)
    return document


def _service(home: Path | None) -> Service:
    """The home's settings; no home is made: an own file can be checked before there is one."""
    root = home or Path(os.environ.get("ANCHORAGE_HOME", ".anchorage"))
    place = Home(root.expanduser().resolve())
    return Service(place, kept(place) if place.settings_json.is_file() else load())


def count_rows(
    service: Service, task: Task, rows: Callable[[loading.Split, int], Sequence[Row]]
) -> RowCounts:
    """How many rows train (as many as a round may take), judge, and are kept for sealed draws."""
    wanted = service.settings.tasks.rows
    total = len(rows("eval", 3 * wanted))
    trains = task.target and task.source.train_split is not None
    training = len(rows("train", 4 * service.settings.learner.prompts)) if trains else 0
    opened = open_count(total, wanted)
    return RowCounts(training, opened, total - opened)


def gate_lines(task: Task, counts: RowCounts, rules: GateRules) -> list[str]:
    """What the gate can do with so many rows, as a prior task and as a target."""
    least = min(counts.gate, counts.sealed)
    lines = [f"rows: {counts.training} train, {counts.gate} judge, {counts.sealed} are sealed"]
    if passes(task.name, least, 0, rules):
        lost = next(n for n in count(1) if n > least or not passes(task.name, least, n, rules)) - 1
        lines.append(f"as a prior task: a candidate passes that loses at most {lost} of {least}")
    else:
        wanted = least_rows(lambda n: passes(task.name, n, 0, rules))
        lines.append(
            f"as a prior task: HOLDS EVERY CANDIDATE, also one that loses nothing: {least} rows, "
            f"{wanted} to judge and {wanted} sealed are needed; or leave it out of tasks.priors"
        )
    if task.target and counts.training and not gain_shows(task.name, counts.gate, rules):
        wanted = least_rows(lambda n: gain_shows(task.name, n, rules))
        lines.append(
            f"as a target: NO GAIN CAN BE SHOWN on {counts.gate} rows; {wanted} are needed"
        )
    elif task.target and counts.training:
        lines.append("as a target: a gain can be shown (`anchorage plan` says how large)")
    return lines


def passes(name: str, rows: int, lost: int, rules: GateRules) -> bool:
    """Whether a prior task lets a candidate pass that loses so many rows and wins none."""
    before = _samples(name, rows, 1.0) + _samples(OTHER, 1, 1.0)
    after = _samples(name, lost, 0.0) + before[lost:]
    return _outcome(Tables(before, before, after), OTHER, name, rules) == "pass"


def gain_shows(name: str, rows: int, rules: GateRules) -> bool:
    """Whether the gate sees the gain of a candidate that turns every row from wrong to right."""
    before = _samples(name, rows, 0.0) + _samples(OTHER, 1, 1.0)
    after = _samples(name, rows, 1.0) + _samples(OTHER, 1, 1.0)
    return _outcome(Tables(before, before, after), name, name, rules) == "pass"


def _samples(name: str, rows: int, reward: float) -> tuple[Sample, ...]:
    return tuple(Sample(name, str(number), reward) for number in range(rows))


def _outcome(tables: Tables, target: str, name: str, rules: GateRules) -> str:
    """The gate's first finding on one task."""
    reasons = decide(tables, target, rules).reasons
    return next((each.outcome for each in reasons if each.task == name), "hold")


def least_rows(enough: Callable[[int], bool]) -> int:
    """The smallest number of rows that is enough, at most ``MOST_ROWS``; by bisection."""
    low, high = 0, MOST_ROWS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _asked(service: Service, task: Task, rows: Sequence[Row], progress: Reporter) -> dict[str, Any]:
    """Mean reward of the base model on these rows, with its 95 % interval, and what it means."""
    home = Home.at(service.home.root)
    shots = loading.examples(task, data_dir=service.settings.tasks.data_dir)
    if task.name in TASKS:
        shots = service.shots(task.name)
    with closing(Session(Service(home, service.settings), progress)) as opened:
        opened.population.load(service.anchor.directory)
        chats = [task.messages(row, shots(row)) for row in rows]
        answers = opened.population.generate(chats, task.max_tokens)
    rewards = [judge(task, a.text, row).reward for a, row in zip(answers, rows, strict=True)]
    if not rewards:
        raise UserError(f"task {task.name}: no rows to ask")
    low, high = mean_interval(rewards)
    return {
        "n": len(rewards),
        "reward": sum(rewards) / len(rewards),
        "low": low,
        "high": high,
        "means": means(rewards),
    }


def means(rewards: Sequence[float]) -> str:
    """What the base model's rewards say about learning on the task."""
    if max(rewards) <= 0:
        return "no answer earns a reward: a round has nothing to select; easier rows or a prompt"
    if min(rewards) >= 1:
        return "every answer is right already: a round has nothing to gain"
    return "some answers are right and some are not: a round can learn"
