"""The outermost layer: only paths that are written out go in, and everything out is labelled.

Paths are compared as the bytes of the request line, before any decoding, so that no spelling
(``//``, ``%2f``, ``..``, ``;``, case, absolute form) can mean one thing here and another behind.
"""

import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agent.gateway.errors import ApiError, ClientGoneError
from agent.gateway.metrics import Metrics
from agent.gateway.settings import LOOPBACK_NAMES

LOG = logging.getLogger("anchorage.gateway")
ONE_MODEL = b"/v1/models/"  # and a name
MODEL_PATH = re.compile(rb"/v1/models/(?![./])(?:[A-Za-z0-9_@-]|%40|%2[Ff]|[./](?![./])){1,256}")
CLIENT_CLOSED = 499  # what the log says of a client that left; nobody receives it
METHODS = {"POST": ("POST",), "GET": ("GET", "HEAD")}


@dataclass(frozen=True, slots=True)
class Door:
    """What one path does: its name in metrics and log, its method, its answer."""

    name: str
    method: str
    answer: Callable[[Request], Awaitable[Response]]


class Doorkeeper:
    """ASGI: path and host allow-list, ids and version on all responses, one log line.

    doors: by the raw path; ``ONE_MODEL`` stands for all models. inner: told of the application's
    begin and end, asked nothing else.
    """

    def __init__(
        self,
        inner: ASGIApp,
        doors: Mapping[bytes, Door],
        *,
        metrics: Metrics,
        version: Callable[[], str],
        loopback_only: Callable[[], bool],
    ) -> None:
        self._inner = inner
        self._doors = doors
        self._metrics = metrics
        self._version = version
        self._loopback_only = loopback_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it here."""
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._inner(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.perf_counter()
        door = self._door(scope)
        request_id = secrets.token_hex(16)
        scope.setdefault("state", {})["request_id"] = request_id
        sent = _Labels(send, request_id, self._version)
        try:
            response = await self._let_in(door, Request(scope, receive, sent))
            await response(scope, receive, sent)
        except ApiError as error:
            await _answer(error, scope, receive, sent)
        except ClientGoneError:
            sent.status = CLIENT_CLOSED
        except Exception as error:  # its message may quote a prompt; its type cannot
            LOG.error("failed", extra={"fields": _place(error) | {"request_id": request_id}})
            failed = ApiError(500, "internal error", kind="server_error", code="internal")
            await _answer(failed, scope, receive, sent)
        finally:
            self._note(door.name if door else "other", sent.status, began, scope)

    def _door(self, scope: Scope) -> Door | None:
        raw: bytes = scope.get("raw_path") or scope["path"].encode()
        if raw != ONE_MODEL and (door := self._doors.get(raw)) is not None:
            return door
        return self._doors[ONE_MODEL] if MODEL_PATH.fullmatch(raw) else None

    async def _let_in(self, door: Door | None, request: Request) -> Response:
        if door is None:
            raise ApiError(404, "no such path", code="not_found")
        if self._loopback_only() and _host(request.scope) not in LOOPBACK_NAMES:
            raise ApiError(421, "host: not this machine", code="wrong_host")
        methods = METHODS[door.method]
        if request.method not in methods:
            raise ApiError(405, "Method Not Allowed", headers={"Allow": ", ".join(methods)})
        return await door.answer(request)

    def _note(self, name: str, status: int, began: float, scope: Scope) -> None:
        seconds = time.perf_counter() - began
        self._metrics.answered(name, status, seconds)
        fields = {
            "request_id": scope["state"]["request_id"],
            "endpoint": name,
            "status": status,
            "ms": round(seconds * 1000, 2),
            "principal": scope["state"].get("principal"),
        }
        LOG.info("request", extra={"fields": fields})


class _Labels:
    """``send`` with request id, version and safety headers on the response's start."""

    def __init__(self, send: Send, request_id: str, version: Callable[[], str]) -> None:
        self._send = send
        self._request_id = request_id
        self._version = version
        self.status = 0  # 0: not started

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message["headers"], *self._labels(message["headers"])]
        await self._send(message)

    def _labels(self, headers: list[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, bytes]]:
        there = {name for name, _ in headers}
        yield b"x-request-id", self._request_id.encode()
        yield b"x-content-type-options", b"nosniff"
        if b"x-model-version" not in there:
            yield b"x-model-version", self._version()[:12].encode()
        if b"cache-control" not in there:
            yield b"cache-control", b"no-store"


async def _answer(error: ApiError, scope: Scope, receive: Receive, sent: _Labels) -> None:
    if sent.status == 0:
        await error.response()(scope, receive, sent)


def _host(scope: Scope) -> str:
    """The name in the Host header without its port: another one means another site's page."""
    values = [value for name, value in scope["headers"] if name == b"host"]
    host = values[0].decode("latin-1") if len(values) == 1 else ""
    return re.sub(r":\d+$", "", host).strip("[]").lower()


def _place(error: BaseException) -> dict[str, object]:
    """Type and line of an error, without what it says."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return {"error": type(error).__name__}
    name = trace.tb_frame.f_globals.get("__name__", "")
    return {"error": type(error).__name__, "at": f"{name}:{trace.tb_lineno}"}
