"""How long to wait in each of many waits, with one timer for all of them."""

import asyncio
from collections.abc import Callable


class Patience:
    """Calls ``late`` once a wait has lasted ``limit_s``.

    A timer of its own for every wait costs more than the wait: a stream has one per token. This
    one is set again only when it rings, for what is left of the wait that is going on then.
    """

    def __init__(self, late: Callable[[], object], loop: asyncio.AbstractEventLoop) -> None:
        self._late = late
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = None
        self._until: float | None = None  # loop time, s; None: nobody waits
        self.rang = False  # whether ``late`` was called

    def begin(self, limit_s: float) -> None:
        """A wait begins."""
        self._until = self._loop.time() + limit_s
        if self._timer is not None and self._timer.when() > self._until:
            self.close()
        if self._timer is None:
            self._timer = self._loop.call_at(self._until, self._ring)

    def end(self) -> None:
        """It is over."""
        self._until = None

    def close(self) -> None:
        """No timer any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _ring(self) -> None:
        self._timer = None
        if self._until is None:
            return
        if self._loop.time() < self._until:
            self._timer = self._loop.call_at(self._until, self._ring)
        else:
            self._until, self.rang = None, True
            self._late()
