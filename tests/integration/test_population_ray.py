"""Engines as Ray actors on a cluster of this one machine."""

import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
from reference import ReferenceEngine, random_checkpoint

from agent.errors import UserError
from agent.learner.noise import Address
from agent.population.placement import EngineOptions
from agent.population.pool import Population
from agent.population.ray import Placement, RayEngine, attach, detach
from agent.population.schedule import Completion

pytestmark = pytest.mark.integration

PROMPTS = [[{"role": "user", "content": f"Count to {n}."}] for n in range(6)]
JOBS = [(n, Address(11, 0, n // 2), 0.05 - 0.1 * (n % 2)) for n in range(8)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[list[float]]:
    """A local cluster that counts two GPUs, one of which serves; ended afterwards."""
    os.environ["RAY_OVERRIDE_RESOURCES"] = '{"CPU": 4, "GPU": 2}'
    yield attach(None, Placement(cpus=1.0, gpus=1.0))
    detach()
    del os.environ["RAY_OVERRIDE_RESOURCES"]


def engines_writing_to(log: Path) -> list[psutil.Process]:
    """Engine processes whose output goes to this log."""
    found = []
    for process in psutil.process_iter():
        try:
            if Path(f"/proc/{process.pid}/fd/1").resolve() == log:
                found.append(process)
        except OSError:
            continue
    return found


@pytest.mark.usefixtures("cluster")
def test_actors_answer_like_one_engine_and_survive_a_kill(tmp_path: Path) -> None:
    model = random_checkpoint(tmp_path / "model", seed=6)
    logs = [tmp_path / f"engine{number}.log" for number in range(2)]
    starts = [
        partial(
            RayEngine,
            EngineOptions(
                model,
                dtype="float32",
                max_model_len=128,
                max_num_seqs=16,
                threads=1,
                kv_cache_mib=64,
                log=log,
            ),
            Placement(cpus=0.5),
        )
        for number, log in enumerate(logs)
    ]
    population = Population(starts)
    digest = population.open(model)
    results: dict[int, list[Completion]] = {}
    for result in population.members(JOBS, PROMPTS, 8):
        if not results:
            (engine,) = engines_writing_to(logs[1 - result.engine])
            engine.send_signal(signal.SIGKILL)
        results[result.job] = result.values
    incidents = population.incidents
    population.close()
    for log in logs:
        psutil.wait_procs(engines_writing_to(log), timeout=30)
        assert engines_writing_to(log) == []
    reference = ReferenceEngine(model)
    assert reference.open(model) == digest
    assert results == {
        index: reference.generate(PROMPTS, 8, (address, scale)) for index, address, scale in JOBS
    }
    assert any("started again" in line for line in incidents)


def test_what_serves_is_not_given_to_an_engine(cluster: list[float]) -> None:
    import ray

    assert cluster == [3.0]  # CPUs that engines may have
    assert attach(None, Placement(cpus=1.0, gpus=1.0)) == cluster  # held once

    @ray.remote(num_cpus=0, num_gpus=1)
    def gpu() -> list[int]:
        return [int(each) for each in ray.get_gpu_ids()]

    assert ray.get([gpu.remote(), gpu.remote()], timeout=120) == [[1], [1]]


@pytest.mark.usefixtures("cluster")
def test_a_place_no_node_has_is_told(tmp_path: Path) -> None:
    place = Placement(cpus=0.5, gpus=64, wait_s=0.5)
    population = Population([lambda: RayEngine(EngineOptions(tmp_path), place)] * 2)
    with pytest.raises(UserError, match=r"no node had \{'CPU': 0.5, 'GPU': 64\}"):
        population.open(tmp_path)
    assert len(population.incidents) == 2
    population.close()
