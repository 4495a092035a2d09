"""Settles swaps whose controller died: past the deadline no engine stays paused, no gateway held.

    python -m deploy.serving.watchdog HOME

It also looks after the supervisord that started it: when that was killed, a process outside of the
stack ends what is left and starts it again.

It holds no state of its own: the lease says how far the swap was, serving.json what to serve.
"""

import argparse
import asyncio
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from agent.home import Home
from deploy.serving.control import ControlError, EngineControl, GatewayControl
from deploy.serving.engines import Engines, engines_of
from deploy.serving.lease import Lease, LeaseLostError, Leases
from deploy.serving.served import Served, read_served, write_served
from deploy.supervise import MARKER, revive

LOG = logging.getLogger("anchorage.watchdog")
TICK_S = 0.25
LOOK_S = 2.0  # between two looks for a pause that belongs to no swap
STRAY_S = 8.0  # such a pause may last this long


class Watchdog:
    """``tick`` does what is due; nothing is remembered between ticks but a stray pause's age."""

    def __init__(
        self,
        home: Home,
        *,
        engines: Engines,
        engine_at: Callable[[Path], EngineControl] = EngineControl.at,
        gateway_at: Callable[[Path], GatewayControl] = GatewayControl.at,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._home, self._engines, self._clock = home, engines, clock
        self._engine_at, self._gateway_at = engine_at, gateway_at
        self._leases = Leases(home)
        self._stray_since: float | None = None
        self._looked = 0.0

    def tick(self) -> bool:
        """Settle the swap whose deadline has passed, if any; whether there was one.

        ControlError when the engine cannot be brought back now: the lease stays and is due again.
        """
        lease = self._leases.take(self._clock())
        if lease is None:
            self._end_stray_pause()
            return False
        LOG.warning("swap to %s: overdue in phase %s", lease.target.digest[:12], lease.phase)
        self._settle(lease)
        return True

    def _settle(self, lease: Lease) -> None:
        """Weights first, then the gateway, then the lease."""
        if lease.phase == "loading":
            write_served(self._home, lease.previous)
        served = read_served(self._home)
        if lease.phase in ("loading", "cold") or not self._resumed(served):
            self._engines.restart(served.slot, lease.engine_pid)
        self._open_gateway(served)
        try:
            self._leases.end(lease)
        except LeaseLostError:
            LOG.warning("settled later than the lease; due again")

    def _resumed(self, served: Served) -> bool:
        """Whether the engine goes on, weights and all."""
        try:
            with self._engine(served) as engine:
                engine.resume()
                return not engine.paused()
        except ControlError as error:
            LOG.warning("resume: %s", error)
            return False

    def _open_gateway(self, served: Served) -> None:
        """Release or flip it to what is served; a dead one reads serving.json when it starts."""
        socket = self._home.engine_socket(served.slot)
        try:
            with self._gateway_at(self._home.admin_socket) as gateway:
                state = gateway.state()
                if state["held"] and not state["recovering"]:
                    gateway.release(served.digest, socket=socket)
                elif state["version"] != served.digest and not state["held"]:
                    gateway.flip(served.digest, socket)
        except ControlError as error:
            LOG.warning("gateway: %s", error)

    def _end_stray_pause(self) -> None:
        """Resume an engine that has been paused for ``STRAY_S`` without a swap."""
        now = self._clock()
        if abs(now - self._looked) < LOOK_S:
            return
        self._looked = now
        if self._leases.current() is not None or not self._paused():
            self._stray_since = None
            return
        self._stray_since = now if self._stray_since is None else self._stray_since
        if now - self._stray_since >= STRAY_S:
            LOG.warning("engine paused without a swap: resumed")
            self._resumed(read_served(self._home))
            self._stray_since = None

    def _paused(self) -> bool:
        try:
            with self._engine(read_served(self._home)) as engine:
                return engine.paused()
        except ControlError:
            return False  # it is starting, or supervisord starts it

    def _engine(self, served: Served) -> AbstractContextManager[EngineControl]:
        return self._engine_at(self._home.engine_socket(served.slot))


async def settled(home: Home, poll_s: float = TICK_S) -> str:
    """The digest served once no swap is under way: for a gateway whose hold has run out."""
    leases = Leases(home)
    while leases.current() is not None:
        await asyncio.sleep(poll_s)
    return read_served(home).digest


def main(root: Path) -> None:
    """Watch until a signal ends it."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    home = Home.at(root)
    watchdog = Watchdog(home, engines=engines_of(home))
    parent = os.getppid() if "SUPERVISOR_ENABLED" in os.environ else None
    while True:
        if parent is not None and os.getppid() != parent:
            LOG.error("supervisord %d is gone: started again", parent)
            call_reviver(home)
            parent = None  # it ends this process, too
        try:
            watchdog.tick()
        except ControlError as error:
            LOG.error("%s", error)
        time.sleep(TICK_S)


def call_reviver(home: Home) -> None:
    """Start a process that is none of the stack's: by session and variable it would be ended."""
    environment = {key: value for key, value in os.environ.items() if key != MARKER}
    command = [sys.executable, "-m", "deploy.serving.watchdog", str(home.root), "--revive"]
    with home.log("watchdog").open("ab") as log:
        subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="deploy.serving.watchdog")
    parser.add_argument("home", type=Path)
    parser.add_argument("--revive", action="store_true", help="start a killed supervisord again")
    asked = parser.parse_args()
    if asked.revive:
        revive(Home.at(asked.home))
    else:
        main(asked.home)
