"""Trials under traffic: the real gateway process, engines that cost nothing on its two sockets."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from anchors import candidate_of, made_by_a_round, tiny_anchor

from agent.config import Settings
from agent.gateway.hold import CandidateTrial, Route
from agent.gateway.keys import LOCAL
from agent.home import Home
from deploy.serving.control import ControlError, GatewayControl
from deploy.serving.intact import Probes, write_probes
from deploy.serving.served import BLUE, GREEN, Served, read_served, write_served, write_slot
from flows.serve.promote import promote
from flows.serve.swaps import terms
from flows.serve.trial import judge_trial
from flows.service import Service
from flows.session import Session
from flows.show.terminal import Silent

pytestmark = pytest.mark.proof

CLIENTS, TRIED = 8, 40
ROW = {"question": "Tom has 3 pens and buys 4. How many?", "answer": "3+4=7\n#### 7"}


class Handler(BaseHTTPRequestHandler):
    """vLLM's server, as far as a trial and a client use it."""

    protocol_version = "HTTP/1.1"
    server: "Engine"

    def do_GET(self) -> None:
        self._say(self.server.told(self.path, {}))

    def do_POST(self) -> None:
        length = int(self.headers["content-length"] or 0)
        self._say(self.server.told(self.path, json.loads(self.rfile.read(length) or b"{}")))

    def _say(self, told: object) -> None:
        body = json.dumps(told).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing is logged."""


class Engine(ThreadingHTTPServer):
    """An engine with weights; its answer to every client is ``answer``."""

    address_family = socket.AF_UNIX
    daemon_threads = True

    def __init__(self, path: Path, digest: str, answer: str) -> None:
        self.digest, self.answer = digest, answer
        path.unlink(missing_ok=True)
        super().__init__(str(path), Handler)  # type: ignore[arg-type]
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def server_bind(self) -> None:
        self.socket.bind(self.server_address)

    def told(self, path: str, body: dict[str, Any]) -> object:
        if path.startswith("/v1/chat"):
            message = {"role": "assistant", "content": self.answer}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            return {"id": "x", "choices": [choice], "usage": {}}
        if path.startswith("/v1/completions"):
            top = {f"token_id:{key}": value for key, value in table(self.digest).items()}
            count = range(len(body["prompt"]))
            return {"choices": [{"index": n, "logprobs": {"top_logprobs": [top]}} for n in count]}
        models = {"data": [{"id": "m", "root": self.digest}]}
        return {"/tokenize": {"tokens": [1]}, "/v1/models": models}.get(path, {})


def table(digest: str) -> dict[int, float]:
    return {token: -1.0 - int(digest[token], 16) / 16 for token in range(5)}


class Engines:
    """The ``Engines`` of this home: the second one runs, and notes that it was ended."""

    def __init__(self, running: Callable[[str], int | None]) -> None:
        self.stopped: list[str] = []
        self._running = running

    def pid(self, slot: str) -> int | None:
        return self._running(slot)

    def start(self, slot: str) -> None:
        raise AssertionError("it runs already")

    def stop(self, slot: str) -> None:
        self.stopped.append(slot)

    def restart(self, slot: str, instead_of: int | None) -> None:
        raise AssertionError("nothing is restarted")


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Session, int, Engine]]:
    """A home with a candidate that passed, its gateway and both engines."""
    root = tmp_path_factory.mktemp("t")
    anchor = tiny_anchor(root / "anchor")
    home = Home.at(root / "h")
    home.sockets.mkdir(mode=0o700)
    (home.root / "salt").write_text("a salt of tests")
    rows = root / "rows" / "gsm8k" / "train.jsonl"
    rows.parent.mkdir(parents=True)
    rows.write_text(json.dumps(ROW | {"question": "Ann has 1 pen. How many?"}) + "\n")
    chosen = {
        "model": {"path": str(anchor.directory)},
        "review": {"mode": "auto"},
        "engines": {"swap": "canary"},
        "baking": {"rows": TRIED, "window": 200},
        "tasks": {"data_dir": str(root / "rows"), "priors": []},
    }
    home.settings_json.write_text(Settings.model_validate(chosen).model_dump_json())
    service = Service.at(home.root)
    digest = candidate_of(anchor, 1, home.weights)
    made_by_a_round(service, digest, 1)
    for state in ("PROPOSED", "EVALUATED", "PASSED"):
        service.record(digest, state, "a test")
    for each in (anchor.digest, digest):
        write_probes(home, each, Probes.of([({"role": "user", "content": "?"},)], [[table(each)]]))
    write_served(home, Served(anchor.digest, str(anchor.directory)))
    write_slot(home, Served(digest, str(home.weights / digest), GREEN))
    old = Engine(home.engine_socket(BLUE), anchor.digest, "#### 7")
    new = Engine(home.engine_socket(GREEN), digest, "#### 8")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    argv = [sys.executable, "-m", "flows.cli", "service", "gateway", "--home", str(home.root)]
    gateway = subprocess.Popen([*argv, "--port", str(port)], env={**os.environ})
    try:
        until = time.monotonic() + 120
        while not answering(home):
            assert time.monotonic() < until
            time.sleep(0.05)
        yield Session(service, Silent()), port, new
    finally:
        gateway.terminate()
        gateway.wait()
        for engine in (old, new):
            engine.shutdown()
            engine.server_close()


def answering(home: Home) -> bool:
    try:
        with GatewayControl.at(home.admin_socket) as gateway:
            return bool(gateway.state()["version"])
    except ControlError:
        return False


@contextmanager
def visiting(port: int, name: str) -> Iterator[list[tuple[str, str, int]]]:
    """Clients with sessions of two requests: (session, version, status) of each."""
    stop, seen = threading.Event(), list[tuple[str, str, int]]()

    def client(number: int) -> None:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
            for count in range(100_000):
                if stop.is_set():
                    return
                about = {"task": "gsm8k", "example": json.dumps(ROW)}
                about["session_id"] = f"{name}-{number}-{count}"
                body = {"model": "anchorage", "messages": [{"role": "user", "content": "?"}]}
                for _ in range(2):
                    reply = http.post("/v1/chat/completions", json=body | {"metadata": about})
                    version = reply.headers.get("x-model-version", "")
                    seen.append((about["session_id"], version, reply.status_code))

    with ThreadPoolExecutor(CLIENTS) as pool:
        threads = [pool.submit(client, number) for number in range(CLIENTS)]
        try:
            yield seen
        finally:
            stop.set()
            for each in threads:
                each.result()


def warm(service: Service, port: int) -> None:
    """One verdict: the first loads the rows, and many at once would time out."""
    about = {"task": "gsm8k", "example": json.dumps(ROW)}
    body = {"model": "anchorage", "messages": [{"role": "user", "content": "?"}]}
    while not service.experience.earned(service.champion()):
        httpx.post(
            f"http://127.0.0.1:{port}/v1/chat/completions", json=body | {"metadata": about}
        ).raise_for_status()
        time.sleep(1.0)


def settled(session: Session, engines: Engines, seen: list[tuple[str, str, int]]) -> int:
    """Judge until the trial is over; how many answers had come when the last look began."""
    came, until = 0, time.monotonic() + 60
    while (entry := session.service.ledger.unsettled()) and entry.state == "CANARY":
        assert time.monotonic() < until
        came = len(seen)
        judge_trial(session, entry, engines)
        time.sleep(0.2)
    return came


def of_trial(service: Service, digest: str) -> Callable[[str], str]:
    """Which version answers a session while this candidate is on trial, by the gateway's rule."""
    asked = terms(service)
    route = Route(digest, None)  # type: ignore[arg-type]
    trial = CandidateTrial(route, asked.share, asked.shadow, asked.salt, 0.0)
    old = service.champion()
    return lambda name: (digest if trial.takes(f"{LOCAL.owner}\0{name}") else old)[:12]


def test_a_share_of_sessions_decides_and_everything_or_nothing_follows(
    session: tuple[Session, int, Engine],
) -> None:
    """Eight clients: a bad candidate is withdrawn, a good one swapped in, nobody is failed."""
    opened, port, candidate = session
    service, home = opened.service, opened.service.home
    old, new = service.champion(), candidate.digest
    engines = Engines(lambda slot: os.getpid())
    warm(service, port)
    with visiting(port, "bad") as bad:
        while len(service.experience.earned(old)) < 100:
            time.sleep(0.1)
        assert promote(opened, new).state == "CANARY"
        assert (read_served(home).digest, service.champion()) == (old, old)
        settled(opened, engines, bad)
    assert service.ledger.state(new) == "ROLLED_BACK", service.ledger.of(new)[-2:]
    assert "worse on trial: reward 1.000 -> 0.000" in service.ledger.of(new)[-1].why
    assert engines.stopped == [GREEN]
    candidate.answer = "#### 7"
    expected = of_trial(service, new)
    with visiting(port, "good") as good:
        assert promote(opened, new).state == "CANARY"
        begun = len(good) + CLIENTS  # each client may have had a request under way
        over = settled(opened, engines, good)
        before = len(good)
        while len(good) < before + 4 * CLIENTS:
            time.sleep(0.02)
    assert service.ledger.state(new) == "BAKING"
    assert (read_served(home).digest, read_served(home).slot) == (new, GREEN)
    assert {status for _, _, status in (*bad, *good)} == {200}
    assert {version for _, version, _ in good[before + 2 * CLIENTS :]} == {new[:12]}
    trial = good[begun:over]
    assert {version for _, version, _ in trial} == {old[:12], new[:12]}
    assert [version for _, version, _ in trial] == [expected(name) for name, _, _ in trial]
