"""The engine's client: replies in any pieces, connections kept or dropped, failures, timers."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.gateway.wire import MAX_BUFFERED_BYTES, WaitTimer, Wire

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
PLAIN = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello"
CHUNKED = (
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n"
)


class Engine:
    """Answers each request with the next of its replies; None closes instead of answering."""

    def __init__(self, *replies: bytes | None, cut: int = 1 << 20) -> None:
        self.replies, self.cut = list(replies), cut
        self.connections, self.heads, self.left = 0, [], asyncio.Event()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                self.heads.append(head)
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                await reader.readexactly(length)
                reply = self.replies.pop(0)
                if reply is None:
                    break
                for start in range(0, len(reply), self.cut):
                    writer.write(reply[start : start + self.cut])
                    await writer.drain()
                    await asyncio.sleep(0)
        except (asyncio.IncompleteReadError, ConnectionError):
            self.left.set()


@asynccontextmanager
async def listening(engine: Serve, folder: Path, idle_s: float = 5.0) -> AsyncIterator[Wire]:
    path = folder / "engine.sock"
    path.unlink(missing_ok=True)
    handling: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        handling.add(task)
        await engine(reader, writer)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    server = await asyncio.start_unix_server(handle, str(path), limit=1 << 22)
    wire = Wire(path, connect_timeout_s=2.0, silence_timeout_s=idle_s)
    try:
        yield wire
    finally:
        await wire.close()
        server.close()
        if handling:
            await asyncio.wait(handling, timeout=5)


Run = Callable[[Callable[[], Coroutine[None, None, None]]], None]


@pytest.fixture(params=["asyncio", "auto"])
def run(request: pytest.FixtureRequest) -> Run:
    """Run a test on asyncio's own loop, and on the one the service takes (uvloop where it is)."""
    config = uvicorn.Config("none", loop=request.param, log_config=None)

    def begin(test: Callable[[], Coroutine[None, None, None]]) -> None:
        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            runner.run(test())

    return begin


async def whole(wire: Wire, body: bytes = b"{}") -> tuple[int, bytes]:
    reply = await wire.post("/v1/completions", body, "id")
    return reply.status, await reply.read()


def test_replies_are_read_and_the_connection_is_used_again(run: Run, tmp_path: Path) -> None:
    async def test() -> None:
        engine = Engine(PLAIN, CHUNKED, PLAIN.replace(b"200 OK", b"400 No"))
        async with listening(engine, tmp_path) as wire:
            assert await whole(wire) == (200, b"hello")
            assert await whole(wire) == (200, b"hello world")
            assert await whole(wire) == (400, b"hello")
            assert engine.connections == 1
            first = engine.heads[0].split(b"\r\n")
            assert first[0] == b"POST /v1/completions HTTP/1.1"
            assert b"x-request-id: id" in first

    run(test)


@settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.integers(1, 40))
def test_a_reply_is_the_same_however_its_bytes_arrive(run: Run, tmp_path: Path, cut: int) -> None:
    async def test() -> None:
        async with listening(Engine(CHUNKED, PLAIN, cut=cut), tmp_path) as wire:
            assert await whole(wire) == (200, b"hello world")
            assert await whole(wire) == (200, b"hello")

    run(test)


def test_a_connection_closed_while_idle_is_not_an_error(run: Run, tmp_path: Path) -> None:
    async def test() -> None:
        engine = Engine(PLAIN, None, PLAIN)
        async with listening(engine, tmp_path) as wire:
            await whole(wire)
            assert await whole(wire) == (200, b"hello")
            assert engine.connections == 2

    run(test)


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (None, httpx.RemoteProtocolError),
        (PLAIN[:-2], httpx.RemoteProtocolError),
        (CHUNKED[:-5], httpx.RemoteProtocolError),
        (b"nonsense\r\n\r\n", httpx.RemoteProtocolError),
    ],
)
def test_an_engine_that_breaks_off_is_told_as_such(
    run: Run, tmp_path: Path, reply: bytes | None, error: type[Exception]
) -> None:
    async def test() -> None:
        engine = Engine(reply) if reply is None else Engine(reply, None)

        async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            if reply:
                writer.write(reply)

        async with listening(once if reply else engine, tmp_path) as wire:
            with pytest.raises(error):
                await whole(wire)

    run(test)


def test_an_engine_that_is_silent_or_absent_is_told_as_such(run: Run, tmp_path: Path) -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async def test() -> None:
        async with listening(silent, tmp_path, idle_s=0.05) as wire:
            with pytest.raises(httpx.ReadTimeout):
                await whole(wire)
        absent = Wire(tmp_path / "absent.sock", connect_timeout_s=1, silence_timeout_s=1)
        with pytest.raises(httpx.ConnectError):
            await whole(absent)

    run(test)


def test_an_answer_nobody_wants_is_broken_off(run: Run, tmp_path: Path) -> None:
    async def test() -> None:
        endless = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n"
        engine = Engine(endless, endless)
        async with listening(engine, tmp_path) as wire:
            reply = await wire.post("/v1/completions", b"{}", "id")
            assert await anext(aiter(reply.pieces())) == b"hello"
            await reply.close()
            await asyncio.wait_for(engine.left.wait(), 5)

    run(test)


def test_a_request_that_is_cancelled_leaves_the_engine(run: Run, tmp_path: Path) -> None:
    async def test() -> None:
        left = asyncio.Event()

        async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()  # until the other side closes
            left.set()

        async with listening(slow, tmp_path) as wire:
            asking = asyncio.create_task(whole(wire))
            await asyncio.sleep(0.05)
            asking.cancel()
            await asyncio.wait_for(left.wait(), 5)

    run(test)


def test_an_engine_waits_for_a_reader_that_is_behind(run: Run, tmp_path: Path) -> None:
    async def test() -> None:
        size = 8 * MAX_BUFFERED_BYTES
        head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size
        async with listening(Engine(head + bytes(size)), tmp_path) as wire:
            reply = await wire.post("/v1/completions", b"{}", "id")
            await asyncio.sleep(0.1)
            assert reply._connection is not None
            assert reply._connection._size < 2 * MAX_BUFFERED_BYTES
            assert len(await reply.read()) == size

    run(test)


def test_bytes_nobody_asked_for_end_a_connection(run: Run, tmp_path: Path) -> None:
    async def test() -> None:
        engine = Engine(PLAIN + b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil", PLAIN)
        async with listening(engine, tmp_path) as wire:
            assert await whole(wire) == (200, b"hello")
            assert await whole(wire) == (200, b"hello")

    run(test)


class Clock:
    """A loop that has nothing but timers; time passes when told."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[asyncio.TimerHandle] = []
        self.set = 0

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, call: Any) -> asyncio.TimerHandle:
        self.timers.append(asyncio.TimerHandle(when, call, (), self))  # type: ignore[arg-type]
        self.set += 1
        return self.timers[-1]

    def _timer_handle_cancelled(self, _handle: asyncio.TimerHandle) -> None:
        pass

    def get_debug(self) -> bool:
        return False

    def pass_(self, seconds: float) -> None:
        until = self.now + seconds
        while due := [t for t in self.timers if t.when() <= until and not t.cancelled()]:
            first = min(due, key=asyncio.TimerHandle.when)
            self.timers.remove(first)
            self.now = first.when()
            first._run()
        self.now = until


@given(st.lists(st.tuples(st.booleans(), st.sampled_from([0.5, 0.9, 1.0, 2.5])), max_size=40))
def test_a_wait_is_late_after_its_limit_and_no_other_is(steps: list[tuple[bool, float]]) -> None:
    """Waits, and times without one, in any order: each wait of the limit or more rings once."""
    clock, fired = Clock(), [0]
    timer = WaitTimer(lambda: fired.__setitem__(0, fired[0] + 1), clock)  # type: ignore[arg-type]
    late = 0
    for waits, seconds in steps:
        if waits:
            timer.begin(1.0)
            late += seconds >= 1.0
        clock.pass_(seconds)
        timer.end()
        assert fired[0] == late
    assert timer.expired == (late > 0)


def test_many_short_waits_take_few_timers() -> None:
    clock = Clock()
    timer = WaitTimer(lambda: None, clock)  # type: ignore[arg-type]
    for _ in range(1000):
        timer.begin(1.0)
        clock.pass_(0.01)
        timer.end()
    assert clock.set <= 12
    assert not timer.expired


def test_a_shorter_limit_is_kept_though_a_longer_one_was_set_before() -> None:
    clock = Clock()
    timer = WaitTimer(lambda: None, clock)  # type: ignore[arg-type]
    timer.begin(60.0)
    timer.end()
    timer.begin(1.0)
    clock.pass_(1.5)
    assert timer.expired
