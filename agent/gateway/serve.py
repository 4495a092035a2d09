"""The public and the admin application on their sockets, in one process."""

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import cast

import orjson
import uvicorn
from starlette.applications import Starlette

from agent.errors import UserError
from agent.gateway.connections import (
    ConnectionTable,
    PublicConnection,
    backlog_for,
    raise_descriptor_limit,
)
from agent.sections_running import GatewaySettings

GRACE_S = 30  # for running answers to end after the signal to stop
GC_THRESHOLD = 50_000  # new objects before the collector looks for cycles; default 700
SWITCH_INTERVAL_S = 0.0005  # a writing thread delays an answer by this; Python's is 0.005


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, event, and the fields the event carries."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, without a traceback: an exception's message may quote a client's text."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        if record.exc_info and record.exc_info[0]:
            line["error"] = record.exc_info[0].__name__
        return orjson.dumps(line | getattr(record, "fields", {})).decode()


def serve(
    public: Starlette,
    admin: Starlette,
    settings: GatewaySettings,
    *,
    port: int,
    admin_socket: Path,
) -> None:
    """Run until a signal; UserError, with nothing started, when an address cannot be bound."""
    listening = public_socket(settings.host, port)
    try:
        private = private_socket(admin_socket)
    except BaseException:
        listening.close()
        raise
    _log_as_json()
    _prefer_answers()
    try:
        server = public_server(public, settings)
        with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
            runner.run(_both(server, listening, server_of(admin), private, public))
    finally:
        admin_socket.unlink(missing_ok=True)


def public_socket(host: str, port: int) -> socket.socket:
    """A bound TCP socket.

    Made with IPPROTO_TCP: asyncio sets TCP_NODELAY, without which small answers wait for the
    client's acknowledgement, only on sockets that name the protocol.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise UserError(f"port: {host}:{port} cannot be bound ({error.strerror})") from error
    return sock


def private_socket(path: Path) -> socket.socket:
    """A bound unix socket; the file of one that is not listened on is replaced.

    The umask gives it mode 0600 when it is made: a chmod afterwards would leave it open for a
    moment.
    """
    _clear(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        sock.bind(str(path))
    except OSError as error:
        sock.close()
        raise UserError(f"admin socket: {path} cannot be bound ({error.strerror})") from error
    finally:
        os.umask(mask)
    return sock


def _clear(path: Path) -> None:
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink(missing_ok=True)
            return
    raise UserError(f"admin socket: {path} is in use; allowed: one gateway a home")


class _Server(uvicorn.Server):
    """uvicorn's server without its signal handlers, which would stop both servers at once."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def public_server(app: Starlette, settings: GatewaySettings) -> uvicorn.Server:
    """The server of the public application, with as many descriptors as this process may have."""
    descriptors = raise_descriptor_limit()
    table = ConnectionTable(settings, descriptors)
    protocol = cast(type[asyncio.Protocol], partial(PublicConnection, table))
    return server_of(app, protocol, backlog_for(descriptors))


def server_of(
    app: Starlette, protocol: type[asyncio.Protocol] | None = None, backlog: int = 128
) -> uvicorn.Server:
    """A uvicorn server without access log, signal handlers and websockets."""
    config = uvicorn.Config(
        app,
        http=protocol or "httptools",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=backlog,
        timeout_graceful_shutdown=GRACE_S,
        ws="none",
    )
    return _Server(config)


async def _both(
    public: uvicorn.Server,
    listening: socket.socket,
    admin: uvicorn.Server,
    private: socket.socket,
    app: Starlette,
) -> None:
    """Serve both; the admin side ends after the public one.

    A signal first refuses the requests that wait for a place, then lets running answers end: a
    controller can follow that on the admin socket.
    """

    def stop() -> None:
        app.state.parts.admission.drain()
        public.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    background = asyncio.create_task(admin.serve(sockets=[private]))
    try:
        await public.serve(sockets=[listening])
    finally:
        admin.should_exit = True
        await background


def _prefer_answers() -> None:
    """Fewer pauses of the event loop.

    The collector leaves out the modules loaded so far (``freeze``) and runs less often; threads
    that write rows or verify give the interpreter back sooner.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD)
    sys.setswitchinterval(SWITCH_INTERVAL_S)


def _log_as_json() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False  # not shown
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for noisy in ("httpx", "httpcore", "uvicorn.error"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
