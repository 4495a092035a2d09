"""One supervisord per home: services as values, a generated config, and an end that leaves nobody.

The `supervisor` library starts, restarts and stops the processes and rotates their logs; here is
the configuration it gets and its XML-RPC on a unix socket. ``orphans.py`` does what it cannot: end
the children of a supervisord that was killed.
"""

import os
import shlex
import subprocess
import sys
import xmlrpc.client
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from supervisor.xmlrpc import SupervisorTransport

from agent.errors import UserError
from agent.home import Home
from deploy.orphans import MARKER, end, with_children
from deploy.serving.control import UnixTransport

GROUP = "stack"
STOP_S = 10.0  # for a service to end by itself
SAYS_NOTHING = ("For further information", "warnings.warn(", "nanobind:", "- ")  # ends of a log
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
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment |= {MARKER: str(home.root)}  # and bytecode is kept: imports are most of a start
    starting = subprocess.Popen(
        [sys.executable, "-m", "supervisor.supervisord", "-c", str(home.supervisor_config)],
        env=environment,
        cwd=home.root,  # the configuration's own paths are relative to it
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with starting:  # an interrupt waits too: nothing is left half-started
        told = " ".join(starting.communicate()[0].split())
    if starting.returncode != 0:
        raise UserError(f"supervisord did not start in {home.root}: {told}")


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
    """The last line a service wrote that says something."""
    try:
        text = (home.log(name)).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return "it wrote nothing"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(SAYS_NOTHING)]
    return telling[-1][:400] if telling else "it wrote nothing"


def _tolerant(call: Any, name: str, fine: str) -> None:
    """Call a method of supervisord; its fault ``fine`` means that there was nothing to do."""
    try:
        call(f"{GROUP}:{name}")
    except xmlrpc.client.Fault as fault:
        if not fault.faultString.startswith(fine):
            raise


@contextmanager
def _supervisor(home: Home) -> Iterator[Any]:
    """supervisord's own methods, over its socket; OSError when nobody listens."""
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
