"""The density recursion against closed forms where they exist and simulation where not."""

import numpy as np
import pytest

from agent.learner.penalty import Penalty, expected_norm, prox
from flows.lab.bench.learner import norm_by_density

WALK = {"alpha": 0.0005, "population": 30, "parameters": 40_000}


@pytest.mark.parametrize("generations", [1, 2, 100])
@pytest.mark.parametrize("penalty", [Penalty(), Penalty("l2", 10.0), Penalty("l2", 900.0)])
def test_equals_the_closed_form(penalty: Penalty, generations: int) -> None:
    found = norm_by_density(penalty, generations=generations, **WALK)
    assert found == pytest.approx(expected_norm(penalty, generations=generations, **WALK), rel=1e-4)


@pytest.mark.parametrize(
    "penalty",
    [
        Penalty("l1", 0.02),
        Penalty("huber", 50.0, threshold=2e-4),
        Penalty("elastic_net", 20.0, l1_share=0.001),
    ],
)
def test_equals_a_simulation(penalty: Penalty) -> None:
    """40,000 walkers, 150 steps: a standard error of 0.35 % of the norm."""
    rng, x = np.random.default_rng(0), np.zeros(40_000)
    for _ in range(150):
        x = prox(x + 0.0005 / np.sqrt(30) * rng.standard_normal(x.size), penalty, 0.0005)
    found = norm_by_density(penalty, generations=150, **WALK)
    assert found == pytest.approx(np.linalg.norm(x), rel=0.015)
    assert found < 0.9 * norm_by_density(Penalty(), generations=150, **WALK)


def test_nothing_moves_in_no_generation() -> None:
    assert norm_by_density(Penalty(), generations=0, **WALK) == 0.0
