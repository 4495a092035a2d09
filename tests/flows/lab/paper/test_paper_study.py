"""The paper's study on planted engines: paired trials that go on after a kill and are made once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agent.errors import UserError
from agent.learner.penalty import Penalty
from agent.population.pool import Population
from flows.lab.paper.evolve import Trail
from flows.lab.paper.study import PaperStudy, alike, study_paper, time_left
from flows.lab.paper.systems import SYSTEMS, penalty_of, plan_for, sizes_of, system_of
from flows.lab.trials import paired
from flows.session import Session
from flows.show.terminal import Reporter, Silent

STUDY = PaperStudy("embedded", ("gsm8k",), ("awd-l2", "random"), 1, 2, 1, 20, 2)


class KilledError(Exception):
    """The process ends here."""


class Runner:
    """Runs a study in a folder; ``kill_at`` ends it at that call of a method of the engines."""

    def __init__(
        self,
        planted_in: Callable[..., Session],
        folder: Path,
        study: PaperStudy = STUDY,
        method: str = "apply",
    ) -> None:
        self._planted, self._folder, self.applied, self.kill_at = planted_in, folder, 0, 0
        self._study, self._method = study, method
        self.config = folder / "few.toml"
        folder.mkdir()
        self.config.write_text('[tasks]\npriors = ["countdown", "piqa"]\n')

    def __call__(self) -> dict[str, dict[str, Any]]:
        work, out = self._folder / "work", self._folder / "out"
        found = study_paper(self._study, self.config, work, out, Silent(), self._opened)
        return {each["trial"]["system"]: each for each in found}

    @contextmanager
    def _opened(self, root: Path, progress: Reporter) -> Iterator[Session]:
        session = self._planted(root, progress)
        population: Population = session.population
        call = getattr(population, self._method)

        def counted(*arguments: Any) -> Any:
            self.applied += 1
            if self.applied == self.kill_at:
                raise KilledError
            return call(*arguments)

        setattr(population, self._method, counted)
        try:
            yield session
        finally:
            session.close()


@pytest.mark.proof
def test_a_killed_study_ends_with_the_same_digests(
    planted_in: Callable[..., Session], tmp_path: Path
) -> None:
    whole = Runner(planted_in, tmp_path / "whole")
    results = whole()
    assert results.keys() == {"awd-l2", "random"}
    assert whole.applied == 4
    killed = Runner(planted_in, tmp_path / "killed")
    killed.kill_at = 2
    with pytest.raises(KilledError):
        killed()
    again = killed()
    assert killed.applied == 5  # the step that the kill prevented, and those after it
    for system, each in results.items():
        assert again[system]["delta"] == each["delta"] is not None
        assert again[system]["norms"] == each["norms"]
        accuracies = [row["accuracy"] for row in each["curve"]]
        assert [row["accuracy"] for row in again[system]["curve"]] == accuracies
    assert killed() == again  # nothing runs twice
    assert killed.applied == 5
    es, walk = results["awd-l2"], results["random"]
    assert [row["generation"] for row in es["curve"]] == [0, 1, 2]
    assert es["curve"][0]["accuracy"] == walk["curve"][0]["accuracy"]
    assert es["curve"][0]["kl"] == {"gsm8k": 0.0, "countdown": 0.0, "piqa": 0.0}
    assert es["tokens"] == 2 * 16 * 64 * 3  # generations, members, prompts, planted tokens
    assert walk["tokens"] == 0
    for _, norm, free, closed, _ in walk["norms"][1:]:
        assert norm == pytest.approx(free, rel=0.01)  # Eq. 2
        assert closed is None
    for _, norm, free, closed, _ in es["norms"][1:]:
        assert norm == pytest.approx(closed, rel=0.01)
        assert norm < free


@pytest.mark.proof
def test_the_published_arithmetic_goes_on_and_rounds_away_the_decay(
    planted_in: Callable[..., Session], tmp_path: Path
) -> None:
    study = replace(STUDY, systems=("published-bf16",))
    whole = Runner(planted_in, tmp_path / "whole", study, "restore")()["published-bf16"]
    killed = Runner(planted_in, tmp_path / "killed", study, "restore")
    killed.kill_at = 2 + 16 + 5  # the start, generation 1 and its end, five members of the next
    with pytest.raises(KilledError):
        killed()
    again = killed()["published-bf16"]
    assert again["norms"] == whole["norms"]
    assert [row["accuracy"] for row in again["curve"]] == [r["accuracy"] for r in whole["curve"]]
    _, norm, walk, closed, _ = whole["norms"][-1]
    assert closed < 0.97 * walk
    assert norm == pytest.approx(walk, rel=0.02)


def test_every_system_has_a_plan_or_trains_by_gradients() -> None:
    for model in ("embedded", "smollm2", "/a/folder"):
        sizes = sizes_of(model)
        for name, system in SYSTEMS.items():
            if system.kind not in ("grpo", "sft"):
                plan = plan_for(system, sizes, 1, 3, 1000)
                assert plan.population == sizes.population * system.times, name


def test_elastic_net_has_half_of_each_strength() -> None:
    sizes = sizes_of("embedded")
    penalty = penalty_of(system_of("awd-elastic"), sizes)
    assert penalty.lam * penalty.l1_share == pytest.approx(sizes.lam_l1 / 2)
    assert penalty.lam * (1 - penalty.l1_share) == pytest.approx(sizes.lam / 2)


def test_a_lambda_may_be_named_with_a_system() -> None:
    penalty = penalty_of(system_of("awd-l2@7.5"), sizes_of("embedded"))
    assert (penalty.kind, penalty.lam) == ("l2", 7.5)
    assert penalty_of(system_of("es"), sizes_of("embedded")) == Penalty()


@pytest.mark.parametrize("name", ["best", "es@3", "awd-l2@x", "awd-l2@-1", "awd-l2@nan"])
def test_an_unknown_system_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="system '"):
        system_of(name)


def test_results_of_other_settings_are_refused(tmp_path: Path) -> None:
    settings = STUDY.settings()
    alike([{"settings": settings}], settings, tmp_path)
    with pytest.raises(UserError, match=r"generations 9 \(now 2\)"):
        alike([{"settings": settings | {"generations": 9}}], settings, tmp_path)


def test_the_time_left_is_that_of_the_same_systems(tmp_path: Path) -> None:
    trials = paired("m", ("t",), ("a", "b"), 2)
    trial = {"model": "m", "target": "t", "system": "a", "seed": 1}
    assert time_left(trials, []) == ""
    done = [{"trial": trial, "minutes": 4.0}]
    assert time_left(trials, done) == ", about 12 minutes left in all"
    done.append({"trial": trial | {"system": "b"}, "minutes": 10.0})
    assert time_left(trials, done) == ", about 14 minutes left in all"


def test_a_line_that_a_kill_cut_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "trail.jsonl"
    Trail(path).add({"generation": 1})
    with path.open("a") as file:
        file.write('{"generation": 2')
    trail = Trail(path)
    trail.add({"generation": 2})
    assert trail.rows() == [{"generation": 1}, {"generation": 2}]
