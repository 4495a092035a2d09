"""Which digest is served next: promotion, review, and the anchor's move; the ledger comes first.

Here it is decided and recorded; the swap itself is `flows.serve.swaps`.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress

from agent.errors import UserError
from agent.home import is_locked, locked
from agent.store.ledger import BEGINS
from agent.store.weights import short
from deploy.serving.controller import TRIALS, Event
from flows.serve.bake import settle_for
from flows.serve.swaps import ServeOutcome, finish, swap
from flows.service import Service
from flows.session import Session

PASSED = ("PASSED", "APPROVED")
SERVED = ("CHAMPION", "ANCHOR")


def may_serve(service: Service, digest: str) -> bool:
    """Whether the ledger lets a digest be swapped in: passed, approved, or served before."""
    if digest == service.champion():
        return False
    states = [entry.state for entry in service.ledger.of(digest)]
    now = service.ledger.state(digest)
    if now == "PASSED":
        return service.settings.review.mode == "auto"
    if now == "ROLLED_BACK":
        return any(state in (*PASSED, *SERVED) for state in states)
    return now in ("APPROVED", *SERVED)


def act(session: Session, digest: str) -> bool:
    """Act on a verdict: whether the digest is to be promoted now.

    With review mode `manual` a passed candidate, and one on hold, becomes AWAIT_REVIEW instead.
    """
    service = session.service
    state = service.ledger.state(digest)
    if state in ("PASSED", "HOLD") and service.settings.review.mode == "manual":
        service.record(digest, "AWAIT_REVIEW", "review mode is manual: a person decides")
        return False
    return may_serve(service, digest)


@contextmanager
def concluding(service: Service) -> Iterator[None]:
    """Held from before a loop's verdict until it is acted on; freed when its holder dies.

    By it reconcile tells a verdict that was left behind from one that is about to be acted on.
    """
    with locked(service.home.verdict_lock, taken="verdict: another loop concludes"):
        yield


def somebody_concludes(service: Service) -> bool:
    """Whether a living loop is between its verdict and the promotion or review that follows."""
    return is_locked(service.home.verdict_lock)


def is_owed(service: Service, digest: str, state: str) -> bool:
    """Whether the verdict on a digest was never acted on: a loop's promotion, or a review.

    Not for a candidate that was judged beside another champion than today's; a person may still
    serve it.
    """
    if state not in ("PASSED", "HOLD"):
        return False
    if service.settings.review.mode == "auto" and not (
        state == "PASSED" and service.ledger.of(digest)[-1].statistics.get("serve")
    ):
        return False
    return service.journal.candidate(digest).parent_digest == service.champion()


def promote(
    session: Session, digest: str, why: str = "passed the gate", only: Collection[str] = ()
) -> ServeOutcome:
    """Serve a digest by a verified swap, after which it bakes. What baked before is settled first.

    Where the settings want a trial first, that is begun (`flows.serve.trial` ends it).

    Args:
        session: The parts of the home.
        digest: What to serve.
        why: The reason, for the ledger.
        only: The states it is promoted from; empty: any that the ledger lets be served.

    Raises:
        UserError: The ledger does not let it be served, or nothing was touched and why.
    """
    service = session.service
    finish(session)
    seen = service.ledger.state(digest)
    if (only and seen not in only) or not may_serve(service, digest):
        raise UserError(_not_served(service, digest))
    settle_for(session, digest)

    def write(event: Event, of: str, reason: str, epoch: int) -> None:
        # The lease is held from before the first event on. Until then another controller may have
        # served this digest and a later one: it would be the older one that comes back.
        if event in BEGINS and (now := service.ledger.state(digest)) != seen:
            raise UserError(
                f"digest {short(digest)} was {seen} and is {now}: another controller acted "
                "meanwhile; nothing was changed"
            )
        service.record(of, event, reason, epoch=epoch)

    chosen = service.settings.engines.swap
    outcome = swap(session, digest, write, why, chosen if chosen in TRIALS else None)
    if outcome.served == digest:
        with suppress(UserError):  # another controller has settled it, or rolled it back, meanwhile
            service.record(digest, "BAKING", "live traffic is watched")
    return outcome


def _not_served(service: Service, digest: str) -> str:
    """Why a digest is not promoted, and what is allowed instead."""
    name, state = short(digest), service.ledger.state(digest) or "unknown"
    if digest == service.champion():
        return f"digest {name} is the champion and served already; allowed: another digest"
    if state == "AWAIT_REVIEW" or (state == "PASSED" and service.settings.review.mode == "manual"):
        return (
            f"digest {name} waits for review; allowed: `anchorage review approve {name} "
            "--reason ...`, which serves it"
        )
    return (
        f"digest {name} is {state}; allowed: a candidate that passed the gate or was approved, or "
        "a version served before"
    )


def review(session: Session, digest: str, word: str, why: str, who: str) -> ServeOutcome:
    """The review of exactly this digest by the person ``who``: approve or reject.

    Raises:
        UserError: The digest is not AWAIT_REVIEW, or the word is neither of the two.
    """
    service = session.service
    state = service.ledger.state(digest)
    if state != "AWAIT_REVIEW":
        raise UserError(f"digest {short(digest)} is {state or 'unknown'}; allowed: AWAIT_REVIEW")
    if word == "reject":
        service.record(digest, "REJECT", why, actor=who)
        return ServeOutcome(digest, service.champion(), "REJECT", why)
    if word != "approve":
        raise UserError(f"review {word!r}: allowed: approve, reject")
    service.record(digest, "APPROVED", why, actor=who)
    return carry_out(session, digest, f"approved: {why}")


def carry_out(session: Session, digest: str, why: str) -> ServeOutcome:
    """Promote a digest that passed or was approved.

    A swap that could not begin leaves its state as it is; reconcile tries again.

    Raises:
        UserError: It is neither passed nor approved any more.
    """
    service = session.service
    try:
        return promote(session, digest, why, PASSED)
    except UserError as error:
        state = service.ledger.state(digest)
        if state not in PASSED:
            raise
        reason = f"not promoted yet, tried again later: {error}"
        return ServeOutcome(digest, service.champion(), state, reason)


def follow(session: Session, digest: str, text: str, who: str) -> bool:
    """Carry out a person's move of the champion alias; False where the ledger forbids it.

    A version that waits for review and passed the gate is approved by it; one on hold is not.
    """
    service = session.service
    if service.ledger.state(digest) == "AWAIT_REVIEW":
        verdicts = [e.state for e in service.ledger.of(digest) if e.state in ("PASSED", "HOLD")]
        if verdicts[-1:] == ["PASSED"]:
            service.record(digest, "APPROVED", text, actor=who)
    if may_serve(service, digest):
        promote(session, digest, why=text)
        return True
    return False


def move_anchor(session: Session, digest: str, reason: str) -> ServeOutcome:
    """Tie later rounds to the champion instead of what it is tied to now: a person's act.

    What was learnt before stays replayable from its own anchor, and can be served again.

    Raises:
        UserError: The settings forbid it, or the digest is not a settled champion that is kept.
    """
    service = session.service
    if not service.settings.review.allow_anchor_move:
        raise UserError("review.allow_anchor_move is false; allowed: set it to true first")
    state, before = service.ledger.state(digest), service.anchor.digest
    if digest != service.champion() or state != "CHAMPION":
        raise UserError(
            f"digest {short(digest)} is {state or 'unknown'}; only the champion becomes the "
            f"anchor, once it has settled: {short(service.champion())}"
        )
    service.directory(digest)
    moved = {"anchor_before": before, "anchor_after": digest}
    service.record(digest, "ANCHOR", reason, statistics=moved)
    return ServeOutcome(digest, service.champion(), "ANCHOR", reason)
