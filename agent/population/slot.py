"""One engine of a population: how it is started, brought to where the others are, and ended.

    sound      ``engine`` is there and answers
    mending    a thread ends what broke, starts another one and brings it to what the others hold
    lost       neither; ``reason`` says why

The population decides when a slot is mended and when the engine is admitted; nothing here waits
for another engine.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TypeVar

from agent.errors import UserError
from agent.learner.es import Step
from agent.population.schedule import Engine, EngineStartError

T = TypeVar("T")
Start = Callable[[], Engine]
MENDS = 2  # times in a row a broken engine is started again


@dataclass(frozen=True, slots=True)
class Held:
    """What every engine of a population holds, and how a fresh one is brought there."""

    anchor: Path | None = None
    snapshot: Path | None = None
    steps: tuple[Step, ...] = ()
    directory: Path | None = None  # its weights answer instead of theta

    def bring(self, engine: Engine) -> None:
        """Give an engine this anchor, delta and directory."""
        if self.anchor:
            engine.open(self.anchor)
            if self.snapshot or self.steps:
                engine.restore(self.snapshot, self.steps)
        if self.directory:
            engine.load(self.directory)

    def follow(self, engine: Engine, before: "Held") -> None:
        """Bring an engine here from what it held before: by the new steps alone where that does."""
        known = len(before.steps)
        same = (self.anchor, self.snapshot) == (before.anchor, before.snapshot)
        if not same or self.directory or self.steps[:known] != before.steps:
            self.bring(engine)
            return
        for step in self.steps[known:]:
            engine.apply(step)


class Slot:
    """One engine, how to start it, and how often in a row it was started again."""

    def __init__(self, number: int, start: Start):
        self.number, self._start = number, start
        self.engine: Engine | None = None
        self.reason = ""
        self.mending = False
        self.cannot_start = False  # its first engine said so: another one would say the same
        self._answered = False  # whether an engine of this slot ever did
        self._unclosed: Engine | None = None  # broken; closing it may take as long as a hang
        self._coming: Engine | None = None  # started, not yet where the others are
        self._mends = 0
        self._closed = False
        self._ending = Lock()  # an engine is admitted before the end or not at all

    def start(self) -> None:
        """The first start, which only begins; an engine that has no place leaves the slot lost."""
        try:
            self.engine = self._start()
        except EngineStartError as error:
            self.reason, self.cannot_start = str(error), True

    def run(self, job: Callable[[Engine], T]) -> T:
        """One job; what it raises breaks the engine, except a UserError (the caller's fault)."""
        assert self.engine is not None
        try:
            value = job(self.engine)
        except EngineStartError as error:
            self.drop(str(error))
            self.cannot_start = not self._answered
            raise
        except UserError:
            raise
        except Exception as error:
            self.drop(f"{type(error).__name__}: {error}")
            raise
        self._mends, self._answered = 0, True
        return value

    def drop(self, reason: str) -> None:
        """Take the engine out; ``release`` closes it, which may take long."""
        self.reason = reason
        engine, self.engine = self.engine, None
        if engine is not None:  # else one that broke before may still wait to be closed
            self._unclosed = engine

    def release(self) -> None:
        """Close an engine that was dropped."""
        engine, self._unclosed = self._unclosed, None
        _close(engine)

    def can_mend(self) -> bool:
        """Whether another start may be tried: not of one that could never be started."""
        tired = self._mends >= MENDS or self.cannot_start
        return self.engine is None and not tired and not self._closed

    def begin(self, held: Held, again: bool = True) -> bool:
        """Start an engine and bring it to what is held; False when that failed."""
        self._mends += again
        self.release()  # before the next start, which may need its memory
        try:
            self._coming = engine = self._start()
            if self._closed:  # set before the engine of the moment was closed
                raise ConnectionAbortedError("closed")
            held.bring(engine)
        except Exception as error:  # the boundary of an engine: recorded against it
            self._give_up(error)
        return self._coming is not None

    def follow(self, held: Held, before: Held) -> bool:
        """Bring the engine that is coming from one held state to another; False on failure."""
        assert self._coming is not None
        try:
            held.follow(self._coming, before)
        except Exception as error:  # the boundary of an engine: recorded against it
            self._give_up(error)
        return self._coming is not None

    def admit(self) -> bool:
        """Make the engine that is coming the slot's; False when the slot was closed meanwhile."""
        self.mending = False
        with self._ending:
            if not self._closed:
                self.engine, self._coming = self._coming, None
                return True
        self._give_up(ConnectionAbortedError("closed"))
        return False

    def close(self) -> None:
        """Close the engine for good, also one that another thread is just starting."""
        with self._ending:
            self._closed = True  # nothing is admitted any more
        self.drop("closed")
        self.release()
        _close(self._coming)

    def _give_up(self, error: Exception) -> None:
        """Close what was coming and keep the reason."""
        engine, self._coming = self._coming, None
        self.reason = f"{type(error).__name__}: {error}"
        _close(engine)


def _close(engine: Engine | None) -> None:
    """Close an engine, whatever comes of it: it is broken, there is nothing to learn from it."""
    if engine is not None:
        with suppress(Exception):
            engine.close()
