"""From traffic to training rows: what clients asked with a task is what the next round asks."""

import json
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agent.store.experience import ExperienceRow
from agent.store.intake import Caps, Intake, collect
from evaluators.task import Row
from flows.service import Service


@dataclass(frozen=True)
class Collected:
    """The rows of a round, in the order every member answers them, and where they came from.

    ``traffic`` holds the requests behind the first ``from_traffic`` rows, one each, in their order.
    """

    rows: tuple[Row, ...]
    from_traffic: int
    traffic: tuple[ExperienceRow, ...]
    set_aside: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """Counts only: rows are kept where they were recorded."""
        return {
            "rows": len(self.rows),
            "from_traffic": self.from_traffic,
            "from_dataset": len(self.rows) - self.from_traffic,
            "set_aside": self.set_aside,
        }


def collect_rows(service: Service, target: str, count: int) -> Collected:
    """``count`` training rows of the target: verified traffic first, the task's own rows after.

    The task's rows are taken in turn: each round on a target begins where the last one ended.
    Traffic is deduplicated, kept apart from evaluation rows, quarantined and capped (agent.store.
    intake); a principal's rows are at most its share of ``count``. When it came plays no part:
    equal traffic gives an equal round.
    """
    task = service.task(target)
    known = service.training_rows(target)
    held_out = frozenset(task.key(row) for row in evaluation_pool(service, target))
    intake = _intake(service, target, count)
    found: dict[str, tuple[Row, ExperienceRow]] = {}
    for each in intake.train:
        row = _row_of(each, known)
        if row is not None and len(found) < count and task.key(row) not in held_out:
            found.setdefault(task.key(row), (row, each))
    live = {key: found[key] for key in sorted(found)}
    rows = {key: row for key, (row, _) in live.items()}
    earlier = sum(run.target == target for run in service.journal.runs())
    own = deque(known.items())
    own.rotate(-earlier * count)
    for key, row in own:
        if len(rows) >= count:
            break
        rows.setdefault(key, row)
    set_aside = {
        name: len(getattr(intake, name))
        for name in ("duplicates", "overlapping", "quarantined", "over_cap", "gate", "sealed")
    }
    keys = [task.key(row) for row in (_row_of(each, known) for each in intake.train) if row]
    set_aside["overlapping"] += len(held_out.intersection(keys))  # the very rows that judge it
    used = tuple(each for _, each in live.values())
    return Collected(tuple(rows.values()), len(used), used, set_aside)


def evaluation_pool(service: Service, target: str) -> Sequence[Row]:
    """The rows that may judge the target, in all stages; a round never trains on them."""
    settings = service.settings
    return service.rows(target, "eval", (3 + settings.gate.extend) * settings.tasks.rows)


def mark_used(service: Service, round_id: str, collected: Collected) -> None:
    """Remember which rows a round learnt from, so that a deletion can name its rounds."""
    if collected.traffic:
        service.experience.use(round_id, "train", collected.traffic)


def _intake(service: Service, target: str, count: int) -> Intake:
    """Verified traffic of the target within its days of retention, in an order of its own."""
    gateway = service.settings.gateway
    since = time.time() - gateway.retention_days * 86_400
    rows = service.experience.rows(target, since)
    verified = [row for row in rows if row.reward is not None]
    return collect(sorted(verified, key=_place), Caps(count, gateway.principal_cap))


def _place(row: ExperienceRow) -> tuple[str, ...]:
    """Where a row stands, whatever the clock said; ids, drawn at random, only settle draws."""
    return row.row_hash, row.prompt_hash, row.principal, row.group_hash, row.inference_id


def _row_of(row: ExperienceRow, known: Mapping[str, Row]) -> Row | None:
    """The task's row behind a request: the one it sent, or the one it named."""
    if row.example is not None:
        return dict(json.loads(row.example))
    return known.get(row.example_id or "")
