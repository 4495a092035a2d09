"""Deletion of a principal: its text, rows and keys, and replays of the rounds that used the rows.

Deleted are its interactions, answers and feedback, and its rows in the files of the rounds that
used them; its keys are revoked. The weights of those rounds, and of every round after them, still
carry what the rows taught; ``replay`` makes each of these rounds again from the journal's rewards
less the principal's, as a candidate that the gate has not seen yet.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from agent.errors import UserError
from agent.learner.drift import Prediction, measure
from agent.learner.es import scaling
from agent.store.forget import forget, known, principals, rounds_of
from agent.store.journal import Run
from agent.store.replay import replay, steps_without
from agent.store.weights import export
from flows.learn.collect import delete_rows, sweep
from flows.learn.loop import alone
from flows.service import Service
from flows.show.terminal import Reporter

SHOWN = 20  # principals named in a message
Places = Mapping[str, tuple[int, ...]]  # round -> columns of the principal's rows


def forget_now(
    home: Path | None, principal: str, again: bool, progress: Reporter
) -> dict[str, Any]:
    """Delete; what went, the rounds that used it, the versions it is in, and their replays.

    May be repeated: the places of its rows in rounds are kept, so that ``again`` can come later.

    Raises:
        UserError: Nothing of this principal was ever kept, or another process is running a round,
            which may be using the rows.
    """
    service = Service.at(home)
    if not known(service.experience, principal):
        others = ", ".join(principals(service.experience)[:SHOWN]) or "none"
        raise UserError(f"principal {principal!r}: nothing of it is kept; principals: {others}")
    with alone(service):
        used = rounds_of(service.experience, principal)
        places = {use.round_id: use.positions for use in used if use.pool == "train"}
        # Files first: the store's own deletion removes the list of places, and a process that ends
        # in between is to find them again.
        for use in used:
            delete_rows(service, use.round_id, use.pool, use.positions)
        sweep(service)
        gone = forget(service.experience, principal, time.time())
        touched = _touched(service.journal.runs(), places)
        report: dict[str, Any] = {
            "principal": principal,
            "interactions": gone.interactions,
            "feedback": gone.feedback,
            "keys": gone.keys,
            "rounds": {round_id: len(columns) for round_id, columns in places.items()},
            "versions": {
                run.digest: service.ledger.state(run.digest) for run in touched if run.digest
            },
        }
        if again:
            report["replayed"] = _replayed(service, touched, places, progress)
    return report


def _touched(runs: Sequence[Run], places: Places) -> list[Run]:
    """The rounds that used the rows, and those that began from one of these, oldest first."""
    touched: list[Run] = []
    for run in runs:
        if run.run_id in places or run.parent_run in {each.run_id for each in touched}:
            touched.append(run)
    return touched


def _replayed(
    service: Service, touched: Sequence[Run], places: Places, progress: Reporter
) -> dict[str, str]:
    """Each finished round again, its successors on what it now ends with: round -> digest."""
    finished = [run for run in touched if run.digest is not None]
    advance = progress.track("rounds replayed", len(finished))
    instead: dict[str, str] = {}  # digest then -> digest without the rows
    replayed: dict[str, str] = {}
    for done, run in enumerate(finished, start=1):
        parent = instead.get(run.parent_digest, run.parent_digest)
        digest = _without(service, run, parent, places.get(run.run_id, ()))
        instead[str(run.digest)] = replayed[run.run_id] = digest
        advance(done)
    return replayed


def _without(service: Service, old: Run, parent: str, positions: tuple[int, ...]) -> str:
    """Journal, weights and ledger of one round without some of its rows; its digest."""
    journal = service.journal
    run = _opened(service, old, parent, positions)
    if run.digest is not None:
        return run.digest
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
    # Each generation is committed as it is made: a replay that is interrupted goes on behind them.
    chosen = journal.chosen(old.run_id)
    last = chosen.generations if chosen else None
    for step, rewards in list(again)[len(done) : last]:
        applied = parameters.apply(step)
        predicted = predicted.after(step, anchor.parameters)
        drift = measure(step, applied, rewards, predicted)
        journal.commit(run.run_id, step, rewards, applied.delta_hash, drift)
    if chosen and journal.chosen(run.run_id) is None:  # the same point of the other steps
        end = journal.generations(run.run_id)[-1]
        scaled = end if chosen.t == 1.0 else parameters.apply(scaling(end.step, chosen.t))
        journal.choose(run.run_id, replace(chosen, delta_hash=scaled.delta_hash))
    digest = export(parameters, service.home.weights).name
    why = f"round {old.run_id} without {len(positions)} of its rows"
    journal.finish(run.run_id, digest, why, time.time())
    if service.ledger.state(digest) is None:
        service.record(digest, "PROPOSED", why)
    return digest


def _opened(service: Service, old: Run, parent: str, positions: tuple[int, ...]) -> Run:
    """The replay's own round, or the one of an earlier call, interrupted or finished."""
    plan = {**old.plan, "replayed": old.run_id, "left_out": list(positions)}
    for run in service.journal.runs():
        if run.plan == plan and run.parent_digest == parent:
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
    before = service.journal.kept(run.parent_run) if run.parent_run else []
    return float(before[-1].drift["norm"]) if before else 0.0
