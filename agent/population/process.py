"""One engine, one process: the process that starts engines, and the JSON lines spoken with one.

    caller  {"method", "arguments"}  ->  engine
    caller  <-  {"result"}  or  {"error", "user"}

The first line an engine writes is {"result": pid}; the second, once vLLM runs, {"result": null} or
why it did not start. It answers one call at a time and ends when its caller hangs up, also in the
middle of a call. Every engine leads a process group, which ends as a whole: with tensor parallelism
vLLM's engine core and its workers are processes of that group.

Starting an engine is mostly importing. ``EngineLauncher`` keeps one process that has imported vLLM
and forks it for each engine: 9-14 s for the first engine, 1.1-1.5 s for every later one.

Why not multiprocessing's forkserver with the same preload (measured, embedded model, two cores):
each engine imports the caller's main module again (2.1-3.0 s instead of 1.1-1.5 s, and inside a Ray
actor that module is Ray's worker); a preload that fails is ignored and costs 12-20 s an engine;
nothing public ends it, so 545 MB stay until the caller ends; and it reaps an engine at once, so
that the number of the engine's group is no longer safe to kill.
"""

import gc
import json
import os
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from agent.errors import UserError
from agent.population.placement import (
    EngineOptions,
    base_environment,
    cpu_runtime,
    environment,
    own_cores,
)
from agent.population.process_group import end_others
from agent.population.remote import Json, RemoteEngine, answer
from agent.population.schedule import Engine, EngineStartError
from agent.population.vllm import preload

LIMIT_S = 3600.0  # no call, nor the start, may take longer: the engine hangs
MODULE = "agent.population.process"
REQUEST_BYTES = 65536
CLOSE_S = 2.0  # for the launcher to end its engines


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


# --- the caller's side -------------------------------------------------------------------------


class EngineProcess(RemoteEngine):
    """The caller's end of an engine in another process (``EngineLauncher.engine`` starts one).

    It starts while the caller goes on; the first call, or ``ready``, waits for it.
    """

    def __init__(
        self, connection: socket.socket, logs: Sequence[Path | None] = (), limit_s: float = LIMIT_S
    ):
        super().__init__(self._ask)
        connection.settimeout(limit_s)
        self._channel = Channel(connection)
        self._logs = [log for log in logs if log is not None]
        self._pid = 0
        self._pidfd: int | None = None  # opened while the process surely lives: never another's
        self._started = False

    def ready(self) -> None:
        """Wait until it has started.

        Raises:
            EngineStartError: It says why it cannot.
            EngineLostError: It died.
        """
        if self._pidfd is None:
            self._pid = int(self._receive())
            self._pidfd = os.pidfd_open(self._pid)
        if not self._started:
            try:
                self._receive()
            except UserError as error:
                raise EngineStartError(str(error)) from None
            self._started = True

    def close(self) -> None:
        """End the engine and its process group at once: nothing in it has to be saved.

        The engine ends its group when the channel closes; it is also ended from here, because one
        that hangs does not notice. Waits for the engine's own end, where it ever said its pid.
        """
        self._channel.close()
        if self._pidfd is not None:
            if not select.select([self._pidfd], [], [], 0)[0]:  # else its launcher ends the group
                end_others(self._pid)
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            select.select([self._pidfd], [], [])
            os.close(self._pidfd)
            self._pidfd = None

    def _ask(self, method: str, arguments: Json) -> Any:
        """One call and its result."""
        self.ready()
        try:
            self._channel.send({"method": method, "arguments": arguments})
        except (OSError, ValueError) as error:
            raise EngineLostError(self._lost(error)) from error
        return self._receive()

    def _receive(self) -> Any:
        """The next result, or the error it stands for."""
        try:
            reply = self._channel.receive()
        except (OSError, EOFError, ValueError) as error:
            raise EngineLostError(self._lost(error)) from error
        if "error" not in reply:
            return reply["result"]
        raise UserError(reply["error"]) if reply["user"] else EngineLostError(reply["error"])

    def _lost(self, error: Exception) -> str:
        """What is known about a lost engine: the reason and the last line in its logs."""
        for log in self._logs:
            if last := last_line(log):
                return f"engine: {error}; the last line of {log}: {last}"
        return f"engine: {error}"


class EngineLauncher:
    """The caller's end of the process that forks engines; ``close`` ends it and all of them."""

    def __init__(self, log: Path | None = None):
        self._log = log
        self._start()

    def engine(self, options: EngineOptions, limit_s: float = LIMIT_S) -> EngineProcess:
        """A new engine, which starts while the caller goes on. A dead launcher is started again."""
        near, far = socket.socketpair()
        with far:
            try:
                self._request(options, far)
            except OSError:
                self.close()
                self._start()
                self._request(options, far)
        return EngineProcess(near, [options.log, self._log], limit_s)

    def close(self) -> None:
        """End the launcher and every engine that is still open.

        One that still imports has no engine yet, and would notice only afterwards: it is killed.
        """
        self._requests.close()
        try:
            self._child.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()

    def _request(self, options: EngineOptions, far: socket.socket) -> None:
        """Hand the launcher the options of an engine and its end of the channel."""
        socket.send_fds(self._requests, [json.dumps(options.to_json()).encode()], [far.fileno()])

    def _start(self) -> None:
        """Start the process; it imports vLLM while the caller goes on."""
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        output = subprocess.DEVNULL if self._log is None else _opened(self._log)
        with far:
            self._child = subprocess.Popen(
                [sys.executable, "-m", MODULE, str(far.fileno())],
                env=os.environ | base_environment() | cpu_runtime(),
                pass_fds=[far.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C is the caller's to handle
            )
        if output != subprocess.DEVNULL:
            os.close(output)
        self._requests = near


def last_line(log: Path) -> str:
    """The last line of a file with something on it, shortened; empty where there is none."""
    if not log.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").splitlines()
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")


def _opened(log: Path) -> int:
    """A descriptor that appends to a log."""
    log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


# --- the launcher's process --------------------------------------------------------------------


def launch(requests: socket.socket) -> None:
    """Fork an engine for each request until the caller hangs up; then end those that are left.

    An engine that ended, however, is a zombie until its group is ended: the number of the group
    cannot come to mean another one meanwhile.
    """
    engines: dict[int, tuple[int, str]] = {}  # pidfd -> pid, its temporary folder
    while True:
        ready = select.select([requests.fileno(), *engines], [], [])[0]
        for pidfd in engines.keys() & set(ready):
            _reap(pidfd, *engines.pop(pidfd))
        if requests.fileno() not in ready:
            continue
        request, descriptors, _, _ = socket.recv_fds(requests, REQUEST_BYTES, 1)
        if not descriptors:
            break
        folder = tempfile.mkdtemp(prefix="anchorage-engine-")
        pid = os.fork()  # this process has one thread: nothing can be held locked in the child
        if pid == 0:
            for pidfd in engines:  # the other engines'
                os.close(pidfd)
            _become(requests, request, descriptors[0], folder)
        os.close(descriptors[0])
        engines[os.pidfd_open(pid)] = pid, folder
    for pidfd, engine in engines.items():
        _reap(pidfd, *engine)


def _reap(pidfd: int, pid: int, folder: str) -> None:
    """End an engine's group, collect the engine, delete its temporary files.

    A killed vLLM leaves sockets and rendezvous files, which would pile up in /tmp.
    """
    end_others(pid)
    os.kill(pid, signal.SIGKILL)  # a zombie does not mind
    os.waitpid(pid, 0)
    os.close(pidfd)
    shutil.rmtree(folder, ignore_errors=True)


def _become(requests: socket.socket, request: bytes, descriptor: int, folder: str) -> None:
    """Be an engine in a fork of the launcher; does not return."""
    os.setsid()  # before anything that could start a process
    requests.close()
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    try:
        options = EngineOptions.from_json(json.loads(request))
        run_engine(socket.socket(fileno=descriptor), options)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    _end()


# --- the engine's process ----------------------------------------------------------------------


def run_engine(connection: socket.socket, options: EngineOptions) -> None:
    """Be an engine until the caller hangs up. The process should do nothing else, ever."""
    if options.log is not None:
        output = _opened(options.log)
        os.dup2(output, sys.stdout.fileno())
        os.dup2(output, sys.stderr.fileno())
        os.close(output)
    threading.Thread(target=_end_with, args=[connection.fileno()], daemon=True).start()
    channel = Channel(connection)
    channel.send({"result": os.getpid()})
    try:
        engine = _start(options)
    except Exception as error:  # the boundary of the process: the caller reports it
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        reason = " ".join(str(error).split())[:300]
        channel.send({"error": f"engine: {kind}{reason}", "user": True})
        raise
    channel.send({"result": None})
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


def _end_with(descriptor: int) -> None:
    """End this process and its group when the other end of the socket is gone, busy or not.

    Polled in a thread, because a main thread inside a call of vLLM does not look.
    """
    watch = select.poll()
    watch.register(descriptor, select.POLLRDHUP | select.POLLHUP)
    watch.poll()
    _end()


def _end() -> None:
    """End this engine and its group, with no clean-up that could hang."""
    end_others(os.getpid())
    os._exit(0)


def _start(options: EngineOptions) -> Engine:
    """Take the cores, then start vLLM on them: torch's threads inherit what is set before them."""
    cores = own_cores(options)
    os.environ.update(environment(options, cores, os.environ.get("CUDA_VISIBLE_DEVICES")))
    if cores:
        os.sched_setaffinity(0, cores)
    import torch

    from agent.population.vllm import VllmEngine

    if threads := options.threads or len(cores):
        torch.set_num_threads(threads)  # the runtime may have read its variables before the fork
    return VllmEngine(options)


def compile_cache(folder: str) -> Path:
    """A folder for what torch compiles, which nobody else can write in.

    torch loads and runs what it finds there, and everybody may make a folder of this name in the
    machine's temporary one before we do; then it is one with a name that nobody could foresee.
    """
    path = Path(folder) / f"torchinductor_{os.getuid()}"
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    private = stat.S_ISDIR(found.st_mode) and not found.st_mode & 0o022
    if private and found.st_uid == os.getuid():
        return path
    return Path(tempfile.mkdtemp(prefix="torchinductor_", dir=folder))


def main(descriptor: str) -> None:
    """Import what engines need, then serve the inherited socket."""
    # Engines have temporary folders of their own, but what torch compiled serves the next one, too.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compile_cache(tempfile.gettempdir())))
    gc.disable()  # imports make no garbage, and what they leave is shared with every engine
    preload()
    gc.freeze()
    gc.enable()
    with socket.socket(fileno=int(descriptor)) as requests:
        launch(requests)


if __name__ == "__main__":
    main(sys.argv[1])
