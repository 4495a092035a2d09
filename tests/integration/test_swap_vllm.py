"""The swap on a real vLLM server under a real supervisord; the gateway is a transport.

Engines are started cold only where the proof needs it (15 s of one core each): a tied model for all
of it, an untied one for what the head changes, and for all of it in the soak.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from tiny import tiny_model

from agent.config import Settings, load
from agent.errors import UserError
from agent.home import Home
from agent.learner.noise import Address
from agent.store.weights import Anchor, Parameters, export
from deploy import stack
from deploy.serving import swap
from deploy.serving.control import ControlError, EngineControl, GatewayControl, pinned
from deploy.serving.controller import Controller, connect
from deploy.serving.engines import SupervisedEngines
from deploy.serving.intact import TOLERANCE, Probes, difference, read_probes, write_probes
from deploy.serving.lease import LeaseLostError, Leases
from deploy.serving.served import BLUE, Served, read_served
from deploy.serving.watchdog import Watchdog
from deploy.stack import Ports, services
from deploy.supervise import Program, survivors
from flows.lab.families import make_tiny

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

PROMPTS = [[{"role": "user", "content": text}] for text in ("2 + 3", "Is it hot?", "abc " * 40)]
POSITIONS, K = 4, 5
HEADS = ["tied", "untied"]  # only a tied head is packed by itself
KINDS = [*HEADS, "experts"]  # and these are packed for a kernel of their own
either_head = pytest.mark.parametrize("engine", HEADS, indirect=True, scope="module")


def only_the_engine(home: Home, settings: Settings, ports: Ports) -> list[Program]:
    """The stack's own engine service, alone."""
    return [service for service in services(home, settings, ports) if service.name == BLUE]


@dataclass
class DoorKeeper:
    """The gateway's admin side as a transport: it only remembers."""

    version: str
    held: bool = False
    calls: list[str] = field(default_factory=list)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        self.calls.append(path)
        if path == "/hold":
            self.held = True
        if path == "/release":
            self.held = False
            self.version = json.loads(request.content)["version"]
        told = {"lease": "h", "held": self.held, "version": self.version, "recovering": False}
        return httpx.Response(200, json=told)


@dataclass
class Served2:
    """One home with its engine and two versions, each with the answers of a cold engine."""

    home: Home
    anchor: Anchor
    old: Served
    new: Served
    door: DoorKeeper
    records: list[str] = field(default_factory=list)

    def controller(self, lease_s: float = 60.0, connected: Any = None) -> Controller:
        return Controller(
            self.home,
            self.anchor,
            lambda event, _digest, _why: self.records.append(event),
            gateway=GatewayControl(httpx.MockTransport(self.door)),
            engines=SupervisedEngines(self.home),
            connect=connected or (lambda slot: connect(self.home, slot)),
            lease_s=lease_s,
        )

    def to(self, target: Served, **changes: Any) -> swap.SwapOutcome:
        with self.controller(**changes) as controller:
            return swap.run(swap.in_place(read_served(self.home), target), controller.perform)

    def distance(self, digest: str) -> float:
        """How far the engine's answers of now are from the recorded ones of a version."""
        with EngineControl.at(self.home.engine_socket(BLUE)) as engine:
            probes = read_probes(self.home, digest)
            ids = [engine.tokens(prompt) for prompt in probes.prompts]
            return difference(engine, "anchorage", ids, probes)


def record_cold(home: Home, digest: str) -> None:
    """Ask the engine, which was just started with this digest."""
    with EngineControl.at(home.engine_socket(BLUE)) as engine:
        assert engine.served() == "start"
        ids = [engine.tokens(prompt) for prompt in PROMPTS]
        expected = engine.top_logprobs("anchorage", ids, K, POSITIONS)
    write_probes(home, digest, Probes.of(PROMPTS, expected))


@pytest.fixture(
    scope="module", params=KINDS if os.environ.get("ANCHORAGE_SOAK") == "1" else HEADS[:1]
)
def engine(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[Served2]:
    """Cold on the candidate, then cold on the anchor: both recorded, the anchor served."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "experts":
        model = make_tiny(folder / "anchor", "qwen3_moe", tied=False, dtype=torch.float32)
    else:
        model = tiny_model(folder / "anchor", tied=request.param == "tied")
    anchor = Anchor.open(model)
    home = Home.at(folder / "home")
    old = Served(anchor.digest, str(anchor.directory))
    new_dir = export(moved(anchor), home.weights)
    new = Served(new_dir.name, str(new_dir))
    settings = load(model={"path": str(anchor.directory), "max_model_len": 512, "dtype": "float32"})
    try:
        for served in (new, old):
            stack.down(home)
            stack.up(home, settings, served, make=only_the_engine, wait_for=[BLUE])
            record_cold(home, served.digest)
        yield Served2(home, anchor, old, new, DoorKeeper(old.digest))
    finally:
        stack.down(home)
        assert survivors(home) == []


def moved(anchor: Anchor) -> Parameters:
    """A candidate: the anchor and noise a third as large as its weights, so that answers differ."""
    theta = Parameters.zeros(anchor)
    for name, tensor in theta.rendered(Address(7, 0, 0), 0.03):
        theta.delta[name][:] = (tensor - anchor.tensor(name)).reshape(-1).numpy()
    return theta


def test_the_socket_is_private(engine: Served2) -> None:
    path = engine.home.engine_socket(BLUE)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    everywhere = [c for p in survivors(engine.home) for c in p.net_connections("inet")]
    assert {c.laddr.ip for c in everywhere if c.laddr} <= {"127.0.0.1"}  # torch.distributed's own
    for connection in everywhere:
        if connection.status == psutil.CONN_LISTEN:
            with pytest.raises(httpx.HTTPError):
                httpx.get(f"http://127.0.0.1:{connection.laddr.port}/v1/models", timeout=1.0)


@either_head
def test_a_reload_equals_a_cold_start(engine: Served2) -> None:
    """A -> B -> A, each compared with what a cold engine answered."""
    assert engine.distance(engine.old.digest) <= TOLERANCE
    assert engine.distance(engine.new.digest) > 100 * TOLERANCE
    outcome = engine.to(engine.new)
    assert outcome == swap.SwapOutcome(True, engine.new)
    assert engine.distance(engine.new.digest) <= TOLERANCE
    assert engine.door.version == engine.new.digest
    assert engine.to(engine.old).swapped
    assert engine.distance(engine.old.digest) <= TOLERANCE


@either_head
def test_a_head_that_is_not_packed_again_is_found(engine: Served2) -> None:
    """Only a tied model has such a head; the verification fails exactly there."""
    with EngineControl.at(engine.home.engine_socket(BLUE)) as control:
        control.pause(5.0)
        control.rpc("anchorage_load", engine.new.directory, False)
        control.resume()
    tied = not any("lm_head" in name for name in engine.anchor.names)
    assert (engine.distance(engine.new.digest) > TOLERANCE) == tied
    with EngineControl.at(engine.home.engine_socket(BLUE)) as control:
        control.pause(5.0)
        assert control.load(engine.old.directory, 30.0) == engine.old.digest
        control.resume()
    assert engine.distance(engine.old.digest) <= TOLERANCE


def test_a_cached_prefix_does_not_survive_a_swap(engine: Served2) -> None:
    """The long probe is in the prefix cache when the weights change."""
    for target in (engine.new, engine.old, engine.new, engine.old):
        engine.distance(read_served(engine.home).digest)
        assert engine.to(target).swapped
        assert engine.distance(target.digest) <= TOLERANCE


def test_a_bad_directory_is_refused_before_the_pause(engine: Served2, tmp_path: Path) -> None:
    bad = tmp_path / engine.new.digest
    bad.mkdir()
    for file in Path(engine.new.directory).iterdir():
        content = bytearray(file.read_bytes())
        if file.suffix == ".safetensors":
            content[-1] ^= 1
        (bad / file.name).write_bytes(content)
    calls = len(engine.door.calls)
    with pytest.raises(UserError, match="refused"):
        engine.to(Served(engine.new.digest, str(bad)))
    assert engine.door.calls[calls:] == []
    assert engine.distance(engine.old.digest) <= TOLERANCE


def test_an_engine_killed_in_the_load_comes_back_on_the_old_version(engine: Served2) -> None:
    class Dying(EngineControl):
        def load(self, directory: str, timeout_s: float) -> str:
            pid = SupervisedEngines(engine.home).pid(BLUE)
            psutil.Process(pid).kill()
            return super().load(directory, timeout_s)

    @contextmanager
    def dying(slot: str) -> Iterator[EngineControl]:
        with pinned(engine.home.engine_socket(slot)) as path, Dying.at(path) as control:
            yield control

    outcome = engine.to(engine.new, connected=dying)
    assert not outcome.swapped
    assert engine.door.version == engine.old.digest
    assert not engine.door.held
    assert engine.distance(engine.old.digest) <= TOLERANCE
    assert Leases(engine.home).current() is None


CONTROLLER = """
import os, signal, sys
from pathlib import Path
from agent.home import Home
from deploy.serving.control import EngineControl
from deploy.serving.lease import Leases
from deploy.serving.served import BLUE, read_served
import time
home = Home.at(Path(sys.argv[1]))
served = read_served(home)
Leases(home).begin(served, served, lease_s=float(sys.argv[2]), now=time.time())
EngineControl.at(home.engine_socket(BLUE)).pause(5.0)
print("paused", flush=True)
time.sleep(600)
"""


def test_a_controller_killed_in_the_pause_is_replaced_in_time(engine: Served2) -> None:
    """kill -9 between pause and resume: answered again once the lease is over."""
    lease_s = 2.0
    child = subprocess.Popen(
        [sys.executable, "-c", CONTROLLER, str(engine.home.root), str(lease_s)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    with child:
        assert child.stdout.readline() == "paused\n"
        os.kill(child.pid, signal.SIGKILL)
    lease = Leases(engine.home).current()
    assert lease is not None
    with EngineControl.at(engine.home.engine_socket(BLUE)) as control:
        assert control.paused()
        watchdog = Watchdog(
            engine.home,
            engines=SupervisedEngines(engine.home),
            gateway_at=lambda _path: GatewayControl(httpx.MockTransport(engine.door)),
        )
        while not watchdog.tick():
            time.sleep(0.05)
            assert time.time() < lease.deadline + lease_s
        assert not control.paused()
    assert engine.distance(engine.old.digest) <= TOLERANCE


def test_a_late_controller_cannot_reach_a_restarted_engine(engine: Served2) -> None:
    """The socket it holds leads to the process it began with, or nowhere."""
    with connect(engine.home, BLUE) as control:
        assert control.healthy()
        SupervisedEngines(engine.home).restart(BLUE, None)
        with pytest.raises(ControlError):
            control.load(engine.new.directory, 5.0)
    with engine.controller(lease_s=0.5) as controller:

        def slowly(step: swap.Step) -> None:
            time.sleep(0.2)
            controller.perform(step)

        protocol = swap.in_place(engine.old, engine.new)
        with pytest.raises(LeaseLostError):
            swap.run(protocol, slowly)
    Watchdog(
        engine.home,
        engines=SupervisedEngines(engine.home),
        gateway_at=lambda _path: GatewayControl(httpx.MockTransport(engine.door)),
        clock=lambda: time.time() + 5.0,
    ).tick()
    assert engine.distance(engine.old.digest) <= TOLERANCE
