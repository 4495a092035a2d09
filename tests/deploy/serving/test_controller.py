"""The controller's lease while an engine starts."""

import time
from pathlib import Path
from typing import Any, cast

import pytest

from agent.home import Home
from deploy.serving import swap
from deploy.serving.controller import Controller
from deploy.serving.lease import LeaseLostError, Leases
from deploy.serving.served import Served

pytestmark = pytest.mark.proof

LEASE_S = 0.3
OLD, NEW = Served("a" * 64, "/old"), Served("b" * 64, "/new")


class Slow:
    """Engines that take three leases to start."""

    def __init__(self, meanwhile: Any = lambda: None) -> None:
        self.meanwhile = meanwhile

    def pid(self, slot: str) -> int:
        return 7

    def restart(self, slot: str, instead_of: int | None) -> None:
        time.sleep(2 * LEASE_S)
        self.meanwhile()
        time.sleep(LEASE_S)


def controller(home: Home, engines: Slow) -> Controller:
    missing = cast(Any, None)  # a cold start asks neither anchor, gateway nor engine
    return Controller(
        home, missing, lambda *_: None, gateway=missing, engines=cast(Any, engines),
        connect=missing, lease_s=LEASE_S,
    )  # fmt: skip


def test_a_lease_is_kept_while_an_engine_starts_and_lapses_after(tmp_path: Path) -> None:
    home = Home.at(tmp_path)
    with controller(home, Slow()) as slow:
        slow.perform(swap.Begin(OLD, NEW, alive=False))
        slow.perform(swap.StartCold(NEW))
        lease = Leases(home).current()
        assert lease is not None
        assert lease.phase == "stamped"
        time.sleep(1.5 * LEASE_S)
        with pytest.raises(LeaseLostError, match="are over"):
            slow.perform(swap.StartCold(NEW))


def test_a_lease_that_was_taken_meanwhile_is_not_taken_back(tmp_path: Path) -> None:
    home = Home.at(tmp_path)

    def take() -> None:
        assert Leases(home).take(time.time() + 10 * LEASE_S) is not None

    with controller(home, Slow(take)) as slow:
        slow.perform(swap.Begin(OLD, NEW, alive=False))
        with pytest.raises(LeaseLostError, match="the lease was taken"):
            slow.perform(swap.StartCold(NEW))
