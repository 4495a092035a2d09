"""After an answer: the interaction is stored, and its reward verified where a task was named.

Order: the interaction first, then the verdict, so that a process that ends in between leaves an
unjudged one, which the next process verifies. Only the check of a row comes before the answer.
Checks and verifications run in threads of their own, bounded in time and in number.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TypeVar

from sqlalchemy.exc import OperationalError

from agent.gateway.requests import Call, TaskAsked, kept
from agent.gateway.verifier import Finding, Verifier
from agent.store.experience import ExperienceStore, Interaction, Judgement, Unjudged
from agent.store.experience_db import is_away

LOG = logging.getLogger("anchorage.gateway")
BATCH = 256  # rows of one transaction
ROWS_LINGER_S = 0.2  # rows wait this long for company, unless somebody waits for one of them
LINGER_S = 0.01  # verdicts, which come in company
AGAIN_S = 1.0  # between two attempts to write while a database server is away
ORPHAN_AGE_S = 60.0  # an unjudged row older than this lost its process
TICK_S = 1e-6  # verdicts of one batch get moments of their own, in order

T = TypeVar("T")
S = TypeVar("S")

# Writes a batch; the first argument: it may have been written already, before a server was lost.
Write = Callable[[bool, Sequence[T]], list[S]]
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

    async def refusal(self, owner: str, asked: TaskAsked) -> str | None:
        """Why the row of a request is refused before it is answered, or None."""
        if asked.example is None:
            return None
        return await self._verifier.refusal(owner, asked.task, asked.example)

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
            rows = await _surely(self._record, batch, "rows")
            for item in (item for row in rows for item in _to_judge(row)):
                self._judge(item)
            for row, _ in batch:
                self.end(row.inference_id)
                self._rows.task_done()
            self._owed -= len(batch)

    def _record(self, again: bool, batch: Sequence[tuple[Interaction, Call]]) -> list[Interaction]:
        """In a thread: normalising and hashing a long prompt takes a while.

        ``again``: the answer of a server that was lost never came; what it wrote is not repeated.
        """
        rows = [replace(row, **kept(call)) for row, call in batch]
        known = {row.inference_id for row in rows if again and self._store.find(row.inference_id)}
        self._store.record(row for row in rows if row.inference_id not in known)
        return rows

    async def _write_verdicts(self) -> None:
        while True:
            batch = [await self._verdicts.get()]
            await asyncio.sleep(LINGER_S)
            _fill(batch, self._verdicts)
            now = time.time()
            dated = [replace(item, judged=now + i * TICK_S) for i, item in enumerate(batch)]
            await _surely(self._record_verdicts, dated, "verdicts")
            for _ in batch:
                self._verdicts.task_done()
            self._owed -= len(batch)

    def _record_verdicts(self, _again: bool, batch: Sequence[Judgement]) -> list[Judgement]:
        self._store.judge(batch)  # a verdict that was written already stands
        return list(batch)

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
    ids["principal"] = row.principal
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


async def _surely(write: Write[T, S], batch: Sequence[T], what: str) -> list[S]:
    """As ``_written``, in a thread, as often as a database server is away; new rows wait behind."""
    again = False
    while True:
        try:
            return await asyncio.to_thread(_written, partial(write, again), batch, what)
        except Exception as error:
            if not is_away(error):
                raise
        again = True
        await asyncio.sleep(AGAIN_S)


def _written(write: Callable[[Sequence[T]], list[S]], batch: Sequence[T], what: str) -> list[S]:
    """What became of a batch in the store, whose failure is not the endpoint's.

    Where it is one row that cannot be written, such as one with text that is no Unicode, each is
    written by itself: other clients' rows of the same moment are not lost with it. Where the
    database fails (locked, disk full), each would fail, after a long wait.
    """
    try:
        return write(batch)
    except Exception as error:
        if is_away(error):
            raise
        if isinstance(error, OperationalError):
            _failed(what, len(batch), error)
            return []
        if len(batch) > 1:
            return [row for each in batch for row in _written(write, [each], what)]
        _failed(what, 1, error)
    return []


def _failed(what: str, count: int, error: Exception) -> None:
    """By type only: a database's message may quote what a client wrote."""
    LOG.error(f"{what} lost", extra={"fields": {"count": count, "error": type(error).__name__}})
