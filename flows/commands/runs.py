"""Commands on the loop and its versions: as Prefect flows where the stack is up, else directly.

Each imports what it needs: a rollback does not import what a round is learnt with."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agent.home import Home
from agent.store.replay import replay
from agent.store.weights import Anchor, export
from flows.serve.stack import connected
from flows.service import Service
from flows.session import Session, session
from flows.show.catch_up import showing
from flows.show.terminal import Reporter


@contextmanager
def _opened(home: Path | None, progress: Reporter) -> Iterator[tuple[Session, bool]]:
    """The home's session and whether its stack is up; what is written is shown in MLflow."""
    place = Home.at(home)
    with (
        connected(place) as is_up,
        session(place.root, progress) as opened,
        showing(opened.service, progress, is_up),
    ):
        yield opened, is_up


def improve_now(
    home: Path | None, target: str | None, changes: Mapping[str, Any], progress: Reporter
) -> dict[str, Any]:
    """Learn one round, or resume an interrupted one, and weigh its candidate; serve nothing.

    Returns:
        The report with the candidate's state, and what is next in words.
    """
    from flows.learn.loop import learn, refuse_second
    from flows.learn.plan import chosen
    from flows.learn.weigh import weigh
    from flows.serve.outlook import next_step
    from flows.serve.promote import act

    with _opened(home, progress) as (opened, is_up):
        name, root = opened.service.target(target).name, str(opened.service.home.root)
        # Refused here, before Prefect shows a run that failed.
        chosen(opened.service.settings.learner, changes)
        refuse_second(opened.service)
        if is_up:
            from flows.deployments import run_flow

            made = run_flow("improve", root, name, dict(changes))
            report: dict[str, Any] = run_flow("evaluate", root, made["round"])
        else:
            report = weigh(opened, learn(opened, name, changes).run_id).report.to_json()
        act(opened, report["digest"])
        state = str(opened.service.ledger.state(report["digest"]))
        step = state if report["verdict"] != "unchanged" else "unchanged"
        steps = next_step(report["digest"], step, "; ".join(report["reasons"]))
        return report | {"state": state, "next": steps}


def plan_now(
    home: Path | None, target: str | None, changes: Mapping[str, Any], progress: Reporter
) -> dict[str, Any]:
    """What a round would cost and what its gate could decide; measured, nothing is written."""
    from flows.learn.forecast import forecast, measure_rates
    from flows.learn.plan import chosen

    with session(Home.at(home).root, progress) as opened:
        service = opened.service
        name = service.target(target).name
        learner = chosen(service.settings.learner, changes)
        rates = measure_rates(service, opened.population, name, learner, progress)
        budget = {"budget_minutes": learner.budget_minutes}
        return forecast(service, name, learner, rates).to_json() | budget


def weigh_now(home: Path | None, digests: Sequence[str], progress: Reporter) -> dict[str, str]:
    """Weigh candidates that are proposed and not judged, such as replays: digest -> its state."""
    from flows.learn.weigh import weigh
    from flows.serve.promote import act

    states: dict[str, str] = {}
    with _opened(home, progress) as (opened, _):
        ledger = opened.service.ledger
        for digest in digests:
            if ledger.state(digest) == "PROPOSED":
                weigh(opened, opened.service.journal.candidate(digest).run_id)
                act(opened, digest)
            states[digest] = str(ledger.state(digest))
    return states


def promote_now(home: Path | None, digest: str, progress: Reporter) -> dict[str, Any]:
    """Serve a digest."""
    from flows.serve import promote

    with _opened(home, progress) as (opened, _):
        return promote.promote(opened, opened.service.find(digest), "by hand").to_json()


def rollback_now(home: Path | None, digest: str, reason: str, progress: Reporter) -> dict[str, Any]:
    """Serve an earlier digest again."""
    from flows.serve import swaps

    with _opened(home, progress) as (opened, _):
        return swaps.rollback(opened, opened.service.find(digest), reason).to_json()


def move_anchor_now(
    home: Path | None, digest: str, reason: str, progress: Reporter
) -> dict[str, Any]:
    """Tie later rounds to the champion."""
    from flows.serve import promote

    with _opened(home, progress) as (opened, _):
        return promote.move_anchor(opened, opened.service.find(digest), reason).to_json()


def review_now(
    home: Path | None,
    digest: str,
    word: str,
    reason: str,
    progress: Reporter,
    who: str | None = None,
) -> dict[str, Any]:
    """Approve or reject a waiting digest, as ``who`` (None: the user of this machine)."""
    from flows.serve import promote

    with _opened(home, progress) as (opened, _):
        chosen = opened.service.find(digest)
        return promote.review(opened, chosen, word, reason, who or opened.service.actor).to_json()


def waiting_now(home: Path | None) -> list[dict[str, Any]]:
    """Candidates that wait for a person: digest, state, gain on the target, what to do."""
    from flows.serve.outlook import waiting

    return waiting(Service.at(home))


def replay_now(home: Path | None, candidate: str, snapshots: bool) -> dict[str, Any]:
    """Rebuild a candidate from the anchor, or from the newest sound snapshot.

    Raises:
        UserError: The first row of the journal that does not lead where it says.
    """
    service = Service.at(home)
    began = time.monotonic()
    name = _name(service, candidate)
    folder = service.home.snapshots if snapshots else None
    parameters = replay(
        service.journal, _anchor(service, name), name, folder, importance=service.home.importance
    )
    return {
        "candidate": name,
        "digest": parameters.digest(),
        "delta_hash": parameters.delta_hash(),
        "seconds": round(time.monotonic() - began, 3),
    }


def export_now(home: Path | None, candidate: str, into: Path) -> dict[str, Any]:
    """Replay a candidate and write it as a Hugging Face directory under ``into``."""
    service = Service.at(home)
    name = _name(service, candidate)
    parameters = replay(
        service.journal, _anchor(service, name), name, importance=service.home.importance
    )
    directory = export(parameters, into)
    directory.chmod(0o755)  # a person's to move or delete
    return {"digest": directory.name, "directory": str(directory)}


def _name(service: Service, candidate: str) -> str:
    """A round's id as it is, else the digest its beginning means."""
    known = {run.run_id for run in service.journal.runs()}
    return candidate if candidate in known else service.find(candidate)


def _anchor(service: Service, name: str) -> Anchor:
    """What a round's id or a digest was tied to when it was made."""
    if name in {run.run_id for run in service.journal.runs()}:
        return service.open_anchor(service.journal.run(name).anchor_digest)
    made_here = name != service.origin.digest
    made = service.journal.candidate(name).anchor_digest if made_here else name
    return service.open_anchor(made)
