"""Systems that move along members' noise: ES with any penalty, the random walk, the published form.

Each is a generator that yields where it is before every generation and after the last, while the
engines hold theta as it is then. What was done stands in a file, a line a generation, so that a
trial that was killed goes on from there bit for bit.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.learner.drift import Drift
from agent.learner.es import Applied, Step, member_rewards, shaped
from agent.learner.improve import Apply, Evaluate, Plan, improve
from agent.learner.noise import Address
from agent.learner.penalty import expected_norm
from agent.population.pool import Population
from agent.store.weights import Anchor, Parameters
from flows.lab.paper.meter import Meter
from flows.lab.recipe import decay_l2, perturb, restore, update

Rewards = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a trial is: generations and generated tokens so far, and how far theta has gone."""

    generation: int
    tokens: int
    norm: float  # ||delta||
    walk: float | None  # Eq. 2: of a random walk without a penalty
    closed: float | None  # of a random walk under this L2
    reward: float | None  # mean over the members of the generation before
    delta: str | None = None  # its hash


class Trail:
    """What a trial has done so far, one JSON object a line; a line cut by a kill is dropped."""

    def __init__(self, path: Path) -> None:
        self._path = path
        if path.is_file() and not (text := path.read_bytes()).endswith(b"\n"):
            path.write_bytes(text[: text.rfind(b"\n") + 1])

    def rows(self) -> list[dict[str, Any]]:
        """Every line."""
        if not self._path.is_file():
            return []
        return [json.loads(line) for line in self._path.read_text("utf-8").splitlines()]

    def add(self, row: dict[str, Any]) -> None:
        """One more line."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def evolve(
    population: Population, anchor: Anchor, plan: Plan, trail: Trail, rewards: "Evaluated"
) -> Iterator[Place]:
    """ES of a plan from where its trail ends; ``rewards`` evaluates a generation's members."""
    rows = trail.rows()
    steps = [Step.from_json(row["step"]) for row in rows]
    past = [Drift.from_json(row["drift"]) for row in rows]
    # What a trial that goes on has behind it was measured before the next line was written.
    yield from (_place(plan, rows[:done]) for done in range(len(rows)))
    population.open(anchor.directory, anchor.digest)
    population.restore(None, steps)
    yield _place(plan, rows)
    decisions = improve(_from(plan, len(rows)), past)
    answer: Rewards | Applied | None = None
    tokens, applied = 0, ""
    try:
        while True:
            decision = decisions.send(answer)
            if isinstance(decision, Evaluate):
                answer, tokens = rewards(decision)
            elif isinstance(decision, Apply):
                answer = population.apply(decision.step)
                applied = answer.delta_hash
            else:
                row = {"step": decision.step.to_json(), "drift": decision.drift.to_json()}
                rows.append(row | {"tokens": tokens, "delta": applied})
                trail.add(rows[-1])
                answer = None
                yield _place(plan, rows)
    except StopIteration:
        return


Evaluated = Callable[[Evaluate], tuple[Rewards, int]]
"""A generation's members -> their (N,) mean rewards, and the tokens they generated."""


def asked(population: Population, meter: Meter, plan: Plan) -> Evaluated:
    """Members' rewards on the training rows."""

    def evaluate(decision: Evaluate) -> tuple[Rewards, int]:
        jobs = [
            (each.index, Address(plan.run_seed, decision.generation, each.pair), plan.sigma)
            for each in decision.members
        ]
        earned, tokens = np.zeros(len(jobs)), 0
        for result in population.members(jobs, meter.prompts, meter.max_tokens, plan.noise):
            texts = [each.text for each in result.values]
            earned[result.job] = np.mean(meter.rewards(texts))
            tokens += sum(each.tokens for each in result.values)
        return earned, tokens

    return evaluate


def drawn(plan: Plan) -> Evaluated:
    """Random rewards: steps as long as any, in the same noise, that no answer chose."""

    def evaluate(decision: Evaluate) -> tuple[Rewards, int]:
        chance = np.random.default_rng([plan.run_seed, decision.generation])
        return chance.standard_normal(len(decision.members)), 0

    return evaluate


def _from(plan: Plan, done: int) -> Plan:
    return Plan(
        **{name: getattr(plan, name) for name in Plan.__slots__} | {"start_generation": done}
    )


def _place(plan: Plan, rows: list[dict[str, Any]]) -> Place:
    tokens = sum(row["tokens"] for row in rows)
    if not rows:
        return Place(0, 0, 0.0, 0.0, 0.0 if plan.penalty.kind == "l2" else None, None)
    last = rows[-1]["drift"]
    closed = None
    if plan.penalty.importance is None:  # the closed form is one of equal weights
        closed = last["predicted_norm_l2"]
    return Place(
        len(rows), tokens, last["norm"], last["predicted_norm"], closed, last["reward_mean"],
        rows[-1]["delta"],
    )  # fmt: skip


def published(
    population: Population, meter: Meter, anchor: Anchor, plan: Plan, folder: Path
) -> Iterator[Place]:
    """The published arithmetic: bfloat16 weights, noise added and subtracted in place, L2 in place.

    Every tensor draws its noise from the same seed, so that all tensors share the beginnings of one
    stream. After each generation the weights are kept as a delta to the anchor: their sum rounds
    back to the very bfloat16 values.
    """
    state, trail = folder / "delta.safetensors", Trail(folder / "trail.jsonl")
    rows = trail.rows()
    if rows:
        yield Place(0, 0, 0.0, 0.0, 0.0, None)
        yield from (Place(**row["place"]) for row in rows[:-1])
    origin = [anchor.tensor(name).bfloat16() for name in anchor.names]
    weights = [each.clone() for each in origin]
    if rows:
        kept = Parameters.load(anchor, folder / rows[-1]["state"]).rendered()
        weights = [tensor.bfloat16() for _, tensor in kept]
    population.open(anchor.directory, anchor.digest)

    def hold(path: Path) -> None:
        """Give the engines these weights, as a delta to the anchor."""
        moved = {
            name: (each.float() - anchor.tensor(name).float()).numpy()
            for name, each in zip(anchor.names, weights, strict=True)
        }
        Parameters(anchor, moved).save(path)
        population.restore(path, [])

    def place() -> Place:
        moved = [(w.double() - o.double()) for w, o in zip(weights, origin, strict=True)]
        norm = float(sum(float(each.square().sum()) for each in moved)) ** 0.5
        walk, closed = _closed(plan, len(rows))
        tokens = sum(row["tokens"] for row in rows)
        reward = rows[-1]["reward"] if rows else None
        return Place(len(rows), tokens, norm, walk, closed, reward)

    hold(state)
    yield place()
    while len(rows) < plan.generations:
        generation, tokens, earned = len(rows), 0, []
        seeds = [_seed(plan.run_seed, generation, n) for n in range(plan.population)]
        for seed in seeds:
            for each in weights:
                perturb([each], seed, plan.sigma)
            hold(folder / "member.safetensors")
            answers = population.generate(meter.prompts, meter.max_tokens)
            earned.append(float(np.mean(meter.rewards([each.text for each in answers]))))
            tokens += sum(each.tokens for each in answers)
            for each in weights:
                restore([each], seed, plan.sigma)
        values = member_rewards(np.array(earned))
        if values.std() > 0:
            coefficients = plan.alpha / plan.population * shaped(values, plan.shaping)
            for each in weights:
                update([each], seeds, coefficients.tolist())
        decay_l2(weights, origin, plan.alpha * plan.penalty.lam)
        # The new state has a name of its own until the trail names it: a kill between both leaves
        # the old state and the old trail.
        name = f"delta-{generation % 2}.safetensors"
        hold(folder / name)
        rows.append({"tokens": tokens, "reward": float(values.mean()), "state": name})
        rows[-1]["place"] = asdict(place())
        trail.add(rows[-1])
        yield place()


def _closed(plan: Plan, generations: int) -> tuple[float | None, float | None]:
    """Eq. 2 and the closed form of the plan's L2."""
    if not generations:
        return 0.0, 0.0
    v = plan.alpha * (plan.parameters * generations / plan.population) ** 0.5
    closed = expected_norm(
        plan.penalty, alpha=plan.alpha, population=plan.population, parameters=plan.parameters,
        generations=generations,
    )  # fmt: skip
    return v, closed


def _seed(run_seed: int, generation: int, member: int) -> int:
    """A seed of torch's generator."""
    text = f"{run_seed} {generation} {member}".encode()
    return int.from_bytes(sha256(text).digest()[:7], "little")


def snapshots(population: Population, anchor: Anchor, folder: Path) -> Iterator[Place]:
    """The deltas that a training process left in a folder, in order (``gradient``)."""
    population.open(anchor.directory, anchor.digest)
    for row in Trail(folder / "trail.jsonl").rows():
        path = folder / row["state"]
        delta = Parameters.load(anchor, path)
        population.restore(path, [])
        squares = (float(np.square(each, dtype=np.float64).sum()) for each in delta.delta.values())
        norm = sum(squares) ** 0.5
        yield Place(row["generation"], row["tokens"], norm, None, None, row["reward"])
