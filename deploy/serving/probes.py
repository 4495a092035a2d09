"""Probes: fixed prompts and the log-probabilities a cold engine gave, to verify a swap by.

Kept as ``home/probes/<digest>.json``, written after a freshly started engine with that digest
answered the prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.errors import UserError
from agent.home import Home, read_sealed, write_sealed
from agent.population.logprobs import largest_difference
from agent.population.schedule import Logprobs, Messages
from deploy.serving.control import ControlError, EngineControl

TOLERANCE = 1e-3  # nats; on the CPU a reload differs from a cold start by 0.0


@dataclass(frozen=True, slots=True)
class Probes:
    """Conversations and, for each position answered greedily, the k likeliest tokens' log p."""

    prompts: tuple[tuple[dict[str, str], ...], ...]
    expected: tuple[tuple[Logprobs, ...], ...]  # (prompt, position) -> {token id: log p}

    @classmethod
    def of(cls, prompts: Sequence[Messages], expected: Sequence[Sequence[Logprobs]]) -> "Probes":
        """From the arguments and the result of ``Engine.top_logprobs``."""
        return cls(tuple(map(tuple, prompts)), tuple(map(tuple, expected)))

    @property
    def k(self) -> int:
        """Tokens listed at a position."""
        return min(len(place) for row in self.expected for place in row)

    @property
    def positions(self) -> int:
        """Positions answered for a prompt."""
        return len(self.expected[0])


def difference(
    engine: EngineControl, model: str, ids: Sequence[Sequence[int]], probes: Probes
) -> float:
    """Largest |log p - recorded log p| over all probes, in nats; ids: the prompts as tokens."""
    answers = engine.top_logprobs(model, ids, probes.k, probes.positions)
    return largest_difference(probes.expected, answers)


def require_equal(largest: float, digest: str) -> None:
    """ControlError when the largest difference is over the tolerance, or NaN."""
    if not largest <= TOLERANCE:
        raise ControlError(
            f"{digest[:12]}: log-probabilities differ by {largest:g}; allowed: {TOLERANCE:g}"
        )


def write_probes(home: Home, digest: str, probes: Probes) -> None:
    """Write the probes of a digest."""
    _path(home, digest).parent.mkdir(mode=0o700, exist_ok=True)
    rows = [[list(map(list, place.items())) for place in row] for row in probes.expected]
    write_sealed(_path(home, digest), {"prompts": probes.prompts, "expected": rows})


def read_probes(home: Home, digest: str) -> Probes:
    """The probes of a digest; UserError when none are recorded."""
    try:
        document = read_sealed(_path(home, digest))
    except FileNotFoundError:
        raise UserError(
            f"digest {digest[:12]}: no probes of a cold engine are recorded; evaluate it first"
        ) from None
    expected = [[dict(map(tuple, place)) for place in row] for row in document["expected"]]
    return Probes.of(document["prompts"], expected)


def _path(home: Home, digest: str) -> Path:
    return home.probes_json(digest)
