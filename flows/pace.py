"""Where the time of a generation goes, and how much of it the learner takes.

    share = (render + update) / generation

render and update are seconds an engine spends on putting members into itself and on moving delta
(mean over the engines), generation the wall time from the first member asked to the step applied.
There is no third part: the next render replaces a member, so that nothing has to be restored.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from time import perf_counter

from agent.population.pool import Population
from deploy.serving.served import write_atomically
from flows.service import Service

Row = Mapping[str, float]


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
    return service.home.runs / run_id / "pace.json"


def _read(path: Path) -> list[Row]:
    return list(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else []
