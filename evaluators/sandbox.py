"""Own tasks in sandboxed processes: no home, no writing, no network, no processes left over.

    this process -- pipes --> keeper --fork--> server --fork--> one process a verdict
                                                     --fork--> one process for key, fields, gold ...

The keeper enters the namespaces, runs no code of the task, and at the end kills whatever is left
below it. The server gives up its rights before it imports the task's file, and forks for each
verdict, so that what one verdict changes in a module is gone with its process. Time is kept by the
server on the kernel's clocks. A verdict that fails, hangs or grows costs its row: an error, reward
0. ``Protections`` reports which of the kernel's means are active on this
machine; where Landlock or seccomp is missing, the file has to be trusted.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from agent.errors import UserError
from evaluators.sandbox_worker import FIXED, Limits, parsed, read_line
from evaluators.task import Message, Row, Source, Task, Verdict, failed

END_S = 5.0  # how long the keeper may take to kill what is left


@dataclass(frozen=True, slots=True)
class Protections:
    """Which of the kernel's means hold on this machine."""

    active: frozenset[str]  # user, pid, network, ipc, mount, landlock, seccomp

    def lines(self) -> list[str]:
        """One line a promise: what is prevented and by what, or that it is not."""
        promises = (
            ("reading the service's home", "landlock", "mount"),
            ("reading other files", "landlock"),
            ("writing and removing files", "landlock", "seccomp"),
            ("network", "network", "seccomp"),
            ("starting processes from a verdict", "seccomp"),
            ("processes left over", "pid", "keeper"),
        )
        lines = []
        for promise, *means in promises:
            by = ", ".join(name for name in means if name in self.active | {"keeper"})
            lines.append(f"{promise}: {f'prevented ({by})' if by else 'possible'}")
        if not self.complete:
            lines.append("what is possible here is up to the task's file: use files you trust")
        return lines

    @property
    def complete(self) -> bool:
        """Whether everything above is prevented; if not, the file has to be trusted."""
        return {"landlock", "seccomp"} <= self.active


class Sandbox:
    """A task behind a pipe; one question at a time, safe to share between threads."""

    def __init__(
        self, spec: str, limits: Limits | None = None, hidden: Iterable[Path] = ()
    ) -> None:
        self.spec = spec
        self.limits = limits or Limits()
        self._hidden = [str(path.resolve()) for path in (*hidden, *_homes())]
        self._lock = threading.Lock()
        self._worker: subprocess.Popen[bytes] | None = None
        self._finalizer: weakref.finalize[..., Any] | None = None
        self._asked = 0
        self._ready: dict[str, Any] | None = None

    def verify(self, completion: str, row: Row) -> Verdict:
        """The worker's verdict, or an error verdict when it failed, hung or grew too large."""
        return self._judged({"call": "verify", "completion": completion, "row": dict(row)})

    def converse(self, messages: Sequence[Message], row: Row) -> Verdict:
        """The same of a conversation."""
        return self._judged({"call": "converse", "messages": list(messages), "row": dict(row)})

    def _judged(self, question: Mapping[str, Any]) -> Verdict:
        reply = self._ask(question)
        if isinstance(reply, str):
            return failed(f"verifier {self.spec}: {reply}")
        return Verdict(**reply["value"])

    def call(self, name: str, row: Row) -> Any:
        """One of FUNCTIONS of a row.

        Raises:
            ValueError: what the function raised, or how its process ended.
        """
        reply = self._ask({"call": name, "row": dict(row)})
        if isinstance(reply, str):
            raise ValueError(f"task {self.spec}: {name}: {reply}")
        return reply["value"]

    def task(self) -> Task:
        """The task as this process sees it: its data, and functions that ask the worker.

        Raises:
            UserError: a spec that names no task, or a worker that does not start.
        """
        with self._lock:
            self._running()
            assert self._ready is not None
            described = self._ready["task"]
        parts: dict[str, Any] = {name: described[name] for name in FIXED}
        parts |= {name: self._function(name) for name in described["functions"]}
        parts["converse"] = self.converse if described["converses"] else None
        return Task(source=Source(**described["source"]), verify=self.verify, **parts)

    def protections(self) -> Protections:
        """What holds for the worker."""
        with self._lock:
            self._running()
            assert self._ready is not None
            return Protections(frozenset(self._ready["active"]))

    def close(self) -> None:
        """End the worker, if one runs."""
        with self._lock:
            self._stop()

    def _function(self, name: str) -> Callable[[Row], Any]:
        return lambda row: self.call(name, row)

    def _ask(self, question: Mapping[str, Any]) -> Mapping[str, Any] | str:
        """The reply with its ``value``, or why there is none."""
        with self._lock:
            self._asked += 1
            worker = self._running()
            line = json.dumps({**question, "number": self._asked}, default=str)
            reply = _exchange(worker, line, self.limits.wall_s + END_S)
            if isinstance(reply, Mapping) and reply.get("number") == self._asked:
                return reply if "value" in reply else str(reply.get("error"))
            self._stop()
            return _ending(worker, reply, self.limits)

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._worker is not None:
            return self._worker
        worker, ready = _start(self.spec, self.limits, self._hidden)
        self._worker = worker
        self._finalizer = weakref.finalize(self, _end, worker)
        if self._ready is not None and self._ready["task"] != ready["task"]:
            self._stop()
            raise UserError(f"task {self.spec}: its file has changed; start the service again")
        self._ready = ready
        return worker

    def _stop(self) -> None:
        if self._finalizer is not None:
            self._finalizer()
        self._worker = self._finalizer = None


@cache
def protections() -> Protections:
    """What the kernel of this machine gives to a sandbox, measured once in one of our tasks."""
    sandbox = Sandbox("evaluators.tasks.piqa:TASK")
    try:
        return sandbox.protections()
    finally:
        sandbox.close()


def _homes() -> list[Path]:
    """What must not be read: the service's home and the user's."""
    service = Path(os.environ.get("ANCHORAGE_HOME") or ".anchorage")
    return [service, *([Path(os.environ["HOME"])] if os.environ.get("HOME") else [])]


def _start(
    spec: str, limits: Limits, hidden: list[str]
) -> tuple["subprocess.Popen[bytes]", dict[str, Any]]:
    """A worker that has imported the plug-in, and how it described it; it inherits no secrets."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    paths = os.pathsep.join(path for path in sys.path if path)
    worker = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "evaluators.sandbox_worker",
            spec,
            json.dumps(asdict(limits)),
            *hidden,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=kept | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},  # a fork copies one thread only
        bufsize=0,  # nothing is left to flush when the worker is gone
        start_new_session=True,
    )
    line = read_line(worker.stdout, limits.start_s)
    ready = parsed(line) if line else None
    if isinstance(ready, dict) and "task" in ready:
        return worker, ready
    _end(worker)
    if isinstance(ready, dict) and "error" in ready:
        raise UserError(ready["error"])
    raise UserError(f"verifier {spec}: its worker did not start within {limits.start_s:g} s")


def _end(worker: "subprocess.Popen[bytes]") -> None:
    """Have the keeper kill everything below it, and itself end; kill it where it does not."""
    worker.terminate()
    try:
        worker.wait(END_S)
    except subprocess.TimeoutExpired:
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
    reply = read_line(worker.stdout, wall_s)
    if reply == b"":
        with suppress(subprocess.TimeoutExpired):
            worker.wait(END_S)  # so that its own end is told, not ours
    if not reply:
        return reply
    value = parsed(reply)
    return value if isinstance(value, Mapping) else {}


def _ending(
    worker: "subprocess.Popen[bytes]", reply: Mapping[str, Any] | bytes | None, limits: Limits
) -> str:
    """Why there is no reply, in words."""
    if isinstance(reply, Mapping):
        return "its worker answered something else"
    if reply is None:
        return f"no answer within {limits.wall_s:g} s"
    return f"its worker ended ({worker.returncode})"
