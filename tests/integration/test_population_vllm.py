"""A real vLLM engine: what is loaded into it is what it answers with, to the bit."""

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from reference import Family, ReferenceEngine, random_checkpoint
from safetensors.torch import save_file

from agent.errors import UserError
from agent.learner.es import Applied, Step, members, step
from agent.learner.noise import Address
from agent.learner.penalty import Penalty
from agent.population.capacity import size_of
from agent.population.decoding import kl_per_token, largest_difference
from agent.population.placement import EngineOptions, available_cores, cpu_runtime
from agent.population.pool import Population
from agent.population.process import EngineLauncher, EngineLostError, EngineProcess
from agent.population.process_group import SHARED_MEMORY
from agent.population.schedule import Completion, Logprobs
from agent.store.replay import is_sound
from agent.store.weights import Anchor, Parameters, export

pytestmark = pytest.mark.integration
Scale = Callable[[int, int], int]

PROMPTS = [[{"role": "user", "content": f"What is {n} plus {3 * n}?"}] for n in range(8)]
MEMBER = (Address(run_seed=7, generation=3, pair=2), 0.05)
CORES = available_cores()
MODELS: dict[str, tuple[Family, bool]] = {
    "qwen2-tied": ("qwen2", True),
    "llama-untied": ("llama", False),
}


def options(model: Path, core: int = 0) -> EngineOptions:
    """A small engine on one core; the next number has the next core."""
    return EngineOptions(
        model=model,
        dtype="float32",
        max_model_len=256,
        max_num_seqs=16,
        place=core % len(CORES),
        places=len(CORES),
        kv_cache_mib=64,
        log=model.parent / "engine.log",
    )


def one_step(generation: int = 0) -> Step:
    """What eight members with different rewards come to."""
    return step(
        torch.linspace(0, 1, 8, dtype=torch.float64).numpy() ** 2,
        members(8, mirrored=True),
        run_seed=7,
        generation=generation,
        sigma=0.05,
        alpha=0.5,
        penalty=Penalty("l2", 0.1),
    )


def probes(engine: EngineProcess) -> list[list[Logprobs]]:
    """Four places of eight prompts, ten likeliest tokens each."""
    return engine.top_logprobs(PROMPTS, 10, positions=4)


def rewritten(source: Path, target: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A model directory with these tensors and everything else of the source."""
    target.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    """A copy of every stored tensor."""
    return {name: tensor.clone() for name, tensor in Anchor.open(directory).tensors()}


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineLauncher]:
    """One import of vLLM for every engine of this file."""
    launcher = EngineLauncher(tmp_path_factory.mktemp("launcher") / "launcher.log")
    yield launcher
    launcher.close()


@pytest.fixture(scope="module", params=list(MODELS))
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """Two models A and B of one architecture and different weights."""
    family, tied = MODELS[request.param]
    root = tmp_path_factory.mktemp(request.param)
    one = random_checkpoint(root / "a", family=family, tied=tied, seed=1)
    return one, random_checkpoint(root / "b", family=family, tied=tied, seed=2)


@pytest.fixture(scope="module")
def engine(launcher: EngineLauncher, pair: tuple[Path, Path]) -> Iterator[EngineProcess]:
    """An engine started cold on A."""
    engine = launcher.engine(options(pair[0]))
    yield engine
    engine.close()


def test_its_threads_are_of_the_runtime_that_lets_them_sleep(engine: EngineProcess) -> None:
    engine.ready()
    loaded = Path(f"/proc/{engine._pid}/maps").read_text()
    assert Path(cpu_runtime()["LD_PRELOAD"]).name in loaded


def test_reload_equals_cold_start(
    launcher: EngineLauncher, engine: EngineProcess, pair: tuple[Path, Path]
) -> None:
    cold = launcher.engine(options(pair[1], core=1))
    wanted = probes(cold)
    cold.close()
    assert engine.load(pair[0]) == Anchor.open(pair[0]).digest
    on_a = probes(engine)
    assert engine.load(pair[1]) == Anchor.open(pair[1]).digest
    assert largest_difference(probes(engine), wanted) == 0.0
    assert largest_difference(on_a, wanted) > 0.1  # the two can be told apart
    tied = bool(Anchor.open(pair[0]).tied)
    engine.load(pair[0])
    engine.call("load", {"directory": str(pair[1]), "repack_head": False})
    assert (largest_difference(probes(engine), wanted) > 0.1) == tied
    engine.load(pair[0])
    assert probes(engine) == on_a


def test_answers_are_those_of_the_literal_definition(
    engine: EngineProcess, pair: tuple[Path, Path]
) -> None:
    reference = ReferenceEngine(pair[0])
    assert engine.open(pair[0]) == reference.open(pair[0])
    for member in (None, MEMBER, (MEMBER[0], -MEMBER[1])):
        ours = engine.generate(PROMPTS, [3, 6] * 4, member)
        assert ours == reference.generate(PROMPTS, [3, 6] * 4, member)
    engine.apply(one_step())
    reference.apply(one_step())
    assert engine.generate(PROMPTS, 6) == reference.generate(PROMPTS, 6)
    tails = reference.sample(PROMPTS, 5, seed=1)
    ours_p, theirs_p = (each.prompt_logprobs(PROMPTS, tails) for each in (engine, reference))
    assert torch.allclose(torch.tensor(ours_p), torch.tensor(theirs_p), atol=1e-3)
    assert largest_difference(probes(engine), reference.top_logprobs(PROMPTS, 10, 4)) < 1e-3


def test_given_answers_are_read_as_the_literal_definition_says(
    engine: EngineProcess, pair: tuple[Path, Path]
) -> None:
    """Prompts share a start longer than a cached block; two rows are alike to the last token."""
    reference = ReferenceEngine(pair[0])
    engine.open(pair[0])
    reference.open(pair[0])
    start = {"role": "system", "content": "You answer sums. " * 9}
    prompts = [[start, *messages] for messages in (*PROMPTS, PROMPTS[0], PROMPTS[1])]
    answers = ["4", "a longer answer", "", "8", "7", "x y", "24", "28", "4", "another"]
    for member in (None, MEMBER, (MEMBER[0], -MEMBER[1])):
        ours, theirs = (
            [torch.tensor(row) for row in each.answer_logprobs(prompts, answers, member)]
            for each in (engine, reference)
        )
        assert [len(row) for row in ours] == [len(answer) + 1 for answer in answers]
        for one, other in zip(ours, theirs, strict=True):
            assert torch.allclose(one, other, atol=1e-3)


def test_a_member_leaves_no_trace(engine: EngineProcess, pair: tuple[Path, Path]) -> None:
    engine.open(pair[0])
    tails = engine.sample(PROMPTS, 6, seed=1)
    before = probes(engine), engine.prompt_logprobs(PROMPTS, tails)
    for generation in range(5):
        plain = engine.generate(PROMPTS, 4)
        moved = engine.generate(PROMPTS, 4, (Address(1, generation, 0), 0.3))
        assert moved != plain
    assert (probes(engine), engine.prompt_logprobs(PROMPTS, tails)) == before


def test_a_member_is_the_directory_of_its_weights(
    engine: EngineProcess, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    theta = Parameters.zeros(Anchor.open(pair[0]))
    theta.apply(one_step())
    moved = rewritten(pair[0], tmp_path / "moved", dict(theta.rendered(*MEMBER)))
    engine.open(pair[0])
    engine.apply(one_step())
    answers = engine.generate(PROMPTS, 6, MEMBER)
    assert engine.state()["way"] == "short"  # and the directory below goes the long way
    engine.load(moved)
    assert engine.generate(PROMPTS, 6) == answers
    engine.load(pair[0])
    assert engine.generate(PROMPTS, 6) != answers


def test_update_is_the_hosts_to_the_bit(
    engine: EngineProcess, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    theta = Parameters.zeros(Anchor.open(pair[0]))
    engine.open(pair[0])
    for generation in range(3):
        applied = engine.apply(one_step(generation))
        assert applied == theta.apply(one_step(generation))
        assert applied.delta_hash == theta.delta_hash()
    answers = probes(engine)
    candidate = export(theta, tmp_path / "weights")
    assert engine.load(candidate) == candidate.name
    assert probes(engine) == answers
    theta.save(tmp_path / "snapshot.safetensors")
    engine.open(pair[0])
    assert engine.restore(tmp_path / "snapshot.safetensors", []) == theta.delta_hash()
    assert probes(engine) == answers
    assert engine.restore(None, [one_step(n) for n in range(3)]) == theta.delta_hash()


def test_other_tensors_are_refused_before_anything_is_loaded(
    engine: EngineProcess, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    engine.load(pair[0])
    before = probes(engine)
    whole = tensors_of(pair[1])
    missing = {name: tensor for name, tensor in whole.items() if "layers.1.mlp.up" not in name}
    longer = whole | {"model.norm.weight": torch.ones(65)}
    rounded = whole | {"model.norm.weight": torch.ones(64, dtype=torch.bfloat16)}
    unknown = whole | {"model.extra.weight": torch.ones(4)}
    for number, (tensors, told) in enumerate(
        [
            (missing, "model.layers.1.mlp.up_proj.weight is missing"),
            (longer, r"model.norm.weight is \[65\]"),
            (rounded, "torch.bfloat16, allowed"),
            (unknown, "model.extra.weight is unknown"),
        ]
    ):
        directory = rewritten(pair[1], tmp_path / f"bad{number}", tensors)
        with pytest.raises(UserError, match=told):
            engine.load(directory)
        assert probes(engine) == before


def test_kl_is_zero_for_the_anchor_and_grows_with_distance(
    engine: EngineProcess, pair: tuple[Path, Path]
) -> None:
    engine.open(pair[0])
    prompts = PROMPTS * 4
    tails = engine.sample(prompts, 16, seed=3)
    on_anchor = engine.prompt_logprobs(prompts, tails)
    assert kl_per_token(on_anchor, engine.prompt_logprobs(prompts, tails)) == 0.0
    distances = []
    for generation in range(3):
        engine.apply(one_step(generation))
        distances.append(kl_per_token(on_anchor, engine.prompt_logprobs(prompts, tails)))
    assert 0 < distances[0] < distances[2]


def test_seeded_answers_to_more_than_a_batch_of_prompts(
    launcher: EngineLauncher, tmp_path: Path
) -> None:
    """More tokens than one step of the engine reads, and a seed for each of the requests."""
    model = random_checkpoint(tmp_path / "model", family="qwen2", tied=True, seed=1)
    chosen = replace(options(model), max_model_len=256, max_num_seqs=40)
    prompts = [[{"role": "user", "content": f"{n} " + "long " * 40}] for n in range(40)]
    engine = launcher.engine(chosen)
    try:
        first = engine.sample(prompts, 8, seed=3)
        assert first == engine.sample(prompts, 8, seed=3) != engine.sample(prompts, 8, seed=400)
    finally:
        engine.close()


def test_a_shared_start_of_prompts_is_computed_once_and_changes_no_answer(
    launcher: EngineLauncher, engine: EngineProcess, pair: tuple[Path, Path]
) -> None:
    shared = "You answer in few words. " * 3
    prompts = [
        [{"role": "system", "content": shared}, {"role": "user", "content": f"What is {n}?"}]
        for n in range(24)
    ]
    plain = launcher.engine(replace(options(pair[0]), prefix_caching=False))
    try:
        for each in (plain, engine):
            each.open(pair[0])
        for number in range(3):  # the cache must not outlive the weights it was computed with
            member = (Address(9, 0, number), 0.05)
            assert engine.generate(prompts, 8, member) == plain.generate(prompts, 8, member)
        assert engine.generate(prompts, 8) == plain.generate(prompts, 8)
    finally:
        plain.close()


def test_bad_calls_leave_a_sound_engine(engine: EngineProcess, pair: tuple[Path, Path]) -> None:
    engine.load(pair[0])
    before = probes(engine)
    with pytest.raises(UserError, match=r"prompt 1: \d+ tokens, allowed: under 256"):
        engine.generate([PROMPTS[0], [{"role": "user", "content": "long " * 100}]], 4)
    with pytest.raises(UserError, match="max_tokens must be at least 1"):
        engine.generate(PROMPTS, 0)
    with pytest.raises(UserError, match="k: 21, allowed: 1 to 20"):
        engine.top_logprobs(PROMPTS, 21)
    with pytest.raises(UserError, match="'reload', allowed: open"):
        engine.call("reload", {})
    assert engine.generate([], 4) == []
    assert probes(engine) == before


def test_an_assistants_last_message_is_continued(
    engine: EngineProcess, pair: tuple[Path, Path]
) -> None:
    engine.load(pair[0])
    asked = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "It is"}]
    reference = ReferenceEngine(pair[0])
    assert engine.generate([asked], 6) == reference.generate([asked], 6)


def allowed_cores(pid: int) -> str:
    """The cores the system lets a process use."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(line.split()[1] for line in status.splitlines() if "Cpus_allowed_list" in line)


def served_by(log: Path) -> list[int]:
    """Processes that write to this log."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            writes = (process / "fd" / "1").resolve() == log
        except OSError:
            continue
        if writes:
            found.append(int(process.name))
    return found


def test_a_killed_engine_gives_its_member_back(launcher: EngineLauncher, tmp_path: Path) -> None:
    model = random_checkpoint(tmp_path / "model", seed=4)
    logs = [tmp_path / f"engine{number}.log" for number in range(2)]
    starts = []
    for number, log in enumerate(logs):
        settings = options(model, core=number).to_json() | {"log": str(log)}
        starts.append(partial(launcher.engine, EngineOptions.from_json(settings)))
    population = Population(starts)
    population.open(model)
    first = population.apply(one_step())
    pids = [served_by(log)[0] for log in logs]
    assert [allowed_cores(pid) for pid in pids] == [
        str(CORES[number % len(CORES)]) for number in range(2)
    ]
    jobs = [(n, Address(7, 1, n), 0.05) for n in range(12)]
    results: dict[int, list[Completion]] = {}
    for result in population.members(jobs, PROMPTS, 24):
        if not results:
            os.kill(pids[1 - result.engine], signal.SIGKILL)
        results[result.job] = result.values
    assert sorted(results) == list(range(12))
    assert any("started again" in line for line in population.incidents)
    alone = population.first()
    for index, address, scale in jobs:
        assert alone.generate(PROMPTS, 24, (address, scale)) == results[index]
    second = population.apply(one_step(1))
    theta = Parameters.zeros(Anchor.open(model))
    assert [theta.apply(one_step()), theta.apply(one_step(1))] == [first, second]
    population.close()
    assert [served_by(log) for log in logs] == [[], []]


def test_an_engine_ends_with_its_caller(launcher: EngineLauncher, tmp_path: Path) -> None:
    settings = options(random_checkpoint(tmp_path / "model", seed=4))
    engine = launcher.engine(settings)
    engine.ready()
    assert settings.log is not None
    (pid,) = served_by(settings.log)
    ended = os.pidfd_open(pid)
    engine._channel.close()  # what the system does for a caller that dies
    assert select.select([ended], [], [], 30)[0] == [ended]
    os.close(ended)
    with pytest.raises(EngineLostError, match=r"engine: .*the last line of .*engine\.log"):
        engine.generate(PROMPTS, 1)
    engine.close()


DRIVER = """
import sys
from pathlib import Path
from agent.population.process_group import SHARED_MEMORY
from agent.population.process import EngineLauncher
from agent.population.placement import EngineOptions
import json
launcher = EngineLauncher(Path(sys.argv[2]))
engine = launcher.engine(EngineOptions.from_json(json.loads(sys.argv[1])))
engine.ready()
print("ready", flush=True)
sys.stdin.read()
"""


def test_tensor_parallel_ranks_that_cannot_start_end(
    launcher: EngineLauncher, tmp_path: Path, scale: Scale
) -> None:
    if scale(0, 1) == 0:
        pytest.skip("each start takes half a minute on two cores: in the soak")
    broken = random_checkpoint(tmp_path / "broken", family="qwen2", tied=True, seed=1)
    save_file({"model.norm.weight": torch.ones(64)}, broken / "model.safetensors", {"format": "pt"})
    two = replace(options(broken), tensor_parallel=2)
    assert two.log is not None
    before = shared_memory()
    failed = launcher.engine(two)
    with pytest.raises(UserError, match="engine: "):
        failed.ready()
    assert gone(two.log)
    failed.close()
    assert shared_memory() <= before


def test_tensor_parallel_ranks_answer_like_one_and_end_with_their_engine(
    launcher: EngineLauncher, tmp_path: Path, scale: Scale
) -> None:
    if scale(0, 1) == 0:
        pytest.skip("each start takes half a minute on two cores: in the soak")
    model = random_checkpoint(tmp_path / "model", family="qwen2", tied=True, seed=1)
    two = replace(options(model), tensor_parallel=2)
    assert two.log is not None
    before = shared_memory()
    engine = launcher.engine(two)
    engine.ready()
    assert len(served_by(two.log)) >= 4  # the engine, its core, two ranks
    host = Parameters.zeros(Anchor.open(model))
    wanted = host.apply(one_step(), "tree-")
    applied, answers = moved_answers(engine, model)
    state, whole = engine.state(), host.anchor.parameters
    sys.stdout.write(f"elements of delta on each rank: {state['held']} of {whole}\n")
    assert state["way"] == "short"  # each rank has only its windows
    # As planned; the first rank also has the rows that are padding on the second (up to 64 of 64).
    planned = size_of(host.anchor).on_rank(2)
    assert whole / 2 < planned < 0.6 * whole  # one key and value head, which both ranks hold
    assert max(map(int, str(state["held"]).split(","))) <= planned + 64 * 64
    assert applied.delta_hash == wanted.delta_hash
    assert applied.layer_norms == pytest.approx(wanted.layer_norms, rel=1e-9)
    snapshot = tmp_path / "snapshots" / "one.safetensors"
    assert engine.save(snapshot) == wanted.delta_hash
    assert is_sound(host.anchor, snapshot, wanted.delta_hash)
    assert engine.restore(None, []) != wanted.delta_hash
    assert engine.restore(snapshot, []) == wanted.delta_hash
    assert engine.generate(PROMPTS, 6, MEMBER) == answers
    engine.close()
    assert gone(two.log)
    assert shared_memory() <= before
    single = launcher.engine(options(model))
    assert moved_answers(single, model)[1] == answers
    single.close()


def test_tensor_parallel_ranks_end_with_a_killed_driver(tmp_path: Path, scale: Scale) -> None:
    if scale(0, 1) == 0:
        pytest.skip("each start takes half a minute on two cores: in the soak")
    model = random_checkpoint(tmp_path / "model", family="qwen2", tied=True, seed=1)
    two = replace(options(model), tensor_parallel=2)
    assert two.log is not None
    before = shared_memory()
    arguments = [json.dumps(two.to_json()), str(tmp_path / "driver.log")]
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "ready\n"
        assert len(served_by(two.log)) >= 4
        driver.kill()
    assert gone(two.log)
    assert gone(tmp_path / "driver.log")
    assert shared_memory() <= before


def shared_memory() -> set[Path]:
    """What vLLM's ranks share on this machine."""
    return set(SHARED_MEMORY.glob("vllm*"))


def moved_answers(engine: EngineProcess, model: Path) -> tuple[Applied, list[Completion]]:
    """What a step did, and a member's answers after it."""
    engine.open(model)
    return engine.apply(one_step()), engine.generate(PROMPTS, 6, MEMBER)


def gone(log: Path) -> bool:
    """Whether every process that writes to a log ends within 5 s."""
    left = [psutil.Process(pid) for pid in served_by(log)]
    return not psutil.wait_procs(left, timeout=5)[1] and not served_by(log)


def test_what_cannot_start_says_why(launcher: EngineLauncher, tmp_path: Path) -> None:
    engine = launcher.engine(options(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"engine: .*nothing"):
        engine.ready()
    engine.close()


def test_a_killed_launcher_is_started_again(tmp_path: Path) -> None:
    model = random_checkpoint(tmp_path / "model", seed=4)
    launcher = EngineLauncher(tmp_path / "launcher.log")
    engine = launcher.engine(options(model))
    launcher._child.kill()
    with pytest.raises(EngineLostError, match="the other end is gone"):
        engine.ready()
    engine.close()
    launcher._child.wait()
    again = launcher.engine(options(model))
    again.ready()
    launcher.close()  # and with it an engine that was never closed
    assert gone(tmp_path / "engine.log")
    again.close()


def test_start_again_is_quick_because_nothing_is_imported(
    launcher: EngineLauncher, tmp_path: Path
) -> None:
    """An engine of a warm launcher takes a fraction of the CPU time of the import it saves."""
    engine = launcher.engine(options(random_checkpoint(tmp_path / "model", seed=4)))
    engine.ready()
    imported = cpu_seconds(launcher._child.pid)
    started = cpu_seconds(served_by(tmp_path / "engine.log")[0])
    engine.close()
    assert started < imported / 2


def cpu_seconds(pid: int) -> float:
    """User time of one process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) / os.sysconf("SC_CLK_TCK")
