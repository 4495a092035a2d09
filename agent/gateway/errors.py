"""What ends a request before its answer: errors in OpenAI's shape, and clients that disconnect.

OpenAI clients turn the errors into their own exceptions; work for a client that has left is
cancelled at once.
"""

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

import orjson
from starlette.responses import Response
from starlette.types import Receive

T = TypeVar("T")


class ApiError(Exception):
    """An answer that is an error: status, message, and OpenAI's type, param and code."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = error_body(message, kind, param, code)
        self.headers = dict(headers or {})

    def response(self) -> Response:
        """The error as an HTTP response."""
        return Response(self.body, self.status, self.headers, media_type="application/json")


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> bytes:
    """``{"error": {message, type, param, code}}``."""
    return orjson.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}})


def unavailable(message: str, code: str, retry_after_s: int) -> ApiError:
    """503: nothing was generated, asking again is safe."""
    headers = {"Retry-After": str(retry_after_s)}
    return ApiError(503, message, kind="server_error", code=code, headers=headers)


def bad_gateway(message: str, code: str) -> ApiError:
    """502: the engine failed inside this request."""
    return ApiError(502, message, kind="server_error", code=code)


def answer_timeout() -> ApiError:
    """504: the whole answer took longer than ``gateway.answer_timeout_s``."""
    return ApiError(504, "the answer took too long", kind="server_error", code="answer_timeout")


class ClientGoneError(Exception):
    """The client closed the connection before its answer was complete."""


async def until_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, or ClientGoneError as soon as the client closes the connection.

    The work runs in the caller's task and a second task waits for the disconnect, which then
    cancels the first: one task fewer than running both beside the caller. ``uncancel`` tells that
    cancellation from one that came from outside, which is passed on.
    """
    worker = asyncio.current_task()
    assert worker is not None
    left = False

    def stop(watch: "asyncio.Task[None]") -> None:
        nonlocal left
        if not watch.cancelled():
            left = True
            worker.cancel()

    watch = asyncio.create_task(gone(receive))
    watch.add_done_callback(stop)
    try:
        return await work
    except asyncio.CancelledError:
        if left and not worker.uncancel():
            raise ClientGoneError from None
        raise
    finally:
        # First, or ending the watch would cancel the caller.
        watch.remove_done_callback(stop)
        watch.cancel()


async def gone(receive: Receive) -> None:
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def cancelled(*tasks: "asyncio.Future[Any]") -> None:
    """Cancel tasks and wait until they have ended, whatever their outcome."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
