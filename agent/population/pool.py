"""Engines that hold the same theta: drives the plan of ``schedule.py`` with a thread an engine.

An engine that breaks is closed and started again, given the theta of the others, and used again;
its member goes back to the queue. ``Slot`` is one engine with how to start it, ``Population`` all
of them. When engines report different hashes of delta after a step, all rebuild delta from the
steps; one that still differs is dropped.
"""

from collections import Counter
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from time import perf_counter
from typing import Generic, TypeVar

from agent.errors import UserError
from agent.learner.es import Applied, Step
from agent.learner.noise import Address, NoiseKind
from agent.population.conversation import Conversation, replay
from agent.population.schedule import (
    Assign,
    Completion,
    Engine,
    Event,
    Failed,
    Finished,
    Joined,
    Messages,
    NoEngineError,
    Prompt,
    agreed,
    plan,
)

T = TypeVar("T")
Start = Callable[[], Engine]
MENDS = 2  # times in a row a broken engine is started again


@dataclass(frozen=True, slots=True)
class Held:
    """What every engine of a population holds, and how a fresh one is brought there."""

    anchor: Path | None = None
    snapshot: Path | None = None
    steps: tuple[Step, ...] = ()
    directory: Path | None = None  # its weights answer instead of theta

    def bring(self, engine: Engine) -> None:
        """Give an engine this anchor, delta and directory."""
        if self.anchor:
            engine.open(self.anchor)
            if self.snapshot or self.steps:
                engine.restore(self.snapshot, self.steps)
        if self.directory:
            engine.load(self.directory)


class Slot:
    """One engine, how to start it, and how often in a row it was started again."""

    def __init__(self, number: int, start: Start):
        self.number, self._start = number, start
        self.engine: Engine | None = start()
        self.reason = ""
        self._mends = 0
        self._closed = False

    def run(self, job: Callable[[Engine], T]) -> T:
        """One job; what it raises breaks the engine, except a UserError (the caller's fault)."""
        assert self.engine is not None
        try:
            value = job(self.engine)
        except UserError:
            raise
        except Exception as error:
            self.drop(f"{type(error).__name__}: {error}")
            raise
        self._mends = 0
        return value

    def drop(self, reason: str) -> None:
        """Close the engine; the slot is empty until it is mended."""
        self.reason = reason
        if self.engine is not None:
            with suppress(Exception):  # it is broken: nothing more to learn from it
                self.engine.close()
        self.engine = None

    def can_mend(self) -> bool:
        """Whether another start may be tried."""
        return self.engine is None and self._mends < MENDS and not self._closed

    def mend(self, held: Held) -> bool:
        """Start it again and bring it to where the others are; False when that failed, too."""
        self._mends += 1
        try:
            self.engine = engine = self._start()
            if self._closed:  # set before the engine of the moment was dropped
                raise ConnectionAbortedError("closed")
            held.bring(engine)
        except Exception as error:  # the boundary of an engine: recorded against it
            self.drop(f"{type(error).__name__}: {error}")
        return self.engine is not None

    def close(self) -> None:
        """Close the engine for good, also one that another thread is just mending."""
        self._closed = True
        self.drop("closed")


Job = Callable[[Engine], list[T]]
CHUNK = 256  # prompts to a call of ``generate``: the batches do not depend on how many engines


@dataclass(frozen=True, slots=True)
class Result(Generic[T]):
    """What one job (a member, or a chunk of prompts) came to, a value a prompt."""

    job: int
    values: list[T]
    engine: int
    seconds: float


class Population:
    """1..N engines as one. One caller at a time; ``close`` ends every engine.

    ``incidents`` lists, in order, what broke and was started again.
    """

    def __init__(self, starts: Sequence[Start]):
        if not starts:
            raise UserError("engines: 0, allowed: 1 or more")
        self.incidents: list[str] = []
        self._held = Held()
        self._slots = [Slot(number, start) for number, start in enumerate(starts)]
        self._pool = ThreadPoolExecutor(len(starts), thread_name_prefix="engine")
        self._running: set[Future[None]] = set()

    def open(self, anchor: Path, digest: str | None = None) -> str:
        """Make theta this anchor everywhere; returns its digest, which must be the given one.

        Raises:
            UserError: The files hold other weights.
        """
        digests = self._everywhere(lambda engine: engine.open(anchor))
        self._held = Held(anchor)
        return wanted(anchor, agreed(list(digests.values())), digest)

    def restore(self, snapshot: Path | None, steps: Sequence[Step]) -> str:
        """Make delta the snapshot (None: zero) and the steps everywhere; returns its hash."""
        hashes = self._everywhere(lambda engine: engine.restore(snapshot, steps))
        self._held = Held(self._held.anchor, snapshot, tuple(steps))
        return self._same(hashes)

    def apply(self, step: Step) -> Applied:
        """Move every delta by one step; returns what the agreeing engines report."""
        applied = self._everywhere(lambda engine: engine.apply(step))
        before = self._held
        self._held = Held(before.anchor, before.snapshot, (*before.steps, step))
        hashes = {number: each.delta_hash for number, each in applied.items()}
        delta_hash = self._same(hashes)
        return next(each for each in applied.values() if each.delta_hash == delta_hash)

    def save(self, path: Path) -> str:
        """Keep delta as a snapshot, which one engine writes; returns its hash."""
        saved: list[str] = []
        while not saved:
            slot = self._slots[self._sound()[0][0]]
            saved = self._insist(slot, lambda engine: engine.save(path))
        before = self._held
        self._held = Held(before.anchor, path, (), before.directory)
        return saved[0]

    def load(self, directory: Path, digest: str | None = None) -> str:
        """Load this weights directory everywhere; returns its digest, which must be the given one.

        Raises:
            UserError: What went into the engines is something else.
        """
        digests = self._everywhere(lambda engine: engine.load(directory))
        before = self._held
        self._held = Held(before.anchor, before.snapshot, before.steps, directory)
        return wanted(directory, agreed(list(digests.values())), digest)

    def members(
        self,
        jobs: Sequence[tuple[int, Address, float]],
        prompts: Sequence[Prompt | Conversation],
        max_tokens: int | Sequence[int],
        noise: NoiseKind = "normal",
    ) -> Generator[Result[Completion], None, None]:
        """Evaluate members (index, address, scale) on all prompts; results as they come."""
        limits = _each(max_tokens, len(prompts))
        return self._run(
            {
                index: partial(_generate, prompts, limits, (address, scale), noise)
                for index, address, scale in jobs
            }
        )

    def likelihoods(
        self,
        jobs: Sequence[tuple[int, Address, float]],
        prompts: Sequence[Messages],
        answers: Sequence[str],
        noise: NoiseKind = "normal",
    ) -> Generator[Result[list[float]], None, None]:
        """log p of each token of a given answer to each prompt, by members; results as they come.

        Nothing is generated: an answer is read behind its prompt.
        """
        return self._run(
            {
                index: partial(_likelihoods, prompts, answers, (address, scale), noise)
                for index, address, scale in jobs
            }
        )

    def generate(
        self, prompts: Sequence[Prompt | Conversation], max_tokens: int | Sequence[int]
    ) -> list[Completion]:
        """Answers of theta, or of the loaded directory; chunks go to free engines."""
        limits = _each(max_tokens, len(prompts))
        parts = [slice(first, first + CHUNK) for first in range(0, len(prompts), CHUNK)]
        results = self._run(
            {
                number: partial(_generate, prompts[part], limits[part], None, "normal")
                for number, part in enumerate(parts)
            }
        )
        by_part = {result.job: result.values for result in results}
        return [completion for number in sorted(by_part) for completion in by_part[number]]

    def ask(self, call: Callable[[Engine], T]) -> T:
        """Make one call on one sound engine, mended if it breaks; the others stay as they are."""
        for number, _ in self._sound():
            if values := self._insist(self._slots[number], call):
                return values[0]
        self._sound()  # NoEngineError: none came through
        raise AssertionError("an engine without a start")

    def first(self) -> Engine:
        """One sound engine, for probes."""
        return self._sound()[0][1]

    def spent(self) -> dict[str, float]:
        """Seconds that ``render``, ``update`` and ``generate`` took so far, summed over engines."""
        total: Counter[str] = Counter()
        for _, engine in self._sound():
            total.update(engine.spent())
        return dict(total)

    def engines(self) -> int:
        """How many sound engines there are."""
        return len(self._sound())

    def close(self) -> None:
        """End all engines; what they are doing is lost."""
        for slot in self._slots:
            slot.close()
        self._pool.shutdown(cancel_futures=True)

    def _sound(self) -> list[tuple[int, Engine]]:
        """The engines there are, once nothing of an earlier call runs any more."""
        wait(self._running)
        self._running.clear()
        sound = [(slot.number, slot.engine) for slot in self._slots if slot.engine is not None]
        if not sound:
            raise NoEngineError("; ".join(f"engine {s.number}: {s.reason}" for s in self._slots))
        return sound

    def _everywhere(self, call: Callable[[Engine], T]) -> dict[int, T]:
        """Make one call on all engines at once: engine -> what it returned."""
        sound = self._sound()
        waiting = {n: self._pool.submit(self._insist, self._slots[n], call) for n, _ in sound}
        results = {number: future.result() for number, future in waiting.items()}
        self._sound()  # NoEngineError, when none came through
        return {number: values[0] for number, values in results.items() if values}

    def _insist(self, slot: Slot, call: Callable[[Engine], T]) -> list[T]:
        """One engine's result, mending it as often as allowed; nothing when it stays broken."""
        while slot.engine is not None:
            try:
                return [slot.run(call)]
            except UserError:
                raise
            except Exception:  # the boundary of an engine: the slot holds the reason
                while slot.can_mend():
                    self._record(slot, "started again")
                    slot.mend(self._held)
        self._record(slot, "dropped")
        return []

    def _same(self, hashes: dict[int, str]) -> str:
        """The one hash of delta; engines that differ rebuild, and are dropped if they still do."""
        if len(set(hashes.values())) == 1:
            return next(iter(hashes.values()))
        self.incidents.append(f"engines disagree on delta: {hashes}; all rebuild it")
        held = self._held
        rebuilt = self._everywhere(lambda engine: engine.restore(held.snapshot, held.steps))
        right = agreed(list(rebuilt.values()))
        for number, delta_hash in rebuilt.items():
            if delta_hash != right:
                self._slots[number].drop(
                    f"delta is {delta_hash} after a rebuild, the others' {right}"
                )
                self._record(self._slots[number], "dropped")
        return right

    def _run(self, work: dict[int, Job[T]]) -> Generator[Result[T], None, None]:
        """Drive the plan: start what it says, wait for the next event, hand out results."""
        decisions = plan(work, [number for number, _ in self._sound()])
        events: SimpleQueue[tuple[Event, Result[T] | UserError | None]] = SimpleQueue()
        starts = next(decisions, None)
        while starts is not None:
            for assign in starts:
                slot, job = self._slots[assign.engine], work[assign.member]
                future = self._pool.submit(self._work, slot, assign.member, job, events)
                self._running.add(future)
            event, outcome = events.get()
            if isinstance(outcome, UserError):
                raise outcome
            if outcome is not None:
                yield outcome
            starts = _sent(decisions, event)

    def _work(
        self,
        slot: Slot,
        number: int,
        job: Job[T],
        events: "SimpleQueue[tuple[Event, Result[T] | UserError | None]]",
    ) -> None:
        """Run one job in an engine's thread and report; mend the engine if it broke."""
        begun = perf_counter()
        try:
            values = slot.run(job)
            result = Result(number, values, slot.number, perf_counter() - begun)
            events.put((Finished(slot.number), result))
        except UserError as error:
            events.put((Finished(slot.number), error))
        except Exception:  # the boundary of an engine: the slot holds the reason
            while slot.can_mend():
                self._record(slot, "started again")
                events.put((Failed(slot.number, slot.reason, mending=True), None))
                if slot.mend(self._held):
                    events.put((Joined(slot.number), None))
                    return
            self._record(slot, "dropped")
            events.put((Failed(slot.number, slot.reason), None))

    def _record(self, slot: Slot, what: str) -> None:
        """Record an incident of an engine."""
        self.incidents.append(f"engine {slot.number} {what}: {slot.reason}")


def _sent(
    decisions: Generator[tuple[Assign, ...], Event, object], event: Event
) -> tuple[Assign, ...] | None:
    """What the plan wants started after this event, None when it is done."""
    try:
        return decisions.send(event)
    except StopIteration:
        return None


def _each(max_tokens: int | Sequence[int], count: int) -> list[int]:
    """One limit a prompt."""
    limits = [max_tokens] * count if isinstance(max_tokens, int) else list(max_tokens)
    if len(limits) != count:
        raise UserError(f"max_tokens: {len(limits)} of them for {count} prompts")
    return limits


def _generate(
    prompts: Sequence[Prompt | Conversation],
    limits: Sequence[int],
    member: tuple[Address, float] | None,
    noise: NoiseKind,
    engine: Engine,
) -> list[Completion]:
    """One call of one engine, or one a turn of the conversations."""
    return replay(lambda asked, at: engine.generate(asked, at, member, noise), prompts, limits)


def _likelihoods(
    prompts: Sequence[Messages],
    answers: Sequence[str],
    member: tuple[Address, float],
    noise: NoiseKind,
    engine: Engine,
) -> list[list[float]]:
    """One call of one engine."""
    return engine.answer_logprobs(prompts, answers, member, noise)


def wanted(directory: Path, found: str, digest: str | None) -> str:
    """The digest that went into the engines; UserError where another one was asked for."""
    if digest not in (None, found):
        raise UserError(f"{directory}: the weights are {found[:12]}, wanted {str(digest)[:12]}")
    return found
