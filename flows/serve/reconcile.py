"""Ledger, alias and served digest: made to agree, with the ledger always right.

The one thing a person may do in MLflow's UI is to move the champion alias to a version that passed
(or to the anchor), and to tag a waiting version approve or reject; both become ledger rows. Any
other move is put back and noted on the version.

What a service does by itself between flows: settle what disagrees, bake, catch up.
"""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from agent.registry import REVIEW
from agent.store.weights import short
from deploy.serving.control import observe
from flows.serve import promote, swaps
from flows.serve.bake import bake
from flows.service import Service
from flows.session import Session
from flows.show import mlflow
from flows.show.catch_up import catch_up

LOG = logging.getLogger("anchorage.upkeep")


def poll(session: Session, settle: Callable[[], Any] | None = None) -> None:
    """One look, after which all agree, as far as everything needed can be reached.

    Args:
        session: The home's parts.
        settle: How disagreements are settled; by default here.
    """
    service = session.service

    def reconcile() -> None:
        if disagreements(service):
            settle() if settle else repair(session)

    def judge_fresh() -> None:
        if service.ledger.unsettled() is not None:
            bake(session)

    _each("reconcile", reconcile)
    _each("baking", judge_fresh)
    _each("MLflow", lambda: catch_up(service))


def _each(what: str, act: Callable[[], Any]) -> None:
    """The boundary of one duty: what fails is tried again at the next look, the others go on."""
    try:
        act()
    except Exception as error:
        LOG.warning("%s: %s", what, error)


Kind = Literal["served", "alias", "moved", "review", "unfinished", "approved", "left"]


@dataclass(frozen=True)
class Disagreement:
    """One thing that is not as the ledger says."""

    kind: Kind
    digest: str  # the digest found instead
    text: str
    word: str = ""  # of a review
    version: str = ""  # number of a version in MLflow


def disagreements(service: Service) -> list[Disagreement]:
    """Everything that differs from the ledger now; MLflow being down hides only its own part."""
    found = [*_unfinished(service), *_served(service), *_approved(service), *_left(service)]
    mlflow.attempt("reading aliases", lambda: found.extend(_shown(service)))
    return found


def repair(session: Session) -> list[str]:
    """Settle every disagreement; what was done, a line each."""
    return [_settle(session, each) for each in disagreements(session.service)]


def _unfinished(service: Service) -> Iterator[Disagreement]:
    """A swap whose controller died: its intent is open and nobody holds the swap's lease."""
    intent = service.ledger.open_intent()
    if intent is not None and not swaps.swap_under_way(service):
        text = f"swap to {short(intent.digest)} was not finished"
        yield Disagreement("unfinished", intent.digest, text)


def _served(service: Service) -> Iterator[Disagreement]:
    """What is chosen, loaded or stamped, and is not the champion, while nobody swaps.

    Looked at in this order, a swap that begins or ends meanwhile is never taken for one.
    """
    champion, intent = service.champion(), service.ledger.open_intent()
    others = observe(service.home).others(champion)
    still = service.champion() == champion and not swaps.swap_under_way(service)
    if others and intent is None and still:
        text = f"{', '.join(others)}: the champion is {short(champion)}"
        yield Disagreement("served", champion, text)


def _approved(service: Service) -> Iterator[Disagreement]:
    """An approval that was not carried out, because its process ended or another version baked."""
    if service.ledger.unsettled() is not None or swaps.swap_under_way(service):
        return
    grace_s = service.settings.engines.swap_deadline_s  # whoever approved may be about to
    for digest, state in service.ledger.states().items():
        row = service.ledger.of(digest)[-1]
        if state == "APPROVED" and time.time() - row.time > grace_s:
            yield Disagreement("approved", digest, f"approved: {row.why}")


def _left(service: Service) -> Iterator[Disagreement]:
    """A verdict whose process ended before it asked for the review, or for the promotion.

    The ledger is read first: what is written under a lock that is free now was left behind.
    """
    owed = [each for each in service.ledger.states().items() if promote.is_owed(service, *each)]
    busy = service.ledger.unsettled() is not None or swaps.swap_under_way(service)
    if owed and not busy and not promote.somebody_concludes(service):
        for digest, state in owed:
            yield Disagreement("left", digest, f"{state} of {short(digest)} was not acted on")


def _shown(service: Service) -> Iterator[Disagreement]:
    """What MLflow shows: the champion alias, and tags of reviewers on waiting versions."""
    with mlflow.aliases_still(service):
        alias, ours = service.registry.aliases().get("champion"), mlflow.shown(service)
        champion = service.champion()
    if alias is None:
        yield Disagreement("alias", champion, "no champion alias")
    elif alias.digest != champion and alias.digest in ours:
        text = f"the champion alias lags at {short(alias.digest)}"
        yield Disagreement("alias", alias.digest, text)
    elif alias.digest != champion:
        name = short(alias.digest) or f"version {alias.number}"
        text = f"the champion alias was moved to {name}"
        yield Disagreement("moved", alias.digest, text, version=alias.number)
    states = service.ledger.states()
    for version in service.registry.versions():
        waits = states.get(version.digest) == "AWAIT_REVIEW"
        if waits and version.review in ("approve", "reject"):
            text = f"{version.review} by a tag on version {version.number} ({REVIEW})"
            yield Disagreement("review", version.digest, text, str(version.review))


def _settle(session: Session, found: Disagreement) -> str:
    """One repair; MLflow follows, as far as it can be reached."""
    service, told = session.service, found.text
    if found.kind == "unfinished":
        swaps.finish(session)
    elif found.kind == "served":
        swaps.serve_champion(session)
    elif found.kind == "review":
        promote.review(session, found.digest, found.word, found.text)
    elif found.kind in ("approved", "left") and promote.act(session, found.digest):
        promote.carry_out(session, found.digest, found.text)
    elif found.kind == "moved" and not promote.follow(session, found.digest, found.text):
        told = f"{found.text}, which the gate did not pass: put back"
        mlflow.attempt("note", lambda: service.registry.note(found.version, told))
    mlflow.attempt("aliases", lambda: mlflow.show_aliases(service))
    return told
