"""Snapshots of delta during a round: a resumed round begins at one instead of at the anchor.

They are caches of the journal; deleting them changes nothing but the time that a start takes.
"""

from agent.population.pool import Population
from agent.store.records import Run
from agent.store.replay import prune, snapshot_path
from flows.service import Service

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
