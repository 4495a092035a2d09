"""A running service whose weights are changed, whose supervisor is killed, whose journal is lost.

One stack on the embedded model, whose champion is a candidate of one generation.
"""

import json
import os
import shutil
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
from deploy.embedded import MODEL
from deploy.serving.intact import Probes, write_probes
from deploy.supervise import State, states
from flows.commands import doctor
from flows.service import Service

pytestmark = pytest.mark.integration
ROWS_OF = {"state.db": ("ledger", "journal"), "experience.db": ("traffic",)}  # their checks
ROWS = Path(__file__).parents[1] / "evaluators" / "rows"


# Written anew by whatever starts, of use to a process that runs, or a copy for people to look at.
PASSING = ("*.lock", "*.log", "*.sha256", "*-shm", "supervisord.*", "auth.ini")
PASSING_FOLDERS = ("cache", "mlflow/artifacts")


def passes(path: Path) -> bool:
    """Whether a file of a home, by its path in it, is one of these."""
    below = any(path.is_relative_to(folder) for folder in PASSING_FOLDERS)
    return below or any(map(path.match, PASSING))


class Stack:
    """The service of a home by its command line and its endpoint."""

    def __init__(self, root: Path) -> None:
        self.home = Home.at(root)
        # A copy, whose files may be damaged; rows of a data set, as for any model of a user's own.
        model = Path(shutil.copytree(MODEL, root.parent / "model"))
        settings = load(
            None,
            model={"path": str(model), "max_model_len": 1024, "dtype": "float32"},
            tasks={"data_dir": str(ROWS), "target": "gsm8k", "priors": ["piqa"]},
            projection={"reconcile_seconds": 2.0, "loop_minutes": 0.0},
        )
        keep(self.home, settings)
        service = Service.at(self.home.root)
        self.anchor, self.champion = service.champion(), self._learnt(service)
        for state in ("PROPOSED", "EVALUATED", "PASSED", "SWAP_INTENT", "SWAPPED", "CHAMPION"):
            service.record(self.champion, state, "a test")
        assert service.salt  # made on first use, as are the answers that a swap compares with
        probes = Probes.of([({"role": "user", "content": "1 + 1?"},)], [[{1: -1.0}]])
        write_probes(self.home, self.champion, probes)

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

    def up(self) -> None:
        self.endpoint = str(self.run("up")["endpoint"])

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
        try:
            reply = httpx.post(f"{self.endpoint}/v1/chat/completions", json=body, timeout=30)
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

    def spoil(self, path: Path, check: str) -> tuple[float, str, str]:
        """Flip one bit of a kept file, kill the engine, and wait for the right answer.

        Returns:
            seconds until then; who mended the file; what `doctor` found, "" where it saw nothing.
        """
        right, whole, engine = self.ask(), path.read_bytes(), self.pid("engine")
        assert right is not None
        place = len(whole) * 3 // 5
        overwrite(path, place, whole[place] ^ 1)
        began = time.monotonic()
        pids: set[int | None] = {engine}
        os.kill(engine, signal.SIGKILL)
        while self.ask() is not None:  # the connection may outlive the signal by a moment
            time.sleep(0.05)

        def fails() -> bool:  # it was started again and ended again
            pids.add(self.engine().pid)
            return len(pids - {None}) > 2

        seen = self.seen_until(lambda: self.ask() is not None or fails())
        answers_s = time.monotonic() - began
        by, found = "nobody had to", self.fault(check)
        if path.is_file() and path.read_bytes()[: len(whole)] == whole:
            by = "itself"
        if found or self.ask() is None:
            by = "anchorage repair"
            doctor.repair(self.home.root)
            if self.fault(check):
                by = "a person's copy"
                overwrite(path, place, whole[place])
                doctor.repair(self.home.root)
            seen |= self.seen_until(lambda: self.ask() is not None)
            answers_s = time.monotonic() - began
        assert seen | {self.ask()} == {right}, path
        assert self.fault(check) == ""
        return answers_s, by, found

    def fault(self, name: str) -> str:
        """What is wrong by one check of `doctor`, and by those of a database's rows, or ""."""
        for check in doctor.HomeChecks(self.home).checks():
            if check.name in (name, *ROWS_OF.get(name, ())):
                try:
                    check.look()
                except Exception as error:
                    return str(error) or type(error).__name__
        return ""

    def engine(self) -> State:
        return next(each for each in states(self.home) if each.name == "engine")

    def seen_until(self, done: Callable[[], bool], timeout_s: float = 240.0) -> set[Any]:
        """Every answer given until something holds."""
        seen, until = set(), time.monotonic() + timeout_s
        while not done():
            assert time.monotonic() < until, seen
            seen.add(self.ask())
            time.sleep(0.1)
        return seen - {None}


def overwrite(path: Path, place: int, byte: int) -> None:
    """One byte in place, as a disk changes it: same file, same length."""
    path.chmod(path.stat().st_mode | 0o200)
    with path.open("r+b") as file:
        file.seek(place)
        file.write(bytes([byte]))


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    made = Stack(tmp_path_factory.mktemp("damage") / "h")
    made.up()
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
    starts = stack.home.log("supervisord").read_text().count("spawned: 'engine'")
    assert starts == 2  # the one that rebuilt them answers
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
    root = stack.home.root
    here = {path.relative_to(root) for path in root.rglob("*") if path.is_file()}
    kept = {path.relative_to(root) for path in doctor.kept_files(root) if root in path.parents}
    assert {str(path) for path in here - kept if not passes(path)} == set()


# What lies in these has no hash of its own: SQLite checks its pages' structure, not their content.
UNHASHED = (".db", "-wal", "curve.json", "pace.json", "rows.json", "shown.json", "aliases.json")


@pytest.mark.timeout(3600)
def test_one_flipped_bit_in_each_kept_file_is_never_answered_from(
    stack: Stack, scale: Callable[[int, int], int]
) -> None:
    """Every file that a check of `doctor` names, one after the other, each with a killed engine.

    ``DAMAGE_FILES``: only files whose path has one of these in it, separated by commas.
    """
    if scale(0, 1) == 0:
        pytest.skip("a quarter of a minute for each of some thirty files: in the soak")
    chosen = os.environ.get("DAMAGE_FILES", "").split(",")
    for path, check in doctor.kept_files(stack.home.root).items():
        if path.is_file() and path.stat().st_size and any(each in str(path) for each in chosen):
            took_s, by, found = stack.spoil(path, check)
            name = path.relative_to(stack.home.root.parent)
            line = f"{took_s:5.1f} s  {by:16} {name}: {found or 'not seen'}"
            print(line, flush=True)  # noqa: T201
            assert found or by == "itself" or path.name.endswith(UNHASHED), path


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
