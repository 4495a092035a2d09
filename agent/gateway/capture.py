"""After an answer: the interaction is stored, and its reward verified where a task was named.

Order: the interaction first, then the verdict, so that a process that ends in between leaves an
unjudged one, which the next process verifies. Only the check of a row comes before the answer.
Checks and verifications run in threads of their own, bounded in time and in number.
"""

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import orjson

from agent.gateway.requests import Call, TaskAsked, kept
from agent.store.experience import ExperienceStore, Interaction, Judgement, Unjudged

MAX_STUCK = 8  # threads still running after their time; more verifications are refused
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


class Verifier:
    """Runs foreign verify and check functions; one that is slow or fails costs its row only.

    Each call runs in a daemon thread of its own, because a thread cannot be ended: one that never
    returns is left behind and must not keep the process alive. After MAX_STUCK of them no more are
    started.
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
        self._places = asyncio.Semaphore(workers)
        self._timeout_s = timeout_s
        self._stuck = 0

    async def judge(self, item: Unjudged) -> Finding:
        """The finding. A row's refusal is told in words, any other exception by its type only."""
        async with self._places:
            return await self._in_time(
                lambda: _finding(self._verify, item),
                self._timeout_s,
                Finding(error="verifier stuck"),
                Finding(error=f"timeout after {self._timeout_s:g} s"),
            )

    async def refusal(self, task: str, example: str) -> str | None:
        """Why a row is refused before its request is answered, or None.

        None as well where that cannot be told in CHECK_S: the row is judged after the answer, in
        more time. Not counted among the verifications at once, which may take seconds.
        """
        return await self._in_time(
            lambda: self._check(task, orjson.loads(example)), CHECK_S, None, None
        )

    async def _in_time(self, work: Callable[[], T], limit_s: float, stuck: T, late: T) -> T:
        """What the work returns, or ``late``, or ``stuck`` where too many threads are left over."""
        if self._stuck >= MAX_STUCK:
            return stuck
        future = _in_thread(work)
        done, _ = await asyncio.wait({future}, timeout=limit_s)
        if done:
            return future.result()
        self._stuck += 1
        future.add_done_callback(self._unstuck)
        return late

    def _unstuck(self, _work: object) -> None:
        self._stuck -= 1


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


LOG = logging.getLogger("anchorage.gateway")
BATCH = 256  # rows of one transaction
ROWS_LINGER_S = 0.2  # rows wait this long for company, unless somebody waits for one of them
LINGER_S = 0.01  # verdicts, which come in company
ORPHAN_AGE_S = 60.0  # an unjudged row older than this lost its process
TICK_S = 1e-6  # verdicts of one batch get moments of their own, in order

OnVerdict = Callable[[str, str, Finding], None]  # task, version, finding


class Capture:
    """Owns the way from the request path to the store. One event loop, one writer."""

    def __init__(
        self,
        store: ExperienceStore,
        verifier: Verifier,
        backlog: int,
        on_verdict: OnVerdict = lambda _task, _version, _finding: None,
        on_drop: Callable[[], None] = lambda: None,
    ) -> None:
        self._store = store
        self._verifier = verifier
        self._on_verdict = on_verdict
        self._on_drop = on_drop
        self._rows: asyncio.Queue[tuple[Interaction, Call]] = asyncio.Queue(backlog)
        self._verdicts: asyncio.Queue[Judgement] = asyncio.Queue()
        self._pending: dict[str, asyncio.Event] = {}
        self._judging: set[asyncio.Task[None]] = set()
        self._owed = 0
        self._writers: list[asyncio.Task[None]] = []
        self._hurry = asyncio.Event()

    @property
    def backlog(self) -> int:
        """Rows and verdicts not yet written."""
        return self._owed

    def begin(self, inference_id: str) -> None:
        """An answer is under way; feedback on it will wait for its row."""
        self._pending[inference_id] = asyncio.Event()

    def end(self, inference_id: str) -> None:
        """The row is written, or there will be none."""
        if event := self._pending.pop(inference_id, None):
            event.set()

    async def refusal(self, asked: TaskAsked) -> str | None:
        """Why the row of a request is refused before it is answered, or None."""
        if asked.example is None:
            return None
        return await self._verifier.refusal(asked.task, asked.example)

    def judge_later(self, items: Iterable[Unjudged]) -> None:
        """Verify answers whose row came after them."""
        for item in items:
            self._judge(item)

    def submit(self, row: Interaction, call: Call) -> None:
        """Take a row without waiting; over the backlog it is counted and dropped."""
        try:
            self._rows.put_nowait((row, call))
            self._owed += 1
            if self._rows.qsize() >= BATCH:
                self._hurry.set()
        except asyncio.QueueFull:
            self._on_drop()
            self.end(row.inference_id)

    async def settle(self, inference_id: str, timeout_s: float) -> None:
        """Wait until the answer's row is written, if it is still on its way."""
        event = self._pending.get(inference_id)
        if event is not None:
            self._hurry.set()
            await _either(event, timeout_s)

    async def start(self) -> None:
        """Begin writing; verify what an earlier process left unjudged."""
        self._writers = [
            asyncio.create_task(self._write_rows()),
            asyncio.create_task(self._write_verdicts()),
        ]
        for orphan in await asyncio.to_thread(self._store.unjudged, time.time() - ORPHAN_AGE_S):
            self._judge(orphan)

    async def drained(self) -> None:
        """Wait until every row and every verdict is written."""
        self._hurry.set()
        await self._rows.join()
        while self._judging:
            await asyncio.wait(set(self._judging))
        await self._verdicts.join()

    async def stop(self, timeout_s: float) -> None:
        """Write what is there, within a time."""
        try:
            await asyncio.wait_for(self.drained(), timeout_s)
        except TimeoutError:
            LOG.error("capture stopped early", extra={"fields": {"backlog": self.backlog}})
        for task in (*self._writers, *self._judging):
            task.cancel()
        await asyncio.gather(*self._writers, *self._judging, return_exceptions=True)

    async def _write_rows(self) -> None:
        while True:
            batch = [await self._rows.get()]
            if self._rows.qsize() < BATCH:
                await _either(self._hurry, ROWS_LINGER_S)
            self._hurry.clear()
            _fill(batch, self._rows)
            try:
                rows = await asyncio.to_thread(self._record, batch)
            except Exception as error:  # the store's failure is not the endpoint's
                _failed("rows", len(batch), error)
            else:
                for item in (item for row in rows for item in _to_judge(row)):
                    self._judge(item)
            for row, _ in batch:
                self.end(row.inference_id)
                self._rows.task_done()
            self._owed -= len(batch)

    def _record(self, batch: list[tuple[Interaction, Call]]) -> list[Interaction]:
        """In a thread: normalising and hashing a long prompt takes a while."""
        rows = [replace(row, **kept(call)) for row, call in batch]
        self._store.record(rows)
        return rows

    async def _write_verdicts(self) -> None:
        while True:
            batch = [await self._verdicts.get()]
            await asyncio.sleep(LINGER_S)
            _fill(batch, self._verdicts)
            now = time.time()
            dated = [replace(item, judged=now + i * TICK_S) for i, item in enumerate(batch)]
            try:
                await asyncio.to_thread(self._store.judge, dated)
            except Exception as error:
                _failed("verdicts", len(batch), error)
            for _ in batch:
                self._verdicts.task_done()
            self._owed -= len(batch)

    def _judge(self, item: Unjudged) -> None:
        self._owed += 1
        task = asyncio.create_task(self._find(item))
        self._judging.add(task)
        task.add_done_callback(self._judging.discard)

    async def _find(self, item: Unjudged) -> None:
        finding = await self._verifier.judge(item)
        self._on_verdict(item.task, item.version, finding)
        self._verdicts.put_nowait(
            Judgement(
                item.inference_id,
                item.choice,
                judged=0.0,  # set when it is written
                reward=finding.reward,
                format=finding.format,
                extracted=finding.extracted,
                error=finding.error,
            )
        )


def _to_judge(row: Interaction) -> list[Unjudged]:
    if row.task is None or row.row_hash is None or row.status != "ok":
        return []
    ids = {"inference_id": row.inference_id, "task": row.task, "version": row.version}
    return [
        Unjudged(
            choice=answer.choice,
            example_id=row.example_id,
            example=row.example,
            completion=answer.completion or "",
            prompt=row.prompt,
            tool_calls=answer.tool_calls,
            **ids,
        )
        for answer in row.answers
    ]


def _fill(batch: list[T], queue: "asyncio.Queue[T]") -> None:
    """What came meanwhile: one transaction for all of them."""
    while len(batch) < BATCH and not queue.empty():
        batch.append(queue.get_nowait())


async def _either(event: asyncio.Event, timeout_s: float) -> None:
    """Wait for the event, but not longer."""
    with suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), timeout_s)


def _failed(what: str, count: int, error: Exception) -> None:
    """By type only: a database's message may quote what a client wrote."""
    LOG.error(f"{what} lost", extra={"fields": {"count": count, "error": type(error).__name__}})
