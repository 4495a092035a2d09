"""Prefect's real server: schedules that stay calm, and runs that are refused."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest

from agent.config import load
from agent.home import Home
from agent.store.ledger import Entry
from deploy.consoles import USER, credentials
from deploy.stack import choose_ports, client_environment
from deploy.supervise import Probe, answers
from flows.show.prefect import CURRENT, ShownProgress, event_of, reported, stop_left
from flows.show.terminal import Silent

pytestmark = pytest.mark.integration
Scale = Callable[[int, int], int]

# A process of `Runner` in a home: `prefect_runner.py HOME MINUTES`, whose loops only take a while.
RUNNER = """
import logging, sys, time
from pathlib import Path
from prefect.client.orchestration import get_client
from flows.deployments import Runner
from flows.learn.loop import RowTrigger, note_refusals
from flows.service import Service
logging.getLogger("anchorage").setLevel(logging.INFO)
def command(home, name, run_id):
    return [sys.executable, "-c", CHILD, str(home), str(run_id)]
CHILD = '''
import json, sys, time
from pathlib import Path
from uuid import UUID
from flows.show.prefect import reported
log = Path(sys.argv[1]) / "rounds.jsonl"
with reported(UUID(sys.argv[2])):
    given = json.load(sys.stdin)
    with log.open("a") as file:
        file.write(json.dumps([sys.argv[2], "begins", time.time(), given]) + chr(10))
    time.sleep(9)
    with log.open("a") as file:
        file.write(json.dumps([sys.argv[2], "ends", time.time(), given]) + chr(10))
'''
def count():
    path = Path(sys.argv[1]) / "new_rows"
    return int(path.read_text()) if path.exists() else 0
with get_client(sync_client=True) as client:
    service = Service.at(Path(sys.argv[1]))
    rows, note = RowTrigger(50, count), note_refusals(service)
    runner = Runner(service.home, float(sys.argv[2]), client, command, rows, note)
    try:
        for _ in runner.looks():
            time.sleep(1.0)
    finally:
        runner.close()
"""
MINUTES = 0.1  # 6 s between two loops that take longer


class Desk:
    """A home whose Prefect server and runner can be stopped and started."""

    def __init__(self, root: Path) -> None:
        self.home = Home.at(root)
        ports = choose_ports(load())
        self.environment = os.environ | client_environment(self.home, load(), ports)
        self.environment |= credentials(self.home)
        self.api = self.environment["PREFECT_API_URL"]
        self.owner = (USER, self.home.password.read_text())
        self.port = ports.prefect
        self.processes: list[subprocess.Popen[bytes]] = []

    def up(self) -> None:
        server = [sys.executable, "-m", "deploy.consoles", "prefect", str(self.home.root)]
        self._start([*server, str(self.port)], "prefect")
        wait(lambda: answers(Probe(f"{self.api}/health")))
        self._start([sys.executable, "-c", RUNNER, str(self.home.root), str(MINUTES)], "flows")
        wait(lambda: all(map(self.is_registered, ("collect", "improve", "loop"))))

    def _start(self, command: list[str], name: str) -> None:
        self.home.logs.mkdir(exist_ok=True)
        with self.home.log(name).open("ab") as log:
            started = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)
        self.processes.append(started)

    def down(self) -> None:
        for process in reversed(self.processes):
            process.terminate()
            process.wait()
        self.processes = []

    def ask(self, method: str, path: str, body: object = None) -> Any:
        """One request; Prefect answers 503 while its SQLite is busy, and is asked again."""
        url, code = f"{self.api}{path}", 503
        while code == 503:
            reply = httpx.request(method, url, json=body, auth=self.owner, timeout=120)
            code = reply.status_code
        reply.raise_for_status()
        return reply.json() if reply.content else None

    def deployment(self, name: str) -> str:
        return str(self.ask("GET", f"/deployments/name/{name}/{name}")["id"])

    def is_registered(self, name: str) -> bool:
        """Whether the runner, which starts after the server, has made this deployment."""
        try:
            return bool(self.deployment(name))
        except httpx.HTTPStatusError:
            return False

    def is_as_registered(self, name: str) -> bool:
        """Whether a deployment is what the runner makes; for a moment there may be none."""
        try:
            found = self.ask("GET", f"/deployments/{self.deployment(name)}")
        except httpx.HTTPStatusError:
            return False
        wanted = (f"flows/deployments.py:{name}_flow", {"home": str(self.home.root)}, {})
        made = (found["entrypoint"], found["parameters"], found["job_variables"])
        return made == wanted and not found["pull_steps"]

    def runs(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.ask("POST", "/flow_runs/filter", {})
        return [run for run in found if run["state_type"] != "SCHEDULED"]

    def rounds(self) -> list[tuple[str, str, float]]:
        path = self.home.root / "rounds.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        return [tuple(json.loads(line)[:3]) for line in lines]

    def newest_row(self) -> str:
        """State and reason of the ledger's newest row, as `anchorage history` prints them."""
        command = [sys.executable, "-m", "flows.cli", "history", "--json", "--home"]
        told = subprocess.run([*command, str(self.home.root)], capture_output=True, text=True)
        row = json.loads(told.stdout)[0]
        return f"{row['state']} {row['why']}"

    def log(self) -> str:
        return self.home.log("flows").read_text()


def wait(ready: Any, timeout_s: float = 240.0) -> None:
    until = time.monotonic() + timeout_s
    while not ready():
        assert time.monotonic() < until
        time.sleep(0.3)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    made = Desk(tmp_path_factory.mktemp("prefect") / "home")
    made.up()
    yield made
    made.down()


@pytest.fixture
def signed_in(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> Desk:
    for name in ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING"):
        monkeypatch.setenv(name, desk.environment[name])
    return desk


def test_loops_never_overlap_and_after_a_pause_one_catches_up(desk: Desk, scale: Scale) -> None:
    """Loops of 9 s, planned every 6 s; then down, for as long as several would have taken."""
    if scale(0, 1) == 0:
        pytest.skip("three minutes of schedules: in the soak; its decisions are unit tests")

    def under_way() -> bool:
        words = [line[1] for line in desk.rounds()]
        return words.count("ends") >= 2 and words[-1] == "begins"

    wait(under_way)
    desk.down()
    before = len(desk.rounds())
    time.sleep(25)
    desk.up()
    wait(lambda: len(desk.rounds()) >= before + 3)
    lines = desk.rounds()
    # Each begins after the one before has ended; only the one that `down` ended has no end.
    for first, second in pairwise(lines):
        assert (first[1], second[1]) != ("begins", "begins") or lines.index(second) == before
    ends = [line[2] for line in lines if line[1] == "ends"]
    begins = [line[2] for line in lines if line[1] == "begins"]
    assert all(min(b - e for e in ends if e < b) >= 5.9 for b in begins[1:] if b < begins[-1] - 20)
    states = Counter((run["state_type"], run["state_name"]) for run in desk.runs())
    assert not [state for state in states if state[0] == "FAILED"]
    stopped = [run["id"] for run in desk.runs() if run["state_name"] == "Stopped"]
    assert stopped == [lines[before - 1][0]]  # the one that `down` ended
    skipped = [run for run in desk.runs() if run["state_name"] == "Skipped"]
    assert any("a round is running" in run["state"]["message"] for run in skipped)
    assert any("catches up" in run["state"]["message"] for run in skipped)


def test_new_rows_start_one_round_beside_the_schedule(desk: Desk, scale: Scale) -> None:
    if scale(0, 1) == 0:
        pytest.skip("waits for a round to end: in the soak; `RowTrigger` has unit tests")

    def asked() -> list[dict[str, Any]]:
        body = {"flows": {"name": {"any_": ["loop"]}}}
        found = desk.ask("POST", "/flow_runs/filter", body)
        return [run for run in found if not run["auto_scheduled"]]

    (desk.home.root / "new_rows").write_text("50")
    wait(lambda: [run for run in asked() if run["state_type"] == "COMPLETED"])
    (desk.home.root / "new_rows").write_text("0")  # the round was opened
    assert len(asked()) == 1


def look(url: str) -> str:
    """The words of a page, by the tool that a reader can run."""
    tool = Path(__file__).parents[1] / "tools" / "look.py"
    told = subprocess.run([sys.executable, str(tool), url], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    return told.stdout.strip()


SHELL = "prefect.deployments.steps.run_shell_script"


@pytest.mark.parametrize("variant", ["pull_steps", "entrypoint", "job_variables", "home", "run"])
def test_a_run_that_was_changed_in_prefect_is_refused_and_nothing_runs(
    desk: Desk, tmp_path: Path, variant: str
) -> None:
    """By somebody who has the password; the deployment is right again afterwards."""
    canary, script = tmp_path / "canary", tmp_path / "evil.py"
    script.write_text(f"open({str(canary)!r}, 'w').close()\n")
    deployment = desk.deployment("collect")
    changes: dict[str, dict[str, object]] = {
        "pull_steps": {"pull_steps": [{SHELL: {"script": f"touch {canary}"}}]},
        "entrypoint": {"entrypoint": f"{script}:flow"},
        "job_variables": {"job_variables": {"command": f"touch {canary}"}},
        "home": {"parameters": {"home": str(tmp_path)}},
    }
    run: dict[str, object] = {"state": {"type": "SCHEDULED"}}
    if variant in changes:
        desk.ask("PATCH", f"/deployments/{deployment}", changes[variant])
    else:
        run["job_variables"] = {"command": f"touch {canary}"}
    made = desk.ask("POST", f"/deployments/{deployment}/create_flow_run", run)["id"]

    def state() -> Any:
        try:
            return desk.ask("GET", f"/flow_runs/{made}")["state"]
        except httpx.HTTPStatusError:
            return {"name": "gone"}

    wait(lambda: state()["name"] == "Refused")
    reason = str(state()["message"]).removeprefix("refused: ")
    assert "registered" in reason
    assert f"run {made} of collect is refused" in desk.log()
    wait(lambda: desk.newest_row() == f"REFUSED a run of collect from Prefect: {reason}")
    wait(lambda: desk.is_as_registered("collect"))
    assert not canary.exists()
    assert made not in {line[0] for line in desk.rounds()}


def test_what_a_stopped_service_left_running_is_settled_with_its_parts(signed_in: Desk) -> None:
    """Runs of nobody's process: a deployment's, one inside it; a person's own run stays."""
    flow = signed_in.ask("POST", "/flows/", {"name": "a test"})["id"]

    def begun(**parts: Any) -> str:
        body = {"flow_id": flow, "state": {"type": "RUNNING", "name": "Running"}, **parts}
        return str(signed_in.ask("POST", "/flow_runs/", body)["id"])

    deployed = signed_in.ask("POST", "/deployments/", {"name": "a test", "flow_id": flow})["id"]
    left, ours, mine = begun(deployment_id=deployed), begun(deployment_id=deployed), begun()
    task = {"flow_run_id": left, "task_key": "improve", "dynamic_key": "0"}
    part = begun(parent_task_run_id=signed_in.ask("POST", "/task_runs/", task)["id"])
    stop_left([UUID(deployed)], {UUID(ours)})

    def states(*runs: str) -> set[str]:
        return {signed_in.ask("GET", f"/flow_runs/{run}")["state"]["name"] for run in runs}

    assert (states(left, part), states(ours, mine)) == ({"Stopped"}, {"Running"})


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no Chromium")
def test_the_owner_reads_prefects_pages_in_a_browser(desk: Desk) -> None:
    """The page's scripts sign in with what the browser was told, and fill the page."""
    user, password = desk.owner
    address = desk.api.removeprefix("http://127.0.0.1").removesuffix("/api")
    signed_in = look(f"http://{user}:{password}@localhost{address}/deployments")
    assert "Deployments" in signed_in
    assert all(name in signed_in for name in ("collect", "improve", "rollback"))
    assert "Deployments" not in look(f"http://127.0.0.1{address}/deployments")


def test_a_run_that_a_person_asks_for_gets_their_parameters(desk: Desk) -> None:
    deployment = desk.deployment("collect")
    parameters = {"home": str(desk.home.root), "target": "gsm8k"}
    body = {"state": {"type": "SCHEDULED"}, "parameters": parameters}
    made = desk.ask("POST", f"/deployments/{deployment}/create_flow_run", body)["id"]
    wait(lambda: desk.ask("GET", f"/flow_runs/{made}")["state"]["type"] == "COMPLETED")
    lines = (desk.home.root / "rounds.jsonl").read_text().splitlines()
    assert parameters in [given for run, _, _, given in map(json.loads, lines) if run == made]
    assert UUID(made)


def test_what_a_run_shows_is_on_its_page(signed_in: Desk) -> None:
    flow = signed_in.ask("POST", "/flows/", {"name": "a test"})["id"]
    made = signed_in.ask("POST", "/flow_runs/", {"flow_id": flow})["id"]
    report = {"round": "0003-gsm8k", "digest": "d" * 64, "verdict": "hold", "reasons": ["unsure"]}
    with reported(UUID(made), "loop", {"target": "gsm8k"}) as finish:
        progress = ShownProgress(Silent())
        progress.say("a line for the page")
        progress.track("evaluate dddddddddddd", 2)(2)
        shown = CURRENT.get()
        assert shown is not None
        shown.artifact("Round 0003-arc_challenge", "# a page", "round 3")
        finish({"report": report, "outcome": {"state": "hold"}})
    run = signed_in.ask("GET", f"/flow_runs/{made}")
    assert run["name"] == "loop 0003-gsm8k dddddddddddd"
    assert (run["state_type"], run["state_name"]) == ("CANCELLED", "Held")
    assert run["state"]["message"] == "unsure"
    of_run = {"flow_run_id": {"any_": [made]}}
    wait(lambda: signed_in.ask("POST", "/logs/filter", {"logs": of_run}))
    lines = [line["message"] for line in signed_in.ask("POST", "/logs/filter", {"logs": of_run})]
    assert "a line for the page" in lines
    own = {"flow_runs": {"id": {"any_": [made]}}}
    (task,) = signed_in.ask("POST", "/task_runs/filter", own)
    assert (task["name"], task["state_name"]) == ("evaluate dddddddddddd", "Completed")
    (page,) = signed_in.ask("POST", "/artifacts/filter", own)
    assert (page["key"], page["data"]) == ("round-0003-arc-challenge", "# a page")


def test_a_decision_sets_off_the_automation_of_the_documentation(
    signed_in: Desk, tmp_path: Path
) -> None:
    text = (Path(__file__).parents[2] / "docs/review.md").read_text(encoding="utf-8")
    script = tmp_path / "automation.py"
    script.write_text(text.split("```python\n")[1].split("```")[0])
    subprocess.run([sys.executable, str(script)], env=signed_in.environment, check=True)
    (automation,) = signed_in.ask("POST", "/automations/filter", {})
    assert automation["name"] == "review wanted"
    row = Entry(
        7, time.time(), 3, "ann", "d" * 64, "AWAIT_REVIEW", "why", {}, None, "d" * 64, "hash"
    )
    event = event_of(row)
    for _ in range(2):  # sent twice, as after a crash
        signed_in.ask("POST", "/events", [event])
    kinds = ["anchorage.review.wanted", "prefect.automation.triggered"]

    def seen() -> Counter[str]:
        body = {"filter": {"event": {"name": kinds}}}
        found = signed_in.ask("POST", "/events/filter", body)["events"]
        return Counter(each["event"] for each in found)

    wait(lambda: len(seen()) == 2)
    assert seen()["anchorage.review.wanted"] == 1
