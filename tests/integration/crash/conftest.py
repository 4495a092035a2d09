"""A home that serves: the real gateway, watchdog and watch, on an engine that costs nothing.

Whoever runs by itself in a deployment runs here as its own process; only controllers come and go.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from anchors import candidate_of, tiny_anchor

from agent.config import Settings
from agent.home import Home
from deploy.serving.control import ControlError, EngineControl, GatewayControl
from deploy.serving.intact import Probes, write_probes
from deploy.serving.lease import Leases
from deploy.serving.served import BLUE, Served, read_served, write_served
from flows.service import Service

HERE = Path(__file__).parent
LEASE_S = 2.0
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_OFFLINE": "1",
    "PYTHONWARNINGS": "ignore",
}


class Controllers:
    """The process that forks one controller per command."""

    def __init__(self, home: Home) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "controller.py"), str(home.root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=ENVIRONMENT,
            text=True,
        )
        assert self._told() == {"ready": True}

    def begin(self, **command: Any) -> int:
        """Start an act; the controller's process id."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return int(self._told()["pid"])

    def end(self) -> dict[str, Any]:
        """How it ended: what it returned, its error, or the signal that killed it."""
        told = self._told()
        if "exit" in told:
            return {"signal": told["exit"]}
        assert self._told() == {"exit": 0}
        return told

    def act(self, **command: Any) -> dict[str, Any]:
        self.begin(**command)
        return self.end()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _told(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        told: dict[str, Any] = json.loads(self._process.stdout.readline())
        return told


@dataclass
class Stack:
    """The home, its parts, and everything that runs by itself in it."""

    home: Home
    digests: list[str]  # the original model, then the candidates
    port: int
    _engine: subprocess.Popen[bytes] | None = None
    _others: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _ended: bool = False

    def start(self) -> None:
        self._platform = threading.Thread(target=self._keep_engine, daemon=True)
        self._platform.start()
        own = [sys.executable, "-m"]
        watch = "import sys; from pathlib import Path; from flows import deployments, service; "
        watch += "deployments.watch(service.Service.at(Path(sys.argv[1])))"
        root = str(self.home.root)
        for argv in (
            [*own, "flows.cli", "service", "gateway", "--home", root, "--port", str(self.port)],
            [*own, "deploy.serving.watchdog", root],
            [sys.executable, "-c", watch, root],
        ):
            log = (self.home.root / f"{len(self._others)}.log").open("wb")
            with log:
                self._others.append(subprocess.Popen(argv, env=ENVIRONMENT, stdout=log, stderr=log))
        self.until(lambda: self.gateway() is not None, 300.0)

    def stop(self) -> None:
        self._ended = True
        for process in (*self._others, self._engine):
            if process is not None:
                process.kill()
                process.wait()
        self._platform.join()

    def kill_engine(self) -> None:
        assert self._engine is not None
        self._engine.kill()

    def _keep_engine(self) -> None:
        """A container platform: an engine that ends is started again."""
        argv = [HERE / "engine.py", self.home.root, self.home.engine_socket(BLUE), self.digests[0]]
        while not self._ended:
            self._engine = subprocess.Popen([sys.executable, "-SE", *map(str, argv)])
            self._engine.wait()

    # What is true now -------------------------------------------------------------------------

    def engine(self) -> str | None:
        """What the engine's weights are."""
        try:
            with EngineControl.at(self.home.engine_socket(BLUE)) as engine:
                asked = engine._ask("POST", "/v1/chat/completions", {})
                told = asked["choices"][0]["message"]["content"]
                return None if engine.paused() else told.partition("\n")[0]
        except ControlError:
            return None

    def gateway(self) -> str | None:
        """The version it stamps; None while it is held."""
        try:
            with GatewayControl.at(self.home.admin_socket) as gateway:
                state = gateway.state()
                return None if state["held"] else state["version"]
        except ControlError:
            return None

    def more(self, controllers: Controllers, count: int, verdict: str = "PASSED") -> list[str]:
        """New candidates of this home at that state, as rounds would make them."""
        first = len(self.digests)
        with opened(self.home) as service:
            made = candidates(service, range(first, first + count), verdict)
        told = controllers.act(act="register", digests=made)
        assert told.get("ended") == {}, told
        self.digests.extend(made)
        return made

    def truth(self, service: Service) -> dict[str, Any]:
        """Everything that has to be the same digest, and that nothing is under way."""
        alias = service.registry.aliases().get("champion")
        unsettled = service.ledger.unsettled()
        return {
            "ledger": service.ledger.champion(),
            "chosen": read_served(self.home).digest,
            "engine": self.engine(),
            "gateway": self.gateway(),
            "alias": alias and alias.digest,
            "lease": Leases(self.home).current() is not None,
            "open": unsettled and unsettled.state,
        }

    def settled(self, service: Service, on: str | None = None, within_s: float = 300.0) -> str:
        """The one digest (``on``) all agree on, once they do; nobody acts meanwhile."""

        def agree() -> bool:
            told = self.truth(service)
            names = ("ledger", "chosen", "engine", "gateway", "alias")
            one = len({told[name] for name in names}) == 1
            there = on in (None, told["ledger"])
            return one and there and not told["lease"] and told["open"] is None

        try:
            self.until(agree, within_s)
        except TimeoutError:
            raise AssertionError(f"no agreement: {self.truth(service)}") from None
        return str(service.ledger.champion())

    def ask(self, **more: Any) -> tuple[str, str]:
        """A client's request: the version it is told, and the weights that answered."""
        reply = httpx.post(
            f"http://127.0.0.1:{self.port}/v1/chat/completions",
            json={"model": "anchorage", "messages": [{"role": "user", "content": "?"}], **more},
            timeout=30,
        )
        if reply.status_code != 200:
            return "", ""
        content = reply.json()["choices"][0]["message"]["content"]
        return reply.headers["x-model-version"], content[:12]

    def until(self, true: Callable[[], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not true():
            if time.monotonic() > end:
                raise TimeoutError
            time.sleep(0.05)


@contextmanager
def opened(home: Home) -> Iterator[Service]:
    """The parts of a home; what was opened of its databases is closed with the block."""
    service = Service.at(home.root)
    try:
        yield service
    finally:
        for name in {"ledger", "journal"} & service.__dict__.keys():  # opened at their first use
            getattr(service, name).close()


def judged(service: Service, digest: str, number: int, verdict: str) -> None:
    """A round that made the digest, and what the gate said of it so far."""
    run = f"{number:04d}-gsm8k"
    service.journal.open_run(
        run,
        anchor_digest=service.origin.digest,
        parent_digest=service.champion(),
        target="gsm8k",
        run_seed=number,
        plan={},
        now=float(number),
    )
    service.journal.finish(run, digest, "a test", float(number))
    states = ("PROPOSED", "EVALUATED", "PASSED")
    for state in states[: 1 + states.index(verdict)]:
        service.record(digest, state, "a test")


def candidates(service: Service, numbers: Sequence[int], verdict: str) -> list[str]:
    """Candidates at that state, which a cold engine has answered for."""
    made = [candidate_of(service.origin, number, service.home.weights) for number in numbers]
    for digest, number in zip(made, numbers, strict=True):
        judged(service, digest, number, verdict)
        probed(service.home, digest)
    return made


def probed(home: Home, digest: str) -> None:
    """What a cold engine answers with these weights (see engine.py)."""
    prompt = ({"role": "user", "content": "?"},)
    table = {token: -1.0 - int(digest[token], 16) / 16 for token in range(5)}
    write_probes(home, digest, Probes.of([prompt], [[table]]))


def home_with(
    root: Path, count: int, baking: dict[str, Any], url: str | None
) -> tuple[Home, list[str]]:
    """A home whose original model is served, with candidates that passed the gate.

    ``url``: a PostgreSQL server for journal, ledger and traffic; None: files of the home.
    """
    anchor = tiny_anchor(root / "anchor")
    home = Home.at(root / "h")
    home.sockets.mkdir(mode=0o700)
    rows = root / "rows" / "gsm8k" / "train.jsonl"
    rows.parent.mkdir(parents=True)
    row = {"question": "Ann has 2 pens and buys 1. How many?", "answer": "2+1=3\n#### 3"}
    rows.write_text(json.dumps(row) + "\n")
    settings = Settings.model_validate(
        {
            "model": {"path": str(anchor.directory)},
            "review": {"mode": "auto"},
            "engines": {"swap_deadline_s": LEASE_S},
            "baking": baking,
            "tasks": {"data_dir": str(root / "rows")},
            "projection": {"reconcile_seconds": 0.25},
            "state": {"url": url},
        }
    )
    home.settings_json.write_text(settings.model_dump_json())
    with opened(home) as service:
        digests = [service.champion()]
        probed(home, digests[0])
        digests += candidates(service, range(1, 1 + count), "PASSED")
    write_served(home, Served(digests[0], str(anchor.directory)))
    return home, digests


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def make_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Any]]:
    """``make_stack(candidates)``: a home that serves, one that promotes in it, and its parts."""
    open_: list[Any] = []

    def make(
        candidates: int, url: str | None = None, **baking: Any
    ) -> tuple[Stack, Controllers, Service]:
        root = tmp_path_factory.mktemp("c")
        home, digests = home_with(root, candidates, baking or {"minutes": 0}, url)
        controllers = Controllers(home)
        told = controllers.act(act="register", digests=digests)
        assert told.get("ended") == {}, told
        stack = Stack(home, digests, free_port())
        open_.extend((stack, controllers, root))
        stack.start()
        return stack, controllers, services.enter_context(opened(home))

    with ExitStack() as services:
        yield make
    for each in open_:
        if isinstance(each, Stack):
            each.stop()
        elif isinstance(each, Controllers):
            each.close()
        else:
            shutil.rmtree(each)
