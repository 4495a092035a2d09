"""A turn of the loop: learn a candidate, weigh it, act on the verdict; one round at a time.

``decide`` and ``refusal`` say which of Prefect's scheduled runs are started, skipped or refused;
its server is asked what is due and never believed what to run.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from agent.errors import UserError
from agent.home import is_locked, locked
from agent.store.database import ROUND_LEASE
from agent.store.ledger import REFUSED
from flows.learn.improve import Round, run_round, unweighed
from flows.learn.plan import chosen
from flows.serve import promote
from flows.service import Service
from flows.session import Session

LEARNING = ("loop", "improve")  # of these one runs at a time in a home


@dataclass(frozen=True)
class Due:
    """A run whose time has come; ``planned``: by the schedule, not asked for by a person."""

    run_id: UUID
    name: str
    planned: bool
    at: datetime

    @classmethod
    def of(cls, name: str, run: Any) -> "Due":
        """From a run as Prefect's server returned it."""
        return cls(run.id, name, run.auto_scheduled, run.next_scheduled_start_time)


def decide(due: Sequence[Due], running: Sequence[str], learning: bool) -> dict[UUID, str]:
    """Run -> "" to start it now, or why it is skipped; a run that is left out waits.

    Of planned runs that are late (the service was down) the newest one is started for all. One
    that is due while its flow, or a round, is running is skipped; what a person asked for waits.

    Args:
        due: Runs that are due, of all flows.
        running: Names of the flows that run now.
        learning: Whether a round runs in this home, in whatever process.
    """
    decided: dict[UUID, str] = {}
    busy = set(running) | (set(LEARNING) if learning else set())
    for each in sorted(due, key=lambda one: one.at):
        if each.planned and any(o.planned and _later(o, each) for o in due):
            decided[each.run_id] = "skipped: a later run that is due as well catches up for it"
        elif each.name not in busy:
            decided[each.run_id] = ""
            busy |= set(LEARNING) if each.name in LEARNING else {each.name}
        elif each.planned:
            what = "a round" if each.name in LEARNING else each.name
            decided[each.run_id] = f"skipped: {what} is running"
    return decided


def _later(other: Due, each: Due) -> bool:
    return other.name == each.name and (other.at, str(other.run_id)) > (each.at, str(each.run_id))


class RowTrigger:
    """Whether enough new verified rows came for a round (``projection.loop_rows``; 0: never).

    Args:
        wanted: Rows after which a round starts.
        count: The verified rows that came since the last round was opened.
    """

    def __init__(self, wanted: int, count: Callable[[], int]) -> None:
        self._wanted, self._count, self._asked = wanted, count, 0

    def due(self) -> bool:
        """Whether to ask for a round now; not again for the same rows, also if it failed."""
        new = self._count() if self._wanted else 0
        if new < self._asked:  # a round was opened: its rows are not new any more
            self._asked = 0
        return bool(self._wanted) and new - self._asked >= self._wanted

    def asked(self) -> None:
        """A round was asked for."""
        self._asked = self._count()


def registered(name: str, home: str) -> dict[str, Any]:
    """What this installation registers of a deployment, as far as it says what runs and where."""
    return {
        "entrypoint": f"flows/deployments.py:{name}_flow",
        "parameters": {"home": home},
        "path": None,
        "pull_steps": None,
        "job_variables": {},
        "work_pool_name": None,
        "work_queue_name": None,
        "storage_document_id": None,
        "infrastructure_document_id": None,
    }


def refusal(name: str, home: str, deployment: Any, run: Any = None) -> str | None:
    """How a deployment, or a run of it, differs from what was registered; None when it does not.

    Args:
        name: The flow's name.
        home: The folder of this installation.
        deployment: As Prefect's server returned it.
        run: A run of it, as the server returned it.
    """
    for field, wanted in registered(name, home).items():
        value = getattr(deployment, field)
        if (value or None) != (wanted or None):
            return f"the deployment's {field} is {value!r}, registered: {wanted!r}"
    if run is None:
        return None
    for field in ("job_variables", "infrastructure_document_id", "work_pool_name"):
        if value := getattr(run, field, None):
            return f"the run's {field} is {value!r}, registered: none"
    if run.flow_id != deployment.flow_id:
        return f"the run's flow is {run.flow_id}, registered: {deployment.flow_id}"
    if run.parameters.get("home") != home:
        return f"the run's home is {run.parameters.get('home')!r}, registered: {home!r}"
    return None


def refuse_foreign(name: str, home: str, deployment: Any) -> None:
    """Refuse to replace a deployment that is not of this home, on a server that others use, too.

    Raises:
        UserError: It is of another home, or of none.
    """
    if (other := deployment.parameters.get("home")) != home:
        raise UserError(
            f"deployment {name} is of home {other!r}, this one is {home!r}; allowed: another "
            "model.name, or delete the deployment in Prefect"
        )


def note_refusals(service: Service) -> Callable[[str, str], None]:
    """A function of a flow's name and a reason that remarks in the ledger: a run was refused.

    The row is about the champion. The same reason again in a row makes no second one.
    """

    def note(name: str, why: str) -> None:
        text = f"a run of {name} from Prefect: {why}"
        newest = service.ledger.history(1)
        if not (newest and newest[0].state == REFUSED and newest[0].why == text):
            service.record(service.champion(), REFUSED, text)

    return note


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

    The system frees it when its holder dies. A database server's lock on learning is held as well:
    homes of several machines may use one. Whoever learns waits for the server as long as it takes.

    Raises:
        UserError: Another process holds it.
    """
    taken = _taken(service)
    with (
        locked(service.home.round_lock, taken=taken, wait_s=0),
        service.patient(),
        service.journal.database.lease(ROUND_LEASE, taken),
    ):
        yield


def refuse_second(service: Service) -> None:
    """Refuse a round while another one runs.

    Raises:
        UserError: One does.
    """
    if is_locked(service.home.round_lock):
        raise UserError(_taken(service))


def _taken(service: Service) -> str:
    return (
        f"home {str(service.home.root)!r}: another process is running a round; "
        "allowed: one at a time (`anchorage status` shows it)"
    )
