"""What is served, changed: the swap with its ledger rows, and the way back.

The swap's lease (deploy.serving.lease) keeps every other controller away; the epoch that a
controller takes under it keeps away the one that was stopped, taken for dead, and woken.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from agent.errors import UserError
from agent.store.weights import short
from deploy.serving.control import ControlError
from deploy.serving.controller import Event, Way, change
from deploy.serving.engines import is_up
from deploy.serving.lease import Leases
from deploy.serving.served import Served, read_served
from flows import projection
from flows.probing import ensure_probes
from flows.service import Service
from flows.session import Session

Told = Callable[[Event, str, str, int], None]  # event, digest, why, the controller's epoch


@dataclass(frozen=True)
class Outcome:
    """What is served after an act, and why it is not what was asked where it is not."""

    asked: str
    served: str
    state: str
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def swap(
    session: Session, digest: str, told: Told, why: str, strategy: Way | None = None
) -> Outcome:
    """Serve a digest; ``told`` writes the ledger under the epoch taken when the intent is due.

    The strategy is the settings' unless one is given.

    Raises:
        UserError: Nothing was touched, and why.
        ControlError, LeaseLostError: The watchdog finishes what was begun.
    """
    service = session.service
    epoch: list[int] = []
    strategy = strategy or service.settings.engines.swap
    if strategy != "cold" and is_up(service.home):
        ensure_probes(session, digest)

    def record(event: Event, of: str, reason: str) -> None:
        if event == "SWAP_INTENT":
            epoch.append(service.take_over())
        told(event, of, reason or why, epoch[0])

    try:
        done = change(
            service.home,
            digest,
            service.directory(digest),
            anchor=service.origin,
            record=record,
            why=why,
            strategy=strategy,
            lease_s=service.settings.engines.swap_deadline_s,
        )
    except ControlError as error:
        if epoch:
            raise
        raise UserError(f"digest {short(digest)}: nothing was changed: {error}") from error
    state = "SWAPPED" if done.swapped else "ROLLED_BACK"
    return Outcome(digest, done.served.digest, state, done.reason)


def swap_surely(session: Session, digest: str, told: Told, why: str) -> Outcome:
    """Serve a digest as set, else by a cold start, which needs no engine alive."""
    try:
        outcome = swap(session, digest, told, why)
    except (UserError, ControlError) as error:
        outcome = Outcome(digest, "", "ROLLED_BACK", str(error))
    if outcome.served == digest:
        return outcome
    return swap(session, digest, told, f"{why} (by a cold start: {outcome.reason})", "cold")


def rollback(session: Session, digest: str, reason: str, *, show: bool = True) -> Outcome:
    """Serve an earlier version again, in place or, where no engine works, by a cold start.

    Without ``show`` MLflow's aliases are left to whoever watches.

    Raises:
        UserError: The digest is served already, was never served, or its weights are not kept.
    """
    service = session.service
    finish(session)
    champion = service.champion()
    if digest == champion:
        raise UserError(f"digest {short(digest)} is the champion; allowed: another one")

    def told(event: Event, _of: str, _reason: str, epoch: int) -> None:
        if event == "SWAP_INTENT":  # durable before anything moves: reconcile finishes it
            service.record(champion, "ROLLED_BACK", reason, epoch=epoch, after=digest)

    outcome = swap_surely(session, digest, told, reason)
    if show:
        projection.attempt("aliases", lambda: projection.show_aliases(service))
    return outcome


def serve_champion(session: Session) -> None:
    """Make the engine serve what the ledger says, whatever it serves now."""
    champion = session.service.champion()
    swap_surely(session, champion, lambda *_: None, "as the ledger says")


def swap_under_way(service: Service) -> bool:
    """Whether a controller, or the watchdog after it, is changing weights."""
    return Leases(service.home).current() is not None


def finish(session: Session) -> str | None:
    """Close the intent of a controller that died, as it turned out; what was done, if anything.

    Raises:
        UserError: A swap is under way.
    """
    service = session.service
    intent = service.ledger.open_intent()
    if intent is None:
        return None
    with _alone(service):
        epoch, still = service.take_over(), service.ledger.open_intent()
        if still is None or still.digest != intent.digest:
            return None
        why = f"swap to {short(intent.digest)} was not finished"
        served = _served(service).digest == intent.digest
        state, end = ("SWAPPED", "it") if served else ("ROLLED_BACK", "the version before it")
        service.record(intent.digest, state, f"{why}; {end} is served", epoch=epoch)
    return why


@contextmanager
def _alone(service: Service) -> Iterator[None]:
    """The swap's lease for a moment, with nothing swapped: nobody else writes as a controller."""
    leases, served = Leases(service.home), _served(service)
    lease_s = service.settings.engines.swap_deadline_s
    lease = leases.begin(served, served, lease_s=lease_s, now=time.time())
    try:
        yield
    finally:
        leases.end(lease)


def _served(service: Service) -> Served:
    """What every start serves; the anchor in a home that never served."""
    try:
        return read_served(service.home)
    except UserError:
        return Served(service.origin.digest, str(service.origin.directory))
