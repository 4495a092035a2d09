"""A round and a promotion on real parts, beside an MLflow that accepts connections and is silent.

The seconds of both are logged (``--log-cli-level=INFO``); asserted is what they follow from: no
thread but the display's asks for MLflow, and what it could not show is shown after it recovers.
"""

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.home import Home
from agent.registry import Registry
from flows.learn.improve import Round
from flows.learn.loop import learn
from flows.learn.weigh import weigh
from flows.serve.promote import promote
from flows.serve.stack import start, stop
from flows.service import Service
from flows.session import Session
from flows.show.catch_up import Display, shown_within
from flows.show.terminal import Silent

LOG = logging.getLogger("proof")
pytestmark = pytest.mark.integration

SECTIONS: dict[str, Any] = {
    "learner": {"generations": 2, "population": 4, "prompts": 16},
    "tasks": {"rows": 24, "curve_every": 0, "kl_rows": 0, "priors": ["piqa"]},
    "gate": {"confirm": False},
    "baking": {"minutes": 0},
    "projection": {"reconcile_seconds": 5.0},
}


class Silenced(Service):
    """A home whose MLflow, for this process, is a server that never answers."""

    uri = ""
    callers: set[str]

    @property
    def registry(self) -> Registry:  # type: ignore[override]
        self.callers.add(threading.current_thread().name)
        return Registry(self.uri, self.settings.model.name, None)


@pytest.fixture
def home(tmp_path: Path, scale: Callable[[int, int], int]) -> Iterator[Home]:
    """A stack that serves the embedded model."""
    if scale(0, 1) == 0:  # the same rule on planted engines: tests/flows/show/test_display.py
        pytest.skip("two minutes beside a silent server: in the soak")
    root = tmp_path / "home"
    try:
        start(root, None, None, None, Silent(), **SECTIONS)
        yield Home.at(root)
    finally:
        stop(root)


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server that accepts connections and never answers."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def timed(act: Callable[[], Any]) -> tuple[float, Any]:
    began = time.monotonic()
    value = act()
    return time.monotonic() - began, value


def round_and_promotion(session: Session, alpha: float) -> tuple[float, float]:
    """Seconds of a judged round, and of promoting a candidate that the gate is said to pass."""
    service = session.service

    def learnt(alpha: float) -> Round:
        return learn(session, "gsm8k", {"alpha": alpha})

    round_s, _ = timed(lambda: weigh(session, learnt(alpha).run_id))
    digest = learnt(alpha / 2).digest
    for state in ("EVALUATED", "PASSED"):
        service.record(digest, state, "a test")
    promotion_s, outcome = timed(lambda: promote(session, digest))
    assert outcome.served == digest
    return round_s, promotion_s


def test_a_hung_mlflow_costs_a_round_and_a_promotion_nothing(
    home: Home, silent: str, scale: Callable[[int, int], int]
) -> None:
    """One session, whose display runs in some turns: the inner ones of four in the long run."""
    service = Silenced.at(home.root)
    service.uri, service.callers = silent, set()
    session = Session(service, Silent())
    round_and_promotion(session, 0.004)  # engines start
    assert service.callers == set()
    took: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for turn, hung in enumerate((False, True, True, False)[: scale(2, 4)]):
        assert shown_within(service, 300.0), "the flows' process, whose MLflow answers, is idle"
        display = Display(service, every_s=0.1) if hung else None
        while hung and not service.callers:
            time.sleep(0.1)  # until its first pass has imported MLflow, once a process
        took[hung].append(round_and_promotion(session, 0.005 + turn / 1000))
        if display is not None:
            display.stop()
    session.close()
    for name, without, beside in zip(
        ("round", "promotion"), *map(means, took.values()), strict=True
    ):
        more = 100 * (beside / without - 1)
        LOG.info("%s: %.1f s, beside a hung MLflow %.1f s (%+.0f %%)", name, without, beside, more)
    assert service.callers == {"display"}
    assert shown_within(service, 300.0)


def means(turns: list[tuple[float, float]]) -> list[float]:
    return [sum(column) / len(turns) for column in zip(*turns, strict=True)]
