"""A turn of the loop: learn a candidate, weigh it, and act on the verdict. One round at a time."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agent.home import locked, write_atomically
from flows.learn.curve import points_of
from flows.learn.improve import Round, run_round, unweighed
from flows.learn.plan import chosen
from flows.learn.weigh import Judged, judge
from flows.serve import promote
from flows.service import Service
from flows.session import Session
from flows.show import catch_up, mlflow

Step = Callable[[], dict[str, Any]]


def learn(session: Session, target: str, changes: Mapping[str, Any] | None = None) -> Round:
    """The round alone: a candidate, proposed in the ledger; one that was not judged comes first."""
    service = session.service
    service.target(target)
    chosen(service.settings.learner, changes)  # no engine starts for a round that cannot be
    with alone(service):
        waiting = unweighed(service, target, changes)
        if waiting is not None:
            session.progress.say(f"round {waiting.run_id}: has learnt already, is to be judged")
            return waiting
        return run_round(service, session.population, target, session.progress, changes)


def weigh(session: Session, run_id: str, *, serve: bool = False) -> Judged:
    """Evaluation and gate of a finished round, kept as its report and shown in MLflow.

    ``serve``: what passes is served next, by the caller or, if it dies, by whoever watches.
    """
    service = session.service
    curve = points_of(service, run_id)
    judged = judge(service, session.population, run_id, session.progress, curve, serve=serve)
    write_atomically(report_path(service, run_id), json.dumps(judged.report.to_json()))
    catch_up.keep(service, judged.report, judged.tables)
    mlflow.attempt(f"round {run_id}", lambda: catch_up.show_run(service, run_id))
    return judged


def conclude(
    session: Session, digest: str, weighed: Step, promoted: Step
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The report of a candidate and what became of it: weighed, and promoted where it passed.

    One that is killed in between is finished by the next look (``flows.serve.reconcile``).
    """
    with promote.concluding(session.service):
        report = weighed()
        outcome: dict[str, Any] = {"state": report["verdict"]}
        if promote.act(session, digest):
            outcome = promoted()
    return report, outcome


def report_path(service: Service, run_id: str) -> Path:
    """Where the report of a judged round is kept."""
    return service.home.run(run_id) / "report.json"


@contextmanager
def alone(service: Service) -> Iterator[None]:
    """Hold the home's lock on learning, which the system frees when its holder dies.

    Raises:
        UserError: Another process holds it.
    """
    taken = (
        f"home {str(service.home.root)!r}: another process is running a round; "
        "allowed: one at a time"
    )
    with locked(service.home.round_lock, taken=taken, wait_s=0):
        yield
