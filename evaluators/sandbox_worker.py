"""The processes of an own task: keeper, server, and a process for each verdict.

Run as ``python -m evaluators.sandbox_worker SPEC LIMITS [HIDDEN ...]`` by evaluators.sandbox, which
asks one JSON line a question and gets one JSON line back.
"""

import gc
import json
import os
import selectors
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, NoReturn

from agent.errors import UserError
from evaluators import confine
from evaluators.loading import resolve
from evaluators.task import Task, judge, judge_conversation

MAX_REPLY_BYTES = 1_000_000
GRACE_S = 0.5  # for a process that closed its pipe without a reply to end, so that its status shows
LOOK_S = 0.5  # between the keeper's looks at whether its own parent is there
FIXED = (  # a task's data; all else are functions of a row
    *("name", "template", "target", "format_weight", "max_tokens", "zero_tolerance", "shots"),
    *("system", "prefill", "version", "graded"),
)
FUNCTIONS = ("key", "fields", "gold", "wrong", "shot_group", "demonstrate", "chat")
VERDICT = {"reward", "format", "extracted", "error"}


@dataclass(frozen=True, slots=True)
class Limits:
    """What one verdict may use."""

    cpu_s: float = 0.1
    wall_s: float = 5.0  # sleeping and waiting included
    memory_bytes: int = 2**30  # address space, on top of what the started worker already holds
    start_s: float = 60.0  # imports of the plug-in


def parsed(line: bytes) -> object:
    """JSON, or None for what is none (two lines, for instance)."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def read_line(pipe: IO[bytes] | None, wall_s: float) -> bytes | None:
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


def _keep(spec: str, limits: Limits, hidden: list[Path]) -> NoReturn:
    """The keeper: fork the server, wait, and leave no process behind.

    It ends when the server ends, when it is told to (SIGTERM), and when its own parent is gone,
    at which it looks; the kernel's signal for that comes when the starting thread ends.
    """
    parent = os.getppid()
    active = confine.isolate(_coverable(hidden, _readable(spec, hidden)))
    confine.adopt_orphans()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, signal.SIGTERM})
    server = os.fork()
    if not server:
        confine.end_with_parent()
        signal.pthread_sigmask(signal.SIG_SETMASK, set())
        _serve(spec, limits, hidden, active)
    os.closerange(0, 3)
    code = None
    while code is None:
        received = signal.sigtimedwait({signal.SIGCHLD, signal.SIGTERM}, LOOK_S)
        if (received and received.si_signo == signal.SIGTERM) or os.getppid() != parent:
            code = 0
        elif os.waitpid(server, os.WNOHANG)[0]:
            code = 1
    _kill_descendants()
    os._exit(code)


def _kill_descendants() -> None:
    """Kill children until none is left: orphans of a killed child become children themselves."""
    import psutil

    while True:
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _serve(spec: str, limits: Limits, hidden: list[Path], active: set[str]) -> NoReturn:
    """The server: import the task without rights, describe it, and answer lines to the last."""
    source, sink = os.fdopen(0, "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the plug-in prints is no reply
    sys.dont_write_bytecode = True
    filters = confine.compiled_filters()
    active = active | confine.restrict(_readable(spec, hidden), limits.memory_bytes, filters)
    if "user" in active:
        confine.limit_processes()
    try:
        task = resolve(spec)
    except UserError as error:
        _say(sink, {"error": str(error)})
        os._exit(1)
    gc.freeze()  # so that a child's collector does not copy what it shares with this process
    _say(sink, {"task": _described(task), "active": sorted(active)})
    verify = replace(task, prefill=None)  # the given words are before the completion already
    functions = _Functions(task, filters)
    for line in source:
        question = json.loads(line)
        if question["call"] in ("verify", "converse"):
            reply = _judged(verify, question, limits, filters)
        else:
            reply = functions.ask(line, limits.wall_s)
        _say(sink, {**reply, "number": question["number"]})
    os._exit(0)


def _described(task: Task) -> dict[str, Any]:
    """A task's data as JSON, and which functions it has."""
    functions = [name for name in FUNCTIONS if getattr(task, name) is not None]
    fixed = {name: getattr(task, name) for name in FIXED}
    described = {**fixed, "source": asdict(task.source), "functions": functions}
    return described | {"converses": task.converse is not None}


def _readable(spec: str, hidden: list[Path]) -> dict[Path, bool]:
    """What the worker may read: the system, Python and its packages, and the task's folder.

    A folder that holds a hidden one is not opened as a whole: of it the modules and packages can
    be read, and the task's file.
    """
    place = spec.rpartition(":")[0]
    file = Path(place).resolve() if place.endswith(".py") else None
    roots = [*map(Path, confine.SYSTEM_FILES), Path(sys.prefix), Path(sys.base_prefix)]
    roots += [Path(entry).resolve() for entry in sys.path if entry]
    roots += [file, file.parent] if file else _package(place)
    roots += [*_package("evaluators"), *_package("agent")]
    readable: dict[Path, bool] = {}
    for root in roots:
        if not any(folder == root or root in folder.parents for folder in hidden):
            readable[root] = True
        elif root.is_dir():
            readable.setdefault(root, False)
            readable |= {child: True for child in root.iterdir() if _is_module(child, hidden)}
    return readable


def _package(module: str) -> list[Path]:
    """Where a module's top package lies: of an editable install no search path names it."""
    found = find_spec(module.partition(".")[0])
    if found is None:
        return []
    alone = [found.origin] if found.has_location and found.origin else []
    return [Path(place).resolve() for place in found.submodule_search_locations or alone]


def _coverable(hidden: list[Path], readable: Mapping[Path, bool]) -> list[Path]:
    """Hidden folders beneath which nothing has to be read."""
    return [folder for folder in hidden if not any(folder in (r, *r.parents) for r in readable)]


def _is_module(path: Path, hidden: list[Path]) -> bool:
    inside = any(folder == path or path in folder.parents for folder in hidden)
    return not inside and (path.suffix == ".py" or (path / "__init__.py").is_file())


def _judged(
    task: Task, question: Mapping[str, Any], limits: Limits, filters: list[bytes]
) -> dict[str, Any]:
    """One verdict from a process of its own: {value} or {error}."""

    def work(sink: IO[bytes]) -> None:
        if question["call"] == "converse":
            verdict = judge_conversation(task, question["messages"], question["row"])
        else:
            verdict = judge(task, question["completion"], question["row"])
        _say(sink, asdict(verdict))

    pid, pipe, to_child = _forked(work, filters)
    os.close(to_child)
    # The first look at the CPU clock comes after cpu_s of waiting, when it can be used up at the
    # earliest; a process that sleeps is looked at again when the rest could be used up.
    reply, deadline = b"", time.monotonic() + limits.wall_s
    error, wait_s = None, limits.cpu_s
    with os.fdopen(pipe, "rb", 0) as replies, selectors.DefaultSelector() as selector:
        selector.register(replies, selectors.EVENT_READ)
        while error is None:
            if selector.select(min(wait_s, max(deadline - time.monotonic(), 0))):
                chunk = os.read(pipe, 65536)
                reply += chunk
                if not chunk or len(reply) > MAX_REPLY_BYTES:
                    break
            left_s = limits.cpu_s - confine.cpu_s(pid)
            wait_s = max(left_s, 0.005)
            if left_s < 0:
                error = f"more than {limits.cpu_s:g} s of CPU"
            elif time.monotonic() >= deadline:
                error = f"no verdict within {limits.wall_s:g} s"
        status = _end(pid, GRACE_S if error is None and not reply else 0.0)
    value = parsed(reply) if reply else None
    if error is None and not reply:
        error = f"its process ended ({os.waitstatus_to_exitcode(status)})"
    if error is None and not (isinstance(value, dict) and value.keys() == VERDICT):
        error = "its process answered something else"
    return {"error": error} if error else {"value": value}


def _end(pid: int, grace_s: float) -> int:
    """Kill a child and return its status; one that ends by itself may do so for ``grace_s``."""
    deadline = time.monotonic() + grace_s
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


class _Functions:
    """A process for the functions of a row that are not verdicts, started when first asked.

    It is one for all rows: keys of thousands of rows are asked at a time.
    """

    def __init__(self, task: Task, filters: list[bytes]) -> None:
        self._task, self._filters = task, filters
        self._child: tuple[int, IO[bytes], IO[bytes]] | None = None

    def ask(self, line: bytes, wall_s: float) -> dict[str, Any]:
        """{value} or {error} of one question."""
        if self._child is None:
            pid, replies, questions = _forked(self._answer, self._filters)
            self._child = pid, os.fdopen(replies, "rb", 0), os.fdopen(questions, "wb", 0)
        pid, replies_pipe, questions_pipe = self._child
        with suppress(BrokenPipeError):
            questions_pipe.write(line)
        reply = read_line(replies_pipe, wall_s)
        value = parsed(reply) if reply else None
        if isinstance(value, dict):
            return value
        _end(pid, 0.0)
        self._child = None
        return {"error": f"no answer within {wall_s:g} s" if reply is None else "its process ended"}

    def _answer(self, sink: IO[bytes]) -> None:
        for line in os.fdopen(0, "rb"):
            question = json.loads(line)
            try:
                value = getattr(self._task, question["call"])(question["row"])
                reply = json.dumps({"value": dict(value) if isinstance(value, Mapping) else value})
            except Exception as error:
                reply = json.dumps({"error": f"{type(error).__name__}: {error}"})
            sink.write(reply.encode("ascii") + b"\n")
            sink.flush()


def _forked(work: Callable[[IO[bytes]], None], filters: list[bytes]) -> tuple[int, int, int]:
    """A child that does ``work`` with its reply pipe: its id, the pipe from it, the pipe to it.

    The child holds these two pipes alone (as 0 and 3), so that it can neither read what the server
    is asked next nor answer in its place.
    """
    questions, to_child = os.pipe()
    from_child, replies = os.pipe()
    pid = os.fork()
    if pid:
        os.close(questions)
        os.close(replies)
        return pid, from_child, to_child
    try:
        os.dup2(questions, 0)
        os.dup2(replies, 3)
        os.closerange(4, confine.MAX_OPEN_FILES)
        confine.end_with_parent()
        if len(filters) > 1:
            confine.apply_filter(filters[1])
        with os.fdopen(3, "wb") as sink:
            work(sink)
        os._exit(0)
    finally:
        os._exit(1)  # whatever the code raised, SystemExit too


def _say(sink: IO[bytes], value: object) -> None:
    sink.write(json.dumps(value).encode("ascii") + b"\n")
    sink.flush()


if __name__ == "__main__":
    _keep(sys.argv[1], Limits(**json.loads(sys.argv[2])), [Path(path) for path in sys.argv[3:]])
