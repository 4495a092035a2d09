"""Who evaluates which member: what an engine can do, and a generator that hands members out.

Pure: nothing here starts an engine or waits for one. The driver (``pool.py``) starts what a plan
yields and sends back what happened.
"""

from collections import Counter, deque
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from agent.errors import UserError
from agent.learner.es import Applied, Step
from agent.learner.noise import Address, NoiseKind

Message = dict[str, Any]  # of the chat completions API: role, content, perhaps tool_calls
Messages = Sequence[Message]
Prompt = Messages | Mapping[str, Any]  # {"messages", "tools"}: one turn of a conversation
Logprobs = dict[int, float]
Way = Literal["short", "long", "fresh"]  # how members get into an engine: see ``certify``


UNASKED = "unasked"  # how a turn ends whose prompt is too long, or none in the chat template


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer: its text, its length in tokens, and why it ended (``stop`` or ``length``).

    ``calls``: the tools it calls, {"name", "arguments"} each. ``conversation``: all messages, where
    it is the last answer of one.
    """

    text: str
    tokens: int
    finish: str
    calls: Sequence[Mapping[str, Any]] = ()
    conversation: Messages = ()


class Engine(Protocol):
    """One model whose weights can be moved. theta = anchor + delta; a member is theta + s eps.

    After ``open``, ``restore`` and ``apply`` theta answers, after ``load`` the directory; a member
    is there only for the one call that names it.
    """

    def open(self, anchor: Path) -> str:
        """theta = the anchor of this directory, delta = 0; returns the anchor's digest."""
        ...

    def restore(self, snapshot: Path | None, steps: Sequence[Step]) -> str:
        """delta = the snapshot's (None: zero), then all steps; returns the hash of delta."""
        ...

    def apply(self, step: Step) -> Applied:
        """Move delta by one step; what the drift meter needs comes back."""
        ...

    def save(self, path: Path) -> str:
        """Keep delta as a snapshot in this file; returns its hash."""
        ...

    def load(self, directory: Path) -> str:
        """Ask this weights directory from now on; returns its digest."""
        ...

    def generate(
        self,
        prompts: Sequence[Prompt],
        max_tokens: int | Sequence[int],
        member: tuple[Address, float] | None = None,
        noise: NoiseKind = "normal",
    ) -> list[Completion]:
        """Greedy answers in the order of the prompts, of theta + scale * eps(address) if given.

        A turn of a conversation that cannot be asked is answered ``UNASKED``.
        """
        ...

    def sample(self, prompts: Sequence[Messages], max_tokens: int, seed: int) -> list[list[int]]:
        """Token ids drawn at temperature 1: the continuations a KL estimate is taken on."""
        ...

    def top_logprobs(
        self,
        prompts: Sequence[Messages],
        k: int,
        positions: int = 1,
        member: tuple[Address, float] | None = None,
    ) -> list[list[Logprobs]]:
        """For each prompt and greedy position: the k likeliest token ids and their log p, of
        theta + scale * eps(address) if given."""
        ...

    def prompt_logprobs(
        self, prompts: Sequence[Messages], continuations: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """log p of every token of each fixed continuation, in nats."""
        ...

    def answer_logprobs(
        self,
        prompts: Sequence[Messages],
        answers: Sequence[str],
        member: tuple[Address, float] | None = None,
        noise: NoiseKind = "normal",
    ) -> list[list[float]]:
        """log p of every token of each given answer and of its end, in nats, of
        theta + scale * eps(address) if given; nothing is generated."""
        ...

    def state(self) -> dict[str, str | None]:
        """What it holds: ``served`` (start, theta, a member or a digest), ``way`` (how members
        get in: short or long), ``anchor``, ``delta_hash``, ``held`` (elements of delta on each
        tensor-parallel rank)."""
        ...

    def spent(self) -> dict[str, float]:
        """Seconds since the start on ``render``, ``update`` and ``generate``."""
        ...

    def close(self) -> None:
        """Free everything; calling it again does nothing."""
        ...


@dataclass(frozen=True, slots=True)
class Assign:
    """Start this member on this engine now."""

    engine: int
    member: int


@dataclass(frozen=True, slots=True)
class Finished:
    """An engine has the result of its member and is free."""

    engine: int


@dataclass(frozen=True, slots=True)
class Failed:
    """An engine broke, on its member or while free; it gets no more of them until Joined."""

    engine: int
    reason: str
    mending: bool = False  # whether a Joined or another Failed will follow


@dataclass(frozen=True, slots=True)
class Joined:
    """A new or mended engine is free."""

    engine: int


Event = Finished | Failed | Joined


class EngineStartError(UserError):
    """An engine has no place or cannot be started; with others there it is only missing."""


class NoEngineError(Exception):
    """Members remain and nothing can evaluate them; the message says what happened to whom."""


def plan(
    members: Iterable[int],
    engines: Iterable[int],
    tries: int = 3,
    coming: Iterable[int] = (),
) -> Generator[tuple[Assign, ...], Event, tuple[Failed, ...]]:
    """Hand members to free engines, in order, until each has been evaluated once.

    Yields what to start now (nothing, when every engine is busy or no member waits), receives
    the next event, returns the failures it survived. Holds at every yield: an engine is free
    only if no member waits. A failed engine gives its member back to the front of the queue.
    ``coming`` engines are not there yet: a Joined or a Failed of each may follow, as of any engine
    that was not named.

    Raises NoEngineError when members remain and no engine is left or being mended, or when one
    member broke ``tries`` engines: then the fault is the member's.
    """
    waiting, free = deque(members), deque(engines)
    busy: dict[int, int] = {}
    mending = set(coming)
    failures: list[Failed] = []
    broken: Counter[int] = Counter()
    while waiting or busy:
        started = _start(waiting, free, busy)
        if not busy and not mending:  # no event can follow: waiting for one would never end
            raise NoEngineError(_reasons(waiting, failures))
        event = yield started
        member = busy.pop(event.engine, None)
        mending.discard(event.engine)
        if not isinstance(event, Failed):
            free.append(event.engine)
            continue
        failures.append(event)
        if event.mending:
            mending.add(event.engine)
        if event.engine in free:
            free.remove(event.engine)
        if member is not None:
            waiting.appendleft(member)  # first again, so that a generation ends in its own order
            broken[member] += 1
            if broken[member] >= tries:
                raise NoEngineError(f"member {member} broke {tries} engines: {event.reason}")
    return tuple(failures)


def told(
    decisions: Generator[tuple[Assign, ...], Event, object], event: Event
) -> tuple[Assign, ...] | None:
    """What a plan wants started after an event, None when it is done."""
    try:
        return decisions.send(event)
    except StopIteration:
        return None


def _start(waiting: deque[int], free: deque[int], busy: dict[int, int]) -> tuple[Assign, ...]:
    """Pair waiting members with free engines while there are both."""
    started = []
    while waiting and free:
        assign = Assign(engine=free.popleft(), member=waiting.popleft())
        busy[assign.engine] = assign.member
        started.append(assign)
    return tuple(started)


def _reasons(waiting: deque[int], failures: list[Failed]) -> str:
    """How many members wait and why each engine is gone."""
    reasons = "; ".join(f"engine {failed.engine}: {failed.reason}" for failed in failures)
    return f"{len(waiting)} members wait and no engine is left ({reasons or 'none was given'})"


def agreed(hashes: Sequence[str]) -> str:
    """The hash of delta most engines report; on a draw the one of the first engine among them."""
    if not hashes:
        raise ValueError("hashes: none, allowed: one per engine")
    return max(hashes, key=hashes.count)


def wanted(directory: Path, found: str, digest: str | None) -> str:
    """The digest that went into the engines; UserError where another one was asked for."""
    if digest not in (None, found):
        raise UserError(f"{directory}: the weights are {found[:12]}, wanted {str(digest)[:12]}")
    return found
