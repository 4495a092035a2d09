"""Replays that only tests make: snapshots on the way, and a run without some of its examples."""

from collections.abc import Collection
from pathlib import Path

from agent.learner.es import Shaping
from agent.store.journal import Journal
from agent.store.replay import replay, snapshot_path, steps_without
from agent.store.weights import Anchor, Parameters


def leave_snapshots(journal: Journal, anchor: Anchor, run_id: str, folder: Path, every: int) -> str:
    """A snapshot after every so many generations of a run; returns the digest at its end."""
    parameters = Parameters.zeros(anchor)
    for count, row in enumerate(journal.generations(run_id), start=1):
        parameters.apply(row.step)
        if count % every == 0:
            parameters.save(snapshot_path(folder, row.delta_hash))
    return parameters.digest()


def replay_without(
    journal: Journal,
    anchor: Anchor,
    run_id: str,
    positions: Collection[int],
    *,
    mirrored: bool,
    shaping: Shaping,
) -> Parameters:
    """A run's weights had the examples at these positions earned nothing, from where it began."""
    start = journal.run(run_id).parent_run or anchor.digest
    parameters = replay(journal, anchor, start)
    for taken, _ in steps_without(journal, run_id, positions, mirrored=mirrored, shaping=shaping):
        parameters.apply(taken)
    return parameters
