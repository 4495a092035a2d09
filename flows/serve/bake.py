"""Baking: a new version under live traffic is kept, or rolled back without a person."""

import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

from agent.store.experience import ExperienceStore
from agent.store.ledger import Entry
from evaluators.live import LiveAnswer, Traffic, Watch, watches
from flows.serve.swaps import rollback
from flows.service import Service
from flows.session import Session


def bake(session: Session, *, end: bool = False) -> dict[str, Any]:
    """Judge the version that bakes by its live traffic; the figures, and its state now.

    Evidence that it is worse rolls it back. Otherwise it is CHAMPION once it has ``baking.rows``
    rewards, or after ``baking.minutes``, or at once with ``end``. The row is written under the
    epoch read before the traffic: a version that another controller has replaced meanwhile is not
    settled.
    """
    service, baking = session.service, session.service.settings.baking
    # Before the traffic is read: what another controller does from here on outdates the verdict.
    epoch, entry = service.ledger.epoch(), service.ledger.unsettled()
    if entry is None or entry.state not in ("SWAPPED", "BAKING"):
        return {"state": "nothing bakes"}
    swapped = [each for each in service.ledger.of(entry.digest) if each.state == "SWAPPED"][-1]
    seen = watch(service, swapped)
    if seen.worse:
        why = f"worse in live traffic: {seen.worse}"
        return seen.figures | {"state": _back(session, entry, why)}
    if not (seen.enough or seen.late or end):
        return seen.figures | {"state": "BAKING", "wanted": baking.rows}
    service.record(entry.digest, "CHAMPION", seen.why, statistics=seen.figures, epoch=epoch)
    return seen.figures | {"state": "CHAMPION"}


@dataclass(frozen=True)
class Seen:
    """A version's live traffic against that of the version before it.

    ``worse`` names the watches with evidence against it; ``enough``: it has ``baking.rows``
    rewards; ``late``: ``baking.minutes`` are over; ``pairs``: rewards compared so far.
    """

    figures: dict[str, Any]
    worse: str
    enough: bool
    late: bool
    pairs: int
    why: str  # it is kept, with the tests that had data


def watch(service: Service, begun: Entry) -> Seen:
    """Compare since the row that let a version answer; the window of the other ends there."""
    baking = service.settings.baking
    new, old = traffic_of(service, begun)
    watched = watches(
        new,
        old,
        rows=baking.rows,
        error_margin=baking.error_margin,
        latency_factor=baking.latency_factor,
    )
    figures: dict[str, Any] = {"digest": begun.digest, "rewards": new.count, "before": old.count}
    figures |= {each.name: asdict(each) for each in watched}
    worse = "; ".join(each.text() for each in watched if each.worse(baking.alpha))
    waited_s = time.time() - begun.time
    enough, late = new.count >= baking.rows, waited_s >= 60 * baking.minutes
    return Seen(figures, worse, enough, late, watched[0].n, _settled(watched, new, waited_s))


def settle_for(session: Session, digest: str) -> None:
    """End the champion's baking on the traffic so far, because ``digest`` is served next."""
    entry = session.service.ledger.unsettled()
    if entry is not None and entry.digest != digest and entry.state in ("SWAPPED", "BAKING"):
        bake(session, end=True)


def traffic_of(service: Service, begun: Entry) -> tuple[Traffic, Traffic]:
    """Traffic of a version since its swap or trial, and the newest of the one before until then."""
    store, window = service.experience, service.settings.baking.window
    new = _traffic(store, begun.digest, since=begun.time)
    old = _traffic(store, str(begun.before), until=begun.time, newest=window)
    return new, old


def _traffic(
    store: ExperienceStore,
    version: str,
    *,
    since: float = 0.0,
    until: float | None = None,
    newest: int | None = None,
) -> Traffic:
    """Rewards in the order of their inference ids, which are random; answers by their time."""
    rewards: dict[str, list[float]] = defaultdict(list)
    for earned in store.earned(version, since, until, newest):
        rewards[earned.task].append(min(1.0, max(0.0, earned.reward)))
    answers = [
        LiveAnswer(each.created, each.status == "error", each.latency_s)
        for each in store.answered(version, since, until, newest)
    ]
    return Traffic(rewards, answers)


def _back(session: Session, entry: Entry, why: str) -> str:
    """Roll back to the version before; the state of the one that was rolled back."""
    service = session.service
    rollback(session, service.ledger.previous() or service.anchor.digest, why)
    return str(service.ledger.state(entry.digest))


def _settled(watched: list[Watch], new: Traffic, waited_s: float) -> str:
    """Why a version is kept, with the tests that had data."""
    tests = "; ".join(each.text() for each in watched if each.log_e is not None)
    return f"not worse on {new.count} rewards in {waited_s:.0f} s{': ' if tests else ''}{tests}"
