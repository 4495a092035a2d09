"""What a person sets reaches the gateway and the swap."""

from pathlib import Path
from typing import get_args

import pytest

from agent import config
from agent.config import load
from agent.errors import UserError
from agent.gateway.keys import Quota
from agent.gateway.settings import GatewayOptions
from agent.home import Home
from deploy.serving.controller import Strategy
from flows.serve.gateway_process import gateway_settings
from flows.service import Service

CHOSEN = {
    "host": "::1", "retention_days": 7, "rate": "600/minute", "token_quota": "9/day",
    "quota_storage": "async+redis://x", "max_body_bytes": 99, "max_in_flight": 3, "max_queued": 4,
    "queue_timeout_s": 5.0, "answer_timeout_s": 6.0,
}  # fmt: skip


def test_every_setting_of_the_endpoint_reaches_it(tmp_path: Path) -> None:
    service = Service(Home.at(tmp_path), load(gateway=CHOSEN, model={"max_model_len": 77}))
    made = gateway_settings(service)
    assert {name: getattr(made, name) for name in CHOSEN} == CHOSEN
    assert (made.model, made.max_tokens) == ("anchorage", 77)
    assert made.tasks == frozenset(service.tasks)
    shared = set(GatewayOptions.__dataclass_fields__) & set(config.GatewaySettings.model_fields)
    assert shared == set(CHOSEN)


def test_the_ways_to_swap_are_those_there_are() -> None:
    assert get_args(config.EngineSettings.model_fields["swap"].annotation) == get_args(Strategy)


@pytest.mark.parametrize("limit", ["600", "many/minute"])
def test_a_limit_nobody_can_count_is_one_line(limit: str) -> None:
    with pytest.raises(UserError, match="allowed: such as '600/minute'"):
        Quota(limit, "", "async+memory://")
