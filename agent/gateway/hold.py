"""Admission: how many requests are inside the engine, and which version answers them.

A candidate on trial answers a share of them, sticky by a key, until its time runs out: a controller
that dies cannot keep it.

Open: up to ``max_in_flight`` requests are inside, a bounded queue waits, principals in turn; of one
principal with a key at most ``OF_ONE`` of both, so that one client's long answers do not keep the
others out. Held: no request enters,
so that no answer spans two versions. A hold is a lease that runs out: a controller that dies
cannot keep it.
"""

import asyncio
import hashlib
import logging
import secrets
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from agent.gateway.errors import unavailable
from agent.gateway.upstream import Upstream

LOG = logging.getLogger("anchorage.gateway")
OF_ONE = 0.75  # largest share of the places and of the queue that one principal has
Recover = Callable[[str], Awaitable[str]]  # the version before the hold -> the version served now


class HoldConflictError(Exception):
    """The hold is another caller's, or there is none, or answers are still being generated."""


@dataclass(frozen=True, slots=True)
class Route:
    """An engine, and the digest of the weights it answers with."""

    version: str  # digest
    upstream: Upstream


@dataclass(slots=True, eq=False)
class Ticket:
    """A request's place in the engine; ``mixed`` when that got other weights meanwhile."""

    route: Route
    mixed: bool = False
    owner: str = ""


@dataclass(frozen=True, slots=True)
class CandidateTrial:
    """A candidate on a second engine that answers a share of the requests.

    ``shadow``: it answers them too, and nobody sees it. ``salt``: whoever does not know it cannot
    choose keys that are on trial.
    """

    route: Route
    share: float
    shadow: bool
    salt: str
    until: float  # loop time, s

    def takes(self, key: str) -> bool:
        """Whether requests with this key are on trial: always the same ones."""
        drawn = hashlib.sha256(f"{self.salt}\0{self.route.version}\0{key}".encode()).digest()
        return int.from_bytes(drawn[:8], "big") / 2**64 < self.share


@dataclass(slots=True)
class HoldLease:
    """One hold, and when it runs out."""

    id: str
    began: float  # loop time, s
    deadline: float
    timer: asyncio.TimerHandle
    recovering: bool = False


@dataclass(slots=True)
class Admission:
    """Admission to the engine. Everything runs on one event loop, so nothing is locked."""

    route: Route
    max_in_flight: int
    max_queued: int
    queue_timeout_s: float
    retry_after_s: int
    recover: Recover | None = None
    on_pause: Callable[[float], None] = lambda _seconds: (
        None
    )  # called with the length of each hold, s
    on_mixed: Callable[[], None] = lambda: None  # called for each answer that spans two versions
    lease: HoldLease | None = None
    draining: bool = False
    warm: dict[str, Route] = field(default_factory=dict)  # other versions with an engine running
    trial: CandidateTrial | None = None
    _inside: set[Ticket] = field(default_factory=set)
    _queue: "dict[str, deque[asyncio.Future[Ticket]]]" = field(default_factory=dict)  # by owner
    _of_owner: Counter[str] = field(default_factory=Counter)  # requests inside
    _left: asyncio.Event = field(default_factory=asyncio.Event)
    _tasks: "set[asyncio.Task[None]]" = field(default_factory=set)

    @property
    def held(self) -> bool:
        """Whether a lease keeps all requests out."""
        return self.lease is not None

    @property
    def in_flight(self) -> int:
        """Requests inside the engine."""
        return len(self._inside)

    @property
    def queued(self) -> int:
        """Requests waiting to enter."""
        return sum(map(len, self._queue.values()))

    def by_version(self) -> dict[str, int]:
        """Requests inside, counted by the version that answers them."""
        return dict(Counter(ticket.route.version for ticket in self._inside))

    def on_trial(self, key: str) -> CandidateTrial | None:
        """The trial that requests with this key are in, unless its time has run out."""
        trial = self.trial
        if trial is None or asyncio.get_running_loop().time() >= trial.until:
            return None
        return trial if trial.takes(key) else None

    async def enter(self, owner: str = "") -> Ticket:
        """Wait for a place; ApiError 503 when draining, or the queue is full or slow.

        owner: the principal; "" where nobody shares the endpoint, without a share of its own.

        A request that stops waiting may have been let in at the same moment: ``_give_up`` then
        gives the place back.
        """
        if self.draining:
            raise unavailable("the service is shutting down", "draining", self.retry_after_s)
        # Whoever waits while there is a place has its share inside: `_let_in` let in all others.
        mine = self._queue.get(owner, ())
        if self._open() and self._may_enter(owner) and not mine:
            return self._admit(owner)
        if self.queued >= self.max_queued or len(mine) >= _share(owner, self.max_queued):
            raise self._busy()
        place: asyncio.Future[Ticket] = asyncio.get_running_loop().create_future()
        self._queue.setdefault(owner, deque()).append(place)
        try:
            async with asyncio.timeout(self.queue_timeout_s):
                return await place
        except BaseException as error:
            self._give_up(owner, place)
            if isinstance(error, TimeoutError):
                raise self._busy() from None
            raise

    def leave(self, ticket: Ticket) -> None:
        """Give the place back; a second time does nothing."""
        if ticket in self._inside:
            self._inside.discard(ticket)
            self._of_owner -= Counter([ticket.owner])
            if ticket.mixed:
                self.on_mixed()
            self._left.set()
            self._let_in()

    async def hold(self, max_wait_s: float, deadline_s: float, *, wait: bool = True) -> str:
        """Admit no request and wait until none is inside; the lease's id.

        HoldConflictError, with admission open again, when answers take longer than ``max_wait_s``.
        ``wait=False`` is for engines that keep running requests over the swap: those inside fail
        and are counted, because which weights end their answers cannot be known here.
        """
        if self.held:
            raise HoldConflictError("held by another lease")
        lease = self._begin(deadline_s)
        for ticket in self._inside:
            ticket.mixed |= not wait
        try:
            async with asyncio.timeout(max_wait_s):
                while wait and self._inside and self.lease is lease:
                    self._left.clear()
                    await self._left.wait()
        except TimeoutError:
            inside = self.in_flight
            self._end(lease)
            raise HoldConflictError(f"{inside} answers still running") from None
        except asyncio.CancelledError:
            self._end(lease)
            raise
        # Its timer may have opened admission again while this waited.
        if self.lease is not lease:
            raise HoldConflictError("the lease ran out while waiting")
        return lease.id

    def release(
        self, version: str, lease_id: str | None = None, to: Upstream | None = None
    ) -> None:
        """Stamp the version that answers from now on, and open.

        Without a hold only the version already served is accepted, so that a controller whose hold
        ran out gets a HoldConflictError.
        """
        if self.lease is None and lease_id is None and version == self.route.version:
            return
        self._release(self._own(lease_id), Route(version, to or self.route.upstream))

    def flip(self, version: str, to: Upstream) -> None:
        """Send new requests to another engine; those inside end where they began (blue/green)."""
        if self.held:
            raise HoldConflictError("held: release first")
        before = self.route
        self._serve(Route(version, to))
        if before.upstream is not to:
            self.warm[before.version] = before

    def drain(self) -> None:
        """Refuse requests that arrive or wait; those inside end."""
        self.draining = True
        error = unavailable("the service is shutting down", "draining", self.retry_after_s)
        for place in [each for places in self._queue.values() for each in places]:
            if not place.done():
                place.set_exception(error)
        self._queue.clear()

    def _open(self) -> bool:
        return self.lease is None and len(self._inside) < self.max_in_flight

    def _may_enter(self, owner: str) -> bool:
        return self._of_owner[owner] < _share(owner, self.max_in_flight)

    def _admit(self, owner: str) -> Ticket:
        ticket = Ticket(self.route, owner=owner)
        self._inside.add(ticket)
        self._of_owner[owner] += 1
        return ticket

    def _let_in(self) -> None:
        """Give free places to owners in turn, one each; who has its share inside waits on."""
        while self._open():
            owner = next(filter(self._may_enter, self._queue), None)
            if owner is None:
                return
            places = self._queue.pop(owner)  # and last in turn, if more of it wait
            place = places.popleft()
            if places:
                self._queue[owner] = places
            if not place.done():
                place.set_result(self._admit(owner))

    def _give_up(self, owner: str, place: "asyncio.Future[Ticket]") -> None:
        """Leave the queue, or give back the place that was given at the same moment."""
        if place.done() and not place.cancelled() and place.exception() is None:
            self.leave(place.result())
        elif place in (places := self._queue.get(owner, deque())):
            places.remove(place)
            if not places:
                del self._queue[owner]

    def _busy(self) -> Exception:
        if self.lease is not None:
            return unavailable("new weights are being loaded", "swapping", self.retry_after_s)
        return unavailable("too many requests are waiting", "overloaded", self.retry_after_s)

    def _begin(self, deadline_s: float) -> HoldLease:
        loop = asyncio.get_running_loop()
        now = loop.time()
        lease = HoldLease(secrets.token_hex(8), now, now, loop.call_later(0, lambda: None))
        self._arm(lease, deadline_s)
        self.lease = lease
        return lease

    def _arm(self, lease: HoldLease, deadline_s: float) -> None:
        loop = asyncio.get_running_loop()
        lease.deadline = loop.time() + deadline_s
        lease.timer = loop.call_later(deadline_s, self._run_out, lease, deadline_s)

    def _own(self, lease_id: str | None) -> HoldLease:
        if self.lease is None:
            raise HoldConflictError("nothing is held")
        if self.lease.recovering or lease_id not in (None, self.lease.id):
            raise HoldConflictError("the lease is another caller's, or ran out")
        return self.lease

    def _release(self, lease: HoldLease, route: Route) -> None:
        self._serve(route)
        self._end(lease)

    def _serve(self, route: Route) -> None:
        """From now on this version answers; requests inside its engine with another are mixed."""
        for ticket in self._inside:
            same_engine = ticket.route.upstream is route.upstream
            ticket.mixed |= same_engine and ticket.route.version != route.version
        others = {v: r for v, r in self.warm.items() if r.upstream is not route.upstream}
        others.pop(route.version, None)
        self.warm = others
        self.route = route
        if self.trial is not None and self.trial.route.upstream is route.upstream:
            self.trial = None  # its engine serves everything now, with whatever weights

    def _end(self, lease: HoldLease) -> None:
        if self.lease is not lease:
            return
        lease.timer.cancel()
        self.lease = None
        self.on_pause(asyncio.get_running_loop().time() - lease.began)
        self._let_in()

    def _run_out(self, lease: HoldLease, again_s: float) -> None:
        """The deadline passed: ask for recovery, or go on with the version before the hold."""
        if self.lease is not lease:
            return
        LOG.warning("hold ran out", extra={"fields": {"version": self.route.version[:12]}})
        self._left.set()
        if self.recover is None:
            self._release(lease, self.route)
            return
        lease.recovering = True
        task = asyncio.get_running_loop().create_task(self._recovered(lease, again_s))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _recovered(self, lease: HoldLease, again_s: float) -> None:
        """Stay held until ``recover`` returns the version served now; ask again on failure."""
        assert self.recover is not None
        try:
            version = await self.recover(self.route.version)
        except Exception as error:
            LOG.error("recovery failed", extra={"fields": {"error": type(error).__name__}})
            self._arm(lease, again_s)
            return
        self._release(lease, Route(version, self.route.upstream))


def _share(owner: str, places: int) -> int:
    """How many of the places one owner may have."""
    return max(1, int(OF_ONE * places)) if owner else places
