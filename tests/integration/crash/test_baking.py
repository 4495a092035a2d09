"""A candidate that passed the gate and fails live: found by its traffic, rolled back by itself."""

import json
import time
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.integration

ROW = {"question": "Tom has 3 pens and buys 4. How many?", "answer": "3+4=7\n#### 7"}
TASK = {"task": "gsm8k", "example": json.dumps(ROW)}


def traffic(stack: Any, until: Callable[[], bool], most: int, pause_s: float = 0.0) -> int:
    """Requests that carry a task, one after another; how many it took."""
    for count in range(most):
        if until():
            return count
        stack.ask(metadata=TASK)
        time.sleep(pause_s)
    return most


def test_planted_candidates_are_rolled_back_by_themselves(
    make_stack: Callable[..., Any], scale: Callable[[int, int], int]
) -> None:
    """Failures and slowness are counted by slices of time, so they take minutes: `make soak`."""
    for fault in ("reward", "errors", "latency")[: scale(1, 3)]:
        rolled_back(make_stack, fault)


def rolled_back(make_stack: Callable[..., Any], fault: str) -> None:
    stack, controllers, service = make_stack(1, minutes=60.0, rows=400)
    origin, planted = stack.digests
    stack.settled(service)
    traffic(stack, lambda: False, 60)
    (stack.home.root / "planted.json").write_text(json.dumps({"digest": planted, "fault": fault}))
    assert controllers.act(act="promote", digest=planted)["ended"]["state"] == "SWAPPED"

    def back() -> bool:
        return service.ledger.champion() == origin

    took = traffic(stack, back, 3000, 0.0 if fault == "reward" else 0.05)
    assert back(), f"{took} requests"
    assert stack.settled(service) == origin
    row = service.ledger.of(planted)[-1]
    assert row.state == "ROLLED_BACK"
    assert f"{fault} " in row.why
    assert (row.before, row.after) == (planted, origin)
