"""The files beside a round, in ``runs/<round>/``: their names, and how each is written and read.

rows.json     the prompts and rows that every member answers, in order; null where one was deleted
selecting.json  the prompts and rows that choose the candidate, likewise
curve.json    accuracy by generation and task, measured while the round runs
selection.json  rewards of the selection rows by generation, to choose the candidate
pace.json     seconds of each generation, by part
judged.json   the gate's report, and where the per-sample tables behind it lie
shown.json    how much of the round MLflow has been given
given_up      an empty marker: rows were deleted before the round ended, so it cannot go on

Every document is replaced by a rename: a reader sees the old one or the new one, never half.
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from agent.errors import UserError
from agent.home import Home, read_sealed, write_atomically, write_sealed

ROWS, CURVE, PACE, SELECTION = "rows.json", "curve.json", "pace.json", "selection.json"
SELECTING = "selecting.json"
JUDGED, SHOWN, GIVEN_UP = "judged.json", "shown.json", "given_up"

Entry = Mapping[str, Any]  # row, messages, sent (flows.learn.collect); in old homes a row alone
Point = Mapping[str, Any]  # generation, task, accuracy (a share), n
PaceRow = Mapping[str, float]  # generation, tokens, seconds.<part>, share.learner


class RoundFiles:
    """The files of one round; a document that was never written reads as an empty one."""

    def __init__(self, home: Home, run_id: str) -> None:
        self._folder = home.run(run_id)

    # -- rows -------------------------------------------------------------------------------

    def write_rows(self, rows: Sequence[Entry | None], name: str = ROWS) -> str:
        """Keep the rows of a round; returns the file's sha256, which belongs into its plan."""
        text = json.dumps(list(rows), default=str)
        self._write(name, text)
        return hashlib.sha256(text.encode()).hexdigest()

    def rows(self, name: str = ROWS) -> list[Entry | None]:
        """The rows as they are now; None where one was deleted."""
        return list(self._read(name, []))

    def original_rows(self, sha256: str, name: str = ROWS) -> list[Entry]:
        """The rows that the round was opened with.

        Raises:
            UserError: They are gone or changed: their file has another sha256.
        """
        path = self._folder / name
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if hashlib.sha256(text.encode()).hexdigest() != sha256:
            raise UserError(f"{path}: not the rows that round {self._folder.name} was opened with")
        rows: list[Entry] = json.loads(text)
        return rows

    def blank_rows(self, positions: Collection[int], *, finished: bool, name: str = ROWS) -> None:
        """Delete the rows at these positions; the others keep theirs.

        A round that is not finished is given up. Its marker comes first: a process that ends
        between the two writes must not leave a round that looks as if it could go on.
        """
        before = self.rows(name)
        after = [None if place in positions else row for place, row in enumerate(before)]
        if after == before:
            return
        if not finished:
            (self._folder / GIVEN_UP).touch()
        self.write_rows(after, name)

    def given_up(self) -> bool:
        """Whether rows were deleted before the round was finished."""
        return (self._folder / GIVEN_UP).exists()

    # -- measurements -----------------------------------------------------------------------

    def curve(self) -> tuple[Point, ...]:
        """Every accuracy measured so far, in the order it was measured."""
        return tuple(self._read(CURVE, []))

    def add_to_curve(self, points: Sequence[Point]) -> None:
        """Append the measurements of one generation."""
        self._write(CURVE, json.dumps([*self.curve(), *points]))

    def selection(self) -> dict[int, list[float]]:
        """Rewards of the selection rows, in one order, by the generations done before."""
        return {int(generation): row for generation, row in self._sealed(SELECTION).items()}

    def add_to_selection(self, generation: int, rewards: Sequence[float]) -> None:
        """Keep the rewards of one generation."""
        kept = self.selection() | {generation: list(rewards)}
        self._seal(SELECTION, {str(each): row for each, row in kept.items()})

    def pace(self) -> tuple[PaceRow, ...]:
        """One row a generation, in order."""
        return tuple(self._read(PACE, []))

    def add_to_pace(self, row: PaceRow) -> None:
        """Append one generation's row, in place of an earlier row of the same generation."""
        others = [each for each in self.pace() if each["generation"] != row["generation"]]
        self._write(PACE, json.dumps([*others, row]))

    # -- verdict ----------------------------------------------------------------------------

    def write_judged(self, report: Mapping[str, Any], tables: Mapping[str, Sequence[str]]) -> None:
        """Keep the gate's report, and the per-sample tables of each model by their paths."""
        self._seal(JUDGED, {"report": report, "tables": tables})

    def judged(self) -> Mapping[str, Any] | None:
        """{"report", "tables"}; None before the round was judged."""
        return self._sealed(JUDGED) or None

    def judged_at(self) -> int | None:
        """When the verdict was written, in ns: another number when a round is judged again."""
        path = self._folder / JUDGED
        return path.stat().st_mtime_ns if path.is_file() else None

    # -- what MLflow has --------------------------------------------------------------------

    def shown(self) -> dict[str, Any]:
        """{"generations": how many were shown, "report": ``judged_at`` of the one shown}."""
        return {"generations": 0, "report": None} | self._sealed(SHOWN)

    def write_shown(self, generations: int, report: int | None) -> None:
        """Remember how much was shown."""
        self._seal(SHOWN, {"generations": generations, "report": report})

    def forget_shown(self) -> None:
        """Have all of the round shown again."""
        (self._folder / SHOWN).unlink(missing_ok=True)

    def _read(self, name: str, default: Any) -> Any:
        path = self._folder / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else default

    def _sealed(self, name: str) -> dict[str, Any]:
        """A document that decides something; UserError where it is not what was written."""
        path = self._folder / name
        return read_sealed(path) if path.is_file() else {}

    def _seal(self, name: str, document: Mapping[str, Any]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        write_sealed(self._folder / name, document)

    def _write(self, name: str, text: str) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._folder / name, text)
