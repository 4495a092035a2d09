"""Client connections of the public server: how many, and how long each may take for its part.

uvicorn's HTTP protocol bounds neither the time nor the size of a request's head, and accepts until
the process has no descriptor left. Here a head has a time and a size, an idle connection a time,
and a table caps the open connections in all and by address. At a cap a new connection takes the
place of the oldest one that is not being answered, so that connections which only wait cannot keep
others out.
"""

import asyncio
import ipaddress
import resource
from collections import Counter
from http import HTTPStatus
from typing import Any, Literal, cast

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from agent.gateway.errors import error_body
from agent.sections_running import GatewaySettings

State = Literal["head", "idle", "busy"]  # waits for a request's head, is kept, is being answered
EVICTABLE: tuple[State, ...] = ("head", "idle")  # in this order
LINGER_S = 2.0  # between the end of the server's side and the connection's
MOST_DESCRIPTORS = 65_536
OTHER_DESCRIPTORS = 128  # databases, logs, idle engine connections, libraries
MESSAGES = {
    400: "the request is not HTTP",
    408: "no request came in time; the connection is closed",
    431: "the request's head is larger than gateway.max_header_bytes",
    503: "too many connections are being answered",
}


def raise_descriptor_limit() -> int:
    """Raise this process's soft limit of open files as far as it may; the limit from then on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = most
    return MOST_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft


def backlog_for(descriptors: int) -> int:
    """Connections the kernel may hold ready: the event loop accepts as many of them in one go."""
    return max(16, min(2048, descriptors // 4))


class ConnectionTable:
    """Open connections by state and address, none of them beyond the settings' caps.

    descriptors: open files this process may have; what the engine's connections, one accepted
    backlog and ``OTHER_DESCRIPTORS`` leave of them bounds the connections too.
    """

    def __init__(self, settings: GatewaySettings, descriptors: int) -> None:
        others = settings.max_in_flight + backlog_for(descriptors) + OTHER_DESCRIPTORS
        self.settings = settings
        self.most = max(8, min(settings.max_connections, descriptors - others))
        self._of_address: Counter[str] = Counter()
        self._total = 0
        # Insertion order is the order of age: a connection that changes its state is put last.
        # Each state is kept twice, for all connections (address "") and for those of an address.
        self._in_state: dict[tuple[str, State], dict[PublicConnection, None]] = {}

    def open(self, connection: "PublicConnection") -> bool:
        """Count a new connection in, dropping another one at a cap; False: it must be refused."""
        address = connection.address
        if self._of_address[address] >= self.settings.max_connections_per_address:
            room = self._evict(address)
        else:
            room = self._total < self.most or self._evict("")
        self._total += 1
        self._of_address[address] += 1
        self._put(connection, "head")
        return room

    def move(self, connection: "PublicConnection", state: State) -> None:
        """Note what a connection does now."""
        self._take(connection)
        self._put(connection, state)

    def close(self, connection: "PublicConnection") -> None:
        """Forget a connection."""
        self._take(connection)
        self._total -= 1
        self._of_address[connection.address] -= 1
        if not self._of_address[connection.address]:
            del self._of_address[connection.address]

    def _evict(self, address: str) -> bool:
        """Drop the oldest connection that is not being answered, of one address or ("") of all."""
        for state in EVICTABLE:
            for connection in self._in_state.get((address, state), ()):
                self.move(connection, "busy")  # dropped once, though its end comes a moment later
                connection.transport.abort()
                return True
        return False

    def _put(self, connection: "PublicConnection", state: State) -> None:
        connection.state = state
        for address in ("", connection.address):
            self._in_state.setdefault((address, state), {})[connection] = None

    def _take(self, connection: "PublicConnection") -> None:
        for address in ("", connection.address):
            key = (address, connection.state)
            del self._in_state[key][connection]
            if not self._in_state[key]:
                del self._in_state[key]


class PublicConnection(HttpToolsProtocol):
    """One client's connection: uvicorn's protocol with a time and a size for what a client sends.

    Whenever no request is being answered one of two timers runs: the idle one between an answer
    and the next byte, else the head's, which also bounds a body that comes after its answer.
    """

    def __init__(
        self,
        table: ConnectionTable,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.state: State = "head"
        self.address = ""
        self.timeout_keep_alive = cast(int, table.settings.idle_timeout_s)
        self._table = table
        self._deadline: asyncio.TimerHandle | None = None
        self._head_bytes = 0  # of this request's parsed headers, trailers included
        self._unparsed_bytes = 0  # received since the head began, all of it still to be completed
        self._in_body = False
        self._ended = False  # this side sends no more

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Join the table, or be refused where every other connection is being answered."""
        super().connection_made(transport)
        self.address = _network(self.client[0] if self.client else "")
        if self._table.open(self):
            self._begin_deadline()
        else:
            self._refuse(503)

    def connection_lost(self, exc: Exception | None) -> None:
        """Leave the table; no timer stays."""
        self._end_deadline()
        self._unset_keepalive_if_required()
        self._table.close(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse; where that begins no answer, the rest of a head or body has the deadline to come.

        The parser reports a header once it is complete, so bytes are counted here as well: one
        header without an end would grow inside the parser.
        """
        if self._ended:
            return
        super().data_received(data)
        if self._ended or self.transport.is_closing() or self._answering():
            return
        if self.state == "idle":
            self._table.move(self, "head")
        if not self._in_body:
            self._unparsed_bytes += len(data)
        if self._unparsed_bytes > self._table.settings.max_header_bytes:
            self._refuse(431)
        elif self._deadline is None:
            self._begin_deadline()

    def on_message_begin(self) -> None:
        """A request's first byte."""
        self._head_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """A piece of the request line's target."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header, or one trailer after a chunked body."""
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The request goes to the application."""
        super().on_headers_complete()
        self._end_deadline()
        self._unparsed_bytes, self._in_body = 0, True
        self._table.move(self, "busy")

    def on_message_complete(self) -> None:
        """The body's last byte."""
        self._in_body = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """The answer's last byte was written."""
        super().on_response_complete()
        if not self._answering():
            self._table.move(self, "idle")

    def send_400_response(self, msg: str) -> None:
        """Refuse what the parser could not read; an answer that has begun is broken off instead."""
        if self._answering():
            if self.cycle.response_started:
                self.transport.abort()
                return
            self.cycle.disconnected = True  # the application's answer must not follow this one
            self.cycle.message_event.set()
        self._refuse(431 if self._head_bytes > self._table.settings.max_header_bytes else 400)

    def timeout_keep_alive_handler(self) -> None:
        """End an idle connection so that a request which crosses the end is asked again.

        A plain close loses that request: the client's bytes meet a closed socket and it gets a
        reset. Here it reads 408, after which the OpenAI clients and Go's ask again; pools find the
        connection readable and drop it. This side is closed first and the other one read for
        ``LINGER_S``, because closing with unread bytes would send a reset that takes the 408 along.
        """
        self._refuse(408)

    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _count(self, size: int) -> None:
        """Add to the size of the head; the parser passes the exception on as an unreadable one."""
        self._head_bytes += size
        if self._head_bytes > self._table.settings.max_header_bytes:
            raise httptools.HttpParserError("head too large")

    def _begin_deadline(self) -> None:
        timeout_s = self._table.settings.header_timeout_s
        self._deadline = self.loop.call_later(timeout_s, self._late)

    def _end_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _late(self) -> None:
        """The head (or a body nobody reads any more) did not come in time."""
        self._deadline = None
        if not self._answering():
            self._refuse(408)

    def _refuse(self, status: int) -> None:
        """Answer without the application, and end the connection."""
        if self._ended or self.transport.is_closing():
            return
        self._ended = True
        self._end_deadline()
        self.transport.write(_response(status))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._deadline = self.loop.call_later(LINGER_S, self.transport.abort)


def _response(status: int) -> bytes:
    message = MESSAGES[status]
    body = error_body(message, "server_error" if status >= 500 else "invalid_request_error")
    head = (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nretry-after: 1\r\nconnection: close\r\n\r\n"
    )
    return head.encode("ascii") + body


def _network(address: str) -> str:
    """What is counted as one client: an IPv4 address, or the /64 that one IPv6 subscriber has."""
    if ":" not in address:
        return address
    parsed = ipaddress.IPv6Address(address.partition("%")[0])
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.IPv6Network((int(parsed) >> 64 << 64, 64)))
