"""What is served: promotion, baking, review, rollback. The ledger is written first, always.

A swap itself is `deploy.serving.controller.change`; here it is decided, recorded and shown.
"""

from dataclasses import asdict, dataclass
from typing import Any

from scipy.stats import mannwhitneyu

from agent.errors import UserError
from agent.store.states import Entry
from agent.store.weights import short
from deploy import stack
from deploy.serving.controller import Record, change
from deploy.serving.engines import SupervisedEngines
from deploy.serving.lease import Leases
from deploy.serving.served import Served, read_served, write_served
from flows import projection
from flows.probing import ensure_probes
from flows.service import Service
from flows.session import Session

PASSED = ("PROMOTE", "APPROVED")
SERVED = ("CHAMPION", "ANCHOR")


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


def may_serve(service: Service, digest: str) -> bool:
    """Whether the ledger lets a digest be swapped in: passed, approved, or served before."""
    if digest == service.champion():
        return False
    states = [entry.state for entry in service.ledger.of(digest)]
    now = states[-1] if states else None
    if now == "PROMOTE":
        return service.settings.review.mode == "auto"
    if now == "ROLLED_BACK":
        return any(state in (*PASSED, *SERVED) for state in states)
    return now in ("APPROVED", *SERVED)


def act(session: Session, digest: str) -> bool:
    """What a verdict asks for: True when the digest is to be promoted now.

    With review mode `manual` a passed candidate, and one on hold, waits for a person instead.
    """
    service = session.service
    state = service.ledger.state(digest)
    projection.attempt("aliases", lambda: projection.show_aliases(service, digest))
    if state in ("PROMOTE", "HOLD") and service.settings.review.mode == "manual":
        service.record(digest, "AWAIT_REVIEW", "review mode is manual: a person decides")
        return False
    return may_serve(service, digest)


def promote(session: Session, digest: str, why: str = "passed the gate") -> Outcome:
    """Serve a digest through the safe swap; then it bakes.

    Raises:
        UserError: The ledger does not let it be served, or nothing was touched and why.
    """
    service = session.service
    if not may_serve(service, digest):
        state = service.ledger.state(digest) or "unknown"
        raise UserError(
            f"digest {short(digest)} is {state}; only a candidate that passed the gate (or was "
            "approved, or served before) and is not the champion is promoted"
        )

    def record(event: str, of: str, reason: str) -> None:
        service.record(of, event, reason or why)

    outcome = _swap(session, digest, record, why)
    if outcome.served == digest:
        service.record(digest, "BAKING", "live rewards are watched")
    projection.attempt("aliases", lambda: projection.show_aliases(service))
    return outcome


def rollback(session: Session, digest: str, reason: str) -> Outcome:
    """Serve an earlier version again. A swap that fails is finished by a cold start.

    Raises:
        UserError: The digest is served already, was never served, or its weights are not kept.
    """
    service = session.service
    champion = service.champion()
    if digest == champion:
        raise UserError(f"digest {short(digest)} is the champion; allowed: another one")
    service.directory(digest)

    def record(event: str, _of: str, _reason: str) -> None:
        if event == "SWAP_INTENT":  # durable before anything moves: reconcile finishes it
            service.record(champion, "ROLLED_BACK", reason, after=digest)

    outcome = _swap(session, digest, record, reason)
    if outcome.served != digest:
        _cold_start(service, digest)
        outcome = Outcome(digest, digest, "ROLLED_BACK", f"by a cold start: {outcome.reason}")
    projection.attempt("aliases", lambda: projection.show_aliases(service))
    return outcome


def bake(session: Session) -> dict[str, Any]:
    """Judge the version that bakes by its live rewards; what became of it.

    H0: a reward of the new version is not smaller than one of the version before it
    (Mann-Whitney, one-sided). p < alpha rolls back; with enough rewards it is the champion.
    """
    service, baking = session.service, session.service.settings.baking
    entry = service.ledger.unsettled()
    if entry is None or entry.state not in ("SWAPPED", "BAKING"):
        return {"state": "nothing bakes"}
    new, old = _live_rewards(service, entry)
    told: dict[str, Any] = {"digest": entry.digest, "rewards": len(new), "before": len(old)}
    if new and old:
        told |= {"mean": sum(new) / len(new), "mean_before": sum(old) / len(old)}
        told["p_worse"] = float(mannwhitneyu(new, old, alternative="less").pvalue)
    if told.get("p_worse", 1.0) < baking.alpha:
        why = f"live reward fell: {told['mean_before']:.3f} -> {told['mean']:.3f}"
        back = service.ledger.previous() or service.anchor.digest
        rollback(session, back, f"{why}, p = {told['p_worse']:.3g}")
        return told | {"state": "ROLLED_BACK"}
    if len(new) < baking.rows:
        return told | {"state": "BAKING", "wanted": baking.rows}
    service.record(entry.digest, "CHAMPION", "live rewards hold", statistics=told)
    return told | {"state": "CHAMPION"}


def review(session: Session, digest: str, word: str, why: str) -> Outcome:
    """A person's word on exactly this digest.

    Raises:
        UserError: It does not wait for one, or the word is neither approve nor reject.
    """
    service = session.service
    state = service.ledger.state(digest)
    if state != "AWAIT_REVIEW":
        raise UserError(f"digest {short(digest)} is {state or 'unknown'}; nobody is asked about it")
    if word == "reject":
        service.record(digest, "REJECT", why)
        return Outcome(digest, service.champion(), "REJECT", why)
    if word != "approve":
        raise UserError(f"review {word!r}: allowed: approve, reject")
    service.record(digest, "APPROVED", why)
    return promote(session, digest, f"approved: {why}")


def recover(session: Session, digest: str, why: str) -> None:
    """Finish the ledger of a swap whose controller died, as it turned out."""
    service = session.service
    if read_served(service.home).digest == digest:
        service.record(digest, "SWAPPED", f"{why}; it is served")
        service.record(digest, "BAKING", "live rewards are watched")
    else:
        service.record(digest, "ROLLED_BACK", f"{why}; the version before it is served")


def serve_champion(session: Session) -> None:
    """Make the engine serve what the ledger says, whatever it serves now."""
    service = session.service
    champion = service.champion()
    outcome = _swap(session, champion, lambda _event, _digest, _why: None, "as the ledger says")
    if outcome.served != champion:
        _cold_start(service, champion)


def swap_under_way(service: Service) -> bool:
    """Whether a controller, or the watchdog after it, is changing weights."""
    return Leases(service.home).current() is not None


def _swap(session: Session, digest: str, record: Record, why: str) -> Outcome:
    """The swap on a running stack; a stopped one serves the digest from its next start."""
    service = session.service
    directory = service.directory(digest)
    if not stack.status(service.home)["services"]:
        record("SWAP_INTENT", digest, why)
        write_served(service.home, Served(digest, str(directory)))
        record("SWAPPED", digest, "the stack is down: served from its next start")
        return Outcome(digest, digest, "SWAPPED")
    ensure_probes(session, digest)
    done = change(
        service.home,
        digest,
        directory,
        anchor=service.anchor,
        record=record,
        why=why,
        strategy=service.settings.engines.swap,
        lease_s=service.settings.engines.swap_deadline_s,
    )
    state = "SWAPPED" if done.swapped else "ROLLED_BACK"
    return Outcome(digest, done.served.digest, state, done.reason)


def _cold_start(service: Service, digest: str) -> None:
    """Kill the engine and start it on this digest: the way that needs nothing to work before."""
    slot = read_served(service.home).slot
    write_served(service.home, Served(digest, str(service.directory(digest)), slot))
    engines = SupervisedEngines(service.home)
    engines.restart(slot, engines.pid(slot))


def _live_rewards(service: Service, entry: Entry) -> tuple[list[float], list[float]]:
    """Verified live rewards of a version and of the one before it, on the round's target."""
    target = service.journal.candidate(entry.digest).target
    rows = [row for row in service.experience.rows(target) if row.reward is not None]
    intents = [each for each in service.ledger.of(entry.digest) if each.state == "SWAP_INTENT"]
    before = intents[-1].before if intents else None
    new = [float(row.reward or 0.0) for row in rows if row.version == entry.digest]
    old = [float(row.reward or 0.0) for row in rows if row.version == before]
    return new, old
