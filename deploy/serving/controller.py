"""Performs a swap's steps on the real parts: lease, ledger, gateway, engine, files.

    change(home, target, anchor=..., record=...)    is what a flow calls

A controller that dies at any moment leaves the lease behind; the watchdog then settles the swap.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Literal, Self

from agent.errors import UserError
from agent.home import Home
from agent.store.weights import Anchor, preflight
from deploy.serving import swap
from deploy.serving.control import ControlError, EngineControl, GatewayControl, Terms, pinned
from deploy.serving.engines import Engines, engines_of, is_up
from deploy.serving.intact import (
    Probes,
    difference,
    read_probes,
    require_equal,
    require_version,
)
from deploy.serving.lease import Lease, LeaseLostError, Leases
from deploy.serving.served import (
    BLUE,
    GREEN,
    Served,
    read_served,
    read_slot,
    write_served,
    write_slot,
)

Event = Literal["SWAP_INTENT", "SWAPPED", "ROLLED_BACK", "CANARY"]
Record = Callable[[Event, str, str], None]  # the ledger: event, digest, why
Connect = Callable[[str], AbstractContextManager[EngineControl]]  # a slot -> its engine of now
Strategy = Literal["in_place", "blue_green", "canary", "shadow"]  # what can be set
Way = Strategy | Literal["cold", "offline"]  # for a dead engine; while the stack is down
TRIALS = ("canary", "shadow")
USUAL = Terms()
AT_ANY_TIME = (swap.Intent, swap.RolledBack, swap.End)  # they touch no engine and no gateway


def change(
    home: Home,
    digest: str,
    directory: Path,
    *,
    anchor: Anchor,
    record: Record,
    why: str = "",
    strategy: Way = "in_place",
    keep_warm: bool = True,
    lease_s: float = 60.0,
    max_wait_s: float = 30.0,
    terms: Terms = USUAL,
) -> swap.SwapOutcome:
    """Serve another version; the outcome says what is served now, and why if it is not this one.

    By "canary" or "shadow" it is put on trial under the ``terms``, and the old one served on.

    A stack that is down serves it from its next start. UserError before anything is touched: a
    directory that fails its preflight, no recorded probes, a swap under way. LeaseLostError: it
    took too long, the watchdog decides. ControlError: engine or gateway do not answer, or the old
    version could not be brought back yet; the watchdog goes on trying.
    """
    if not is_up(home):  # no watchdog runs either: an overdue lease is settled here
        strategy = "offline"
        settle_offline(home, time.time())
    previous = _previous(home, anchor)
    other = GREEN if previous.slot == BLUE else BLUE
    slot = other if strategy in ("blue_green", *TRIALS) else previous.slot
    target = Served(digest, str(directory), slot)
    protocol = {
        "in_place": lambda: swap.in_place(previous, target),
        "blue_green": lambda: swap.blue_green(previous, target, keep_warm=keep_warm),
        "canary": lambda: swap.on_trial(previous, target),
        "shadow": lambda: swap.on_trial(previous, target),
        "cold": lambda: swap.cold(previous, target),
        "offline": lambda: swap.offline(previous, target),
    }[strategy]()
    gateway = GatewayControl.at(home.admin_socket)
    with (
        gateway,
        Controller(
            home,
            anchor,
            record,
            gateway=gateway,
            engines=engines_of(home),
            connect=lambda name: connect(home, name),
            why=why,
            lease_s=lease_s,
            max_wait_s=max_wait_s,
            terms=terms,
        ) as controller,
    ):
        return swap.run(protocol, controller.perform)


def settle_offline(home: Home, now: float) -> None:
    """End an overdue lease where no watchdog runs; an engine that starts reads serving.json."""
    leases = Leases(home)
    lease = leases.take(now)
    if lease is not None and lease.phase == "loading":
        write_served(home, lease.previous)
    if lease is not None:
        leases.end(lease)


def _previous(home: Home, anchor: Anchor) -> Served:
    """What is served now; the anchor in a home that never served."""
    try:
        return read_served(home)
    except UserError:
        return Served(anchor.digest, str(anchor.directory))


@contextmanager
def connect(home: Home, slot: str) -> Iterator[EngineControl]:
    """The control side of the engine process that listens in a slot now, and of no later one."""
    with pinned(home.engine_socket(slot)) as path, EngineControl.at(path) as engine:
        yield engine


class Controller:
    """One swap. ``perform`` takes the steps of a protocol in the order it yields them."""

    def __init__(
        self,
        home: Home,
        anchor: Anchor,
        record: Record,
        *,
        gateway: GatewayControl,
        engines: Engines,
        connect: Connect,
        why: str = "",
        lease_s: float = 60.0,
        max_wait_s: float = 30.0,
        terms: Terms = USUAL,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._home, self._anchor, self._record = home, anchor, record
        self._gateway, self._engines, self._connect = gateway, engines, connect
        self._why, self._lease_s, self._max_wait_s = why, lease_s, max_wait_s
        self._terms, self._clock = terms, clock
        self._leases = Leases(home)
        self._open = ExitStack()
        self._lease: Lease | None = None
        self._hold: str | None = None
        self._engine: EngineControl | None = None
        self._model = ""
        self._probes: Probes | None = None  # of the target
        self._ids: list[list[int]] = []  # their prompts as tokens

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def perform(self, step: swap.Step) -> None:
        """Do one step; what goes wrong is raised. LeaseLostError before any touch that is late."""
        # Checked before every touch: past the deadline the watchdog may be settling the same swap.
        if self._lease is not None and not isinstance(step, AT_ANY_TIME):
            self._leases.check(self._lease, self._clock())
        match step:
            case swap.Preflight(target, probes):
                self._preflight(target)
                if probes:
                    self._probes = read_probes(self._home, target.digest)
            case swap.Begin(previous, target, alive):
                self._begin(previous, target, alive)
            case swap.Intent(target, trial):
                self._record("CANARY" if trial else "SWAP_INTENT", target.digest, self._why)
            case swap.Hold(wait):
                self._hold = self._gateway.hold(self._wait_s(), self._left_s(), wait=wait)
            case swap.Pause():
                self._the_engine().pause(self._left_s())
            case swap.Load(target):
                self._load(target)
            case swap.Resume():
                self._the_engine().resume()
            case swap.StartOther(target):
                self._start_other(target)
            case swap.Verify(target):
                self._verify(target)
            case swap.Stamp(served):
                self._stamp(served)
            case swap.StampCold(target):
                self._stamp_cold(target)
            case swap.StartCold(target):
                self._start_cold(target)
            case swap.Swapped(target):
                self._record("SWAPPED", target.digest, self._why)
            case swap.Release(served):
                self._gateway.release(served.digest, self._hold)
            case swap.Flip(served, trial=True):
                self._gateway.begin_trial(served, self._home, self._terms)
            case swap.Flip(served):
                self._gateway.flip(served.digest, self._home.engine_socket(served.slot))
            case swap.Drain(previous):
                self._gateway.drained(previous.digest, self._wait_s())
            case swap.StopOther(served):
                self._engines.stop(served.slot)
            case swap.Recover(previous):
                self._recover(previous)
            case swap.RolledBack(target, reason):
                self._record("ROLLED_BACK", target.digest, reason)
            case swap.End():
                self._leases.end(self._the_lease())

    def _preflight(self, target: Served) -> None:
        """The directory, its digest, and the files beside its weights."""
        if target.digest != self._anchor.digest:
            preflight(Path(target.directory), self._anchor)
        require_version(self._home, target)

    def _begin(self, previous: Served, target: Served, alive: bool) -> None:
        """Take the lease; the probes become tokens first, while the engine still serves."""
        if alive:
            engine = self._tie(previous.slot)
            assert (
                self._probes is not None
            )  # Preflight read them: every protocol with a live engine verifies
            self._ids = [engine.tokens(prompt) for prompt in self._probes.prompts]
        self._lease = self._leases.begin(
            previous,
            target,
            lease_s=self._lease_s,
            now=self._clock(),
            engine_pid=self._engines.pid(previous.slot),
        )

    def _tie(self, slot: str) -> EngineControl:
        """Use the process in a slot for every later step."""
        engine = self._engine = self._open.enter_context(self._connect(slot))
        self._model = engine.model()
        return engine

    def _load(self, target: Served) -> None:
        lease = self._lease = self._leases.advance(self._the_lease(), "loading", self._clock())
        loaded = self._the_engine().load(target.directory, lease.deadline - self._clock())
        if loaded != target.digest:
            raise ControlError(f"load: the engine has {loaded}, expected {target.digest}")

    def _verify(self, target: Served) -> None:
        assert self._probes is not None
        largest = difference(self._the_engine(), self._model, self._ids, self._probes)
        require_equal(largest, target.digest)

    def _stamp(self, served: Served) -> None:
        """serving.json first: a crash between the two is a cold start on the old version."""

        def write() -> None:
            write_served(self._home, served)

        self._lease = self._leases.advance(self._the_lease(), "stamped", self._clock(), write)
        self._the_engine().label(served.digest)

    def _stamp_cold(self, target: Served) -> None:
        def write() -> None:
            write_served(self._home, target)

        self._lease = self._leases.advance(self._the_lease(), "cold", self._clock(), write)

    def _start_cold(self, target: Served) -> None:
        with self._heartbeat() as lease:
            self._engines.restart(target.slot, lease.engine_pid)
        self._lease = self._leases.advance(self._the_lease(), "stamped", self._clock())

    def _start_other(self, target: Served) -> None:
        """Start the second engine, unless it is up and was started with these weights.

        The first one's version is written down too: it is what its slot loads after the flip.
        """
        write_slot(self._home, self._the_lease().previous)
        if not self._warm(target):
            self._engines.stop(target.slot)
            write_slot(self._home, target)
            with self._heartbeat():
                self._engines.start(target.slot)
        self._tie(target.slot)

    def _warm(self, target: Served) -> bool:
        if self._engines.pid(target.slot) is None:
            return False
        try:
            return read_slot(self._home, target.slot).digest == target.digest
        except UserError:
            return False

    def _recover(self, previous: Served) -> None:
        def write() -> None:
            write_served(self._home, previous)

        self._lease = self._leases.advance(self._the_lease(), "loading", self._clock(), write)
        with self._heartbeat() as lease:
            self._engines.restart(previous.slot, lease.engine_pid)

    @contextmanager
    def _heartbeat(self) -> Iterator[Lease]:
        """Renew the lease while an engine starts, however long; it lapses with this process."""
        lease, done = self._leases.renew(self._the_lease(), self._clock()), threading.Event()

        def beat() -> None:
            with suppress(LeaseLostError):
                while not done.wait(self._lease_s / 3):
                    self._leases.renew(lease, self._clock())

        beating = threading.Thread(target=beat, name="lease", daemon=True)
        beating.start()
        try:
            yield lease
        finally:
            done.set()
            beating.join()
        self._lease = self._leases.renew(lease, self._clock())

    def _the_lease(self) -> Lease:
        assert self._lease is not None  # every protocol begins with Begin
        return self._lease

    def _the_engine(self) -> EngineControl:
        assert self._engine is not None
        return self._engine

    def _left_s(self) -> float:
        """Time to the deadline; a step that has none left fails at once."""
        return max(0.001, self._the_lease().deadline - self._clock())

    def _wait_s(self) -> float:
        return min(self._max_wait_s, self._left_s())
