"""Weights from a journal: the anchor and every step of the lineage, delta's hash checked at each.

A snapshot of delta is a file ``<delta hash>.safetensors``. One whose content has another hash is
ignored, so a snapshot can save time and never change a result.
"""

import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from agent.errors import UserError
from agent.home import Home
from agent.learner.es import Shaping, Step, members, step
from agent.store.anchor import Anchor
from agent.store.journal import DamagedError, Generation, Journal
from agent.store.packed import Rewards
from agent.store.theta import Parameters
from agent.store.weights import export
from agent.store.windows import TREE


@dataclass(frozen=True, slots=True)
class ReplayRoute:
    """How to reach a state: the snapshot to begin with (None: the anchor), the rest in order."""

    snapshot: Path | None
    generations: tuple[Generation, ...]


def snapshot_path(folder: Path, delta_hash: str) -> Path:
    """Where the snapshot of a delta lies."""
    return folder / f"{delta_hash}.safetensors"


def prune(folder: Path, keep: Collection[str]) -> None:
    """Remove the snapshots of every delta but these."""
    wanted = {snapshot_path(folder, delta_hash) for delta_hash in keep}
    for path in set(folder.glob("*.safetensors")) - wanted:
        path.unlink(missing_ok=True)


def runs_of(journal: Journal, anchor: Anchor, digest_or_run: str) -> list[str]:
    """Run ids from the anchor to a candidate's digest (or a prefix of it) or to a run id."""
    if digest_or_run == anchor.digest:
        return []
    known = {run.run_id for run in journal.runs()}
    last = digest_or_run if digest_or_run in known else journal.candidate(digest_or_run).run_id
    start = journal.run(last).anchor_digest
    if start != anchor.digest:
        raise UserError(f"{digest_or_run}: starts from anchor {start}, given: {anchor.digest}")
    return journal.ancestry(last)


def lineage(journal: Journal, anchor: Anchor, digest_or_run: str) -> list[Generation]:
    """The steps from the anchor on, of each run those it kept, every row of every run checked."""
    runs = runs_of(journal, anchor, digest_or_run)
    for run_id in runs:
        journal.verify(run_id)
    return [generation for run_id in runs for generation in journal.kept(run_id)]


def route(
    journal: Journal, anchor: Anchor, digest_or_run: str, snapshots: Path | None = None
) -> ReplayRoute:
    """The newest sound snapshot on the way and the generations after it."""
    return route_along(anchor, lineage(journal, anchor, digest_or_run), snapshots)


def route_along(
    anchor: Anchor, generations: Sequence[Generation], snapshots: Path | None = None
) -> ReplayRoute:
    """The same for steps that are known."""
    for done in range(len(generations), 0, -1):
        wanted = generations[done - 1].delta_hash
        path = snapshot_path(snapshots, wanted) if snapshots else None
        if path and path.exists() and is_sound(anchor, path, wanted):
            return ReplayRoute(path, tuple(generations[done:]))
    return ReplayRoute(None, tuple(generations))


def is_sound(anchor: Anchor, path: Path, delta_hash: str) -> bool:
    """Whether a snapshot holds the delta of its name."""
    try:
        return Parameters.load(anchor, path).delta_hash(delta_hash) == delta_hash
    except UserError:
        return False


def replay(
    journal: Journal,
    anchor: Anchor,
    digest_or_run: str,
    snapshots: Path | None = None,
    importance: Path | None = None,
) -> Parameters:
    """Rebuild the weights of a candidate, or of a run so far, bit for bit.

    With ``snapshots``, a folder, it starts from the newest sound one on the way. ``importance`` is
    the folder of the weights that penalties name.
    DamagedError names the first row that is not what was written or whose step gives another delta;
    a finished run must end at its digest.
    """
    path = route(journal, anchor, digest_or_run, snapshots)
    parameters = _along(anchor, path, importance)
    _check_end(journal, anchor, digest_or_run, parameters)
    return parameters


def _along(anchor: Anchor, path: ReplayRoute, importance: Path | None) -> Parameters:
    """The end of a route; DamagedError names the row whose step gives another delta."""
    parameters = Parameters.zeros(anchor, importance)
    parameters.reset(path.snapshot)
    for generation in path.generations:
        wanted = generation.delta_hash
        if parameters.apply(generation.step, wanted).delta_hash != wanted:
            raise DamagedError(generation.run_id, generation.generation, "delta_hash")
    return parameters


def reached(
    anchor: Anchor, path: ReplayRoute, wanted: str, found: str, importance: Path | None
) -> bool:
    """Whether engines that went a route hold the delta of its last row.

    Engines whose hash of delta is of another kind than the journal's (the round began on another
    kind of machine) are compared with the same route gone on this machine.

    Args:
        wanted: The hash in the row.
        found: The engines' hash.
    """
    if found.startswith(TREE) == wanted.startswith(TREE):
        return found == wanted
    return _along(anchor, path, importance).delta_hash(found) == found


def random_walk(
    journal: Journal, anchor: Anchor, digest: str, importance: Path | None = None, seed: int = 0
) -> Parameters:
    """A candidate's control: its steps with the coefficients of each shuffled among its pairs.

    Steps of equal length in equal noise that no reward chose: what it gains or loses is what moving
    as far by chance gains or loses.
    """
    parameters = Parameters.zeros(anchor, importance)
    for place, generation in enumerate(lineage(journal, anchor, digest)):
        step = generation.step
        shuffled = list(step.coefficients)
        random.Random(f"{seed} {place}").shuffle(shuffled)
        parameters.apply(replace(step, coefficients=tuple(shuffled)))
    return parameters


def _check_end(
    journal: Journal, anchor: Anchor, digest_or_run: str, parameters: Parameters
) -> None:
    """The rendered weights must have the digest that the last run ended with."""
    runs = runs_of(journal, anchor, digest_or_run)
    ended = journal.run(runs[-1]).digest if runs else anchor.digest
    if ended is not None and parameters.digest() != ended:
        raise DamagedError(runs[-1] if runs else "anchor", "outcome", "digest")


def batch_places(plan: Mapping[str, Any], generation: int, default: int) -> list[int]:
    """Places of the rows that a generation asks, in the order of its rewards' columns.

    ``batch`` rows in turn from the round's; all of them where the plan has no batch.
    """
    rows = int(plan.get("rows", {}).get("rows", default))
    batch = min(int(plan.get("batch") or rows), rows)
    return [(generation * batch + column) % rows for column in range(batch)]


def steps_without(
    journal: Journal,
    run_id: str,
    positions: Collection[int],
    *,
    mirrored: bool,
    shaping: Shaping,
) -> Iterator[tuple[Step, Rewards]]:
    """A run's steps taken anew from the recorded rewards less these columns, and those rewards.

    ``mirrored`` and ``shaping`` are the run's. The members stay those that were evaluated. Where no
    example is left every step is a no-op.
    """
    journal.verify(run_id)
    plan = journal.run(run_id).plan
    for generation in journal.generations(run_id):
        asked = batch_places(plan, generation.generation, generation.rewards.shape[1])
        gone = [column for column, place in enumerate(asked) if place in positions]
        kept = np.delete(generation.rewards, gone, axis=1)
        taken = generation.step
        # Equal rewards are a no-op by the learner's own rule, an empty array is an error.
        rewards = kept if kept.size else np.zeros((len(kept), 1))
        again = step(
            rewards,
            members(len(rewards), mirrored),
            run_seed=taken.run_seed,
            generation=taken.generation,
            sigma=taken.sigma,
            alpha=taken.alpha,
            shaping=shaping,
            penalty=taken.penalty,
            noise=taken.noise,
        )
        yield again, rewards


def rebuild(journal: Journal, anchor: Anchor, digest: str, home: Home) -> Path:
    """Write a version's directory anew from its anchor and the journal; a damaged one goes.

    Raises:
        UserError: The journal has no such version, or does not lead to it.
    """
    return export(replay(journal, anchor, digest, importance=home.importance), home.weights)
