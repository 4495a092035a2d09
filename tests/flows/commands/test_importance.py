"""Importance weights of real models: files that the learner reads, and rewards as their source."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.config import keep, load
from agent.errors import UserError
from agent.home import Home
from agent.population.pool import Population
from agent.population.schedule import Completion, Messages
from agent.store.anchor import keep_importance, read_floats
from agent.store.weights import Anchor, Parameters
from deploy.embedded.rows import rows
from evaluators.runner import questions_of
from evaluators.tasks import TASKS
from flows.commands.importance import by_members, importance_now
from flows.service import Service
from flows.show.terminal import Silent


@pytest.fixture
def home(tmp_path: Path) -> Path:
    place = Home.at(tmp_path / "home")
    keep(place, load(None))
    return place.root


@pytest.mark.proof
def test_fisher_weights_of_the_embedded_model_are_a_file_for_the_penalty(
    home: Path, tmp_path: Path
) -> None:
    into = tmp_path / "weights" / "fisher.safetensors"
    document = importance_now(home, "fisher", ("piqa", "hellaswag"), into, Silent(), rows=2)
    anchor = Service.at(home).origin
    digest, largest = keep_importance(anchor, into, tmp_path / "kept")
    assert len(digest) == 64
    assert largest == document["largest"] <= 10
    flat = np.concatenate([each.reshape(-1) for each in read_floats(anchor, into).values()])
    assert flat.mean() == pytest.approx(1.0, rel=1e-3)
    assert document["share below 1"] > 0.5  # few parameters carry most of it


def test_no_task_and_an_unknown_one_are_refused(home: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--tasks: none; allowed: "):
        importance_now(home, "fisher", (), tmp_path / "w.safetensors", Silent())
    with pytest.raises(UserError, match="task 'nothing' is not known"):
        importance_now(home, "path", ("nothing",), tmp_path / "w.safetensors", Silent())


class SensitiveEngine:
    """Answers fewer rows rightly the further one tensor is from the anchor: r = 1 - h d^2 / 2."""

    def __init__(self, anchor: Anchor, asked: Sequence[Any], curvature: dict[str, float]) -> None:
        self._anchor, self._curvature, self._right = anchor, curvature, 1.0
        self._answers = [(each.task.gold(each.row), each.task.wrong(each.row)) for each in asked]

    def open(self, anchor: Path) -> str:
        return self._anchor.digest

    def restore(self, snapshot: Path, steps: Sequence[Any]) -> str:
        delta = Parameters.load(self._anchor, snapshot).delta
        lost = [h * np.square(delta[name]).sum() / 2 for name, h in self._curvature.items()]
        self._right = 1 - float(sum(lost))
        return ""

    def generate(
        self, prompts: Sequence[Messages], max_tokens: Any, member: Any = None, noise: str = ""
    ) -> list[Completion]:
        right = round(self._right * len(prompts))
        return [
            Completion(gold if place < right else wrong, 1, "stop")
            for place, (gold, wrong) in enumerate(self._answers)
        ]

    def close(self) -> None:
        """It holds nothing."""


@pytest.mark.proof
def test_members_that_perturb_one_tensor_find_what_rewards_hang_on(home: Path) -> None:
    anchor = Service.at(home).origin
    one, other = [name for name in anchor.names if name.endswith("norm.weight")][:2]
    asked = questions_of([(TASKS["piqa"], rows("piqa", "eval", 200, seed=0))], {})
    engine = SensitiveEngine(anchor, asked, {one: 0.2, other: 0.6})
    population = Population([lambda: engine])  # type: ignore[list-item]
    found = by_members(population, anchor, asked, 0.1, 2, Silent())
    assert found[one].mean() == pytest.approx(0.2, rel=0.3)  # 200 rows: steps of half a point
    assert found[other].mean() == pytest.approx(0.6, rel=0.3)
    assert all(each.max() == 0 for name, each in found.items() if name not in (one, other))
