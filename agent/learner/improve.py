"""A round's generations as decisions: what to evaluate, to apply and to record, and when to end.

The generator holds no engine, file or clock. Whoever drives it answers each `Evaluate` with the
rewards and each `Apply` with what came of it:

    Evaluate -> rewards (N,) or (N, P) -> Apply -> Applied -> Record -> None -> Evaluate -> ...

Every ``parent_every`` generations theta answers the members' rows, too; members that earn clearly
less than it (``drift.falls``) are an alarm, which halves sigma from then on where the plan says so.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from agent.learner.drift import Drift, Prediction, alarm, falls, idle, measure
from agent.learner.es import Applied, Member, Shaping, Step, members, step
from agent.learner.noise import Address, NoiseKind
from agent.learner.penalty import Penalty, check

__all__ = ["Applied", "Apply", "Evaluate", "Plan", "Record", "RoundOutcome", "improve"]


@dataclass(frozen=True, slots=True)
class Plan:
    """The fixed quantities of a round."""

    run_seed: int
    generations: int
    population: int
    mirrored: bool
    sigma: float
    alpha: float
    shaping: Shaping
    penalty: Penalty
    noise: NoiseKind
    early_stop: bool
    parameters: int  # d, tied tensors once
    start_generation: int = 0  # the first generation not yet in the journal
    start_norm: float = 0.0  # ||delta|| before generation 0: above 0 when going on from a champion
    parent_every: int = 0  # generations between two measurements of theta beside its members
    halve: bool = False  # whether an alarm halves sigma

    def __post_init__(self) -> None:
        if not 0 <= self.start_generation <= self.generations:
            raise ValueError(
                f"start_generation {self.start_generation} must lie in 0 .. {self.generations}"
            )
        if self.parameters < 1:
            raise ValueError(f"parameters {self.parameters} must be 1 or more")
        members(self.population, self.mirrored)  # refuses an impossible population
        check(self.penalty, self.alpha)


@dataclass(frozen=True, slots=True)
class Evaluate:
    """Wanted: rewards of these members, (N,) or (N, P), rows in this order.

    With ``parent`` one more row, of theta itself, comes last.
    """

    generation: int
    members: tuple[Member, ...]
    sigma: float
    parent: bool = False

    def jobs(self, run_seed: int) -> list[tuple[int, Address, float]]:
        """(place, address, scale) of each row; theta is a member without noise."""
        rows = [
            (each.index, Address(run_seed, self.generation, each.pair), each.sign * self.sigma)
            for each in self.members
        ]
        theta = (len(rows), Address(run_seed, self.generation, 0), 0.0)
        return [*rows, theta] if self.parent else rows


@dataclass(frozen=True, slots=True)
class Apply:
    """Wanted: this step applied by every holder of (anchor, delta), and what came of it."""

    step: Step


@dataclass(frozen=True, slots=True)
class Record:
    """Wanted: step and drift reading stored, before anything else happens."""

    step: Step
    drift: Drift
    rewards: NDArray[np.float64] = field(compare=False)
    alarm: str | None = None  # what this generation's reading says, see `drift.falls`


@dataclass(frozen=True, slots=True)
class RoundOutcome:
    """How a round ended: generations done in all, and "completed" or why it ended early."""

    generations: int
    reason: str


Decision: TypeAlias = Evaluate | Apply | Record
Answer: TypeAlias = NDArray[np.float64] | Applied | None


def improve(plan: Plan, past: Sequence[Drift] = ()) -> Generator[Decision, Answer, RoundOutcome]:
    """Run a plan from its start_generation; `past` are the readings already recorded, in order."""
    if past and len(past) != plan.start_generation:
        raise ValueError(f"{len(past)} past readings, start_generation {plan.start_generation}")
    history, predicted = list(past), _prediction(plan, past)
    round_members = members(plan.population, plan.mirrored)
    for generation in range(plan.start_generation, plan.generations):
        # Both are checked before a generation, not after it: a resumed round then ends at the same
        # generation as one that was never interrupted.
        alarms = falls(history, plan.population)
        sigma = plan.sigma / 2 ** (len(alarms) if plan.halve else 0)
        if reason := idle(history, plan.population, sigma):
            return RoundOutcome(generation, reason)
        if plan.early_stop and (reason := alarm(history)):
            return RoundOutcome(generation, reason)
        beside = bool(plan.parent_every) and generation % plan.parent_every == 0
        rewards = yield Evaluate(generation, round_members, sigma, beside)
        assert isinstance(rewards, np.ndarray)
        parent = float(rewards[-1].mean()) if beside else None
        rewards = rewards[: plan.population]
        taken = _step(plan, generation, round_members, rewards, sigma)
        applied = yield Apply(taken)
        assert isinstance(applied, Applied)
        predicted = predicted.after(taken, plan.parameters)
        history.append(measure(taken, applied, rewards, predicted, parent))
        new = falls(history, plan.population)[len(alarms) :]
        yield Record(taken, history[-1], rewards, new[0][1] if new else None)
    return RoundOutcome(plan.generations, "completed")


def _step(
    plan: Plan,
    generation: int,
    round_members: tuple[Member, ...],
    rewards: NDArray[np.float64],
    sigma: float,
) -> Step:
    """The step this plan takes on these rewards."""
    return step(
        rewards,
        round_members,
        run_seed=plan.run_seed,
        generation=generation,
        sigma=sigma,
        alpha=plan.alpha,
        shaping=plan.shaping,
        penalty=plan.penalty,
        noise=plan.noise,
    )


def _prediction(plan: Plan, past: Sequence[Drift]) -> Prediction:
    """Where the random walk stands at the start: read from the past, or the closed form."""
    if past:
        return Prediction(past[-1].predicted_norm, past[-1].predicted_norm_l2 or 0.0)
    predicted = Prediction(plan.start_norm, plan.start_norm)
    v = plan.alpha**2 * plan.parameters / plan.population
    for _ in range(plan.start_generation):
        predicted = predicted.grown(v, 1 - plan.alpha * plan.penalty.lam)
    return predicted
