"""Snapshots of delta during a round: a resumed round begins at one instead of at the anchor.

They are caches of the journal; deleting them changes nothing but the time that a start takes.

How long a client's text stays: in the experience store, and in the files of rounds.

A round keeps the rows it asks beside itself, so that it can be taken up after a crash. Rows that
came from traffic are taken out of that file once the store has forgotten them.
"""

import json
import time
from collections.abc import Collection

from agent.home import write_atomically
from agent.population.pool import Population
from agent.store.forget import expire, gone
from agent.store.journal import Run
from agent.store.replay import prune, snapshot_path
from flows.service import Service

DAY_S = 86_400.0
GIVEN_UP = "given_up"  # a file beside a round's rows


def sweep(service: Service) -> int:
    """Delete what is older than the settings allow; how many interactions went."""
    before = time.time() - service.settings.gateway.retention_days * DAY_S
    removed = expire(service.experience, before)
    for round_id, positions in gone(service.experience).items():
        blank(service, round_id, positions)
    return removed


def blank(service: Service, round_id: str, positions: Collection[int]) -> None:
    """Take rows out of a round's file; the others keep their places.

    A round that is not finished cannot be taken up any more: it is marked, and a new one begins.
    """
    folder = service.home.runs / round_id
    path = folder / "rows.json"
    if not path.is_file():
        return
    rows = json.loads(path.read_text(encoding="utf-8"))
    left = [None if place in positions else row for place, row in enumerate(rows)]
    if left != rows:
        if service.journal.run(round_id).digest is None:
            (folder / GIVEN_UP).touch()
        write_atomically(path, json.dumps(left))


def given_up(service: Service, run: Run) -> bool:
    """Whether an open round lost rows that somebody wanted forgotten."""
    return (service.home.run(run.run_id) / GIVEN_UP).exists()


NEWEST = 2  # of a round in progress: one may have been cut short by whatever ended the process


def keep_snapshots(service: Service, population: Population, run: Run, newest: int) -> None:
    """Snapshot delta as it is, and keep only so many of this round's, the newest.

    What other rounds left goes, but for the end of the one that this round began from: an ended
    round is kept as its weights, and only a next round that begins there still saves time by it.
    """
    journal, folder = service.journal, service.home.snapshots
    own = [each.delta_hash for each in journal.generations(run.run_id)]
    begun = journal.generations(run.parent_run)[-1:] if run.parent_run else []
    if own and not snapshot_path(folder, own[-1]).exists():
        population.save(snapshot_path(folder, own[-1]))
    there = [each for each in dict.fromkeys(own) if snapshot_path(folder, each).exists()]
    prune(folder, [*there[-newest:], *(each.delta_hash for each in begun)])
