"""The choice of a round's candidate: the best point, of equal ones the nearest to the anchor."""

from collections.abc import Callable

import numpy as np
import pytest

from agent.learner.choose import Choice, Point, T, choose, stalled

NORMS = [1.0, 2.0, 3.0, 4.0]


def chosen(measured: dict[int, float], reward: Callable[[Point], float]) -> Choice:
    """The choice where every row of a point earns the same."""
    asked = choose(NORMS, {g: np.full(8, mean) for g, mean in measured.items()})
    point = next(asked)
    try:
        while True:
            point = asked.send(np.full(8, reward(point)))
    except StopIteration as end:
        choice: Choice = end.value
        return choice


def test_the_line_through_the_best_generation_is_searched() -> None:
    choice = chosen({2: 0.4, 4: 0.3}, lambda point: 0.4 - abs(point.t - 0.75))
    assert choice.point == Point(2, 1.0) or choice.means[choice.point] == max(choice.means.values())
    assert {point for point in choice.means if point.generation == 2} == {Point(2, t) for t in T}
    assert [point for point in choice.means if point.generation == 4] == [Point(4)]


def test_a_point_on_the_line_wins_where_it_is_better() -> None:
    choice = chosen({2: 0.4, 4: 0.3}, lambda point: 0.9 if point.t == 0.5 else 0.1)
    assert choice.point == Point(2, 0.5)


@pytest.mark.parametrize(("peak", "asked"), [(1.25, 1.5), (1.5, 1.75), (1.75, 2.0), (3.0, 2.0)])
def test_the_line_goes_on_while_its_end_is_the_best(peak: float, asked: float) -> None:
    choice = chosen({2: 0.9 - abs(1 - peak)}, lambda point: 0.9 - abs(point.t - peak))
    assert choice.point == Point(2, min(peak, 2.0))
    assert max(point.t for point in choice.means) == asked


def test_of_equal_points_the_nearest_to_the_anchor_is_taken() -> None:
    assert chosen({1: 0.2, 4: 0.2}, lambda point: 0.2).point == Point(1, min(T))


@pytest.mark.parametrize("measured", [{}, {0: 0.1}, {5: 0.1}])
def test_a_generation_of_the_round_must_have_been_measured(measured: dict[int, float]) -> None:
    with pytest.raises(ValueError, match="of 1 to 4 wanted"):
        chosen(measured, lambda point: 0.0)


@pytest.mark.parametrize(
    ("means", "patience", "ends"),
    [
        ([0.1, 0.3, 0.2, 0.3], 2, True),  # equal to the best is no better
        ([0.1, 0.3, 0.2, 0.4], 2, False),
        ([0.3, 0.2], 2, False),  # too early to tell
        ([0.3, 0.2, 0.1, 0.1, 0.1], 0, False),
    ],
)
def test_a_round_ends_after_its_peak(means: list[float], patience: int, ends: bool) -> None:
    assert bool(stalled(means, patience)) is ends
