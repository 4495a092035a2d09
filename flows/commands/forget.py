"""A principal's wish to be forgotten: text and rows go, and what was learnt can be learnt again.

Deleted are its interactions, answers and feedback, and its rows in the files of the rounds that
used them. The weights of those rounds, and of every round after them, still carry what the rows
taught; ``replay`` makes each of these rounds again from the journal's rewards less the principal's,
as a candidate that the gate has not seen yet.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agent.learner.drift import Prediction, measure
from agent.store.forget import forget, rounds_of
from agent.store.journal import Run
from agent.store.replay import replay, steps_without
from agent.store.weights import export
from flows.learn.loop import alone
from flows.learn.snapshots import delete_rows, sweep
from flows.service import Service
from flows.show.progress import Reporter

Places = Mapping[str, tuple[int, ...]]  # round -> columns of the principal's rows


def forget_now(
    home: Path | None, principal: str, again: bool, progress: Reporter
) -> dict[str, Any]:
    """Delete; what went, the rounds that used it, the versions it is in, and their replays.

    Raises:
        UserError: Another process is running a round, which may be using the rows.
    """
    service = Service.at(home)
    with alone(service):
        used = rounds_of(service.experience, principal)
        places = {use.round_id: use.positions for use in used if use.pool == "train"}
        for round_id, columns in places.items():
            delete_rows(service, round_id, columns)
        sweep(service)
        gone = forget(service.experience, principal, time.time())
        touched = _touched(service.journal.runs(), places)
        told: dict[str, Any] = {
            "principal": principal,
            "interactions": gone.interactions,
            "feedback": gone.feedback,
            "rounds": {round_id: len(columns) for round_id, columns in places.items()},
            "versions": {
                run.digest: service.ledger.state(run.digest) for run in touched if run.digest
            },
        }
        if again:
            told["replayed"] = _replayed(service, touched, places, progress)
    return told


def _touched(runs: Sequence[Run], places: Places) -> list[Run]:
    """The rounds that used the rows, and those that began from one of these, oldest first."""
    found: list[Run] = []
    for run in runs:
        if run.run_id in places or run.parent_run in {each.run_id for each in found}:
            found.append(run)
    return found


def _replayed(
    service: Service, touched: Sequence[Run], places: Places, progress: Reporter
) -> dict[str, str]:
    """Each finished round again, its successors on what it now ends with: round -> digest."""
    finished = [run for run in touched if run.digest is not None]
    advance = progress.track("rounds replayed", len(finished))
    instead: dict[str, str] = {}  # digest then -> digest without the rows
    told: dict[str, str] = {}
    for done, run in enumerate(finished, start=1):
        parent = instead.get(run.parent_digest, run.parent_digest)
        digest = _without(service, run, parent, places.get(run.run_id, ()))
        instead[str(run.digest)] = told[run.run_id] = digest
        advance(done)
    return told


def _without(service: Service, old: Run, parent: str, positions: tuple[int, ...]) -> str:
    """Journal, weights and ledger of one round without some of its rows; its digest."""
    journal = service.journal
    run = _opened(service, old, parent, positions)
    anchor = service.open_anchor(old.anchor_digest)
    parameters = replay(journal, anchor, run.run_id, importance=service.home.importance)
    done = journal.generations(run.run_id)
    norm = float(done[-1].drift["predicted_norm"]) if done else _norm_of(service, run)
    predicted = Prediction(norm, norm)
    plan = old.plan
    again = steps_without(
        journal,
        old.run_id,
        positions,
        mirrored=bool(plan.get("mirrored", False)),
        shaping=plan.get("shaping", "zscore"),
    )
    for step, rewards in list(again)[len(done) :]:
        applied = parameters.apply(step)
        predicted = predicted.after(step, anchor.parameters)
        drift = measure(step, applied, rewards, predicted)
        journal.commit(run.run_id, step, rewards, applied.delta_hash, drift)
    digest = export(parameters, service.home.weights).name
    why = f"round {old.run_id} without {len(positions)} of its rows"
    journal.finish(run.run_id, digest, why, time.time())
    if service.ledger.state(digest) is None:
        service.record(digest, "PROPOSED", why)
    return digest


def _opened(service: Service, old: Run, parent: str, positions: tuple[int, ...]) -> Run:
    """The replay's own round, or the one of an earlier call that was interrupted."""
    plan = {**old.plan, "replayed": old.run_id, "left_out": list(positions)}
    for run in service.journal.runs():
        if run.digest is None and run.plan == plan and run.parent_digest == parent:
            return run
    return service.journal.open_run(
        f"{len(service.journal.runs()) + 1:04d}-{old.target}",
        anchor_digest=old.anchor_digest,
        parent_digest=parent,
        target=old.target,
        run_seed=old.run_seed,
        plan=plan,
        now=time.time(),
    )


def _norm_of(service: Service, run: Run) -> float:
    """||delta|| at the start of a round."""
    before = service.journal.generations(run.parent_run) if run.parent_run else []
    return float(before[-1].drift["norm"]) if before else 0.0
