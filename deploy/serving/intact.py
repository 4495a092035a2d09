"""What an engine may load: the chosen version, if its files hold it; else rebuilt; else the anchor.

An engine that starts on changed weights would answer under a version that it does not have. So
the files are hashed before vLLM reads them and again before anybody is answered; what differs is
written anew from the anchor and the journal. Where that fails the anchor is served, and the
gateway is told so first.

Probes: fixed prompts and the log-probabilities a cold engine gave, to verify a swap by.

Kept as ``home/probes/<digest>.json``, written after a freshly started engine with that digest
answered the prompts.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from agent.config import Settings, kept
from agent.errors import UserError
from agent.home import Home, read_sealed, write_sealed
from agent.population.decoding import largest_difference
from agent.population.schedule import Logprobs, Messages
from agent.store.anchor import Anchor
from agent.store.companions import MANIFEST
from agent.store.journal import Journal
from agent.store.ledger import Ledger
from agent.store.replay import rebuild
from agent.store.weights import require
from deploy.model import original, record_of
from deploy.serving.control import ControlError, EngineControl, GatewayControl
from deploy.serving.lease import Leases
from deploy.serving.served import Served, read_served, read_slot, write_served

T = TypeVar("T")
TOLERANCE = 1e-3  # nats; on the CPU a reload differs from a cold start by 0.0


@dataclass(frozen=True, slots=True)
class Probes:
    """Conversations and, for each position answered greedily, the k likeliest tokens' log p.

    Recorded one conversation at a time: in bfloat16 log p changes with what is in the same batch.
    """

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
    """Largest |log p - recorded log p| over all probes, in nats; ids: the prompts as tokens.

    Asked all at once, since requests wait meanwhile; where that differs, one at a time, as they
    were recorded.
    """

    def ask(prompts: Sequence[Sequence[int]]) -> list[list[Logprobs]]:
        return engine.top_logprobs(model, prompts, probes.k, probes.positions)

    largest = largest_difference(probes.expected, ask(ids))
    if largest <= TOLERANCE:
        return largest
    return largest_difference(probes.expected, one_at_a_time(ask, ids))


def one_at_a_time(
    ask: Callable[[Sequence[T]], list[list[Logprobs]]], prompts: Sequence[T]
) -> list[list[Logprobs]]:
    """The reply to each prompt with nothing else in its batch."""
    return [row for each in prompts for row in ask([each])]


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


LOG = logging.getLogger("anchorage.engine")


def intact(home: Home, slot: str) -> Served:
    """What the engine of a slot loads now, checked; mended or replaced where it is damaged.

    Raises:
        UserError: Neither it nor the anchor can be served, or a swap decides what is.
    """
    served = read_slot(home, slot)
    try:
        require_version(home, served)
    except UserError as damage:
        LOG.error("%s: %s", served.digest[:12], damage)
        return _mended(home, served, damage)
    return served


def require_version(home: Home, served: Served) -> None:
    """A version's weights and its other files are what they were when it came into this home.

    Raises:
        UserError: One of them is not; says which.
    """
    directory = Path(served.directory)
    require(directory, served.digest)
    if not (directory / MANIFEST).exists():  # an original model
        record_of(home, directory).require()


def _mended(home: Home, served: Served, damage: UserError) -> Served:
    """The same version rebuilt, else the anchor; raises the damage where there is no other."""
    settings = _settings(home, damage)
    anchor = original(home, settings.model)
    if served.directory == str(anchor.directory):
        raise damage
    try:
        mend(home, served.digest, anchor, settings.state_at(home))
    except UserError as error:
        LOG.error("%s: cannot be rebuilt: %s", served.digest[:12], error)
    else:
        LOG.warning("%s: rebuilt from the anchor and the journal", served.digest[:12])
        return served
    active = read_served(home).slot == served.slot
    swapping = Leases(home).current() is not None  # whoever swaps goes back by itself
    if swapping or not active or not _known(home, anchor.digest):
        raise damage
    return _fall_back(home, Served(anchor.digest, str(anchor.directory), served.slot))


def _known(home: Home, digest: str) -> bool:
    """Whether the ledger began with this model; one that was lost with its file cannot say no."""
    ledger = Ledger(kept(home).state_at(home))
    try:
        return ledger.champion() is None or any(e.state == "ANCHOR" for e in ledger.of(digest))
    finally:
        ledger.close()


def mend(home: Home, digest: str, origin: Anchor, state: str | Path) -> Path:
    """Rebuild a kept version from the anchor it was learnt from, which may be a kept one itself.

    ``state``: where the journal is (``Settings.state_at``).

    Raises:
        UserError: The journal does not lead to it, or its own anchor is damaged for good.
    """
    journal = Journal(state)
    try:
        tied = journal.candidate(digest).anchor_digest
        if tied != origin.digest:
            try:
                require(home.weights / tied, tied)
            except UserError:
                mend(home, tied, origin, state)
        anchor = origin if tied == origin.digest else Anchor.open(home.weights / tied)
        directory = rebuild(journal, anchor, digest, home)
    finally:
        journal.close()
    require(directory, digest)
    return directory


def _fall_back(home: Home, served: Served) -> Served:
    """Serve the anchor from now on; the gateway's stamp changes before the engine answers.

    A gateway that does not run reads serving.json when it starts. The ledger is told by whoever
    reconciles: it names a champion that cannot be served.
    """
    require_version(home, served)
    write_served(home, served)
    try:
        with GatewayControl.at(home.admin_socket) as gateway:
            gateway.flip(served.digest, home.engine_socket(served.slot))
    except ControlError as error:
        if home.admin_socket.exists() and "HTTP" in str(error):
            raise UserError(f"the gateway keeps its version: {error}") from None
        LOG.warning("gateway: %s", error)
    LOG.error("the anchor %s is served instead", served.digest[:12])
    return served


def _settings(home: Home, damage: UserError) -> Settings:
    try:
        return kept(home)
    except FileNotFoundError:
        raise damage from None
