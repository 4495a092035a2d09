"""One supervisord per home: services as values, its configuration, and the end of every process.

The `supervisor` library starts, restarts and stops the processes and rotates their logs; here is
the configuration it gets and its XML-RPC on a unix socket. What it cannot do is end the children of
a supervisord that was killed; they are recognised by two marks:

- the session supervisord founded: a session's number is not given again while it has a member;
- a variable in the environment, for processes that founded sessions of their own. A process that
  gives itself a title, as vLLM's do, loses it: what a stack started is therefore listed before its
  supervisor, and with it the session's number, is gone.
"""

import os
import shlex
import subprocess
import sys
import xmlrpc.client
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from supervisor.xmlrpc import SupervisorTransport

from agent.errors import UserError
from agent.home import Home, locked
from deploy.serving.control import UnixTransport

GROUP = "stack"
MARKER = "ANCHORAGE_STACK"  # environment of every process of a stack: its home
GRACE_S = 5.0  # for an orphan to end by itself
SUPERVISOR_S = 20.0  # for supervisord to end its services and itself
REVIVE_S = 60.0  # for an up or down that runs to end
STOP_S = 10.0  # for a service to end by itself
UNINFORMATIVE = (
    "For further information",
    "warnings.warn(",
    "nanobind:",
    "- ",
)  # beginnings of a log's last lines
UNPRINTABLE = (" ;", " #", "\n")  # an ini file ends a value there


@dataclass(frozen=True, slots=True)
class Probe:
    """How to tell that a service is ready: an HTTP path that answers 200, perhaps on a socket."""

    url: str
    uds: Path | None = None


@dataclass(frozen=True, slots=True)
class Program:
    """One process of the stack; ``env`` is added to the caller's, ``nice`` lowers its priority."""

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    ready: Probe | None = None
    nice: int = 0
    autostart: bool = True


@dataclass(frozen=True, slots=True)
class State:
    """What supervisord says of a service."""

    name: str
    state: str  # running, starting, backoff, stopped, exited, fatal
    pid: int | None


def write_config(home: Home, services: Sequence[Program], cwd: Path) -> Path:
    """Write supervisord's configuration; the path to it."""
    home.logs.mkdir(mode=0o700, parents=True, exist_ok=True)
    home.sockets.mkdir(mode=0o700, parents=True, exist_ok=True)
    sections = [_HEAD]
    sections += [_program(service, cwd, place) for place, service in enumerate(services)]
    names = ",".join(service.name for service in services)
    sections.append(f"[group:{GROUP}]\nprograms={names}\n")
    home.supervisor_config.write_text("\n".join(sections), encoding="utf-8")
    return home.supervisor_config


def start(home: Home) -> None:
    """Start supervisord on the written configuration; it becomes a daemon of its own session."""
    mine = ("PYTHONDONTWRITEBYTECODE", "SUPERVISOR_")  # of a supervisord that this one follows
    environment = {k: v for k, v in os.environ.items() if not k.startswith(mine)}
    environment |= {MARKER: str(home.root)}  # and bytecode is kept, as imports are most of a start
    starting = subprocess.Popen(
        [sys.executable, "-m", "supervisor.supervisord", "-c", str(home.supervisor_config)],
        env=environment,
        cwd=home.root,  # the configuration's own paths are relative to it
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with starting:  # an interrupt waits too: it cannot be left half-started
        output = " ".join(starting.communicate()[0].split())
    if starting.returncode != 0:
        raise UserError(f"supervisord did not start in {home.root}: {output}")


def states(home: Home) -> list[State]:
    """What supervisord says of every service; empty when it does not run."""
    try:
        with _supervisor(home) as supervisor:
            infos: Any = supervisor.getAllProcessInfo()
    except OSError:
        return []
    return [
        State(
            name=info["name"],
            state=info["statename"].lower(),
            pid=info["pid"] or None,
        )
        for info in infos
    ]


def start_service(home: Home, name: str) -> None:
    """Start one service; one that runs is left alone."""
    with _supervisor(home) as supervisor:
        _tolerant(supervisor.startProcess, name, "ALREADY_STARTED")


def stop_service(home: Home, name: str) -> None:
    """Stop one service and its children; one that does not run is left alone."""
    with _supervisor(home) as supervisor:
        _tolerant(supervisor.stopProcess, name, "NOT_RUNNING")


def kill_service(home: Home, name: str) -> None:
    """End one service at once, with its whole process group; supervisord starts it again."""
    pid = next((state.pid for state in states(home) if state.name == name), None)
    if pid:
        end(with_children([psutil.Process(pid)]) if psutil.pid_exists(pid) else [], grace_s=0.0)


def answers(probe: Probe, timeout_s: float = 2.0) -> bool:
    """Whether a service is ready now."""
    transport = UnixTransport(probe.uds) if probe.uds else httpx.HTTPTransport(verify=False)
    try:
        with httpx.Client(transport=transport, timeout=timeout_s) as client:
            return client.get(probe.url).status_code == 200
    except httpx.HTTPError:
        return False


def last_line(home: Home, name: str) -> str:
    """The last informative line of a service's log."""
    try:
        text = (home.log(name)).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return "it wrote nothing"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    informative = [line for line in lines if not line.startswith(UNINFORMATIVE)]
    return informative[-1][:400] if informative else "it wrote nothing"


# --- ending what a stack started --------------------------------------------------------------


def supervisor_of(home: Home) -> psutil.Process | None:
    """The live supervisord of a home."""
    pid = _recorded_pid(home)
    try:
        process = psutil.Process(pid) if pid else None
        ours = process and str(home.supervisor_config) in process.cmdline() and _alive(process)
    except psutil.Error:
        return None
    return process if ours else None


def shut_down(home: Home) -> int:
    """End supervisord and everything it ever started; how many processes had to be ended."""
    before = survivors(home)
    supervisor = supervisor_of(home)
    if supervisor:
        supervisor.terminate()
        psutil.wait_procs([supervisor], timeout=SUPERVISOR_S)
    end(list({process.pid: process for process in [*survivors(home), *before]}.values()))
    for leftover in [*home.sockets.glob("*"), home.supervisor_pid]:
        leftover.unlink(missing_ok=True)
    return len(before)


def revive(home: Home) -> bool:
    """Start a supervisord that was killed again, with its services; False where none is wanted.

    Its services live on without it, but nobody would restart or stop them: they are ended first.
    Called by a process that none of them is a parent's marked child of (``watchdog``).
    """
    taken = f"home {home.root}: an up or down runs in it; allowed: one at a time"
    with locked(home.stack_lock, taken=taken, wait_s=REVIVE_S):
        if supervisor_of(home) is not None or not home.stack_json.exists():
            return False  # somebody was quicker, or `down` came between
        shut_down(home)
        start(home)
        return True


def end_leaderless() -> int:
    """End what killed services of this process's session left behind; how many there were.

    supervisord starts every service as the leader of a process group; a group without its leader
    is a killed service's, whose successor may need the memory or the port it still holds.
    """
    session = os.getsid(0)
    left = [
        process
        for process in psutil.process_iter()
        if _in_session(process, session) and _leaderless(process) and _alive(process)
    ]
    end(left, grace_s=0.0)
    return len(left)


def survivors(home: Home) -> list[psutil.Process]:
    """Every live process of the stack: supervisord, its services, orphans, and their children."""
    session = _session(home)
    roots = [
        process
        for process in psutil.process_iter()
        if (_in_session(process, session) or _marked(process, home)) and _alive(process)
    ]
    return with_children(roots)


def with_children(roots: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Processes and all their descendants, this process excepted."""
    family = {root.pid: root for root in roots}
    for root in roots:
        try:
            family |= {child.pid: child for child in root.children(recursive=True)}
        except psutil.Error:
            continue
    family.pop(os.getpid(), None)
    return list(family.values())


def end(processes: Sequence[psutil.Process], grace_s: float = GRACE_S) -> None:
    """Ask processes to end, then make them; returns when they are gone."""
    for process in processes if grace_s else ():
        _unless_gone(process.terminate)
    _, alive = psutil.wait_procs(processes, timeout=grace_s)
    for process in alive:
        _unless_gone(process.kill)
    psutil.wait_procs(alive, timeout=GRACE_S)


def _session(home: Home) -> int | None:
    """The session supervisord founded, unless its number has come to mean another one."""
    pid = _recorded_pid(home)
    if pid is None or home.supervisor_pid.stat().st_mtime < psutil.boot_time():
        return None
    leader = psutil.pid_exists(pid) and not _zombie(pid)
    return None if leader and supervisor_of(home) is None else pid


def _recorded_pid(home: Home) -> int | None:
    try:
        return int(home.supervisor_pid.read_text(encoding="ascii"))
    except (FileNotFoundError, ValueError):
        return None


def _in_session(process: psutil.Process, session: int | None) -> bool:
    try:
        return session is not None and os.getsid(process.pid) == session
    except OSError:
        return False


def _leaderless(process: psutil.Process) -> bool:
    try:
        leader = os.getpgid(process.pid)
    except OSError:
        return False
    return not psutil.pid_exists(leader) or _zombie(leader)


def _marked(process: psutil.Process, home: Home) -> bool:
    try:
        return process.environ().get(MARKER) == str(home.root)
    except (psutil.Error, OSError):
        return False


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _zombie(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _unless_gone(act: Callable[[], None]) -> None:
    try:
        act()
    except psutil.NoSuchProcess:
        return


# --- supervisord's side -----------------------------------------------------------------------


def _tolerant(call: Any, name: str, fine: str) -> None:
    """Call a method of supervisord; its fault ``fine`` means that there was nothing to do."""
    try:
        call(f"{GROUP}:{name}")
    except xmlrpc.client.Fault as fault:
        if not fault.faultString.startswith(fine):
            raise


@contextmanager
def _supervisor(home: Home) -> Iterator[Any]:
    """supervisord's own methods, over its socket; OSError where it does not run."""
    transport = SupervisorTransport(None, None, f"unix://{home.supervisor_socket}")
    try:
        yield xmlrpc.client.ServerProxy("http://supervisor", transport=transport).supervisor
    finally:
        transport.close()


def _program(service: Program, cwd: Path, place: int) -> str:
    """One service's section; env and nice replace themselves by the command, so the pid is its."""
    variables = [f"{key}={value}" for key, value in service.env.items()]
    argv = ["env", *variables, "nice", "-n", str(service.nice), *service.argv]
    return _PROGRAM.format(
        name=service.name,
        priority=place,
        command=_ini(shlex.join(argv)),
        directory=_ini(cwd),
        autostart=str(service.autostart).lower(),
        stop_s=int(STOP_S),
    )


def _ini(value: object) -> str:
    """A value as supervisord's ini reads it back."""
    text = str(value)
    for mark in UNPRINTABLE:
        if mark in text:
            raise UserError(f"{text[:120]!r} holds {mark!r}; allowed: a home and names without it")
    return text.replace("%", "%%")


_HEAD = """\
[unix_http_server]
file=sockets/super.sock
chmod=0600

[supervisord]
logfile=logs/supervisord.log
logfile_maxbytes=1MB
logfile_backups=1
pidfile=supervisord.pid
childlogdir=logs
umask=077
nocleanup=true
minfds=1024

[rpcinterface:supervisor]
supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface
"""

_PROGRAM = """\
[program:{name}]
priority={priority}
command={command}
directory={directory}
autostart={autostart}
autorestart=true
startsecs=1
startretries=5
stopsignal=TERM
stopwaitsecs={stop_s}
stopasgroup=true
killasgroup=true
redirect_stderr=true
stdout_logfile=logs/{name}.log
stdout_logfile_maxbytes=10MB
stdout_logfile_backups=2
"""
