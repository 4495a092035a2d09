"""The live view of `status --watch`: the endpoint from two readings of its metrics.

requests/s, tokens/s      growth of the counters between the readings
latency                   mean of the requests answered between them
rewards                   mean and number by task and version, since the gateway started
"""

import itertools
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Group
from rich.table import Table

from agent.home import Home
from deploy import stack
from deploy.serving.control import UnixTransport
from flows.serve.stack import learning
from flows.show.terminal import pairs, status_tables

Labels = tuple[tuple[str, str], ...]
Reading = Mapping[str, Mapping[Labels, float]]  # sample name -> labels -> value
EVERY_S = 1.0
LEARNING_EVERY = 5  # views between two looks at rounds, candidates and traffic
ANSWERS = ("chat.completions", "completions")


def views(root: Path | None) -> Iterator[Group]:
    """An endless sequence of views of a home, one every ``EVERY_S``."""
    home = Home.at(root)
    before, at = reading(read_metrics(home)), time.monotonic()
    learnt = learning(home)
    yield view(stack.status(home) | {"learning": learnt}, None)
    for count in itertools.count(1):
        time.sleep(EVERY_S)
        now, then = reading(read_metrics(home)), at
        at = time.monotonic()
        learnt = learning(home) if count % LEARNING_EVERY == 0 else learnt
        status = stack.status(home) | {"learning": learnt}
        yield view(status, figures(before, now, at - then) if now else None)
        before = now


def read_metrics(home: Home) -> str:
    """The gateway's metrics from its admin socket; empty where it does not answer."""
    try:
        with httpx.Client(transport=UnixTransport(home.admin_socket), timeout=2.0) as client:
            return client.get("http://gateway/metrics").text
    except httpx.HTTPError:
        return ""


def reading(text: str) -> Reading:
    """Prometheus' text format as numbers."""
    samples: dict[str, dict[Labels, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = tuple(sorted(sample.labels.items()))
            samples.setdefault(sample.name, {})[labels] = sample.value
    return samples


def figures(before: Reading, now: Reading, seconds: float) -> dict[str, Any]:
    """Rates between two readings and the present gauges; None where a figure is undefined."""

    def grown(name: str, **wanted: str) -> float:
        return _sum(now, name, wanted) - _sum(before, name, wanted)

    answered = sum(grown("anchorage_request_seconds_count", endpoint=each) for each in ANSWERS)
    spent = sum(grown("anchorage_request_seconds_sum", endpoint=each) for each in ANSWERS)
    swaps = _sum(now, "anchorage_swap_pause_seconds_count", {})
    paused = _sum(now, "anchorage_swap_pause_seconds_sum", {})
    return {
        "requests_per_s": answered / seconds,
        "tokens_per_s": grown("anchorage_tokens_total", kind="completion") / seconds,
        "latency_ms": 1000 * spent / answered if answered else None,
        "in_flight": int(_sum(now, "anchorage_in_flight", {})),
        "queued": int(_sum(now, "anchorage_queued", {})),
        "paused": bool(_sum(now, "anchorage_paused", {})),
        "capture_backlog": int(_sum(now, "anchorage_capture_backlog", {})),
        "swaps": int(swaps),
        "mean_pause_ms": 1000 * paused / swaps if swaps else None,
        "rewards": _rewards(now),
    }


def view(status: Mapping[str, Any], endpoint: Mapping[str, Any] | None) -> Group:
    """The status and, where the gateway answers, its figures."""
    if endpoint is None:
        return Group(*status_tables(status))
    numbers = {name: _shown(value) for name, value in endpoint.items() if name != "rewards"}
    rewards = Table(title="verified rewards", title_justify="left")
    for column in ("task", "version", "n", "mean", "errors"):
        rewards.add_column(column, justify="left" if column in ("task", "version") else "right")
    for each in endpoint["rewards"]:
        row = (each["task"], each["version"], each["n"], each["mean"], each["errors"])
        rewards.add_row(*map(_shown, row))
    return Group(*status_tables(status), pairs("endpoint now", numbers), rewards)


def _rewards(now: Reading) -> list[dict[str, Any]]:
    verdicts = now.get("anchorage_verdicts_total", {})
    places = sorted({(dict(each)["task"], dict(each)["version"]) for each in verdicts})
    rows = []
    for task, version in places:
        at = {"task": task, "version": version}
        n = _sum(now, "anchorage_verdicts_total", at | {"outcome": "judged"})
        errors = _sum(now, "anchorage_verdicts_total", at | {"outcome": "error"})
        total = _sum(now, "anchorage_reward_sum_total", at)
        mean = total / n if n else None
        rows.append(at | {"n": int(n), "mean": mean, "errors": int(errors)})
    return rows


def _sum(now: Reading, name: str, wanted: Mapping[str, str]) -> float:
    """All samples of a name that carry these labels."""
    values = now.get(name, {}).items()
    return sum(value for labels, value in values if wanted.items() <= dict(labels).items())


def _shown(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
