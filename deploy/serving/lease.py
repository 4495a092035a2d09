"""swap.json: the lease of the process that changes the weights, its phase and its deadline.

A controller takes the lease before it touches anything and writes each phase before it acts. Once
the deadline has passed only the watchdog may take it; the controller is refused at its next phase.
Every change is made under one file lock, so that the two never hold it at the same time.
"""

import json
import secrets
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Literal

from agent.errors import UserError
from agent.home import Home, locked, write_atomically
from deploy.serving.served import Served

# held: the engine may be paused, its weights are the old ones
# loading: its weights are unknown · stamped: they are what serving.json names, and verified
# cold: serving.json names the target already, the engine of before has to be killed
Phase = Literal["held", "loading", "stamped", "cold"]


class LeaseLostError(Exception):
    """The lease ran out or was taken: its holder must not touch the engine any more."""


@dataclass(frozen=True, slots=True)
class Lease:
    """One change of weights under way; ``deadline`` is unix time.

    ``engine_pid``: the process being changed; another one there now has started cold meanwhile.
    """

    id: str
    phase: Phase
    deadline: float
    lease_s: float
    previous: Served
    target: Served
    engine_pid: int | None

    def expired(self, now: float) -> bool:
        """Past its deadline, or so far before it that the clock was set back."""
        return now >= self.deadline or now < self.deadline - 2 * self.lease_s


class Leases:
    """The one lease of a home."""

    def __init__(self, home: Home) -> None:
        self._path = home.swap_json
        self._lock = home.swap_lock

    def begin(
        self,
        previous: Served,
        target: Served,
        *,
        lease_s: float,
        now: float,
        engine_pid: int | None = None,
    ) -> Lease:
        """Take the lease; UserError while another has not ended."""
        with self._locked():
            current = self.current()
            if current is not None:
                raise UserError(
                    f"swap to {current.target.digest[:12]}: is under way until it ends or the "
                    f"watchdog settles it, {current.deadline - now:.0f} s from now"
                )
            name, until = secrets.token_hex(8), now + lease_s
            return self._write(Lease(name, "held", until, lease_s, previous, target, engine_pid))

    def check(self, lease: Lease, now: float) -> None:
        """LeaseLostError when the lease was taken or has run out."""
        with self._locked():
            self._check(lease, now)

    def advance(
        self, lease: Lease, phase: Phase, now: float, write: Callable[[], None] = lambda: None
    ) -> Lease:
        """Enter a phase before acting on it; LeaseLostError when there is no right to.

        ``write`` runs under the same lock: a process that has lost the lease never runs it.
        """
        with self._locked():
            self._check(lease, now)
            write()
            return self._write(replace(lease, phase=phase))

    def renew(self, lease: Lease, now: float) -> Lease:
        """Start its time anew, while an engine starts; LeaseLostError when it has run out."""
        with self._locked():
            self._check(lease, now)
            return self._write(replace(lease, deadline=now + lease.lease_s))

    def end(self, lease: Lease) -> None:
        """Remove the lease; LeaseLostError when it was taken."""
        with self._locked():
            current = self.current()
            if current is None or current.id != lease.id:
                raise LeaseLostError(f"swap to {lease.target.digest[:12]}: the lease was taken")
            self._path.unlink()

    def take(self, now: float) -> Lease | None:
        """Take over the expired lease for its whole time; None when no lease has expired."""
        with self._locked():
            current = self.current()
            if current is None or not current.expired(now):
                return None
            taken = replace(current, id=secrets.token_hex(8), deadline=now + current.lease_s)
            return self._write(taken)

    def current(self) -> Lease | None:
        """The lease on disk; none where a power cut left the file without its content."""
        try:
            text = self._path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        if not text.strip("\0"):
            return None
        record = json.loads(text)
        served = {name: Served(**record[name]) for name in ("previous", "target")}
        return Lease(**(record | served))

    def _check(self, lease: Lease, now: float) -> None:
        current = self.current()
        if current is None or current.id != lease.id:
            raise LeaseLostError(f"swap to {lease.target.digest[:12]}: the lease was taken")
        if current.expired(now):
            raise LeaseLostError(
                f"swap to {lease.target.digest[:12]}: {lease.lease_s:.0f} s are over"
            )

    def _write(self, lease: Lease) -> Lease:
        """Not flushed: a power cut ends the engine too, which then starts on serving.json."""
        write_atomically(self._path, json.dumps(asdict(lease)), durably=False)
        return lease

    def _locked(self) -> AbstractContextManager[None]:
        """Held for the milliseconds in which swap.json is read and replaced."""
        return locked(self._lock, taken="swap.lock: another process keeps it")
