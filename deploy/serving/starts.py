"""Starts of an engine that ended before it answered, and how long the next one waits.

supervisord starts again at once what ends after more than a second, for ever, and loading a model
takes longer than that. So an engine waits before it loads: the first time it is tried again at
once, then after ``FIRST_S``, twice as long each time, at most ``LONGEST_S``.

Counted in ``<slot>-starts.json``, written before a start and removed when the engine answers, so
that one the system killed while it loaded counts too. Removing the file ends the wait.
"""

import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from agent.errors import UserError
from agent.home import Home, read_sealed, write_sealed
from deploy.serving.served import SLOTS
from deploy.supervise import last_line

AT_ONCE = 1  # starts that follow a failed one without a wait
TELL = 3  # failed starts after which people are told
FIRST_S, LONGEST_S = 5.0, 300.0
POLL_S = 0.5  # between two looks whether the wait is ended

LOG = logging.getLogger("anchorage.engine")


@dataclass(frozen=True, slots=True)
class Starts:
    """Starts of one slot's engine since it last answered, the one under way included."""

    begun: int
    since: float  # unix seconds, of the first of them
    pid: int  # of the newest
    next_at: float = 0.0  # unix seconds: it loads no earlier
    wrote: str = ""  # the last line in the log before the newest

    @property
    def failed(self) -> int:
        """Those that ended before the engine answered."""
        return self.begun - 1

    def text(self, slot: str) -> str:
        """For a person, in one line."""
        until = datetime.fromtimestamp(self.next_at, UTC).strftime("%H:%M:%S UTC")
        return (
            f"{slot}: {self.failed} starts ended before it answered, the next one is at {until}; "
            f"the last one wrote: {self.wrote}"
        )


def wait_s(failed: int) -> float:
    """Seconds to wait before another start after so many failed ones."""
    doubled = failed - AT_ONCE - 1
    return 0.0 if doubled < 0 else min(FIRST_S * 2.0 ** min(doubled, 30), LONGEST_S)


def starts(home: Home, slot: str) -> Starts | None:
    """The starts of a slot's engine that has not answered yet; None where it has."""
    try:
        return Starts(**read_sealed(home.starts_json(slot)))
    except (FileNotFoundError, UserError, TypeError):  # a damaged count begins again
        return None


def begin(
    home: Home,
    slot: str,
    clock: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Count this start, then wait as long as the failed ones before it ask for."""
    before, pid, now = starts(home, slot), os.getpid(), clock()
    if before is not None and before.pid == pid:  # this process, whose program began again
        return
    failed = before.begun if before else 0
    until = now + wait_s(failed)
    since = before.since if before else now
    count = Starts(failed + 1, since, pid, until, last_line(home, slot) if failed else "")
    path = home.starts_json(slot)
    with suppress(OSError):  # an engine starts on a full disk, too; it only does not wait
        write_sealed(path, asdict(count))
    if until > now:
        LOG.error("%s", count.text(slot))
    while clock() < until and path.exists():
        sleep(POLL_S)


def forget_starts(home: Home, slot: str) -> None:
    """Begin counting anew: the engine answers, or somebody starts it on purpose."""
    home.starts_json(slot).unlink(missing_ok=True)


def failing(home: Home) -> list[tuple[str, Starts]]:
    """The slots whose engine failed to start ``TELL`` times or more."""
    counted = [(slot, starts(home, slot)) for slot in SLOTS]
    return [(slot, each) for slot, each in counted if each is not None and each.failed >= TELL]
