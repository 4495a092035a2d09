"""The engine behind the endpoint: two of its paths, and what a client gets when it fails."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Literal, Protocol

import httpx

from agent.gateway.errors import ApiError, bad_gateway, unavailable
from agent.gateway.wire import Wire

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
PATHS: dict[str, str] = {"chat.completions": CHAT, "completions": COMPLETIONS}
CONNECT_TIMEOUT_S = 5.0  # to reach the engine
HOST = "http://engine"  # a name for the Host header of a transport


class Reply(Protocol):
    """A status, and a body to be read whole, in pieces, or not at all (then the engine stops)."""

    status: int

    async def read(self) -> bytes:
        """The whole body."""

    def pieces(self) -> AsyncIterator[bytes]:
        """The body as it arrives."""

    async def close(self) -> None:
        """Break off what was not read."""


class Line(Protocol):
    """What carries a request to an engine; failures are httpx's exceptions."""

    async def post(self, path: str, body: bytes, request_id: str) -> Reply:
        """Send a JSON body; return when the reply's headers are there."""

    async def close(self) -> None:
        """Give the connections back."""


class Upstream:
    """One engine: requests to it, and its failures as errors for the client."""

    def __init__(self, line: Line, retry_after_s: int, socket: Path | None = None) -> None:
        self._line = line
        self._retry_after_s = retry_after_s
        self.socket = socket

    @classmethod
    def at(
        cls,
        socket: Path,
        *,
        silence_timeout_s: float,
        retry_after_s: int,
    ) -> "Upstream":
        """The engine that listens on this socket."""
        line = Wire(
            socket, connect_timeout_s=CONNECT_TIMEOUT_S, silence_timeout_s=silence_timeout_s
        )
        return cls(line, retry_after_s, socket)

    async def post(
        self, endpoint: Literal["chat.completions", "completions"], body: bytes, request_id: str
    ) -> Reply:
        """Send a body; the reply's status is here, its content is still to be read."""
        try:
            return await self._line.post(PATHS[endpoint], body, request_id)
        except httpx.HTTPError as error:
            raise self.failure(error) from error

    def failure(self, error: httpx.HTTPError) -> ApiError:
        """503 where the engine cannot be reached, 504 where it is silent, else 502."""
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout):
            return unavailable(
                "the engine is not reachable", "engine_unreachable", self._retry_after_s
            )
        if isinstance(error, httpx.TimeoutException):
            return ApiError(504, "the engine is silent", kind="server_error", code="engine_timeout")
        return bad_gateway("the engine broke off", "engine_failed")

    async def reachable(self) -> bool:
        """Whether a process listens on the socket (true for a transport)."""
        if self.socket is None:
            return True
        try:
            _, writer = await asyncio.open_unix_connection(str(self.socket))
        except OSError:
            return False
        writer.close()
        return True

    async def close(self) -> None:
        """Give its connections back."""
        await self._line.close()


class TransportLine:
    """An engine that is an httpx transport: a remote one, or one that a test plays."""

    def __init__(self, transport: httpx.AsyncBaseTransport, timeout: httpx.Timeout) -> None:
        self._transport = transport
        self._timeout = timeout.as_dict()

    async def post(self, path: str, body: bytes, request_id: str) -> Reply:
        """Send a JSON body."""
        request = httpx.Request(
            "POST",
            HOST + path,
            headers={"content-type": "application/json", "x-request-id": request_id},
            content=body,
            extensions={"timeout": self._timeout},
        )
        return TransportReply(await self._transport.handle_async_request(request))

    async def close(self) -> None:
        """Give the connections back."""
        await self._transport.aclose()


class TransportReply:
    """A transport's response."""

    def __init__(self, response: httpx.Response) -> None:
        self.status = response.status_code
        self._response = response

    async def read(self) -> bytes:
        """The whole body."""
        return await self._response.aread()

    def pieces(self) -> AsyncIterator[bytes]:
        """The body as it arrives."""
        return self._response.aiter_raw()

    async def close(self) -> None:
        """Break off what was not read."""
        await self._response.aclose()
