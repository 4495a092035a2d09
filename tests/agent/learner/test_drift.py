"""The drift meter: predictions against real updates, agreement, and when the alarm sounds."""

import json
import re
from dataclasses import replace
from math import sqrt

import numpy as np
import pytest
from numpy.typing import NDArray

from agent.learner.drift import (
    Drift,
    Prediction,
    agreement,
    alarm,
    falls,
    idle,
    measure,
    reliability,
)
from agent.learner.es import Applied, members, step
from agent.learner.kernels_cpu import update_inplace
from agent.learner.penalty import Penalty, PenaltyKind, expected_norm

APPLIED = Applied("hash", 1.5, 0.5, {"model.norm.weight": 1.5})


def reading(generation: int, norm: float, reward: float | None) -> Drift:
    return Drift(generation, norm, 0.1, {}, norm, None, reward, 0.1, None)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("kind", ["none", "l2"])
def test_pure_noise_walks_as_predicted(kind: PenaltyKind, mirrored: bool) -> None:
    """Random rewards, 60 generations, 200,000 parameters: norm within 1 % of both predictions."""
    penalty, parameters, population = Penalty(kind, 2.0), 200_000, 8
    delta, predicted = np.zeros(parameters, np.float32), Prediction(0.0, 0.0)
    rng, norm, crew = np.random.default_rng(0), 0.0, members(population, mirrored)
    for generation in range(60):
        taken = step(
            rng.standard_normal(population), crew, run_seed=1, generation=generation, sigma=0.01,
            alpha=0.01, penalty=penalty,
        )  # fmt: skip
        norm = sqrt(update_inplace(delta, "w", 0, taken).delta)
        predicted = predicted.after(taken, parameters)
    closed = expected_norm(
        penalty, alpha=0.01, population=population, parameters=parameters, generations=60
    )
    own = predicted.l2 if kind == "l2" else predicted.free
    assert own == pytest.approx(norm, rel=0.01)
    if not mirrored:  # there sum c^2 is alpha^2 / N exactly and the recursion is the closed form
        assert own == pytest.approx(closed, rel=1e-6)


def test_a_no_op_does_not_advance_the_prediction() -> None:
    taken = step(
        np.ones(4), members(4, False), run_seed=1, generation=0, sigma=0.1, alpha=0.1,
        penalty=Penalty("l2", 1.0),
    )  # fmt: skip
    assert Prediction(2.0, 1.0).after(taken, 1000) == Prediction(2.0, 1.0)


def test_a_reading_holds_what_was_measured_and_survives_json() -> None:
    rewards = np.array([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    taken = step(
        rewards, members(3, False), run_seed=1, generation=7, sigma=0.1, alpha=0.1,
        penalty=Penalty("l2", 1.0),
    )  # fmt: skip
    found = measure(taken, APPLIED, rewards, Prediction(2.0, 1.0))
    assert (found.generation, found.norm, found.step_norm) == (7, 1.5, 0.5)
    assert (found.predicted_norm, found.predicted_norm_l2) == (2.0, 1.0)
    assert found.reward_mean == pytest.approx(0.5)
    assert found.reward_std == pytest.approx(np.std([0.5, 1, 0]))
    assert Drift.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_undefined_readings_are_none_not_zero() -> None:
    rewards = np.array([0.5, np.nan, 0.1])
    taken = step(
        rewards, members(3, False), run_seed=1, generation=7, sigma=0.1, alpha=0.1,
        penalty=Penalty("l1", 1.0),
    )  # fmt: skip
    found = measure(taken, APPLIED, rewards, Prediction(2.0, 1.0))
    assert found.reward_mean is found.reward_std is found.agree is found.predicted_norm_l2 is None


def test_agreement_is_one_for_merit_and_a_half_for_noise() -> None:
    rng = np.random.default_rng(0)
    merit = rng.standard_normal((400, 1))
    assert agreement(merit + 0.01 * rng.standard_normal((400, 50))) > 0.97  # type: ignore[operator]
    assert agreement(rng.random((4000, 50))) == pytest.approx(0.5, abs=0.035)
    assert agreement(np.array([[1.0, 0.0], [0.0, 1.0]])) == 0.0  # the halves contradict each other


def test_agreement_is_undefined_for_too_little() -> None:
    for rewards in (np.ones(5), np.ones((1, 5)), np.ones((5, 1)), np.full((5, 5), np.nan)):
        assert agreement(rewards) is None


def history(norms: np.ndarray, rewards: np.ndarray) -> list[Drift]:
    pairs = enumerate(zip(norms, rewards, strict=True))
    return [reading(t, float(norm), float(reward)) for t, (norm, reward) in pairs]


FLAT = 0.5 + 0.01 * np.random.default_rng(3).permutation(np.linspace(-1, 1, 20))
RISING = np.linspace(0.4, 0.6, 20)
GROWING = np.sqrt(np.arange(1, 21))
STILL = np.full(20, 3.0)


def test_the_alarm_needs_a_growing_norm_and_a_flat_reward() -> None:
    reason = alarm(history(GROWING, FLAT))
    assert reason is not None
    assert reason.startswith("norm grows, reward flat: in 20 generations norm 1 -> 4.472")
    assert "\n" not in reason
    assert alarm(history(GROWING, RISING)) is None
    assert alarm(history(STILL, FLAT)) is None
    assert alarm(history(GROWING, RISING[::-1].copy())) is not None  # worse than flat


@pytest.mark.parametrize(("errors", "flat"), [(0.8, True), (1.2, False), (3.0, False)])
def test_flat_means_no_gain_beyond_one_standard_error(errors: float, flat: bool) -> None:
    early, late = FLAT[:10] - FLAT[:10].mean(), FLAT[10:] - FLAT[10:].mean()
    error = sqrt(early.var(ddof=1) / 10 + late.var(ddof=1) / 10)
    reason = alarm(history(GROWING, np.r_[early, late + errors * error]))
    assert (reason is not None) is flat


def test_the_alarm_waits_for_a_full_window_of_rewards() -> None:
    readings = history(GROWING, FLAT)
    assert alarm(readings[1:]) is None
    assert alarm([replace(readings[0], reward_mean=None), *readings[1:]]) is None
    assert alarm(history(np.r_[STILL, GROWING], np.r_[RISING, FLAT])) is not None  # the last 20


def still(reward: float | None, step_norm: float = 0.0, spread: float = 0.0) -> Drift:
    return Drift(0, 1.0, step_norm, {}, 1.0, None, reward, spread, None)


@pytest.mark.parametrize(
    ("rewards", "population", "message"),
    [
        ([0.5] * 3, 1, "in 3 generations: one member has no other .* learner.population to 2"),
        ([0.0] * 3, 8, r"no answer of any member .* raise learner.sigma \(now 1e-06\)"),
        ([1.1] * 3, 8, "every answer of every member was right; take harder rows"),
        ([0.25] * 3, 8, r"do not differ, all earned 0.25; raise learner.sigma \(now 1e-06\)"),
    ],
)
def test_why_nothing_is_learnt_says_what_to_change(
    rewards: list[float], population: int, message: str
) -> None:
    found = idle([still(0.7, 0.1), *map(still, rewards)], population, 1e-6)
    assert found is not None
    assert re.search(message, found)


def test_a_step_a_bad_reward_or_too_few_generations_are_no_standstill() -> None:
    for history in (
        [still(0.5)] * 2,
        [still(0.5), still(0.5, 0.1), still(0.5)],
        [still(0.5), still(None), still(0.5)],
        [still(0.5, spread=0.1)] * 3,  # steps too small to move anything
        [],
    ):
        assert idle(history, 8, 0.01) is None
    assert idle([still(0.5)], 8, 0.01, window=1) is not None
    assert idle([], 8, 0.01, window=0) is None


def test_reliability_is_the_share_of_the_variance_that_belongs_to_members() -> None:
    random = np.random.default_rng(0)
    merit, ease = random.normal(size=(2000, 1)), random.normal(size=(1, 16))
    noise = random.normal(scale=2.0, size=(2000, 16))
    # Of the variance between means 1 is the members' and 4 / 16 the noise's.
    assert reliability(merit + ease + noise) == pytest.approx(0.8, abs=0.02)
    assert reliability(merit + ease) == pytest.approx(1.0)
    assert reliability(ease + noise[:500]) == pytest.approx(0.0, abs=0.1)


@pytest.mark.parametrize(
    "rewards", [np.ones((4, 3)), np.ones((1, 3)), np.ones((4, 1)), np.full((4, 3), np.nan)]
)
def test_reliability_of_what_does_not_differ_is_none(rewards: NDArray[np.float64]) -> None:
    assert reliability(rewards) is None


def beside(generation: int, fall: float | None, spread: float = 0.1) -> Drift:
    parent = None if fall is None else 0.5 + fall
    return Drift(generation, 1.0, 0.1, {}, 1.0, None, 0.5, spread, None, parent)


@pytest.mark.parametrize(
    ("measured", "alarms"),
    [
        ([0.09, 0.09], [1]),  # limit at 16 members: 0.1 (0.5 + 2 / sqrt 32) = 0.085
        ([0.08, 0.08], []),
        ([0.2, -0.1], []),  # once is chance
        ([0.09, None, 0.09], [2]),  # between two measurements theta is not asked
        ([0.2, 0.2, 0.2], [1]),  # counts anew after an alarm
        ([0.2] * 5, [1, 3]),
        ([-0.3, -0.3], []),
    ],
)
def test_members_that_earn_clearly_less_than_their_parent_are_an_alarm(
    measured: list[float | None], alarms: list[int]
) -> None:
    history = [beside(place, fall) for place, fall in enumerate(measured)]
    assert [generation for generation, _ in falls(history, 16)] == alarms


def test_no_spread_and_equal_rewards_are_no_alarm() -> None:
    assert falls([beside(n, 0.0, 0.0) for n in range(4)], 16) == []
    assert len(falls([beside(n, 0.1, 0.0) for n in range(2)], 16)) == 1
