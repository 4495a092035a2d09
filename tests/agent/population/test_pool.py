"""Several engines as one: same results as one engine, whatever breaks."""

import hashlib
import json
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from agent.errors import UserError
from agent.learner.es import Applied, Step
from agent.learner.noise import Address, NoiseKind
from agent.learner.penalty import Penalty
from agent.population.pool import CHUNK, Population
from agent.population.schedule import (
    Completion,
    EngineStartError,
    Logprobs,
    Messages,
    NoEngineError,
)
from agent.population.slot import Held, Slot

ANCHOR = Path("anchor")
PROMPTS = [[{"role": "user", "content": str(n)}] for n in range(5)]
JOBS = [(n, Address(1, 0, n // 2), 0.1 - 0.2 * (n % 2)) for n in range(8)]


def one_step(generation: int) -> Step:
    """A step that differs by generation."""
    return Step(1, generation, (0,), (0.5,), 0.1, 0.1, Penalty("none", 0.0), "normal", None)


class Plain:
    """An engine whose answers and delta are a hash of everything it was told."""

    def __init__(self, trouble: "Callable[[str, Plain], None]"):
        self._trouble = trouble
        self.history: list[object] = []
        self.calls = 0
        self.closed = False

    def _hash(self, *values: object) -> str:
        return hashlib.sha256(json.dumps([self.history, values]).encode()).hexdigest()[:16]

    def _called(self, what: str) -> None:
        self.calls += 1
        self._trouble(what, self)

    def open(self, anchor: Path) -> str:
        self._called("open")
        self.history = [str(anchor)]
        return str(anchor)

    def restore(self, snapshot: Path | None, steps: Sequence[Step]) -> str:
        self._called("restore")
        self.history = [self.history[0], *([str(snapshot)] if snapshot else [])]
        self.history += [step.to_json() for step in steps]
        return self._hash()

    def apply(self, step: Step) -> Applied:
        self.history.append(step.to_json())
        self._called("apply")
        return Applied(self._hash(), float(len(self.history)), 1.0, {})

    def save(self, path: Path) -> str:
        self._called("save")
        path.write_text(self._hash())
        return self._hash()

    def load(self, directory: Path) -> str:
        self._called("load")
        self.history.append(str(directory))
        return str(directory)

    def generate(
        self,
        prompts: Sequence[Messages],
        max_tokens: int | Sequence[int],
        member: tuple[Address, float] | None = None,
        noise: NoiseKind = "normal",
    ) -> list[Completion]:
        self._called("generate")
        assert not isinstance(max_tokens, int)
        at = [member[0].pair, member[1]] if member else None
        return [
            Completion(self._hash(list(messages), at, noise), limit, "stop")
            for messages, limit in zip(prompts, max_tokens, strict=True)
        ]

    def sample(self, prompts: Sequence[Messages], max_tokens: int, seed: int) -> list[list[int]]:
        raise AssertionError("not asked for here")

    def top_logprobs(
        self,
        prompts: Sequence[Messages],
        k: int,
        positions: int = 1,
        member: tuple[Address, float] | None = None,
    ) -> list[list[Logprobs]]:
        raise AssertionError("not asked for here")

    def prompt_logprobs(
        self, prompts: Sequence[Messages], continuations: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        raise AssertionError("not asked for here")

    def answer_logprobs(
        self,
        prompts: Sequence[Messages],
        answers: Sequence[str],
        member: tuple[Address, float] | None = None,
        noise: NoiseKind = "normal",
    ) -> list[list[float]]:
        self._called("generate")
        at = [member[0].pair, member[1]] if member else None
        pairs = zip(prompts, answers, strict=True)
        return [[-float(len(self._hash(list(p), a, at, noise)))] for p, a in pairs]

    def state(self) -> dict[str, str | None]:
        return {"served": "theta", "anchor": None}

    def spent(self) -> dict[str, float]:
        return {"generate": float(self.calls)}

    def close(self) -> None:
        self.closed = True


class Troubles:
    """Starts engines, keeps them, and breaks the calls it is told to break."""

    def __init__(self, *broken: tuple[int, str]):
        self.broken, self.started, self.seen = set(broken), list[Plain](), dict[str, int]()
        self.lock = threading.Lock()

    def __call__(self, what: str, engine: Plain) -> None:
        with self.lock:
            self.seen[what] = self.seen.get(what, 0) + 1
            if (self.seen[what], what) in self.broken:
                raise ConnectionError(f"{what} {self.seen[what]} broke")

    def start(self) -> Plain:
        self.started.append(Plain(self))
        return self.started[-1]


def results(population: Population) -> dict[int, list[Completion]]:
    """All members of one generation."""
    return {each.job: each.values for each in population.members(JOBS, PROMPTS, [3, 4, 5, 6, 7])}


def opened(troubles: Troubles, engines: int) -> Population:
    """A population of so many engines at the anchor."""
    population = Population([troubles.start] * engines)
    assert population.open(ANCHOR) == "anchor"
    return population


def alone() -> tuple[dict[int, list[Completion]], Applied, dict[int, list[Completion]]]:
    """What one sound engine gives: a generation, a step, a generation."""
    population = opened(Troubles(), 1)
    values = results(population), population.apply(one_step(0)), results(population)
    population.close()
    return values


BROKEN: list[list[tuple[int, str]]] = [
    [],
    [(1, "generate")],
    [(4, "generate"), (5, "generate"), (7, "generate")],
    [(1, "open"), (2, "apply")],
    [(3, "generate"), (3, "open")],  # the engine started again breaks at once
    [(9, "generate"), (1, "restore")],
]


@pytest.mark.parametrize("engines", [1, 2, 3])
@pytest.mark.parametrize("broken", BROKEN)
def test_results_do_not_depend_on_engines_or_on_what_breaks(
    engines: int, broken: list[tuple[int, str]]
) -> None:
    troubles = Troubles(*broken)
    population = opened(troubles, engines)
    first = results(population)
    applied = population.apply(one_step(0))
    assert (first, applied, results(population)) == alone()
    assert len(population.incidents) >= bool(broken)
    population.close()
    assert all(engine.closed for engine in troubles.started)


def test_a_slot_that_ends_closes_what_broke_what_runs_and_what_comes() -> None:
    troubles = Troubles()
    slots = [Slot(number, troubles.start) for number in range(3)]
    for slot in slots:
        slot.start()
    slots[0].drop("broke, and nobody closed it yet")
    slots[2].drop("broke")
    assert slots[2].begin(Held())
    for slot in slots:
        slot.close()
    assert [engine.closed for engine in troubles.started] == [True] * 4
    assert not slots[2].admit()


def test_an_engine_with_another_delta_rebuilds_it() -> None:
    troubles = Troubles()
    population = opened(troubles, 3)
    troubles.started[1].history.append("a flipped bit")
    applied = population.apply(one_step(0))
    assert applied == alone()[1]
    assert ["disagree" in line for line in population.incidents] == [True]
    assert results(population) == alone()[2]
    population.close()


def test_an_engine_that_cannot_be_put_right_is_dropped() -> None:
    troubles = Troubles()
    population = opened(troubles, 3)
    bad = troubles.started[0]
    bad._hash = lambda *values: "wrong"  # type: ignore[method-assign]
    assert population.apply(one_step(0)) == alone()[1]
    assert bad.closed
    assert "dropped: delta is wrong" in population.incidents[-1]
    assert results(population) == alone()[2]
    population.close()


def test_when_all_engines_stay_broken_the_reasons_are_told() -> None:
    troubles = Troubles(*((n, "generate") for n in range(1, 40)))
    population = opened(troubles, 2)
    with pytest.raises(NoEngineError, match=r"generate \d+ broke"):
        results(population)
    with pytest.raises(NoEngineError, match=r"engine \d: ConnectionError"):
        population.generate(PROMPTS, 4)
    assert len(troubles.started) <= 2 + 2 * 2  # a bounded number of starts
    population.close()


def test_a_callers_mistake_breaks_no_engine() -> None:
    troubles = Troubles()
    population = opened(troubles, 2)

    def refuse(what: str, engine: Plain) -> None:
        raise UserError("prompt 0: 900 tokens, allowed: under 512")

    for engine in troubles.started:
        engine._trouble = refuse
    with pytest.raises(UserError, match="900 tokens"):
        results(population)
    for engine in troubles.started:
        engine._trouble = troubles
    assert results(population) == alone()[0]
    assert len(troubles.started) == 2
    with pytest.raises(UserError, match="max_tokens: 2 of them for 5 prompts"):
        population.generate(PROMPTS, [1, 2])
    population.close()


def test_prompts_are_answered_in_order_in_chunks_of_one_size() -> None:
    prompts = [[{"role": "user", "content": str(n)}] for n in range(2 * CHUNK + 7)]
    limits = list(range(len(prompts)))
    answers = []
    for engines in (1, 3):
        population = opened(Troubles(), engines)
        answers.append(population.generate(prompts, limits))
        population.close()
    assert [completion.tokens for completion in answers[0]] == limits
    assert answers[0] == answers[1]
    assert len({completion.text for completion in answers[0]}) == len(prompts)


def test_a_directory_is_asked_until_theta_moves() -> None:
    population = opened(Troubles((2, "generate")), 1)
    plain = population.generate(PROMPTS, 4)
    assert population.load(Path("weights")) == "weights"
    loaded = population.generate(PROMPTS, 4)  # breaks once: the new engine is brought there, too
    assert loaded != plain
    assert population.generate(PROMPTS, 4) == loaded
    population.close()


def test_other_weights_than_those_named_are_refused_at_every_load() -> None:
    population = opened(Troubles(), 2)
    assert population.load(Path("weights"), "weights") == "weights"
    with pytest.raises(UserError, match="the weights are weights, wanted others"):
        population.load(Path("weights"), "others")
    assert population.open(ANCHOR, "anchor") == "anchor"
    with pytest.raises(UserError, match="wanted others"):
        population.open(ANCHOR, "others")
    population.close()


def test_abandoned_results_do_not_reach_the_next_call() -> None:
    population = opened(Troubles(), 2)
    for _ in range(20):
        unfinished = population.members(JOBS, PROMPTS, 4)
        next(unfinished)
        unfinished.close()
        assert results(population) == alone()[0]
    population.close()


def test_a_mended_engine_begins_at_the_newest_snapshot(tmp_path: Path) -> None:
    troubles = Troubles((9, "generate"), (1, "save"))
    population = opened(troubles, 1)
    population.apply(one_step(0))
    results(population)
    path = tmp_path / "snapshot"
    assert population.save(path) == path.read_text()
    population.apply(one_step(1))
    list(population.members(JOBS[:2], PROMPTS, 4))
    assert troubles.started[-1].history == [str(ANCHOR), str(path), one_step(1).to_json()]
    assert population.engines() == 1
    population.close()


def test_closing_ends_an_engine_that_is_being_mended() -> None:
    troubles = Troubles((1, "generate"))
    starting, closing = threading.Event(), threading.Event()

    def start() -> Plain:
        engine = troubles.start()
        if len(troubles.started) > 1:
            starting.set()
            assert closing.wait(20)
        return engine

    population = Population([start])
    unfinished = population.members(JOBS, PROMPTS, 4)

    def ask() -> None:
        with pytest.raises(NoEngineError, match="closed"):
            list(unfinished)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    assert starting.wait(20)
    threading.Timer(0.05, closing.set).start()
    population.close()
    asking.join(20)
    assert [engine.closed for engine in troubles.started] == [True, True]


class Late:
    """Starts the first engines at once; later ones wait for ``go``."""

    def __init__(self, troubles: Troubles, first: int = 1):
        self.troubles, self.first, self.go = troubles, first, threading.Event()
        self.waits = threading.Event()

    def __call__(self) -> Plain:
        if len(self.troubles.started) >= self.first:
            self.waits.set()
            assert self.go.wait(20)
        return self.troubles.start()


def until(condition: Callable[[], bool]) -> None:
    """Wait until something holds."""
    ends = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.002)


def test_nothing_waits_for_an_engine_that_is_mended_and_it_comes_to_where_the_others_are() -> None:
    """A generation, three steps and a generation go on while the second engine's start hangs."""
    troubles = Troubles((1, "generate"))
    late = Late(troubles, first=2)
    population = Population([late, late])
    population.open(ANCHOR)
    assert results(population) == alone()[0]
    assert late.waits.wait(20)
    for generation in range(3):
        population.apply(one_step(generation))
    before = results(population)
    assert population.engines() == 1
    late.go.set()
    until(lambda: population.engines() == 2)
    one, other = (each for each in troubles.started if not each.closed)
    assert one.history == other.history
    assert results(population) == before
    assert population.apply(one_step(3)).delta_hash == one._hash()
    assert ["disagree" in line for line in population.incidents] == [False]
    population.close()


def test_a_step_that_is_made_while_an_engine_is_brought_reaches_it() -> None:
    troubles = Troubles((1, "generate"))
    bringing, go = threading.Event(), threading.Event()

    def start() -> Plain:
        engine = troubles.start()
        if len(troubles.started) == 3:
            engine._trouble = lambda what, _: (bringing.set(), go.wait(20)) if what == "open" else 0
        return engine

    population = Population([start, start])
    population.open(ANCHOR)
    results(population)
    assert bringing.wait(20)
    population.apply(one_step(0))
    go.set()
    until(lambda: population.engines() == 2)
    one, other = (each for each in troubles.started if not each.closed)
    assert one.history == other.history == [str(ANCHOR), one_step(0).to_json()]
    population.close()


def test_an_engine_added_in_the_middle_of_a_generation_takes_members() -> None:
    troubles = Troubles()
    population = opened(troubles, 1)
    population.apply(one_step(0))
    done: dict[int, list[Completion]] = {}
    used = set()
    for result in population.members(JOBS, PROMPTS, [3, 4, 5, 6, 7]):
        done[result.job] = result.values
        used.add(result.engine)
        if len(done) == 1:
            assert population.add(troubles.start) == 1
            until(lambda: len(troubles.started) == 2 and population._slots[1].engine is not None)
    assert done == alone()[2]
    assert used == {0, 1}
    assert population.apply(one_step(1)).delta_hash == troubles.started[1]._hash()
    population.close()


def test_an_engine_that_cannot_start_is_an_incident_where_another_one_can() -> None:
    troubles = Troubles()

    def refuse() -> Plain:
        raise EngineStartError("ray: no node had {'GPU': 1.0} free")

    def broken() -> Plain:
        def trouble(what: str, engine: Plain) -> None:
            raise EngineStartError("engine: out of memory")

        return Plain(trouble)

    population = Population([refuse, troubles.start, broken])
    assert population.open(ANCHOR) == "anchor"
    assert results(population) == alone()[0]
    text = "; ".join(population.incidents)
    assert "engine 0 not started: ray: no node had" in text
    assert "engine 2 dropped: engine: out of memory" in text
    population.close()
    nothing = Population([refuse, broken])
    with pytest.raises(UserError, match="no node had"):
        nothing.open(ANCHOR)
    nothing.close()


def test_no_engines_is_a_mistake() -> None:
    with pytest.raises(UserError, match="engines: 0"):
        Population([])
