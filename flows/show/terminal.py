"""Output of commands: bars on stderr, tables or one JSON document on stdout.

The progress of long work goes to stderr, so that stdout carries a command's result alone.
"""

import json
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from agent.store.database import finite

DIGEST = 12  # characters of a digest, which every command takes for the whole
SHOWN = 6  # finished bars that stay
WIDE = 120  # characters of a table that is not drawn in a terminal
LINE_EVERY = 30.0  # seconds between two lines about one piece of work, where bars cannot be drawn


CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


class Advance(Protocol):
    """Takes the number of steps done so far, and what else there is to say of them."""

    def __call__(self, done: int, note: str = "") -> None:
        """So many steps are done."""
        ...


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
        return lambda done, note="": None

    def say(self, text: str) -> None:
        """Nothing is said."""


def visible(text: str) -> str:
    """A text whose control characters are written as escapes, but for line ends and tabs.

    Clients' texts are shown, and a terminal obeys such characters: they clear it, rename its
    window, answer for the person in front of it, or (those of direction) hide what a line says.
    """
    return CONTROL.sub(lambda match: match.group().encode("unicode_escape").decode(), text)


class LiteralConsole(Console):
    """A console that shows control characters instead of sending them to the terminal."""

    def render_str(self, text: str, **options: Any) -> Text:
        """What a cell, a title or a line becomes."""
        return super().render_str(visible(text), **options)


def console(*, stderr: bool = False) -> Console:
    """A console that prints text literally: a client's text may hold Rich markup.

    Into a file or a pipe, which have no width, tables are as wide as ``WIDE``.
    """
    made = LiteralConsole(stderr=stderr, markup=False, emoji=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = WIDE
    return made


class Bars:
    """Rich bars while a person watches; plain lines into a file or a log."""

    def __init__(self) -> None:
        self._console = console(stderr=True)
        self._bars = Progress(
            TextColumn("  {task.description:<30}", markup=False),
            BarColumn(16),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", markup=False),
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
        bar, left = self._bars.add_task(what, total=total, note=""), Left(total)

        def advance(done: int, note: str = "") -> None:
            text = ", ".join(filter(None, (left.after(done, time.monotonic()), note)))
            self._bars.update(bar, completed=done, note=text)

        return advance

    def _lines(self, what: str, total: int) -> Advance:
        """The bar as lines: at the beginning and the first step, then every LINE_EVERY seconds."""
        self._console.print(f"  {what} ({total})", highlight=False)
        began = printed = time.monotonic()
        left, noted = Left(total), False

        def advance(done: int, note: str = "") -> None:
            nonlocal printed, noted
            now = time.monotonic()
            remaining = left.after(done, now)
            if now - printed >= LINE_EVERY or (note and not noted):
                printed, noted = now, bool(note) or noted
                line = f"  {what}: {done}/{total} after {now - began:.0f} s"
                line = ", ".join(filter(None, (line, remaining, note)))
                self._console.print(line, highlight=False, soft_wrap=True)

        return advance

    def say(self, text: str) -> None:
        """A line above the bars."""
        self._bars.console.print(text, highlight=False, soft_wrap=True)


class Left:
    """The time that work will still take, at its speed since it was first told of."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._first: tuple[int, float] | None = None  # steps done and time of the first call

    def after(self, done: int, now: float) -> str:
        """'3 min left'; empty while no step is timed, and at the end."""
        begun, then = self._first = self._first or (done, now)
        if done <= begun or done >= self._total:
            return ""
        seconds = (now - then) / (done - begun) * (self._total - done)
        return f"{seconds:.0f} s left" if seconds < 120 else f"{seconds / 60:.0f} min left"


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
def reporter() -> Iterator[Reporter]:
    """Progress on stderr, beside whatever the command prints on stdout."""
    with Bars() as bars:
        yield bars


def show(document: Any, as_json: bool, *tables: Any) -> None:
    """The document as JSON, a number that is not finite as null, or the tables drawn for people."""
    if as_json:
        print(json.dumps(finite(document), indent=1, default=str, allow_nan=False))  # noqa: T201
    else:
        for each in tables:  # a text is not wrapped: its paths and commands are copied
            console().print(each, soft_wrap=isinstance(each, str), highlight=False)


def pairs(title: str, values: Mapping[str, Any]) -> Table:
    """Two columns: name and value; a value too long for its line goes on in the next one."""
    drawn = Table(title=title, title_justify="left", show_header=False)
    drawn.add_column(no_wrap=True)
    drawn.add_column(overflow="fold")
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


def model_plan_tables(planned: Mapping[str, Any]) -> list[Table | str]:
    """Bytes, seconds and the arithmetic of a plan for GPUs, or the line that refuses it."""
    fleet, size = planned["fleet"], planned["size"]
    title = f"{planned['model']} on {fleet['gpus']} x {fleet['gpu']}"
    drawn = Table("bytes, GiB", "delta on", "part", "needed", title=title, title_justify="left")
    for device, tried in planned["bytes"].items():
        for where in ("gpu", "host"):
            for part, count in tried[where].items():
                drawn.add_row(where, device, part, f"{count / 2**30:.1f}")
            room = f"{tried['room'][where] / 2**30:.1f}"
            drawn.add_row(where, device, "allowed", room, end_section=True)
    if "refused" in planned:
        return [drawn, planned["refused"]]
    took, bus = planned["seconds"], planned["bus"]
    lines = {
        "parameters": f"{size['parameters']:,} in {size['tensors']} tensors",
        "delta lies on": planned["device"],
        "bytes over the bus": f"{bus['member']:,} a member, {bus['generation']:,} a generation",
        "seconds a member": f"{took['generate'] + took['render']:.2f}",
        "seconds a generation": f"{took['generation']:.1f} on {fleet['engines']} engines",
        "hours a round": f"{took['round'] / 3600:.2f} of learning",
        "weight work": f"{100 * planned['weight_share']:.1f} % of a generation, "
        f"{100 * planned['weight_share_mirrored']:.1f} % with learner.mirrored",
        "engines that pay": f"up to {planned['engines_that_pay']}",
    }
    rates = ", ".join(f"{name} {value:g}" for name, value in planned["rates"].items())
    assumed = f"Rates, assumed for a GPU unless stated with --rate: {rates}"
    return [drawn, pairs("round", lines), *planned["arithmetic"], assumed]


def status_tables(status: Mapping[str, Any]) -> list[Table]:
    """Addresses, champion and services; then what is learnt, and what waits for a person."""
    title = f"endpoint {status['endpoint'] or 'down'}"
    drawn = Table(title=title, title_justify="left")
    drawn.add_column("service")
    drawn.add_column("state", overflow="fold")
    drawn.add_column("pid")
    for each in status["services"]:
        drawn.add_row(each["name"], each["state"], str(each["pid"] or "-"))
    page = status.get("model_page") or status["mlflow"]
    drawn.add_row("mlflow", str(page or "-"), "")
    for name in ("prefect", "sign_in"):
        drawn.add_row(name.replace("_", " "), str(status[name] or "-"), "")
    for page in status.get("away", ()):
        drawn.add_row("no answer", f"{page}; rounds and answers go on, what it misses follows", "")
    drawn.add_row("champion", (status["champion"] or "-")[:DIGEST], "")
    learning = status.get("learning")
    return [drawn] if learning is None else [drawn, pairs("learning", learning_lines(learning))]


def learning_lines(learning: Mapping[str, Any]) -> dict[str, str]:
    """The running round, the next one, candidates that wait, traffic and feedback, in words."""
    traffic = learning["traffic"]
    aside = {why: count for why, count in traffic["set_aside"].items() if count}
    aside |= {"unverified": traffic["unverified"]} if traffic["unverified"] else {}
    listed = ", ".join(f"{count} {why.replace('_', ' ')}" for why, count in aside.items())
    lines = {
        "round": round_line(learning["round"]),
        "next round": learning["next_round"],
        "review": learning["review"],
        "new verified rows": f"{traffic['new_rows']} of {learning['target']}",
        "set aside": f"{listed}: `anchorage collect` says why" if listed else "none",
    }
    if traffic["waiting_for_their_row"]:
        lines["wait for their row"] = str(traffic["waiting_for_their_row"])
    for each in learning["waiting"]:
        gain = "" if each["gain"] is None else f"{100 * each['gain']:+.1f} points, "
        lines[f"candidate {each['digest'][:DIGEST]}"] = gain + each["next"]
    for each in learning["feedback"]:
        lines[f"feedback {each['metric']}"] = f"{each['n']}, mean {each['mean']:.3g}"
    return lines


def round_line(running: Mapping[str, Any] | None) -> str:
    """'0003-gsm8k: learning, generation 4 of 15, mean reward 0.52, 3 min left'; 'none'."""
    if running is None:
        return "none runs"
    parts = [running["state"], f"generation {running['generation']} of {running['generations']}"]
    if running["reward"] is not None:
        parts.append(f"mean reward {running['reward']:.3g}")
    if running["minutes_left"] is not None:
        parts.append(f"{running['minutes_left']:.0f} min left, then the evaluation")
    return f"{running['round']}: {', '.join(parts)}"


def check_lines(document: Mapping[str, Any]) -> list[str]:
    """The check of a task, a line each: mistakes, rows and gate, sandbox, the base model."""
    kept = f"{document['task']}: {document['rows']} rows keep the contract"
    lines = [*(document["problems"] or [kept]), *document["gate"], *(document["sandbox"] or ())]
    if asked := document.get("model"):
        figures = "{reward:.3f} ({low:.3f} .. {high:.3f}) on {n} rows".format(**asked)
        lines.append(f"base model: mean reward {figures}: {asked['means']}")
    return lines


def waiting_table(candidates: Sequence[Mapping[str, Any]]) -> Table:
    """Candidates that wait for a person: digest, gain on the target, what to do."""
    drawn = Table(title="candidates that wait", title_justify="left", show_lines=True)
    for column in ("digest", "gain, points"):
        drawn.add_column(column, no_wrap=True)
    drawn.add_column("next", overflow="fold")
    for each in candidates:
        gain = "-" if each["gain"] is None else f"{100 * each['gain']:+.1f}"
        drawn.add_row(each["digest"][:DIGEST], gain, each["next"])
    return drawn


def settings_tables(settings: Mapping[str, Any]) -> list[Table]:
    """What `up` will do by itself, where its settings came from, and what they changed."""
    words = {key: value for key, value in settings.items() if key not in ("file", "changed")}
    words["settings"] = settings["file"] or "defaults and options; no file"
    changed = Table("setting", "before", "now", title="changed settings", title_justify="left")
    for each in settings["changed"]:
        changed.add_row(each["key"], _cut(each["before"]), _cut(each["after"]))
    return [pairs("what happens now", words), *([changed] if changed.row_count else [])]


def _cut(value: object, most: int = 60) -> str:
    """A value on one line; a long text, such as a template, by its beginning."""
    text = json.dumps(value)
    return text if len(text) <= most else text[: most - 3] + "..."
