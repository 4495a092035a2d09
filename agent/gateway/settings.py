"""What a gateway is told when it is made."""

import ipaddress
from dataclasses import dataclass

from agent.errors import UserError

LOOPBACK_NAMES = frozenset({"127.0.0.1", "localhost", "::1"})


@dataclass(frozen=True, slots=True)
class GatewayOptions:
    """One typed object per gateway; ``create_app`` refuses values that contradict each other."""

    model: str  # the name clients ask for
    engine_model: str = ""  # the engine's served model name; empty: the same as `model`
    host: str = "127.0.0.1"  # the address the server listens on; keys are needed beyond loopback
    tasks: frozenset[str] = frozenset()  # tasks a request may name
    max_body_bytes: int = 1 << 20  # largest request body
    max_n: int = 8  # most choices of one request, prompts of a batch counted
    max_tokens: int = 4096  # largest max_tokens a request may ask for
    max_stop: int = 4  # most stop strings
    max_in_flight: int = 64  # requests inside the engine at once
    max_queued: int = 256  # requests waiting for one of those places, or for a swap to end
    queue_timeout_s: float = 30.0  # longest wait in that queue
    connect_timeout_s: float = 5.0  # to reach the engine
    idle_timeout_s: float = 120.0  # longest silence of the engine, or of a client that reads
    answer_timeout_s: float = 600.0  # longest time for one whole answer
    retry_after_s: int = 2  # what a refused client is told to wait
    verify_workers: int = 2  # verifications at once
    verify_timeout_s: float = 5.0  # longest verification
    capture_backlog: int = 10_000  # answers waiting to be stored; more are counted and dropped
    rate: str = ""  # requests of one principal, such as "600/minute"; empty: no limit
    token_quota: str = ""  # tokens of one principal, such as "1000000/day"; empty: no limit
    retention_days: int = 30  # age at which captured rows are deleted; 0: never
    quota_storage: str = "async+memory://"  # where the `limits` library counts

    def __post_init__(self) -> None:
        """Refuse what could only fail later; all mismatches at once."""
        low = [
            f"{name}: {getattr(self, name)}; allowed: above 0"
            for name in _POSITIVE
            if getattr(self, name) <= 0
        ]
        if not self.model:
            low.append("model: empty; allowed: the name clients ask for")
        if low:
            raise UserError("; ".join(low))

    @property
    def upstream_model(self) -> str:
        """The name the engine answers to."""
        return self.engine_model or self.model

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the gateway."""
        if self.host in LOOPBACK_NAMES:
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


_POSITIVE = (
    "max_body_bytes",
    "max_n",
    "max_tokens",
    "max_stop",
    "max_in_flight",
    "max_queued",
    "queue_timeout_s",
    "connect_timeout_s",
    "idle_timeout_s",
    "answer_timeout_s",
    "verify_workers",
    "verify_timeout_s",
    "capture_backlog",
)
