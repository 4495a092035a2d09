"""What engines are started with, and what is refused before any of them is."""

import socket
from pathlib import Path

import pytest

from agent.config import load
from agent.errors import UserError
from agent.home import Home
from agent.population.capacity import GIB, Machine, gpu_bytes, size_of
from agent.population.placement import EngineOptions, available_cores, on_cpu, serving_cores
from agent.store.device import DeviceParameters
from flows.service import Service
from flows.session import engine_options


def service(root: Path, monkeypatch: pytest.MonkeyPatch, device: str) -> Service:
    monkeypatch.chdir(root)
    return Service(Home.at(root / "home"), load(engines={"master_device": device, "population": 2}))


def test_engines_know_where_delta_and_importance_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = service(tmp_path, monkeypatch, "cpu")
    for options in engine_options(opened):
        assert (options.master_device, options.importance) == ("cpu", opened.home.importance)


@pytest.mark.skipif(not on_cpu(), reason="a GPU build of vLLM takes cuda")
def test_a_device_that_is_not_there_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = service(tmp_path, monkeypatch, "cuda")
    with pytest.raises(UserError, match="master_device: 'cuda', allowed here: cpu"):
        engine_options(opened)
    anchor = opened.anchor
    with pytest.raises(UserError, match="master_device: 'cuda', allowed here: cpu"):
        DeviceParameters(anchor, "cuda")


@pytest.mark.skipif(not on_cpu(), reason="cores are shared out by vLLM's CPU build")
def test_a_population_leaves_serving_its_cores_while_the_stack_is_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = service(tmp_path, monkeypatch, "cpu")
    assert [(o.place, o.places, o.kept_cores) for o in engine_options(opened)] == [
        (0, 2, 0),
        (1, 2, 0),
    ]
    opened.home.sockets.mkdir()
    with socket.socket(socket.AF_UNIX) as gateway:
        gateway.bind(str(opened.home.admin_socket))
        gateway.listen()
        kept = serving_cores(len(available_cores()))
        assert {o.kept_cores for o in engine_options(opened)} == {kept} != {0}


def on_gpus(root: Path, gpus: int, memory: int, **engines: object) -> list[EngineOptions]:
    """Engines of the embedded model on a machine with so many GPUs of so many bytes."""
    settings = load(engines=engines)
    machine = Machine(False, 16, 64 * GIB, gpus, memory)
    return engine_options(Service(Home.at(root / "home"), settings), machine)


def test_on_gpus_delta_lies_there_and_every_engine_has_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = on_gpus(tmp_path, 8, 80 * GIB, population=8)
    assert sorted(each.devices for each in options) == [(gpu,) for gpu in range(8)]
    assert {each.gpu_memory_utilization for each in options} == {0.9}
    assert {each.master_device for each in options} == {"cuda"}
    assert {each.master_device for each in on_gpus(tmp_path, 1, 80 * GIB, master_device="cpu")} == {
        "cpu"
    }


def test_delta_goes_to_the_host_where_a_gpu_has_no_room_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    size = size_of(Service(Home.at(tmp_path / "home"), load()).anchor)
    tight = gpu_bytes(size, 1, "cpu", load().model.max_model_len)
    memory = int((sum(tight.values()) + 1000) / 0.9)
    assert on_gpus(tmp_path, 1, memory)[0].master_device == "cpu"
    with pytest.raises(UserError, match=r"'cuda': a GPU: needs .*delta.*, allowed here: .* to an"):
        on_gpus(tmp_path, 1, memory, master_device="cuda")
    with pytest.raises(UserError, match=r"'auto': a GPU: needs .*weights"):
        on_gpus(tmp_path, 1, GIB)


def test_more_engines_than_the_host_has_memory_for_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    opened = Service(Home.at(tmp_path / "home"), load(engines={"population": 64}))
    with pytest.raises(UserError, match=r"engines.population: 64: needs 6.*memory of this machine"):
        engine_options(opened, Machine(True, 64, 16 * GIB))


def test_settings_of_the_population_are_its_own() -> None:
    plain = load(engines={"tensor_parallel_size": 2}).engines
    assert plain.population_ranks == 2
    own = load(engines={"tensor_parallel_size": 2, "population_tensor_parallel_size": 1}).engines
    assert own.population_ranks == 1
