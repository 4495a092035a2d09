"""Admission as a value of its own: places, queue, hold, lease."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from agent.gateway.errors import ApiError
from agent.gateway.hold import Admission, HoldConflictError, Route

Test = Callable[[], Awaitable[None]]


def admitting(**options: Any) -> Admission:
    defaults = {"max_in_flight": 2, "max_queued": 2, "queue_timeout_s": 5.0, "retry_after_s": 1}
    route = Route("old", object())  # type: ignore[arg-type]
    return Admission(route=route, **(defaults | options))


def run(test: Test) -> None:
    asyncio.run(test())  # type: ignore[arg-type]


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def test_places_are_given_in_the_order_of_arrival() -> None:
    async def test() -> None:
        admission = admitting(max_in_flight=1)
        first = await admission.enter()
        order: list[int] = []

        async def wait(number: int) -> None:
            ticket = await admission.enter()
            order.append(number)
            admission.leave(ticket)

        waiting = [asyncio.create_task(wait(i)) for i in range(2)]
        await turns()
        assert (admission.in_flight, admission.queued, order) == (1, 2, [])
        with pytest.raises(ApiError) as caught:
            await admission.enter()
        assert caught.value.status == 503
        admission.leave(first)
        await asyncio.gather(*waiting)
        assert order == [0, 1]
        assert (admission.in_flight, admission.queued) == (0, 0)

    run(test)


def test_one_owner_leaves_places_and_queue_to_others_who_are_let_in_in_turn() -> None:
    async def test() -> None:
        admission = admitting(max_in_flight=4, max_queued=8)
        inside = [await admission.enter("eve") for _ in range(3)]  # three quarters
        order: list[str] = []

        async def wait(owner: str) -> None:
            ticket = await admission.enter(owner)
            order.append(owner)
            admission.leave(ticket)

        waiting = [asyncio.create_task(wait("eve")) for _ in range(6)]
        await turns()
        assert (admission.in_flight, admission.queued) == (3, 6)
        with pytest.raises(ApiError, match="too many requests are waiting"):
            await admission.enter("eve")  # three quarters of the queue are its own
        others = [await admission.enter("ann")]
        waiting += [asyncio.create_task(wait(owner)) for owner in ("ann", "bob")]
        await turns()
        assert (admission.in_flight, admission.queued) == (4, 8)
        admission.leave(inside.pop())
        await asyncio.gather(*waiting)
        assert order[:4] == ["eve", "ann", "bob", "eve"]
        for ticket in (*inside, *others):
            admission.leave(ticket)
        assert (admission.in_flight, admission.queued) == (0, 0)
        assert [(await admission.enter()).owner for _ in range(4)] == [""] * 4  # nobody shares it

    run(test)


def test_a_hold_waits_for_those_inside_and_keeps_others_out() -> None:
    async def test() -> None:
        admission = admitting()
        inside = await admission.enter()
        holding = asyncio.create_task(admission.hold(5, 10))
        await turns()
        waiting = asyncio.create_task(admission.enter())
        await turns()
        assert not holding.done()
        assert not waiting.done()
        admission.leave(inside)
        lease = await holding
        await turns()
        assert not waiting.done()
        admission.release("new", lease)
        assert (await waiting).route.version == "new"

    run(test)


def test_a_hold_that_would_wait_too_long_opens_again() -> None:
    async def test() -> None:
        admission = admitting()
        inside = await admission.enter()
        with pytest.raises(HoldConflictError, match="1 answers still running"):
            await admission.hold(0.01, 10)
        assert not admission.held
        assert (await admission.enter()).route.version == "old"
        assert not inside.mixed

    run(test)


def test_only_one_hold_at_a_time_and_only_its_owner_releases() -> None:
    async def test() -> None:
        admission = admitting()
        lease = await admission.hold(1, 10)
        with pytest.raises(HoldConflictError):
            await admission.hold(1, 10)
        with pytest.raises(HoldConflictError, match="another caller"):
            admission.release("new", "another")
        admission.release("new", lease)
        with pytest.raises(HoldConflictError, match="nothing is held"):
            admission.release("newer")
        admission.release("new")
        assert admission.route.version == "new"

    run(test)


def test_a_dead_controllers_hold_runs_out_to_the_old_version() -> None:
    async def test() -> None:
        pauses: list[float] = []
        admission = admitting(on_pause=pauses.append)
        lease = await admission.hold(1, 0.02)
        assert (await admission.enter()).route.version == "old"
        assert pauses[0] >= 0.02
        with pytest.raises(HoldConflictError):
            admission.release("new", lease)

    run(test)


def test_recovery_decides_the_version_and_is_asked_again_after_a_failure() -> None:
    async def test() -> None:
        versions: list[str] = []

        async def recover(version: str) -> str:
            versions.append(version)
            if len(versions) == 1:
                raise RuntimeError("engine not there yet")
            return "restored"

        admission = admitting(recover=recover)
        await admission.hold(1, 0.01)
        assert (await admission.enter()).route.version == "restored"
        assert versions == ["old", "old"]

    run(test)


def test_an_answer_over_which_the_weights_changed_is_marked_and_counted() -> None:
    async def test() -> None:
        mixed: list[int] = []
        admission = admitting(on_mixed=lambda: mixed.append(1))
        inside = await admission.enter()
        lease = await admission.hold(0, 10, wait=False)
        admission.release("new", lease)
        assert inside.mixed
        after = await admission.enter()
        assert not after.mixed
        admission.leave(inside)
        admission.leave(after)
        assert mixed == [1]

    run(test)


def test_a_flip_keeps_running_answers_where_they_began() -> None:
    async def test() -> None:
        admission = admitting()
        inside = await admission.enter()
        admission.flip("new", object())  # type: ignore[arg-type]
        after = await admission.enter()
        assert (inside.route.version, after.route.version) == ("old", "new")
        assert not inside.mixed
        assert admission.by_version() == {"old": 1, "new": 1}
        assert admission.warm == {"old": inside.route}

    run(test)


def test_an_engine_that_got_other_weights_is_no_longer_warm_with_the_old_ones() -> None:
    async def test() -> None:
        blue, green = object(), object()
        admission = admitting()
        admission.route = Route("one", blue)  # type: ignore[arg-type]
        admission.flip("two", green)  # type: ignore[arg-type]
        assert list(admission.warm) == ["one"]
        inside = await admission.enter()
        admission.flip("three", green)  # type: ignore[arg-type]
        assert list(admission.warm) == ["one"]
        assert inside.mixed
        lease = await admission.hold(0, 5, wait=False)
        admission.release("four", lease, blue)  # type: ignore[arg-type]
        assert admission.warm == {}

    run(test)


def test_a_waiter_that_gives_up_leaves_no_trace() -> None:
    async def test() -> None:
        admission = admitting(max_in_flight=1, queue_timeout_s=0.02)
        inside = await admission.enter()
        with pytest.raises(ApiError):
            await admission.enter()
        cancelled = asyncio.create_task(admission.enter())
        await turns()
        admission.leave(inside)  # lets the waiter in at the moment in which it is cancelled
        cancelled.cancel()
        await asyncio.gather(cancelled, return_exceptions=True)
        assert (admission.in_flight, admission.queued) == (0, 0)

    run(test)


def test_draining_refuses_those_who_wait_and_answers_those_inside() -> None:
    async def test() -> None:
        admission = admitting(max_in_flight=1)
        inside = await admission.enter()
        waiting = asyncio.create_task(admission.enter())
        await turns()
        admission.drain()
        for refused in (waiting, asyncio.create_task(admission.enter())):
            with pytest.raises(ApiError, match="shutting down"):
                await refused
        assert admission.in_flight == 1
        admission.leave(inside)

    run(test)
