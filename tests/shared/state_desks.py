"""What the tests of journal and ledger write with, on either database."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np

from agent.learner import es
from agent.learner.penalty import Penalty
from agent.store.journal import Journal
from agent.store.ledger import Entry, Ledger

A, B, C, D = ("a" * 64, "b" * 64, "c" * 64, "d" * 64)
PROMOTION = ("PROPOSED", "EVALUATED", "PASSED", "SWAP_INTENT", "SWAPPED", "BAKING", "CHAMPION")
ANCHOR = "a" * 64


def a_step(generation: int, rewards: np.ndarray) -> es.Step:
    return es.step(
        rewards.mean(axis=1), es.members(4, True), run_seed=7, generation=generation, sigma=0.01,
        alpha=0.02, penalty=Penalty("l2", 3.0),
    )  # fmt: skip


def some_rewards(generation: int) -> np.ndarray:
    return np.random.default_rng(generation).normal(size=(4, 3))


class JournalDesk:
    """A journal and the few words a test needs."""

    def __init__(self, where: str | Path):
        self.journal = Journal(where)

    def open(self, run_id: str = "run", **other: Any) -> Any:
        said = {
            "anchor_digest": ANCHOR, "parent_digest": ANCHOR, "target": "gsm8k", "run_seed": 7,
            "plan": {"sigma": 0.01, "rows": ["x1", "x2"]}, "now": 10.0,
        }  # fmt: skip
        return self.journal.open_run(run_id, **{**said, **other})

    def commit(self, generation: int, run_id: str = "run") -> str:
        rewards = some_rewards(generation)
        step = a_step(generation, rewards)
        drift = {"norm": 1.5 * generation, "predicted": math.nan}
        return self.journal.commit(run_id, step, rewards, f"{generation:064x}", drift)

    def full(
        self, run_id: str = "run", count: int = 6, digest: str = "d" * 64, **other: Any
    ) -> None:
        self.open(run_id, **other)
        for generation in range(count):
            self.commit(generation, run_id)
        self.journal.finish(run_id, digest, "completed", now=20.0)


class LedgerDesk:
    """A ledger, an epoch and a clock that ticks."""

    def __init__(self, where: str | Path):
        self.ledger = Ledger(where)
        self.ticks = itertools.count(1.0)
        self.epoch = self.ledger.acquire("desk", next(self.ticks))

    def __call__(self, digest: str, *steps: str, after: str | None = None) -> Entry | None:
        entry = None
        for step in steps:
            entry = self.ledger.append(
                digest, step, epoch=self.epoch, actor="controller", why=f"why {step}",
                now=next(self.ticks), statistics={"n": 3}, after=after,
            )  # fmt: skip
        return entry


RACER = """
import sys
from pathlib import Path
from agent.store.ledger import Ledger, StaleEpoch
where, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
steps = ["PROPOSED", "EVALUATED", "PASSED", "SWAP_INTENT", "SWAPPED", "CHAMPION"]
ledger = Ledger(where if "://" in where else Path(where))
epoch = ledger.acquire(name, 0.0)
print("ready", flush=True)
sys.stdin.readline()
for number in range(count):
    digest = f"{number:064x}"
    while ledger.state(digest) != "CHAMPION":
        done = [entry.state for entry in ledger.of(digest)]
        try:
            for step in steps[len(done):]:
                ledger.append(digest, step, epoch=epoch, actor=name, why="race", now=0.0)
        except StaleEpoch:
            epoch = ledger.acquire(name, 0.0)
        except Exception as error:
            if "not to become" not in str(error) and "is the champion" not in str(error):
                raise
"""
