"""The candidate of a round: one point among its generations and on the line from the anchor.

A point is (g, t): the weights anchor + t * delta_g, where delta_g is delta after g generations. All
points answer the same selection rows, which neither train nor judge. The rule is fixed before any
answer is seen: first the generations are compared at t = 1, then the fractions of T on the line
through the best one. Of all points whose mean reward is within one standard error (of the paired
difference) of the best, the one nearest to the anchor is taken: what cannot be told apart should
cost as little drift as possible.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Final

import numpy as np
from numpy.typing import NDArray

T: Final = (0.25, 0.5, 0.75, 1.0, 1.25)
GENERATIONS: Final = 3  # generations compared, the last included

Rewards = NDArray[np.float64]


@dataclass(frozen=True, slots=True, order=True)
class Point:
    """anchor + t * delta after ``generation`` generations of the round."""

    generation: int
    t: float = 1.0


@dataclass(frozen=True, slots=True)
class Choice:
    """The chosen point and the mean selection reward of every point that was compared."""

    point: Point
    means: dict[Point, float]


def choose(
    norms: Sequence[float], generations: int = GENERATIONS
) -> Generator[Point, Rewards, Choice]:
    """Ask for the rewards of each point in turn, then return the choice.

    Args:
        norms: ||delta|| after 1, 2, ... generations; its length is the round's.
        generations: How many of them are compared at t = 1, evenly spread, the last included.

    Yields:
        A point, answered by the (P,) rewards of the selection rows, in one order for all.

    Raises:
        ValueError: No generation at all.
    """
    if not norms:
        raise ValueError("norms: empty, allowed: one norm a generation, at least one")
    rewards: dict[Point, Rewards] = {}
    for generation in _spread(len(norms), generations):
        point = Point(generation)
        rewards[point] = yield point
    best = _nearest_of_the_best(rewards, norms)
    for t in T:
        point = Point(best.generation, t)
        if point not in rewards:
            rewards[point] = yield point
    means = {point: float(each.mean()) for point, each in rewards.items()}
    return Choice(_nearest_of_the_best(rewards, norms), means)


def _spread(last: int, count: int) -> list[int]:
    """Up to ``count`` generations from 1 to ``last``, evenly spaced, ``last`` always among them."""
    steps = range(1, count + 1)
    return sorted({max(1, round(last * step / count)) for step in steps})


def _nearest_of_the_best(rewards: dict[Point, Rewards], norms: Sequence[float]) -> Point:
    """The point with the smallest t * ||delta|| among those no worse than one standard error."""
    best = max(rewards, key=lambda point: (rewards[point].mean(), -_distance(point, norms)))
    close = [point for point in rewards if not _clearly_less(rewards[point], rewards[best])]
    return min(close, key=lambda point: _distance(point, norms))


def _distance(point: Point, norms: Sequence[float]) -> float:
    return point.t * norms[point.generation - 1]


def _clearly_less(rewards: Rewards, best: Rewards) -> bool:
    """Whether the mean is below the best one's by more than a standard error of the difference."""
    difference = best - rewards
    if difference.size < 2:
        return bool(difference.mean() > 0)
    error = float(difference.std(ddof=1)) / sqrt(difference.size)
    return bool(difference.mean() > error)
