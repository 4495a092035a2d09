"""Output of commands: bars on stderr, tables or one JSON document on stdout.

The progress of long work goes to stderr, so that stdout carries a command's result alone.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

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


def quiet_libraries() -> None:
    """Turn off telemetry and progress output of libraries that the environment leaves open."""
    for name, value in {
        "DO_NOT_TRACK": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_LOGGING_LEVEL": "WARNING",
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
    }.items():
        os.environ.setdefault(name, value)


@contextmanager
def reporter(quiet: bool) -> Iterator[Reporter]:
    """Progress bars on stderr, or nothing."""
    if quiet:
        yield Silent()
    else:
        with Bars() as bars:
            yield bars


def show(document: Any, as_json: bool, *tables: Any) -> None:
    """The document as JSON, or the tables drawn for people."""
    if as_json:
        print(json.dumps(document, indent=1, default=str, allow_nan=False))  # noqa: T201
    else:
        for each in tables:
            console().print(each)


def pairs(title: str, values: Mapping[str, Any]) -> Table:
    """Two columns: name and value."""
    drawn = Table(title=title, title_justify="left", show_header=False)
    for key, value in values.items():
        drawn.add_row(key, str(value))
    return drawn


def collected_tables(preview: Mapping[str, Any]) -> list[Table]:
    """Where the next round's prompts come from, what was set aside and why, and a few of them."""
    counts = {key: value for key, value in preview.items() if not isinstance(value, list | dict)}
    aside = Table("requests", "principal", "why", "reason", title="set aside", title_justify="left")
    for each in preview["reasons"]:
        named = (str(each[key]) for key in ("requests", "principal", "why", "reason"))
        aside.add_row(*named)
    tables = [pairs("prompts of the next round", counts), *([aside] if aside.row_count else [])]
    for kind, prompts in preview["prompts"].items():
        for place, messages in enumerate(prompts, start=1):
            drawn = Table(title=f"{kind}, {place}", title_justify="left", show_header=False)
            for message in messages:
                drawn.add_row(str(message["role"]), str(message["content"]))
            tables.append(drawn)
    return tables


def forecast_tables(planned: Mapping[str, Any]) -> list[Table]:
    """A round's parts, what it needs and can decide, and what speaks against it."""
    title = f"a round on {planned['target']}"
    parts = Table("part", "completions", "tokens", "minutes", title=title, title_justify="left")
    total = {name: planned[name] for name in ("completions", "tokens", "minutes")}
    for each in [*planned["costs"], {"part": "all", **total}]:
        minutes = f"{each['minutes']:.1f}"
        parts.add_row(each["part"], f"{each['completions']:,}", f"{each['tokens']:,}", minutes)
    gain = planned["smallest_gain"]
    needs = {
        "budget, minutes": planned["budget_minutes"] or "none",
        "memory of delta, GiB": f"{planned['memory_gib']:.2f}",
        "disk of a candidate, GiB": f"{planned['disk_gib']:.2f}",
        "smallest gain the gate can show": "none" if gain is None else f"{100 * gain:.1f} points",
    }
    needs |= {
        f"margin of {task}": f"{100 * m:.1f} points" for task, m in planned["margins"].items()
    }
    needs |= {"price": planned["price"]} if "price" in planned else {}
    warnings = Table(title="warnings", title_justify="left", show_header=False)
    for warning in planned["warnings"]:
        warnings.add_row(warning)
    return [parts, pairs("needs", needs), *([warnings] if warnings.row_count else [])]


def status_table(status: Mapping[str, Any]) -> Table:
    """Addresses, champion and services."""
    title = f"endpoint {status['endpoint'] or 'down'}"
    drawn = Table(title=title, title_justify="left")
    for column in ("service", "state", "pid"):
        drawn.add_column(column)
    for each in status["services"]:
        drawn.add_row(each["name"], each["state"], str(each["pid"] or "-"))
    for name in ("mlflow", "prefect", "sign_in", "champion"):
        drawn.add_row(name.replace("_", " "), str(status[name] or "-"), "")
    return drawn
