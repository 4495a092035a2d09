"""Baking: a new version under live traffic is kept, or rolled back without a person."""

import math
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from agent.gateway.keys import LOCAL
from agent.sections import BakingSettings
from agent.store.experience import Earned, VersionTraffic
from agent.store.ledger import Entry
from evaluators.live import FEW, LiveAnswer, Traffic, Watch, watches
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


@dataclass(frozen=True)
class Records:
    """What a version earned and answered, with the principals who asked."""

    earned: Sequence[Earned]
    answered: Sequence[VersionTraffic]

    def traffic(self, without: Collection[str] = ()) -> Traffic:
        """Rewards in the order of their inference ids, which are random; answers by their time."""
        rewards: dict[str, list[float]] = defaultdict(list)
        for each in self.earned:
            if each.principal not in without:
                rewards[each.task].append(min(1.0, max(0.0, each.reward)))
        answers = [
            LiveAnswer(each.created, each.status == "error", each.latency_s)
            for each in self.answered
            if each.principal not in without
        ]
        return Traffic(rewards, answers)

    def rewards_of(self) -> Counter[str]:
        """How many rewards each principal's requests have."""
        return Counter(each.principal for each in self.earned)


def watch(service: Service, begun: Entry) -> Seen:
    """Compare since the row that let a version answer; the window of the other ends there."""
    baking = service.settings.baking
    new, old = records_of(service, begun)
    watched = _watches(new, old, baking)
    worse = [
        (each, _rests_on(new, old, baking, place))
        for place, each in enumerate(watched)
        if each.worse(baking.alpha)
    ]
    count = len(new.earned)
    figures: dict[str, Any] = {"digest": begun.digest, "rewards": count, "before": len(old.earned)}
    figures |= {each.name: asdict(each) for each in watched}
    waited_s = time.time() - begun.time
    enough, late = _counted(new, old, baking) >= baking.rows, waited_s >= 60 * baking.minutes
    tests = [each.text() for each in watched if each.log_e is not None]
    tests += [f"{each.name} is worse for {few} principals alone" for each, few in worse if few]
    why = f"not worse on {count} rewards in {waited_s:.0f} s{': ' if tests else ''}"
    why += "; ".join(tests)
    text = "; ".join(each.text() for each, few in worse if not few)
    return Seen(figures, text, enough, late, watched[0].n, why)


def _watches(
    new: Records, old: Records, baking: BakingSettings, without: Collection[str] = ()
) -> list[Watch]:
    return watches(
        new.traffic(without),
        old.traffic(without),
        rows=baking.rows,
        error_margin=baking.error_margin,
        latency_factor=baking.latency_factor,
    )


def _rests_on(new: Records, old: Records, baking: BakingSettings, place: int) -> int:
    """How many principals a watch's evidence rests on; 0 where the others show it as well.

    Clients choose what they ask, and give the gold answers they are judged by: one that means harm
    could have every new version rolled back. So the tenth of the principals (at least one of two)
    that speaks most against a version is left out, and the rest has to show the same. Where the
    rest has fewer than ``FEW`` rewards or answers it can show nothing, and all of them count.
    """
    against = _against(new, old)[place]
    asked = {each.principal for each in new.earned} | {each.principal for each in new.answered}
    tenth = math.ceil(len(asked) / 10) if len(asked) > 1 else 0
    first = sorted(asked, key=lambda name: (-against.get(name, 0.0), name))[:tenth]
    rest = new.traffic(first)
    if not first or (rest.count if place == 0 else len(rest.answers)) < FEW:
        return 0
    return 0 if _watches(new, old, baking, first)[place].worse(baking.alpha) else tenth


def _against(new: Records, old: Records) -> list[Mapping[str, float]]:
    """For reward, errors and latency: how much each principal's traffic speaks against a version.

    Rewards that are missing to the old mean of their task; failed answers; seconds waited.
    """
    means = {task: float(np.mean(rewards)) for task, rewards in old.traffic().rewards.items()}
    missing, failed, waited = (defaultdict[str, float](float) for _ in range(3))
    for each in new.earned:
        missing[each.principal] += means.get(each.task, each.reward) - each.reward
    for answer in new.answered:
        failed[answer.principal] += answer.status == "error"
        waited[answer.principal] += answer.latency_s
    return [missing, failed, waited]


def _counted(new: Records, old: Records, baking: BakingSettings) -> int:
    """Rewards that count for ``baking.rows``: of one principal at most half, if there are more."""
    counts = new.rewards_of()
    several = len({*counts, *old.rewards_of()} - {LOCAL.owner}) > 1
    most = max(1, baking.rows // 2) if several else baking.rows
    return sum(min(each, most) for each in counts.values())


def settle_for(session: Session, digest: str) -> None:
    """End the champion's baking on the traffic so far, because ``digest`` is served next."""
    entry = session.service.ledger.unsettled()
    if entry is not None and entry.digest != digest and entry.state in ("SWAPPED", "BAKING"):
        bake(session, end=True)


def records_of(service: Service, begun: Entry) -> tuple[Records, Records]:
    """Traffic of a version since its swap or trial, and the newest of the one before until then."""
    store, window = service.experience, service.settings.baking.window
    this, since = begun.digest, begun.time
    before: dict[str, Any] = {"version": str(begun.before), "until": since, "newest": window}
    new = Records(store.earned(this, since), store.answered(this, since))
    return new, Records(store.earned(**before), store.answered(**before))


def _back(session: Session, entry: Entry, why: str) -> str:
    """Roll back to the version before; the state of the one that was rolled back."""
    service = session.service
    rollback(session, service.ledger.previous() or service.anchor.digest, why)
    return str(service.ledger.state(entry.digest))
