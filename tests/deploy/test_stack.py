"""Up, down and status on a real supervisord, with services that start in a moment."""

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from agent.config import Settings, load
from agent.config import kept as settings_of
from agent.errors import UserError
from agent.home import Home, read_sealed
from deploy import stack, supervise
from deploy.serving.served import BLUE, Served, read_served
from deploy.serving.starts import forget_starts
from deploy.stack import Ports, services
from deploy.supervise import Probe, Program, survivors
from flows.serve.stack import away

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

SERVED = Served("a" * 64, "/weights")
Make = Callable[[Home, Settings, Ports], Sequence[Program]]

WEB = (
    "import sys; from http.server import HTTPServer, SimpleHTTPRequestHandler as Handler; "
    "HTTPServer(('127.0.0.1', int(sys.argv[1])), Handler).serve_forever()"
)
# An engine as far as its starts go: while a file is there it ends before it answers.
FRAGILE = (
    """
import sys, time
from pathlib import Path
from agent.home import Home, read_sealed
from deploy.serving.starts import begin, forget_starts
home = Home(Path(sys.argv[2]))
begin(home, "engine")
time.sleep(1.2)  # longer than supervisord counts a start as failed
if (home.root / "broken").exists():
    sys.exit("no memory")
forget_starts(home, "engine")
"""
    + WEB
)
# A child, and one with a session of its own, which no signal to the group reaches.
FAMILY = "setsid sleep 987 & sleep 987 & wait"


def web(name: str, port: int) -> Program:
    return Program(
        name, (sys.executable, "-c", WEB, str(port)), ready=Probe(f"http://127.0.0.1:{port}/")
    )


def small(home: Home, settings: Settings, ports: Ports) -> Sequence[Program]:
    return (
        web(BLUE, ports.mlflow),
        web("gateway", ports.gateway),
        Program("family", ("bash", "-c", FAMILY), nice=5),
        Program("spare", ("sleep", "987"), autostart=False),
    )


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    home = Home.at(tmp_path.parent / "100 %;é")  # a short path: sockets lie in it
    yield home
    stack.down(home)
    shutil.rmtree(home.root)


def up(home: Home, make: Make = small, **changes: object) -> dict[str, object]:
    return stack.up(home, load(**changes), SERVED, make=make, timeout_s=30)


def test_up_answers_and_down_leaves_nobody(home: Home) -> None:
    told: list[tuple[str, str]] = []
    status = stack.up(home, load(), SERVED, make=small, progress=lambda *a: told.append(a))
    assert [name for name, _ in told[:2]] == [BLUE, "gateway"]
    assert {name for name, state in told[2:] if state.startswith("ready")} == {BLUE, "gateway"}
    names = {"endpoint", "mlflow", "model_page", "prefect", "sign_in", "champion", "services"}
    assert set(status) == names
    assert str(home.root / "password") in str(status["sign_in"])
    assert status["champion"] == SERVED.digest
    found = {each["name"]: each for each in status["services"]}
    assert set(found) == {BLUE, "gateway", "family", "spare"}
    assert found["spare"] == {"name": "spare", "state": "stopped", "pid": None}
    assert found[BLUE]["state"] == "running"
    pids = {process.pid for process in survivors(home)}
    assert {found[name]["pid"] for name in (BLUE, "gateway", "family")} < pids
    assert len(pids) >= 6  # supervisord, three services, two sleepers
    assert stack.down(home) >= 6
    assert survivors(home) == []
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert stack.down(home) == 0
    empty = stack.status(home)
    assert (empty["endpoint"], empty["services"]) == (None, [])
    assert list(home.sockets.iterdir()) == []


def test_an_engine_that_cannot_start_waits_and_status_says_so(home: Home) -> None:
    broken, script = home.root / "broken", home.root / "fragile.py"
    script.write_text(FRAGILE)

    def fragile(home: Home, settings: Settings, ports: Ports) -> Sequence[Program]:
        first, *others = small(home, settings, ports)
        argv = (sys.executable, str(script), first.argv[-1], str(home.root))
        return [replace(first, argv=argv), *others]

    up(home, fragile)
    broken.touch()
    supervise.kill_service(home, BLUE)
    until = time.monotonic() + 60
    while (state := engine(home)["state"]) != "backoff" and time.monotonic() < until:
        time.sleep(0.1)
    assert state == "backoff"
    pid = engine(home)["pid"]
    broken.unlink()
    assert engine(home)["pid"] == pid  # it waits
    forget_starts(home, BLUE)  # as `anchorage repair` does
    answering = Probe(f"http://127.0.0.1:{read_sealed(home.ports_json)['mlflow']}/")
    while not supervise.answers(answering) and time.monotonic() < until:
        time.sleep(0.1)
    assert engine(home) == {"name": BLUE, "state": "running", "pid": pid}
    assert home.log("supervisord").read_text().count(f"spawned: '{BLUE}'") == 4


def engine(home: Home) -> dict[str, Any]:
    """What `status` says of the engine."""
    services = stack.status(home)["services"]
    found: dict[str, Any] = next(each for each in services if each["name"] == BLUE)
    return found


def test_the_record_leads_clients_to_the_stack(home: Home) -> None:
    status = up(home)
    environment = stack.environment_of(home)
    assert environment["MLFLOW_TRACKING_URI"] == status["mlflow"]
    assert environment["PREFECT_API_URL"] == f"{status['prefect']}/api"
    password = (home.root / "password").read_text()
    assert environment["MLFLOW_TRACKING_PASSWORD"] == password
    assert environment["PREFECT_API_AUTH_STRING"].endswith(f":{password}")
    kept = [home.root / name for name in ("stack.json", "supervisord.conf", "settings.json")]
    assert not any(password in path.read_text() for path in kept)
    stack.down(home)
    assert stack.environment_of(home) == {}


def test_a_server_by_url_is_in_the_record_and_named_while_it_is_away(home: Home) -> None:
    api = "http://127.0.0.1:9/prefect/api"
    status = up(home, projection={"prefect_api_url": api})
    assert status["prefect"] == api.removesuffix("/api")
    assert str(status["sign_in"]).endswith("password (mlflow only)")
    environment = stack.environment_of(home)
    assert environment["PREFECT_API_URL"] == api
    assert "PREFECT_API_AUTH_STRING" not in environment
    assert away(home) == [f"{api}/health"]
    stack.down(home)
    assert away(home) == []


def test_a_second_up_is_refused_in_one_line_and_harms_nothing(home: Home) -> None:
    first = up(home)
    with pytest.raises(UserError, match="is up already at") as refused:
        up(home)
    assert "\n" not in str(refused.value)
    assert stack.status(home) == first


def test_two_ups_at_once_make_one_stack(home: Home) -> None:
    """Two callers in the same moment: one succeeds, the other is told."""
    ends: list[object] = []

    def start() -> None:
        try:
            ends.append(up(home))
        except UserError as error:
            ends.append(error)

    threads = [threading.Thread(target=start) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(isinstance(end, dict) for end in ends) == 1
    assert stack.status(home)["endpoint"] is not None


def test_a_killed_supervisord_leaves_orphans_that_down_ends(home: Home) -> None:
    up(home)
    before = survivors(home)
    supervisor = supervise.supervisor_of(home)
    assert supervisor is not None
    supervisor.kill()
    supervisor.wait()
    left = survivors(home)
    assert {p.pid for p in left} == {p.pid for p in before} - {supervisor.pid}
    seen = {each["pid"]: each["state"] for each in stack.status(home)["services"]}
    assert set(seen) <= {p.pid for p in left}
    assert set(seen.values()) == {"unsupervised"}
    assert len(seen) >= 3
    assert stack.down(home) == len(left)
    assert not any(process.is_running() for process in left)


def guarded(home: Home, settings: Settings, ports: Ports) -> Sequence[Program]:
    """The small stack with the real watchdog."""
    watchdog = (sys.executable, "-m", "deploy.serving.watchdog", str(home.root))
    return (*small(home, settings, ports), Program("watchdog", watchdog))


def test_a_killed_supervisord_comes_back_and_status_and_endpoint_agree(home: Home) -> None:
    """Then the gateway is killed, too: whoever is supervised again starts it again."""
    first = up(home, guarded)
    before = {process.pid for process in survivors(home)}
    time.sleep(3)  # the watchdog knows its parent once it has started
    supervisor = supervise.supervisor_of(home)
    assert supervisor is not None
    supervisor.kill()
    supervisor.wait()
    for each in stack.status(home)["services"]:
        if each["name"] == "gateway":
            os.kill(each["pid"], signal.SIGKILL)

    def whole() -> bool:
        states = {each["name"]: each["state"] for each in stack.status(home)["services"]}
        running = {"engine", "gateway", "family", "watchdog"}
        return running <= {name for name, state in states.items() if state == "running"}

    until = time.monotonic() + 60
    while not (whole() and supervise.answers(Probe(f"{first['endpoint']}/"))):
        assert time.monotonic() < until
        time.sleep(0.2)
    again = stack.status(home)
    assert (again["endpoint"], again["champion"]) == (first["endpoint"], first["champion"])
    assert before.isdisjoint({process.pid for process in survivors(home)})
    assert stack.down(home) > 0
    time.sleep(2)
    assert survivors(home) == []  # nothing brings back what was taken down


def test_a_unit_for_systemd_names_home_and_main_process(home: Home, tmp_path: Path) -> None:
    from flows.serve.stack import unit

    with pytest.raises(UserError, match="allowed in a unit"):
        unit(home.root, system=False)  # it has a space and a % in it
    text = unit(tmp_path / "plain", system=True)
    assert f"PIDFile={tmp_path / 'plain'}/supervisord.pid" in text
    assert "WantedBy=multi-user.target" in text
    file = tmp_path / "anchorage-plain.service"
    file.write_text(text)
    if shutil.which("systemd-analyze"):
        checked = subprocess.run(
            ["systemd-analyze", "verify", str(file)], capture_output=True, text=True
        )
        assert (checked.returncode, checked.stderr) == (0, "")


TITLED = "import setproctitle, time; setproctitle.setproctitle('core'); time.sleep(987)"
PARENT = (
    "import subprocess, sys, time; from deploy.supervise import end_leaderless; end_leaderless(); "
    f"subprocess.Popen([sys.executable, '-c', {TITLED!r}]); time.sleep(987)"
)


def test_a_killed_service_leaves_nothing_that_outlives_its_successor_or_the_stack(
    home: Home,
) -> None:
    """The child has a title, which wipes its environment, and its parent is killed twice."""
    root = str(Path(stack.__file__).parent.parent)
    titled = Program("titled", ("env", f"PYTHONPATH={root}", sys.executable, "-c", PARENT))
    stack.up(
        home,
        load(),
        SERVED,
        make=lambda home, settings, ports: [*small(home, settings, ports), titled],
        wait_for=[BLUE, "gateway", "titled"],
    )

    first, first_child = family(home, "titled", not_pid=None)
    os.kill(first, signal.SIGKILL)
    second, second_child = family(home, "titled", not_pid=first)
    assert not first_child.is_running()
    os.kill(second, signal.SIGKILL)
    stack.down(home)
    assert not second_child.is_running()


def family(home: Home, name: str, not_pid: int | None) -> tuple[int, psutil.Process]:
    """A service's process, once it is another one than `not_pid`, and its titled child."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        pid = next(state.pid for state in supervise.states(home) if state.name == name)
        if pid is not None and pid != not_pid and psutil.pid_exists(pid):
            for child in psutil.Process(pid).children():
                if child.cmdline()[:1] == ["core"]:
                    return pid, child
        time.sleep(0.1)
    raise AssertionError(f"{name} has no titled child")


def test_up_after_a_crash_ends_the_orphans_first(home: Home) -> None:
    up(home, gateway={"port": 0})
    old = survivors(home)
    supervisor = supervise.supervisor_of(home)
    assert supervisor is not None
    supervisor.kill()
    supervisor.wait()
    status = up(home)
    assert not any(process.is_running() for process in old)
    assert all(each["state"] in ("running", "stopped") for each in status["services"])


def test_a_number_that_means_another_process_now_is_left_alone(home: Home) -> None:
    """The recorded supervisord is gone; its number belongs to a stranger with a session."""
    stranger = psutil.Popen(["sleep", "987"], start_new_session=True)
    try:
        home.supervisor_pid.write_text(str(stranger.pid))
        assert supervise.supervisor_of(home) is None
        assert survivors(home) == []
        stack.down(home)
        assert stranger.is_running()
    finally:
        stranger.kill()
        stranger.wait()


def test_a_port_in_use_is_refused_before_anything_starts(home: Home) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"gateway port {port} .* choose another, or 0"):
            up(home, gateway={"port": port})
    assert survivors(home) == []
    assert not home.supervisor_config.exists()


def test_ports_are_free_and_different_and_no_other_process_gets_them_unasked() -> None:
    for _ in range(20):
        ports = stack.choose_ports(load())
        chosen = {ports.gateway, ports.mlflow, ports.prefect}
        assert len(chosen) == 3
        assert all(1024 <= port < 32_768 for port in chosen)  # Linux gives those from there on


def test_a_port_in_use_is_passed_over() -> None:
    held: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as other:
        ports = (other.getsockname()[1], stack.choose_ports(load()).mlflow)
        assert stack._first_bound("mlflow", "127.0.0.1", ports, held) == ports[1]
        with pytest.raises(UserError, match=f"mlflow port {ports[0]} on 127.0.0.1: Addr"):
            stack._first_bound("mlflow", "127.0.0.1", ports[:1], held)
    for each in held:
        each.close()


FAILURES = {
    "ends at once": "echo 'weights: none'; exit 3",
    "ends after a while": "sleep 1.5; echo 'weights: none'; exit 1",
    "ends without a mistake": "echo 'weights: none'",
    "says more than it tells": (
        "echo 'weights: none'; echo '  For further information visit'; exit 1"
    ),
}


@pytest.mark.parametrize("script", FAILURES.values(), ids=FAILURES.keys())
def test_a_service_that_ends_while_starting_stops_all(home: Home, script: str) -> None:
    def make(home: Home, settings: Settings, ports: Ports) -> Sequence[Program]:
        broken = Program(BLUE, ("bash", "-c", script), ready=Probe("http://127.0.0.1:9/"))
        return (broken, *small(home, settings, ports)[1:])

    with pytest.raises(UserError, match=r"^engine: ended while starting: weights: none$"):
        up(home, make)
    assert survivors(home) == []
    assert stack.status(home)["endpoint"] is None


def test_a_service_that_never_answers_stops_all(home: Home) -> None:
    def make(home: Home, settings: Settings, ports: Ports) -> Sequence[Program]:
        silent = ("bash", "-c", "echo 'still loading'; sleep 987")
        return (Program(BLUE, silent, ready=Probe("http://127.0.0.1:9/")),)

    with pytest.raises(UserError, match="engine: does not answer yet; it wrote: still loading"):
        stack.up(home, load(), SERVED, make=make, timeout_s=2)
    assert survivors(home) == []


def test_an_interrupted_up_stops_all(home: Home) -> None:
    def make(home: Home, settings: Settings, ports: Ports) -> Sequence[Program]:
        return (Program(BLUE, ("sleep", "987"), ready=Probe("http://127.0.0.1:9/")),)

    def interrupt(_service: str, _state: str) -> None:
        threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()

    # A shell starts its background jobs with this signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            stack.up(home, load(), SERVED, make=make, progress=interrupt, timeout_s=60)
    finally:
        signal.signal(signal.SIGINT, before)
    assert survivors(home) == []


def test_a_killed_service_comes_back_and_its_children_do_not(home: Home) -> None:
    up(home)
    old = next(state.pid for state in supervise.states(home) if state.name == "family")
    assert old is not None
    children = psutil.Process(old).children(recursive=True)
    supervise.kill_service(home, "family")
    assert not any(child.is_running() for child in children)
    new = old
    while new in (old, None):
        time.sleep(0.1)
        new = next(state.pid for state in supervise.states(home) if state.name == "family")


def test_a_service_can_be_started_and_stopped_by_name(home: Home) -> None:
    def state() -> str:
        return next(each.state for each in supervise.states(home) if each.name == "spare")

    up(home)
    supervise.stop_service(home, "spare")
    supervise.start_service(home, "spare")
    supervise.start_service(home, "spare")
    assert state() in ("running", "starting")
    supervise.stop_service(home, "spare")
    assert state() == "stopped"


def test_a_command_reaches_its_service_byte_for_byte(home: Home) -> None:
    """Quotes, per cent signs and blanks in arguments, variables and the home's own path."""
    odd = "a 'b' \"c\" %(x)s 100% $HOME \\ é,=;"
    script = "import os, sys, time; print([sys.argv[1], os.environ['ODD']]); time.sleep(987)"

    def make(home: Home, settings: Settings, ports: Ports) -> Sequence[Program]:
        argv = (sys.executable, "-u", "-c", script, odd)
        return (*small(home, settings, ports)[:2], Program("echo", argv, {"ODD": odd}))

    up(home, make)
    assert supervise.last_line(home, "echo") == str([odd, odd])


def test_what_an_ini_file_cannot_hold_is_refused(home: Home) -> None:
    def make(home: Home, settings: Settings, ports: Ports) -> Sequence[Program]:
        return (Program(BLUE, ("echo", "half ;a comment")),)

    with pytest.raises(UserError, match="' ;'"):
        up(home, make)
    assert survivors(home) == []


def test_settings_and_version_are_kept_beside_the_stack(home: Home) -> None:
    up(home, learner={"sigma": 0.5})
    kept = settings_of(home)
    assert kept.learner.sigma == 0.5
    assert read_served(home) == SERVED


def test_the_real_services_listen_on_this_machine_only(home: Home) -> None:
    made = services(home, load(), Ports(1, 2, 3))
    assert [service.name for service in made][:2] == list(stack.ENDPOINT)
    for service in made:
        text = shlex.join(service.argv)
        assert "0.0.0.0" not in text
        if "--host" in text:
            assert "--host=127.0.0.1" in text
    by_name = {service.name: service for service in made}
    assert by_name["mlflow"].nice > by_name[BLUE].nice == 0
