"""Engines that hold the same theta: drives the plan of ``schedule.py`` with a thread an engine.

An engine that breaks gives its member back to the queue and is mended beside the others (``slot``):
a thread of its own closes it, starts another one, brings it to what the others hold by then, and
admits it, in the middle of a generation or between two. No call waits for that unless no engine is
left. An engine added later comes the same way. When engines report different hashes of delta after
a step, all rebuild delta from the steps; one that still differs is dropped.
"""

from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from operator import methodcaller
from pathlib import Path
from queue import SimpleQueue
from threading import Condition, Thread
from time import perf_counter
from typing import Any, Generic, TypeVar

from agent.errors import UserError
from agent.learner.es import Applied, Step
from agent.learner.noise import Address, NoiseKind
from agent.population.conversation import Conversation, answers_of, each_limit
from agent.population.schedule import (
    Completion,
    Engine,
    EngineStartError,
    Event,
    Failed,
    Finished,
    Joined,
    Messages,
    NoEngineError,
    Prompt,
    agreed,
    plan,
    told,
    wanted,
)
from agent.population.slot import Held, Slot, Start

T = TypeVar("T")
MOST = 1024  # engines, each with a thread once it is used
CLOSE_S = 10.0  # for threads that start engines to notice that all is closed
Job = Callable[[Engine], list[T]]
CHUNK = 256  # prompts to a call of ``generate``: the batches do not depend on how many engines


@dataclass(frozen=True, slots=True)
class Result(Generic[T]):
    """What one job (a member, or a chunk of prompts) came to, a value a prompt."""

    job: int
    values: list[T]
    engine: int
    seconds: float


Events = SimpleQueue[tuple[Event, Result[Any] | UserError | None]]


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
        self._pool = ThreadPoolExecutor(MOST, thread_name_prefix="engine")
        self._running: set[Future[Any]] = set()
        # Guards which engines are admitted. While ``_changing`` none is: a call that moves theta
        # goes to the engines of its start, and one admitted in between would be left behind.
        self._world = Condition()
        self._changing = False
        self._events: Events | None = None  # of the run that goes on, to which engines may come
        self._menders: list[Thread] = []
        for slot in self._slots:
            slot.start()
            if slot.engine is None:
                self._record(slot, "not started")

    def add(self, start: Start) -> int:
        """One more engine, which takes members as soon as it is where the others are.

        Returns its number; it is started in the background, also in the middle of a generation.
        """
        with self._world:
            slot = Slot(len(self._slots), start)
            slot.mending = True
            self._slots.append(slot)
        self._record(slot, "added")
        self._in_background(slot, again=False)
        return slot.number

    def open(self, anchor: Path, digest: str | None = None) -> str:
        """Make theta this anchor everywhere; returns its digest, which must be the given one.

        Raises:
            UserError: The files hold other weights.
        """
        with self._change():
            digests = self._everywhere(lambda engine: engine.open(anchor))
            self._held = Held(anchor)
        return wanted(anchor, agreed(list(digests.values())), digest)

    def restore(self, snapshot: Path | None, steps: Sequence[Step]) -> str:
        """Make delta the snapshot (None: zero) and the steps everywhere; returns its hash."""
        with self._change():
            hashes = self._everywhere(lambda engine: engine.restore(snapshot, steps))
            self._held = Held(self._held.anchor, snapshot, tuple(steps))
            return self._same(hashes)

    def apply(self, step: Step) -> Applied:
        """Move every delta by one step; returns what the agreeing engines report."""
        with self._change():
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
            saved = self._tried(slot, lambda engine: engine.save(path))
        with self._world:
            before = self._held
            self._held = Held(before.anchor, path, (), before.directory)
        return saved[0]

    def load(self, directory: Path, digest: str | None = None) -> str:
        """Load this weights directory everywhere; returns its digest, which must be the given one.

        Raises:
            UserError: What went into the engines is something else.
        """
        with self._change():
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
        limits = each_limit(max_tokens, len(prompts))
        return self._run(
            {
                index: partial(answers_of, prompts, limits, (address, scale), noise)
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
                index: methodcaller("answer_logprobs", prompts, answers, (address, scale), noise)
                for index, address, scale in jobs
            }
        )

    def generate(
        self, prompts: Sequence[Prompt | Conversation], max_tokens: int | Sequence[int]
    ) -> list[Completion]:
        """Answers of theta, or of the loaded directory; chunks go to free engines."""
        limits = each_limit(max_tokens, len(prompts))
        parts = [slice(first, first + CHUNK) for first in range(0, len(prompts), CHUNK)]
        results = self._run(
            {
                number: partial(answers_of, prompts[part], limits[part], None, "normal")
                for number, part in enumerate(parts)
            }
        )
        by_part = {result.job: result.values for result in results}
        return [completion for number in sorted(by_part) for completion in by_part[number]]

    def ask(self, call: Callable[[Engine], T]) -> T:
        """Make one call on one sound engine, on another one if it breaks."""
        while True:
            if values := self._tried(self._slots[self._sound()[0][0]], call):
                return values[0]

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
        with self._world:
            self._world.notify_all()
        self._pool.shutdown(cancel_futures=True)
        for thread in self._menders:
            thread.join(CLOSE_S)

    def _sound(self) -> list[tuple[int, Engine]]:
        """The engines there are, once nothing of an earlier call runs any more.

        Engines that are being mended are waited for only where there is no other one.
        """
        wait(self._running)
        self._running.clear()
        with self._world:
            changing, self._changing = self._changing, False  # none is left: one may be admitted
            self._world.notify_all()
            self._world.wait_for(lambda: self._there() or not self._coming())
            self._changing = changing
            if sound := self._there():
                return sound
        if all(slot.cannot_start for slot in self._slots):
            raise UserError(self._slots[0].reason)
        raise NoEngineError("; ".join(f"engine {s.number}: {s.reason}" for s in self._slots))

    def _there(self) -> list[tuple[int, Engine]]:
        """Engines that answer now."""
        return [(slot.number, slot.engine) for slot in self._slots if slot.engine is not None]

    def _coming(self) -> list[int]:
        """Engines that a thread is starting or bringing to where the others are."""
        return [slot.number for slot in self._slots if slot.mending]

    @contextmanager
    def _change(self) -> Iterator[None]:
        """No engine is admitted while theta moves."""
        with self._world:
            self._changing = True
        try:
            yield
        finally:
            with self._world:
                self._changing = False
                self._world.notify_all()

    def _everywhere(self, call: Callable[[Engine], T]) -> dict[int, T]:
        """Make one call on all sound engines at once: engine -> what it returned.

        Engines that break are left out, and mended; where all do, one that is mended is asked.
        """
        while True:
            sound = self._sound()
            waiting = {n: self._pool.submit(self._tried, self._slots[n], call) for n, _ in sound}
            self._running.update(waiting.values())
            results = {number: future.result() for number, future in waiting.items()}
            if made := {number: values[0] for number, values in results.items() if values}:
                return made

    def _tried(self, slot: Slot, call: Callable[[Engine], T]) -> list[T]:
        """One engine's result; nothing where it broke, which is mended meanwhile."""
        if slot.engine is None:
            return []
        try:
            return [slot.run(call)]
        except Exception as error:  # the boundary of an engine: the slot holds the reason
            if isinstance(error, UserError) and not isinstance(error, EngineStartError):
                raise
            self._lost(slot)
        return []

    def _lost(self, slot: Slot) -> None:
        """Have a broken engine mended, or leave it; the plan that goes on hears which."""
        with self._world:
            slot.mending = mending = slot.can_mend()
            # Before the plan hears of it, which may end before the mender begins.
            self._record(slot, "started again" if mending else "dropped")
            if self._events is not None:
                self._events.put((Failed(slot.number, slot.reason, mending), None))
        if mending:
            self._in_background(slot)
        else:
            slot.release()

    def _in_background(self, slot: Slot, again: bool = True) -> None:
        """Mend a slot in a thread that nobody waits for: a start may take minutes."""
        thread = Thread(target=self._mend, args=(slot, again), daemon=True)
        self._menders.append(thread)
        thread.start()

    def _mend(self, slot: Slot, again: bool) -> None:
        """Start an engine until one is where the others are, as often as allowed."""
        while not self._brought(slot, again):
            again = True
            if not slot.can_mend():
                break
            self._record(slot, "started again")
        else:
            return
        with self._world:
            slot.mending = False
            if self._events is not None:
                self._events.put((Failed(slot.number, slot.reason), None))
            self._world.notify_all()
        self._record(slot, "dropped")

    def _brought(self, slot: Slot, again: bool) -> bool:
        """Start an engine, bring it to what is held, and admit it unless that moved meanwhile."""
        held = self._held
        if not slot.begin(held, again):
            return False
        while True:
            with self._world:
                self._world.wait_for(lambda: not self._changing)
                if (now := self._held) is held:
                    admitted = slot.admit()
                    if admitted and self._events is not None:
                        self._events.put((Joined(slot.number), None))
                    self._world.notify_all()
                    return admitted
            if not slot.follow(now, held):
                return False
            held = now

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
                slot = self._slots[number]
                slot.drop(f"delta is {delta_hash} after a rebuild, the others' {right}")
                slot.release()
                self._record(slot, "dropped")
        return right

    def _run(self, work: dict[int, Job[T]]) -> Generator[Result[T], None, None]:
        """Drive the plan: start what it says, wait for the next event, hand out results."""
        self._sound()
        with self._world:  # who is there, who is coming, and where the latter are heard: at once
            there = [number for number, _ in self._there()]
            decisions = plan(work, there, coming=self._coming())
            events: Events = SimpleQueue()
            self._events = events
        try:
            starts = next(decisions, None)
            while starts is not None:
                for assign in starts:
                    slot, job = self._slots[assign.engine], work[assign.member]
                    self._running.add(self._pool.submit(self._work, slot, assign.member, job))
                event, outcome = events.get()
                if isinstance(outcome, UserError):
                    raise outcome
                if outcome is not None:
                    yield outcome
                starts = told(decisions, event)
        finally:
            self._events = None

    def _work(self, slot: Slot, number: int, job: Job[T]) -> None:
        """Run one job in an engine's thread and report to the run that asked for it."""
        events, begun = self._events, perf_counter()
        try:
            values = self._tried(slot, job)
        except UserError as error:
            if events is not None:
                events.put((Finished(slot.number), error))
            return
        if values and events is not None:
            result = Result(number, values[0], slot.number, perf_counter() - begun)
            events.put((Finished(slot.number), result))

    def _record(self, slot: Slot, what: str) -> None:
        """Record an incident of an engine."""
        self.incidents.append(f"engine {slot.number} {what}: {slot.reason}")
