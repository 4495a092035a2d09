"""A world without processes: an engine, a gateway and a supervisor as values behind the transports.

Its one law is checked after every step of whoever acts in it: while the gateway admits clients to
an engine that answers, that engine has exactly the weights the gateway names.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import save_file

from agent.home import Home
from agent.learner.noise import Address
from agent.store.weights import Anchor, Parameters, export
from deploy.serving.control import EngineControl, GatewayControl
from deploy.serving.controller import Controller
from deploy.serving.intact import Probes, write_probes
from deploy.serving.lease import Leases
from deploy.serving.served import BLUE, SLOTS, Served, read_served, read_slot, write_served
from deploy.serving.watchdog import Watchdog

LEASE_S = 10.0
PROMPT = ({"role": "user", "content": "?"},)


def answers_of(digest: str) -> dict[int, float]:
    """What weights say: a different table for every digest."""
    return {token: -1.0 - int(digest[token], 16) / 16 for token in range(5)}


class FakeEngine:
    """vLLM's control side, as far as a swap uses it."""

    def __init__(self, weights: str) -> None:
        self.weights = weights
        self.alive = True
        self.paused = False
        self.repacks_head = True
        self.calls: list[str] = []

    def handle(self, request: httpx.Request) -> httpx.Response:
        if not self.alive:
            raise httpx.ConnectError("refused", request=request)
        path = request.url.path
        self.calls.append(path)
        body = json.loads(request.content or b"{}")
        match path:
            case "/pause":
                assert dict(request.url.params) == {"mode": "wait", "clear_cache": "true"}
                self.paused = True
            case "/resume":
                self.paused = False
            case "/is_paused":
                return httpx.Response(200, json={"is_paused": self.paused})
            case "/collective_rpc":
                return self._load(body["args"][0])
            case "/tokenize":
                return httpx.Response(200, json={"tokens": [1, 2]})
            case "/v1/models":
                return httpx.Response(200, json={"data": [{"id": "m"}]})
            case "/v1/completions":
                return self._answer(len(body["prompt"]))
        return httpx.Response(200, json={})

    def _load(self, directory: str) -> httpx.Response:
        assert self.paused, "weights may only change while the engine is paused"
        found = Anchor.open(Path(directory)).digest
        self.weights = found if self.repacks_head else "f" * 64
        return httpx.Response(200, json={"results": [{"digest": found}]})

    def _answer(self, prompts: int) -> httpx.Response:
        assert not self.paused, "a paused engine answers nobody"
        place = {f"token_id:{k}": v for k, v in answers_of(self.weights).items()}
        choices = [{"index": i, "logprobs": {"top_logprobs": [place]}} for i in range(prompts)]
        return httpx.Response(200, json={"choices": choices})


class FakeGateway:
    """The gateway's admin side; it names a version and sends clients to a slot's engine."""

    def __init__(self, version: str, clock: Callable[[], float] = lambda: 0.0) -> None:
        self.version = version
        self.slot = BLUE
        self.clock = clock
        self.trial: tuple[str, str, float] | None = None  # version, slot, end
        self.hold: str | None = None
        self.alive = True
        self.holds = 0
        self.busy = False

    def handle(self, request: httpx.Request) -> httpx.Response:
        if not self.alive:
            raise httpx.ConnectError("refused", request=request)
        body = json.loads(request.content or b"{}")
        match request.url.path:
            case "/hold" if self.busy and body["wait"]:
                return httpx.Response(409, text="1 answers still running")
            case "/hold":
                self.holds += 1
                self.hold = f"hold-{self.holds}"
                return httpx.Response(200, json={"lease": self.hold})
            case "/release":
                return self._release(body)
            case "/flip" if self.hold:
                return httpx.Response(409, text="held")
            case "/flip":
                self._to(body)
            case "/trial":
                until = self.clock() + body["deadline_s"]
                self.trial = (body["version"], Path(body["socket"]).stem, until)
            case "/trial/end":
                self.trial = None
            case "/drain":
                return httpx.Response(200, json={"drained": True})
            case "/state":
                told = {"version": self.version, "held": self.hold is not None}
                return httpx.Response(200, json=told | {"recovering": False})
        return httpx.Response(200, json={})

    def _release(self, body: dict[str, str]) -> httpx.Response:
        if self.hold is None:
            same = body["version"] == self.version
            return httpx.Response(200 if same else 409, json={})
        if body.get("lease", self.hold) != self.hold:
            return httpx.Response(409, text="not your hold")
        self.hold = None
        self._to(body)
        return httpx.Response(200, json={})

    def _to(self, body: dict[str, str]) -> None:
        self.version = body["version"]
        self.slot = Path(body["socket"]).stem if "socket" in body else self.slot


class World:
    """Everything a swap touches. It is its own ``Engines``: a start loads what the files name."""

    def __init__(self, home: Home, old: Served, new: Served, anchor: Anchor) -> None:
        self.home, self.old, self.new, self.anchor = home, old, new, anchor
        write_served(home, old)
        self.engines: dict[str, FakeEngine] = {BLUE: FakeEngine(old.digest)}
        self.now = 1000.0
        self.gateway = FakeGateway(old.digest, lambda: self.now)
        self.records: list[tuple[str, str]] = []
        self.cold_starts = 0
        self.starts_fail = False

    # Engines -----------------------------------------------------------------------------------

    def pid(self, slot: str) -> int | None:
        engine = self.engines.get(slot)
        return id(engine) if engine and engine.alive else None

    def start(self, slot: str) -> None:
        if self.pid(slot) is None:
            if self.starts_fail:
                raise RuntimeError("no memory")
            self.cold_starts += 1
            self.engines[slot] = FakeEngine(read_slot(self.home, slot).digest)

    def stop(self, slot: str) -> None:
        if slot in self.engines:
            self.engines[slot].alive = False

    def restart(self, slot: str, instead_of: int | None) -> None:
        if self.pid(slot) in (None, instead_of) or instead_of is None:
            self.stop(slot)
        self.start(slot)

    # Who acts ----------------------------------------------------------------------------------

    @contextmanager
    def connect(self, slot: str) -> Iterator[EngineControl]:
        """Bound to the engine of now, as a pinned socket is."""
        with EngineControl(httpx.MockTransport(self.engines[slot].handle)) as control:
            yield control

    def controller(self) -> Controller:
        return Controller(
            self.home,
            self.anchor,
            self.record,
            gateway=self.gateway_control(),
            engines=self,
            connect=self.connect,
            lease_s=LEASE_S,
            clock=lambda: self.now,
        )

    def record(self, event: str, digest: str, why: str) -> None:
        self.records.append((event, digest))

    def watchdog(self) -> Watchdog:
        by_socket = {self.home.engine_socket(slot): slot for slot in SLOTS}

        def engine_at(path: Path) -> EngineControl:
            return EngineControl(httpx.MockTransport(self.engines[by_socket[path]].handle))

        return Watchdog(
            self.home,
            engines=self,
            engine_at=engine_at,
            gateway_at=lambda _path: self.gateway_control(),
            clock=lambda: self.now,
        )

    def gateway_control(self) -> GatewayControl:
        return GatewayControl(httpx.MockTransport(lambda request: self.gateway.handle(request)))

    # The law -----------------------------------------------------------------------------------

    def check(self) -> None:
        """No client is ever answered by weights other than those its answer names."""
        engine = self.engines[self.gateway.slot]
        reachable = self.gateway.alive and engine.alive
        admits = self.gateway.hold is None and reachable and not engine.paused
        if admits:
            assert engine.weights == self.gateway.version
        if tried := self.tried():
            assert self.engines[tried[1]].weights == tried[0]

    def tried(self) -> tuple[str, str] | None:
        """The version on trial and its slot, while its time lasts."""
        trial = self.gateway.trial
        return None if trial is None or self.now >= trial[2] else trial[:2]

    def settled(self) -> str:
        """The version served, once everything is open, running and of one mind."""
        served = read_served(self.home)
        engine = self.engines[served.slot]
        assert (self.gateway.slot, self.gateway.version) == (served.slot, served.digest)
        assert engine.alive
        assert not engine.paused
        assert engine.weights == served.digest
        assert self.gateway.hold is None
        assert Leases(self.home).current() is None
        return served.digest


@pytest.fixture(scope="session")
def anchor_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of a few numbers: enough to be preflighted, exported and told apart."""
    folder = tmp_path_factory.mktemp("anchor")
    (folder / "config.json").write_text(json.dumps({"architectures": ["Qwen2ForCausalLM"]}))
    generator = torch.Generator().manual_seed(0)
    tensors = {f"model.layers.{i}.w": torch.randn(4, 3, generator=generator) for i in range(2)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def candidate_dir(anchor_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A candidate of that anchor, as the journal exports it."""
    anchor = Anchor.open(anchor_dir)
    moved = Parameters.zeros(anchor)
    for name, tensor in moved.rendered(Address(1, 0, 0), 0.1):
        moved.delta[name][:] = (tensor - anchor.tensor(name)).reshape(-1).numpy()
    return export(moved, tmp_path_factory.mktemp("weights"))


@pytest.fixture
def make_world(anchor_dir: Path, candidate_dir: Path, tmp_path: Path) -> Callable[[], World]:
    """A fresh world, serving the anchor, with a candidate that may be swapped in."""
    count = iter(range(10_000))

    def make() -> World:
        home = Home.at(tmp_path / f"home-{next(count)}")
        anchor = Anchor.open(anchor_dir)
        old = Served(anchor.digest, str(anchor_dir))
        new = Served(candidate_dir.name, str(candidate_dir))
        for served in (old, new):
            table = ((answers_of(served.digest),),)
            write_probes(home, served.digest, Probes.of([PROMPT], table))
        return World(home, old, new, anchor)

    return make


@pytest.fixture
def world(make_world: Callable[[], World]) -> World:
    return make_world()
