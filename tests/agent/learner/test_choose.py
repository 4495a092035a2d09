"""One point of a round goes to the gate, by a rule that is fixed before it looks."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from agent.learner.choose import Choice, Point, choose

NORMS = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
ROWS = 200


def answer(share: float) -> NDArray[np.float64]:
    """Rewards of rows of which the first ``share`` are right: paired over all points."""
    return (np.arange(ROWS) < share * ROWS).astype(np.float64)


def run(reward: Callable[[Point], NDArray[np.float64]], norms: list[float] = NORMS) -> Choice:
    points = choose(norms)
    point = next(points)
    while True:
        try:
            point = points.send(reward(point))
        except StopIteration as end:
            result: Choice = end.value
            return result


def test_the_peak_of_the_round_and_of_the_line_is_found() -> None:
    def reward(point: Point) -> NDArray[np.float64]:
        share = {2: 0.5, 4: 0.7, 6: 0.6}[point.generation]
        return answer(share - 0.4 * abs(point.t - 0.75))

    choice = run(reward)
    assert choice.point == Point(4, 0.75)
    assert choice.means[Point(4, 0.75)] == pytest.approx(0.7)


def test_every_generation_is_compared_at_one_and_one_line_is_walked() -> None:
    asked: list[Point] = []

    def reward(point: Point) -> NDArray[np.float64]:
        asked.append(point)
        return answer(point.generation / 10 + point.t / 100)

    run(reward)
    assert asked == [Point(2), Point(4), Point(6), *(Point(6, t) for t in (0.25, 0.5, 0.75, 1.25))]


def test_points_that_cannot_be_told_apart_give_the_one_nearest_to_the_anchor() -> None:
    choice = run(lambda point: answer(0.5))
    assert choice.point == Point(2, 0.25)


def test_a_clear_gain_is_taken_however_far_it_lies() -> None:
    choice = run(lambda point: answer(0.2 + 0.1 * point.t * point.generation / 6))
    assert choice.point == Point(6, 1.25)


@pytest.mark.parametrize("generations", [1, 2, 3, 15])
def test_the_last_generation_is_always_among_those_compared(generations: int) -> None:
    choice = run(lambda point: answer(0.5), [float(g + 1) for g in range(generations)])
    assert Point(generations) in choice.means


def test_a_round_without_generations_has_no_candidate() -> None:
    with pytest.raises(ValueError, match="norms"):
        next(choose([]))
