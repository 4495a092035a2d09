"""The one opener of state.db: durable, migrated from blank and from old, append-only."""

import os
import sqlite3
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from agent.errors import UserError
from agent.store.database import Database, refuse_shared
from agent.store.journal import Journal
from agent.store.ledger import Ledger
from agent.store.migrations import newest

OLD = Path(__file__).with_name("state_v3.sql")

TABLES = ("runs", "generations", "outcomes", "epochs", "ledger")


def schema(path: Path) -> set[tuple[str, str]]:
    connection = sqlite3.connect(path)
    try:
        return set(connection.execute("SELECT name, sql FROM sqlite_master WHERE sql NOT NULL"))
    finally:
        connection.close()


def old(path: Path) -> Path:
    """The file as the last program without Alembic left it, with rows in every table."""
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(OLD.read_text("utf-8"))
    return path


def test_the_old_version_becomes_the_blank_one(tmp_path: Path) -> None:
    Database(tmp_path / "blank.db").close()
    Database(old(tmp_path / "old.db")).close()
    assert schema(tmp_path / "old.db") == schema(tmp_path / "blank.db")


def test_rows_of_an_old_version_survive_and_go_on(tmp_path: Path) -> None:
    path = old(tmp_path / "state.db")
    with closing(sqlite3.connect(path)) as connection:
        before = {name: list(connection.execute(f"SELECT * FROM {name}")) for name in TABLES}
    journal, ledger = Journal(path), Ledger(path)
    assert (journal.verify("first"), journal.verify("second"), ledger.verify()) == (2, 1, 2)
    assert list(journal.members_done("second", 1)) == [0]
    ledger.append("d" * 64, "EVALUATED", epoch=ledger.epoch(), actor="loop", why="", now=30.0)
    assert ledger.verify() == 3
    with Database(path) as database:
        for name in TABLES:
            found = [tuple(row) for row in database.rows(f"SELECT * FROM {name}")]
            assert found[: len(before[name])] == before[name]
    ledger.close()
    journal.close()


def test_a_step_that_fails_leaves_nothing(tmp_path: Path) -> None:
    path = old(tmp_path / "state.db")
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TABLE leases")  # so that the step after the first one fails
    before = schema(path)
    with pytest.raises(UserError, match=r"state\.db: cannot be brought up .*no such table: leases"):
        Database(path)
    assert schema(path) == before


def test_the_header_and_alembic_agree_on_the_newest_step(tmp_path: Path) -> None:
    with Database(tmp_path / "state.db") as database:
        assert database.rows("PRAGMA user_version")[0][0] == newest("state")
        assert int(database.rows("SELECT * FROM alembic_version")[0][0]) == newest("state")


def test_a_newer_database_is_refused_untouched(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    with Database(path) as database:
        database.rows(f"PRAGMA user_version = {newest('state') + 1}")
    before = schema(path)
    with pytest.raises(UserError, match=f"version {newest('state') + 1}, allowed: up to"):
        Database(path)
    assert schema(path) == before


@pytest.mark.proof
def test_opening_a_current_database_does_not_load_alembic(tmp_path: Path) -> None:
    Database(tmp_path / "state.db").close()
    code = (
        "import sys; from pathlib import Path; from agent.store.database import Database;"
        "Database(Path(sys.argv[1])).close(); print('alembic' in sys.modules)"
    )
    argv = [sys.executable, "-c", code, str(tmp_path / "state.db")]
    done = subprocess.run(argv, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "False"


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


@pytest.mark.parametrize(("kind", "refused"), [("nfs4", True), ("cifs", True), ("ext4", False)])
def test_a_folder_of_another_machine_is_refused(tmp_path: Path, kind: str, refused: bool) -> None:
    device = tmp_path.stat().st_dev
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        f"21 20 9:99 / /elsewhere rw - nfs4 host:/x rw\n"
        f"22 20 {os.major(device)}:{os.minor(device)} / /srv rw shared:1 - {kind} host:/y rw\n"
    )
    if refused:
        with pytest.raises(UserError, match=rf"lies on {kind}, .*allowed: .*state\.url") as error:
            refuse_shared(tmp_path, mounts)
        assert "\n" not in str(error.value)
    else:
        refuse_shared(tmp_path, mounts)
