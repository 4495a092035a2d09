"""What an engine is started with."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from agent.errors import UserError
from agent.population.vllm import EngineOptions, environment


def test_options_travel_as_json() -> None:
    plain = EngineOptions(Path("/models/a"))
    full = EngineOptions(
        Path("/models/b"),
        dtype="bfloat16",
        max_model_len=512,
        max_num_seqs=7,
        cores=(1, 3),
        kv_cache_mib=64,
        gpu_memory_utilization=0.25,
        tensor_parallel=2,
        enforce_eager=True,
        max_logprobs=5,
        master_device="cuda",
        importance=Path("/importance"),
        seed=9,
        log=Path("/logs/e"),
    )
    for options in (plain, full):
        assert EngineOptions.from_json(json.loads(json.dumps(options.to_json()))) == options


@pytest.mark.parametrize("name", ["max_num_seqs", "kv_cache_mib", "tensor_parallel"])
def test_a_size_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"{name}: 0, allowed: 1 or more"):
        EngineOptions.from_json(EngineOptions(Path("/models/a")).to_json() | {name: 0})


def test_two_engines_get_their_own_cores_and_no_more_threads() -> None:
    first, second = (environment(EngineOptions(Path("m"), cores=(core,))) for core in (0, 1))
    assert first["VLLM_CPU_OMP_THREADS_BIND"] == "0"
    assert second["VLLM_CPU_OMP_THREADS_BIND"] == "1"
    assert first["OMP_NUM_THREADS"] == first["NUMBA_NUM_THREADS"] == "1"
    wide = environment(EngineOptions(Path("m"), cores=(2, 3), tensor_parallel=2))
    assert wide["VLLM_CPU_OMP_THREADS_BIND"] == "2,3|2,3"
    assert wide["OMP_NUM_THREADS"] == "2"
    free = environment(EngineOptions(Path("m")))
    assert free["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert "OMP_NUM_THREADS" not in free


def test_the_callers_side_imports_neither_torch_nor_vllm() -> None:
    """Whoever drives engines in other processes does not wait for their imports."""
    code = (
        "import sys, agent.population.nursery, agent.population.ray, agent.population.pool;"
        "sys.exit(' '.join({'torch', 'vllm', 'ray', 'numba'} & set(sys.modules)) or None)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert (found.returncode, found.stderr) == (0, "")
