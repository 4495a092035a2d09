"""Waits that last too long are noticed, those that do not are left alone; so are outer cancels."""

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.gateway.errors import ClientGoneError, until_gone
from agent.gateway.wire import Patience


class Clock:
    """A loop that has nothing but timers; time passes when told."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[asyncio.TimerHandle] = []
        self.set = 0

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, call: Any) -> asyncio.TimerHandle:
        self.timers.append(asyncio.TimerHandle(when, call, (), self))  # type: ignore[arg-type]
        self.set += 1
        return self.timers[-1]

    def _timer_handle_cancelled(self, _handle: asyncio.TimerHandle) -> None:
        pass

    def get_debug(self) -> bool:
        return False

    def pass_(self, seconds: float) -> None:
        until = self.now + seconds
        while due := [t for t in self.timers if t.when() <= until and not t.cancelled()]:
            first = min(due, key=asyncio.TimerHandle.when)
            self.timers.remove(first)
            self.now = first.when()
            first._run()
        self.now = until


@given(st.lists(st.tuples(st.booleans(), st.sampled_from([0.5, 0.9, 1.0, 2.5])), max_size=40))
def test_a_wait_is_late_after_its_limit_and_no_other_is(steps: list[tuple[bool, float]]) -> None:
    """Waits, and times without one, in any order: each wait of the limit or more rings once."""
    clock, rang = Clock(), [0]
    patience = Patience(lambda: rang.__setitem__(0, rang[0] + 1), clock)  # type: ignore[arg-type]
    late = 0
    for waits, seconds in steps:
        if waits:
            patience.begin(1.0)
            late += seconds >= 1.0
        clock.pass_(seconds)
        patience.end()
        assert rang[0] == late
    assert patience.rang == (late > 0)


def test_many_short_waits_take_few_timers() -> None:
    clock = Clock()
    patience = Patience(lambda: None, clock)  # type: ignore[arg-type]
    for _ in range(1000):
        patience.begin(1.0)
        clock.pass_(0.01)
        patience.end()
    assert clock.set <= 12
    assert not patience.rang


def test_a_shorter_limit_is_kept_though_a_longer_one_was_set_before() -> None:
    clock = Clock()
    patience = Patience(lambda: None, clock)  # type: ignore[arg-type]
    patience.begin(60.0)
    patience.end()
    patience.begin(1.0)
    clock.pass_(1.5)
    assert patience.rang


@pytest.mark.parametrize("who", ["client", "server", "both"])
def test_who_ended_the_work_is_told_apart(who: str) -> None:
    """A client that leaves is ClientGoneError; a cancel from outside stays one."""
    left = asyncio.Event()

    async def receive() -> dict[str, Any]:
        await left.wait()
        return {"type": "http.disconnect"}

    async def run() -> None:
        task = asyncio.create_task(until_gone(receive, asyncio.sleep(60)))
        await asyncio.sleep(0)
        if who != "server":
            left.set()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        if who != "client":
            task.cancel()
        await task

    with pytest.raises(ClientGoneError if who == "client" else asyncio.CancelledError):
        asyncio.run(run())


def test_work_that_ends_in_time_leaves_nobody_watching() -> None:
    async def receive() -> dict[str, Any]:
        await asyncio.sleep(60)
        return {}

    async def run() -> tuple[str, int]:
        told = await until_gone(receive, asyncio.sleep(0.01, "told"))
        await asyncio.sleep(0.01)
        return told, len(asyncio.all_tasks())

    assert asyncio.run(run()) == ("told", 1)
