"""Controllers killed, stopped and racing: one champion, and nobody had to act."""

import itertools
import logging
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest

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
]
FEW = [
    "ledger:ROLLED_BACK:after",
    "engine:load:mid",
    "ledger:SWAPPED:after",
    "alias:champion:before",
]


def next_act(service: Any, digests: list[str], wanted: str) -> dict[str, Any]:
    """What there is to do now: the champion is rolled back, or another version promoted."""
    champion = service.ledger.champion()
    if wanted == "rollback" and champion != digests[0]:
        return {"act": "rollback", "digest": digests[0]}
    others = [digest for digest in digests[1:] if digest != champion]
    return {"act": "promote", "digest": others[0]}


def test_a_controller_killed_anywhere_leaves_one_champion(
    make_stack: Callable[[int], Any], scale: Callable[[int, int], int]
) -> None:
    """After every kill ledger, alias, choice, weights and stamp agree, and nobody acted.

    Clients ask all the while: none is ever answered by weights other than those it is told.
    """
    kills = scale(len(FEW), 100)
    few = [each for each in POINTS if each[1] in FEW]
    points = itertools.cycle(POINTS if kills > len(FEW) else few)
    stack, controllers, service = make_stack(2)
    wrong: list[tuple[str, str]] = []
    over = threading.Event()

    def client() -> None:
        while not over.is_set():
            told, weights = stack.ask()
            if told != weights:
                wrong.append((told, weights))

    asking = threading.Thread(target=client)
    asking.start()
    died, longest = 0, 0.0
    try:
        stack.settled(service)
        while died < kills:
            wanted, point = next(points)
            act = next_act(service, stack.digests, wanted)
            if act["act"] == "rollback" and wanted != "rollback":
                continue
            ended = controllers.act(**act, point=point, signal=signal.SIGKILL)
            began = time.monotonic()
            assert ended.get("signal") == signal.SIGKILL or wanted != act["act"], (
                act,
                point,
                ended,
            )
            died += "signal" in ended
            stack.settled(service)
            longest = max(longest, time.monotonic() - began)
    finally:
        over.set()
        asking.join()
    LOG.info("%d kills, longest %.1f s until all agreed", died, longest)
    assert wrong == []
    assert service.ledger.verify() > died
    epochs = [entry.epoch for entry in service.ledger.history(10**6)]
    assert epochs == sorted(epochs, reverse=True)


@pytest.mark.parametrize("point", ["engine:load:mid"])
def test_a_controller_that_was_stopped_and_woken_cannot_write(
    make_stack: Callable[[int], Any], scale: Callable[[int, int], int], point: str
) -> None:
    """Stopped within a swap for longer than its lease, taken for dead, and woken."""
    stack, controllers, service = make_stack(1)
    stack.settled(service)
    pid = controllers.begin(
        act="promote", digest=stack.digests[1], point=point, signal=signal.SIGSTOP
    )
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


def test_a_rollback_needs_no_engine(make_stack: Callable[[int], Any]) -> None:
    """The new version's engine dies again and again; the way back does not ask it."""
    stack, controllers, service = make_stack(1)
    stack.settled(service)
    assert controllers.act(act="promote", digest=stack.digests[1])["ended"]["state"] == "SWAPPED"
    stack.settled(service)
    stack.kill_engine()
    told = controllers.act(act="rollback", digest=stack.digests[0])
    assert told["ended"]["served"] == stack.digests[0], told
    assert stack.settled(service) == stack.digests[0]
