"""Engines as Ray actors on a cluster of this one machine."""

import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np
import psutil
import pytest
from ray.cluster_utils import Cluster
from reference import ReferenceEngine, random_checkpoint

from agent.errors import UserError
from agent.learner.es import members, step
from agent.learner.noise import Address
from agent.learner.penalty import Penalty
from agent.population.placement import EngineOptions
from agent.population.pool import Population
from agent.population.ray import Placement, RayEngine, attach, detach
from agent.population.schedule import Completion
from agent.store.weights import Anchor, Parameters

pytestmark = pytest.mark.integration

PROMPTS = [[{"role": "user", "content": f"Count to {n}."}] for n in range(6)]
STEP = step(
    np.linspace(0, 1, 8) ** 2, members(8, mirrored=True), run_seed=7, generation=0,
    sigma=0.05, alpha=0.5, penalty=Penalty("l2", 0.1),
)  # fmt: skip
JOBS = [(n, Address(11, 0, n // 2), 0.05 - 0.1 * (n % 2)) for n in range(8)]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    """A cluster whose one node counts two GPUs; ended afterwards."""
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "num_gpus": 2})
    yield nodes
    nodes.shutdown()


@pytest.fixture(scope="module")
def cluster(nodes: Cluster) -> Iterator[list[float]]:
    """CPUs that engines may have in this cluster; one of its GPUs serves."""
    yield attach(nodes.address, Placement(cpus=1.0, gpus=1.0))
    detach()


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
def test_a_killed_node_costs_its_member_and_an_added_engine_takes_members(
    nodes: Cluster, tmp_path: Path, scale: Callable[[int, int], int]
) -> None:
    """The round neither waits for the dead node's place nor for the engine that is added."""
    if scale(0, 1) == 0:
        pytest.skip("three engines on Ray, half a minute each on two cores: in the soak")
    model = random_checkpoint(tmp_path / "model", seed=6)
    small = EngineOptions(
        model, dtype="float32", max_model_len=128, max_num_seqs=16, threads=1, kv_cache_mib=64
    )
    far = nodes.add_node(num_cpus=2)
    # Two CPUs each: one engine fits the first node, whose third CPU serves, the other the second.
    place = Placement(cpus=2.0, wait_s=600.0)
    population = Population([partial(RayEngine, small, place)] * 2)
    host = Parameters.zeros(Anchor.open(model))
    assert population.open(model) == host.anchor.digest
    assert population.apply(STEP).delta_hash == host.apply(STEP).delta_hash
    jobs = [(n, Address(11, 1, n), 0.05) for n in range(120)]
    killed: dict[int, list[Completion]] = {}
    engines = Counter[int]()
    begun = perf_counter()
    for result in population.members(jobs, PROMPTS, 8):
        if not killed:
            nodes.remove_node(far, allow_graceful=False)
        killed[result.job], engines[result.engine] = result.values, engines[result.engine] + 1
    with_kill = perf_counter() - begun
    assert population.engines() == 1
    assert any("started again" in line for line in population.incidents)
    assert not any("dropped" in line for line in population.incidents)  # it still has no place
    begun = perf_counter()
    alone = {each.job: each.values for each in population.members(jobs, PROMPTS, 8)}
    without = perf_counter() - begun
    sys.stdout.write(
        f"{len(jobs)} members: {with_kill:.1f} s with a node killed at the first result (by engine "
        f"{dict(engines)}), {without:.1f} s by the engine that is left: "
        f"{with_kill - without:+.1f} s\n"
    )
    assert alone == killed
    added, first = -1, ""
    many = [(n, Address(11, 2, n), 0.05) for n in range(100_000)]
    begun = perf_counter()
    for count, result in enumerate(population.members(many, PROMPTS, 8)):
        if added < 0:
            added = population.add(partial(RayEngine, small, Placement(cpus=0.5)))
        if result.engine == added:
            first = f"member {count}, {perf_counter() - begun:.1f} s after it was added"
            break
    sys.stdout.write(f"the added engine answered {first}\n")
    assert first
    population.close()


@pytest.mark.usefixtures("cluster")
def test_a_place_no_node_has_is_told(tmp_path: Path) -> None:
    place = Placement(cpus=0.5, gpus=64, wait_s=0.5)
    population = Population([lambda: RayEngine(EngineOptions(tmp_path), place)] * 2)
    with pytest.raises(UserError, match=r"no node had \{'CPU': 0.5, 'GPU': 64\}"):
        population.open(tmp_path)
    assert len(population.incidents) == 2
    population.close()
