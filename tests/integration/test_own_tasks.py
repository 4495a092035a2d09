"""Rounds of the embedded model on tasks that are not ours, on a real engine."""

from collections.abc import Callable, Iterator
from pathlib import Path

import exchange
import pytest

from agent.population.pool import Population
from agent.population.process import EngineLauncher
from flows.learn.improve import run_round
from flows.service import Service
from flows.session import engine_options
from flows.show.terminal import Silent

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1200)]
LEARNER = {"generations": 4, "population": 16, "selection": 0, "prompts": 48}


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineLauncher]:
    started = EngineLauncher(tmp_path_factory.mktemp("log") / "launcher.log")
    yield started
    started.close()


def learnt(service: Service, launcher: EngineLauncher) -> list[float]:
    """A round on the target; its mean reward by generation."""
    [options] = engine_options(service)
    population = Population([lambda: launcher.engine(options)])
    try:
        made = run_round(service, population, service.settings.tasks.target, Silent())
    finally:
        population.close()
    generations = service.journal.generations(made.run_id)
    return [float(each.rewards.mean()) for each in generations]


def test_an_agents_exchange_is_learnt_from(
    launcher: EngineLauncher, tmp_path: Path, scale: Callable[[int, int], int]
) -> None:
    """Tool call, result, answer: the last answer's reward moves the weights that gave all turns."""
    if scale(0, 1) == 0:
        pytest.skip("four generations of conversations: in the soak")
    rows = exchange.questions(200)
    service = exchange.desk(tmp_path, rows[48:], learner=LEARNER)
    exchange.converse(service, rows[:48])
    rewards = learnt(service, launcher)
    [run] = service.journal.runs()
    assert run.plan["rows"]["from_traffic"] == 48
    assert rewards[-1] > rewards[0] + 0.1, rewards
