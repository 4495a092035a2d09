"""Controllers killed, stopped and racing: one champion, and nobody had to act."""

import itertools
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import psutil
import pytest
from postgres_server import PostgresProcess, needs_server

LOG = logging.getLogger("proof")  # --log-cli-level=INFO shows the figures
pytestmark = pytest.mark.integration

AROUND = ("before", "after")
ENGINE = ("/pause", "/resume", "/v1/completions", "/update_weight_version")
RELOAD = ["engine:load:mid", *(f"engine:/collective_rpc:{when}" for when in AROUND)]
TOUCHED = [*RELOAD, *(f"engine:{path}:{when}" for path in ENGINE for when in AROUND)]
ALIASES = [f"alias:{name}:{when}" for name in ("champion", "previous") for when in AROUND]


def ledger(*states: str) -> list[str]:
    return [f"ledger:{state}:{when}" for state in states for when in AROUND]


POINTS = [
    *(("rollback", p) for p in [*ledger("ROLLED_BACK"), *TOUCHED, *ALIASES[:2]]),
    *(("promote", p) for p in [*ledger("SWAP_INTENT", "SWAPPED", "BAKING"), *TOUCHED, *ALIASES]),
    ("conclude", "ledger:PASSED:after"),
]
FEW = [
    ("rollback", "ledger:ROLLED_BACK:after"),
    ("rollback", "engine:load:mid"),
    ("promote", "ledger:SWAPPED:after"),
    ("promote", "alias:champion:before"),
    ("conclude", "ledger:PASSED:after"),
]


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresProcess]:
    """Ended after the homes that use it."""
    process = PostgresProcess()
    yield process
    process.remove()


@pytest.fixture(scope="module", params=["sqlite", pytest.param("postgresql", marks=needs_server)])
def running(request: pytest.FixtureRequest, scale: Callable[[int, int], int]) -> Iterator[Any]:
    """One home that serves, for all tests: none ends before all of it agrees again."""
    on_server = request.param == "postgresql"
    if on_server and scale(0, 1) == 0:
        pytest.skip("controllers on PostgreSQL: in the soak; its writers are killed in agent/store")
    url = request.getfixturevalue("server").database("crash") if on_server else None
    made = request.getfixturevalue("make_stack")(2, url)
    yield made
    made[0].stop()  # before the other one starts


def due(running: Any, wanted: str) -> dict[str, Any]:
    """The act to be killed; what has to come before it is done here."""
    stack, controllers, service = running
    champion, (origin, *others) = service.ledger.champion(), stack.digests[:3]
    if wanted == "conclude":
        return {"act": wanted, "digest": stack.more(controllers, 1, "EVALUATED")[0]}
    other = next(digest for digest in others if digest != champion)
    if wanted == "rollback" and champion == origin:
        assert controllers.act(act="promote", digest=other)["ended"]["state"] == "SWAPPED"
        stack.settled(service)
    return {"act": wanted, "digest": origin if wanted == "rollback" else other}


def killed(running: Any, wanted: str, point: str) -> float:
    """Kill an act there; the seconds until all agree.

    Again where an alias was shown before it, or where the server was away for longer than a lease.
    """
    stack, controllers, service = running
    while True:
        act = due(running, wanted)
        ended = controllers.act(**act, point=point, signal=signal.SIGKILL)
        began = time.monotonic()
        stack.settled(service, on=act["digest"] if wanted == "conclude" else None)
        if ended.get("signal") == signal.SIGKILL:
            return time.monotonic() - began
        late = str(ended.get("error")).startswith("LeaseLostError")
        assert point in ALIASES or late, (act, point, ended)


def kill_at(running: Any, points: Iterable[tuple[str, str]]) -> None:
    """After every kill ledger, alias, choice, weights and stamp agree, and nobody acted.

    Clients ask all the while: none is ever answered by weights other than those it is told.
    """
    stack, _, service = running
    wrong: list[tuple[str, str]] = []
    over = threading.Event()

    def client() -> None:
        while not over.is_set():
            time.sleep(0.02)
            told, weights = stack.ask()
            if told != weights:
                wrong.append((told, weights))

    asking = threading.Thread(target=client)
    asking.start()
    took = []
    try:
        stack.settled(service)
        first = time.monotonic()
        for wanted, point in points:
            took.append(killed(running, wanted, point))
            LOG.info("%s at %s: %.1f s until all agreed", wanted, point, took[-1])
    finally:
        over.set()
        asking.join()
    each, longest = (time.monotonic() - first) / len(took), max(took)
    LOG.info("%d kills, %.1f s each, longest %.1f s until all agreed", len(took), each, longest)
    assert wrong == []
    assert service.ledger.verify() > len(took)
    epochs = [entry.epoch for entry in service.ledger.history(10**6)]
    assert epochs == sorted(epochs, reverse=True)


def test_a_controller_killed_anywhere_leaves_one_champion(
    running: Any, scale: Callable[[int, int], int]
) -> None:
    kills = scale(len(FEW), 100)
    kill_at(running, itertools.islice(itertools.cycle(POINTS if kills == 100 else FEW), kills))


@needs_server
def test_so_it_does_on_a_server_that_is_killed_as_well(
    server: PostgresProcess,
    make_stack: Callable[..., Any],
    scale: Callable[[int, int], int],
) -> None:
    """Nothing is lost; each process says in one line that the server is away."""
    if scale(0, 1) == 0:
        pytest.skip("minutes of swaps that meet an outage: in the soak")
    with server.disturbed(1, up_s=7.0, away_s=2.0) as url:
        running = make_stack(2, f"{url}/trial0")
        kill_at(running, POINTS)
    assert server.kills > 1
    for log in running[0].home.root.glob("*.log"):
        lines = [line for line in log.read_text().splitlines() if "does not answer" in line]
        assert len(lines) <= server.kills, log
        assert not any("a-secret" in line for line in lines)


@pytest.mark.parametrize("point", ["engine:load:mid", "ledger:SWAPPED:before"])
def test_a_controller_that_was_stopped_and_woken_cannot_write(
    running: Any, scale: Callable[[int, int], int], point: str
) -> None:
    """Stopped within a swap for longer than its lease, taken for dead, and woken."""
    stack, controllers, service = running
    stack.settled(service)
    pid = controllers.begin(**due(running, "promote"), point=point, signal=signal.SIGSTOP)
    stopped = psutil.Process(pid)
    stack.until(lambda: stopped.status() == psutil.STATUS_STOPPED, 30.0)
    began = time.monotonic()
    champion = stack.settled(service)
    rows = service.ledger.history(100)
    time.sleep(max(0.0, scale(0, 30) - (time.monotonic() - began)))
    stopped.resume()
    told = controllers.end()
    assert told["ended"] is None
    assert told["error"].startswith(("LeaseLostError", "StaleEpoch")), told
    assert stack.settled(service) == champion
    assert service.ledger.history(100) == rows


def test_two_controllers_racing_lose_and_double_nothing(
    running: Any, scale: Callable[[int, int], int]
) -> None:
    """Both want every promotion: each is made once, by one of them."""
    count = scale(6, 200)
    stack, controllers, service = running
    digests = stack.more(controllers, count)
    stack.settled(service)
    began = time.monotonic()
    told = controllers.act(act="race", digests=digests)
    assert told["ended"], told
    made = told["ended"]["made"]
    LOG.info("%s of %d promotions, %.1f s", made, count, time.monotonic() - began)
    assert sum(made) == count
    assert stack.settled(service) == digests[-1]
    for digest in digests:
        states = [entry.state for entry in service.ledger.of(digest)]
        kept = [state for state in states if state != "BAKING"]  # or settled before it was written
        assert kept == ["PROPOSED", "EVALUATED", "PASSED", "SWAP_INTENT", "SWAPPED", "CHAMPION"]
    service.ledger.verify()


def test_a_rollback_needs_no_engine(running: Any) -> None:
    """The new version's engine dies again and again; the way back does not ask it."""
    stack, controllers, service = running
    act = due(running, "rollback")
    stack.settled(service)
    stack.kill_engine()
    told = controllers.act(**act)
    assert told["ended"]["served"] == stack.digests[0], told
    assert stack.settled(service) == stack.digests[0]
