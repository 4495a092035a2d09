"""Own tasks, from entry points or files: loading, settings, and the check of their contract.

The contract of a task, which ``check`` tests on rows of its own: the gold answer scores 1; the
wrong answer and an empty one score 0 (of a graded task: less than the gold answer, or than 1 where
there is none); a task may have no gold and no wrong answer; the same input
has the same verdict and leaves the row as it was; no completion, however odd, makes it fail or
takes longer than 100 ms; no key occurs twice.
"""

import copy
import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple

from agent.errors import UserError
from evaluators.sandbox import Sandbox
from evaluators.sandbox_worker import Limits
from evaluators.task import Row, Task, Verdict, judge, with_prompt
from evaluators.tasks import TASKS

GROUP = "anchorage.tasks"
BOUND_S = 0.1
TIMED_ROWS = 3

# Texts that verifiers have hung on or failed on, each up to 100 kB.
ODD = (
    "",
    "\ud800",
    "\x00" * 1000,
    "9" * 100_000,
    "-" * 100_000,
    "(" * 100_000,
    "{" * 100_000,
    " " * 100_000,
    "\n" * 100_000,
    "<answer>" * 12_500,
    "9**9**9**9",
    '__import__("os").system("id")',
    "a" * 50_000 + "!" + "a" * 50_000,
    "٣" * 1000,
    '"' * 100_000,
    "SELECT " * 14_000,
)


def all_tasks(
    specs: Sequence[str] = (), limits: Limits | None = None, hidden: Iterable[Path] = ()
) -> dict[str, Task]:
    """Our tasks, those of installed packages and of the settings; code not ours is sandboxed.

    Raises:
        UserError: a spec that names no task, or a name that is taken.
    """
    tasks = dict(TASKS)
    installed = [entry.value for entry in entry_points(group=GROUP)]
    for spec in [*installed, *specs]:
        task = load(spec, limits, hidden)
        if task.name in tasks:
            raise UserError(f"task {spec!r}: the name {task.name!r} is taken; choose another")
        tasks[task.name] = task
    return tasks


def load(spec: str, limits: Limits | None = None, hidden: Iterable[Path] = ()) -> Task:
    """One own task; its code runs in worker processes with limits, and cannot read ``hidden``.

    Raises:
        UserError: a spec that names no task.
    """
    return Sandbox(spec, limits, hidden).task()


def tuned(
    tasks: Mapping[str, Task],
    *,
    prompts: Mapping[str, Mapping[str, Any]] | None = None,
    max_tokens: int | None = None,
) -> dict[str, Task]:
    """The tasks as the settings want them: other prompts, no answer longer than this.

    ``prompts`` gives ``with_prompt``'s arguments by the task's name.

    Raises:
        UserError: a prompt for a task that does not exist.
    """
    words = prompts or {}
    if unknown := sorted(words.keys() - tasks.keys()):
        raise UserError(f"prompt for task {unknown[0]!r}; allowed: {', '.join(sorted(tasks))}")
    return {
        name: replace(
            with_prompt(task, **words.get(name, {})),
            max_tokens=min(task.max_tokens, max_tokens or task.max_tokens),
        )
        for name, task in tasks.items()
    }


def pinned(tasks: Mapping[str, Task], revisions: Mapping[str, str]) -> dict[str, Task]:
    """The tasks with their data sets at these commits.

    Raises:
        UserError: a revision for a task that does not exist.
    """
    if unknown := sorted(revisions.keys() - tasks.keys()):
        allowed = ", ".join(sorted(tasks))
        raise UserError(f"revision for task {unknown[0]!r}; allowed: {allowed}")
    sources = {name: replace(tasks[name].source, revision=at) for name, at in revisions.items()}
    return {
        name: replace(task, source=sources.get(name, task.source)) for name, task in tasks.items()
    }


class Problem(NamedTuple):
    """One breach of the contract: its kind, by which breaches are counted, and this one of it."""

    kind: str
    key: str
    text: str


def check(task: Task, rows: Sequence[Row]) -> list[str]:
    """What is wrong with a task, one line for each kind of mistake; [] when it keeps the contract.

    A line shows the first row on which the mistake was met and how many more there are.
    """
    if not rows:
        return [f"{task.name}: no rows to check"]
    kinds: defaultdict[str, list[Problem]] = defaultdict(list)
    for problem in _problems(task, rows):
        kinds[problem.kind].append(problem)
    return [_line(task, problems) for problems in kinds.values()]


def _line(task: Task, problems: Sequence[Problem]) -> str:
    first, more = problems[0], len(problems) - 1
    alike = f" ({more} more like this)" if more else ""
    return f"{task.name} {first.key}: {first.text}{alike}"


def _problems(task: Task, rows: Sequence[Row]) -> Iterator[Problem]:
    keys: list[str] = []
    for number, row in enumerate(rows, 1):
        try:
            key = task.key(row)
        except Exception as error:
            yield Problem(f"key {type(error)}", f"row {number}", f"key fails: {_said(error)}")
            continue
        keys.append(key)
        try:
            yield from _row_problems(task, key, row)
        except Exception as error:  # of gold, wrong or fields, which the caller would meet, too
            yield Problem(f"row {type(error)}", key, f"the row cannot be asked: {_said(error)}")
    for key, count in Counter(keys).items():
        if count > 1:
            text = f"key {key!r} names {count} rows; one is wanted"
            yield Problem("key", "", text)
    for row in rows[:TIMED_ROWS] if len(keys) == len(rows) else ():
        yield from _odd_problems(task, row)


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _row_problems(task: Task, key: str, row: Row) -> Iterator[Problem]:
    """Gold 1, wrong 0, nothing 0, pure, and a prompt that can be sent."""
    before = copy.deepcopy(row)
    answers = [("gold", task.gold(row), 1.0)] if task.gold else []
    best, whose = 1.0, "1"
    for _, gold, _ in answers:
        best = judge(task, gold, row).reward
        whose = f"the gold answer's {best:g}"
    answers += [("wrong", task.wrong(row), 0.0)] if task.wrong else []
    for name, text, wanted in (*answers, ("empty", "", 0.0)):
        verdict = judge(task, text, row)
        kept = verdict.reward == wanted
        scores = f"scores {verdict.reward:g}; {wanted:g} is wanted"
        if task.graded:
            kept = name == "gold" or verdict.reward < best
            scores = f"scores {verdict.reward:g}; less than {whose} is wanted"
        if verdict.error and name != "empty":
            kind = f"{name} {verdict.error.partition(':')[0]}"
            yield Problem(kind, key, f"the {name} answer fails: {verdict.error}")
        elif not kept:
            yield Problem(f"{name} scores", key, f"the {name} answer {text[:80]!r} {scores}")
        if judge(task, text, row) != verdict:
            said = f"the {name} answer has two verdicts on two looks; verify must be pure"
            yield Problem("pure", key, said)
    if row != before:
        said = "its row was changed; fields, gold, wrong and verify must leave it"
        yield Problem("changed", key, said)
    json.dumps(task.messages(row))


def _odd_problems(task: Task, row: Row) -> Iterator[Problem]:
    """Odd completions are judged without an error and in time.

    The time is that of the quickest of up to five looks: a busy machine slows single ones.
    """
    key = task.key(row)
    for text in ODD:
        shown = f"{text[:20]!r} ({len(text)} characters)"
        verdict, taken_s = _timed(task, text, row)
        for _ in range(4):
            if taken_s > BOUND_S:
                taken_s = min(taken_s, _timed(task, text, row)[1])
        if verdict.error:
            yield Problem("odd fails", key, f"{shown} fails: {verdict.error}")
        elif verdict.reward and not task.graded:
            yield Problem("odd scores", key, f"{shown} scores {verdict.reward:g}; 0 is wanted")
        if taken_s > BOUND_S:
            took = f"{1000 * taken_s:.0f} ms; at most {1000 * BOUND_S:.0f} are allowed"
            yield Problem("odd time", key, f"{shown} takes {took}")


def _timed(task: Task, text: str, row: Row) -> tuple[Verdict, float]:
    started = time.perf_counter()
    verdict = judge(task, text, row)
    return verdict, time.perf_counter() - started
