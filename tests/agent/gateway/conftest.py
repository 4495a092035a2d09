"""A gateway on a real socket, and a fake engine behind a transport: it answers, or fails as set."""

import asyncio
import contextlib
import json
import shutil
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from starlette.applications import Starlette

from agent.gateway.admin import create_admin
from agent.gateway.app import create_app
from agent.gateway.requests import ServedModel
from agent.gateway.serve import private_socket, public_server, public_socket, server_of
from agent.sections_running import GatewaySettings
from agent.store.experience import ExperienceStore, Unjudged

A = "a" * 64
B = "b" * 64
TINY = ServedModel("tiny", 4096, frozenset({"gsm8k", "countdown"}))
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # a default one reads every CA, for each client


class Chunks(httpx.AsyncByteStream):
    """A streamed body, and whether its reader stayed to the end."""

    def __init__(self, engine: "FakeEngine", pieces: AsyncIterator[bytes]) -> None:
        self.engine, self.pieces, self.ended = engine, pieces, False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for piece in self.pieces:
            yield piece
        self.ended = True

    async def aclose(self) -> None:
        self.engine.running.discard(self)
        self.engine.broken_off += not self.ended


class FakeEngine(httpx.AsyncBaseTransport):
    """Answers every prompt with ``tokens`` times the name of its weights."""

    def __init__(self) -> None:
        self.weights = "A"
        self.tokens = 5
        self.delay_s = 0.0  # before each token
        self.fault = ""  # abort, error, cut, stuck, refuse, down, silent, nonsense
        self.seen: list[tuple[str, dict[str, Any]]] = []
        self.running: set[Chunks] = set()
        self.broken_off = 0
        self.text: str | None = None
        self.finish = "stop"

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        self.seen.append((request.url.raw_path.decode(), body))
        if self.fault == "down":
            raise httpx.ConnectError("no such socket")
        if self.fault == "silent":
            raise httpx.ReadTimeout("nothing")
        if self.fault == "refuse":
            error = {
                "message": "too long",
                "type": "BadRequestError",
                "param": "messages",
                "code": 400,
            }
            return httpx.Response(400, json={"error": error})
        if self.fault == "error":
            return httpx.Response(500, json={"error": {"message": "CUDA out of memory at 0x7f"}})
        if self.fault == "nonsense":
            return httpx.Response(200, content=b"<html>")
        if body.get("stream"):
            chunks = Chunks(self, self._stream(body))
            self.running.add(chunks)
            return httpx.Response(200, stream=chunks)
        chunks = Chunks(self, self._whole(body))
        self.running.add(chunks)
        return httpx.Response(200, stream=chunks)

    def _head(self, body: dict[str, Any], kind: str) -> dict[str, Any]:
        return {"id": "chatcmpl-engine", "object": kind, "created": 1, "model": body["model"]}

    def _choices(self, body: dict[str, Any], text: str) -> list[dict[str, Any]]:
        finish = "abort" if self.fault == "abort" else self.finish
        base = [
            {"index": i, "logprobs": None, "finish_reason": finish}
            for i in range(body.get("n") or 1)
        ]
        if "prompt" in body:
            return [c | {"text": text} for c in base]
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if tools := self._tools(body):
            name = tools[0]["function"]["name"]
            call = {
                "id": "call_1",
                "type": "function",
                "function": {"name": name, "arguments": '{"x": 1}'},
            }
            message = {"role": "assistant", "content": None, "tool_calls": [call]}
        return [c | {"message": message} for c in base]

    async def _whole(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        words = []
        for _ in range(self.tokens):
            await asyncio.sleep(self.delay_s)
            words.append(self.weights)
        if self.fault == "stuck":
            await asyncio.sleep(3600)
        usage = {
            "prompt_tokens": 3,
            "completion_tokens": self.tokens,
            "total_tokens": 3 + self.tokens,
        }
        answer = self._head(body, "chat.completion") | {
            "choices": self._choices(body, self.text or "".join(words)),
            "system_fingerprint": "vllm-0.32",
            "usage": usage,
        }
        yield json.dumps(answer, separators=(",", ":")).encode()

    async def _stream(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        head = self._head(body, "chat.completion.chunk")
        if self.fault.startswith("event "):  # the only event of the stream
            _, code, message = self.fault.split(" ", 2)
            yield self._event({"error": {"message": message, "param": None, "code": int(code)}})
        for i in range(0 if self.fault.startswith("event ") else self.tokens):
            await asyncio.sleep(self.delay_s)
            last = i == self.tokens - 1
            finish = ("abort" if self.fault == "abort" else self.finish) if last else None
            part = (
                {"text": self.weights} if "prompt" in body else {"delta": {"content": self.weights}}
            )
            if tools := self._tools(body):
                part = {"delta": self._call_piece(tools, i)}
            yield self._event(head | {"choices": [{"index": 0, "finish_reason": finish} | part]})
            if self.fault == "cut" and i == 1:
                return
            if self.fault == "stuck" and i == 1:
                await asyncio.sleep(3600)
            if self.fault == "error_event" and i == 1:
                yield self._event({"error": {"message": "inner detail", "code": 500}})
                return
        if body.get("stream_options", {}).get("include_usage"):
            usage = {"prompt_tokens": 3, "completion_tokens": self.tokens}
            yield self._event(
                head | {"choices": [], "usage": usage, "system_fingerprint": "vllm-0.32"}
            )
        yield b"data: [DONE]\n\n"

    @staticmethod
    def _tools(body: dict[str, Any]) -> list[dict[str, Any]]:
        """The tools it calls: each at once, none after a result."""
        last = body["messages"][-1] if "messages" in body else {}
        return [] if last.get("role") == "tool" else body.get("tools") or []

    @staticmethod
    def _call_piece(tools: list[dict[str, Any]], i: int) -> dict[str, Any]:
        """A word, then a call of each tool in three pieces, as vLLM streams them."""
        if i == 0:
            return {"role": "assistant", "content": "so"}
        index, piece = divmod(i - 1, 3)
        if index >= len(tools):
            return {}
        function: dict[str, Any] = {"arguments": ('{"x"', ": 1}", "")[piece]}
        call: dict[str, Any] = {"index": index, "function": function}
        if piece == 0:
            call |= {"id": f"call_{index}", "type": "function"}
            function["name"] = tools[index]["function"]["name"]
        return {"tool_calls": [call]}

    @staticmethod
    def _event(content: dict[str, Any]) -> bytes:
        return b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"


def verdict_of(answer: Unjudged, row: Any) -> SimpleNamespace:
    """Right when the completion has the row's answer in it; raises for rows that have none."""
    if isinstance(row, str):
        row = {"known-1": {"answer": "A"}}[row]
    if row.get("slow"):
        time.sleep(float(row["slow"]))
    if row.get("nan"):
        return SimpleNamespace(reward=float("nan"), format=0.0, extracted=None)
    return SimpleNamespace(
        reward=float(row["answer"] in answer.completion),
        format=1.0,
        extracted=answer.completion[:1],
    )


@dataclass
class Running:
    """A gateway that listens, and everything behind it."""

    app: Starlette
    engine: FakeEngine
    store: ExperienceStore
    port: int
    admin_socket: Path
    settings: GatewaySettings
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def http(self, **headers: str) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers=headers, timeout=20, verify=NO_TLS)

    def admin(self) -> httpx.Client:
        transport = httpx.HTTPTransport(uds=str(self.admin_socket), verify=NO_TLS)
        return httpx.Client(transport=transport, base_url="http://admin", timeout=20)

    def openai(self, **options: Any) -> openai.OpenAI:
        options = {"api_key": "none", "max_retries": 0, "timeout": 20} | options
        if "http_client" not in options:
            options["http_client"] = httpx.Client(verify=NO_TLS, timeout=20)
        return openai.OpenAI(base_url=self.url + "/v1", **options)

    def call(self, function: Callable[[], object]) -> None:
        """Run a function on the gateway's event loop, and wait for it."""
        loop = self.app.state.parts.capture._writers[0].get_loop()

        async def run() -> None:
            function()

        asyncio.run_coroutine_threadsafe(run(), loop).result(10)

    def settled(self) -> None:
        """Wait until everything captured is written and judged."""
        until = time.monotonic() + 10
        parts = self.app.state.parts
        loop = parts.capture._writers[0].get_loop()
        while parts.capture.backlog or parts.capture._pending:
            assert time.monotonic() < until, "capture did not settle"
            asyncio.run_coroutine_threadsafe(parts.capture.drained(), loop).result(10)
            time.sleep(0.002)


Start = Callable[..., Running]


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture(scope="session")
def blank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated database without rows, to copy."""
    path = tmp_path_factory.mktemp("blank") / "experience.db"
    ExperienceStore.open(path).close()
    return path


@pytest.fixture
def store(tmp_path: Path, blank: Path) -> Iterator[ExperienceStore]:
    opened = ExperienceStore.open(shutil.copy(blank, tmp_path / "experience.db"))
    yield opened
    opened.close()


@pytest.fixture
def start(engine: FakeEngine, store: ExperienceStore, tmp_path: Path) -> Iterator[Start]:
    """``start(keys=..., verify=..., **settings)``: a running gateway, stopped at the end."""
    with contextlib.ExitStack() as stack:

        def begin(*, keys: Any = None, verify: Any = verdict_of, **options: Any) -> Running:
            names = ("recover", "versions", "version", "check")
            parts = {name: options.pop(name) for name in names if name in options}
            settings = GatewaySettings(**options)
            app = create_app(
                settings,
                TINY,
                upstream=engine,
                verify=verify,
                experience=store,
                keys=keys,
                **({"version": A} | parts),
            )
            sock = public_socket("127.0.0.1", 0)
            path = tmp_path / "admin.sock"
            private = private_socket(path)
            servers = (public_server(app, settings), sock), (server_of(create_admin(app)), private)
            stack.enter_context(_serving(*servers))
            return Running(app, engine, store, sock.getsockname()[1], path, settings)

        yield begin


@contextlib.contextmanager
def _serving(*listening: tuple[uvicorn.Server, socket.socket]) -> Iterator[None]:
    """Both servers on one event loop in a thread, as in the service's process."""
    loop, ready = asyncio.new_event_loop(), threading.Event()
    stop = asyncio.Event()

    async def run() -> None:
        for server, sock in listening:
            server.config.load()
            server.lifespan = server.config.lifespan_class(server.config)
            await server.startup(sockets=[sock])
        ready.set()
        await stop.wait()
        await asyncio.gather(*(server.shutdown(sockets=[sock]) for server, sock in listening))

    def drive() -> None:
        loop.run_until_complete(run())
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()

    thread = threading.Thread(target=drive)
    thread.start()
    assert ready.wait(20)
    try:
        yield
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(timeout=30)
        assert not thread.is_alive()


@pytest.fixture
def running(start: Start) -> Running:
    """A gateway with the defaults."""
    return start()
