"""Progress of long work, on stderr: stdout carries a command's result alone."""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

SHOWN = 6  # finished bars that stay
LINE_EVERY = 30.0  # seconds between two lines about one piece of work, where bars cannot be drawn

Advance = Callable[[int], None]  # takes the number of steps done so far


class Reporter(Protocol):
    """Receives messages and progress of long work."""

    def track(self, what: str, total: int) -> Advance:
        """Begin a bar of ``total`` steps; call the result with the steps done so far."""
        ...

    def say(self, text: str) -> None:
        """One line about what happens next."""
        ...


class Silent:
    """A ``Reporter`` that prints nothing."""

    def track(self, what: str, total: int) -> Advance:
        """Nothing is drawn."""
        return lambda done: None

    def say(self, text: str) -> None:
        """Nothing is said."""


def console(*, stderr: bool = False) -> Console:
    """A console that prints text literally: a client's text may hold Rich markup."""
    return Console(stderr=stderr, markup=False, emoji=False)


class Bars:
    """Rich bars while a person watches; plain lines into a file or a log."""

    def __init__(self) -> None:
        self._console = console(stderr=True)
        self._bars = Progress(
            TextColumn("  {task.description:<38}", markup=False),
            BarColumn(28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            disable=not sys.stderr.isatty(),
        )

    def __enter__(self) -> "Bars":
        """Start drawing."""
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop drawing; finished bars stay on the screen."""
        self._bars.stop()

    def track(self, what: str, total: int) -> Advance:
        """Add a bar, or lines where bars cannot be drawn; all but the newest finished bars go."""
        if self._bars.disable:
            return self._lines(what, total)
        for old in [each for each in self._bars.tasks if each.finished][:-SHOWN]:
            self._bars.update(old.id, visible=False)
        bar = self._bars.add_task(what, total=total)
        return lambda done: self._bars.update(bar, completed=done)

    def _lines(self, what: str, total: int) -> Advance:
        """The bar as lines: one at the beginning, then one every LINE_EVERY seconds."""
        self._console.print(f"  {what} ({total})", highlight=False)
        began = printed = time.monotonic()

        def advance(done: int) -> None:
            nonlocal printed
            now = time.monotonic()
            if now - printed >= LINE_EVERY:
                printed = now
                line = f"  {what}: {done}/{total} after {now - began:.0f} s"
                self._console.print(line, highlight=False)

        return advance

    def say(self, text: str) -> None:
        """A line above the bars."""
        self._bars.console.print(text, highlight=False)
