"""Gradient training leaves deltas that lower the loss, and goes on after a kill."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from agent.config import keep, load
from agent.home import Home
from agent.store.weights import Parameters
from evaluators.tasks import TASKS
from flows.lab.paper.evolve import Trail
from flows.lab.paper.gradient import GradientJob, main, rewarded
from flows.lab.paper.systems import sizes_of
from flows.service import Service


@pytest.fixture
def job(tmp_path: Path) -> GradientJob:
    home = Home.at(tmp_path / "home")
    keep(home, load(None))
    folder = tmp_path / "trial"
    folder.mkdir()
    sizes = replace(
        sizes_of("embedded"), prompts=8, grpo_prompts=4, rollouts=4, minibatches=2, sft_rate=1e-3
    )
    return GradientJob("sft", str(home.root), "gsm8k", 1, 2, 1, sizes, str(folder))


def begun(job: GradientJob) -> Path:
    path = Path(job.folder) / "job.json"
    path.write_text(job.to_json())
    return path


def test_a_job_reads_back(job: GradientJob) -> None:
    assert GradientJob.from_json(job.to_json()) == job


def test_rewards_are_those_of_the_task() -> None:
    task, row = TASKS["gsm8k"], {"question": "1 + 1?", "answer": "#### 2"}
    answers = [[{"role": "assistant", "content": text}] for text in ("#### 2", "#### 3", "two")]
    assert rewarded(task, [row], answers, [0, 0, 0]) == [1.1, 0.1, 0.0]


@pytest.mark.proof
def test_fine_tuning_moves_and_leaves_the_same_deltas_twice(job: GradientJob) -> None:
    main(begun(job))
    trail = Trail(Path(job.folder) / "trail.jsonl")
    rows = trail.rows()
    assert [row["generation"] for row in rows] == [0, 1, 2]
    anchor = Service.at(Path(job.home)).origin

    def norms() -> list[float]:
        deltas = [Parameters.load(anchor, Path(job.folder) / row["state"]).delta for row in rows]
        return [float(np.sqrt(sum(np.square(d).sum() for d in each.values()))) for each in deltas]

    moved = norms()
    assert moved[0] == 0
    assert 0 < moved[1] < moved[2]
    main(begun(job))  # as after a kill: what is there stays
    assert trail.rows() == rows
    assert norms() == moved


@pytest.mark.integration
def test_grpo_is_learnt_by_trl_and_goes_on(
    job: GradientJob, scale: Callable[[int, int], int]
) -> None:
    if importlib.util.find_spec("trl") is None:
        pytest.skip("trl: not installed (extra rl)")
    if scale(0, 1) == 0:
        pytest.skip("GRPO by TRL: in the soak")
    first = replace(job, kind="grpo", generations=1)
    trail = Trail(Path(job.folder) / "trail.jsonl")
    for each, generations in ((first, [0, 1]), (replace(first, generations=2), [0, 1, 2])):
        command = [sys.executable, "-m", "flows.lab.paper.gradient", str(begun(each))]
        subprocess.run(command, check=True)
        assert [row["generation"] for row in trail.rows()] == generations
    rows = trail.rows()
    assert 0 == rows[0]["tokens"] < rows[1]["tokens"] < rows[2]["tokens"]
    assert all(0 <= row["reward"] <= 1.1 for row in rows[1:])
