"""The candidate of a round: one point among its generations and on the line from the anchor.

A point is (g, t): the weights anchor + t * delta_g, where delta_g is delta after g generations. All
points answer the same selection rows, which neither train nor judge. The rule is fixed before any
answer is seen: the generations that were measured while the round ran are compared at t = 1, then
the fractions of T on the line through the best one and, while its end is the best, one further. The
point with the largest mean reward is
taken; of equal ones the one nearest to the anchor, since it costs the least drift.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

T: Final = (0.25, 0.5, 0.75, 1.0, 1.25)
BEYOND: Final = (1.5, 1.75, 2.0)  # each asked only where the one before it is the best

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
    norms: Sequence[float], measured: Mapping[int, Rewards]
) -> Generator[Point, Rewards, Choice]:
    """Ask for the rewards of each point on the line in turn, then return the choice.

    Args:
        norms: ||delta|| after 1, 2, ... generations; its length is the round's.
        measured: (P,) rewards of the selection rows after so many generations, one at least.

    Yields:
        A point, answered by the (P,) rewards of the selection rows, in one order for all.

    Raises:
        ValueError: No generation was measured, or one that the round does not have.
    """
    if not measured or not all(1 <= each <= len(norms) for each in measured):
        raise ValueError(f"measured {sorted(measured)}: one or more of 1 to {len(norms)} wanted")
    means = {Point(each): float(rewards.mean()) for each, rewards in measured.items()}
    best = _best(means, norms)
    for t in T:
        point = Point(best.generation, t)
        if point not in means:
            means[point] = float((yield point).mean())
    for before, t in pairwise((T[-1], *BEYOND)):
        if _best(means, norms) != Point(best.generation, before):
            break
        point = Point(best.generation, t)
        means[point] = float((yield point).mean())
    return Choice(_best(means, norms), means)


def _best(means: Mapping[Point, float], norms: Sequence[float]) -> Point:
    """The largest mean; of equal ones the smallest t * ||delta||."""
    return min(means, key=lambda point: (-means[point], point.t * norms[point.generation - 1]))


def stalled(means: Sequence[float], patience: int) -> str | None:
    """Why a round ends early, or None: its last measurements are no better than an earlier one.

    Args:
        means: Mean selection rewards in the order of their generations.
        patience: Measurements without a new best that end the round; 0: never.
    """
    if not patience or len(means) <= patience:
        return None
    best = max(means[:-patience])
    if max(means[-patience:]) > best:
        return None
    return f"peak: {patience} measurements on selection rows no better than {best:.4g}"
