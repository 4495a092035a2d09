"""What the watchdog does about each phase, a stray pause, and a gateway that is not there."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from deploy.serving.lease import Leases, Phase
from deploy.serving.served import GREEN, read_served, write_served, write_slot
from deploy.serving.watchdog import LOOK_S, STRAY_S, settled

LEASE_S = 10.0


def abandoned(world: Any, phase: Phase) -> None:
    """A controller died in this phase; the engine is paused, the gateway held."""
    leases = Leases(world.home)
    engine = world.engines["engine"]
    pid = world.pid("engine")
    lease = leases.begin(world.old, world.new, lease_s=LEASE_S, now=world.now, engine_pid=pid)
    engine.paused = True
    world.gateway.hold = "hold"
    if phase == "cold":
        leases.advance(lease, "cold", world.now, lambda: write_served(world.home, world.new))
    elif phase != "held":
        leases.advance(lease, "loading", world.now)
        engine.weights = "c" * 64  # half loaded
    if phase == "stamped":
        engine.weights = world.new.digest
        write_served(world.home, world.new)
        leases.advance(lease, "stamped", world.now)


@pytest.mark.parametrize(
    ("phase", "serves", "cold_starts"),
    [("held", "old", 0), ("loading", "old", 1), ("stamped", "new", 0), ("cold", "new", 1)],
)
def test_each_phase_has_its_own_way_out(
    world: Any, phase: Phase, serves: str, cold_starts: int
) -> None:
    abandoned(world, phase)
    world.now += LEASE_S - 0.1
    assert not world.watchdog().tick()
    assert world.engines["engine"].paused
    world.now += 0.1
    assert world.watchdog().tick()
    assert world.settled() == getattr(world, serves).digest
    assert world.cold_starts == cold_starts


def test_a_death_between_serving_json_and_the_phase_ends_in_the_old_version(world: Any) -> None:
    abandoned(world, "loading")
    write_served(world.home, world.new)
    world.now += LEASE_S
    assert world.watchdog().tick()
    assert world.settled() == world.old.digest


def test_an_engine_that_does_not_resume_is_started_cold(world: Any) -> None:
    abandoned(world, "held")
    world.engines["engine"].alive = False
    world.now += LEASE_S
    assert world.watchdog().tick()
    assert world.cold_starts == 1
    assert world.settled() == world.old.digest


def test_an_engine_that_restarted_by_itself_is_not_killed_again(world: Any) -> None:
    abandoned(world, "loading")
    world.engines["engine"].alive = False
    world.start("engine")
    world.now += LEASE_S
    assert world.watchdog().tick()
    assert world.cold_starts == 1
    assert world.settled() == world.old.digest


def test_a_watchdog_that_dies_at_work_is_followed_by_the_next(world: Any) -> None:
    abandoned(world, "loading")
    world.now += LEASE_S
    world.starts_fail = True
    with pytest.raises(RuntimeError):
        world.watchdog().tick()
    world.starts_fail = False
    assert not world.watchdog().tick()  # the first one's lease still runs
    world.now += LEASE_S
    assert world.watchdog().tick()
    assert world.settled() == world.old.digest


def test_a_gateway_that_is_not_there_does_not_keep_the_lease(world: Any) -> None:
    abandoned(world, "held")
    world.gateway.alive = False
    world.now += LEASE_S
    assert world.watchdog().tick()
    assert Leases(world.home).current() is None
    assert not world.engines["engine"].paused


def test_a_flip_that_was_stamped_only_is_done(world: Any) -> None:
    """Blue/green: serving.json names the second engine, the gateway still the first."""
    green = replace(world.new, slot=GREEN)
    write_slot(world.home, green)
    world.start(GREEN)
    leases = Leases(world.home)
    lease = leases.begin(world.old, green, lease_s=LEASE_S, now=world.now)
    leases.advance(lease, "stamped", world.now, lambda: write_served(world.home, green))
    world.now += LEASE_S
    assert world.watchdog().tick()
    assert world.settled() == green.digest
    assert world.gateway.slot == GREEN


def test_a_pause_that_belongs_to_no_swap_ends(world: Any) -> None:
    watchdog = world.watchdog()
    world.engines["engine"].paused = True
    for _ in range(int(STRAY_S / LOOK_S)):
        assert not watchdog.tick()
        assert world.engines["engine"].paused
        world.now += LOOK_S
    watchdog.tick()
    assert not world.engines["engine"].paused


def test_a_pause_within_a_swap_is_not_a_stray_one(world: Any) -> None:
    watchdog = world.watchdog()
    lease = Leases(world.home).begin(world.old, world.new, lease_s=100.0, now=world.now)
    world.engines["engine"].paused = True
    for _ in range(20):
        world.now += LOOK_S
        watchdog.tick()
    assert world.engines["engine"].paused
    Leases(world.home).end(lease)


def test_controllers_killed_in_the_pause_never_outlast_the_lease(
    make_world: Callable[[], Any], scale: Callable[[int, int], int]
) -> None:
    """Whatever fraction of the lease has passed at the kill, ticks as seldom as they may be."""
    for round_ in range(scale(2, 50)):
        world = make_world()
        abandoned(world, "held")
        began, tick_s = world.now, 0.25 + round_ / 50
        watchdog = world.watchdog()
        while not watchdog.tick():
            world.now += tick_s
        assert world.now - began <= LEASE_S + tick_s
        assert world.settled() == world.old.digest


def test_a_gateway_waits_until_the_watchdog_is_done(world: Any) -> None:
    abandoned(world, "loading")
    world.now += LEASE_S

    async def ask() -> str:
        asking = asyncio.create_task(settled(world.home, poll_s=0.01))
        await asyncio.sleep(0.05)
        assert not asking.done()
        world.watchdog().tick()
        return await asking

    began = time.monotonic()
    assert asyncio.run(ask()) == world.old.digest == read_served(world.home).digest
    assert time.monotonic() > began
