"""The endpoint's Prometheus metrics. No label is taken from a client's text."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from agent.gateway.verifier import Finding

LATENCY_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
PAUSE_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """One registry per gateway, so that two gateways in one process stay apart."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "anchorage_requests", "Requests", ["endpoint", "status"], registry=registry
        )
        self.latency = Histogram(
            "anchorage_request_seconds",
            "From the request's arrival to the answer's last byte",
            ["endpoint"],
            buckets=LATENCY_S,
            registry=registry,
        )
        self.first_token = Histogram(
            "anchorage_first_token_seconds",
            "From a streaming request's arrival to its first event",
            buckets=LATENCY_S,
            registry=registry,
        )
        self.tokens = Counter(
            "anchorage_tokens", "Tokens the engine counted", ["kind"], registry=registry
        )
        self.answers = Counter(
            "anchorage_answers",
            "Answers by version: served, trial (a share of traffic), or shadow (seen by nobody)",
            ["version", "kind", "status"],
            registry=registry,
        )
        self.verdicts = Counter(
            "anchorage_verdicts",
            "Verified answers; errors are not zero rewards",
            ["task", "version", "outcome"],
            registry=registry,
        )
        self.rewards = Counter(
            "anchorage_reward_sum", "Sum of rewards", ["task", "version"], registry=registry
        )
        self.pause = Histogram(
            "anchorage_swap_pause_seconds",
            "How long no request was admitted",
            buckets=PAUSE_S,
            registry=registry,
        )
        self.mixed = Counter(
            "anchorage_mixed_answers", "Answers failed for spanning two versions", registry=registry
        )
        self.dropped = Counter(
            "anchorage_capture_dropped", "Rows dropped over the backlog", registry=registry
        )

    def watch(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A gauge whose value is read when it is scraped."""
        Gauge(f"anchorage_{name}", text, registry=self.registry).set_function(read)

    def answered(self, endpoint: str, status: int, seconds: float) -> None:
        """Count one request."""
        self.requests.labels(endpoint, str(status)).inc()
        self.latency.labels(endpoint).observe(seconds)

    def verdict(self, task: str, version: str, finding: Finding) -> None:
        """Count one verification."""
        short = version[:12]
        self.verdicts.labels(task, short, "error" if finding.reward is None else "judged").inc()
        if finding.reward is not None and finding.reward >= 0:
            self.rewards.labels(task, short).inc(finding.reward)

    def exposition(self) -> bytes:
        """The text format."""
        return generate_latest(self.registry)
