"""A home whose MLflow and Prefect are a team's: both by URL, with passwords of their own.

The servers are those of compose's profile, by its own entrypoints.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from agent.home import Home
from deploy.supervise import Probe, answers
from flows.commands.runs import improve_now
from flows.serve.stack import start, state, stop
from flows.service import Service
from flows.show.catch_up import shown_within
from flows.show.terminal import Silent

pytestmark = pytest.mark.integration

COMPOSE = Path(__file__).parents[2] / "deploy" / "compose" / "compose.yaml"
MLFLOW, PREFECT = ("admin", "a-password-of-a-team"), ("team", "another-of-a-team")
SECRETS = {
    "MLFLOW_TRACKING_PASSWORD": MLFLOW[1],
    "PREFECT_API_AUTH_STRING": ":".join(PREFECT),
    "MLFLOW_FLASK_SERVER_SECRET_KEY": "of-pages",
}
QUICK: dict[str, Any] = {
    "learner": {"generations": 1, "population": 2, "prompts": 8},
    "tasks": {"rows": 16, "curve_every": 0, "kl_rows": 0, "priors": ["piqa"]},
    "gate": {"confirm": False},
}


class Server:
    """One of compose's two servers, in a folder and at a port of this machine."""

    def __init__(self, name: str, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self._folder, self._name = f"http://127.0.0.1:{self.port}", folder, name
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir()

    def start(self) -> None:
        service = yaml.safe_load(COMPOSE.read_text())["services"][self._name]
        command = [
            f"--port={self.port}"
            if word.startswith("--port=")
            else word.replace("0.0.0.0", "127.0.0.1")
            for word in service["entrypoint"]
        ]
        given = {
            name: SECRETS.get(value.removeprefix("${").removesuffix(":-}"), value)
            for name, value in service["environment"].items()
        }
        given |= {"PREFECT_HOME": str(self._folder)} if "PREFECT_HOME" in given else {}
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *command],
                env=os.environ | given,
                cwd=self._folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        health = "/health" if self._name == "mlflow" else "/api/health"
        wait(lambda: answers(Probe(self.url + health)))

    def kill(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def ask(self, path: str, body: object = None) -> Any:
        """A request as the team signs in; None where it is refused or not there."""
        auth, method = (MLFLOW if self._name == "mlflow" else PREFECT), "POST" if body else "GET"
        reply = httpx.request(method, self.url + path, json=body, auth=auth, timeout=60)
        return reply.json() if reply.is_success else None

    def versions(self) -> dict[str, dict[str, str]]:
        """The tags of every version of our model, by digest."""
        found = self.ask("/api/2.0/mlflow/model-versions/search?max_results=100") or {}
        tags = [
            {tag["key"]: tag["value"] for tag in each.get("tags", ())}
            for each in found.get("model_versions", ())
        ]
        return {each["anchorage.digest"]: each for each in tags if "anchorage.digest" in each}


def wait(ready: Callable[[], object], timeout_s: float = 240.0) -> None:
    until = time.monotonic() + timeout_s
    while not ready():
        assert time.monotonic() < until
        time.sleep(0.5)


@pytest.fixture
def servers(
    tmp_path: Path, scale: Callable[[int, int], int], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Server, Server]]:
    """MLflow's and Prefect's; this process's environment signs in to both, as `up`'s does."""
    if scale(0, 1) == 0:  # the rules have unit tests: tests/deploy/test_foreign_servers.py
        pytest.skip("two servers and a stack: in the soak")
    pair = Server("mlflow", tmp_path / "mlflow"), Server("prefect", tmp_path / "prefect")
    try:
        for each in pair:
            each.start()
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", MLFLOW[0])
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", MLFLOW[1])
        monkeypatch.setenv("PREFECT_API_AUTH_STRING", ":".join(PREFECT))
        yield pair
    finally:
        for each in pair:
            each.kill()


def up(root: Path, mlflow: str, prefect: str) -> dict[str, Any]:
    plan = {"mlflow_url": mlflow, "prefect_api_url": prefect, "reconcile_seconds": 2.0}
    return start(root, None, None, None, Silent(), projection=plan, **QUICK)


def flows_process(status: dict[str, Any]) -> psutil.Process:
    return psutil.Process(next(e["pid"] for e in status["services"] if e["name"] == "flows"))


def holds(root: Path, secret: str) -> list[Path]:
    """Files of a home with a secret in them."""
    files = (path for path in root.rglob("*") if path.is_file())
    return [path for path in files if secret.encode() in path.read_bytes()]


@pytest.mark.timeout(1500)
def test_history_goes_to_the_servers_of_a_team_and_follows_after_they_were_away(
    servers: tuple[Server, Server], tmp_path: Path
) -> None:
    mlflow, prefect = servers
    root, api = tmp_path / "home", f"{prefect.url}/api"
    service = Service.at(Home.at(root).root)
    try:
        # The home begins on its own MLflow, and Prefect is the team's.
        status = up(root, "", api)
        assert {"mlflow"} == {"mlflow", "prefect"} & {e["name"] for e in status["services"]}
        report = improve_now(root, None, {}, Silent())
        service, digests = Service.at(root), {status["champion"], report["digest"]}
        assert shown_within(service, 240.0)
        assert not digests & mlflow.versions().keys()
        runs = prefect.ask("/api/flow_runs/filter", {"limit": 50})
        assert {"improve", "evaluate"} <= {run["name"].split()[0] for run in runs}
        stop(root)
        # Then both are; the round is drawn into the team's MLflow.
        status = up(root, mlflow.url, api)
        assert {"mlflow", "prefect"}.isdisjoint(e["name"] for e in status["services"])
        assert (status["mlflow"], status["prefect"]) == (mlflow.url, prefect.url)
        assert (status["sign_in"], status["away"]) == (None, [])
        service = Service.at(root)
        assert shown_within(service, 240.0)
        shown = mlflow.versions()
        assert digests <= shown.keys()
        assert shown[report["digest"]]["anchorage.state"] == report["state"]
        wait(lambda: prefect.ask("/api/deployments/name/loop/anchorage"))
        process = flows_process(status)
        environment, password = process.environ(), service.home.password.read_text()
        assert not [name for name, value in environment.items() if password in value]
        assert not [path for each in (MLFLOW, PREFECT) for path in holds(root, each[1])]
        # A run that is asked for there is done here.
        collect = prefect.ask("/api/deployments/name/collect/anchorage")["id"]
        body = {"state": {"type": "SCHEDULED"}, "parameters": {"home": str(root)}}
        run = prefect.ask(f"/api/deployments/{collect}/create_flow_run", body)["id"]
        ended = lambda: prefect.ask(f"/api/flow_runs/{run}")["state"]["type"]  # noqa: E731
        wait(lambda: ended() in ("COMPLETED", "FAILED", "CRASHED"))
        assert ended() == "COMPLETED"
        # Both are away: answers and the ledger go on, and status names both.
        for each in servers:
            each.kill()
        assert state(root)["away"] == [f"{mlflow.url}/health", f"{api}/health"]
        question = {"model": "anchorage", "messages": [{"role": "user", "content": "Hello"}]}
        body = question | {"max_tokens": 4}
        assert httpx.post(f"{status['endpoint']}/v1/chat/completions", json=body).is_success
        service.record(report["digest"], "REJECT", "a test")
        wait(lambda: "MLflow is behind" in service.home.log("flows").read_text())
        assert not shown_within(service, 0.0)
        for each in servers:
            each.start()
        assert shown_within(service, 240.0)
        assert mlflow.versions()[report["digest"]]["anchorage.state"] == "REJECT"
        assert state(root)["away"] == []
        wait(lambda: prefect.ask(f"/api/deployments/{collect}"))
        assert process.is_running()
    finally:
        stop(root)
    assert all(answers(Probe(page)) for page in (f"{mlflow.url}/health", f"{api}/health"))
