"""Output of commands: bars on stderr, tables or one JSON document on stdout."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.table import Table

from flows.show.progress import Bars, Reporter, Silent, console


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
