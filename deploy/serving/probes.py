"""Fixed questions and what a cold engine answered: how a version is known by its behaviour.

Kept as ``home/probes/<digest>.json`` by whoever asked a freshly started engine with that digest.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.errors import UserError
from agent.home import Home, write_atomically
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
        """From what ``Engine.top_logprobs`` was asked and returned."""
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
    told = engine.top_logprobs(model, ids, probes.k, probes.positions)
    return largest_difference(probes.expected, told)


def require_equal(found: float, digest: str) -> None:
    """ControlError when an engine does not behave as the digest did."""
    if not found <= TOLERANCE:
        raise ControlError(
            f"{digest[:12]}: log-probabilities differ by {found:g}; allowed: {TOLERANCE:g}"
        )


def write_probes(home: Home, digest: str, probes: Probes) -> None:
    """Keep what a cold engine with this digest answered."""
    _path(home, digest).parent.mkdir(mode=0o700, exist_ok=True)
    rows = [[list(map(list, place.items())) for place in row] for row in probes.expected]
    text = json.dumps({"prompts": probes.prompts, "expected": rows})
    write_atomically(_path(home, digest), text)


def read_probes(home: Home, digest: str) -> Probes:
    """What a cold engine with this digest answered; UserError when none was ever asked."""
    try:
        found = json.loads(_path(home, digest).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"digest {digest[:12]}: no cold engine's answers are recorded; evaluate it first"
        ) from None
    expected = [[dict(map(tuple, place)) for place in row] for row in found["expected"]]
    return Probes.of(found["prompts"], expected)


def _path(home: Home, digest: str) -> Path:
    return home.probes_json(digest)
