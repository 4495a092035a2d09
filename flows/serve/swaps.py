"""What is served, changed: a swap with its ledger rows, the way back, and what it is verified by.

The swap's lease (deploy.serving.lease) keeps every other controller away. The epoch that a
controller takes under it keeps a controller that was stopped, taken for dead and woken from writing
the ledger. A swap is verified by probes: fixed prompts whose top log-probabilities must equal those
that a cold engine gave for the same digest.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from agent.errors import UserError
from agent.population.schedule import Engine
from agent.store.intake import keyed
from agent.store.ledger import StaleEpoch
from agent.store.weights import identity, require, short
from deploy.serving.control import ControlError, Terms
from deploy.serving.controller import TRIALS, Event, Way, change, connect
from deploy.serving.engines import is_up
from deploy.serving.intact import Probes, one_at_a_time, read_probes, write_probes
from deploy.serving.lease import LeaseLostError, Leases
from deploy.serving.served import Served, read_served
from flows.service import Service
from flows.session import Session, engine_options, kept_certificate

LOG = logging.getLogger("anchorage.swaps")

Write = Callable[[Event, str, str, int], None]  # event, digest, why, the controller's epoch
PROMPTS_A_TASK, TOKENS, POSITIONS = 1, 5, 3  # few: they are answered while requests are held
START_S = 300.0  # a first answer compiles kernels, which takes minutes on a busy machine


@dataclass(frozen=True)
class ServeOutcome:
    """What is served after an act, and the reason where that is not the digest asked for."""

    asked: str
    served: str
    state: str
    reason: str = ""

    @property
    def done(self) -> bool:
        """Whether it came as asked: served, or recorded where no swap was due (yet)."""
        states = ("REJECT", "ANCHOR", "APPROVED", "CANARY")
        return self.served == self.asked or self.state in states

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"done": self.done}


def swap(
    session: Session, digest: str, write: Write, why: str, strategy: Way | None = None
) -> ServeOutcome:
    """Serve a digest, by the strategy of the settings unless one is given.

    Args:
        session: The parts of the home; its engines answer the probes of a digest that has none.
        digest: What to serve.
        write: Writes the ledger's rows, under the epoch taken when the intent is due.
        why: The reason, for the ledger.
        strategy: How, such as "cold"; "canary" and "shadow" put it on trial.

    Raises:
        UserError: Nothing was touched, and why.
        ControlError, LeaseLostError: The watchdog finishes what was begun.
    """
    service = session.service
    epoch: list[int] = []
    if strategy is None:
        chosen = service.settings.engines.swap
        strategy = "blue_green" if chosen in TRIALS else chosen  # a way back takes no trial
    # Not for a cold start that was asked for: it must not depend on anything that can fail.
    certificate = kept_certificate(service) if strategy == "in_place" else None
    if certificate is not None and certificate.way == "fresh":
        session.progress.say(
            f"{certificate.family}: swapped by a cold start, a reload is not exact"
        )
        strategy = "cold"
    if strategy != "cold" and is_up(service.home):
        ensure_probes(session, digest)

    def record(event: Event, of: str, reason: str) -> None:
        # Under the lease, before anything moves: older epochs are out.
        if event in ("SWAP_INTENT", "CANARY"):
            epoch.append(service.take_over())
        write(event, of, reason or why, epoch[0])

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
            terms=terms(service),
        )
    except ControlError as error:
        if epoch:
            raise
        raise UserError(f"digest {short(digest)}: nothing was changed: {error}") from error
    swapped = "SWAPPED" if done.served.digest == digest else "CANARY"
    state = swapped if done.swapped else "ROLLED_BACK"
    return ServeOutcome(digest, done.served.digest, state, done.reason)


def terms(service: Service) -> Terms:
    """Of a trial. It lapses where nobody looks after it for some polls."""
    engines, poll_s = service.settings.engines, service.settings.projection.reconcile_seconds
    salt, deadline_s = keyed(service.salt, "trial"), max(60.0, 4 * poll_s)
    return Terms(engines.canary_share, engines.swap == "shadow", salt, deadline_s)


def swap_surely(session: Session, digest: str, write: Write, why: str) -> ServeOutcome:
    """Serve a digest as set or, if that fails for any reason, by a cold start.

    A cold start kills the engine and needs neither its answers nor probes.

    Raises:
        LeaseLostError, StaleEpoch: Another controller or the watchdog took over, and decides.
        UserError, ControlError: The cold start failed as well.
    """
    try:
        outcome = swap(session, digest, write, why)
    except (LeaseLostError, StaleEpoch):
        raise
    except Exception as error:
        LOG.warning("swap to %s: %s: %s", short(digest), type(error).__name__, error)
        outcome = ServeOutcome(digest, "", "ROLLED_BACK", str(error) or type(error).__name__)
    if outcome.served == digest:
        return outcome
    return swap(session, digest, write, f"{why} (by a cold start: {outcome.reason})", "cold")


def rollback(session: Session, digest: str, reason: str) -> ServeOutcome:
    """Serve an earlier version again, in place or, where no engine works, by a cold start.

    Raises:
        UserError: The digest is served already, was never served, or its weights are not kept.
    """
    service = session.service
    finish(session)
    champion = service.champion()
    if digest == champion:
        raise UserError(f"digest {short(digest)} is the champion; allowed: another one")

    def write(event: Event, _of: str, _reason: str, epoch: int) -> None:
        # Before anything moves: should this process end now, reconcile serves ``digest``. A cold
        # start after a failed swap writes it again, which the ledger takes for the same row.
        if event == "SWAP_INTENT":
            service.record(champion, "ROLLED_BACK", reason, epoch=epoch, after=digest)

    return swap_surely(session, digest, write, reason)


def serve_champion(session: Session) -> None:
    """Make the engine serve what the ledger says, whatever it serves now.

    A champion whose weights are lost for good is rolled back to the original model.
    """
    service, champion = session.service, session.service.champion()
    try:
        service.directory(champion)
    except UserError as damage:
        rollback(session, service.origin.digest, f"its weights are lost: {damage}")
        return
    swap_surely(session, champion, lambda *_: None, "as the ledger says")


def swap_under_way(service: Service) -> bool:
    """Whether a controller, or the watchdog after it, is changing weights."""
    return Leases(service.home).current() is not None


def finish(session: Session) -> str | None:
    """Write how the swap of a controller that died ended; what was done, None without such a swap.

    Raises:
        UserError: A swap is under way.
    """
    service = session.service
    intent = service.ledger.open_intent()
    if intent is None:
        return None
    with alone(service):
        epoch, still = service.take_over(), service.ledger.open_intent()
        if still is None or still.digest != intent.digest:
            return None
        why = f"swap to {short(intent.digest)} was not finished"
        served = _served(service).digest == intent.digest
        state, end = ("SWAPPED", "it") if served else ("ROLLED_BACK", "the version before it")
        service.record(intent.digest, state, f"{why}; {end} is served", epoch=epoch)
    return why


@contextmanager
def alone(service: Service) -> Iterator[None]:
    """Hold the swap's lease without swapping: no other controller writes the ledger meanwhile."""
    leases, served = Leases(service.home), _served(service)
    lease_s = service.settings.engines.swap_deadline_s
    lease = leases.begin(served, served, lease_s=lease_s, now=time.time())
    try:
        yield
    finally:
        leases.end(lease)


def _served(service: Service) -> Served:
    """The version that every engine start loads; the original model in a home that never served."""
    try:
        return read_served(service.home)
    except UserError:
        return Served(service.origin.digest, str(service.origin.directory))


def ensure_probes(session: Session, digest: str) -> None:
    """Have the probes of a digest answered by a cold engine, unless they are recorded already."""
    if not _known(session.service, digest):
        session.progress.say(f"a cold engine answers the probes of {digest[:12]}")
        with cold_engine(session, digest):
            pass


@contextmanager
def cold_engine(session: Session, digest: str) -> Iterator[Engine]:
    """An engine started on a version, which has answered its probes where a swap may need them.

    Raises:
        UserError: The version's files were changed between their check and the engine's answers.
    """
    service = session.service
    options = engine_options(service)[0]
    session.make_room()
    directory = service.directory(digest)
    before = identity(directory)
    cold = session.engine(replace(options, model=directory))

    def require_loaded() -> None:
        """The files hold the version now, and were not written since before they were loaded."""
        require(directory, digest)
        if identity(directory) != before:
            raise UserError(f"{directory}: was changed while an engine loaded it")

    try:
        if is_up(service.home) and not _known(service, digest):
            prompts = probe_prompts(service)
            ask = partial(cold.top_logprobs, k=TOKENS, positions=POSITIONS)
            expected = one_at_a_time(ask, prompts)
            require_loaded()
            write_probes(service.home, digest, Probes.of(prompts, expected))
        yield cold
        require_loaded()
    finally:
        cold.close()


def probe_served(service: Service) -> None:
    """Record the champion's probes from the serving engine, which was just started cold on it."""
    served = read_served(service.home)
    if _known(service, served.digest):
        return
    prompts = probe_prompts(service)
    with connect(service.home, served.slot) as engine:
        ids = [engine.tokens(prompt) for prompt in prompts]
        model = engine.model()
        expected = one_at_a_time(
            lambda few: engine.top_logprobs(model, few, TOKENS, POSITIONS, timeout_s=START_S), ids
        )
    write_probes(service.home, served.digest, Probes.of(prompts, expected))


def probe_prompts(service: Service) -> list[list[dict[str, str]]]:
    """The fixed prompts: the first evaluation rows of the target and its prior tasks.

    Rows of no other task are read: they may lie on a hub that cannot be reached.
    """
    target = service.settings.tasks.target
    return [
        service.task(name).messages(row, service.shots(name)(row))
        for name in (target, *service.priors(target))
        for row in service.rows(name, "eval", PROMPTS_A_TASK)
    ]


def _known(service: Service, digest: str) -> bool:
    try:
        read_probes(service.home, digest)
    except UserError:
        return False
    return True
