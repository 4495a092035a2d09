"""The journal: in order, whole or not at all, and any changed bit is named."""

import math
import pickle
import sqlite3
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from state_desks import ANCHOR, a_step, some_rewards
from state_desks import JournalDesk as Desk

from agent.errors import UserError
from agent.learner.drift import Drift
from agent.store.journal import DamagedError, Journal
from agent.store.packed import pack, unpack


@pytest.fixture
def desk(state: str | Path) -> Iterator[Desk]:
    desk = Desk(state)
    yield desk
    desk.journal.close()


@given(
    arrays(
        np.float64,
        st.tuples(st.integers(0, 5), st.integers(0, 5)),
        elements=st.floats(allow_nan=True, allow_infinity=True, allow_subnormal=True),
    )
)
def test_rewards_come_back_bit_for_bit(rewards: np.ndarray) -> None:
    again = unpack(pack(rewards))
    assert again.shape == rewards.shape
    assert again.tobytes() == rewards.tobytes()


def test_what_is_committed_is_what_is_read(desk: Desk) -> None:
    opened = desk.open()
    assert (opened.plan, opened.digest) == ({"sigma": 0.01, "rows": ["x1", "x2"]}, None)
    hashes = [desk.commit(generation) for generation in range(3)]
    read = desk.journal.generations("run")
    assert [row.hash for row in read] == hashes
    for number, row in enumerate(read):
        assert row.generation == number
        assert row.step == a_step(number, some_rewards(number))
        assert row.rewards.tobytes() == some_rewards(number).tobytes()
        assert row.delta_hash == f"{number:064x}"
        assert row.drift == {"norm": 1.5 * number, "predicted": None}


def test_a_reading_of_the_drift_meter_comes_back(desk: Desk) -> None:
    desk.open()
    rewards = some_rewards(0)
    drift = Drift(0, 2.0, 1.0, {"model.norm": 1.0}, 3.0, None, 0.5, 0.25, None)
    desk.journal.commit("run", a_step(0, rewards), rewards, "0" * 64, drift)
    assert Drift.from_json(desk.journal.generations("run")[0].drift) == drift


def test_a_run_opens_once_and_resumes_with_the_same_values(desk: Desk) -> None:
    first = desk.open()
    assert desk.open(now=99.0) == first
    with pytest.raises(UserError, match="run run: was opened with another run_seed, plan"):
        desk.open(run_seed=8, plan={})
    assert len(desk.journal.runs()) == 1


def test_generations_come_in_order_and_end(desk: Desk) -> None:
    desk.open()
    with pytest.raises(UserError, match="generation 1, allowed: 0"):
        desk.commit(1)
    desk.commit(0)
    with pytest.raises(UserError, match="generation 0, allowed: 1"):
        desk.commit(0)
    with pytest.raises(UserError, match="generation 0, allowed: 1"):
        desk.journal.record_member("run", 0, 0, np.ones(3))
    desk.journal.finish("run", "d" * 64, "completed", now=1.0)
    with pytest.raises(UserError, match="run run: is finished"):
        desk.commit(1)
    desk.journal.finish("run", "d" * 64, "completed", now=2.0)
    with pytest.raises(UserError, match="ended as dddd"):
        desk.journal.finish("run", "e" * 64, "completed", now=2.0)


def test_rewards_of_another_shape_and_unknown_runs_are_refused(desk: Desk) -> None:
    desk.open()
    step = a_step(0, some_rewards(0))
    with pytest.raises(UserError, match=r"shape \(4,\), allowed: \(members, examples\)"):
        desk.journal.commit("run", step, np.ones(4), "0" * 64, {})
    for ask in (desk.journal.run, desk.journal.verify, desk.journal.ancestry):
        with pytest.raises(UserError, match="run 'other': not in the journal"):
            ask("other")


def test_members_of_the_open_generation_survive_and_go_with_its_commit(
    desk: Desk, tmp_path: Path
) -> None:
    desk.open()
    rewards = some_rewards(0)
    desk.journal.record_member("run", 0, 2, rewards[2])
    desk.journal.record_member("run", 0, 0, np.array([math.nan, 1.0, math.inf]))
    again = Journal(tmp_path / "state.db")
    done = again.members_done("run", 0)
    assert list(done) == [0, 2]
    assert done[2].tobytes() == rewards[2].tobytes()
    assert np.isnan(done[0][0])
    assert again.members_done("run", 1) == {}
    again.close()
    desk.commit(0)
    assert desk.journal.members_done("run", 0) == {}


@pytest.mark.parametrize("change", ["rewards = X'00'", "member = 5", "sha256 = 'x'"])
def test_a_damaged_member_is_evaluated_again(desk: Desk, tmp_path: Path, change: str) -> None:
    desk.open()
    for index in range(2):
        desk.journal.record_member("run", 0, index, np.ones(3))
    with sqlite3.connect(tmp_path / "state.db") as connection:
        connection.execute(f"UPDATE members SET {change} WHERE member = 1")
    connection.close()
    assert list(desk.journal.members_done("run", 0)) == [0]
    desk.journal.record_member("run", 0, 1, np.ones(3))
    assert list(desk.journal.members_done("run", 0)) == [0, 1]


def test_candidates_are_found_by_digest_or_prefix(desk: Desk) -> None:
    desk.full("one", digest="12345678aa" + "0" * 54)
    desk.full("two", digest="12345678bb" + "0" * 54)
    desk.full("again", digest="12345678aa" + "0" * 54)
    desk.open("unfinished")
    assert desk.journal.candidate("12345678aa").run_id == "one"
    assert desk.journal.candidate("12345678bb" + "0" * 54).run_id == "two"
    with pytest.raises(UserError, match="several begin so, allowed: more characters"):
        desk.journal.candidate("12345678")
    for unknown in ("1234567", "f" * 64, "%", ""):
        with pytest.raises(UserError, match="no finished run made it"):
            desk.journal.candidate(unknown)


def test_lineage_goes_back_to_the_anchor_even_where_nothing_changed(desk: Desk) -> None:
    one, two, three = ("1" * 64, "2" * 64, "3" * 64)
    desk.full("one", digest=one)
    desk.full("two", digest=two, parent_digest=one)
    desk.full("still", digest=two, parent_digest=two)
    desk.full("three", digest=three, parent_digest=two)
    assert desk.journal.lineage(three) == ["one", "two", "three"]
    assert desk.journal.lineage(two) == ["one", "two"]
    assert desk.journal.ancestry("still") == ["one", "two", "still"]
    assert desk.journal.lineage(ANCHOR) == []
    with pytest.raises(UserError, match="no finished run made it"):
        desk.open("orphan", parent_digest="9" * 64)
    with pytest.raises(UserError, match="its parent's: aaaa"):
        desk.open("foreign", parent_digest=one, anchor_digest="b" * 64)


def flipped(value: object, bit: int) -> object:
    """The value with one bit turned, as the file holds it."""
    if isinstance(value, int):
        return value ^ (1 << bit % 40)
    if isinstance(value, float):
        (raw,) = struct.unpack("<Q", struct.pack("<d", value))
        return struct.unpack("<d", struct.pack("<Q", raw ^ (1 << bit % 52)))[0]
    content = bytearray(value if isinstance(value, bytes) else str(value).encode())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    return bytes(content)


def flip(path: Path, table: str, where: str, column: str, bit: int) -> None:
    """Turn one bit of one column behind the journal's back."""
    connection = sqlite3.connect(path)
    with connection:
        connection.execute(f"DROP TRIGGER {table}_UPDATE")
        query = f"SELECT {column}, typeof({column}) FROM {table} WHERE {where}"
        value, kind = connection.execute(query).fetchone()
        slot = "CAST(? AS TEXT)" if kind == "text" else "?"
        query = f"UPDATE {table} SET {column} = {slot} WHERE {where}"
        connection.execute(query, [flipped(value, bit)])
    connection.close()


LINKS = ("prev_hash", "digests", "hash")
GENERATION_COLUMNS = ("payload", "rewards", "delta_hash", "drift", *LINKS)
RUN_COLUMNS = (
    "anchor_digest",
    "parent_digest",
    "target",
    "run_seed",
    "plan",
    "created",
    *LINKS[1:],
)
OUTCOME_COLUMNS = ("digest", "generations", "reason", "finished", *LINKS)


def test_what_is_damaged_survives_pickling() -> None:
    again = pickle.loads(pickle.dumps(DamagedError("r", 3, "rewards")))
    assert str(again) == "run r, generation 3: rewards is damaged"
    assert (again.run_id, again.generation, again.field) == ("r", 3, "rewards")


def damage(desk: Desk) -> DamagedError:
    with pytest.raises(DamagedError) as error:
        desk.journal.verify("run")
    assert "\n" not in str(error.value)
    return error.value


@pytest.mark.parametrize("column", GENERATION_COLUMNS)
def test_a_flipped_bit_of_a_generation_is_named(
    desk: Desk, tmp_path: Path, column: str, scale: Callable[[int, int], int]
) -> None:
    draw = np.random.default_rng(len(column))
    for number in range(scale(3, 40)):
        path = tmp_path / f"{number}.db"
        other, generation = Desk(path), int(draw.integers(6))
        other.full()
        assert other.journal.verify("run") == 6
        flip(path, "generations", f"generation = {generation}", column, int(draw.integers(10_000)))
        found = damage(other)
        assert (found.run_id, found.generation, found.field) == ("run", generation, column)
        other.journal.close()


@pytest.mark.parametrize("column", RUN_COLUMNS)
def test_a_flipped_bit_of_a_run_is_named(desk: Desk, tmp_path: Path, column: str) -> None:
    desk.full()
    flip(tmp_path / "state.db", "runs", "run_id = 'run'", column, 77)
    found = damage(desk)
    assert (found.generation, found.field) == ("start", column)


@pytest.mark.parametrize("column", OUTCOME_COLUMNS)
def test_a_flipped_bit_of_an_outcome_is_named(desk: Desk, tmp_path: Path, column: str) -> None:
    desk.full()
    flip(tmp_path / "state.db", "outcomes", "run_id = 'run'", column, 77)
    found = damage(desk)
    assert (found.generation, found.field) == ("outcome", column)


@pytest.mark.parametrize("column", ["generation", "run_id"])
def test_a_row_that_no_longer_belongs_is_named(desk: Desk, tmp_path: Path, column: str) -> None:
    desk.full()
    connection = sqlite3.connect(tmp_path / "state.db")
    with connection:
        connection.execute("DROP TRIGGER generations_UPDATE")
        value = {"generation": 12, "run_id": "sun"}[column]
        query = f"UPDATE generations SET {column} = ? WHERE generation = 4"
        connection.execute(query, [value])
    connection.close()
    found = damage(desk)
    assert (found.generation, found.field) == (4, "generation")


def test_a_row_cut_off_a_finished_run_is_named(desk: Desk, tmp_path: Path) -> None:
    desk.full()
    connection = sqlite3.connect(tmp_path / "state.db")
    with connection:
        connection.execute("DROP TRIGGER generations_DELETE")
        connection.execute("DELETE FROM generations WHERE generation = 5")
    connection.close()
    found = damage(desk)
    assert (found.generation, found.field) == (5, "generation")
