"""HTTP/1.1 client for the engine's unix socket: kept connections, one request at a time on each.

A general client costs more processor time per request than everything else the gateway does, and
on a small machine that time is the engine's. This one knows POST with a length, parses with
httptools (the parser uvicorn uses), and is a plain asyncio protocol. ``WaitTimer`` bounds its many
short waits with a single timer.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import cast

import httptools
import httpx

MAX_BUFFERED_BYTES = 1 << 20  # unread bytes of one reply before the engine is made to wait
MAX_IDLE_S = 3.0  # the engine closes idle connections after 5 s
MAX_IDLE = 64  # connections kept for later


class WaitTimer:
    """Calls ``on_expiry`` once a wait has lasted ``limit_s``.

    A timer of its own for every wait costs more than the wait: a stream has one per token. This
    one is set again only when it fires, for what is left of the wait that is going on then.
    """

    def __init__(self, on_expiry: Callable[[], object], loop: asyncio.AbstractEventLoop) -> None:
        self._on_expiry = on_expiry
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = None
        self._until: float | None = None  # loop time, s; None: no wait is going on
        self.expired = False  # whether ``on_expiry`` was called

    def begin(self, limit_s: float) -> None:
        """A wait begins."""
        self._until = self._loop.time() + limit_s
        if self._timer is not None and self._timer.when() > self._until:
            self.close()
        if self._timer is None:
            self._timer = self._loop.call_at(self._until, self._fire)

    def end(self) -> None:
        """It is over."""
        self._until = None

    def close(self) -> None:
        """No timer any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _fire(self) -> None:
        self._timer = None
        if self._until is None:
            return
        if self._loop.time() < self._until:
            self._timer = self._loop.call_at(self._until, self._fire)
        else:
            self._until, self.expired = None, True
            self._on_expiry()


class Wire:
    """Connections to one socket; a reply belongs to its connection until it is read or closed."""

    def __init__(self, path: Path, *, connect_timeout_s: float, silence_timeout_s: float) -> None:
        self.path = path
        self._connect_timeout_s = connect_timeout_s
        self._silence_timeout_s = silence_timeout_s
        self._idle: deque[_Connection] = deque()

    async def post(self, path: str, body: bytes, request_id: str) -> "WireReply":
        """Send a JSON body; httpx's exceptions say what went wrong, as its transports do."""
        head = (
            f"POST {path} HTTP/1.1\r\nhost: engine\r\ncontent-type: application/json\r\n"
            f"x-request-id: {request_id}\r\ncontent-length: {len(body)}\r\n\r\n"
        ).encode("ascii")
        while (kept := self._kept()) is not None:
            # False: the engine closed it while it was idle, so nothing was done.
            if await kept.ask(head + body, self._silence_timeout_s):
                return WireReply(kept, self, self._silence_timeout_s)
        fresh = await self._connect()
        if await fresh.ask(head + body, self._silence_timeout_s):
            return WireReply(fresh, self, self._silence_timeout_s)
        raise httpx.RemoteProtocolError("closed before an answer")

    def keep(self, connection: "_Connection") -> None:
        """A connection whose reply was read to its end."""
        if len(self._idle) >= MAX_IDLE:
            self._idle.popleft().abort()
        connection.idle_since = asyncio.get_running_loop().time()
        self._idle.append(connection)

    async def close(self) -> None:
        """Drop the idle connections."""
        while self._idle:
            self._idle.pop().abort()

    def _kept(self) -> "_Connection | None":
        """The connection used last, unless it has been idle for too long or was closed."""
        now = asyncio.get_running_loop().time()
        while self._idle:
            connection = self._idle.pop()
            if connection.usable and now - connection.idle_since < MAX_IDLE_S:
                return connection
            connection.abort()
        return None

    async def _connect(self) -> "_Connection":
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                _, connection = await loop.create_unix_connection(_Connection, str(self.path))
        except TimeoutError as error:
            raise httpx.ConnectTimeout("engine socket") from error
        except OSError as error:
            raise httpx.ConnectError(f"engine socket: {error.strerror}") from error
        return connection


class WireReply:
    """A status, and a body to be read whole, in pieces, or not at all."""

    def __init__(self, connection: "_Connection", wire: Wire, silence_timeout_s: float) -> None:
        self.status = connection.status
        self._connection: _Connection | None = connection
        self._wire = wire
        self._silence_timeout_s = silence_timeout_s

    async def read(self) -> bytes:
        """The whole body."""
        return b"".join([piece async for piece in self.pieces()])

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it arrives; the connection is kept once it is complete."""
        while self._connection is not None:
            piece = await self._connection.take(self._silence_timeout_s)
            if piece:
                yield piece
            elif (connection := self._connection) is not None:
                self._connection = None
                connection.give_back(self._wire)

    async def close(self) -> None:
        """Break off what was not read: the engine stops generating."""
        if self._connection is not None:
            self._connection.abort()
            self._connection = None


class _Connection(asyncio.Protocol):
    """One connection, used by one request at a time."""

    def __init__(self) -> None:
        self.status = 0  # 0: no reply has begun
        self.idle_since = 0.0
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._pieces: list[bytes] = []
        self._size = 0
        self._complete = True
        self._keep_alive = False
        self._broken: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._timer = WaitTimer(self._silent, asyncio.get_running_loop())

    # -- the caller's side --------------------------------------------------------------------

    @property
    def usable(self) -> bool:
        """Whether a request can be sent: connected, and the last reply is complete."""
        return self._complete and self._broken is None and self._transport is not None

    async def ask(self, data: bytes, timeout_s: float) -> bool:
        """Send; True when the reply's headers are here, False when the connection closed before."""
        assert self._transport is not None
        self.status, self._complete = 0, False
        self._parser = httptools.HttpResponseParser(self)
        self._transport.write(data)
        try:
            while not self.status:
                if self._broken is not None:
                    return False
                await self._wait(timeout_s)
        except BaseException:  # the engine is silent, or the request was cancelled
            self.abort()
            raise
        return True

    async def take(self, timeout_s: float) -> bytes:
        """What has arrived, or nothing at the end."""
        while not self._pieces:
            if self._complete:
                return b""
            if self._broken is not None:
                raise httpx.RemoteProtocolError("closed within an answer") from self._broken
            await self._wait(timeout_s)
        data = b"".join(self._pieces)
        self._pieces.clear()
        if self._size > MAX_BUFFERED_BYTES and self._transport is not None:
            self._transport.resume_reading()
        self._size = 0
        return data

    def give_back(self, wire: Wire) -> None:
        """Keep it for the next request, if the engine keeps it too."""
        if self.usable and self._keep_alive:
            wire.keep(self)
        else:
            self.abort()

    def abort(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()

    async def _wait(self, timeout_s: float) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        self._timer.begin(timeout_s)
        try:
            await self._waiter
        finally:
            self._timer.end()
            self._waiter = None

    def _silent(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(httpx.ReadTimeout("the engine is silent"))

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # -- the event loop's side ----------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance

    def data_received(self, data: bytes) -> None:
        try:
            if self._complete:
                raise httptools.HttpParserError("bytes without a request")
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._broken = error
            self.abort()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._broken = self._broken or exc or ConnectionResetError()
        self._transport = None
        self._timer.close()
        self._wake()

    # -- the parser's side --------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self.status:
            raise httptools.HttpParserError("a second reply to one request")

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        self._pieces.append(data)
        self._size += len(data)
        if self._size > MAX_BUFFERED_BYTES and self._transport is not None:
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        self._complete = True
        self._keep_alive = self._parser.should_keep_alive()
