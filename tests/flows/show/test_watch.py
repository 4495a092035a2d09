"""The live view's figures, from the very metrics a gateway exposes."""

from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from agent.gateway.metrics import Metrics
from agent.gateway.verifier import Finding
from flows.show.watch import figures, reading, view

STATUS: dict[str, Any] = {
    "endpoint": "http://x", "mlflow": None, "model_page": None, "prefect": None, "sign_in": None,
    "champion": "c", "services": [],
}  # fmt: skip


def busy(metrics: Metrics) -> None:
    """Two answers of 0.1 s and 0.3 s, seven tokens, three verdicts, one swap; and one refusal."""
    for endpoint, seconds in (("chat.completions", 0.1), ("completions", 0.3), ("healthz", 9.0)):
        metrics.requests.labels(endpoint, "200").inc()
        metrics.latency.labels(endpoint).observe(seconds)
    metrics.tokens.labels("completion").inc(7)
    metrics.tokens.labels("prompt").inc(100)
    metrics.pause.observe(0.05)
    for finding in (Finding(1.0), Finding(0.0), Finding(error="timeout")):
        metrics.verdict("gsm8k", "a" * 64, finding)


def test_rates_are_of_the_time_between_two_readings() -> None:
    metrics = Metrics()
    metrics.watch("paused", "", lambda: 1)
    metrics.watch("queued", "", lambda: 3)
    busy(metrics)
    before = reading(metrics.exposition().decode())
    busy(metrics)
    told = SimpleNamespace(**figures(before, reading(metrics.exposition().decode()), 2.0))
    assert told.requests_per_s == 1.0
    assert told.tokens_per_s == 3.5
    assert told.latency_ms == pytest.approx(200.0)
    assert (told.paused, told.queued, told.swaps) == (True, 3, 2)
    assert told.mean_pause_ms == pytest.approx(50.0)
    row = {"task": "gsm8k", "version": "a" * 12, "n": 4, "mean": 0.5, "errors": 2}
    assert told.rewards == [row]


def test_what_is_undefined_is_not_zero() -> None:
    empty = reading(Metrics().exposition().decode())
    told = figures(empty, empty, 1.0)
    assert told["latency_ms"] is None
    assert told["mean_pause_ms"] is None
    assert told["rewards"] == []


def test_the_view_names_every_figure_and_stands_without_a_gateway() -> None:
    metrics = Metrics()
    busy(metrics)
    told = figures({}, reading(metrics.exposition().decode()), 1.0)
    console = Console(record=True, width=120)
    console.print(view(STATUS, told))
    console.print(view(STATUS, None))
    text = console.export_text()
    assert all(name in text for name in told if name != "rewards")
    assert "gsm8k" in text
