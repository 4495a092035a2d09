"""A client that disconnects ends the work for it; a cancel from outside stays one."""

import asyncio
from typing import Any

import pytest

from agent.gateway.errors import ClientGoneError, until_gone


@pytest.mark.parametrize("who", ["client", "server", "both"])
def test_who_ended_the_work_is_distinguished(who: str) -> None:
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


def test_work_that_ends_in_time_leaves_no_task() -> None:
    async def receive() -> dict[str, Any]:
        await asyncio.sleep(60)
        return {}

    async def run() -> tuple[str, int]:
        result = await until_gone(receive, asyncio.sleep(0.01, "done"))
        await asyncio.sleep(0.01)
        return result, len(asyncio.all_tasks())

    assert asyncio.run(run()) == ("done", 1)
