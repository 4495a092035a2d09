"""The one opener of state.db: durable, migrated from blank and from old, append-only."""

import sqlite3
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from agent.errors import UserError
from agent.store.database import STATE, Database

TABLES = ("runs", "generations", "outcomes", "epochs", "ledger")


def schema(path: Path) -> set[tuple[str, str]]:
    connection = sqlite3.connect(path)
    try:
        return set(connection.execute("SELECT name, sql FROM sqlite_master WHERE sql NOT NULL"))
    finally:
        connection.close()


def test_every_old_version_becomes_the_blank_one(tmp_path: Path) -> None:
    Database(tmp_path / "blank.db").close()
    for version in range(len(STATE)):
        path = tmp_path / f"from{version}.db"
        Database(path, STATE[:version]).close()
        Database(path).close()
        assert schema(path) == schema(tmp_path / "blank.db")


def test_rows_of_an_old_version_survive(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    row = {
        "run_id": "r", "anchor_digest": "a", "parent_digest": "a", "parent_run": None,
        "target": "t", "run_seed": 3, "plan": "{}", "created": 1.5, "prev_hash": "",
        "digests": "{}", "hash": "h",
    }  # fmt: skip
    with Database(path, STATE[:1]) as old:
        old.insert("runs", row)
    with Database(path) as new:
        assert [dict(found) for found in new.rows("SELECT * FROM runs")] == [row]


def test_a_migration_that_fails_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    Database(path, STATE[:1]).close()
    before = schema(path)
    broken = (STATE[0], ("CREATE TABLE fine (x)", "CREATE TABLE runs (twice)"))
    with pytest.raises(UserError, match="runs already exists"):
        Database(path, broken)
    assert schema(path) == before


def test_a_newer_database_is_refused_untouched(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    Database(path).close()
    with pytest.raises(UserError, match=f"version {len(STATE)}, allowed: up to 1"):
        Database(path, STATE[:1])


def test_what_is_not_a_database_is_named(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    path.write_bytes(b"not a database, but long enough to be read as one" * 20)
    with pytest.raises(UserError, match=r"state\.db: cannot be opened"):
        Database(path)


def test_settings_that_make_a_commit_durable(tmp_path: Path) -> None:
    with Database(tmp_path / "state.db") as database:
        assert database.rows("PRAGMA journal_mode")[0][0] == "wal"
        assert database.rows("PRAGMA synchronous")[0][0] == 2
        assert database.rows("PRAGMA busy_timeout")[0][0] == 30_000
        assert database.rows("PRAGMA foreign_keys")[0][0] == 1


def test_only_its_owner_may_read_it(tmp_path: Path) -> None:
    path = tmp_path / "home" / "state.db"
    with Database(path) as database:
        database.insert("epochs", {"epoch": 1, "owner": "o", "time": 0.0})
        for file in path.parent.iterdir():
            assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize("table", TABLES)
def test_rows_can_neither_change_nor_go(tmp_path: Path, table: str) -> None:
    with Database(tmp_path / "state.db") as database:
        database.rows("PRAGMA foreign_keys = OFF")
        columns = database.rows(f"PRAGMA table_info({table})")
        zero = {"TEXT": "x", "INTEGER": 1, "REAL": 1.0, "BLOB": b"x"}
        database.insert(table, {column["name"]: zero[column["type"]] for column in columns})
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            database.rows(f"UPDATE {table} SET {columns[0]['name']} = {columns[0]['name']}")
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            database.rows(f"DELETE FROM {table}")
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            database.rows(f"REPLACE INTO {table} SELECT * FROM {table}")


def test_a_transaction_that_raises_writes_nothing(tmp_path: Path) -> None:
    with Database(tmp_path / "state.db") as database:

        def half() -> None:
            with database.transaction():
                database.insert("epochs", {"epoch": 1, "owner": "o", "time": 0.0})
                raise KeyError

        with pytest.raises(KeyError):
            half()
        assert database.rows("SELECT * FROM epochs") == []


def test_a_writer_that_waits_too_long_is_told_which_file(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    with Database(path) as first, Database(path, busy_seconds=0.05) as second:

        def late() -> None:
            with second.transaction():
                raise AssertionError

        with first.transaction(), pytest.raises(UserError, match=r"state\.db: database is locked"):
            late()
        with second.transaction():
            second.insert("epochs", {"epoch": 1, "owner": "o", "time": 0.0})
        assert len(first.rows("SELECT * FROM epochs")) == 1


def test_threads_of_one_connection_take_turns(tmp_path: Path) -> None:
    with Database(tmp_path / "state.db") as database:

        def add() -> None:
            for _ in range(20):
                with database.transaction():
                    top = database.rows("SELECT COALESCE(MAX(epoch), 0) FROM epochs")[0][0]
                    database.insert("epochs", {"epoch": top + 1, "owner": "o", "time": 0.0})

        threads = [threading.Thread(target=add) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        rows = database.rows("SELECT epoch FROM epochs ORDER BY epoch")
        assert [row["epoch"] for row in rows] == list(range(1, 81))


@pytest.mark.parametrize("trial", range(10))
def test_all_who_open_a_new_file_at_once_succeed(tmp_path: Path, trial: int) -> None:
    together = threading.Barrier(6)

    def begin(_: int) -> Database:
        together.wait()
        return Database(tmp_path / "state.db")

    with ThreadPoolExecutor(6) as pool:
        for database in pool.map(begin, range(6)):
            database.close()
    assert [path.name for path in tmp_path.iterdir()] == ["state.db"]


def test_opening_again_keeps_the_locks_of_a_connection_that_is_open(tmp_path: Path) -> None:
    """Else another process takes itself for the last one and removes the log under our feet."""
    path = tmp_path / "state.db"
    first = Database(path)
    Database(path).close()
    code = (
        "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute('PRAGMA user_version');"
    )
    subprocess.run(
        [
            sys.executable,
            "-c",
            code + "c.execute('CREATE TABLE t (x)'); c.commit(); c.close()",
            path,
        ],
        check=True,
    )
    assert path.with_name("state.db-wal").exists()
    first.close()
