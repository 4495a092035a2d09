"""A real round without an engine, in processes that can be killed; and replays in a fresh one.

Each line of standard input is a JSON list, each of standard output what came of it:

["round", ANCHOR, FOLDER, TRIALS, SEED]    one undisturbed round, then TRIALS that are killed and go
                                           on; one more argument: the URL of a PostgreSQL server
                                           with an empty database for each, named trial0, ...
["replay", ANCHOR, STATE.DB, FOLDER]       on one core, then on all
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from replaying import leave_snapshots

from agent.learner import es
from agent.learner.drift import Drift
from agent.learner.improve import Apply, Evaluate, Plan, Record, improve
from agent.learner.noise import Address
from agent.learner.penalty import Penalty
from agent.store.journal import Journal
from agent.store.replay import replay
from agent.store.weights import Anchor, Parameters

GENERATIONS, POPULATION, EXAMPLES, SEED = 6, 6, 4, 11
RUN = "round"


def reward(parameters: Parameters, member: es.Member, generation: int) -> np.ndarray:
    """(P,) what a member earns: a smooth function of its weights, one probe an example."""
    address = Address(SEED, generation, member.pair)
    flat = np.concatenate(
        [
            tensor.float().numpy().ravel()
            for _, tensor in parameters.rendered(address, member.sign * 0.05)
        ]
    ).astype(np.float64)
    probes = np.random.default_rng(3).normal(size=(EXAMPLES, flat.size))
    return np.tanh(probes @ flat / flat.size)


def play(database: Path | str, anchor: Anchor, log: Path) -> None:
    """Open or resume the round and bring it to its end, one row a member."""
    journal = Journal(database)
    journal.open_run(
        RUN, anchor_digest=anchor.digest, parent_digest=anchor.digest, target="probe",
        run_seed=SEED, plan={"generations": GENERATIONS}, now=0.0,
    )  # fmt: skip
    past = [Drift.from_json(generation.drift) for generation in journal.generations(RUN)]
    parameters = replay(journal, anchor, RUN)
    plan = Plan(
        run_seed=SEED, generations=GENERATIONS, population=POPULATION, mirrored=True, sigma=0.05,
        alpha=0.05, shaping="zscore", penalty=Penalty("l2", 2.0), noise="normal",
        early_stop=False, parameters=anchor.parameters, start_generation=len(past),
    )  # fmt: skip
    decisions, answer, applied = improve(plan, past), None, None
    while True:
        try:
            decision = decisions.send(answer)
        except StopIteration as ended:
            journal.finish(RUN, parameters.digest(), ended.value.reason, now=0.0)
            return
        answer = None
        if isinstance(decision, Evaluate):
            answer = evaluate(journal, parameters, decision, log)
        elif isinstance(decision, Apply):
            answer = applied = parameters.apply(decision.step)
        elif isinstance(decision, Record):
            assert applied is not None
            journal.commit(RUN, decision.step, decision.rewards, applied.delta_hash, decision.drift)


def evaluate(journal: Journal, parameters: Parameters, asked: Evaluate, log: Path) -> np.ndarray:
    """(N, P): the members recorded already, and the others, each recorded when it is known."""
    done = journal.members_done(RUN, asked.generation)
    for member in asked.members:
        if member.index not in done:
            with log.open("a") as file:
                file.write(f"{asked.generation} {member.index}\n")
            done[member.index] = reward(parameters, member, asked.generation)
            journal.record_member(RUN, asked.generation, member.index, done[member.index])
    return np.stack([done[member.index] for member in asked.members])


def child(database: Path | str, anchor: Anchor, log: Path) -> int:
    """Start the round in a process of its own."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            play(database, anchor, log)
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)
    return pid


def lines(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def killed(pid: int, log: Path, count: int, pause: float) -> bool:
    """SIGKILL once so many members were begun and a moment passed; False when it ended before."""
    while len(lines(log)) < count:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return False
        time.sleep(0.0005)
    time.sleep(pause)
    os.kill(pid, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def trial(
    folder: Path, anchor: Anchor, kills: list[tuple[int, float]], server: str = ""
) -> dict[str, Any]:
    """A round that is killed at these points, then left alone."""
    folder.mkdir(parents=True)
    log = folder / "log"
    database = f"{server}/{folder.name}" if server else folder / "state.db"
    hit = sum(killed(child(database, anchor, log), log, *kill) for kill in kills)
    status = os.waitpid(child(database, anchor, log), 0)[1]
    assert status == 0, f"{folder}: ended with {status}"
    journal = Journal(database)
    found = {
        "digest": journal.run(RUN).digest,
        "rows": [generation.hash for generation in journal.generations(RUN)],
        "verified": journal.verify(RUN),
        "kills": hit,
        "evaluated": lines(log),
        "replayed": replay(journal, anchor, journal.run(RUN).digest or "").digest(),
        "left": len(journal.members_done(RUN, GENERATIONS - 1)),
    }
    journal.close()
    return found


def rounds(
    anchor_dir: str, folder: str, trials: str, seed: str, server: str = ""
) -> list[dict[str, Any]]:
    anchor, draw = Anchor.open(Path(anchor_dir)), random.Random(int(seed))
    anchor.digest  # noqa: B018 (hashed once, before the children are forked)
    found = [trial(Path(folder) / "whole", anchor, [])]
    total = GENERATIONS * POPULATION
    for number in range(int(trials)):
        points = sorted(draw.sample(range(1, total), draw.choice([1, 1, 2])))
        kills = [(point, draw.uniform(0, 0.01)) for point in points]
        found.append(trial(Path(folder) / f"trial{number}", anchor, kills, server))
    return found


def replays(anchor_dir: str, database: str, folder: str) -> list[dict[str, Any]]:
    """Digest of run "long" on one core and on all: bare, leaving snapshots, and from them."""
    anchor, journal, found = Anchor.open(Path(anchor_dir)), Journal(Path(database)), []
    cores = sorted(os.sched_getaffinity(0))
    for count in (1, len(cores)):
        os.sched_setaffinity(0, cores[:count])  # all of them at last
        snapshots = Path(folder) / f"on{count}"
        digests = [
            replay(journal, anchor, "long").digest(),
            leave_snapshots(journal, anchor, "long", snapshots, every=7),
            replay(journal, anchor, "long", snapshots).digest(),
        ]
        found.append({"digests": digests, "left": len(list(snapshots.iterdir()))})
    return found


if __name__ == "__main__":
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        found: Any = rounds(*arguments) if command == "round" else replays(*arguments)
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()
