"""Baking by simulation: looked at after every answer errs as seldom as it says, and finds harm."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.random import Generator

from evaluators.live import FEW, SLICE_S, LiveAnswer, Traffic, Watch, watches

pytestmark = pytest.mark.proof

ALPHA = 0.05
ROWS = 40
Draw = Callable[[Generator, int], np.ndarray]


def look(new: Traffic, old: Traffic) -> list[Watch]:
    return watches(new, old, rows=ROWS, error_margin=0.05, latency_factor=3.0)


def rolled_back(new: Traffic, old: Traffic, every: int) -> bool:
    """Whether any look, one after every ``every`` rewards and answers, would roll back."""
    most = max(new.count, len(new.answers))
    for seen in range(every, most + every, every):
        part = Traffic({task: r[:seen] for task, r in new.rewards.items()}, new.answers[:seen])
        if any(watch.worse(ALPHA) for watch in look(part, old)):
            return True
    return False


def rate(
    world: Callable[[Generator], tuple[Traffic, Traffic]], runs: int, every: int = 10
) -> float:
    generator = np.random.default_rng(7)
    return float(np.mean([rolled_back(*world(generator), every) for _ in range(runs)]))


def rewards(p_old: float, p_new: float, n_old: int = 200) -> Callable[[Generator], tuple]:
    def world(g: Generator) -> tuple[Traffic, Traffic]:
        old = {"gsm8k": list((g.random(n_old) < p_old) * 1.0)}
        return Traffic({"gsm8k": list((g.random(ROWS) < p_new) * 1.0)}), Traffic(old)

    return world


def answers(
    g: Generator, n: int, failing: float, latency_s: float, per_slice: int = 4
) -> list[LiveAnswer]:
    """Requests in a steady stream; latencies as spread as live ones, a log-normal."""
    times = latency_s * g.lognormal(0.0, 0.7, n)
    fails = g.random(n) < failing
    gap = SLICE_S / per_slice
    return [LiveAnswer(i * gap, bool(fails[i]), float(times[i])) for i in range(n)]


def live(failing: tuple[float, float], latency: tuple[float, float]) -> Callable:
    def world(g: Generator) -> tuple[Traffic, Traffic]:
        old = answers(g, 200, failing[0], latency[0])
        return Traffic({}, answers(g, 120, failing[1], latency[1])), Traffic({}, old)

    return world


NOT_WORSE = {
    "the same rewards": rewards(0.6, 0.6),
    "a short window": rewards(0.9, 0.9, n_old=15),
    "better rewards": rewards(0.4, 0.8),
    "as many failures": live((0.02, 0.02), (1.0, 1.0)),
    "failures within the margin": live((0.0, 0.04), (1.0, 1.0)),
    "half as slow again": live((0.0, 0.0), (1.0, 1.5)),
}
WORSE = {
    "far lower rewards": (rewards(0.9, 0.3), 0.97),
    "lower rewards": (rewards(0.8, 0.45), 0.6),
    "every third request fails": (live((0.01, 0.33), (1.0, 1.0)), 0.97),
    "ten times as slow": (live((0.0, 0.0), (1.0, 10.0)), 0.97),
}


@pytest.mark.parametrize("name", NOT_WORSE)
def test_a_version_that_is_not_worse_stays_however_often_one_looks(
    name: str, scale: Callable[[int, int], int]
) -> None:
    """False rollbacks at repeated looks: at most alpha, up to three standard errors."""
    runs = scale(50, 4000)
    allowed = ALPHA + 3 * (ALPHA * (1 - ALPHA) / runs) ** 0.5
    assert rate(NOT_WORSE[name], runs) <= allowed


@pytest.mark.parametrize("name", WORSE)
def test_a_version_that_is_worse_is_found(name: str, scale: Callable[[int, int], int]) -> None:
    world, power = WORSE[name]
    runs = scale(30, 2000)
    assert rate(world, runs) >= power - 3 * (power * (1 - power) / runs) ** 0.5


def test_a_single_test_at_every_look_would_not_hold_its_level() -> None:
    """Why the watch bets: Mann-Whitney at the same looks rolls back far more than alpha."""
    from scipy.stats import mannwhitneyu

    generator = np.random.default_rng(1)

    def naive(new: list[float], old: list[float]) -> bool:
        looks = (new[:seen] for seen in range(5, len(new) + 1, 5))
        return any(mannwhitneyu(n, old, alternative="less").pvalue < ALPHA for n in looks)

    draws = [rewards(0.6, 0.6)(generator) for _ in range(120)]
    errs = np.mean([naive(n.rewards["gsm8k"], o.rewards["gsm8k"]) for n, o in draws])
    assert errs > 2 * ALPHA


def test_one_burst_of_trouble_is_one_observation() -> None:
    """A hundred failures, or slow answers, within one slice do not roll back."""
    old = Traffic({}, [LiveAnswer(float(i), False, 1.0) for i in range(FEW)])
    for bad in (LiveAnswer(1000.0, True, 1.0), LiveAnswer(1000.0, False, 99.0)):
        assert not any(watch.worse(ALPHA) for watch in look(Traffic({}, [bad] * 100), old))


def test_nothing_to_compare_with_says_nothing() -> None:
    new = Traffic({"gsm8k": [0.0] * 100}, [LiveAnswer(10.0 * i, False, 9.0) for i in range(50)])
    reward, errors, latency = look(new, Traffic({"piqa": [1.0] * 100}))
    assert reward.log_e is None
    assert latency.log_e is None
    assert not errors.worse(ALPHA)
    assert "nothing to compare" in reward.text()


def test_a_task_is_compared_with_itself_only() -> None:
    """A new mix of tasks, each as good as before, is no fall (Simpson)."""
    old = Traffic({"easy": [1.0] * 150, "hard": [0.0] * 50})
    new = Traffic({"easy": [1.0] * 2, "hard": [0.0] * 60})
    assert not any(watch.worse(ALPHA) for watch in look(new, old))


def test_a_failing_version_without_a_window_is_found() -> None:
    new = Traffic({}, [LiveAnswer(10.0 * i, True, 0.0) for i in range(6)])
    assert [watch.name for watch in look(new, Traffic()) if watch.worse(0.01)] == ["errors"]
