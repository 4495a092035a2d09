"""Both sockets in a process of its own: who may open them, what it writes, how it ends."""

import json
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

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
from agent.sections import GatewaySettings
from agent.store.experience import ExperienceStore

async def engine(request):
    body = json.loads(request.content)
    if "boom" in str(body):
        raise RuntimeError(str(body))
    await asyncio.sleep(0.3)
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "A"}}
    return httpx.Response(200, json={"id": "x", "choices": [choice], "usage": {}})

def verify(task, row, completion):
    raise RuntimeError(str(row) + completion)

home, port = Path(sys.argv[1]), int(sys.argv[2])
app = create_app(
    GatewaySettings(),
    ServedModel("tiny", 4096, frozenset({"gsm8k"})),
    upstream=httpx.MockTransport(engine),
    verify=verify,
    experience=ExperienceStore.open(home / "experience.db"),
    version="a" * 64,
)
serve(app, create_admin(app), host="127.0.0.1", port=port, admin_socket=home / "admin.sock")
"""


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@pytest.fixture
def service(tmp_path: Path, port: int) -> Iterator["subprocess.Popen[bytes]"]:
    log = (tmp_path / "log").open("wb")
    process = subprocess.Popen(
        [sys.executable, "-c", SERVICE, str(tmp_path), str(port)], stderr=log, stdout=log
    )
    until = time.monotonic() + 60
    while True:
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < until
        try:
            httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=5)
            break
        except httpx.TransportError:
            time.sleep(0.05)
    yield process
    process.kill()
    process.wait()
    log.close()


def test_a_service_from_its_first_request_to_its_last(
    service: "subprocess.Popen[bytes]", tmp_path: Path, port: int
) -> None:
    url, admin = f"http://127.0.0.1:{port}", tmp_path / "admin.sock"
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
