"""Sigma and alpha from a few members, before a round.

On each sigma of an ascending grid a few members answer the same prompts as theta, their parent.
With r_0 the parent's mean reward and r_1 .. r_M the members':

    fall(sigma)   = r_0 - mean_m r_m              what a perturbation of this size costs
    spread(sigma) = std_m r_m   (ddof 1)          what tells members apart

A perturbation that is too small leaves no spread and one that is too large ruins every member
alike. Chosen is the largest sigma with

    fall <= FALL_LIMIT * spread   and   KL(parent || member) <= KL_LIMIT nats a token

and alpha = ALPHA_RATIO * sigma. The grid ends at the first sigma that fails on either count, since
a larger one only costs more.
"""

from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import isfinite
from typing import Any, Final

import numpy as np

GRID: Final = (0.0003, 0.0005, 0.001, 0.002, 0.004, 0.008, 0.015, 0.03)
MEMBERS: Final = 6  # of each sigma: the spread is then known to about a third
FALL_LIMIT: Final = 0.5  # of the spread
KL_LIMIT: Final = 0.1  # nats a token
ALPHA_RATIO: Final = 1.0  # alpha / sigma, of both profiles that were tuned by hand


@dataclass(frozen=True, slots=True)
class SigmaTrial:
    """What members of one sigma did: the parent's mean reward, theirs, KL a token (or None)."""

    sigma: float
    parent: float
    rewards: tuple[float, ...]
    kl: float | None = None

    @property
    def fall(self) -> float:
        """Mean reward lost by perturbing."""
        return self.parent - float(np.mean(self.rewards))

    @property
    def spread(self) -> float:
        """Standard deviation between members, ddof 1."""
        return float(np.std(self.rewards, ddof=1))

    def problem(self) -> str | None:
        """Why this sigma is too large; None when it is not."""
        if not all(isfinite(each) for each in (self.parent, *self.rewards)):
            return "a reward is not finite"
        if self.kl is not None and not self.kl <= KL_LIMIT:
            return f"KL {self.kl:.3g} nats a token, limit {KL_LIMIT}"
        if self.fall > max(0.0, FALL_LIMIT * self.spread):
            return f"the mean reward falls by {self.fall:.3g}, spread {self.spread:.3g}"
        return None


@dataclass(frozen=True, slots=True)
class Calibration:
    """The chosen sigma and alpha, why, and every trial: all that the journal keeps of it."""

    sigma: float
    alpha: float
    reason: str
    trials: tuple[SigmaTrial, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the plan of a round."""
        return asdict(self)


def calibrate(grid: Sequence[float] = GRID) -> Generator[float, SigmaTrial, Calibration]:
    """Ask for a trial of each sigma until one is too large; the largest that was not is chosen.

    Args:
        grid: Standard deviations to try, ascending, all above 0.

    Raises:
        ValueError: An empty grid, or one that does not ascend from above 0.
    """
    if not grid or grid[0] <= 0 or any(b <= a for a, b in pairwise(grid)):
        raise ValueError(f"grid {tuple(grid)} must ascend from above 0")
    trials: list[SigmaTrial] = []
    reason = "the largest of the grid"
    for sigma in grid:
        trials.append((yield sigma))
        problem = trials[-1].problem()
        if problem is not None:
            reason = f"at {sigma:g} {problem}"
            break
    sound = [trial for trial in trials if trial.problem() is None]
    chosen = sound[-1] if sound else trials[0]
    if not sound:
        reason = f"even the smallest is too large: {reason}"
    elif not any(trial.spread > 0 for trial in sound):
        reason = f"no spread between members at any sigma: rewards cannot tell them apart; {reason}"
    return Calibration(chosen.sigma, ALPHA_RATIO * chosen.sigma, reason, tuple(trials))
