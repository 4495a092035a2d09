"""One principal in ten is malicious: ten rounds through collecting, learning and the gate.

The model is small enough to be known wholly: a row is a point x near the centre of its class, the
answer is argmax(x W), and ES moves W by the very steps of a round. The malicious answer every row
they submit with a wrong gold answer. What is damaged is seen on rows that nobody was asked.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.config import load
from agent.home import Home
from agent.learner import es
from agent.learner.penalty import Penalty
from agent.sections import GateSettings
from agent.store.experience import Answer, Interaction, Judgement
from evaluators.gate import GateRules, Sample, Tables, decide
from flows.learn.collect import Collected, collect_rows
from flows.service import Service

pytestmark = pytest.mark.proof

TARGET, PRIORS = "gsm8k", ("arc_challenge", "hellaswag", "piqa")
RULES = GateRules.of(GateSettings())
WIDTH, ANSWERS, CLASSES = 200, 10, 12
PRINCIPALS, MALICIOUS, ROWS = 50, 5, 200
SIGMA, ALPHA, POPULATION, GENERATIONS = 0.02, 0.02, 48, 30
Array = Any


class World:
    """Centres and right answers of every task's classes, and the model everybody starts from."""

    def __init__(self) -> None:
        self.draw = np.random.default_rng(5)
        self.centres = {task: self.draw.normal(size=(CLASSES, WIDTH)) for task in (TARGET, *PRIORS)}
        self.gold = {task: self.draw.integers(ANSWERS, size=CLASSES) for task in self.centres}
        known = {task: gold.copy() for task, gold in self.gold.items()}
        known[TARGET][::2] = (known[TARGET][::2] + 3) % ANSWERS  # half of the target is wrong
        x = np.concatenate([self.centres[task] for task in known])
        y = np.eye(ANSWERS)[np.concatenate([known[task] for task in known])]
        self.anchor: Array = np.linalg.lstsq(x, y, rcond=None)[0]

    @cache  # noqa: B019  one world a module
    def rows(self, task: str, count: int, seed: int) -> tuple[Array, Array]:
        """(count, WIDTH) points and their right answers."""
        draw = np.random.default_rng([seed, *task.encode()])
        classes = draw.integers(CLASSES, size=count)
        noise = 0.3 * draw.normal(size=(count, WIDTH))
        return self.centres[task][classes] + noise, self.gold[task][classes]

    def accuracy(self, model: Array, task: str) -> float:
        """On rows that no round and no gate has seen."""
        x, y = self.rows(task, 4000, 999)
        return float(((x @ model).argmax(axis=1) == y).mean())

    def table(self, model: Array, name: str) -> tuple[Sample, ...]:
        """What an evaluation writes."""
        found = []
        for task in (TARGET, *PRIORS):
            x, y = self.rows(task, 1000, 1)
            right = (x @ model).argmax(axis=1) == y
            found += [Sample(task, f"{i}", float(r), "harness", name) for i, r in enumerate(right)]
        return tuple(found)


@dataclass(frozen=True)
class Attack:
    """What the malicious do beside giving wrong answers."""

    principals: int = MALICIOUS  # how many of all there are
    rows: int = 4  # of each in a round
    padding: int = 0  # characters that make their prompts long
    ground: bool = False  # their rows' hashes are chosen to sort before all others
    copies: bool = False  # their prompts are those of the honest


def submit(service: Service, world: World, round_number: int, attack: Attack) -> None:
    """A round's traffic: four rows of everybody honest, and the attack's of the others."""
    rows, verdicts = [], []
    moment, when = time.time(), np.random.default_rng(round_number)  # they come in any order
    for principal in range(PRINCIPALS):
        bad = principal < attack.principals
        for n in range(attack.rows if bad else 4):
            seed = round_number * 1_000_000 + principal * 10_000 + n
            x, y = world.rows(TARGET, 1, seed)
            answer = int(y[0] + bad) % ANSWERS  # always another than the right one
            example = {"question": f"row {seed}", "answer": f"#### {answer}", "x": x[0].tolist()}
            place = f"{'0' * 20 if bad and attack.ground else ''}{seed}"
            copied = round_number * 1_000_000 + (attack.principals + n % 45) * 10_000 + n // 45
            prompt = f"p{copied if bad and attack.copies else place}"
            words = f"row {seed}" + " word" * (attack.padding // 5 if bad else 0)
            ident = f"i{seed}"
            rows.append(
                Interaction(
                    inference_id=ident, created=moment + float(when.random()),
                    endpoint="chat.completions", model="m", version="v",
                    principal=f"p{principal}", status="ok", latency_s=0.1, prompt_tokens=1,
                    completion_tokens=1, task=TARGET, source="submitted",
                    prompt=json.dumps([{"role": "user", "content": words}]),
                    example=json.dumps(example), prompt_hash=prompt, row_hash=f"r{place}",
                    group_hash="g", answers=(Answer(0, "x", "stop"),),
                )
            )  # fmt: skip
            verdicts.append(Judgement(ident, 0, judged=1.0, reward=float(n % 2), format=1.0))
    service.experience.record(rows)
    service.experience.judge(verdicts)


def learn(world: World, model: Array, rows: list[dict[str, Any]], seed: int) -> Array:
    """A round on these rows, by the learner's own steps, tied to the anchor."""
    x = np.array([row["x"] for row in rows])
    gold = np.array([int(row["answer"][5:]) for row in rows])
    delta = model - world.anchor
    draw = np.random.default_rng(seed)
    for generation in range(GENERATIONS):
        noise = draw.normal(size=(POPULATION, *delta.shape))
        answers = (x @ (world.anchor + delta + SIGMA * noise)).argmax(axis=2)
        step = es.step(
            (answers == gold).astype(float), es.members(POPULATION, False), run_seed=seed,
            generation=generation, sigma=SIGMA, alpha=ALPHA, penalty=Penalty("l2", 0.2),
        )  # fmt: skip
        for pair, coefficient in zip(step.pairs, step.coefficients, strict=True):
            delta = delta + coefficient * noise[pair]
        delta = delta * (1 - ALPHA * 0.2)
    moved: Array = world.anchor + delta
    return moved


def opened(folder: Path, cap: float) -> Service:
    home = Home.at(folder)
    (home.root / "salt").write_text("another salt of tests")
    return Service(home, load(learner={"prompts": ROWS}, gateway={"principal_cap": cap}))


def history(world: World, folder: Path, rounds: int, attack: Attack, cap: float = 0.01) -> Any:
    """The rounds: share of malicious rows, candidates' target accuracies, and what was served."""
    service = opened(folder, cap)
    champion, shares, candidates, served = world.anchor, [], [], [world.anchor]
    for number in range(rounds):
        submit(service, world, number, attack)
        collected = collect_rows(service, TARGET, ROWS)
        rows = [dict(row) for row in collected.rows[: collected.from_traffic]]
        shares.append(hostile(collected, attack) / len(rows))
        candidate = learn(world, champion, rows, seed=number)
        candidates.append(world.accuracy(candidate, TARGET))
        names = ("anchor", "champion", "candidate")
        models = (world.anchor, champion, candidate)
        tables = (world.table(m, name) for m, name in zip(models, names, strict=True))
        if decide(Tables(*tables), TARGET, RULES).verdict == "promote":
            champion = candidate
            served.append(champion)
    return shares, candidates, served


def hostile(collected: Collected, attack: Attack) -> int:
    """How many prompts are malicious principals'."""
    return sum(int(each.principal[1:]) < attack.principals for each in collected.traffic)


def undamaged(world: World, served: list[Array]) -> bool:
    """No served model is worse on the target than the one before, or on a prior than allowed."""
    target = [world.accuracy(model, TARGET) for model in served]
    floor = {task: world.accuracy(world.anchor, task) - 0.05 for task in PRIORS}
    priors = all(world.accuracy(m, task) >= low for m in served for task, low in floor.items())
    return priors and target == sorted(target)


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def test_with_caps_the_malicious_have_their_share_and_the_rounds_still_learn(
    world: World, tmp_path: Path, scale: Callable[[int, int], int]
) -> None:
    shares, _, served = history(world, tmp_path, scale(2, 10), Attack(rows=40))
    assert max(shares) <= 0.15
    assert undamaged(world, served)
    assert world.accuracy(served[-1], TARGET) > world.accuracy(world.anchor, TARGET) + 0.05


def test_a_malicious_majority_spoils_candidates_and_the_gate_serves_none_of_them(
    world: World, tmp_path: Path, scale: Callable[[int, int], int]
) -> None:
    shares, candidates, served = history(
        world, tmp_path, scale(1, 10), Attack(principals=40), cap=0.0
    )
    assert min(shares) > 0.5
    assert min(candidates) < world.accuracy(world.anchor, TARGET) - 0.03  # the attack does work
    assert undamaged(world, served)


@pytest.mark.parametrize(
    "attack",
    [
        Attack(rows=80, ground=True),  # 400 rows of all malicious principals
        Attack(rows=200, padding=2000),  # 1,000 long ones
        Attack(rows=180, copies=True),
        Attack(principals=1, rows=400, ground=True),  # one client alone
        Attack(principals=1, rows=1000, padding=2000),
    ],
    ids=["ground", "long", "copies", "one-ground", "one-long"],
)
def test_the_honest_keep_their_share_whatever_one_in_ten_sends(
    world: World, tmp_path: Path, scale: Callable[[int, int], int], attack: Attack
) -> None:
    """At least nine tenths of what they have where nobody attacks, in every round."""
    attacked, calm = opened(tmp_path / "attacked", 0.01), opened(tmp_path / "calm", 0.01)
    for number in range(scale(1, 10)):
        submit(attacked, world, number, attack)
        submit(calm, world, number, Attack(principals=attack.principals))
        here, there = (collect_rows(each, TARGET, ROWS) for each in (attacked, calm))
        honest = here.from_traffic - hostile(here, attack)
        assert honest >= 0.9 * (there.from_traffic - hostile(there, attack)) > 60
        assert honest >= 0.9 * (1 - attack.principals / PRINCIPALS) * here.from_traffic
