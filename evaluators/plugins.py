"""Own tasks: found by entry point or file, kept apart from ours, and checked by a contract.

The contract of a task, which ``check`` tests on rows of its own: the gold answer scores 1; the
wrong answer and an empty one score 0; the same input has the same verdict and leaves the row as it
was; no completion, however odd, makes it fail or takes longer than 100 ms; no key occurs twice.
"""

import copy
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import entry_points
from typing import Any

from agent.errors import UserError
from evaluators.loading import resolve
from evaluators.sandbox import Limits, sandboxed
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


def all_tasks(specs: Sequence[str] = (), limits: Limits | None = None) -> dict[str, Task]:
    """Our tasks, those of installed packages, and those of the settings; verifiers not ours are
    sandboxed.

    Raises:
        UserError: a spec that names no task, or a name that is taken.
    """
    tasks = dict(TASKS)
    installed = [entry.value for entry in entry_points(group=GROUP)]
    for spec in [*installed, *specs]:
        task = load(spec, limits)
        if task.name in tasks:
            raise UserError(f"task {spec!r}: the name {task.name!r} is taken; choose another")
        tasks[task.name] = task
    return tasks


def load(spec: str, limits: Limits | None = None) -> Task:
    """One own task, its verifier in a worker process with limits."""
    return sandboxed(resolve(spec), spec, limits)


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


def check(task: Task, rows: Sequence[Row]) -> list[str]:
    """What is wrong with a task, one line a problem; [] when it keeps the contract."""
    if not rows:
        return [f"{task.name}: no rows to check"]
    problems = list(_repeated_keys(task, rows))
    for row in rows:
        problems += [f"{task.name} {task.key(row)}: {text}" for text in _row_problems(task, row)]
    problems += [text for row in rows[:TIMED_ROWS] for text in _odd_problems(task, row)]
    return problems


def _repeated_keys(task: Task, rows: Sequence[Row]) -> Iterator[str]:
    for key, count in Counter(task.key(row) for row in rows).items():
        if count > 1:
            yield f"{task.name}: key {key!r} names {count} rows; one is wanted"


def _row_problems(task: Task, row: Row) -> Iterator[str]:
    """Gold 1, wrong 0, nothing 0, pure, and a prompt that can be sent."""
    before = copy.deepcopy(row)
    gold, wrong = task.gold(row), task.wrong(row)
    for name, text, wanted in (("gold", gold, 1.0), ("wrong", wrong, 0.0), ("empty", "", 0.0)):
        verdict = judge(task, text, row)
        if verdict.error and name != "empty":
            yield f"the {name} answer fails: {verdict.error}"
        elif verdict.reward != wanted:
            yield f"the {name} answer {text[:80]!r} scores {verdict.reward:g}; {wanted:g} is wanted"
        if judge(task, text, row) != verdict:
            yield f"the {name} answer has two verdicts on two looks; verify must be pure"
    if row != before:
        yield "its row was changed; fields, gold, wrong and verify must leave it"
    json.dumps(task.messages(row))


def _odd_problems(task: Task, row: Row) -> Iterator[str]:
    """Odd completions are judged without an error and in time (the better of two looks)."""
    for text in ODD:
        shown = f"{task.name} {task.key(row)}: {text[:20]!r} ({len(text)} characters)"
        looks = [_timed(task, text, row) for _ in range(2)]
        verdict, taken_s = looks[0][0], min(taken for _, taken in looks)
        if verdict.error:
            yield f"{shown} fails: {verdict.error}"
        elif verdict.reward:
            yield f"{shown} scores {verdict.reward:g}; 0 is wanted"
        if taken_s > BOUND_S:
            yield f"{shown} takes {1000 * taken_s:.0f} ms; at most {1000 * BOUND_S:.0f} are allowed"


def _timed(task: Task, text: str, row: Row) -> tuple[Verdict, float]:
    started = time.perf_counter()
    verdict = judge(task, text, row)
    return verdict, time.perf_counter() - started
