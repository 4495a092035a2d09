"""A running service whose weights are changed, whose supervisor is killed, whose journal is lost.

One stack on the embedded model, whose champion is a candidate of one generation.
"""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from agent.config import keep, load
from agent.home import Home
from agent.learner import es
from agent.learner.penalty import Penalty
from agent.store.weights import Parameters, export, require, short
from flows.service import Service

pytestmark = pytest.mark.integration


class Stack:
    """The service of a home by its command line and its endpoint."""

    def __init__(self, root: Path) -> None:
        self.home = Home.at(root)
        settings = load(None, projection={"reconcile_seconds": 2.0, "loop_minutes": 0.0})
        keep(self.home, settings)
        service = Service.at(self.home.root)
        self.anchor, self.champion = service.champion(), self._learnt(service)
        for state in ("PROPOSED", "EVALUATED", "PASSED", "SWAP_INTENT", "SWAPPED", "CHAMPION"):
            service.record(self.champion, state, "a test")

    def _learnt(self, service: Service) -> str:
        anchor, journal = service.origin, service.journal
        journal.open_run(
            "0001-t", anchor_digest=anchor.digest, parent_digest=anchor.digest, target="gsm8k",
            run_seed=1, plan={}, now=0.0,
        )  # fmt: skip
        parameters = Parameters.zeros(anchor)
        rewards = np.random.default_rng(0).random((4, 5))
        step = es.step(
            rewards.mean(axis=1), es.members(4, False), run_seed=1, sigma=0.01, generation=0,
            alpha=0.005, penalty=Penalty("l2", 1.0),
        )  # fmt: skip
        moved = parameters.apply(step)
        journal.commit("0001-t", step, rewards, moved.delta_hash, {"norm": moved.norm})
        digest = export(parameters, self.home.weights).name
        journal.finish("0001-t", digest, "a test", now=1.0)
        return digest

    def run(self, *words: str) -> Any:
        told = subprocess.run(
            [sys.executable, "-m", "flows.cli", *words, "--json", "--home", str(self.home.root)],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert told.stdout, told.stderr[-2000:]
        return json.loads(told.stdout)

    def pid(self, name: str) -> int:
        services = self.run("status")["services"]
        return int(next(each["pid"] for each in services if each["name"] == name))

    def ask(self) -> tuple[str, str] | None:
        """Version and text of one greedy answer; None while there is none."""
        body = {
            "model": "anchorage",
            "messages": [{"role": "user", "content": "Tom has 3 pens and buys 4. How many?"}],
            "max_tokens": 12,
            "temperature": 0,
        }
        endpoint = json.loads(self.home.stack_json.read_text())["endpoint"]
        try:
            reply = httpx.post(f"{endpoint}/v1/chat/completions", json=body, timeout=30)
        except httpx.HTTPError:
            return None
        if reply.status_code != 200:
            return None
        text = str(reply.json()["choices"][0]["message"]["content"])
        return reply.headers["x-model-version"], text

    def flip(self) -> None:
        """One sign bit of the champion's weights, in the file that the next start reads."""
        path = self.home.weights / self.champion / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 0x80
        path.chmod(0o644)
        path.write_bytes(content)

    def seen_until(self, done: Callable[[], bool], timeout_s: float = 240.0) -> set[Any]:
        """Every answer given until something holds."""
        seen, until = set(), time.monotonic() + timeout_s
        while not done():
            assert time.monotonic() < until, seen
            seen.add(self.ask())
            time.sleep(0.1)
        return seen - {None}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    made = Stack(tmp_path_factory.mktemp("damage") / "h")
    made.run("up")
    yield made
    made.run("down")


def test_a_flipped_bit_is_never_answered_from_and_is_mended(stack: Stack) -> None:
    right = stack.ask()
    assert right is not None
    assert right[0] == short(stack.champion)
    engine = stack.pid("engine")
    stack.flip()
    began = time.monotonic()
    os.kill(engine, signal.SIGKILL)
    while stack.ask() is not None:  # the connection may outlive the signal by a moment
        time.sleep(0.05)
    seen = stack.seen_until(lambda: stack.ask() is not None)
    print(f"right answers again {time.monotonic() - began:.1f} s after the kill")  # noqa: T201
    assert seen | {stack.ask()} == {right}
    require(stack.home.weights / stack.champion, stack.champion)
    assert "rebuilt from the anchor and the journal" in stack.home.log("engine").read_text()


def test_a_killed_supervisord_and_gateway_come_back_and_status_agrees(stack: Stack) -> None:
    right, gateway = stack.ask(), stack.pid("gateway")
    began = time.monotonic()
    os.kill(int(stack.home.supervisor_pid.read_text()), signal.SIGKILL)
    os.kill(gateway, signal.SIGKILL)
    # Dead, unsupervised or back: the command never says that all is well while it is not.
    seen = stack.seen_until(lambda: stack.ask() is not None)
    print(f"answers again {time.monotonic() - began:.1f} s after both kills")  # noqa: T201
    assert seen | {stack.ask()} == {right}
    told = stack.run("status")
    assert told["champion"] == stack.champion
    states = {each["name"]: each["state"] for each in told["services"]}
    assert states["gateway"] == states["engine"] == states["watchdog"] == "running"


def test_doctor_is_well_on_a_running_service(stack: Stack) -> None:
    def wrong() -> list[str]:
        machine = ("memory", "disk", "descriptors")
        checks = stack.run("doctor")["checks"]
        told = [f"{c['check']}: {c['found']}" for c in checks if not c["ok"]]
        return [each for each in told if not each.startswith(machine)]

    until = time.monotonic() + 120
    while (found := wrong()) and time.monotonic() < until:  # MLflow and Prefect start last
        time.sleep(2)
    assert found == []


def test_without_a_journal_the_anchor_is_served_under_its_own_name(stack: Stack) -> None:
    """Last of all: the champion's weights and the way back to them are lost."""
    right, engine = stack.ask(), stack.pid("engine")
    with closing(sqlite3.connect(stack.home.state_db)) as state:
        for (name,) in state.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'"):
            state.execute(f"DROP TRIGGER {name}")
        state.execute("UPDATE generations SET delta_hash = 'x' || delta_hash")
        state.commit()
    stack.flip()
    began = time.monotonic()
    os.kill(engine, signal.SIGKILL)
    while stack.ask() is not None:
        time.sleep(0.05)
    seen = stack.seen_until(lambda: stack.ask() is not None)
    print(f"the anchor answers {time.monotonic() - began:.1f} s after the kill")  # noqa: T201
    answer = stack.ask()
    assert answer is not None
    assert answer[0] == short(stack.anchor)
    assert {version for version, _ in seen} <= {short(stack.anchor)}
    assert answer != right
    until = time.monotonic() + 60
    while stack.run("status")["champion"] != stack.anchor and time.monotonic() < until:
        time.sleep(1)
    rows = stack.run("history")
    while rows[0]["state"] != "ROLLED_BACK" and time.monotonic() < until:
        time.sleep(1)
        rows = stack.run("history")
    assert "its weights are lost" in rows[0]["why"]
