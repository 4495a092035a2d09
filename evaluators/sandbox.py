"""Plug-in verifiers in a process of their own: bounded in CPU, memory and time, killed when over.

The parent sends one JSON line a completion and waits a bounded time for one JSON line back. The
worker asks the kernel for its limits before it runs foreign code: a CPU timer whose signal ends the
process (nothing in Python can catch it), an address-space limit, no file growth, few open files;
starting another process, which would escape them, is refused. A worker that dies, or answers
anything but the question, costs its row (an error, reward 0) and is started again for the next.
"""

import json
import os
import resource
import selectors
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import IO, Any

from agent.errors import UserError
from evaluators.loading import resolve
from evaluators.task import Row, Task, Verdict, failed, judge

MAX_REPLY_BYTES = 1_000_000
END_S = 2.0  # how long a worker that hung up may take to end
BARRED = frozenset(  # audit events of what starts a process
    {"os.fork", "os.forkpty", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "pty.spawn"}
    | {"subprocess.Popen"}
)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one verdict may use."""

    cpu_s: float = 0.1
    wall_s: float = 5.0  # sleeping and waiting included
    memory_bytes: int = 2**30  # address space, on top of what the started worker already holds
    start_s: float = 60.0  # imports of the plug-in


class Sandbox:
    """A verifier behind a pipe; one verdict at a time, safe to share between threads."""

    def __init__(self, spec: str, limits: Limits | None = None) -> None:
        self.spec = spec
        self.limits = limits or Limits()
        self._lock = threading.Lock()
        self._worker: subprocess.Popen[bytes] | None = None
        self._finalizer: weakref.finalize[..., Any] | None = None
        self._asked = 0

    def verify(self, completion: str, row: Row) -> Verdict:
        """The worker's verdict, or an error verdict when it failed, hung or grew too large."""
        with self._lock:
            self._asked += 1
            asked = {"number": self._asked, "completion": completion, "row": dict(row)}
            worker = self._running()
            reply = _exchange(worker, json.dumps(asked, default=str), self.limits.wall_s)
            if isinstance(reply, Mapping) and reply.get("number") == self._asked:
                return Verdict(**reply["verdict"])
            self._stop()
            return failed(f"verifier {self.spec}: {_ending(worker, reply, self.limits)}")

    def close(self) -> None:
        """End the worker, if one runs."""
        with self._lock:
            self._stop()

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._worker is None:
            self._worker = _start(self.spec, self.limits)
            self._finalizer = weakref.finalize(self, _end, self._worker)
        return self._worker

    def _stop(self) -> None:
        if self._finalizer is not None:
            self._finalizer()
        self._worker = self._finalizer = None


def sandboxed(task: Task, spec: str, limits: Limits | None = None) -> Task:
    """The same task with its verifier in a worker process."""
    return replace(task, verify=Sandbox(spec, limits).verify)


def _start(spec: str, limits: Limits) -> "subprocess.Popen[bytes]":
    """A worker that has imported the plug-in and said so; it inherits no secrets."""
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LANG") if name in os.environ}
    worker = subprocess.Popen(
        [sys.executable, "-m", "evaluators.sandbox", spec, json.dumps(asdict(limits))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=kept | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        bufsize=0,  # nothing is left to flush when the worker is gone
        start_new_session=True,
    )
    ready = _read_line(worker.stdout, limits.start_s)
    if ready is None or json.loads(ready or b"null") != "ready":
        _end(worker)
        raise UserError(f"verifier {spec}: its worker did not start within {limits.start_s:g} s")
    return worker


def _end(worker: "subprocess.Popen[bytes]") -> None:
    """Kill the worker and whatever it may have started; it leads a session of its own."""
    with suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()
    for pipe in (worker.stdin, worker.stdout):
        if pipe is not None:
            pipe.close()


def _exchange(
    worker: "subprocess.Popen[bytes]", line: str, wall_s: float
) -> Mapping[str, Any] | bytes | None:
    """The reply as it was parsed; b"" when the worker ended, None when it was too slow."""
    assert worker.stdin is not None
    left = memoryview(line.encode("ascii") + b"\n")
    try:
        while left:
            left = left[os.write(worker.stdin.fileno(), left) :]
    except OSError:  # it ended since its last verdict
        return b""
    reply = _read_line(worker.stdout, wall_s)
    if reply == b"":
        with suppress(subprocess.TimeoutExpired):
            worker.wait(END_S)  # so that its own end is told, not ours
    if not reply:
        return reply
    try:
        value = json.loads(reply)
    except ValueError:  # two lines, or what is no JSON
        return {}
    return value if isinstance(value, Mapping) else {}


def _read_line(pipe: IO[bytes] | None, wall_s: float) -> bytes | None:
    """One line; b"" at the end of the stream or past MAX_REPLY_BYTES, None after ``wall_s``."""
    assert pipe is not None
    read = b""
    deadline = time.monotonic() + wall_s
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while not read.endswith(b"\n"):
            if not selector.select(max(deadline - time.monotonic(), 0)):
                return None
            chunk = os.read(pipe.fileno(), 65536)
            if not chunk or len(read) > MAX_REPLY_BYTES:
                return b""
            read += chunk
    return read


def _ending(
    worker: "subprocess.Popen[bytes]", reply: Mapping[str, Any] | bytes | None, limits: Limits
) -> str:
    """Why there is no verdict, in words."""
    if isinstance(reply, Mapping):
        return "its worker answered something else"
    if reply is None:
        return f"no verdict within {limits.wall_s:g} s"
    if worker.returncode == -signal.SIGPROF:
        return f"more than {limits.cpu_s:g} s of CPU"
    return f"its worker ended ({worker.returncode})"


def _serve(spec: str, limits: Limits) -> None:
    """The worker: verdicts for lines, until the input ends."""
    source, sink = os.fdopen(0, "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the plug-in prints is no reply
    task = resolve(spec)
    _limit(limits)
    _say(sink, "ready")
    for line in source:
        asked = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, limits.cpu_s)
        verdict = judge(replace(task, prefill=None), asked["completion"], asked["row"])
        signal.setitimer(signal.ITIMER_PROF, 0)
        _say(sink, {"number": asked["number"], "verdict": asdict(verdict)})


def _limit(limits: Limits) -> None:
    """Hard limits of the kernel, set once."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # the timer's signal ends the process
    with open("/proc/self/statm", encoding="ascii") as statm:  # noqa: PTH123
        held_bytes = int(statm.read().split()[0]) * resource.getpagesize()
    memory = held_bytes + limits.memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.addaudithook(_bar)


def _bar(event: str, _arguments: tuple[object, ...]) -> None:
    """Refuse to start processes: limits and timers are this process's alone."""
    if event in BARRED:
        raise PermissionError(f"{event}: a verifier may not start a process")


def _say(sink: IO[bytes], value: object) -> None:
    sink.write(json.dumps(value).encode("ascii") + b"\n")
    sink.flush()


if __name__ == "__main__":
    _serve(sys.argv[1], Limits(**json.loads(sys.argv[2])))
