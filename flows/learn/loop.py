"""A turn of the loop: learn a candidate, weigh it, act on the verdict; one round at a time."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from agent.home import locked
from flows.learn.improve import Round, run_round, unweighed
from flows.learn.plan import chosen
from flows.serve import promote
from flows.service import Service
from flows.session import Session

Step = Callable[[], dict[str, Any]]


def learn(session: Session, target: str, changes: Mapping[str, Any] | None = None) -> Round:
    """The learning part of a round: a candidate, proposed in the ledger.

    A round of the same target and settings that ended and was never judged is returned instead.
    """
    service = session.service
    service.target(target)
    chosen(service.settings.learner, changes)  # bad settings are refused before an engine starts
    with alone(service):
        waiting = unweighed(service, target, changes)
        if waiting is not None:
            session.progress.say(f"round {waiting.run_id}: is finished, its verdict is missing")
            return waiting
        return run_round(service, session.population, target, session.progress, changes)


def conclude(
    session: Session, digest: str, weighed: Step, promoted: Step
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weigh a candidate and, where it passed, promote it: its report, and what became of it.

    If this process ends in between, ``flows.serve.reconcile`` carries out what is left.
    """
    with promote.concluding(session.service):
        report = weighed()
        outcome: dict[str, Any] = {"state": report["verdict"]}
        if promote.act(session, digest):
            outcome = promoted()
    return report, outcome


@contextmanager
def alone(service: Service) -> Iterator[None]:
    """Hold the home's lock on learning: two rounds at once would begin from the same champion.

    The system frees it when its holder dies.

    Raises:
        UserError: Another process holds it.
    """
    taken = (
        f"home {str(service.home.root)!r}: another process is running a round; "
        "allowed: one at a time"
    )
    with locked(service.home.round_lock, taken=taken, wait_s=0):
        yield
