"""The whole service on one machine: its processes, up, down and status.

One home, one supervisord, loopback only. `up` is all or nothing: it returns when the endpoint
answers, or stops everything it started and says why in one line. `down` leaves no process, whatever
state the last crash left.
"""

import os
import random
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil

from agent.config import Settings, keep
from agent.errors import UserError
from agent.home import Home, locked, read_sealed, write_sealed
from agent.population.placement import on_cpu
from deploy.consoles import CONSOLES, LOOPBACK, USER, credentials
from deploy.serving import process
from deploy.serving.process import private_socket
from deploy.serving.served import BLUE, GREEN, SLOTS, Served, read_served, write_served
from deploy.serving.starts import forget_starts, starts
from deploy.supervise import (
    Probe,
    Program,
    State,
    answers,
    last_line,
    shut_down,
    start,
    states,
    supervisor_of,
    survivors,
    write_config,
)

BACKGROUND = 10  # niceness of what must not slow the endpoint
ENDPOINT = (BLUE, "gateway")  # what `up` waits for
UP_TIMEOUT_S = 600.0
POLL_S = 0.2
ENDED = ("exited", "backoff", "fatal")
UNASKED = range(20_000, 30_000)  # ports that no system gives to whoever asks for any
TRIES = 100  # ports in use before `up` gives up

Progress = Callable[[str, str], None]  # service, what became of it


@dataclass(frozen=True, slots=True)
class Ports:
    """TCP ports of the stack."""

    gateway: int
    mlflow: int
    prefect: int


def services(home: Home, settings: Settings, ports: Ports) -> tuple[Program, ...]:
    """The processes of a stack, what the endpoint needs first; no console of what has a URL."""
    shared = client_environment(home, settings, ports)
    own = ("--home", str(home.root))
    flows_cli = (sys.executable, "-m", "flows.cli", "service")
    quiet = {"DO_NOT_TRACK": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "PYTHONWARNINGS": "ignore"}
    for folder in (home.mlflow, home.prefect):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    consoles = {
        "mlflow": _console("mlflow", home, ports.mlflow, "/health", quiet),
        "prefect": _console("prefect", home, ports.prefect, "/api/health", shared),
    }
    return (
        _engine(home, settings, BLUE),
        Program(
            "gateway",
            (*flows_cli, "gateway", *own, "--port", str(ports.gateway)),
            shared,
            Probe(f"{url(ports.gateway, settings.gateway.host)}/healthz"),
        ),
        Program("watchdog", (sys.executable, "-m", "deploy.serving.watchdog", str(home.root))),
        *(consoles[name] for name in settings.projection.consoles),
        Program("flows", (*flows_cli, "flows", *own), shared, nice=BACKGROUND),
        _engine(home, settings, GREEN),
    )


def client_environment(home: Home, settings: Settings, ports: Ports) -> dict[str, str]:
    """Variables that lead MLflow's and Prefect's clients to their servers, and keep them quiet.

    Without a password: they are written to supervisord's configuration and to command lines.
    """
    return {
        "ANCHORAGE_HOME": str(home.root),
        "DO_NOT_TRACK": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_TRACKING_URI": settings.projection.mlflow_url or url(ports.mlflow),
        "PREFECT_HOME": str(home.prefect),
        "PREFECT_API_URL": settings.projection.prefect_api_url or f"{url(ports.prefect)}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_CLI_PROMPT": "false",
    }


def _engine(home: Home, settings: Settings, slot: str) -> Program:
    """vLLM's server; the second one is started only by a blue/green swap."""
    return Program(
        slot,
        process.command(home, settings, slot),
        process.environment(home, cpu=on_cpu()),
        Probe("http://engine/health", home.engine_socket(slot)),
        autostart=slot == BLUE,
    )


def _console(name: str, home: Home, port: int, health: str, env: Mapping[str, str]) -> Program:
    """MLflow's or Prefect's server, behind a password."""
    argv = (sys.executable, "-m", "deploy.consoles", name, str(home.root), str(port))
    return Program(name, argv, env, Probe(f"{url(port)}{health}"), nice=BACKGROUND)


def url(port: int, host: str = LOOPBACK) -> str:
    """An address as a client on this machine writes it."""
    everywhere = host in ("0.0.0.0", "::")  # noqa: S104  compared, not bound
    name = LOOPBACK if everywhere else f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}"


def up(
    home: Home,
    settings: Settings,
    served: Served,
    *,
    make: Callable[[Home, Settings, Ports], Sequence[Program]] = services,
    wait_for: Sequence[str] = ENDPOINT,
    progress: Progress = lambda _service, _state: None,
    timeout_s: float = UP_TIMEOUT_S,
) -> dict[str, Any]:
    """Start the stack serving ``served``; `status` once every service of ``wait_for`` answers.

    UserError, and nothing left running: the home is already up, a port is in use, a service ended
    while starting (with its last line), the time ran out.
    """
    with _alone(home):
        _refuse_second(home)
        private_socket(home.admin_socket)  # the longest name there
        shut_down(home)  # what a crash left
        ports = choose_ports(settings, _ports_before(home))
        write_sealed(home.ports_json, asdict(ports))
        chosen = tuple(make(home, settings, ports))
        write_served(home, served)
        keep(home, settings)
        for slot in SLOTS:
            forget_starts(home, slot)
        _write_record(home, settings, ports)
        write_config(home, chosen, Path.cwd())
        try:
            start(home)
            _wait(home, chosen, wait_for, progress, time.monotonic() + timeout_s)
        except BaseException:
            _stop(home)
            raise
    return status(home)


def down(home: Home) -> int:
    """Stop everything of this home, orphans of a crash included; how many processes were ended."""
    with _alone(home):
        return _stop(home)


def _stop(home: Home) -> int:
    """Forget that a stack is wanted before it ends: what looks after it would bring it back."""
    home.stack_json.unlink(missing_ok=True)
    return shut_down(home)


def status(home: Home) -> dict[str, Any]:
    """{"endpoint", "mlflow", "model_page", "prefect", "sign_in", "champion", "services"}.

    ``model_page`` is MLflow's page of the versions. ``sign_in`` says how to open the pages of our
    own servers, ``services`` lists {"name", "state", "pid"}. Addresses are None and no service is
    listed where nothing runs; a second engine is listed while it runs. Services whose supervisord
    was killed are "unsupervised".
    """
    services_now = states(home) if supervisor_of(home) is not None else _unsupervised(home)
    record = _read_record(home) if services_now else {}
    return {
        "endpoint": record.get("endpoint"),
        "mlflow": record.get("mlflow"),
        "model_page": record.get("model_page"),
        "prefect": record.get("prefect"),
        "sign_in": record.get("sign_in"),
        "champion": _champion(home),
        "services": [
            {"name": each.name, "state": _state(home, each), "pid": each.pid}
            for each in services_now
            if not (each.name in SLOTS and each.state == "stopped")
        ],
    }


def _state(home: Home, service: State) -> str:
    """supervisord's word; its "backoff" also where an engine itself waits after failed starts."""
    count = starts(home, service.name) if service.name in SLOTS else None
    waits = service.state == "running" and count is not None and count.next_at > time.time()
    return "backoff" if waits else service.state


def _unsupervised(home: Home) -> list[State]:
    """Services that live on although their supervisord was killed: leaders of process groups."""
    if supervisor_of(home) is not None:
        return []
    leaders = [each for each in survivors(home) if _leads(each)]
    return [State(_service_name(each), "unsupervised", each.pid) for each in leaders]


def _leads(process: psutil.Process) -> bool:
    try:
        return os.getpgid(process.pid) == process.pid
    except OSError:
        return False


def _service_name(process: psutil.Process) -> str:
    """A service by its command line, which ends in its name or names its module."""
    try:
        words = process.cmdline()
    except psutil.Error:
        words = []
    modules = {"deploy.serving.watchdog": "watchdog", "deploy.serving.process": words[-1:]}
    modules |= {"deploy.consoles": words[3:4], "flows.cli": words[4:5]}
    name = next((modules[word] for word in words if word in modules), None)
    return "".join(name) if name else (words[0].rpartition("/")[2] if words else str(process.pid))


def _ports_before(home: Home) -> Mapping[str, int]:
    """The ports of the last `up`, by name."""
    with suppress(FileNotFoundError, UserError):
        return read_sealed(home.ports_json)
    return {}


def choose_ports(settings: Settings, before: Mapping[str, int] | None = None) -> Ports:
    """The ports the settings name; where they name 0, those of ``before`` that are still free.

    Clients keep the addresses they know over `down` and `up`. A new port is one of ``UNASKED``: a
    service binds it later, MLflow up to a minute, and by then a port that the system gives to
    whoever asks for any may be another process's. A server by URL keeps the one of ``before``.

    Raises:
        UserError: A port that the settings name is in use.
    """
    wanted = {
        "gateway": (settings.gateway.host, settings.gateway.port),
        "mlflow": (LOOPBACK, settings.projection.mlflow_port),
        "prefect": (LOOPBACK, settings.projection.prefect_port),
    }
    chosen = {name: (before or {}).get(name, 0) for name in wanted}
    held: list[socket.socket] = []
    try:
        for name in ("gateway", *settings.projection.consoles):
            (host, port), last = wanted[name], chosen[name]
            other = (*([last] if last else []), *random.sample(UNASKED, TRIES))
            chosen[name] = _first_bound(name, host, (port,) if port else other, held)
    finally:
        for sock in held:
            sock.close()
    return Ports(**chosen)


def _first_bound(name: str, host: str, ports: Sequence[int], held: list[socket.socket]) -> int:
    """The first of these ports that is free, bound for a moment."""
    for port in ports[:-1]:
        with suppress(UserError):
            return _bound(name, host, port, held)
    return _bound(name, host, ports[-1], held)


def _bound(name: str, host: str, port: int, held: list[socket.socket]) -> int:
    """Bind a port for a moment, so that two names cannot get the same one."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    held.append(sock)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        raise UserError(
            f"{name} port {port} on {host}: {error.strerror}; choose another, or 0 for a free one"
        ) from None
    sock.listen()
    return int(sock.getsockname()[1])


def _wait(
    home: Home,
    chosen: Sequence[Program],
    names: Sequence[str],
    progress: Progress,
    until: float,
) -> None:
    """Poll until all named services answer; the first one that ends, or the time, ends the wait."""
    begun = time.monotonic()
    waiting = {service.name: service for service in chosen if service.name in names}
    pids: dict[str, int] = {}
    for name in waiting:
        progress(name, "starting")
    while waiting:
        all_states = states(home)
        for state in all_states:
            _refuse_ended(home, state, pids)
        # Probed only while supervisord says it runs: an old socket or another's port may answer.
        running = [state.name for state in all_states if state.state == "running"]
        for name, service in [each for each in waiting.items() if each[0] in running]:
            if service.ready is None or answers(service.ready):
                del waiting[name]
                progress(name, f"ready after {time.monotonic() - begun:.0f} s")
        if waiting and time.monotonic() > until:
            slow = next(iter(waiting))
            raise UserError(f"{slow}: does not answer yet; it wrote: {last_line(home, slow)}")
        time.sleep(POLL_S if waiting else 0)


def _refuse_ended(home: Home, state: State, pids: dict[str, int]) -> None:
    """A service that ended while starting is a failure, also when it was started again."""
    again = state.pid is not None and pids.setdefault(state.name, state.pid) != state.pid
    if state.state in ENDED or again:
        raise UserError(f"{state.name}: ended while starting: {last_line(home, state.name)}")


def _refuse_second(home: Home) -> None:
    supervisor = supervisor_of(home)
    if supervisor:
        address = _read_record(home).get("endpoint")
        raise UserError(
            f"home {home.root}: is up already at {address} (supervisor {supervisor.pid}); "
            "take it down first, or choose another home"
        )


@contextmanager
def _alone(home: Home) -> Iterator[None]:
    """One `up` or `down` at a time in a home."""
    taken = f"home {home.root}: another up or down runs in it; allowed: one at a time"
    with locked(home.stack_lock, taken=taken, wait_s=0):
        yield


def _write_record(home: Home, settings: Settings, ports: Ports) -> None:
    environment = client_environment(home, settings, ports)
    mlflow, ours = environment["MLFLOW_TRACKING_URI"], settings.projection.consoles
    only = "" if ours == CONSOLES else f" ({', '.join(ours)} only)"
    record = {
        "endpoint": url(ports.gateway, settings.gateway.host),
        "mlflow": mlflow,
        "model_page": f"{mlflow}/#/models/{quote(settings.model.name, safe='')}",
        "prefect": environment["PREFECT_API_URL"].removesuffix("/api"),
        "sign_in": f"user {USER}, password in {home.password}{only}" if ours else None,
        "consoles": ours,
        "environment": environment,
    }
    write_sealed(home.stack_json, record)


def _read_record(home: Home) -> dict[str, Any]:
    try:
        return read_sealed(home.stack_json)
    except FileNotFoundError:
        return {}


def environment_of(home: Home) -> dict[str, str]:
    """The variables that lead clients to the running stack and sign them in; empty if none runs."""
    if supervisor_of(home) is None:
        return {}
    record = _read_record(home)
    return {**record.get("environment", {}), **credentials(home, record.get("consoles", CONSOLES))}


def health_pages(home: Home) -> dict[str, str]:
    """What endpoint, MLflow and Prefect, ours or by URL, answer 200 at; nothing while down."""
    record = _read_record(home)
    environment = record.get("environment", {})
    return record and {
        "endpoint": f"{record.get('endpoint')}/healthz",
        "mlflow": f"{environment.get('MLFLOW_TRACKING_URI')}/health",
        "prefect": f"{environment.get('PREFECT_API_URL')}/health",
    }


def _champion(home: Home) -> str | None:
    try:
        return read_served(home).digest
    except UserError:
        return None
