"""The sections of the settings that say how the service runs: endpoint, engines, servers.

As `agent.sections`, which says what is learnt and judged.
"""

import ipaddress
import re
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from agent.sections import AUTO, Section

LOOPBACK_NAMES = frozenset({"127.0.0.1", "localhost", "::1"})
# Of a server: no user, password or query, which would be written to files of the home.
SERVER_URL = re.compile(r"""https?://[^\s/?#@"'\\]+(/[^\s?#@"'\\]*)?""")


class StateSettings(Section):
    """Where journal, ledger and traffic are kept."""

    url: str | None = Field(
        None,
        description="PostgreSQL in place of the home's SQLite files, such as "
        "'postgresql://user@host/database'; also for traffic unless `gateway.experience_url` is "
        "set; not set: SQLite in home.",
    )

    @field_validator("url")
    @classmethod
    def _postgresql(cls, url: str | None) -> str | None:
        if url is not None and not url.startswith(("postgresql://", "postgresql+psycopg://")):
            raise ValueError("allowed: postgresql://user@host/database")
        return url


class GatewaySettings(Section):
    """The endpoint."""

    host: str = Field("127.0.0.1", description="Address to listen on; elsewhere keys are required.")
    port: int = Field(0, ge=0, le=65535, description="Port; 0 takes a free one.")
    principal_cap: float = Field(
        0.01,
        ge=0,
        le=1,
        description="Largest share of a round's rows from one principal; 0: off, as while only one "
        "principal has keys or sends rows.",
    )
    retention_days: int = Field(30, ge=1, description="Days that captured text is kept.")
    experience_url: str | None = Field(
        None, description="SQLAlchemy URL of the traffic's database; not set: as `state.url`."
    )
    rate: str = Field(
        "", description="Requests of one principal, such as '600/minute'; empty: no limit."
    )
    token_quota: str = Field(
        "", description="Tokens of one principal, such as '1000000/day'; empty: no limit."
    )
    max_body_bytes: int = Field(1 << 20, gt=0, description="Largest body of a request.")
    chat_template_kwargs: tuple[str, ...] = Field(
        ("enable_thinking", "thinking"),
        description="Variables of the chat template that a request may set.",
    )
    max_n: int = Field(
        8, gt=0, description="Most choices of a request, prompts of a batch counted."
    )
    max_in_flight: int = Field(64, gt=0, description="Requests inside the engine at once.")
    max_queued: int = Field(256, gt=0, description="Requests that may wait to enter the engine.")
    queue_timeout_s: float = Field(30.0, gt=0, description="Longest wait for the engine.")
    answer_timeout_s: float = Field(600.0, gt=0, description="Longest time for a whole answer.")
    silence_timeout_s: float = Field(
        120.0, gt=0, description="Longest silence of the engine, or of a client that reads."
    )
    max_connections: int = Field(2048, gt=0, description="Open client connections in all.")
    max_connections_per_address: int = Field(
        512, gt=0, description="Open connections of one address (IPv6: of one /64)."
    )
    max_header_bytes: int = Field(16_384, gt=0, description="Largest head of a request.")
    header_timeout_s: float = Field(10.0, gt=0, description="Longest time for such a head.")
    idle_timeout_s: float = Field(
        75.0, gt=0, description="Time a client's connection is kept between two requests."
    )
    retry_after_s: int = Field(2, ge=0, description="Retry-After of a 503, in seconds.")
    verify_workers: int = Field(2, gt=0, description="Verifications at once.")
    verify_timeout_s: float = Field(5.0, gt=0, description="Longest verification.")
    capture_backlog: int = Field(
        10_000, gt=0, description="Answers waiting to be stored; more are counted and dropped."
    )

    @field_validator("rate", "token_quota")
    @classmethod
    def _limits(cls, text: str) -> str:
        """Read as the gateway will read it."""
        from limits import parse_many  # here: most processes have no limit to read

        try:
            parse_many(text) if text else []
        except ValueError:
            raise ValueError("allowed: a number and a time, such as '600/minute'") from None
        return text

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the endpoint."""
        if self.host in LOOPBACK_NAMES:
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


class EngineSettings(Section):
    """The vLLM engines: one serves, the others evaluate members."""

    population: int = Field(1, ge=1, description="Engines that evaluate members.")
    placement: Literal["local", "ray"] = Field("local", description="Where those engines run.")
    ray_address: str | None = Field(None, description="Ray cluster; not set: one of this machine.")
    gpu_memory_utilization: float = Field(
        0.45, gt=0, le=1, description="Share of its GPUs' memory that the serving engine takes."
    )
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs of the serving engine.")
    population_gpu_memory_utilization: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Share of its GPUs' memory that each population engine takes; not set: 0.9 of "
        "GPUs of its own, 0.45 beside another engine.",
    )
    population_tensor_parallel_size: int | None = Field(
        None, ge=1, description="GPUs of each population engine; not set: as many as serving has."
    )
    max_num_seqs: int = Field(128, ge=1, description="Sequences in a batch, in paired runs alike.")
    prefix_caching: bool = Field(
        True,
        description="Whether a population engine computes what prompts of one member's evaluation "
        "have in common at their start (a system message, examples) once.",
    )
    master_device: Literal["auto", "cpu", "cuda"] = Field(
        AUTO,
        description="Where anchor and delta lie: host memory, or GPU memory (2 + 4 bytes a "
        "parameter for bfloat16); 'auto': on the GPU where they fit beside the engine.",
    )
    swap: Literal["in_place", "blue_green", "canary", "shadow"] = Field(
        "in_place",
        description="Load weights into the engine; start a second one and switch to it; or first "
        "try the candidate there on a share of traffic, seen by its clients (canary) or not "
        "(shadow).",
    )
    canary_share: float = Field(
        0.1, gt=0, lt=1, description="Share of sessions that a candidate on trial answers."
    )
    swap_deadline_s: float = Field(60.0, gt=0, description="Longest time for a swap.")

    @property
    def population_ranks(self) -> int:
        """Tensor-parallel ranks of each population engine."""
        return self.population_tensor_parallel_size or self.tensor_parallel_size

    def device(self, on_cpu: bool) -> Literal["cpu", "cuda"]:
        """Where delta lies if it fits; ``on_cpu``: whether vLLM's CPU build is installed."""
        on_host = self.master_device == "cpu" or (self.master_device == AUTO and on_cpu)
        return "cpu" if on_host else "cuda"


class ProjectionSettings(Section):
    """The servers of MLflow and Prefect, and the schedules of the flows."""

    mlflow_port: int = Field(0, ge=0, le=65535, description="Port; 0 takes a free one.")
    prefect_port: int = Field(0, ge=0, le=65535, description="Port; 0 takes a free one.")
    mlflow_url: str = Field(
        "",
        description="An MLflow server to use, such as 'https://mlflow.example.org'; empty: one of "
        "our own on loopback, which `up` starts.",
    )
    prefect_api_url: str = Field(
        "",
        description="The API of a Prefect server to use, such as "
        "'https://prefect.example.org/api'; empty: one of our own on loopback, which `up` starts.",
    )
    loop_minutes: float = Field(
        0.0, ge=0, description="Minutes from a round's end to the next scheduled one; 0: off."
    )
    loop_rows: int = Field(
        0,
        ge=0,
        description="New verified rows of the target after which a round starts; 0: off.",
    )
    reconcile_seconds: float = Field(30.0, gt=0, description="Seconds between reconciliations.")

    @field_validator("mlflow_url", "prefect_api_url")
    @classmethod
    def _server(cls, url: str) -> str:
        """Credentials come from the environment: what is in a URL is written and printed."""
        if url and not (SERVER_URL.fullmatch(url) and _has_port(url)):
            raise ValueError(
                "allowed: http://host:port/path or https://, without user, password and query; "
                "credentials are read from MLFLOW_TRACKING_USERNAME, _PASSWORD or _TOKEN and "
                "PREFECT_API_AUTH_STRING or PREFECT_API_KEY"
            )
        return url.rstrip("/")

    @property
    def consoles(self) -> tuple[str, ...]:
        """The servers that are ours, of "mlflow" and "prefect": those without a URL."""
        urls = {"mlflow": self.mlflow_url, "prefect": self.prefect_api_url}
        return tuple(name for name, url in urls.items() if not url)


def _has_port(url: str) -> bool:
    """Whether a URL's port, if it names one, is a port."""
    try:
        return urlsplit(url).port != 0
    except ValueError:
        return False
