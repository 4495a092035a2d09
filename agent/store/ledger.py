"""The ledger: every decision about every digest, who made it, why, and what is served after it.

Rows are only appended and form a hash chain (``store.database``). A writer holds an epoch; a newer
epoch fences off the older ones, checked in the transaction that writes. The champion is ``after``
of the last row: what an engine has to serve, whatever became of the writer.

The first part decides over rows as values: which state may follow which, and what is served then.
The class ``Ledger`` stores them.

    PROPOSED -> EVALUATED -> PASSED | HOLD | REJECT        PASSED | HOLD -> AWAIT_REVIEW -> APPROVED
    PASSED | APPROVED -> [CANARY] -> SWAP_INTENT -> SWAPPED -> BAKING -> CHAMPION | ROLLED_BACK
    ANCHOR: the model everything started from, or a champion that a person made the new anchor

CANARY: on trial on a second engine, with a share of the traffic; the old version is served. From
there it is swapped in, or ROLLED_BACK.

PASSED is the state after the verdict `promote`: nothing is served yet. (Older rows call it PROMOTE;
they are read as PASSED.)

Remarks on a digest that has a state, which they leave as it is. UNCHANGED: a round that began from
it ended with the same weights. REFUSED: while it was served, a run that Prefect's server returned
was not what this installation registered. STALLED: its engine ended several times before it
answered.

HOLD goes back to EVALUATED with more rows. A former champion, and a digest that was rolled back,
may be swapped in again by a person. REJECT is the end.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from agent.errors import UserError
from agent.store.database import (
    BUSY_SECONDS,
    Value,
    atomic,
    canonical,
    differing,
    digest_field,
    fault,
    seal,
)
from agent.store.postgres import open_state

ALLOWED: dict[str | None, frozenset[str]] = {
    None: frozenset({"PROPOSED"}),
    "PROPOSED": frozenset({"EVALUATED", "REJECT"}),
    "EVALUATED": frozenset({"PASSED", "HOLD", "REJECT"}),
    "HOLD": frozenset({"EVALUATED", "AWAIT_REVIEW", "REJECT"}),
    "PASSED": frozenset({"AWAIT_REVIEW", "CANARY", "SWAP_INTENT", "REJECT"}),
    "AWAIT_REVIEW": frozenset({"APPROVED", "REJECT"}),
    "APPROVED": frozenset({"CANARY", "SWAP_INTENT", "REJECT"}),
    "CANARY": frozenset({"SWAP_INTENT", "ROLLED_BACK"}),
    "SWAP_INTENT": frozenset({"SWAPPED", "ROLLED_BACK"}),
    "SWAPPED": frozenset({"BAKING", "CHAMPION", "ROLLED_BACK"}),
    "BAKING": frozenset({"CHAMPION", "ROLLED_BACK"}),
    "CHAMPION": frozenset({"CANARY", "SWAP_INTENT", "ROLLED_BACK", "ANCHOR"}),
    "ANCHOR": frozenset({"CANARY", "SWAP_INTENT", "ROLLED_BACK"}),
    "ROLLED_BACK": frozenset({"CANARY", "SWAP_INTENT", "REJECT"}),
    "REJECT": frozenset(),
}
RENAMED = {"PROMOTE": "PASSED"}  # state in older rows -> state
UNCHANGED, REFUSED, STALLED = REMARKS = ("UNCHANGED", "REFUSED", "STALLED")
SETTLED = ("CHAMPION", "ANCHOR")
UNSETTLED = ("CANARY", "SWAP_INTENT", "SWAPPED", "BAKING")
BEGINS = ("CANARY", "SWAP_INTENT")


@dataclass(frozen=True, slots=True)
class Entry:
    """One decision; ``before`` and ``after`` are the champion around it."""

    seq: int
    time: float
    epoch: int
    actor: str
    digest: str
    state: str
    why: str
    statistics: dict[str, Any]
    before: str | None
    after: str
    hash: str


Entries = Sequence[Entry]


def champion_of(entries: Entries) -> str | None:
    """The digest to serve: ``after`` of the last row."""
    return entries[-1].after if entries else None


def latest_of(entries: Entries, digest: str) -> Entry | None:
    """The newest row of a digest that gave it a state."""
    of_digest = (each for each in reversed(entries) if each.digest == digest)
    return next((each for each in of_digest if each.state not in REMARKS), None)


def state_of(entries: Entries, digest: str) -> str | None:
    """What a digest is now; one that another's rollback returned to is champion again."""
    last = latest_of(entries, digest)
    if last and last.state == "ROLLED_BACK" and digest == champion_of(entries):
        return "CHAMPION"
    return last.state if last else None


def unsettled(entries: Entries) -> Entry | None:
    """The newest row of a trial or swap that is neither CHAMPION nor ROLLED_BACK; one at most."""
    newest = {entry.digest: entry for entry in entries if entry.state not in REMARKS}
    return next((entry for entry in newest.values() if entry.state in UNSETTLED), None)


def served_stack(entries: Entries) -> list[str]:
    """Champions, the present one last: a promotion pushes, a rollback pops down to its target."""
    stack: list[str] = []
    for entry in entries:
        if entry.after == entry.before:
            continue
        if entry.state == "ROLLED_BACK":
            stack.pop()
        if entry.state == "ROLLED_BACK" and entry.after in stack:
            del stack[stack.index(entry.after) :]
        stack.append(entry.after)
    return stack


def refusal(entries: Entries, digest: str, step: str) -> str | None:
    """Why a digest may not take a step now, in one line; None when it may."""
    if not entries:
        return None if step == "ANCHOR" else f"{step}: the ledger is empty, allowed: ANCHOR"
    name, now, served = digest[:12], state_of(entries, digest), champion_of(entries)
    if step in REMARKS and now is not None:
        return None
    if step not in ALLOWED[now]:
        allowed = ", ".join(sorted(ALLOWED[now])) or "nothing"
        return f"{name}: is {now or 'unknown'}, not to become {step}; allowed: {allowed}"
    busy = unsettled(entries)
    if step in BEGINS and busy and busy.digest != digest:
        return f"{name}: {busy.digest[:12]} is {busy.state}, allowed: one swap at a time"
    if step in BEGINS and digest == served:
        return f"{name}: is the champion, allowed: another digest"
    if digest != served and (step == "ANCHOR" or (step == "ROLLED_BACK" and now in SETTLED)):
        return f"{name}: is not the champion, allowed: {str(served)[:12]}"
    return None


def served_after(entries: Entries, digest: str, step: str, target: str | None) -> str:
    """The champion once a row is written. ``target``: what a rollback returns to, if said."""
    served = champion_of(entries)
    if served is None or step == "SWAPPED":
        return digest
    if step != "ROLLED_BACK" or digest != served:
        return served
    under = served_stack(entries)[:-1]
    chosen = target or (under[-1] if under else None)
    known = {entry.digest for entry in entries if entry.state in SETTLED}
    if chosen is None or chosen == digest or chosen not in known:
        raise UserError(f"after: {chosen}, allowed: the anchor, or a digest that was champion")
    return chosen


NAMES = tuple(field.name for field in fields(Entry))


class StaleEpoch(UserError):  # noqa: N818
    """The writer's epoch is not the newest: another controller has taken over."""


class Ledger:
    """The ledger of one ``state.db``, or of a PostgreSQL database by its URL."""

    def __init__(self, where: str | Path, wait_s: float = BUSY_SECONDS):
        self.database = open_state(where, wait_s)

    @atomic
    def acquire(self, owner: str, now: float) -> int:
        """Become the controller: returns a new epoch; writers with an older one are refused."""
        epoch = self.epoch() + 1
        self.database.insert("epochs", {"epoch": epoch, "owner": owner, "time": float(now)})
        return epoch

    def epoch(self) -> int:
        """The epoch in force, 0 before the first. Reviews are written under it, not a new one."""
        return int(
            self.database.rows("SELECT COALESCE(MAX(epoch), 0) AS now FROM epochs")[0]["now"]
        )

    @atomic
    def append(
        self,
        digest: str,
        state: str,
        *,
        epoch: int,
        actor: str,
        why: str,
        now: float,
        statistics: Mapping[str, Any] | None = None,
        after: str | None = None,
    ) -> Entry:
        """Write one decision and return its row; the present state of a digest is not repeated.

        ``after`` names what a ROLLED_BACK returns to; by default the previous champion. Raises
        StaleEpoch for a writer that was taken over, UserError for a step that is not allowed.
        """
        # Epoch, order of states and insertion in one transaction: whoever was taken over between
        # a look and a write would otherwise write after its successor.
        if epoch != self.epoch():
            raise StaleEpoch(f"epoch {epoch}: was taken over, allowed: {self.epoch()}")
        entries = self._entries("'{}'")
        if state == state_of(entries, digest):
            return self._row(latest_of(entries, digest))
        refused = refusal(entries, digest, state)
        if refused:
            raise UserError(refused)
        row: dict[str, Value] = {
            "seq": len(entries) + 1,
            "time": float(now),
            "epoch": epoch,
            "actor": actor,
            "digest": digest,
            "state": state,
            "why": why,
            "statistics": canonical(statistics or {}),
            "before": champion_of(entries),
            "after": served_after(entries, digest, state, after),
        }
        sealed = seal(entries[-1].hash if entries else "", row)
        self.database.insert("ledger", sealed)
        return _entry(sealed)

    def _row(self, entry: Entry | None) -> Entry:
        """The same row with its statistics."""
        assert entry is not None
        rows = self.database.rows("SELECT * FROM ledger WHERE seq = ?", entry.seq)
        return _entry(dict(rows[0]))

    def _entries(self, statistics: str = "statistics") -> list[Entry]:
        """All rows, oldest first; decisions read them without their statistics."""
        names = ", ".join(name for name in NAMES if name != "statistics")
        rows = self.database.rows(
            f"SELECT {names}, digests, {statistics} AS statistics FROM ledger ORDER BY seq"  # noqa: S608
        )
        if rows:  # the newest row says what is served, whoever reads it and for what
            _require_whole(dict(rows[-1]))
        return [_entry(dict(row)) for row in rows]

    def history(self, limit: int = 50) -> list[Entry]:
        """The newest rows with their statistics, newest first."""
        rows = self.database.rows("SELECT * FROM ledger ORDER BY seq DESC LIMIT ?", limit)
        return [_entry(dict(row)) for row in rows]

    def of(self, digest: str) -> list[Entry]:
        """All rows of one digest with their statistics, oldest first."""
        rows = self.database.rows("SELECT * FROM ledger WHERE digest = ? ORDER BY seq", digest)
        return [_entry(dict(row)) for row in rows]

    def states(self) -> dict[str, str]:
        """What every digest is now, in the order they first appeared."""
        entries = self._entries("'{}'")
        return {e.digest: str(state_of(entries, e.digest)) for e in entries}

    def state(self, digest: str) -> str | None:
        """What a digest is now; None for one the ledger does not know."""
        return state_of(self._entries("'{}'"), digest)

    def champion(self) -> str | None:
        """The digest to serve; None before the anchor is written."""
        return champion_of(self._entries("'{}'"))

    def previous(self) -> str | None:
        """The digest to return to: the champion's predecessor, without what was rolled back."""
        stack = served_stack(self._entries("'{}'"))
        return stack[-2] if len(stack) > 1 else None

    def unsettled(self) -> Entry | None:
        """The newest row of the swap that is neither CHAMPION nor ROLLED_BACK yet, if any."""
        return unsettled(self._entries())

    def open_intent(self) -> Entry | None:
        """A SWAP_INTENT without an outcome; recovery finds out which and writes it."""
        entry = self.unsettled()
        return entry if entry and entry.state == "SWAP_INTENT" else None

    def verify(self) -> int:
        """Check every row; UserError names the first bad one and its field. Returns the count."""
        tip = ""
        rows = [dict(row) for row in self.database.rows("SELECT * FROM ledger ORDER BY seq")]
        for number, row in enumerate(rows, start=1):
            field = "seq" if row["seq"] != number else fault(tip, row)
            if field:
                raise UserError(f"ledger row {number}: {field} is damaged")
            tip = str(row["hash"])
        query = "SELECT epoch FROM epochs ORDER BY epoch"
        epochs = [row["epoch"] for row in self.database.rows(query)]
        if epochs != [*range(1, len(epochs) + 1)] or any(r["epoch"] > len(epochs) for r in rows):
            raise UserError(f"ledger: its epochs are not 1 to {len(epochs)}, each once")
        return len(rows)

    def close(self) -> None:
        """Close the connection."""
        self.database.close()


def _require_whole(row: Mapping[str, Any]) -> None:
    """UserError where what a row decides is not what was written; ``verify`` checks all of it."""
    true = {name: digest_field(row[name]) for name in ("digest", "state", "before", "after")}
    if field := differing(str(row["digests"]), true):
        raise UserError(f"ledger row {row['seq']}: {field} is damaged; `anchorage doctor`")


def _entry(row: Mapping[str, Any]) -> Entry:
    """A stored row as a value."""
    read = {name: row[name] for name in NAMES}
    read["state"] = RENAMED.get(row["state"], row["state"])  # the row's hash is over the old name
    return Entry(**{**read, "statistics": json.loads(str(row["statistics"]))})
