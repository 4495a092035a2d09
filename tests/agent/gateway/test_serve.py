"""Both sockets in a process of its own: who may open them, what it writes, how it ends."""

import contextlib
import json
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from agent.errors import UserError
from agent.gateway.serve import private_socket, public_socket

CANARY = "XYLOPHONE-7351-CANARY"
SERVICE = """
import asyncio, json, sys
from pathlib import Path
import httpx
from agent.gateway.admin import create_admin
from agent.gateway.app import create_app
from agent.gateway.requests import ServedModel
from agent.gateway.serve import serve
from agent.sections_running import GatewaySettings
from agent.store.experience import ExperienceStore

async def engine(request):
    body = json.loads(request.content)
    if "boom" in str(body):
        raise RuntimeError(str(body))
    await asyncio.sleep(0.3)
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "A"}}
    return httpx.Response(200, json={"id": "x", "choices": [choice], "usage": {}})

def verify(answer, row):
    raise RuntimeError(str(row) + answer.completion)

home, port = Path(sys.argv[1]), int(sys.argv[2])
SETTINGS = GatewaySettings(**json.loads(sys.argv[3]))
app = create_app(
    SETTINGS,
    ServedModel("tiny", 4096, frozenset({"gsm8k"})),
    upstream=httpx.MockTransport(engine),
    verify=verify,
    experience=ExperienceStore.open(home / "experience.db"),
    version="a" * 64,
)
serve(app, create_admin(app), SETTINGS, port=port, admin_socket=home / "admin.sock")
"""


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@contextlib.contextmanager
def running_service(
    folder: Path, port: int, descriptors: int | None = None, **settings: Any
) -> "Iterator[subprocess.Popen[bytes]]":
    """A gateway's process once it answers; descriptors: its hard limit of open files."""
    limit = [] if descriptors is None else ["prlimit", f"--nofile={descriptors // 2}:{descriptors}"]
    command = [*limit, sys.executable, "-c", SERVICE, str(folder), str(port), json.dumps(settings)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stderr=log, stdout=log)
    try:
        until = time.monotonic() + 60
        while not answers(port):
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < until
            time.sleep(0.05)
        yield process
    finally:
        process.kill()
        process.wait()


def answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=10).status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture
def service(tmp_path: Path, port: int) -> "Iterator[subprocess.Popen[bytes]]":
    with running_service(tmp_path, port, 300) as process:
        yield process


def crowd_out(port: int, clients: int) -> None:
    """Half-open requests, more than the process may have files: others are answered throughout."""
    with contextlib.ExitStack() as stack:
        for number in range(clients):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
            sock.sendall(b"GET /h")
            if number % (clients // 20) == 0:
                assert answers(port)
        assert all(answers(port) for _ in range(20))


@pytest.mark.proof
def test_1100_half_open_connections_at_1024_descriptors_keep_no_one_out(
    tmp_path: Path, port: int
) -> None:
    with running_service(tmp_path, port, 1024):
        crowd_out(port, 1100)
    assert "Too many open files" not in (tmp_path / "log").read_text()


def test_a_service_from_its_first_request_to_its_last(
    service: "subprocess.Popen[bytes]", tmp_path: Path, port: int
) -> None:
    url, admin = f"http://127.0.0.1:{port}", tmp_path / "admin.sock"
    crowd_out(port, 330)
    assert stat.S_IMODE(admin.stat().st_mode) == 0o600
    with pytest.raises(UserError, match="is in use"):
        private_socket(admin)
    with pytest.raises(UserError, match="cannot be bound"):
        public_socket("127.0.0.1", port)
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": CANARY}],
        "metadata": {"task": "gsm8k", "example": json.dumps({"q": CANARY})},
    }
    with httpx.Client(base_url=url, timeout=20) as client:
        client.get("/" + CANARY, params={"q": CANARY})
        assert client.post("/v1/chat/completions", json=body).status_code == 200
        boom = body | {"messages": [{"role": "user", "content": CANARY + " boom"}]}
        assert client.post("/v1/chat/completions", json=boom).status_code == 500
    with httpx.Client(
        transport=httpx.HTTPTransport(uds=str(admin)), base_url="http://a"
    ) as control:
        assert control.get("/state").json()["in_flight"] == 0
    service.send_signal(signal.SIGTERM)
    assert service.wait(timeout=30) == 0
    assert not admin.exists()
    log = (tmp_path / "log").read_text()
    assert CANARY not in log
    events = [json.loads(line) for line in log.splitlines()]
    requests = [
        e for e in events if e["event"] == "request" and e["endpoint"] == "chat.completions"
    ]
    assert [e["status"] for e in requests] == [200, 500]
    assert {"time", "level", "request_id", "ms", "principal"} <= requests[0].keys()


def test_a_dead_process_leaves_a_socket_that_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(path))
    dead.close()
    sock = private_socket(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    sock.close()
