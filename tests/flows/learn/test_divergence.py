"""Distribution shift: zero for the anchor, the closed form on a toy model, measured once."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from agent.config import load
from agent.home import Home
from agent.learner.es import members, step
from agent.learner.penalty import Penalty
from agent.population.pool import Population
from agent.population.schedule import Messages
from agent.store.weights import Parameters, digest_of, export
from flows.learn.divergence import Shift, estimates, shift
from flows.service import Service
from flows.show.terminal import Silent

TASKS = ["piqa", "hellaswag"]
ANCHOR, NEAR, FAR = 0.8, 0.7, 0.4  # how likely each version finds the first of two tokens


class Toy:
    """A model of two tokens, each drawn alone; which share is whose is told by the directory."""

    def __init__(self, shares: Mapping[Path, float]) -> None:
        self._shares, self._share = shares, math.nan
        self.calls = 0

    def load(self, directory: Path) -> str:
        self._share = self._shares[directory]
        return digest_of(directory)

    def sample(self, prompts: Sequence[Messages], max_tokens: int, seed: int) -> list[list[int]]:
        self.calls += 1
        drawn = np.random.default_rng(seed).random((len(prompts), max_tokens)) >= self._share
        rows: list[list[int]] = drawn.astype(int).tolist()
        return rows

    def prompt_logprobs(
        self, prompts: Sequence[Messages], continuations: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        self.calls += 1
        each = (math.log(self._share), math.log(1 - self._share))
        return [[each[token] for token in row] for row in continuations]

    def close(self) -> None:
        pass


@pytest.fixture
def service(tmp_path: Path) -> Service:
    return Service(Home.at(tmp_path / "home"), load(tasks={"kl_rows": 100}))


def version(service: Service, alpha: float) -> str:
    """Kept weights one step of this size away from the anchor."""
    theta = Parameters.zeros(service.anchor)
    taken = step(
        np.linspace(0, 1, 4),
        members(4, mirrored=True),
        run_seed=7,
        generation=0,
        sigma=0.01,
        alpha=alpha,
        penalty=Penalty("none", 0.0),
    )
    theta.apply(taken)
    return export(theta, service.home.weights).name


def test_kl_is_0_for_the_anchor_and_the_closed_form_for_two_tokens(service: Service) -> None:
    shares = {
        service.anchor.digest: ANCHOR,
        version(service, 0.01): NEAR,
        version(service, 0.1): FAR,
    }
    engine = Toy({service.directory(digest): share for digest, share in shares.items()})
    population = Population([lambda: engine])  # type: ignore[arg-type,return-value]
    told: dict[float, Shift] = {}
    for digest, share in shares.items():
        told[share] = shift(service, population, TASKS, digest, Silent())
        for row in told[share].values():
            exact = ANCHOR * math.log(ANCHOR / share)
            exact += (1 - ANCHOR) * math.log((1 - ANCHOR) / (1 - share))
            steps = abs(math.log(ANCHOR / share) - math.log((1 - ANCHOR) / (1 - share)))
            spread = steps * math.sqrt(ANCHOR * (1 - ANCHOR) / row["tokens"])
            assert row["kl"] == pytest.approx(exact, abs=4 * spread)
            assert row["low"] <= row["kl"] <= row["high"]
            assert row["high"] - row["low"] == pytest.approx(3.92 * spread, rel=0.3)
            assert (row["n"], row["tokens"]) == (100, 6400)
    assert set(told[FAR]) == set(TASKS)
    assert all(row["kl"] == 0.0 for row in told[ANCHOR].values())
    calls = engine.calls
    assert calls == 1 + 1 + len(shares)  # one draw, its log p, and log q of every version
    assert shift(service, population, TASKS, [*shares][2], Silent()) == told[FAR]
    assert engine.calls == calls
    population.close()


def test_no_open_row_of_a_task_means_no_number() -> None:
    assert estimates(["a", "b", "b"], [[-1.0], [-1.0], []], [[-1.0], [-2.0], []]) == {}


def test_a_token_counts_once_whatever_its_continuation() -> None:
    def rows(values: Sequence[float]) -> list[list[float]]:
        return [[value] * (1 + 3 * place) for place, value in enumerate(values)]

    told = estimates(["a", "a"], rows([-1.0, -2.0]), rows([-2.0, -2.5]))["a"]
    assert told["kl"] == pytest.approx((1 * 1.0 + 4 * 0.5) / 5)
    assert (told["n"], told["tokens"]) == (2, 5)
    assert 0.5 <= told["low"] < told["kl"] < told["high"] <= 1.0
