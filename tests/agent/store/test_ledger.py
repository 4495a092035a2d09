"""The ledger: what follows what, who may write, what is served, and that nothing was changed."""

import itertools
import math
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from state_desks import PROMOTION, RACER, A, B, C, D
from state_desks import LedgerDesk as Desk

from agent.errors import UserError
from agent.store import ledger
from agent.store.database import Database, seal
from agent.store.ledger import ALLOWED, SETTLED, UNSETTLED, Entry, Ledger, StaleEpoch

WALK = ("PROPOSED", "EVALUATED", "HOLD", "EVALUATED", "PASSED", "AWAIT_REVIEW", "APPROVED")


@pytest.fixture
def desk(state: str | Path) -> Iterator[Desk]:
    desk = Desk(state)
    desk(A, "ANCHOR")
    yield desk
    desk.ledger.close()


def test_a_promotion_is_a_row_a_state_and_changes_what_is_served_once(desk: Desk) -> None:
    served = []
    for step in PROMOTION:
        entry = desk(B, step)
        assert (entry.actor, entry.why, entry.statistics) == ("controller", f"why {step}", {"n": 3})
        served.append((entry.before, entry.after))
    assert served == [(A, A)] * 4 + [(A, B)] + [(B, B)] * 2
    assert [entry.state for entry in desk.ledger.of(B)] == list(PROMOTION)
    assert desk.ledger.champion() == B
    assert desk.ledger.previous() == A
    assert desk.ledger.states() == {A: "ANCHOR", B: "CHAMPION"}


def test_a_hold_gets_more_rows_then_a_person(desk: Desk) -> None:
    desk(B, *WALK)
    assert desk(B, "SWAP_INTENT", "SWAPPED", "CHAMPION").after == B


def test_an_empty_ledger_takes_the_anchor_only(tmp_path: Path) -> None:
    desk = Desk(tmp_path / "state.db")
    assert desk.ledger.champion() is None
    assert desk.ledger.previous() is None
    with pytest.raises(UserError, match="PROPOSED: the ledger is empty, allowed: ANCHOR"):
        desk(B, "PROPOSED")
    assert desk(A, "ANCHOR").after == A
    desk.ledger.close()


ROUTES = {
    None: (),
    "PROPOSED": PROMOTION[:1],
    "EVALUATED": PROMOTION[:2],
    "PASSED": PROMOTION[:3],
    "HOLD": (*PROMOTION[:2], "HOLD"),
    "REJECT": (*PROMOTION[:2], "REJECT"),
    "AWAIT_REVIEW": (*PROMOTION[:3], "AWAIT_REVIEW"),
    "APPROVED": (*PROMOTION[:3], "AWAIT_REVIEW", "APPROVED"),
    "SWAP_INTENT": PROMOTION[:4],
    "SWAPPED": PROMOTION[:5],
    "BAKING": PROMOTION[:6],
    "CHAMPION": PROMOTION,
    "ROLLED_BACK": (*PROMOTION[:6], "ROLLED_BACK"),
    "ANCHOR": (*PROMOTION, "ANCHOR"),
}


@pytest.mark.parametrize("now", ROUTES)
def test_every_step_the_diagram_lacks_is_refused_and_writes_nothing(
    desk: Desk, now: str | None
) -> None:
    desk(B, *ROUTES[now])
    rows = desk.ledger.history()
    for step in (s for s in ALLOWED if s not in (None, now, *ALLOWED[now])):
        with pytest.raises(UserError, match=f"is {now or 'unknown'}, not to become {step}; "):
            desk(B, str(step))
        assert desk.ledger.history() == rows


def test_the_same_state_again_is_the_same_row(desk: Desk) -> None:
    first = desk(B, "PROPOSED", "EVALUATED")
    desk.epoch = desk.ledger.acquire("next", 50.0)
    assert desk(B, "EVALUATED") == first
    assert len(desk.ledger.history()) == 3


def test_a_controller_that_was_taken_over_cannot_write(desk: Desk) -> None:
    old = desk.epoch
    desk.epoch = desk.ledger.acquire("new", 99.0)
    assert desk.epoch == old + 1
    desk(B, "PROPOSED")
    desk.epoch = old
    with pytest.raises(StaleEpoch, match=f"epoch {old}: was taken over, allowed: {old + 1}"):
        desk(B, "EVALUATED")
    with pytest.raises(StaleEpoch):
        desk(B, "PROPOSED")
    assert desk.ledger.state(B) == "PROPOSED"


def test_an_epoch_nobody_acquired_is_refused(desk: Desk) -> None:
    desk.epoch += 1
    with pytest.raises(StaleEpoch):
        desk(B, "PROPOSED")


def test_one_swap_at_a_time(desk: Desk) -> None:
    desk(C, *PROMOTION[:3])
    for step in PROMOTION[3:6]:
        desk(B, *(PROMOTION[:4] if step == "SWAP_INTENT" else (step,)))
        with pytest.raises(UserError, match=f"bbbbbbbbbbbb is {step}, allowed: one swap at a time"):
            desk(C, "SWAP_INTENT")
    desk(B, "CHAMPION")
    desk(C, "SWAP_INTENT")


def test_an_open_intent_is_found_after_a_restart_and_closed(desk: Desk, tmp_path: Path) -> None:
    assert desk.ledger.open_intent() is None
    intent = desk(B, *PROMOTION[:4])
    again = Ledger(tmp_path / "state.db")
    assert again.open_intent() == intent
    assert again.champion() == A
    again.close()
    desk(B, "ROLLED_BACK")
    assert desk.ledger.open_intent() is None
    assert desk.ledger.champion() == A


def test_a_fall_while_baking_returns_to_what_was_replaced(desk: Desk) -> None:
    desk(B, *PROMOTION)
    desk(C, *PROMOTION[:6])
    assert desk.ledger.champion() == C
    assert desk(C, "ROLLED_BACK").after == B
    assert (desk.ledger.champion(), desk.ledger.previous()) == (B, A)


def test_rollback_to_any_digest_that_was_champion(desk: Desk) -> None:
    desk(B, *PROMOTION)
    desk(C, *PROMOTION)
    desk(D, "PROPOSED")
    for target in (C, D, "e" * 64):
        with pytest.raises(UserError, match="allowed: the anchor, or a digest that was champion"):
            desk(C, "ROLLED_BACK", after=target)
    assert desk(C, "ROLLED_BACK", after=A).after == A
    assert desk.ledger.previous() is None


def test_only_the_champion_can_be_rolled_back(desk: Desk) -> None:
    desk(B, *PROMOTION)
    desk(C, *PROMOTION)
    with pytest.raises(UserError, match="is not the champion, allowed: cccccccccccc"):
        desk(B, "ROLLED_BACK")


def test_a_digest_rolled_back_once_can_serve_again_and_be_rolled_back_again(desk: Desk) -> None:
    desk(B, *PROMOTION)
    desk(B, "ROLLED_BACK")
    assert desk.ledger.state(B) == "ROLLED_BACK"
    desk(C, *PROMOTION)
    assert desk(C, "ROLLED_BACK", after=B).after == B
    assert desk.ledger.state(B) == "CHAMPION"
    assert desk(B, "ROLLED_BACK").after == A
    desk(B, "SWAP_INTENT", "SWAPPED", "CHAMPION")
    assert (desk.ledger.champion(), desk.ledger.previous()) == (B, A)


def test_a_former_champion_swapped_in_again_comes_on_top(desk: Desk) -> None:
    desk(B, *PROMOTION)
    desk(C, *PROMOTION)
    desk(B, "SWAP_INTENT", "SWAPPED", "CHAMPION")
    assert (desk.ledger.champion(), desk.ledger.previous()) == (B, C)


def test_the_champion_is_not_swapped_for_itself(desk: Desk) -> None:
    with pytest.raises(UserError, match="is the champion, allowed: another digest"):
        desk(A, "SWAP_INTENT")


def test_only_the_champion_becomes_the_new_anchor(desk: Desk) -> None:
    desk(B, *PROMOTION)
    desk(C, *PROMOTION)
    with pytest.raises(UserError, match="is not the champion"):
        desk(B, "ANCHOR")
    assert desk(C, "ANCHOR").after == C
    assert desk.ledger.state(C) == "ANCHOR"


STEPS = st.lists(
    st.tuples(st.sampled_from([A, B, C]), st.sampled_from(sorted(s for s in ALLOWED if s))),
    max_size=60,
)


@given(STEPS)
def test_whatever_is_asked_one_champion_and_one_swap(steps: list[tuple[str, str]]) -> None:
    """Invariants of any accepted sequence, on the pure protocol."""
    entries: list[Entry] = []
    for number, (digest, step) in enumerate([(A, "ANCHOR"), *steps], start=1):
        before = ledger.champion_of(entries)
        if ledger.refusal(entries, digest, step) or ledger.state_of(entries, digest) == step:
            continue
        if step == "ROLLED_BACK" and before == digest and len(ledger.served_stack(entries)) == 1:
            continue
        after = ledger.served_after(entries, digest, step, None)
        entries.append(Entry(number, 0.0, 1, "x", digest, step, "", {}, before, after, ""))
        champion = ledger.champion_of(entries)
        assert champion is not None
        assert ledger.state_of(entries, champion) in {"SWAPPED", "BAKING", *SETTLED}
        assert sum(ledger.state_of(entries, d) in UNSETTLED for d in (A, B, C)) <= 1
        stack = ledger.served_stack(entries)
        assert stack[-1] == champion
        assert all(one != other for one, other in itertools.pairwise(stack))
        assert (before == after) or step in ("SWAPPED", "ROLLED_BACK", "ANCHOR")


def test_history_is_newest_first_and_limited(desk: Desk) -> None:
    desk(B, *PROMOTION)
    assert [entry.state for entry in desk.ledger.history(3)] == ["CHAMPION", "BAKING", "SWAPPED"]
    assert len(desk.ledger.history(100)) == 8


def test_statistics_that_are_not_finite_are_undefined(desk: Desk) -> None:
    entry = desk.ledger.append(
        B, "PROPOSED", epoch=desk.epoch, actor="x", why="y", now=1.0,
        statistics={"z": math.inf, "p": (math.nan, 0.1)},
    )  # fmt: skip
    assert entry.statistics == {"z": None, "p": [None, 0.1]}
    assert desk.ledger.verify() == 2


def flip(path: Path, column: str, seq: int, change: Callable[[object], object]) -> None:
    """Change one column behind the ledger's back."""
    with sqlite3.connect(path) as connection:
        connection.execute("DROP TRIGGER ledger_UPDATE")
        row = connection.execute(f"SELECT {column} FROM ledger WHERE seq = ?", [seq]).fetchone()
        query = f"UPDATE ledger SET {column} = ? WHERE seq = ?"
        connection.execute(query, [change(row[0]), seq])
    connection.close()


COLUMNS = (
    "time", "epoch", "actor", "digest", "state", "why", "statistics", "before", "after",
    "prev_hash", "digests", "hash",
)  # fmt: skip


@pytest.mark.parametrize("column", COLUMNS)
def test_one_flipped_bit_is_named(desk: Desk, tmp_path: Path, column: str) -> None:
    desk(B, *PROMOTION)
    assert desk.ledger.verify() == 8

    def change(value: object) -> object:
        if isinstance(value, str):
            return chr(ord(value[0]) ^ 1) + value[1:]
        assert isinstance(value, (int, float))
        return value + 1

    flip(tmp_path / "state.db", column, 4, change)
    with pytest.raises(UserError, match=f"ledger row 4: {column} is damaged"):
        desk.ledger.verify()


def test_a_missing_row_is_named(desk: Desk, tmp_path: Path) -> None:
    desk(B, *PROMOTION)
    with sqlite3.connect(tmp_path / "state.db") as connection:
        connection.execute("DROP TRIGGER ledger_DELETE")
        connection.execute("DELETE FROM ledger WHERE seq = 3")
    connection.close()
    with pytest.raises(UserError, match="ledger row 3: seq is damaged"):
        desk.ledger.verify()


def test_two_controllers_racing_lose_and_double_nothing(
    tmp_path: Path, scale: Callable[[int, int], int]
) -> None:
    count, path = scale(10, 200), tmp_path / "state.db"
    desk = Desk(path)
    desk(A, "ANCHOR")
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(path), name, str(count)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for name in ("one", "two")
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == b"ready\n"
    for racer in racers:
        racer.communicate(b"\n", timeout=600)
    assert [racer.returncode for racer in racers] == [0, 0]
    steps = ["PROPOSED", "EVALUATED", "PASSED", "SWAP_INTENT", "SWAPPED", "CHAMPION"]
    for number in range(count):
        assert [entry.state for entry in desk.ledger.of(f"{number:064x}")] == steps
    assert desk.ledger.verify() == 1 + 6 * count
    assert desk.ledger.champion() == f"{count - 1:064x}"
    epochs = [entry.epoch for entry in desk.ledger.history(10**6)]
    assert epochs == sorted(epochs, reverse=True)
    desk.ledger.close()


@pytest.mark.parametrize("remark", ledger.REMARKS)
def test_a_remark_changes_no_state_of_a_digest(desk: Desk, remark: str) -> None:
    desk(B, *PROMOTION)
    before = (desk.ledger.states(), desk.ledger.champion(), desk.ledger.previous())
    desk(B, remark)
    desk(B, remark)
    assert [entry.state for entry in desk.ledger.of(B)][-2:] == [remark, remark]
    assert (desk.ledger.states(), desk.ledger.champion(), desk.ledger.previous()) == before
    assert desk.ledger.unsettled() is None
    assert desk(B, "ROLLED_BACK").after == A
    assert desk.ledger.verify() == len(desk.ledger.history())
    with pytest.raises(UserError, match=f"is unknown, not to become {remark}"):
        desk("c" * 64, remark)


def test_an_older_row_that_calls_a_passed_candidate_like_its_verdict_is_read(
    desk: Desk, tmp_path: Path
) -> None:
    desk(B, "PROPOSED", "EVALUATED")
    (last,) = desk.ledger.history(1)
    database = Database(tmp_path / "state.db")
    row = {name: getattr(last, name) for name in ledger.NAMES}
    row |= {"seq": last.seq + 1, "state": "PROMOTE", "statistics": "{}"}
    with database.transaction():
        database.insert("ledger", seal(last.hash, {k: v for k, v in row.items() if k != "hash"}))
    database.close()
    assert desk.ledger.state(B) == "PASSED"
    assert desk.ledger.verify() == row["seq"]
    assert desk(B, "SWAP_INTENT").state == "SWAP_INTENT"


@pytest.mark.parametrize("column", ["digest", "state", "before", "after"])
def test_a_changed_decision_serves_nobody(desk: Desk, tmp_path: Path, column: str) -> None:
    """The newest row says what is served: it is compared whenever it is read."""
    desk(B, *PROMOTION)
    flip(tmp_path / "state.db", column, 8, lambda value: f"x{str(value)[1:]}")
    for read in (desk.ledger.champion, desk.ledger.states, desk.ledger.open_intent):
        with pytest.raises(UserError, match=f"ledger row 8: {column} is damaged"):
            read()
