"""A streamed answer: read ahead from the engine, stamped, checked to its end, passed on."""

import asyncio
import logging

import httpx
import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from agent.gateway.answers import (
    DONE,
    BrokenStreamError,
    Events,
    aborted,
    is_usage,
)
from agent.gateway.errors import (
    ApiError,
    ClientGoneError,
    answer_timeout,
    bad_gateway,
    cancelled,
    gone,
)
from agent.gateway.exchange import Exchange, engine_error
from agent.gateway.wire import WaitTimer
from agent.store.experience import Status

LOG = logging.getLogger("anchorage.gateway")
BUFFER_EVENTS = 8192  # read ahead of a slow client, so that it cannot delay a swap
END = b""  # in the buffer: nothing follows


class StreamedAnswer(Response):
    """The engine's events as they come, stamped; the end is sent only when the whole was sound.

    The engine is read ahead of the client: its place is given back when generation ends, however
    slowly the client reads. Nothing is sent before the first event: a failure that comes before it
    is an error of its own (vLLM sends its refusal of a request as the only event of a 200).
    """

    media_type = "text/event-stream"

    def __init__(self, exchange: Exchange) -> None:
        assert exchange.reply is not None
        version = exchange.route.version[:12]
        headers = {"x-model-version": version, "x-accel-buffering": "no"}
        super().__init__(headers=headers)
        del self.headers["content-length"]
        self._exchange = exchange
        self._reply = exchange.reply
        self._form = exchange.answer_form()
        self._began = False
        self._refusal: ApiError | None = None  # a failure before the first event
        self._ready: asyncio.Queue[bytes] = asyncio.Queue(BUFFER_EVENTS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the end, or until the client leaves; then nothing is generated any more.

        Two tasks beside the caller: one reads the engine, one waits for the client's disconnect and
        then cancels the first. A client that does not read for ``silence_timeout_s`` counts as one
        that has left; ``uncancel`` tells the timer's cancellation from one that came from outside.
        """
        reader = asyncio.create_task(self._read())
        watch = asyncio.create_task(gone(receive))
        watch.add_done_callback(lambda _: reader.cancel())
        sender = asyncio.current_task()
        assert sender is not None
        unread = WaitTimer(sender.cancel, asyncio.get_running_loop())
        limit_s = self._exchange.parts.settings.silence_timeout_s
        try:
            piece = await self._next()
            if self._refusal is not None:
                raise self._refusal
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            while piece:
                unread.begin(limit_s)
                await send({"type": "http.response.body", "body": piece, "more_body": True})
                unread.end()
                piece = await self._next()
            await send({"type": "http.response.body", "body": b""})
        except asyncio.CancelledError:
            if unread.expired and not sender.uncancel():
                raise ClientGoneError from None
            raise
        finally:
            unread.close()
            await cancelled(reader, watch)
            await self._reply.close()
            self._exchange.close()

    async def _next(self) -> bytes:
        """Everything that is ready, joined; empty at the end."""
        pieces = [await self._ready.get()]
        while pieces[-1] and not self._ready.empty():
            pieces.append(self._ready.get_nowait())
        if len(pieces) > 1 and not pieces[-1]:
            self._ready.put_nowait(END)
        return b"".join(pieces)

    async def _read(self) -> None:
        """Engine to buffer.

        Order: the row is handed over and the place given back, then the end is put: a client that
        has seen the end can ask for its reward, and a swap does not wait for a slow reader.
        """
        try:
            status, last = await self._all()
            if (
                self._refusal is not None
                and self._refusal.status < httpx.codes.INTERNAL_SERVER_ERROR
            ):
                self._exchange.close()  # the client's mistake: not counted against the engine
            else:
                self._exchange.finish(status)
            await self._ready.put(last)
            await self._ready.put(END)
        except asyncio.CancelledError:
            self._exchange.finish("cancelled")
            while not self._ready.empty():
                self._ready.get_nowait()
            self._ready.put_nowait(END)
            raise

    async def _all(self) -> tuple[Status, bytes]:
        """Pass every event on; the status to record, and the last event."""
        try:
            async with asyncio.timeout(self._exchange.parts.settings.answer_timeout_s):
                await self._events()
            return "ok", self._form.end()
        except Exception as error:
            failure = self._api_error(error)
            if not self._began:
                self._refusal = failure
            return "error", self._form.failure(failure.body)
        finally:
            await self._reply.close()

    async def _events(self) -> None:
        """Read beyond the last event to the end of the reply, so that the connection is kept."""
        events, done = Events(), False
        async for data in self._reply.pieces():
            for event in events.feed(data):
                self._exchange.refuse_mixed()
                done = event == DONE
                if not done:
                    await self._pass_on(event)
        self._exchange.refuse_mixed()
        if not done:
            raise BrokenStreamError("no end")

    async def _pass_on(self, event: bytes) -> None:
        if aborted(event):
            raise BrokenStreamError("aborted")
        if event.startswith(b'data: {"error"'):
            if self._began:
                raise BrokenStreamError("engine error")
            status = orjson.loads(event[6:])["error"].get("code")
            constrained = self._exchange.call.constrained
            raise engine_error(status, event[6:], constrained=constrained)
        if not self._began:
            self._began = True
            self._exchange.first_event()
        call = self._exchange.call
        usage = is_usage(event)
        # Parsing every event is the dearest step of a stream: without capture only the first one
        # (the answer's id) and the usage chunk are parsed.
        if (usage or call.captures_text or self._exchange.answered.response_id is None) and (
            event.startswith(b"data: {")
        ):
            self._exchange.answered.read(orjson.loads(event[6:]), text=call.captures_text)
        if (not usage or call.wants_usage) and (piece := self._form.event(event)):
            await self._ready.put(piece)

    def _api_error(self, error: Exception) -> ApiError:
        """A failure as the client's error."""
        if isinstance(error, httpx.HTTPError):
            error = self._exchange.route.upstream.failure(error)
        elif isinstance(error, TimeoutError):
            error = answer_timeout()
        elif not isinstance(error, ApiError):
            if not isinstance(error, BrokenStreamError):  # a fault of ours, by its type only
                LOG.error("stream failed", extra={"fields": {"error": type(error).__name__}})
            error = bad_gateway("the engine broke off", "engine_failed")
        assert isinstance(error, ApiError)
        return error
