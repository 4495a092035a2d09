"""A fresh promotion under live traffic: kept, or rolled back by itself."""

import time
from collections import defaultdict
from dataclasses import asdict
from typing import Any

from agent.store.experience import ExperienceStore
from agent.store.ledger import Entry
from evaluators.live import LiveAnswer, Traffic, Watch, watches
from flows.serve.swaps import rollback
from flows.service import Service
from flows.session import Session


def bake(session: Session, *, end: bool = False) -> dict[str, Any]:
    """Judge the version that bakes by its live traffic; what became of it.

    Evidence that it is worse rolls back; enough rewards, or enough time (or ``end``), settle it.
    It is judged under the epoch that was in force before the look: a verdict on what another
    controller has changed meanwhile is not written.
    """
    service, baking = session.service, session.service.settings.baking
    epoch, entry = service.ledger.epoch(), service.ledger.unsettled()
    if entry is None or entry.state not in ("SWAPPED", "BAKING"):
        return {"state": "nothing bakes"}
    swapped = [each for each in service.ledger.of(entry.digest) if each.state == "SWAPPED"][-1]
    new, old = traffic_of(service, swapped)
    seen = watches(
        new,
        old,
        rows=baking.rows,
        error_margin=baking.error_margin,
        latency_factor=baking.latency_factor,
    )
    told: dict[str, Any] = {"digest": entry.digest, "rewards": new.count, "before": old.count}
    told |= {each.name: asdict(each) for each in seen}
    worse = [each.text() for each in seen if each.worse(baking.alpha)]
    if worse:
        return told | {"state": _back(session, entry, f"worse in live traffic: {'; '.join(worse)}")}
    waited_s = time.time() - swapped.time
    if new.count < baking.rows and waited_s < 60 * baking.minutes and not end:
        return told | {"state": "BAKING", "wanted": baking.rows}
    why = _settled(seen, new, waited_s)
    service.record(entry.digest, "CHAMPION", why, statistics=told, epoch=epoch)
    return told | {"state": "CHAMPION"}


def settle_for(session: Session, digest: str) -> None:
    """End the baking of the champion, by what was seen so far, because ``digest`` comes next."""
    entry = session.service.ledger.unsettled()
    if entry is not None and entry.digest != digest and entry.state in ("SWAPPED", "BAKING"):
        bake(session, end=True)


def traffic_of(service: Service, swapped: Entry) -> tuple[Traffic, Traffic]:
    """What a version did since its swap, and the newest the version before it did until then."""
    store, window = service.experience, service.settings.baking.window
    new = _traffic(store, swapped.digest, since=swapped.time)
    old = _traffic(store, str(swapped.before), until=swapped.time, newest=window)
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
    service = session.service
    rollback(session, service.ledger.previous() or service.anchor.digest, why)
    return str(service.ledger.state(entry.digest))


def _settled(seen: list[Watch], new: Traffic, waited_s: float) -> str:
    told = "; ".join(each.text() for each in seen if each.log_e is not None)
    return f"not worse on {new.count} rewards in {waited_s:.0f} s{': ' if told else ''}{told}"
