"""The outermost ASGI layer: only listed paths are answered; all answers get ids and a version.

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
from agent.sections_running import LOOPBACK_NAMES

LOG = logging.getLogger("anchorage.gateway")
ONE_MODEL = b"/v1/models/"  # and a name
MODEL_PATH = re.compile(rb"/v1/models/(?![./])(?:[A-Za-z0-9_@-]|%40|%2[Ff]|[./](?![./])){1,256}")
CLIENT_CLOSED = 499  # status in log and metrics of a client that left before its answer
METHODS = {"POST": ("POST",), "GET": ("GET", "HEAD"), "GET, POST": ("GET", "HEAD", "POST")}


@dataclass(frozen=True, slots=True)
class PublicPath:
    """One path: its name in metrics and log, its method, and the function that answers it."""

    name: str
    method: str
    answer: Callable[[Request], Awaitable[Response]]


class AllowList:
    """ASGI application that answers the listed paths and refuses every other one.

    paths: by the raw path; ``ONE_MODEL`` stands for all models. inner: receives the lifespan
    messages and no requests. version: digest served now, for the ``x-model-version`` header.
    loopback_only: whether only requests with a Host header of this machine are answered.
    """

    def __init__(
        self,
        inner: ASGIApp,
        paths: Mapping[bytes, PublicPath],
        *,
        metrics: Metrics,
        version: Callable[[], str],
        loopback_only: Callable[[], bool],
    ) -> None:
        self._inner = inner
        self._paths = paths
        self._metrics = metrics
        self._version = version
        self._loopback_only = loopback_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or pass lifespan messages on."""
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._inner(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; every exception becomes an error in OpenAI's shape, here and only here.

        An unexpected exception is logged by type and line: its message may quote a
        prompt. Nothing is sent where an answer has already begun; the server then breaks it off.
        """
        began = time.perf_counter()
        path = self._find(scope)
        request_id = secrets.token_hex(16)
        scope.setdefault("state", {})["request_id"] = request_id
        labelled = _LabelledSend(send, request_id, self._version)
        try:
            response = await self._answer(path, Request(scope, receive, labelled))
            await response(scope, receive, labelled)
        except ApiError as error:
            await _send_error(error, scope, receive, labelled)
        except ClientGoneError:
            labelled.status = CLIENT_CLOSED
        except Exception as error:
            LOG.error("failed", extra={"fields": _place(error) | {"request_id": request_id}})
            internal = ApiError(500, "internal error", kind="server_error", code="internal")
            await _send_error(internal, scope, receive, labelled)
        finally:
            self._log(path.name if path else "other", labelled.status, began, scope)

    def _find(self, scope: Scope) -> PublicPath | None:
        raw: bytes = scope.get("raw_path") or scope["path"].encode()
        if raw != ONE_MODEL and (path := self._paths.get(raw)) is not None:
            return path
        return self._paths[ONE_MODEL] if MODEL_PATH.fullmatch(raw) else None

    async def _answer(self, path: PublicPath | None, request: Request) -> Response:
        if path is None:
            raise ApiError(404, "no such path", code="not_found")
        if self._loopback_only() and _host(request.scope) not in LOOPBACK_NAMES:
            raise ApiError(421, "host: not this machine", code="wrong_host")
        methods = METHODS[path.method]
        if request.method not in methods:
            raise ApiError(405, "Method Not Allowed", headers={"Allow": ", ".join(methods)})
        return await path.answer(request)

    def _log(self, name: str, status: int, began: float, scope: Scope) -> None:
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


class _LabelledSend:
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
        present = {name for name, _ in headers}
        yield b"x-request-id", self._request_id.encode()
        yield b"x-content-type-options", b"nosniff"
        if b"x-model-version" not in present:
            yield b"x-model-version", self._version()[:12].encode()
        if b"cache-control" not in present:
            yield b"cache-control", b"no-store"


async def _send_error(
    error: ApiError, scope: Scope, receive: Receive, labelled: _LabelledSend
) -> None:
    if labelled.status == 0:
        await error.response()(scope, receive, labelled)


def _host(scope: Scope) -> str:
    """The name in the Host header, less its port.

    A web page of another site that reaches this machine by DNS rebinding has another name in it.
    """
    values = [value for name, value in scope["headers"] if name == b"host"]
    host = values[0].decode("latin-1") if len(values) == 1 else ""
    return re.sub(r":\d+$", "", host).strip("[]").lower()


def _place(error: BaseException) -> dict[str, object]:
    """Type and line of an error, without its message."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return {"error": type(error).__name__}
    name = trace.tb_frame.f_globals.get("__name__", "")
    return {"error": type(error).__name__, "at": f"{name}:{trace.tb_lineno}"}
