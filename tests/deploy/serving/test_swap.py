"""The swap against a world without processes: every fault, at every step, in both strategies."""

import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest

from agent.errors import UserError
from deploy.serving import swap
from deploy.serving.lease import LeaseLostError, Leases
from deploy.serving.served import GREEN, read_served, write_slot

IN_PLACE = [
    swap.Preflight,
    swap.Begin,
    swap.Intent,
    swap.Hold,
    swap.Pause,
    swap.Load,
    swap.Resume,
    swap.Verify,
    swap.Stamp,
    swap.Swapped,
    swap.Release,
    swap.End,
]
BLUE_GREEN = [
    swap.Preflight,
    swap.Begin,
    swap.Intent,
    swap.StartOther,
    swap.Verify,
    swap.Swapped,
    swap.Stamp,
    swap.Flip,
    swap.Drain,
    swap.End,
]
COLD = [
    swap.Preflight,
    swap.Begin,
    swap.Intent,
    swap.StampCold,
    swap.Hold,
    swap.StartCold,
    swap.Swapped,
    swap.Release,
    swap.End,
]
TRIAL = [
    swap.Preflight,
    swap.Begin,
    swap.Intent,
    swap.StartOther,
    swap.Verify,
    swap.Flip,
    swap.End,
]
ORDER = {"in_place": IN_PLACE, "blue_green": BLUE_GREEN, "cold": COLD}


class FaultError(Exception):
    """What a test lets go wrong."""


class Death(BaseException):
    """The controller is gone between two instructions."""


def protocol(world: Any, strategy: str) -> swap.Protocol:
    if strategy == "in_place":
        return swap.in_place(world.old, world.new)
    if strategy == "cold":
        return swap.cold(world.old, world.new)
    if strategy == "trial":
        return swap.on_trial(world.old, replace(world.new, slot=GREEN))
    return swap.blue_green(world.old, replace(world.new, slot=GREEN))


def swap_in(
    world: Any,
    strategy: str = "in_place",
    before: Callable[[swap.Step], None] = lambda _step: None,
    after: Callable[[swap.Step], None] = lambda _step: None,
) -> swap.SwapOutcome:
    """Run a swap; the world's law is checked after every step."""
    with world.controller() as controller:

        def perform(step: swap.Step) -> None:
            before(step)
            controller.perform(step)
            world.check()
            after(step)

        return swap.run(protocol(world, strategy), perform)


def raise_at(kind: type, error: BaseException, times: int = 1) -> Callable[[swap.Step], None]:
    left = [times]

    def act(step: swap.Step) -> None:
        if isinstance(step, kind) and left[0]:
            left[0] -= 1
            raise error

    return act


@pytest.mark.parametrize(("strategy", "order"), ORDER.items())
def test_a_swap_takes_its_steps_in_order_and_ends_settled(
    world: Any, strategy: str, order: list[type]
) -> None:
    taken: list[type] = []
    outcome = swap_in(world, strategy, after=lambda step: taken.append(type(step)))
    assert taken == order
    assert outcome.swapped
    assert world.settled() == world.new.digest
    assert world.records == [("SWAP_INTENT", world.new.digest), ("SWAPPED", world.new.digest)]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", IN_PLACE, ids=lambda kind: kind.__name__)
def test_any_fault_in_place_ends_settled(world: Any, kind: type, when: str) -> None:
    """A step that fails without or after its effect: one version is served and told truly."""
    act = raise_at(kind, FaultError("broken"))
    try:
        outcome = swap_in(world, **{when: act})
    except FaultError:
        outcome = swap.SwapOutcome(False, world.old)
    if Leases(world.home).current():
        world.now += 20.0
        assert world.watchdog().tick()
    assert world.settled() == (world.new if outcome.swapped else world.old).digest
    swapped_late = kind in (swap.Release, swap.End)
    assert outcome.swapped == swapped_late
    events = [event for event, _ in world.records]
    assert events.count("ROLLED_BACK") == (
        0 if swapped_late or "SWAP_INTENT" not in events or kind is swap.Intent else 1
    )


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", BLUE_GREEN, ids=lambda kind: kind.__name__)
def test_any_fault_in_blue_green_ends_settled(world: Any, kind: type, when: str) -> None:
    act = raise_at(kind, FaultError("broken"))
    with suppress(FaultError):
        swap_in(world, "blue_green", **{when: act})
    if Leases(world.home).current():
        world.now += 20.0
        assert world.watchdog().tick()
    expected = world.new if kind in (swap.Drain, swap.End) else world.old
    assert world.settled() == expected.digest
    assert world.engines["engine"].weights == world.old.digest


@pytest.mark.parametrize("strategy", ORDER)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_controller_that_dies_at_any_step_is_settled_by_the_watchdog(
    make_world: Callable[[], Any], strategy: str, when: str
) -> None:
    for kind in ORDER[strategy]:
        world = make_world()
        with pytest.raises(Death):
            swap_in(world, strategy, **{when: raise_at(kind, Death())})
        watchdog = world.watchdog()
        assert not watchdog.tick()  # the deadline has not passed: the controller might live
        due = Leases(world.home).current() is not None
        world.now += 10.5
        assert watchdog.tick() == due
        world.check()
        assert world.settled() in (world.old.digest, world.new.digest)


def test_a_controller_that_wakes_too_late_touches_nothing(make_world: Callable[[], Any]) -> None:
    """Asleep before any step until the watchdog has settled: it is refused, the world stays."""
    for kind in IN_PLACE[3:]:
        world = make_world()

        def sleep(step: swap.Step, world: Any = world, kind: type = kind) -> None:
            if isinstance(step, kind):
                world.now += 11.0
                world.watchdog().tick()
                world.settled()

        with pytest.raises(LeaseLostError):
            swap_in(world, before=sleep)
        world.check()
        world.settled()


def test_weights_that_behave_otherwise_never_meet_a_client(world: Any) -> None:
    """A head that was not re-packed: the engine says the right digest and answers wrongly."""
    world.engines["engine"].repacks_head = False
    outcome = swap_in(world)
    assert not outcome.swapped
    assert "log-probabilities differ" in outcome.reason
    assert world.cold_starts == 1
    assert world.settled() == world.old.digest


def test_long_answers_postpone_a_swap_without_a_restart(world: Any) -> None:
    world.gateway.busy = True
    outcome = swap_in(world)
    assert not outcome.swapped
    assert "still running" in outcome.reason
    assert world.cold_starts == 0
    assert "/pause" not in world.engines["engine"].calls
    assert world.settled() == world.old.digest


def test_a_pause_that_fails_is_undone_without_a_restart(world: Any) -> None:
    outcome = swap_in(world, after=raise_at(swap.Pause, FaultError("timed out")))
    assert not outcome.swapped
    assert world.cold_starts == 0
    assert world.settled() == world.old.digest


def test_an_engine_that_died_in_the_load_and_restarted_is_not_killed_again(world: Any) -> None:
    def die(step: swap.Step) -> None:
        if isinstance(step, swap.Load):
            world.engines["engine"].alive = False
            world.start("engine")  # as supervisord does

    outcome = swap_in(world, before=die)
    assert not outcome.swapped
    assert world.cold_starts == 1
    assert world.settled() == world.old.digest


def test_an_old_version_that_does_not_start_is_tried_again_by_the_watchdog(world: Any) -> None:
    world.starts_fail = True
    with pytest.raises(RuntimeError, match="no memory"):
        swap_in(world, before=raise_at(swap.Verify, FaultError("wrong")))
    world.check()
    world.now += 20.0
    with pytest.raises(RuntimeError):
        world.watchdog().tick()
    world.starts_fail = False
    world.now += 20.0
    assert world.watchdog().tick()
    assert world.settled() == world.old.digest


def test_a_bad_directory_is_refused_before_the_hold(world: Any, tmp_path: Any) -> None:
    for bad in (tmp_path / "none", tmp_path):
        world.new = replace(world.new, directory=str(bad))
        with pytest.raises(UserError):
            swap_in(world)
    assert world.gateway.holds == 0
    assert "/pause" not in world.engines["engine"].calls
    assert world.settled() == world.old.digest


def test_the_right_weights_beside_a_stranger_are_refused(world: Any, tmp_path: Any) -> None:
    """The digest is right; the folder holds a file an engine might read."""
    folder = tmp_path / world.new.digest
    shutil.copytree(world.new.directory, folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    world.new = replace(world.new, directory=str(folder))
    with pytest.raises(UserError, match=r"pytorch_model\.bin may not be there"):
        swap_in(world)
    assert world.settled() == world.old.digest


def test_another_digest_than_the_directory_holds_is_refused(world: Any) -> None:
    world.new = replace(world.new, digest="0" * 64)
    with pytest.raises(UserError, match="wanted 0000"):
        swap_in(world)
    assert world.settled() == world.old.digest


def test_a_version_without_recorded_answers_is_refused(world: Any) -> None:
    (world.home.probes_json(world.new.digest)).unlink()
    with pytest.raises(UserError, match="no probes of a cold engine"):
        swap_in(world)
    assert world.settled() == world.old.digest


def test_a_ledger_that_refuses_the_intent_stops_everything(world: Any) -> None:
    world.record = lambda *_: (_ for _ in ()).throw(UserError("epoch 1: was taken over"))
    with pytest.raises(UserError, match="taken over"):
        swap_in(world)
    assert world.settled() == world.old.digest
    assert world.gateway.holds == 0


def test_two_swaps_at_once_are_refused(world: Any) -> None:
    refused: list[str] = []

    def again(step: swap.Step) -> None:
        if isinstance(step, swap.Pause):
            try:
                swap_in(world)
            except UserError as error:
                refused.append(str(error))

    assert swap_in(world, after=again).swapped
    assert len(refused) == 1
    assert "under way" in refused[0]
    assert world.settled() == world.new.digest


def test_a_gateway_that_dies_in_the_hold_is_opened_later(world: Any) -> None:
    """It restarts with what serving.json names; the watchdog ends the lease."""

    def die(step: swap.Step) -> None:
        if isinstance(step, swap.Release):
            world.gateway.alive = False

    outcome = swap_in(world, before=die)
    assert outcome.swapped
    assert "watchdog" in outcome.reason
    world.gateway = type(world.gateway)(read_served(world.home).digest)
    world.now += 20.0
    assert world.watchdog().tick()
    assert world.settled() == world.new.digest


def test_back_to_a_warm_engine_starts_nothing(world: Any) -> None:
    assert swap_in(world, "blue_green").swapped
    green = read_served(world.home)
    starts = world.cold_starts
    with world.controller() as controller:
        back = swap.blue_green(green, world.old)
        outcome = swap.run(back, controller.perform)
    assert outcome.swapped
    assert world.cold_starts == starts
    assert world.settled() == world.old.digest


def test_an_engine_that_is_not_kept_warm_is_stopped(world: Any) -> None:
    with world.controller() as controller:
        target = replace(world.new, slot=GREEN)
        swap.run(swap.blue_green(world.old, target, keep_warm=False), controller.perform)
    assert world.pid("engine") is None
    assert world.settled() == world.new.digest


@pytest.mark.parametrize("dead", ["engine", "gateway", "both"])
def test_a_cold_start_needs_nobody_alive(world: Any, dead: str) -> None:
    """Whoever is down comes back on what is stamped; nobody is ever told a wrong version."""
    world.engines["engine"].alive = dead == "gateway"
    world.gateway.alive = dead == "engine"
    assert swap_in(world, "cold").swapped
    assert world.cold_starts == 1
    if not world.gateway.alive:
        world.gateway = type(world.gateway)(read_served(world.home).digest)
        world.now += 20.0
        world.watchdog().tick()
    assert world.settled() == world.new.digest


def test_a_cold_start_does_not_wait_for_answers_of_a_hung_engine(world: Any) -> None:
    world.gateway.busy = True
    world.engines["engine"].paused = True
    assert swap_in(world, "cold").swapped
    assert world.settled() == world.new.digest


def test_a_cold_start_that_fails_is_finished_by_the_watchdog(world: Any) -> None:
    world.starts_fail = True
    with pytest.raises(RuntimeError, match="no memory"):
        swap_in(world, "cold")
    world.starts_fail = False
    world.now += 20.0
    assert world.watchdog().tick()
    assert world.settled() == world.new.digest


def test_one_slot_cannot_be_both(world: Any) -> None:
    with pytest.raises(ValueError, match="the other one"):
        next(swap.blue_green(world.old, world.new))


def test_a_warm_engine_with_other_weights_is_started_again(world: Any) -> None:
    assert swap_in(world, "blue_green").swapped
    green = read_served(world.home)
    write_slot(world.home, replace(world.old, digest="e" * 64))
    starts = world.cold_starts
    with world.controller() as controller:
        outcome = swap.run(swap.blue_green(green, world.old), controller.perform)
    assert outcome.swapped
    assert world.cold_starts == starts + 1
    assert world.settled() == world.old.digest


def test_a_trial_gives_the_candidate_a_share_and_serves_the_old_version(world: Any) -> None:
    taken: list[type] = []
    outcome = swap_in(world, "trial", after=lambda step: taken.append(type(step)))
    assert taken == TRIAL
    assert (outcome.swapped, outcome.served) == (True, world.old)
    assert world.tried() == (world.new.digest, GREEN)
    assert world.settled() == world.old.digest
    assert world.records == [("CANARY", world.new.digest)]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", TRIAL, ids=lambda kind: kind.__name__)
def test_any_fault_in_a_trials_beginning_serves_the_old_version(
    world: Any, kind: type, when: str
) -> None:
    with suppress(FaultError):
        swap_in(world, "trial", **{when: raise_at(kind, FaultError("broken"))})
    if Leases(world.home).current():
        world.now += 20.0
        assert world.watchdog().tick()
    world.check()
    assert world.settled() == world.old.digest
    begun = kind in (swap.StartOther, swap.Verify, swap.Flip)
    assert (("ROLLED_BACK", world.new.digest) in world.records) == begun


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", TRIAL, ids=lambda kind: kind.__name__)
def test_a_controller_that_dies_in_a_trial_leaves_everything_to_the_old_version(
    world: Any, kind: type, when: str
) -> None:
    """Nobody renews the trial: it lapses. Who takes it up again begins where it was."""
    with pytest.raises(Death):
        swap_in(world, "trial", **{when: raise_at(kind, Death())})
    world.check()
    world.now += 200.0
    world.watchdog().tick()
    assert world.tried() is None
    assert world.settled() == world.old.digest
    assert swap_in(world, "trial").swapped
    assert world.tried() == (world.new.digest, GREEN)
    assert world.settled() == world.old.digest


def test_a_version_on_trial_is_swapped_in_without_another_start(world: Any) -> None:
    assert swap_in(world, "trial").swapped
    starts = world.cold_starts
    assert swap_in(world, "blue_green").swapped
    assert world.cold_starts == starts
    assert world.settled() == world.new.digest
