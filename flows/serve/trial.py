"""A candidate on trial: a share of live traffic on a second engine, then everything or nothing.

`promote` begins a trial where ``engines.swap`` is "canary" or "shadow". Every poll judges it by the
watches of baking (`flows.serve.bake`): evidence that it is worse withdraws it, enough traffic
without such evidence swaps it in, after which it bakes. In between the gateway's trial is renewed;
where nobody does, it lapses and the old version answers everything.
"""

from contextlib import suppress
from typing import Any, Literal

from agent.store.ledger import Entry
from agent.store.weights import short
from deploy.serving.control import ControlError, GatewayControl
from deploy.serving.controller import Event
from deploy.serving.engines import Engines, engines_of, is_up
from deploy.serving.served import SLOTS, Served, read_served
from flows.serve.bake import watch
from flows.serve.swaps import Write, alone, swap, swap_under_way, terms
from flows.service import Service
from flows.session import Session

DRAIN_S = 30.0  # for the candidate's running answers to end

Verdict = Literal["withdraw", "swap in", "go on"]


def judge_trial(session: Session, entry: Entry, engines: Engines | None = None) -> dict[str, Any]:
    """Withdraw the candidate, swap it in, or go on; the figures, and its state now.

    ``engines``: those of the home if None.

    The verdict comes before the trial is renewed: one whose withdrawal was interrupted answers
    nobody again.
    """
    service = session.service
    if swap_under_way(service) or not is_up(service.home):
        return {"state": "CANARY"}
    begun = [each for each in service.ledger.of(entry.digest) if each.state == "CANARY"][-1]
    verdict, why, figures = decide(service, begun)
    if verdict == "withdraw":
        state = _withdraw(service, entry.digest, why, engines or engines_of(service.home))
    elif verdict == "swap in":
        state = _swap_in(session, entry.digest, why)
    else:
        state = _go_on(session, begun)
    return figures | {"state": state, "wanted": service.settings.baking.rows}


def decide(service: Service, begun: Entry) -> tuple[Verdict, str, dict[str, Any]]:
    """What becomes of the trial that this row began, why, and the figures.

    Rewards that there was nothing to compare with, such as those of a version before whose answers
    are not all judged yet, swap nothing in before ``baking.minutes`` are over.
    """
    seen, baking = watch(service, begun), service.settings.baking
    compared = seen.pairs >= min(baking.rows, baking.window)
    if begun.before != service.champion():
        return "withdraw", "the version it was compared with is served no more", seen.figures
    if seen.worse:
        return "withdraw", f"worse on trial: {seen.worse}", seen.figures
    if (seen.enough and compared) or seen.late:
        return "swap in", f"on trial: {seen.why}", seen.figures
    return "go on", "", seen.figures


def _withdraw(service: Service, digest: str, why: str, engines: Engines) -> str:
    """Send everything to the old version, then end the candidate's engine; its state."""
    home = service.home
    with alone(service):
        epoch = service.take_over()
        with suppress(ControlError), GatewayControl.at(home.admin_socket) as gateway:
            gateway.end_trial(digest)
            gateway.drained(digest, DRAIN_S)
        service.record(digest, "ROLLED_BACK", why, epoch=epoch)
        engines.stop(_tried(service, digest).slot)
    return "ROLLED_BACK"


def _swap_in(session: Session, digest: str, why: str) -> str:
    """Everything to the candidate's engine, which is warm; its state."""
    outcome = swap(session, digest, _recorder(session.service), why, "blue_green")
    if outcome.served == digest:
        session.service.record(digest, "BAKING", "live traffic is watched")
    return outcome.state


def _go_on(session: Session, begun: Entry) -> str:
    """Renew the gateway's trial; begin it again where its engine or the gateway was lost."""
    service, digest = session.service, begun.digest
    with GatewayControl.at(service.home.admin_socket) as gateway:
        trial = gateway.state()["trial"]
        if trial is not None and trial["version"] == digest:
            gateway.begin_trial(_tried(service, digest), service.home, terms(service))
            return "CANARY"
    session.progress.say(f"the trial of {short(digest)} is begun again")
    return swap(session, digest, _recorder(service), begun.why, "canary").state


def _tried(service: Service, digest: str) -> Served:
    """The candidate in the slot that does not serve."""
    slot = next(slot for slot in SLOTS if slot != read_served(service.home).slot)
    return Served(digest, str(service.home.weights / digest), slot)


def _recorder(service: Service) -> Write:
    def write(event: Event, of: str, reason: str, epoch: int) -> None:
        service.record(of, event, reason, epoch=epoch)

    return write
