"""Accuracy of every task on a few rows, now and then during a round, for the picture.

Where the time of a generation goes, and how much of it the learner takes.

    share = (render + update) / generation

render and update are seconds an engine spends on putting members into itself and on moving delta
(mean over the engines), generation the wall time from the first member asked to the step applied.
There is no third part: the next render replaces a member, so that nothing has to be restored.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from agent.home import write_atomically
from agent.population.pool import Population
from evaluators.runner import Shots
from evaluators.task import Message, Row, Task, judge
from flows.service import Service

PaceRow = Mapping[str, float]


class Pace:
    """The clock of one round; its rows lie beside the round, one a generation."""

    def __init__(self, service: Service, run_id: str, population: Population) -> None:
        self._path, self._population = _path(service, run_id), population
        self._begun, self._before = 0.0, dict[str, float]()

    def begin(self) -> None:
        """A generation begins."""
        self._before, self._begun = self._population.spent(), perf_counter()

    def end(self, generation: int) -> dict[str, float]:
        """A generation's step is applied: its seconds by part and the learner's share, kept."""
        wall, engines = perf_counter() - self._begun, self._population.engines()
        after = self._population.spent()
        parts = {
            part: max(0.0, seconds - self._before.get(part, 0.0)) / engines
            for part, seconds in after.items()  # an engine started again counts from zero
        }
        share = (parts.get("render", 0.0) + parts.get("update", 0.0)) / wall
        row = {f"seconds.{part}": seconds for part, seconds in parts.items()}
        row |= {"seconds.generation": wall, "share.learner": share}
        known = [each for each in _read(self._path) if each["generation"] != generation]
        write_atomically(self._path, json.dumps([*known, {"generation": generation, **row}]))
        return row


def learner_share(service: Service, run_id: str) -> float | None:
    """The median share of a round; None where nothing was timed."""
    shares = [row["share.learner"] for row in _read(_path(service, run_id))]
    return median(shares) if shares else None


def _path(service: Service, run_id: str) -> Path:
    return service.home.run(run_id) / "pace.json"


def _read(path: Path) -> list[PaceRow]:
    return list(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else []


Point = Mapping[str, Any]  # generation, task, accuracy (a share), n


def points_of(service: Service, run_id: str) -> tuple[Point, ...]:
    """Everything measured in a round so far."""
    path = service.home.run(run_id) / "curve.json"
    return tuple(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else ()


def chats(task: Task, rows: Sequence[Row], shots: Shots) -> list[list[Message]]:
    """The prompts of these rows."""
    return [task.messages(row, shots(row)) for row in rows]


class Curve:
    """The measurements of one round, each taken once however often the round is resumed."""

    def __init__(self, service: Service, target: str, run_id: str) -> None:
        self._service, self._run_id = service, run_id
        self._every = service.settings.tasks.curve_every
        count = service.settings.tasks.curve_rows
        names = [target, *service.priors(target)] if self._every else []
        self._asked = [
            (task, rows, chats(task, rows, service.shots(task.name)))
            for task in map(service.task, names)
            for rows in [service.rows(task.name, "eval", count)]
        ]

    def measure(self, population: Population, generation: int, last: bool = False) -> None:
        """Ask theta, as it is before this generation, when the generation is due."""
        known = points_of(self._service, self._run_id)
        due = self._every and (generation % self._every == 0 or last)
        if not due or any(point["generation"] == generation for point in known):
            return
        prompts = [chat for _, _, asked in self._asked for chat in asked]
        longest = [task.max_tokens for task, rows, _ in self._asked for _ in rows]
        told = iter(population.generate(prompts, longest))
        fresh = [
            {
                "generation": generation,
                "task": task.name,
                "accuracy": sum(judge(task, next(told).text, row).reward for row in rows)
                / len(rows),
                "n": len(rows),
            }
            for task, rows, _ in self._asked
        ]
        path = self._service.home.runs / self._run_id / "curve.json"
        write_atomically(path, json.dumps([*known, *fresh]))
