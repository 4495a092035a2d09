"""Clients that leave: work for them stops at once."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

T = TypeVar("T")


class ClientGoneError(Exception):
    """The client closed the connection before its answer was complete."""


async def until_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Run to the end, or stop at once when the client closes the connection.

    The work runs in the caller's task, which the watching one cancels.
    """
    worker = asyncio.current_task()
    assert worker is not None
    left = False

    def stop(watch: "asyncio.Task[None]") -> None:
        nonlocal left
        if not watch.cancelled():
            left = True
            worker.cancel()

    watch = asyncio.create_task(gone(receive))
    watch.add_done_callback(stop)
    try:
        return await work
    except asyncio.CancelledError:
        if left and not worker.uncancel():
            raise ClientGoneError from None
        raise
    finally:
        watch.remove_done_callback(stop)
        watch.cancel()


async def gone(receive: Receive) -> None:
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def cancelled(*tasks: "asyncio.Future[Any]") -> None:
    """Cancel tasks and wait until they have ended, whatever their outcome."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
