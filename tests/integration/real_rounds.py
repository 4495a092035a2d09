"""Rounds of the embedded model on a real engine, each in a process that can be killed.

python real_rounds.py FOLDER TRIALS SEED [SERVER]

One undisturbed round, then TRIALS that are killed once or twice, anywhere, and go on; prints what
came of each. SERVER: URL of a PostgreSQL server with an empty database for each trial (trial0 ...),
where it keeps journal and ledger.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from agent.config import load
from agent.home import Home
from agent.learner.noise import Address, NoiseKind
from agent.population.pool import Population, Result
from agent.population.process import EngineLauncher
from agent.population.schedule import Messages
from agent.population.slot import Start
from agent.store.replay import replay
from flows.learn.improve import run_round
from flows.learn.loop import alone
from flows.service import Service
from flows.session import engine_options
from flows.show.terminal import Silent

SETTINGS: dict[str, Any] = {
    "learner": {"generations": 3, "population": 4, "prompts": 8, "snapshot_every": 1},
    "tasks": {"curve_every": 0},
}
MEMBERS = 3 * 4


class Logged(Population):
    """Writes down which members are asked, and which are known to the journal."""

    def __init__(self, starts: Sequence[Start], log: Path):
        super().__init__(starts)
        self._log = log

    def members(
        self,
        jobs: Sequence[tuple[int, Address, float]],
        prompts: Sequence[Messages],
        max_tokens: int | Sequence[int],
        noise: NoiseKind = "normal",
    ) -> Generator[Result, None, None]:
        generation = jobs[0][1].generation if jobs else None
        for result in super().members(jobs, prompts, max_tokens, noise):
            self._write(f"asked {generation} {result.job}")
            yield result
            self._write(f"known {generation} {result.job}")  # whoever asks for more has recorded it

    def _write(self, line: str) -> None:
        with self._log.open("a") as file:
            file.write(f"{line}\n")


def service_of(home: Path) -> Service:
    database = home.with_suffix(".url")
    state = {"state": {"url": database.read_text()}} if database.exists() else {}
    return Service(Home.at(home), load(**SETTINGS, **state))


def child(home: Path, launcher: EngineLauncher, log: Path) -> int:
    """Run or resume the home's round in a process of its own."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            service = service_of(home)
            [options] = engine_options(service)
            population = Logged([lambda: launcher.engine(options)], log)
            with alone(service):
                run_round(service, population, "gsm8k", Silent())
            population.close()
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)
    return pid


def known(log: Path) -> list[str]:
    lines = log.read_text().splitlines() if log.exists() else []
    return [line for line in lines if line.startswith("known")]


def killed(pid: int, log: Path, count: int, pause: float) -> bool:
    """SIGKILL once so many members are known and a moment passed; False when it ended before."""
    while len(known(log)) < count:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return False
        time.sleep(0.002)
    time.sleep(pause)
    os.kill(pid, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def trial(home: Path, launcher: EngineLauncher, kills: list[tuple[int, float]]) -> dict[str, Any]:
    """A round that is killed at these points, then left alone."""
    log = home.with_suffix(".log")
    hit = sum(killed(child(home, launcher, log), log, *kill) for kill in kills)
    status = os.waitpid(child(home, launcher, log), 0)[1]
    assert status == 0, f"{home}: ended with {status}"
    service = service_of(home)
    [run] = service.journal.runs()
    rows = service.journal.generations(run.run_id)
    told = {
        "digest": run.digest,
        "rewards": [hashlib.sha256(row.rewards.tobytes()).hexdigest() for row in rows],
        "deltas": [row.delta_hash for row in rows],
        "no_ops": sum(row.step.no_op is not None for row in rows),
        "replayed": replay(service.journal, service.anchor, run.run_id).digest(),
        "kept": service.kept() == [service.anchor.digest, run.digest],
        "kills": hit,
        "log": log.read_text().splitlines(),
    }
    service.journal.close()
    return told


def main(folder: Path, trials: int, seed: int, server: str = "") -> list[dict[str, Any]]:
    folder.mkdir(parents=True)
    draw, launcher = random.Random(seed), EngineLauncher(folder / "launcher.log")
    try:
        found = [trial(folder / "whole", launcher, [])]
        for number in range(trials):
            points = sorted(draw.sample(range(MEMBERS), draw.choice([1, 1, 2])))
            kills = [(point, draw.uniform(0, 0.2)) for point in points]
            if server:
                (folder / f"trial{number}.url").write_text(f"{server}/trial{number}")
            found.append(trial(folder / f"trial{number}", launcher, kills))
    finally:
        launcher.close()
    return found


if __name__ == "__main__":
    place, trials, seed, *rest = sys.argv[1:]
    sys.stdout.write(json.dumps(main(Path(place), int(trials), int(seed), *rest)))
