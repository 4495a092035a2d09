"""From answers to rows: what may be kept is written, what asked for a reward is verified.

Everything here happens after the client has its answer. Order: the row first, then the verdict, so
that a process that dies in between leaves an unjudged row, which the next start picks up.

Verdicts off the request path: each in a thread of its own, bounded in time and in number.
"""

import asyncio
import hashlib
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import orjson

from agent.gateway.requests import Call, TaskAsked
from agent.store.experience import ExperienceStore, Interaction, Judgement, Unjudged
from agent.store.intake import text_hash

MAX_STUCK = 8  # threads still running after their time; more verifications are refused


class VerdictLike(Protocol):
    """What a task's verifier returns."""

    @property
    def reward(self) -> float: ...  # noqa: D102
    @property
    def format(self) -> float: ...  # noqa: D102
    @property
    def extracted(self) -> str | None: ...  # noqa: D102


Verify = Callable[[str, Mapping[str, Any] | str, str], VerdictLike]
"""(task, the row or a known row's id, completion) -> verdict; raises where it cannot tell."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A verdict, or the name of what prevented one."""

    reward: float | None = None
    format: float | None = None
    extracted: str | None = None
    error: str | None = None


class Verifier:
    """Runs a verify function so that a slow or failing one costs a row, never the service."""

    def __init__(self, verify: Verify, workers: int, timeout_s: float) -> None:
        self._verify = verify
        self._places = asyncio.Semaphore(workers)
        self._timeout_s = timeout_s
        self._stuck = 0

    async def judge(
        self, task: str, example_id: str | None, example: str | None, completion: str
    ) -> Finding:
        """The finding; whatever the verifier raises becomes ``error``, by its type's name only."""
        async with self._places:
            if self._stuck >= MAX_STUCK:
                return Finding(error="verifier stuck")
            work = self._in_thread(task, example_id, example, completion)
            done, _ = await asyncio.wait({work}, timeout=self._timeout_s)
            if done:
                return work.result()
            self._stuck += 1
            work.add_done_callback(self._unstuck)
            return Finding(error=f"timeout after {self._timeout_s:g} s")

    def _in_thread(
        self, task: str, example_id: str | None, example: str | None, completion: str
    ) -> "asyncio.Future[Finding]":
        """A daemon thread: a verifier that never returns must not keep the process alive."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Finding] = loop.create_future()

        def run() -> None:
            finding = _finding(self._verify, task, example_id, example, completion)
            if not loop.is_closed():
                loop.call_soon_threadsafe(_settle, future, finding)

        threading.Thread(target=run, name="verify", daemon=True).start()
        return future

    def _unstuck(self, _work: "asyncio.Future[Finding]") -> None:
        self._stuck -= 1


def _finding(
    verify: Verify, task: str, example_id: str | None, example: str | None, completion: str
) -> Finding:
    try:
        row = orjson.loads(example) if example is not None else example_id or ""
        verdict = verify(task, row, completion)
        reward, format_ = float(verdict.reward), float(verdict.format)
    except Exception as error:
        return Finding(error=type(error).__name__)
    if not (math.isfinite(reward) and math.isfinite(format_)):
        return Finding(error="reward not finite")
    return Finding(reward, format_, verdict.extracted)


def _settle(future: "asyncio.Future[Finding]", finding: Finding) -> None:
    if not future.done():
        future.set_result(finding)


LOG = logging.getLogger("anchorage.gateway")
BATCH = 256  # rows of one transaction
ROWS_LINGER_S = 0.2  # rows wait this long for company, unless somebody waits for one of them
LINGER_S = 0.01  # verdicts, which come in company
ORPHAN_AGE_S = 60.0  # an unjudged row older than this lost its process
TICK_S = 1e-6  # verdicts of one batch get moments of their own, in order

T = TypeVar("T")
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
        finding = await self._verifier.judge(
            item.task, item.example_id, item.example, item.completion
        )
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


def kept(call: Call) -> Mapping[str, Any]:
    """Columns of a row that come from the request: text only where the call allows it."""
    if not call.captures_text:
        return {"session_id": call.session_id}
    prompt = orjson.dumps(call.prompt).decode()
    prompt_hash = text_hash(prompt)
    conversation = f"session:{call.session_id}" if call.session_id else prompt_hash
    columns: dict[str, Any] = {
        "session_id": call.session_id,
        "prompt": prompt,
        "prompt_hash": prompt_hash,
        "group_hash": hashlib.sha256(conversation.encode()).hexdigest(),
    }
    return columns | (_task_columns(call.task) if call.task else {})


def row_hash(task: str, example_id: str | None, example: str | None) -> str:
    """What makes two task rows the same: the known id, or the row in any key order."""
    if example is None:
        return text_hash(f"{task}\nid\n{example_id}")
    canonical = orjson.dumps(orjson.loads(example), option=orjson.OPT_SORT_KEYS).decode()
    return text_hash(f"{task}\nrow\n{canonical}")


def _task_columns(asked: TaskAsked) -> dict[str, Any]:
    return {
        "task": asked.task,
        "source": "known" if asked.example is None else "submitted",
        "example_id": asked.example_id,
        "example": asked.example,
        "row_hash": row_hash(asked.task, asked.example_id, asked.example),
    }


def _to_judge(row: Interaction) -> list[Unjudged]:
    if row.task is None or row.status != "ok":
        return []
    ids = {"inference_id": row.inference_id, "task": row.task, "version": row.version}
    return [
        Unjudged(
            choice=answer.choice,
            example_id=row.example_id,
            example=row.example,
            completion=answer.completion or "",
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
