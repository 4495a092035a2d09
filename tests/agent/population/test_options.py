"""What an engine is started with."""

import json
import subprocess
import sys
from dataclasses import replace
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path

import pytest

from agent.errors import UserError
from agent.population.placement import (
    HUGE_PAGES,
    SLEEPING,
    EngineOptions,
    cpu_runtime,
    environment,
    on_cpu,
)
from agent.population.vllm_arguments import model_arguments, torchvision_for_import


def test_options_travel_as_json() -> None:
    plain = EngineOptions(Path("/models/a"))
    full = EngineOptions(
        Path("/models/b"),
        dtype="bfloat16",
        max_model_len=512,
        max_num_seqs=7,
        place=1,
        places=2,
        kept_cores=3,
        threads=4,
        devices=(2, 3),
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


@pytest.mark.parametrize("name", ["max_num_seqs", "kv_cache_mib", "tensor_parallel", "places"])
def test_a_size_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"{name}: 0, allowed: 1 or more"):
        EngineOptions.from_json(EngineOptions(Path("/models/a")).to_json() | {name: 0})


@pytest.mark.skipif(not on_cpu(), reason="on the CPU")
def test_an_engine_starts_with_threads_that_sleep_and_huge_pages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("LD_PRELOAD", "GLIBC_TUNABLES", *SLEEPING):
        monkeypatch.delenv(name, raising=False)
    plain = cpu_runtime()
    assert plain["GLIBC_TUNABLES"] == HUGE_PAGES
    if any(metadata.distributions(name="intel-openmp")):
        assert Path(plain["LD_PRELOAD"]).is_file()
        assert plain.items() >= SLEEPING.items()
        monkeypatch.setenv("LD_PRELOAD", "/lib/libjemalloc.so")
        monkeypatch.setenv("KMP_BLOCKTIME", "20")
        beside = cpu_runtime()
        assert beside["LD_PRELOAD"] == f"/lib/libjemalloc.so:{plain['LD_PRELOAD']}"
        assert beside["KMP_BLOCKTIME"] == "20"
    for chosen in ("/lib/libiomp5.so", "/lib/libgomp.so.1", "/lib/libomp.so"):
        monkeypatch.setenv("LD_PRELOAD", chosen)
        assert cpu_runtime() == {"GLIBC_TUNABLES": HUGE_PAGES}
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=1")
    assert cpu_runtime() == {"GLIBC_TUNABLES": f"glibc.malloc.arena_max=1:{HUGE_PAGES}"}
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")
    assert cpu_runtime() == {}  # whoever begins again does so once


def test_an_engine_has_threads_for_its_own_cores_and_no_more() -> None:
    plain = EngineOptions(Path("m"))
    first, second = (environment(plain, (core,)) for core in (0, 1))
    assert first["VLLM_CPU_OMP_THREADS_BIND"] == "0"
    assert second["VLLM_CPU_OMP_THREADS_BIND"] == "1"
    assert first["OMP_NUM_THREADS"] == first["NUMBA_NUM_THREADS"] == "1"
    free = environment(plain)
    assert free["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert "OMP_NUM_THREADS" not in free
    somewhere = environment(replace(plain, threads=3))
    assert somewhere["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert somewhere["OMP_NUM_THREADS"] == somewhere["NUMBA_NUM_THREADS"] == "3"


def test_ranks_share_the_cores_of_their_engine() -> None:
    two = EngineOptions(Path("m"), tensor_parallel=2)
    wide = environment(two, (2, 3, 4, 5))
    assert (wide["VLLM_CPU_OMP_THREADS_BIND"], wide["OMP_NUM_THREADS"]) == ("2,3|4,5", "2")
    narrow = environment(two, (7,))
    assert (narrow["VLLM_CPU_OMP_THREADS_BIND"], narrow["OMP_NUM_THREADS"]) == ("7|7", "1")


def test_an_engine_sees_its_own_gpus_of_those_its_process_may_use() -> None:
    third = EngineOptions(Path("m"), devices=(2,))
    assert environment(third)["CUDA_VISIBLE_DEVICES"] == "2"
    assert environment(third, visible="4,5,6,7")["CUDA_VISIBLE_DEVICES"] == "6"
    assert "CUDA_VISIBLE_DEVICES" not in environment(EngineOptions(Path("m")), visible="4,5")


def test_the_callers_side_imports_neither_torch_nor_vllm() -> None:
    """Whoever drives engines in other processes does not wait for their imports."""
    code = (
        "import sys, agent.population.process, agent.population.ray, agent.population.pool;"
        "sys.exit(' '.join({'torch', 'vllm', 'ray', 'numba'} & set(sys.modules)) or None)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert (found.returncode, found.stderr) == (0, "")


def test_a_model_that_also_sees_is_started_as_its_text_part(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text('{"text_config": {}, "vision_config": {}}')
    assert model_arguments(tmp_path) == {"language_model_only": True}
    config.write_text('{"model_type": "qwen3_5_text"}')
    assert model_arguments(tmp_path) == {}


@pytest.mark.skipif(not on_cpu(), reason="an accelerator reads prompts in pieces")
@pytest.mark.parametrize("nested", [True, False])
def test_recurrent_layers_keep_no_shared_starts_on_the_cpu(tmp_path: Path, nested: bool) -> None:
    """Where an attention is recurrent vLLM refuses the two settings together."""
    text = {"layer_types": ["linear_attention", "full_attention"]}
    whole = {"text_config": text} if nested else text
    (tmp_path / "config.json").write_text(json.dumps(whole))
    assert model_arguments(tmp_path) == {"enable_prefix_caching": False}


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="a build of torchvision is there")
def test_torchvision_stands_in_for_the_time_of_an_import() -> None:
    with torchvision_for_import():
        found = import_module("torchvision.transforms.v2")
        assert found.functional.__name__ == "torchvision.transforms.v2.functional"
    assert not [name for name in sys.modules if name.startswith("torchvision")]
    with pytest.raises(ModuleNotFoundError):
        import_module("torchvision")
