"""What a task's verifier says of an answer: asked in a thread, in bounded time, owners in turn."""

import asyncio
import math
import threading
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import orjson

from agent.store.experience import Unjudged

MAX_STUCK = 8  # threads still running after their time; see `Verifier`
MAX_ERROR = 256  # characters of an error, as its column is wide
CHECK_S = 0.5  # longest a request waits for its row to be checked

T = TypeVar("T")


class VerdictLike(Protocol):
    """What a task's verifier returns."""

    @property
    def reward(self) -> float: ...  # noqa: D102
    @property
    def format(self) -> float: ...  # noqa: D102
    @property
    def extracted(self) -> str | None: ...  # noqa: D102


Verify = Callable[[Unjudged, Mapping[str, Any] | str], VerdictLike]
"""(answer, the row or a known row's id) -> verdict; raises where it cannot tell, and
RowRefusedError for a row that cannot be learnt from."""

Check = Callable[[str, Mapping[str, Any]], str | None]
"""(task, a client's row) -> why it is refused at once, or None; quick."""


class RowRefusedError(Exception):
    """A row that a client sent cannot be learnt from; the message says why.

    verdict: of an answer whose row is sound and only not to be trained on. Its reward counts for
    the version that answered.
    """

    def __init__(self, message: str, verdict: VerdictLike | None = None) -> None:
        super().__init__(message)
        self.verdict = verdict


@dataclass(frozen=True, slots=True)
class Finding:
    """A verdict, the name of what prevented one, or both where the row is not to be trained on."""

    reward: float | None = None
    format: float | None = None
    extracted: str | None = None
    error: str | None = None


class Turns:
    """Places for work; where all are taken, those who wait get the next ones in turn.

    The one that waits longest of each owner, so that whoever has a thousand waiting delays another
    by one at most. Everything runs on one event loop, so nothing is locked.
    """

    def __init__(self, places: int) -> None:
        self._free = places
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # the owner next in turn first

    @asynccontextmanager
    async def of(self, owner: str) -> AsyncIterator[None]:
        """A place, for as long as the block lasts."""
        if self._free:
            self._free -= 1
        else:
            await self._turn(owner)
        try:
            yield
        finally:
            self._pass_on()

    async def _turn(self, owner: str) -> None:
        """Wait for a place; one that was given at the moment of a cancellation goes on."""
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(owner, deque()).append(place)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self._pass_on()
            raise

    def _pass_on(self) -> None:
        """Give a place to the next owner's first, who then is the last in turn."""
        while self._waiting:
            owner = next(iter(self._waiting))
            mine = self._waiting.pop(owner)
            place = mine.popleft()
            if mine:
                self._waiting[owner] = mine
            if not place.done():  # else it was cancelled
                place.set_result(None)
                return
        self._free += 1


class Verifier:
    """Runs foreign verify and check functions; one that is slow or fails costs its row only.

    Each call runs in a daemon thread of its own, because a thread cannot be ended: one that never
    returns is left behind and must not keep the process alive. There are at most MAX_STUCK of them,
    and one owner's are at most half of what is left, so that an owner whose rows are slow does not
    end everybody's verifications.
    """

    def __init__(
        self,
        verify: Verify,
        workers: int,
        timeout_s: float,
        check: Check = lambda _task, _row: None,
    ) -> None:
        self._verify = verify
        self._check = check
        self._turns = Turns(workers)
        self._timeout_s = timeout_s
        self._stuck = Counter[str]()

    async def judge(self, item: Unjudged) -> Finding:
        """The finding. A row's refusal is told in words, any other exception by its type only."""
        async with self._turns.of(item.principal):
            return await self._in_time(
                item.principal,
                lambda: _finding(self._verify, item),
                self._timeout_s,
                Finding(error="verifier stuck"),
                Finding(error=f"timeout after {self._timeout_s:g} s"),
            )

    async def refusal(self, owner: str, task: str, example: str) -> str | None:
        """Why a row is refused before its request is answered, or None.

        None as well where that cannot be told in CHECK_S: the row is judged after the answer, in
        more time. Not counted among the verifications at once, which may take seconds.
        """
        return await self._in_time(
            owner, lambda: self._check(task, orjson.loads(example)), CHECK_S, None, None
        )

    async def _in_time(
        self, owner: str, work: Callable[[], T], limit_s: float, stuck: T, late: T
    ) -> T:
        """What the work returns, or ``late``, or ``stuck`` where too many threads are left over."""
        if self._stuck[owner] >= MAX_STUCK - self._stuck.total():
            return stuck
        future = _in_thread(work)
        done, _ = await asyncio.wait({future}, timeout=limit_s)
        if done:
            return future.result()
        self._stuck[owner] += 1
        future.add_done_callback(lambda _work: self._stuck.subtract([owner]))
        return late


def _in_thread(work: Callable[[], T]) -> "asyncio.Future[T]":
    """Run in a daemon thread; the future has its value or its exception."""
    loop, outcome = asyncio.get_running_loop(), Future[T]()

    def run() -> None:
        try:
            value = work()
        except Exception as error:
            outcome.set_exception(error)
        else:
            if not loop.is_closed():  # the service ended while a slow verifier went on
                outcome.set_result(value)

    threading.Thread(target=run, name="verify", daemon=True).start()
    return asyncio.wrap_future(outcome)


def _finding(verify: Verify, item: Unjudged) -> Finding:
    error: str | None = None
    try:
        known = item.example_id or ""
        row = known if item.example is None else orjson.loads(item.example)
        try:
            verdict = verify(item, row)
        except RowRefusedError as refusal:
            error = f"row refused: {refusal}"[:MAX_ERROR]
            if refusal.verdict is None:
                return Finding(error=error)
            verdict = refusal.verdict
        reward, format_ = float(verdict.reward), float(verdict.format)
    except Exception as failure:
        return Finding(error=type(failure).__name__)
    if not (math.isfinite(reward) and math.isfinite(format_)):
        return Finding(error="reward not finite")
    return Finding(reward, format_, verdict.extracted, error)
