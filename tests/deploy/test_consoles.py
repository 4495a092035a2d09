"""Who is let in to MLflow's and Prefect's servers: hosts, origins, secrets, reviews; then both."""

import asyncio
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from agent.errors import UserError
from agent.home import Home, secret
from agent.review import REVIEW
from deploy.consoles import USER, HostGuard, reviewed, reviews, sign, signer
from deploy.stack import choose_ports, client_environment
from deploy.supervise import Probe, answers


def asked(*headers: tuple[bytes, bytes], kind: str = "http") -> list[Any]:
    """What a guard with an application behind it sends for a request with these headers."""
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send("the application")

    async def receive() -> None:
        return None

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(HostGuard(app)({"type": kind, "headers": list(headers)}, receive, send))
    return sent


@pytest.mark.parametrize("host", [b"127.0.0.1:4200", b"localhost:9", b"[::1]:4200", b"LOCALHOST"])
def test_a_door_admits_this_machine_and_its_own_pages(host: bytes) -> None:
    assert asked((b"host", host)) == ["the application"]
    assert asked((b"host", host), (b"origin", b"http://" + host)) == ["the application"]
    assert asked((b"host", host), kind="websocket") == ["the application"]


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"host", b"evil.example:4200")],
        [(b"host", b"127.0.0.1.evil.example")],
        [(b"host", b"evil@localhost.example")],
        [(b"host", b"[::1")],
        [(b"host", b"")],
        [(b"host", b"localhost"), (b"host", b"evil.example")],
        [(b"host", b"localhost:1"), (b"origin", b"http://evil.example")],
        [(b"host", b"localhost:1"), (b"origin", b"http://localhost:2")],
        [(b"host", b"localhost:1"), (b"origin", b"http://127.0.0.1:1")],
        [(b"host", b"localhost:1"), (b"origin", b"null")],
        [(b"host", b"localhost:1"), (b"origin", b"")],
        [(b"host", b"localhost:1"), (b"authorization", b"Bearer x")],
    ],
)
def test_a_door_refuses_other_hosts_and_origins(headers: list[tuple[bytes, bytes]]) -> None:
    assert asked(*headers)[0]["status"] == 403
    assert asked(*headers, kind="websocket") == [{"type": "websocket.close", "code": 1008}]


def test_a_secret_is_made_once_for_its_owner_only(tmp_path: Path) -> None:
    path, found = tmp_path / "password", set()
    threads = [threading.Thread(target=lambda: found.add(secret(path))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {path.read_text()}
    assert len(path.read_text()) == 64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert {each.name for each in tmp_path.iterdir()} == {"password", "password.sha256"}


def test_a_damaged_secret_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "salt"
    kept = secret(path)
    path.write_text(f"{'1' if kept[0] == '0' else '0'}{kept[1:]}")
    with pytest.raises(UserError, match="is damaged"):
        secret(path)
    path.write_text(kept)
    assert secret(path) == kept


TAG, ALIAS = "/api/2.0/mlflow/model-versions/set-tag", "/api/2.0/mlflow/registered-models/alias"


@pytest.mark.parametrize(
    ("path", "body", "act"),
    [
        (TAG, {"name": "a", "version": "3", "key": REVIEW, "value": "approve"}, "3 approve"),
        (f"/ajax{TAG}", {"version": "3", "key": REVIEW, "value": "reject"}, "3 reject"),
        (ALIAS, {"name": "a", "alias": "champion", "version": "2"}, "2 champion"),
        (TAG, {"version": "3", "key": REVIEW, "value": "Approved"}, "3 approve"),
        (TAG, {"version": "3", "key": REVIEW, "value": "maybe"}, "3 maybe"),
        (TAG, {"version": "3", "key": "Approval_Check", "value": "Approved"}, "3 approve"),
        (TAG, {"version": "3", "key": "approval_notes", "value": "looks fine"}, None),
        (TAG, {"version": "3", "key": "note", "value": "approve"}, None),
        (ALIAS, {"alias": "challenger", "version": "2"}, None),
        ("/api/2.0/mlflow/runs/set-tag", {"key": REVIEW, "value": "approve"}, None),
        (TAG, ["approve"], None),
        (TAG, None, None),
    ],
)
def test_which_requests_are_reviews(path: str, body: object, act: str | None) -> None:
    assert reviewed(path, body) == act


def test_a_review_has_its_signers_name_or_nobodys(tmp_path: Path) -> None:
    home = Home(tmp_path)
    assert signer(home, "3", "approve", wait_s=0.0) is None
    sign(home, "3 approve", "ann")
    assert signer(home, "3", "approve") == "ann"
    assert signer(home, "3", "reject", wait_s=0.0) is None
    assert signer(home, "4", "approve", wait_s=0.0) is None
    assert signer(home, "3", "approve", wait_s=0.0, since=time.time() + 1) is None


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Home, dict[str, str]]]:
    """Both servers of a home, and their addresses."""
    from agent.config import load

    home = Home.at(tmp_path_factory.mktemp("consoles") / "home")
    ports = choose_ports(load())
    environment = os.environ | client_environment(home, load(), ports)
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "deploy.consoles", name, str(home.root), str(port)],
            env=environment,
        )
        for name, port in (("mlflow", ports.mlflow), ("prefect", ports.prefect))
    ]
    urls = {"mlflow": environment["MLFLOW_TRACKING_URI"], "prefect": environment["PREFECT_API_URL"]}
    try:
        waiting = [f"{urls['mlflow']}/health", f"{urls['prefect']}/health"]
        until = time.monotonic() + 120
        while not all(answers(Probe(url)) for url in waiting):
            assert time.monotonic() < until
            time.sleep(0.2)
        yield home, urls
    finally:
        for process in started:
            process.terminate()
            process.wait()


WRITES = {
    "mlflow": "/api/2.0/mlflow/registered-models/create",
    "prefect": "/flows/",
}


@pytest.mark.integration
@pytest.mark.parametrize("name", ["mlflow", "prefect"])
def test_nothing_is_written_without_the_password_or_from_elsewhere(
    servers: tuple[Home, dict[str, str]], name: str
) -> None:
    home, urls = servers
    url, body = f"{urls[name]}{WRITES[name]}", {"name": "a name"}
    owner = (USER, (home.root / "password").read_text())
    refused: list[dict[str, Any]] = [
        {},
        {"auth": (USER, "guessed")},
        {"auth": ("admin", owner[1])},
        {"headers": {"Authorization": "Bearer anchorage"}},
        {"auth": owner, "headers": {"Host": "evil.example"}},
        {"auth": owner, "headers": {"Origin": "http://evil.example"}},
        {"auth": owner, "headers": {"Origin": "http://localhost:1"}},
    ]
    assert [httpx.post(url, json=body, **each).status_code for each in refused] == [
        *[401] * 3,
        *[403] * 4,
    ]
    assert httpx.post(url, json=body, auth=owner).status_code in (200, 201)
    preflight = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    reply = httpx.options(url, headers=preflight)
    assert "access-control-allow-origin" not in reply.headers


@pytest.mark.integration
def test_mlflow_says_who_reviewed_and_only_who_may(servers: tuple[Home, dict[str, str]]) -> None:
    """The owner makes a user; what that user is forbidden leaves no name behind."""
    home, urls = servers
    owner = (USER, (home.root / "password").read_text())
    api = f"{urls['mlflow']}/api/2.0/mlflow"
    with httpx.Client(auth=owner) as client:
        client.post(f"{api}/registered-models/create", json={"name": "m"}).raise_for_status()
        made = client.post(
            f"{api}/model-versions/create", json={"name": "m", "source": "s3://bucket/m"}
        )
        assert made.status_code == 200, made.text
        version = made.json()["model_version"]["version"]
        user = {"username": "grace", "password": "a long password"}
        client.post(f"{api}/users/create", json=user).raise_for_status()
    tag = {"name": "m", "version": version, "key": REVIEW, "value": "approve"}
    url, grace = f"{api}/model-versions/set-tag", (user["username"], user["password"])
    assert httpx.post(url, json=tag, auth=grace).status_code == 403
    assert httpx.post(url, json=tag).status_code == 401
    assert reviews(home) == {}
    assert httpx.post(url, json=tag, auth=owner).status_code == 200
    assert signer(home, version, "approve") == USER
    reject = tag | {"value": "reject"}
    with httpx.Client(auth=owner) as client:
        grant = {"username": "grace", "permission": "MANAGE"}
        grant |= {"resource_type": "registered_model", "resource_id": "m"}
        path = "/api/3.0/mlflow/users/permissions/grant"
        allowed = client.post(f"{urls['mlflow']}{path}", json=grant)
    assert allowed.status_code == 200, allowed.text
    assert httpx.post(url, json=reject, auth=grace).status_code == 200
    assert signer(home, version, "reject") == "grace"
    assert home.password.stat().st_mode & 0o077 == 0
