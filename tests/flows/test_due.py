"""Which scheduled runs are started, skipped or refused."""

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from agent.config import load
from agent.errors import UserError
from agent.home import Home
from flows.learn.loop import (
    Due,
    RowTrigger,
    decide,
    note_refusals,
    refusal,
    refuse_foreign,
    registered,
)
from flows.service import Service

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
HOME = "/homes/a"


def due(name: str, minute: int, planned: bool = True) -> Due:
    return Due(uuid4(), name, planned, NOON + timedelta(minutes=minute))


def test_after_a_pause_exactly_one_planned_run_catches_up() -> None:
    late = [due("loop", minute) for minute in range(13)]
    decided = decide(late, [], learning=False)
    assert decided[late[-1].run_id] == ""
    assert all("catches up" in decided[each.run_id] for each in late[:-1])


def test_of_two_planned_for_the_same_moment_one_is_started() -> None:
    decided = decide([due("loop", 0), due("loop", 0)], [], learning=False)
    assert sorted(map(bool, decided.values())) == [False, True]


@pytest.mark.parametrize(
    ("running", "learning"), [(["loop"], False), (["improve"], False), ([], True)]
)
def test_a_loop_that_is_due_while_a_round_runs_is_skipped_and_says_so(
    running: list[str], learning: bool
) -> None:
    planned, asked = due("loop", 0), due("loop", 1, planned=False)
    running = ["loop", "improve"] if running else []  # a loop runs both
    assert decide([planned, asked], running, learning) == {
        planned.run_id: "skipped: a round is running"
    }


def test_one_round_is_started_at_a_time_and_others_beside_it() -> None:
    loop, improve, bake = due("loop", 0), due("improve", 1, False), due("bake", 2, False)
    again = due("bake", 3, False)
    decided = decide([again, bake, improve, loop], [], learning=False)
    assert decided == {loop.run_id: "", bake.run_id: ""}
    assert decide([improve, again], ["collect"], False) == {improve.run_id: "", again.run_id: ""}


@dataclass
class Fields:
    """A deployment or run as Prefect's client returns it: attributes."""

    flow_id: UUID = field(default_factory=uuid4)

    @classmethod
    def of(cls, **values: Any) -> Any:
        made = cls(values.pop("flow_id", uuid4()))
        made.__dict__.update(values)
        return made


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("entrypoint", "evil.py:flow"),
        ("entrypoint", "flows/deployments.py:rollback_flow"),
        ("parameters", {"home": "/elsewhere"}),
        ("parameters", {"home": HOME, "changes": {"alpha": 1.0}}),
        ("path", "/tmp"),
        ("pull_steps", [{"prefect.deployments.steps.run_shell_script": {"script": "id"}}]),
        ("job_variables", {"command": "id"}),
        ("job_variables", {"env": {"PYTHONPATH": "/tmp"}}),
        ("work_pool_name", "process"),
        ("work_queue_name", "mine"),
        ("storage_document_id", uuid4()),
        ("infrastructure_document_id", uuid4()),
    ],
)
def test_a_deployment_that_differs_is_refused_with_the_field(name: str, value: object) -> None:
    wanted = registered("loop", HOME)
    assert refusal("loop", HOME, Fields.of(**wanted)) is None
    why = refusal("loop", HOME, Fields.of(**wanted | {name: value}))
    assert why is not None
    assert name in why
    assert "registered:" in why


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("parameters", {"home": "/elsewhere"}, "home is '/elsewhere'"),
        ("parameters", {}, "home is None"),
        ("parameters", {"home": [HOME]}, "home is"),
        ("job_variables", {"command": "id"}, "job_variables"),
        ("infrastructure_document_id", uuid4(), "infrastructure_document_id"),
        ("work_pool_name", "process", "work_pool_name"),
        ("flow_id", uuid4(), "flow is"),
    ],
)
def test_a_run_that_differs_is_refused(name: str, value: object, told: str) -> None:
    flow_id = uuid4()
    deployment = Fields.of(**registered("loop", HOME), flow_id=flow_id)
    right = {"parameters": {"home": HOME, "target": None}, "flow_id": flow_id}
    assert refusal("loop", HOME, deployment, Fields.of(**right)) is None
    why = refusal("loop", HOME, deployment, Fields.of(**right | {name: value}))
    assert why is not None
    assert told in why


def test_new_rows_start_one_round_and_again_as_many_the_next() -> None:
    new = 0
    trigger = RowTrigger(50, lambda: new)
    assert not trigger.due()
    new = 50
    assert trigger.due()
    trigger.asked()
    new = 99  # the round failed before it was opened: its rows are new still
    assert not trigger.due()
    new = 100
    assert trigger.due()
    trigger.asked()
    new = 3  # it was opened
    assert not trigger.due()
    new = 53
    assert trigger.due()
    assert not RowTrigger(0, lambda: 1000).due()


def test_a_refused_run_is_a_row_of_the_ledger_once_for_the_same_reason(tmp_path: Path) -> None:
    """About the champion, whose state it leaves as it is."""
    service = Service(Home.at(tmp_path), load(None))
    champion, note = service.champion(), note_refusals(service)
    for name, why in (("collect", "its steps"), ("collect", "its steps"), ("loop", "its steps")):
        note(name, why)
    rows = service.ledger.history()[::-1]
    assert [row.state for row in rows] == ["ANCHOR", "REFUSED", "REFUSED"]
    assert [row.digest for row in rows] == [champion] * 3
    assert rows[1].why == "a run of collect from Prefect: its steps"
    assert service.ledger.state(champion) == "ANCHOR"


def test_a_deployment_of_another_home_is_not_replaced() -> None:
    ours = Fields.of(parameters={"home": HOME})
    refuse_foreign("loop/mine", HOME, ours)
    for parameters in ({"home": "/homes/b"}, {}):
        with pytest.raises(UserError, match=r"deployment loop/mine is of home .*model\.name"):
            refuse_foreign("loop/mine", HOME, Fields.of(parameters=parameters))
