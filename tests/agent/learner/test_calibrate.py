"""Sigma is chosen by what perturbing costs against what it tells."""

from collections.abc import Callable

import pytest

from agent.learner.calibrate import ALPHA_RATIO, GRID, KL_LIMIT, Calibration, SigmaTrial, calibrate

WIDE = (-1.5, -0.5, -0.2, 0.2, 0.5, 1.5)  # members' rewards in units of their spread


def run(trial: Callable[[float], SigmaTrial], grid: tuple[float, ...] = GRID) -> Calibration:
    asked = calibrate(grid)
    sigma = next(asked)
    while True:
        try:
            sigma = asked.send(trial(sigma))
        except StopIteration as end:
            result: Calibration = end.value
            return result


def quadratic(best: float) -> Callable[[float], SigmaTrial]:
    """Spread grows with sigma, the fall with its square: they are equal in size at ``best``."""

    def trial(sigma: float) -> SigmaTrial:
        spread = sigma
        fall = 0.5 * spread * (sigma / best)
        return SigmaTrial(sigma, 0.5, tuple(0.5 - fall + spread * each for each in WIDE))

    return trial


@pytest.mark.parametrize("best", [0.0005, 0.001, 0.004, 0.015])
def test_the_largest_sigma_that_costs_less_than_it_tells_is_chosen(best: float) -> None:
    calibration = run(quadratic(best))
    assert calibration.sigma == best
    assert calibration.alpha == ALPHA_RATIO * best
    assert calibration.trials[-1].sigma == min(each for each in GRID if each > best)
    assert "falls by" in calibration.reason


def test_a_perturbation_that_changes_the_tokens_too_much_ends_the_grid() -> None:
    def trial(sigma: float) -> SigmaTrial:
        return SigmaTrial(sigma, 0.0, (0.0,) * 6, kl=KL_LIMIT * sigma / 0.002)

    calibration = run(trial)
    assert calibration.sigma == 0.002
    assert "no spread" in calibration.reason


def test_all_too_large_takes_the_smallest_and_says_so() -> None:
    calibration = run(lambda sigma: SigmaTrial(sigma, 0.9, (0.1, 0.1, 0.1)))
    assert calibration.sigma == GRID[0]
    assert "even the smallest" in calibration.reason
    assert len(calibration.trials) == 1


def test_a_reward_that_is_not_finite_is_never_chosen() -> None:
    def trial(sigma: float) -> SigmaTrial:
        return SigmaTrial(sigma, 0.5, (0.4, 0.5, float("nan") if sigma > 0.001 else 0.6))

    assert run(trial).sigma == 0.001


@pytest.mark.parametrize("grid", [(), (0.0, 0.1), (0.2, 0.1), (0.1, 0.1)])
def test_a_grid_that_does_not_ascend_is_refused(grid: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="ascend"):
        next(calibrate(grid))
