"""What rounds keep on disk beside their journal, and for how long.

Snapshots of delta are caches of the journal: a resumed round begins at one instead of at the
anchor, and deleting them costs time only. Rows that came from clients are kept so that a round can
be resumed after a crash; they are deleted once the experience store has deleted them.
"""

import time
from collections.abc import Collection

from agent.population.pool import Population
from agent.store.forget import expire, gone
from agent.store.journal import Run
from agent.store.replay import prune, snapshot_path
from flows.round_files import RoundFiles
from flows.service import Service

DAY_S = 86_400.0
NEWEST = 2  # snapshots of a round in progress: the newest may be cut short by a crash


def keep_snapshots(service: Service, population: Population, run: Run, newest: int) -> None:
    """Save delta as it is now, and keep only this round's ``newest`` snapshots.

    Of other rounds one snapshot stays: the end of the round that this one began from. Later rounds
    may begin there too; every other ended round is kept as its weights.
    """
    journal, folder = service.journal, service.home.snapshots
    own = [each.delta_hash for each in journal.generations(run.run_id)]
    parent = journal.generations(run.parent_run)[-1:] if run.parent_run else []
    if own and not snapshot_path(folder, own[-1]).exists():
        population.save(snapshot_path(folder, own[-1]))
    saved = [each for each in dict.fromkeys(own) if snapshot_path(folder, each).exists()]
    prune(folder, [*saved[-newest:], *(each.delta_hash for each in parent)])


def sweep(service: Service) -> int:
    """Delete captured text older than ``gateway.retention_days``, also from rounds' files.

    Returns:
        How many interactions were deleted.
    """
    before = time.time() - service.settings.gateway.retention_days * DAY_S
    removed = expire(service.experience, before)
    for run_id, positions in gone(service.experience).items():
        delete_rows(service, run_id, positions)
    return removed


def delete_rows(service: Service, run_id: str, positions: Collection[int]) -> None:
    """Delete rows from a round's file; a round that is not finished is given up by it."""
    finished = service.journal.run(run_id).digest is not None
    RoundFiles(service.home, run_id).blank_rows(positions, finished=finished)
