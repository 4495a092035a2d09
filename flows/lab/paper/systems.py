"""What the study compares, and the sizes at which it compares it.

A system is how weights are moved; all else (rows, prompts, reward, evaluation, seeds) is shared.
``awd-l2@5`` is the system with another lambda, for the ablation.
"""

from dataclasses import dataclass, replace
from typing import Literal

from agent.errors import UserError
from agent.learner.improve import Plan
from agent.learner.penalty import Penalty, PenaltyKind
from agent.sections import EMBEDDED, SMOLLM2

Weights = Literal["fisher", "path"]


@dataclass(frozen=True, slots=True)
class StudySystem:
    """One way to move weights."""

    kind: Literal["es", "random", "in_place", "grpo", "sft"] = "es"
    times: int = 1  # members, as a multiple of the sizes' population
    penalty: PenaltyKind = "none"
    lam: float | None = None  # None: the sizes'
    importance: Weights | None = None


SYSTEMS: dict[str, StudySystem] = {
    "es": StudySystem(),
    "awd-l2": StudySystem(penalty="l2"),
    "random": StudySystem("random"),  # coefficients of random rewards: no reward chooses anything
    "grpo": StudySystem("grpo"),
    "sft": StudySystem("sft"),
    "awd-l1": StudySystem(penalty="l1"),
    "awd-huber": StudySystem(penalty="huber"),
    "awd-elastic": StudySystem(penalty="elastic_net"),
    "awd-fisher": StudySystem(penalty="l2", importance="fisher"),
    "awd-path": StudySystem(penalty="l2", importance="path"),
    "es-x2": StudySystem(times=2),
    "es-x4": StudySystem(times=4),
    "published-bf16": StudySystem("in_place", penalty="l2"),
}


@dataclass(frozen=True, slots=True)
class Sizes:
    """Numbers of a study; of ES, then of the gradient systems."""

    sigma: float
    alpha: float
    population: int
    prompts: int  # training rows, the same ones in every generation
    lam: float  # of L2 and Huber
    lam_l1: float
    threshold: float  # Huber's, in units of a weight
    grpo_prompts: int  # of the training rows, in turn
    rollouts: int  # a prompt
    minibatches: int  # updates of the weights in a generation of GRPO
    grpo_rate: float
    sft_rate: float
    kl: float = 0.001  # coefficient of the KL term in GRPO's loss


# ES of the embedded model as in its profile. GRPO and fine-tuning at the largest rates of a few
# tried whose target rose without a collapse.
SIZES = {
    EMBEDDED: Sizes(
        sigma=0.01, alpha=0.01, population=16, prompts=64, lam=3.0, lam_l1=0.03, threshold=0.01,
        grpo_prompts=32, rollouts=8, minibatches=4, grpo_rate=1e-4, sft_rate=1e-4,
    ),
    SMOLLM2: Sizes(
        sigma=0.001, alpha=0.002, population=16, prompts=64, lam=3.0, lam_l1=0.006, threshold=0.002,
        grpo_prompts=16, rollouts=8, minibatches=4, grpo_rate=1e-5, sft_rate=1e-5,
    ),
}  # fmt: skip
# Of any other model: the paper's, with lambda in exact arithmetic (half of the 10 it publishes).
PAPER = Sizes(
    sigma=0.001, alpha=0.0005, population=30, prompts=200, lam=5.0, lam_l1=0.003, threshold=0.001,
    grpo_prompts=200, rollouts=30, minibatches=6, grpo_rate=1e-6, sft_rate=1e-6,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long a trial is and how often it is measured, where a call does not say."""

    generations: int
    every: int  # generations between measurements
    rows: int  # evaluation rows of a task


def lengths_of(model: str) -> Lengths:
    """The lengths of a model: small ones, or the paper's."""
    return Lengths(30, 10, 200) if model in SIZES else Lengths(500, 25, 2000)


def sizes_of(model: str) -> Sizes:
    """The sizes of a model: its own, or the paper's."""
    return SIZES.get(model, PAPER)


def system_of(name: str) -> StudySystem:
    """A system by its name, ``name`` or ``name@lambda``.

    Raises:
        UserError: An unknown system, a lambda that is no number, or one of a system without.
    """
    plain, _, lam = name.partition("@")
    if plain not in SYSTEMS:
        raise UserError(f"system {name!r} is not known; allowed: {', '.join(SYSTEMS)}")
    system = SYSTEMS[plain]
    if not lam:
        return system
    try:
        value = float(lam)
    except ValueError:
        raise UserError(f"system {name!r}: lambda {lam!r} is no number") from None
    if system.penalty == "none" or not value > 0:
        raise UserError(f"system {name!r}: allowed: a lambda above 0 of a system with a penalty")
    return replace(system, lam=value)


def penalty_of(system: StudySystem, sizes: Sizes, importance: str | None = None) -> Penalty:
    """The penalty of a system; ``importance`` is the sha256 of its weights.

    Elastic net has half of each strength: with a = l1 / (l1 + l2) and lambda = (l1 + l2) / 2 its
    parts are a lambda = l1 / 2 and (1 - a) lambda = l2 / 2.
    """
    lam, share = sizes.lam if system.penalty != "l1" else sizes.lam_l1, 0.5
    if system.penalty == "elastic_net":
        lam, share = (sizes.lam + sizes.lam_l1) / 2, sizes.lam_l1 / (sizes.lam + sizes.lam_l1)
    if system.lam is not None:
        lam = system.lam
    if system.penalty == "none":
        return Penalty()
    return Penalty(system.penalty, lam, sizes.threshold, share, importance)


def plan_for(
    system: StudySystem,
    sizes: Sizes,
    seed: int,
    generations: int,
    parameters: int,
    importance: str | None = None,
) -> Plan:
    """The learner's plan of a system that moves along members' noise."""
    return Plan(
        run_seed=seed,
        generations=generations,
        population=sizes.population * system.times,
        mirrored=False,
        sigma=sizes.sigma,
        alpha=sizes.alpha,
        shaping="zscore",
        penalty=penalty_of(system, sizes, importance),
        noise="normal",
        early_stop=False,
        parameters=parameters,
    )
