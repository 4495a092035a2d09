"""The outermost layer: only paths written out here go in, and everything that goes out is labelled.

Paths are compared as the bytes of the request line, before any decoding, so that no spelling
(``//``, ``%2f``, ``..``, ``;``, case, absolute form) can mean one thing here and another behind.
"""

import logging
import re
import time
import uuid
from collections.abc import Callable

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agent.gateway.errors import ApiError
from agent.gateway.leaving import ClientGoneError
from agent.gateway.metrics import Metrics
from agent.gateway.settings import LOOPBACK_NAMES

LOG = logging.getLogger("anchorage.gateway")
ENDPOINTS = {
    b"/v1/chat/completions": "chat.completions",
    b"/v1/completions": "completions",
    b"/v1/models": "models",
    b"/v1/feedback": "feedback",
    b"/v1/rewards": "rewards",
    b"/healthz": "healthz",
    b"/metrics": "metrics",
    b"/openapi.json": "openapi",
}
ONE_MODEL = re.compile(rb"/v1/models/(?![./])(?:[A-Za-z0-9_@-]|%40|%2[Ff]|[./](?![./])){1,256}")
CLIENT_CLOSED = 499  # what the log says of a client that left; nobody receives it


class Doorkeeper:
    """ASGI middleware: path and host allow-list, ids and version on all responses, one log line."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        version: Callable[[], str],
        loopback_only: Callable[[], bool],
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._version = version
        self._loopback_only = loopback_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it here."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.perf_counter()
        endpoint = _endpoint(scope)
        scope.setdefault("state", {})
        scope["state"]["request_id"] = request_id = uuid.uuid4().hex
        sent = _Labels(send, request_id, self._version)
        try:
            self._check(scope, endpoint)
            await self._app(scope, receive, sent)
        except ApiError as error:
            await _answer(error, scope, receive, sent)
        except ClientGoneError:
            sent.status = CLIENT_CLOSED
        except Exception as error:  # its message may quote a prompt; its type cannot
            LOG.error("failed", extra={"fields": _place(error) | {"request_id": request_id}})
            failed = ApiError(500, "internal error", kind="server_error", code="internal")
            await _answer(failed, scope, receive, sent)
        finally:
            self._note(endpoint or "other", sent.status, began, scope)

    def _check(self, scope: Scope, endpoint: str | None) -> None:
        if endpoint is None:
            raise ApiError(404, "no such path", code="not_found")
        if self._loopback_only() and _host(scope) not in LOOPBACK_NAMES:
            raise ApiError(421, "host: not this machine", code="wrong_host")

    def _note(self, endpoint: str, status: int, began: float, scope: Scope) -> None:
        seconds = time.perf_counter() - began
        self._metrics.requests.labels(endpoint, str(status)).inc()
        self._metrics.latency.labels(endpoint).observe(seconds)
        fields = {
            "request_id": scope["state"]["request_id"],
            "endpoint": endpoint,
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
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self._request_id
            headers.setdefault("x-model-version", self._version()[:12])
            headers.setdefault("cache-control", "no-store")
            headers["x-content-type-options"] = "nosniff"
        await self._send(message)


async def _answer(error: ApiError, scope: Scope, receive: Receive, sent: _Labels) -> None:
    if sent.status == 0:
        await error.response()(scope, receive, sent)


def _endpoint(scope: Scope) -> str | None:
    raw: bytes = scope.get("raw_path") or scope["path"].encode()
    return ENDPOINTS.get(raw) or ("model" if ONE_MODEL.fullmatch(raw) else None)


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
