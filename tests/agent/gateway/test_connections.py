"""Connections that send slowly, too much or nothing, and how they are ended."""

import contextlib
import json
import socket
import ssl
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from agent.gateway.connections import ConnectionTable, _network
from agent.sections_running import GatewaySettings

HELLO = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}
HEAD = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n"


@contextlib.contextmanager
def connected(port: int, data: bytes = b"") -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
        sock.sendall(data)
        yield sock


def rest(sock: socket.socket) -> bytes:
    """Everything until the server ends the connection."""
    received = b""
    while data := sock.recv(65536):
        received += data
    return received


def one_answer(sock: socket.socket) -> bytes:
    """The next answer, which is a JSON object in one piece."""
    received = b""
    while not received.endswith(b"}"):
        received += sock.recv(65536)
    return received


def post(body: bytes) -> bytes:
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
    return f"{head}content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode()


@pytest.mark.parametrize("sent", [b"", b"G", b"GET /h", HEAD, HEAD + b"x: y"])
def test_a_head_that_does_not_come_ends_the_connection(start: Any, sent: bytes) -> None:
    running = start(header_timeout_s=0.1)
    with connected(running.port, sent) as sock:
        assert rest(sock).startswith(b"HTTP/1.1 408 ")


def test_a_head_that_comes_byte_by_byte_has_no_more_time(start: Any) -> None:
    running = start(header_timeout_s=0.2)
    with connected(running.port) as sock, contextlib.suppress(OSError):
        until = time.monotonic() + 5
        sock.settimeout(0.02)
        for byte in HEAD * 100:
            sock.sendall(bytes([byte]))
            with contextlib.suppress(TimeoutError):
                assert sock.recv(100).startswith(b"HTTP/1.1 408 ")
                return
            assert time.monotonic() < until
    raise AssertionError("not ended")


def test_a_second_head_has_a_time_too(start: Any) -> None:
    running = start(header_timeout_s=0.1)
    with connected(running.port, HEAD + b"\r\n") as sock:
        assert b" 200 OK" in one_answer(sock)
        sock.sendall(b"GET /h")
        assert rest(sock).startswith(b"HTTP/1.1 408 ")


def test_a_body_after_its_answer_has_a_time(start: Any) -> None:
    running = start(header_timeout_s=0.2)
    late = post(b"").replace(b"length: 0", b"length: 100").replace(b"/v1/chat", b"/nowhere")
    with connected(running.port, late) as sock:
        assert b" 404 " in one_answer(sock)
        sock.sendall(b"x")
        assert rest(sock).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /" + b"x" * 3000 + b" HTTP/1.1\r\n",
        HEAD + b"a: " + b"x" * 3000 + b"\r\n\r\n",
        HEAD + b"a: " + b"x" * 3000,
        HEAD + b"a: b\r\n" * 1000 + b"\r\n",
        post(b"").replace(b"content-length: 0", b"transfer-encoding: chunked")
        + b"0\r\n"
        + b"trailer: x\r\n" * 1000,
    ],
    ids=["target", "header", "unfinished", "many", "trailers"],
)
def test_a_head_that_is_too_large_is_refused(start: Any, sent: bytes) -> None:
    running = start(max_header_bytes=2000)
    with connected(running.port, sent) as sock:
        answer = rest(sock)
    assert answer.startswith(b"HTTP/1.1 431 ")
    error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert "gateway.max_header_bytes" in error["message"]
    assert running.engine.seen == []


def test_a_large_body_is_no_large_head(start: Any) -> None:
    running = start(max_header_bytes=2000, header_timeout_s=0.1)
    body = json.dumps(HELLO | {"user": "x" * 100_000}).encode()
    with connected(running.port, post(body)) as sock:
        time.sleep(0.2)
        sock.sendall(body)
        assert b" 200 OK" in one_answer(sock)


def test_an_idle_connection_is_ended_so_that_a_crossing_request_reads_408(start: Any) -> None:
    """The request is sent after the server has ended its side, which the client has not read."""
    running = start(idle_timeout_s=0.1)
    with connected(running.port, HEAD + b"\r\n") as sock:
        assert b" 200 OK" in one_answer(sock)
        time.sleep(0.4)
        body = json.dumps(HELLO).encode()
        sock.sendall(post(body) + body)
        assert rest(sock).startswith(b"HTTP/1.1 408 ")
    assert running.engine.seen == []


def test_pooled_clients_go_on_after_an_idle_connection_was_ended(start: Any) -> None:
    running = start(idle_timeout_s=0.1)
    with running.http() as client, running.openai() as other:
        for _ in range(3):
            assert client.post("/v1/chat/completions", json=HELLO).status_code == 200
            assert other.chat.completions.create(**HELLO).choices
            time.sleep(0.25)


def test_the_openai_client_asks_again_after_a_408(start: Any) -> None:
    """A pool that does not look at its idle connection sends into the end of it."""
    running = start(idle_timeout_s=0.1)
    statuses: list[int] = []

    class Unseeing(httpx.HTTPTransport):
        """Reuses its connection although it can be read."""

        def handle_request(self, request: httpx.Request) -> httpx.Response:
            for connection in self._pool.connections:
                connection._connection.has_expired = lambda: False  # type: ignore[attr-defined]
            response = super().handle_request(request)
            statuses.append(response.status_code)
            return response

    http = httpx.Client(transport=Unseeing(verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)))
    with running.openai(http_client=http, max_retries=2) as client:
        client.chat.completions.create(**HELLO)
        time.sleep(0.4)
        client.chat.completions.create(**HELLO)
    assert statuses == [200, 408, 200]


def test_at_the_cap_the_oldest_connection_that_is_not_answered_makes_room(start: Any) -> None:
    running = start(max_connections_per_address=8, max_connections=8)
    with contextlib.ExitStack() as stack:
        waiting = [stack.enter_context(connected(running.port, b"GET /h")) for _ in range(8)]
        with running.http() as client:
            assert client.get("/healthz").status_code == 200
        with contextlib.suppress(ConnectionResetError):  # where it had sent more than was read
            assert rest(waiting[0]) == b""
        waiting[7].settimeout(0.1)
        with pytest.raises(TimeoutError):
            waiting[7].recv(1)


def test_connections_that_are_answered_are_not_dropped(start: Any) -> None:
    running = start(max_connections_per_address=8)
    running.engine.fault = "stuck"
    body = json.dumps(HELLO).encode()
    with contextlib.ExitStack() as stack:
        busy = [stack.enter_context(connected(running.port, post(body) + body)) for _ in range(8)]
        until = time.monotonic() + 10
        while running.app.state.parts.admission.in_flight < 8:
            assert time.monotonic() < until
            time.sleep(0.01)
        with connected(running.port, HEAD + b"\r\n") as refused:
            assert refused.recv(65536).startswith(b"HTTP/1.1 503 ")
        busy[0].settimeout(0.1)
        with pytest.raises(TimeoutError):
            busy[0].recv(1)


class FakeTransport:
    def __init__(self) -> None:
        self.aborted = False

    def abort(self) -> None:
        self.aborted = True


class FakeConnection:
    def __init__(self, address: str) -> None:
        self.address, self.state, self.transport = address, "head", FakeTransport()


def test_one_address_cannot_take_the_places_of_another() -> None:
    table = ConnectionTable(
        GatewaySettings(max_connections=20, max_connections_per_address=5), 9999
    )
    honest = FakeConnection("10.0.0.1")
    assert table.open(honest)  # type: ignore[arg-type]
    table.move(honest, "idle")  # type: ignore[arg-type]
    crowd = [FakeConnection("10.0.0.2") for _ in range(50)]
    assert all(table.open(each) for each in crowd)  # type: ignore[arg-type]
    assert not honest.transport.aborted
    assert [each.transport.aborted for each in crowd] == [True] * 45 + [False] * 5
    for each in (honest, *crowd):
        table.close(each)  # type: ignore[arg-type]
    assert (table._total, dict(table._of_address), table._in_state) == (0, {}, {})


def test_heads_that_wait_make_room_before_idle_connections_do() -> None:
    table = ConnectionTable(GatewaySettings(max_connections=8), 9999)
    idle, busy = FakeConnection("a"), FakeConnection("b")
    for each, state in ((idle, "idle"), (busy, "busy")):
        table.open(each)  # type: ignore[arg-type]
        table.move(each, state)  # type: ignore[arg-type]
    waiting = [FakeConnection(str(i)) for i in range(7)]
    assert all(table.open(each) for each in waiting)  # type: ignore[arg-type]
    assert (waiting[0].transport.aborted, idle.transport.aborted) == (True, False)
    for each in waiting[1:]:
        table.move(each, "busy")  # type: ignore[arg-type]
    assert table.open(FakeConnection("new"))  # type: ignore[arg-type]
    assert idle.transport.aborted
    assert not busy.transport.aborted


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::", "2001:db8:1:2::/64"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
    ],
)
def test_an_ipv6_subscriber_counts_as_one(address: str, network: str) -> None:
    assert _network(address) == network


def test_the_descriptors_bound_the_connections() -> None:
    settings = GatewaySettings()
    assert ConnectionTable(settings, 1_000_000).most == settings.max_connections
    assert ConnectionTable(settings, 1024).most == 1024 - 64 - 256 - 128
