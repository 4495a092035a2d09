"""The serving engines as processes: start, stop, restart; by supervisord or by containers."""

import time
from collections.abc import Callable
from typing import Protocol

import psutil

from agent.home import Home
from deploy.serving.control import ControlError, EngineControl, listener_of
from deploy.serving.served import SLOTS
from deploy.serving.starts import forget_starts
from deploy.supervise import (
    end,
    kill_service,
    last_line,
    start_service,
    states,
    stop_service,
    supervisor_of,
    with_children,
)

START_S = 600.0  # a cold start takes 15 s of one CPU core, and minutes for a large model on a GPU
POLL_S = 0.1


class Engines(Protocol):
    """What starts and stops engines; a slot names one of them."""

    def pid(self, slot: str) -> int | None:
        """The engine's process now."""
        ...

    def start(self, slot: str) -> None:
        """Start it and wait until it answers; one that answers already is left alone."""
        ...

    def stop(self, slot: str) -> None:
        """End it."""
        ...

    def restart(self, slot: str, instead_of: int | None) -> None:
        """Kill it, unless it is another process than ``instead_of`` already; wait for answers."""
        ...


def engines_of(home: Home) -> Engines:
    """supervisord's where one runs, else a container platform's."""
    return SupervisedEngines(home) if supervisor_of(home) else ContainerEngines(home)


def is_up(home: Home) -> bool:
    """Whether the home serves: under supervisord, or a process listens on its sockets."""
    sockets = (home.admin_socket, *(home.engine_socket(slot) for slot in SLOTS))
    return supervisor_of(home) is not None or any(listener_of(each) for each in sockets)


class SupervisedEngines:
    """``Engines`` under the home's supervisord."""

    def __init__(self, home: Home, start_s: float = START_S) -> None:
        self._home = home
        self._start_s = start_s

    def pid(self, slot: str) -> int | None:
        """See ``Engines``."""
        return next((s.pid for s in states(self._home) if s.name == slot), None)

    def start(self, slot: str) -> None:
        """See ``Engines``."""
        forget_starts(self._home, slot)  # on purpose: it waits for no failed start before
        start_service(self._home, slot)
        self._wait(slot, not_pid=None)

    def stop(self, slot: str) -> None:
        """See ``Engines``."""
        stop_service(self._home, slot)
        forget_starts(self._home, slot)

    def restart(self, slot: str, instead_of: int | None) -> None:
        """See ``Engines``."""
        now = self.pid(slot)
        kill = instead_of in (None, now)
        if kill:
            forget_starts(self._home, slot)
            kill_service(self._home, slot)
        start_service(self._home, slot)  # does nothing where supervisord has started it already
        self._wait(slot, not_pid=now if kill else None)

    def _wait(self, slot: str, not_pid: int | None) -> None:
        def ready(engine: EngineControl) -> bool:
            return self.pid(slot) not in (None, not_pid) and engine.healthy()

        _until(self._home, slot, ready, self._start_s)


class ContainerEngines:
    """``Engines`` in containers that share processes and sockets.

    The platform starts again what is killed. It decides how many engines there are, so blue/green
    has no second engine to start here.
    """

    def __init__(self, home: Home, start_s: float = START_S) -> None:
        self._home = home
        self._start_s = start_s

    def pid(self, slot: str) -> int | None:
        """The process that listens on the slot's socket."""
        return listener_of(self._home.engine_socket(slot))

    def start(self, slot: str) -> None:
        """See ``Engines``: only waits."""
        _until(self._home, slot, EngineControl.healthy, self._start_s)

    def stop(self, slot: str) -> None:
        """See ``Engines``: refused, the platform would start it again."""
        raise ControlError(f"{slot}: the container platform stops it; allowed: in-place swaps")

    def restart(self, slot: str, instead_of: int | None) -> None:
        """See ``Engines``."""
        now = self.pid(slot)
        kill = now is not None and instead_of in (None, now)
        if kill:
            end(with_children([psutil.Process(now)]), grace_s=0.0)

        def ready(engine: EngineControl) -> bool:
            return not (kill and self.pid(slot) == now) and engine.healthy()

        _until(self._home, slot, ready, self._start_s)


def _until(home: Home, slot: str, ready: Callable[[EngineControl], bool], timeout_s: float) -> None:
    """Wait for an engine; ControlError with its last line when it takes too long."""
    until = time.monotonic() + timeout_s
    with EngineControl.at(home.engine_socket(slot)) as engine:
        while not ready(engine):
            if time.monotonic() > until:
                raise ControlError(f"{slot}: does not start; it wrote: {last_line(home, slot)}")
            time.sleep(POLL_S)
