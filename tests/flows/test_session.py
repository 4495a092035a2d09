"""What engines are started with, and what is refused before any of them is."""

import socket
from pathlib import Path

import pytest

from agent.config import load
from agent.errors import UserError
from agent.home import Home
from agent.population.placement import available_cores, on_cpu, serving_cores
from agent.store.theta import DeviceParameters
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


def test_settings_of_the_population_are_its_own() -> None:
    plain = load(engines={"tensor_parallel_size": 2}).engines
    assert plain.population_ranks == 2
    own = load(engines={"tensor_parallel_size": 2, "population_tensor_parallel_size": 1}).engines
    assert own.population_ranks == 1
