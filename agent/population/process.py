"""One engine, one process, spoken to in JSON lines over a socket.

    caller  {"method", "arguments"}  ->  engine
    caller  <-  {"result"}  or  {"error", "user"}

The first line an engine writes is {"result": pid}, or why it did not start. It answers one call
at a time and ends as soon as its caller hangs up, also in the middle of a call.
"""

import json
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from agent.errors import UserError
from agent.population.remote import Json, RemoteEngine, answer
from agent.population.schedule import Engine
from agent.population.vllm import EngineOptions, environment

LIMIT_S = 3600.0  # no call, nor the start, may take longer: the engine hangs


class EngineLostError(Exception):
    """The engine broke, hung or ended; it has to be started again. The message says which."""


class Channel:
    """JSON values over a stream socket, one to a line."""

    def __init__(self, connection: socket.socket):
        self._connection = connection
        self._file = connection.makefile("rwb")

    def send(self, value: Any) -> None:
        """Write one value."""
        self._file.write(json.dumps(value).encode() + b"\n")
        self._file.flush()

    def receive(self) -> Any:
        """Read one value; EOFError when the other end is gone."""
        line = self._file.readline()
        if not line.endswith(b"\n"):
            raise EOFError("the other end is gone")
        return json.loads(line)

    def close(self) -> None:
        """Hang up, whatever another thread is doing with the channel."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


class EngineProcess(RemoteEngine):
    """The caller's end of an engine in another process (``Nursery.engine`` starts one).

    It starts while the caller goes on; the first call, or ``ready``, waits for it.
    """

    def __init__(
        self, connection: socket.socket, logs: Sequence[Path | None] = (), limit_s: float = LIMIT_S
    ):
        super().__init__(self._ask)
        connection.settimeout(limit_s)
        self._channel = Channel(connection)
        self._logs = [log for log in logs if log is not None]
        self._ended: int | None = None  # a pidfd

    def ready(self) -> None:
        """Wait until it has started; UserError when it did not, EngineLostError when it died."""
        if self._ended is None:
            self._ended = os.pidfd_open(int(self._receive()))

    def close(self) -> None:
        """End the engine, at once: it owns nothing that has to be saved. Waits for its end."""
        self._channel.close()
        if self._ended is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._ended, signal.SIGKILL)
            select.select([self._ended], [], [])
            os.close(self._ended)
            self._ended = None

    def _ask(self, method: str, arguments: Json) -> Any:
        """One call and its result."""
        self.ready()
        try:
            self._channel.send({"method": method, "arguments": arguments})
        except (OSError, ValueError) as error:
            raise EngineLostError(self._told(error)) from error
        return self._receive()

    def _receive(self) -> Any:
        """The next result, or the error it stands for."""
        try:
            reply = self._channel.receive()
        except (OSError, EOFError, ValueError) as error:
            raise EngineLostError(self._told(error)) from error
        if "error" not in reply:
            return reply["result"]
        raise UserError(reply["error"]) if reply["user"] else EngineLostError(reply["error"])

    def _told(self, error: Exception) -> str:
        """What is known about a lost engine: the reason and the last line in its logs."""
        for log in self._logs:
            if last := last_line(log):
                return f"engine: {error}; the last line of {log}: {last}"
        return f"engine: {error}"


def last_line(log: Path) -> str:
    """The last line of a file with something on it, shortened; empty where there is none."""
    if not log.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").splitlines()
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")


def attend(connection: socket.socket, options: EngineOptions) -> None:
    """Be an engine until the caller hangs up. The process should do nothing else, ever."""
    if options.log is not None:
        _write_to(options.log)
    threading.Thread(target=_end_with, args=[connection.fileno()], daemon=True).start()
    channel = Channel(connection)
    try:
        engine = _start(options)
    except Exception as error:  # the boundary of the process: the caller reports it
        told = " ".join(str(error).split())[:300]
        channel.send({"error": f"engine: {type(error).__name__}: {told}", "user": True})
        raise
    channel.send({"result": os.getpid()})
    with suppress(EOFError, OSError):
        serve(channel, engine)


def serve(channel: Channel, engine: Engine) -> None:
    """Answer calls until the caller hangs up (EOFError or OSError)."""
    while True:
        channel.send(_reply(engine, channel.receive()))


def _reply(engine: Engine, request: Json) -> Json:
    """One call's result or error; the error's kind tells the caller whether the engine is sound."""
    try:
        return {"result": answer(engine, request["method"], request["arguments"])}
    except UserError as error:
        return {"error": str(error), "user": True}
    except Exception as error:  # the boundary of the process: recorded against the call
        return {"error": f"{type(error).__name__}: {error}", "user": False}


def _write_to(log: Path) -> None:
    """Append what this process says to its log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, sys.stdout.fileno())
    os.dup2(descriptor, sys.stderr.fileno())
    os.close(descriptor)


def _end_with(descriptor: int) -> None:
    """End this process when the other end of the socket is gone, whatever it is doing."""
    watch = select.poll()
    watch.register(descriptor, select.POLLRDHUP | select.POLLHUP)
    watch.poll()
    os._exit(0)


def _start(options: EngineOptions) -> Engine:
    """Take the cores, then start vLLM on them."""
    os.environ.update(environment(options))
    if options.cores:
        os.sched_setaffinity(0, options.cores)
    import torch

    from agent.population.vllm import VllmEngine

    if options.cores:
        torch.set_num_threads(len(options.cores))
    return VllmEngine(options)
