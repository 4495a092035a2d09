"""The journal: every run and its generations, kilobytes a round, enough to rebuild the weights.

A run row, a row per generation, the choice of the candidate where one was made, and an outcome row
form one hash chain (``store.database``). Members of the generation in progress are stored one by
one, so that a killed round evaluates none of them twice; they are deleted when their generation is
committed, in the same transaction.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agent.errors import UserError
from agent.learner.drift import Drift
from agent.learner.es import Step, scaling
from agent.store.database import BUSY_SECONDS, Value, atomic, canonical, fault, seal
from agent.store.packed import Rewards, pack, unpack
from agent.store.postgres import open_state


class DamagedError(UserError):
    """The first row of a run that is not what was written: run, generation, field.

    ``generation`` is a number, "start" for the row that opened the run, "choice" or "outcome".
    """

    def __init__(self, run_id: str, generation: int | str, field: str):
        super().__init__(f"run {run_id}, generation {generation}: {field} is damaged")
        self.run_id, self.generation, self.field = run_id, generation, field

    def __reduce__(self) -> tuple[type["DamagedError"], tuple[str, int | str, str]]:
        """Its fields make it again, in whatever process a flow hands it to."""
        return DamagedError, (self.run_id, self.generation, self.field)


@dataclass(frozen=True, slots=True)
class Run:
    """One round: what it started from, its plan, and its outcome once it has one."""

    run_id: str
    anchor_digest: str
    parent_digest: str
    parent_run: str | None
    target: str
    run_seed: int
    plan: dict[str, Any]
    created: float
    digest: str | None
    reason: str | None
    finished: float | None


@dataclass(frozen=True, slots=True)
class Generation:
    """One committed generation; rewards (N members, P examples), drift as recorded."""

    run_id: str
    generation: int
    step: Step
    rewards: Rewards
    delta_hash: str
    drift: dict[str, Any]
    hash: str


@dataclass(frozen=True, slots=True)
class Chosen:
    """A round's candidate: t times delta after so many generations, and why it is that point.

    ``evidence`` holds what was compared: the mean selection reward of each point.
    """

    generations: int
    t: float
    delta_hash: str  # of the scaled delta
    evidence: dict[str, Any]


RUNS = """SELECT r.*, o.digest, o.reason, o.finished FROM runs r
    LEFT JOIN outcomes o ON o.run_id = r.run_id"""


class Journal:
    """The journal of one ``state.db``, or of a PostgreSQL database by its URL."""

    def __init__(self, where: str | Path, wait_s: float = BUSY_SECONDS):
        self.database = open_state(where, wait_s)

    @atomic
    def open_run(
        self,
        run_id: str,
        *,
        anchor_digest: str,
        parent_digest: str,
        target: str,
        run_seed: int,
        plan: Mapping[str, Any],
        now: float,
    ) -> Run:
        """Start a run, or return the one of this id when it was opened with the same values.

        ``parent_digest`` is the champion it starts from: the anchor, or a finished run's digest.
        """
        values: dict[str, Any] = {
            "anchor_digest": anchor_digest,
            "parent_digest": parent_digest,
            "target": target,
            "run_seed": run_seed,
            "plan": canonical(plan),
        }
        # Looked up and inserted in one transaction: of two processes that open the same run, the
        # second finds the first one's row.
        rows = self.database.rows("SELECT * FROM runs WHERE run_id = ?", run_id)
        if rows:
            other = [name for name, value in values.items() if rows[0][name] != value]
            if other:
                raise UserError(f"run {run_id}: was opened with another {', '.join(other)}")
            return self.run(run_id)
        parent = self._parent(anchor_digest, parent_digest)
        fields: dict[str, Value] = {
            "run_id": run_id,
            **values,
            "parent_run": parent,
            "created": float(now),
        }
        self.database.insert("runs", seal("", fields))
        return self.run(run_id)

    def _parent(self, anchor_digest: str, parent_digest: str) -> str | None:
        """Id of the run that made the parent; None where the parent is the anchor."""
        if parent_digest == anchor_digest:
            return None
        parent = self.candidate(parent_digest)
        if parent.anchor_digest != anchor_digest:
            raise UserError(f"anchor_digest: {anchor_digest}, its parent's: {parent.anchor_digest}")
        return parent.run_id

    def run(self, run_id: str) -> Run:
        """The run of this id."""
        runs = self._select("WHERE r.run_id = ?", run_id)
        if not runs:
            raise UserError(f"run {run_id!r}: not in the journal {self.database.name}")
        return runs[0]

    def runs(self) -> list[Run]:
        """All runs, oldest first; an open one has no digest."""
        return self._select("ORDER BY r.rowid")

    def _select(self, clause: str, *values: str | int) -> list[Run]:
        """Runs with their outcomes, where they have one."""
        rows = self.database.rows(f"{RUNS} {clause}", *values)
        names = [field.name for field in dataclasses.fields(Run)]
        read = [{name: row[name] for name in names} for row in rows]
        return [Run(**{**row, "plan": json.loads(row["plan"])}) for row in read]

    def next_generation(self, run_id: str) -> int:
        """How many generations of a run are committed: the number of the one in progress."""
        query = "SELECT COUNT(*) AS done FROM generations WHERE run_id = ?"
        return int(self.database.rows(query, run_id)[0]["done"])

    def members_done(self, run_id: str, generation: int) -> dict[int, Rewards]:
        """index -> rewards (P,) of the members recorded so far; a damaged one counts as missing."""
        rows = self.database.rows(
            "SELECT * FROM members WHERE run_id = ? AND generation = ? ORDER BY member",
            run_id,
            generation,
        )
        whole = [
            row
            for row in rows
            if row["sha256"] == _member_hash(run_id, generation, row["member"], row["rewards"])
        ]
        return {row["member"]: unpack(row["rewards"]) for row in whole}

    @atomic
    def record_member(self, run_id: str, generation: int, index: int, rewards: Rewards) -> None:
        """Keep one evaluated member of the generation in progress."""
        blob = pack(rewards)
        self._expect(run_id, generation)
        self.database.rows(
            "INSERT INTO members VALUES (?, ?, ?, ?, ?) ON CONFLICT (run_id, generation, member)"
            " DO UPDATE SET rewards = excluded.rewards, sha256 = excluded.sha256",
            run_id,
            generation,
            index,
            blob,
            _member_hash(run_id, generation, index, blob),
        )

    @atomic
    def commit(
        self,
        run_id: str,
        step: Step,
        rewards: Rewards,
        delta_hash: str,
        drift: Drift | Mapping[str, Any],
    ) -> str:
        """Close a generation: insert its row, delete its members. Returns the row's hash.

        rewards (N, P); numbers in drift that are not finite become null.
        """
        if rewards.ndim != 2:
            raise UserError(f"rewards: have shape {rewards.shape}, allowed: (members, examples)")
        record = drift.to_json() if isinstance(drift, Drift) else drift
        fields: dict[str, Value] = {
            "run_id": run_id,
            "generation": step.generation,
            "payload": canonical(step.to_json()),
            "rewards": pack(rewards),
            "delta_hash": delta_hash,
            "drift": canonical(record),
        }
        # Its members leave in the same transaction: a crash leaves either them or the generation,
        # never both and never neither.
        self._expect(run_id, step.generation)
        row = seal(self._tip(run_id), fields)
        self.database.insert("generations", row)
        self.database.rows("DELETE FROM members WHERE run_id = ?", run_id)
        return str(row["hash"])

    @atomic
    def choose(self, run_id: str, chosen: Chosen) -> None:
        """Record the point that becomes the candidate; no generation may follow.

        Raises:
            UserError: A point outside the run's generations, or one was chosen before.
        """
        done = self.next_generation(run_id)
        if self.run(run_id).digest is not None or self.chosen(run_id) is not None:
            raise UserError(f"run {run_id}: its candidate is chosen, allowed: reading it")
        if not 1 <= chosen.generations <= done:
            raise UserError(f"run {run_id}: {chosen.generations} chosen, allowed: 1 to {done}")
        fields: dict[str, Value] = {
            "run_id": run_id,
            "generations": chosen.generations,
            "t": float(chosen.t),
            "delta_hash": chosen.delta_hash,
            "evidence": canonical(chosen.evidence),
        }
        self.database.insert("choices", seal(self._tip(run_id), fields))

    def chosen(self, run_id: str) -> Chosen | None:
        """The recorded choice of a run; None: its candidate is its last generation."""
        rows = self._rows("choices", run_id)
        if not rows:
            return None
        evidence = json.loads(rows[0]["evidence"])
        return Chosen(rows[0]["generations"], rows[0]["t"], rows[0]["delta_hash"], evidence)

    def kept(self, run_id: str) -> list[Generation]:
        """The steps that make a run's candidate: its generations up to the chosen one.

        Where the choice scaled delta, one more without rewards, which does that.
        """
        generations, chosen = self.generations(run_id), self.chosen(run_id)
        if chosen is None:
            return generations
        last = generations[chosen.generations - 1]
        kept = generations[: chosen.generations]
        if chosen.t == 1.0:
            return kept
        norm = chosen.t * float(last.drift["norm"])
        scaled = dataclasses.replace(
            last,
            generation=last.generation + 1,
            step=scaling(last.step, chosen.t),
            rewards=np.zeros((0, 0)),
            delta_hash=chosen.delta_hash,
            drift={"norm": norm},
            hash="",
        )
        return [*kept, scaled]

    def _expect(self, run_id: str, generation: int) -> None:
        """Refuse a generation that is not the one in progress, and any of a finished run."""
        if self.run(run_id).digest is not None or self.chosen(run_id) is not None:
            raise UserError(f"run {run_id}: is finished, allowed: reading it")
        expected = self.next_generation(run_id)
        if generation != expected:
            raise UserError(f"run {run_id}: generation {generation}, allowed: {expected}")

    def _tip(self, run_id: str) -> str:
        """Hash of the newest row of a run: its choice, last generation, or opening row."""
        rows = self.database.rows(
            "SELECT hash, 0 AS part, 0 AS place FROM runs WHERE run_id = ? UNION ALL"
            " SELECT hash, 1, generation FROM generations WHERE run_id = ? UNION ALL"
            " SELECT hash, 2, 0 FROM choices WHERE run_id = ? ORDER BY 2 DESC, 3 DESC LIMIT 1",
            *(run_id, run_id, run_id),
        )
        return str(rows[0]["hash"])

    @atomic
    def finish(self, run_id: str, digest: str, reason: str, now: float) -> None:
        """Close a run with the digest of what it made; again with the same digest is allowed."""
        ended = self.run(run_id).digest
        if ended == digest:
            return
        if ended is not None:
            raise UserError(f"run {run_id}: ended as {ended}, not as {digest}")
        fields: dict[str, Value] = {
            "run_id": run_id,
            "digest": digest,
            "generations": self.next_generation(run_id),
            "reason": reason,
            "finished": float(now),
        }
        self.database.insert("outcomes", seal(self._tip(run_id), fields))
        self.database.rows("DELETE FROM members WHERE run_id = ?", run_id)

    def generations(self, run_id: str) -> list[Generation]:
        """The committed generations of a run, in order."""
        query = "SELECT * FROM generations WHERE run_id = ? ORDER BY generation"
        return [
            Generation(
                run_id=run_id,
                generation=row["generation"],
                step=Step.from_json(json.loads(row["payload"])),
                rewards=unpack(row["rewards"]),
                delta_hash=row["delta_hash"],
                drift=json.loads(row["drift"]),
                hash=row["hash"],
            )
            for row in self.database.rows(query, run_id)
        ]

    def verify(self, run_id: str) -> int:
        """Check every row of a run; DamagedError names the first bad one. Returns their count.

        Rows missing at the end are noticed only in a finished run, whose outcome has their count.
        """
        start = self._rows("runs", run_id)
        if not start:
            raise UserError(f"run {run_id!r}: not in the journal {self.database.name}")
        tip = _link(run_id, "start", "", start[0])
        rows = self._rows("generations", run_id, "ORDER BY generation")
        for number, row in enumerate(rows):
            if row["generation"] != number:
                raise DamagedError(run_id, number, "generation")
            tip = _link(run_id, number, tip, row)
        for choice in self._rows("choices", run_id):
            tip = _link(run_id, "choice", tip, choice)
        for outcome in self._rows("outcomes", run_id):
            cut_off = outcome["generations"] > len(rows)
            if cut_off and fault(tip, outcome) == "hash chain":
                raise DamagedError(run_id, len(rows), "generation")
            _link(run_id, "outcome", tip, outcome)
        return len(rows)

    def _rows(self, table: str, run_id: str, order: str = "") -> list[dict[str, Any]]:
        """The rows of a run in a table, as stored."""
        query = f"SELECT * FROM {table} WHERE run_id = ? {order}"  # noqa: S608
        return [dict(row) for row in self.database.rows(query, run_id)]

    def candidate(self, digest: str) -> Run:
        """The first finished run that made a digest; a prefix of 8 or more characters will do."""
        runs = self._select(
            "WHERE substr(o.digest, 1, ?) = ? ORDER BY o.rowid", len(digest), digest
        )
        if len(digest) < 8 or not runs:
            raise UserError(f"candidate {digest!r}: no finished run made it")
        if len({run.digest for run in runs}) > 1:
            raise UserError(f"candidate {digest!r}: several begin so, allowed: more characters")
        return runs[0]

    def lineage(self, digest: str) -> list[str]:
        """Ids of the runs from the anchor to a digest; none for a digest that is an anchor."""
        if any(run.anchor_digest == digest for run in self.runs()):
            return []
        return self.ancestry(self.candidate(digest).run_id)

    def ancestry(self, run_id: str) -> list[str]:
        """Ids of the runs from the anchor to this run, this run last."""
        parent = self.run(run_id).parent_run
        return [*(self.ancestry(parent) if parent else []), run_id]

    def close(self) -> None:
        """Close the connection."""
        self.database.close()


def _member_hash(run_id: str, generation: int, index: int, blob: bytes) -> str:
    """What a member's row must hash to: where it belongs and what it holds."""
    return hashlib.sha256(f"{run_id}\0{generation}\0{index}\0".encode() + blob).hexdigest()


def _link(run_id: str, place: int | str, tip: str, row: dict[str, Any]) -> str:
    """Check one row against the hash of the row before; returns its own."""
    field = fault(tip, row)
    if field:
        raise DamagedError(run_id, place, field)
    return str(row["hash"])
