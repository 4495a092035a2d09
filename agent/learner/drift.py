"""The drift meter: how far delta has gone, how far chance alone would have taken it.

With v_t = d sum_p c_p^2 the expected squared length of generation t's step (alpha^2 d / N without
mirrored pairs; 0 for a no-op) and rho = 1 - alpha lambda,

    random walk   q <- q + v_t             Eq. 2 of arXiv 2605.30148, from the coefficients used
    l2            q <- rho^2 (q + v_t)

are E ||delta||^2 if every step points in a random direction. A norm at the prediction is a random
walk; a norm above it means that steps have a direction in common.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite, sqrt
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from agent.learner.calibrate import FALL_LIMIT
from agent.learner.es import Applied, Step, member_rewards

ALARM_WINDOW: Final = 20  # generations looked back on
ALARM_GROWTH: Final = 0.02  # relative growth of the norm in the window that counts as growing
SAME: Final = 1e-9  # largest spread between members' rewards that is the rounding of sums
FALLS: Final = 2  # measurements of theta beside its members on which an alarm rests
IDLE: Final = 3  # generations in a row without a step, after which a round ends


@dataclass(frozen=True, slots=True)
class Drift:
    """One generation's reading; None where a quantity is undefined."""

    generation: int
    norm: float  # ||delta||
    step_norm: float
    layer_norms: dict[str, float]
    predicted_norm: float  # random walk, no penalty
    predicted_norm_l2: float | None  # random walk under the step's own l2; None for other penalties
    reward_mean: float | None
    reward_std: float | None  # between members, ddof 0
    agree: float | None  # see `agreement`
    parent: float | None = None  # mean reward of theta on the members' rows, where it was asked

    def to_json(self) -> dict[str, Any]:
        """A plain dict that `from_json` turns back into an equal reading."""
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Drift":
        """The inverse of `to_json`; an unknown or missing key is a TypeError."""
        return Drift(**data)


@dataclass(frozen=True, slots=True)
class Prediction:
    """sqrt(E ||delta||^2) of a random walk so far, free and under l2.

    The state is the very number that is recorded, so that a resumed round goes on bit for bit.
    """

    free: float
    l2: float

    def after(self, step: Step, parameters: int) -> "Prediction":
        """The prediction one step later (both recursions of this module)."""
        if step.no_op is not None:
            return self
        v = parameters * sum(c * c for c in step.coefficients)
        return self.grown(v, 1 - step.alpha * step.penalty.lam)

    def grown(self, v: float, rho: float) -> "Prediction":
        """One recursion of this module."""
        return Prediction(sqrt(self.free**2 + v), rho * sqrt(self.l2**2 + v))


def measure(
    step: Step,
    applied: Applied,
    rewards: NDArray[np.float64],
    predicted: Prediction,
    parent: float | None = None,
) -> Drift:
    """One generation's reading from its step, what came of it, (N,) or (N, P) rewards, and the
    mean reward of theta before the step."""
    means = member_rewards(rewards)
    finite = bool(np.isfinite(means).all())
    return Drift(
        generation=step.generation,
        norm=applied.norm,
        step_norm=applied.step_norm,
        layer_norms=dict(applied.layer_norms),
        predicted_norm=predicted.free,
        predicted_norm_l2=predicted.l2 if step.penalty.kind == "l2" else None,
        reward_mean=float(means.mean()) if finite else None,
        reward_std=float(means.std()) if finite else None,
        agree=agreement(rewards),
        parent=parent if parent is not None and isfinite(parent) else None,
    )


def agreement(rewards: NDArray[np.float64]) -> float | None:
    """Share of members whose merit has the same sign on two halves of the examples.

    rewards (N, P): h1, h2 = each member's mean over the even and the odd examples, less the mean
    over members; a member agrees when h1 h2 > 0 and counts half when h1 h2 = 0. Pure noise gives
    1/2, rewards that measure the member give 1. None without two examples, two members, or with a
    reward that is not finite.
    """
    if rewards.ndim != 2 or min(rewards.shape) < 2 or not np.isfinite(rewards).all():
        return None
    halves = np.stack([rewards[:, 0::2].mean(axis=1), rewards[:, 1::2].mean(axis=1)])
    merit = np.round(
        halves - halves.mean(axis=1, keepdims=True), 12
    )  # 12 digits: rounding errors of sums are no merit
    return float(np.mean((np.sign(merit[0] * merit[1]) + 1) / 2))


def reliability(rewards: NDArray[np.float64]) -> float | None:
    """Share of the variance between members' means that is theirs and not the examples' chance.

    Two-way analysis of variance of rewards (N, P), members by examples, one value a cell:

        rho = 1 - MS_residual / MS_members,   at least 0

    With rho the correlation of a member's mean with its merit is sqrt(rho), and so is the share of
    a noiseless step that a step makes. None without two examples, two members or a difference.
    """
    if rewards.ndim != 2 or min(rewards.shape) < 2 or not np.isfinite(rewards).all():
        return None
    members, examples = rewards.mean(axis=1, keepdims=True), rewards.mean(axis=0, keepdims=True)
    residual = rewards - members - examples + rewards.mean()
    count, size = rewards.shape
    between = size * float(np.var(members, ddof=1))
    within = float((residual**2).sum()) / ((count - 1) * (size - 1))
    return max(0.0, 1 - within / between) if between > 0 else None


def alarm(
    history: Sequence[Drift], window: int = ALARM_WINDOW, growth: float = ALARM_GROWTH
) -> str | None:
    """The reason to end a round early, or None: the norm grows while the reward is flat.

    Over the last `window` readings: the norm rose by more than `growth`, and the mean reward of
    the later half exceeds that of the earlier half by no more than one standard error.
    """
    recent = history[-window:]
    means = [reading.reward_mean for reading in recent if reading.reward_mean is not None]
    if len(recent) < window or len(means) < window:
        return None
    first, last = recent[0].norm, recent[-1].norm
    early, late = np.array(means[: window // 2]), np.array(means[window // 2 :])
    error = sqrt(early.var(ddof=1) / early.size + late.var(ddof=1) / late.size)
    gain = float(late.mean() - early.mean())
    if last <= first * (1 + growth) or gain > error:
        return None
    return (
        f"norm grows, reward flat: in {window} generations norm {first:.4g} -> {last:.4g}, "
        f"reward {early.mean():.4g} -> {late.mean():.4g} (standard error {error:.2g})"
    )


def falls(history: Sequence[Drift], population: int) -> list[tuple[int, str]]:
    """Every alarm so far that members earn clearly less than their parent: generation and text.

    With f the mean of parent - members and s their spread over the last FALLS measurements, both
    of the same rows, an alarm is

        f > FALL_LIMIT s + 2 s / sqrt(FALLS N)

    which is the limit of a calibration and twice the standard error of f. After an alarm
    measurements count anew, since sigma may be another one. A function of the readings alone, so
    that a resumed round finds the same alarms.
    """
    alarms: list[tuple[int, str]] = []
    measured: list[tuple[float, float]] = []
    for each in history:
        if each.parent is None or each.reward_mean is None or each.reward_std is None:
            continue
        measured.append((each.parent - each.reward_mean, each.reward_std))
        if len(measured) < FALLS:
            continue
        fall, spread = np.mean(measured[-FALLS:], axis=0)
        if fall > max(SAME, spread * (FALL_LIMIT + 2 / sqrt(FALLS * population))):
            text = (
                f"members earn {fall:.3g} less than their parent, spread {spread:.3g}: sigma is "
                "too large"
            )
            alarms.append((each.generation, text))
            measured.clear()
    return alarms


def idle(history: Sequence[Drift], population: int, sigma: float, window: int = IDLE) -> str | None:
    """Why nothing is learnt and what to change, or None: the last `window` readings have no step.

    All members earned the same reward in each of them. A generation with a reward that is not
    finite is none of these: its step names the member.
    """
    # Steps count too: with a penalty delta may still shrink although no reward differs.
    recent = history[-window:]
    means = [each.reward_mean for each in recent if each.reward_mean is not None]
    moved = any(each.step_norm or (each.reward_std or 0) > SAME for each in recent)
    if not recent or len(means) < window or moved:
        return None
    if population == 1:
        why = "one member has no other to be compared with; set learner.population to 2 or more"
    elif max(means) == 0:  # log-probabilities are below 0 and say nothing of right or wrong
        why = (
            "no answer of any member earned a reward; take easier rows or a prompt that shows the "
            f"form of the answer (tasks.prompts), or raise learner.sigma (now {sigma:g})"
        )
    elif min(means) >= 1:
        why = "every answer of every member was right; take harder rows or another target"
    else:
        why = (
            f"the members do not differ, all earned {means[-1]:.4g}; raise learner.sigma (now "
            f"{sigma:g}) or learner.prompts"
        )
    return f"no learning in {len(recent)} generations: {why}"
