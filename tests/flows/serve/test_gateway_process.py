"""What a person sets reaches the gateway and the swap."""

from pathlib import Path
from typing import get_args

import pytest

from agent import config
from agent.config import load
from agent.errors import UserError
from agent.gateway.keys import Quota
from agent.home import Home
from deploy.serving.controller import Strategy
from deploy.serving.served import GREEN, Served, write_served, write_slot
from flows.serve.gateway_process import served_model, versions
from flows.service import Service


def test_the_endpoint_serves_the_settings_model_and_every_task(tmp_path: Path) -> None:
    service = Service(Home.at(tmp_path), load(model={"max_model_len": 77}))
    model = served_model(service)
    assert (model.name, model.upstream_name, model.max_tokens) == ("anchorage", "anchorage", 77)
    assert model.tasks == frozenset(service.tasks)


def test_versions_are_those_of_the_home(tmp_path: Path) -> None:
    home = Home.at(tmp_path)
    service = Service(home, load())
    anchor = service.origin.digest
    known = versions(service)
    assert known.named() == {"previous": anchor, "anchor": anchor}
    assert known.kept() == [anchor]
    assert known.standby(home.engine_socket(GREEN)) is None
    write_served(home, Served("a" * 64, "/a"))
    write_slot(home, Served("b" * 64, "/b", GREEN))
    assert known.standby(home.engine_socket(GREEN)) == "b" * 64
    assert known.standby(tmp_path / "other.sock") is None


def test_the_ways_to_swap_are_those_there_are() -> None:
    assert get_args(config.EngineSettings.model_fields["swap"].annotation) == get_args(Strategy)


@pytest.mark.parametrize("limit", ["600", "many/minute"])
def test_a_limit_nobody_can_count_is_one_line(limit: str) -> None:
    with pytest.raises(UserError, match="allowed: such as '600/minute'"):
        Quota(limit, "")
