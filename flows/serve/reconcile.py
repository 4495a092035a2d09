"""Reconciliation: what is served, and what people did in MLflow, against the ledger.

The ledger is always right. A person may do two things in MLflow's UI, and this is the one place
that reads them: move the champion alias to a version that passed (or to the anchor), and tag a
waiting version approve or reject. Both become ledger rows with the name of the user who signed in;
any other move of the alias or value of the tag, and what nobody signed, is put back, with a note on
the version. What
MLflow lacks is shown by `flows.show.catch_up`.

``poll`` is what the flows' process does every ``projection.reconcile_seconds``.
"""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from agent.review import REVIEW
from agent.store.ledger import STALLED
from agent.store.weights import short
from deploy.consoles import signer
from deploy.serving.control import observe
from deploy.serving.starts import failing
from flows.serve import promote, swaps
from flows.serve.bake import bake
from flows.serve.trial import judge_trial
from flows.service import Service
from flows.session import Session
from flows.show import mlflow
from flows.show.catch_up import put_back, refuse_review

LOG = logging.getLogger("anchorage.reconcile")
MLFLOW_S = 15.0  # longest wait for MLflow in one look; what it did not say is read next time

Kind = Literal["served", "moved", "review", "unclear", "unfinished", "approved", "left"]
DECIDED = {"approve": "APPROVED", "reject": "REJECT"}  # review -> the state it leads to


@dataclass(frozen=True)
class Disagreement:
    """One thing that is not as the ledger says."""

    kind: Kind
    digest: str  # that it is about
    text: str
    word: str = ""  # of a review: approve or reject
    version: str = ""  # number of a version in MLflow


def poll(session: Session, settle: Callable[[], Any] | None = None) -> None:
    """Settle what disagrees, judge the version on trial or baking, do what MLflow's users did.

    MLflow comes last: one that hangs delays neither a repair nor a rollback.

    Args:
        session: The parts of the home.
        settle: Settles all disagreements; ``repair`` if None.
    """
    service = session.service

    def reconcile(look: Callable[[Service], list[Disagreement]]) -> None:
        if look(service):
            settle() if settle else repair(session)

    def judge_fresh() -> None:
        entry = service.ledger.unsettled()
        if entry is not None and entry.state == "CANARY":
            judge_trial(session, entry)
        elif entry is not None:
            bake(session)

    attempt("engines", lambda: remark_stalled(service))
    attempt("reconcile", lambda: reconcile(disagreements))
    attempt("baking", judge_fresh)
    attempt("MLflow", lambda: reconcile(wishes))


def attempt(duty: str, act: Callable[[], Any]) -> None:
    """The boundary of one duty: its failure is logged, and the next poll tries again."""
    try:
        act()
    except Exception as error:
        LOG.warning("%s: %s", duty, error)


def remark_stalled(service: Service) -> None:
    """One ledger row about the champion whose engine fails to start, until it has answered."""
    champion = service.champion()
    rows = service.ledger.of(champion)
    remarked = {row.statistics.get("since") for row in rows if row.state == STALLED}
    for slot, each in failing(service.home):
        if each.since not in remarked:
            why = f"{each.text(slot)}; `anchorage doctor` says what to do"
            service.record(champion, STALLED, why, statistics={"since": each.since})


def repair(session: Session) -> list[str]:
    """Settle every disagreement, the ledger's before MLflow's; what was done, a line each."""
    done = [_settle(session, each) for each in disagreements(session.service)]
    try:
        read = wishes(session.service)
    except Exception as error:  # MLflow is away or hangs: nothing of the ledger waits for it
        LOG.warning("MLflow was not read: %s", error)
        return done
    return done + [_settle(session, each) for each in read]


def disagreements(service: Service) -> list[Disagreement]:
    """What differs from the ledger in what is served, and verdicts that were not acted on."""
    return [*_unfinished(service), *_served(service), *_approved(service), *_left(service)]


def _unfinished(service: Service) -> Iterator[Disagreement]:
    """A swap whose controller died: its intent is open and nobody holds the swap's lease."""
    intent = service.ledger.open_intent()
    if intent is not None and not swaps.swap_under_way(service):
        text = f"swap to {short(intent.digest)} was not finished"
        yield Disagreement("unfinished", intent.digest, text)


def _served(service: Service) -> Iterator[Disagreement]:
    """A digest chosen, loaded or stamped that is not the champion, while nobody swaps.

    The champion is read before and after the engine: a swap that began or ended in between would
    look like a disagreement.
    """
    champion, intent = service.champion(), service.ledger.open_intent()
    others = observe(service.home).others(champion)
    still = service.champion() == champion and not swaps.swap_under_way(service)
    if others and intent is None and still:
        text = f"{', '.join(others)}: the champion is {short(champion)}"
        yield Disagreement("served", champion, text)


def _approved(service: Service) -> Iterator[Disagreement]:
    """An approval that was not carried out: its process ended, or another version was baking.

    Not before the swap deadline has passed: whoever approved may be about to promote.
    """
    if service.ledger.unsettled() is not None or swaps.swap_under_way(service):
        return
    grace_s = service.settings.engines.swap_deadline_s
    for digest, state in service.ledger.states().items():
        row = service.ledger.of(digest)[-1]
        if state == "APPROVED" and time.time() - row.time > grace_s:
            yield Disagreement("approved", digest, f"approved: {row.why}")


def _left(service: Service) -> Iterator[Disagreement]:
    """A verdict whose process ended before it asked for the review, or for the promotion.

    The ledger is read before the lock is tried: a verdict written under a lock that is free now
    was left by a process that ended.
    """
    owed = [each for each in service.ledger.states().items() if promote.is_owed(service, *each)]
    busy = service.ledger.unsettled() is not None or swaps.swap_under_way(service)
    if owed and not busy and not promote.somebody_concludes(service):
        for digest, state in owed:
            yield Disagreement("left", digest, f"{state} of {short(digest)} was not acted on")


def wishes(service: Service) -> list[Disagreement]:
    """What people did in MLflow and the ledger does not know yet, read within ``MLFLOW_S``.

    Raises:
        TimeoutError: MLflow did not answer in time. Other failures of MLflow are raised too.
    """
    read = mlflow.within(MLFLOW_S, lambda: mlflow.read_wishes(service))
    done, moved, states = list[Disagreement](), read.moved, service.ledger.states()
    if moved is not None and moved.digest != service.champion():
        name = short(moved.digest) or f"version {moved.number}"
        text = f"the champion alias was moved to {name}"
        done.append(Disagreement("moved", moved.digest, text, version=moved.number))
    for version in read.reviews:
        word, state = str(version.review), states.get(version.digest)
        tag = f"{word} by a tag on version {version.number} ({version.review_key})"
        if word not in DECIDED:
            text = f"{version.review_key} = {word[:40]!r}; allowed: {', '.join(DECIDED)}"
            done.append(Disagreement("unclear", version.digest, text, version=version.number))
        elif state == "AWAIT_REVIEW":
            done.append(Disagreement("review", version.digest, tag, word, version.number))
        elif DECIDED[word] not in {row.state for row in service.ledger.of(version.digest)}:
            text = f"{tag}: it is {state or 'unknown'}; only AWAIT_REVIEW is reviewed"
            done.append(Disagreement("unclear", version.digest, text, version=version.number))
    return done


def _settle(session: Session, disagreement: Disagreement) -> str:
    """Settle one disagreement; what was done."""
    if disagreement.kind == "unfinished":
        swaps.finish(session)
    elif disagreement.kind == "served":
        swaps.serve_champion(session)
    elif disagreement.kind == "unclear":
        service, number, note = session.service, disagreement.version, disagreement.text
        mlflow.within(MLFLOW_S, lambda: refuse_review(service, number, note))
    elif disagreement.kind in ("review", "moved"):
        return _answer_review(session, disagreement)
    elif promote.act(session, disagreement.digest):  # approved, or left
        promote.carry_out(session, disagreement.digest, disagreement.text)
    return disagreement.text


def _answer_review(session: Session, disagreement: Disagreement) -> str:
    """Do what a user who signed in to MLflow asked for, or put it back with a note.

    After a move the alias stands at the champion. While MLflow cannot be written the move stays
    unanswered, and the next poll answers it. A move signed before the champion last changed was
    answered by then: an alias that comes to stand there again was moved by nobody.
    """
    service, number, word = session.service, disagreement.version, disagreement.word
    moves = (row.time for row in service.ledger.history(1 << 30) if row.before != row.after)
    since = next(moves, 0.0) if disagreement.kind == "moved" else 0.0
    who, note = None, ""
    if "mlflow" in service.settings.projection.consoles:  # another server does not say who did it
        who = signer(service.home, number, word or "champion", since=since)
    text = f"{disagreement.text} by {who or 'nobody who signed in'}"
    if who is None:
        note = f"{text}: put back"
    elif disagreement.kind == "review":
        promote.review(session, disagreement.digest, word, text, who)
        return text
    elif not promote.follow(session, disagreement.digest, text, who):
        state = service.ledger.state(disagreement.digest)
        waits = f"; it waits for the tag {REVIEW}" if state == "AWAIT_REVIEW" else ""
        note = f"{text}, which the gate did not pass: put back{waits}"
    answer = put_back if disagreement.kind == "moved" else refuse_review
    mlflow.within(MLFLOW_S, lambda: answer(service, number, note))
    return note or text
