"""Journal and ledger on a real PostgreSQL server: as on SQLite, and through its crashes."""

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
from postgres_server import LossyProxy, PostgresProcess, needs_server
from state_desks import PROMOTION, RACER, A, B, JournalDesk, LedgerDesk

from agent.errors import UserError
from agent.store.database import ROUND_LEASE
from agent.store.journal import Chosen, Journal
from agent.store.ledger import Ledger
from agent.store.migrations import newest
from agent.store.postgres import TABLES, PostgresDatabase, move_state

pytestmark = [pytest.mark.integration, needs_server]


def write_everything(where: Path | str) -> dict[str, list[dict[str, Any]]]:
    """A row of each kind; all columns of all tables afterwards."""
    desk, book = JournalDesk(where), LedgerDesk(where)
    desk.full("one", count=2, digest="1" * 64)
    desk.open("two", parent_digest="1" * 64, run_seed=2**62 + 1, now=1.7e9 + 1 / 3)
    desk.commit(0, "two")
    desk.journal.choose("two", Chosen(1, 0.1 + 0.2, "c" * 64, {"ünï 𝄞 \0 \ud800": [1e-300]}))
    desk.open("three", now=-1.0)
    desk.journal.record_member("three", 0, 1, np.array([np.nan, 1.0]))
    desk.journal.record_member("three", 0, 1, np.array([np.inf, 1.0]))
    book(A, "ANCHOR")
    book(B, *PROMOTION, "ROLLED_BACK")
    assert desk.journal.verify("two") == 1
    assert [run.run_id for run in desk.journal.runs()] == ["one", "two", "three"]
    database = desk.journal.database
    found = {name: [dict(row) for row in database.rows(f"SELECT * FROM {name}")] for name in TABLES}
    for rows in found.values():
        for row in rows:
            row.pop("rowid", None)
    book.ledger.close()
    desk.journal.close()
    return found


def test_the_same_decisions_are_the_same_rows_and_hashes_as_on_sqlite(
    url: str, tmp_path: Path
) -> None:
    assert write_everything(url) == write_everything(tmp_path / "state.db")


@pytest.mark.parametrize("table", ["runs", "choices", "epochs", "ledger"])
def test_rows_can_neither_change_nor_go(url: str, table: str) -> None:
    write_everything(url)
    with PostgresDatabase(url) as database:
        before = database.rows(f"SELECT * FROM {table}")
        for change in (
            f"UPDATE {table} SET {next(iter(before[0]))} = {next(iter(before[0]))}",
            f"DELETE FROM {table}",
            f"TRUNCATE {table} CASCADE",
        ):
            with pytest.raises(psycopg.IntegrityError, match="append-only"):
                database.rows(change)
        assert database.rows(f"SELECT * FROM {table}") == before


def test_all_who_open_it_first_migrate_once(url: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(lambda _: PostgresDatabase(url), range(4)))
    assert opened[0].rows("SELECT version_num AS v FROM alembic_version") == [
        {"v": f"{newest('state'):04}"}
    ]
    for each in opened:
        each.close()


def test_a_newer_database_is_refused(url: str) -> None:
    with PostgresDatabase(url) as database:
        database.rows("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(UserError, match="version 9999, allowed: up to"):
        PostgresDatabase(url)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda url: url + "x", "does not exist"),
        (lambda url: url.replace("/test", "/%test"), "no URL of a database"),
    ],
)
def test_what_no_wait_would_help_is_one_line_without_the_password(
    url: str, change: Callable[[str], str], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        PostgresDatabase(change(url))
    assert "\n" not in str(error.value)
    assert "a-secret" not in str(error.value)


def test_two_controllers_racing_lose_and_double_nothing(url: str) -> None:
    rounds = 5
    ledger = Ledger(url)
    ledger.append("a" * 64, "ANCHOR", epoch=ledger.acquire("x", 0.0), actor="x", why="", now=0.0)
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, url, name, str(rounds)],
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
    assert ledger.verify() == 1 + 6 * rounds
    ledger.close()


def test_a_crash_of_the_server_is_one_line_and_loses_nothing(
    server: PostgresProcess, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    desk, other = JournalDesk(url), Ledger(url)
    desk.open()
    for generation in range(6):
        if generation % 2:
            server.kill()
            back = threading.Timer(1.5, server.start)
            back.start()
        desk.commit(generation)
        assert other.epoch() == 0
        if generation % 2:
            back.join()
    assert desk.journal.verify("run") == 6
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(said) == 3
    assert all("does not answer" in line and "a-secret" not in line for line in said)
    other.close()
    desk.journal.close()


def test_a_server_that_stays_away_is_one_line(
    server: PostgresProcess, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(url, wait_s=0.0)
    server.kill()
    try:
        for ask in (journal.runs, lambda: Journal(url, wait_s=0.0)):
            with pytest.raises(UserError, match="no answer for 0 s") as error:
                ask()
            assert "\n" not in str(error.value)
            assert "a-secret" not in str(error.value)
    finally:
        server.start()
    assert journal.runs() == []
    journal.close()


def test_a_transaction_whose_connection_was_ended_runs_again_whole(url: str) -> None:
    with PostgresDatabase(url) as database, PostgresDatabase(url) as other:
        tries = 0

        def work() -> None:
            nonlocal tries
            tries += 1
            database.insert("epochs", {"epoch": tries, "owner": "o", "time": 0.0})
            if tries == 1:
                own = "SELECT pid FROM pg_stat_activity WHERE state = 'idle in transaction'"
                other.rows(f"SELECT pg_terminate_backend(pid) FROM ({own}) AS own")
            database.insert("epochs", {"epoch": 10 + tries, "owner": "o", "time": 0.0})

        database.atomically(work)
        rows = other.rows("SELECT epoch FROM epochs ORDER BY epoch")
        assert [row["epoch"] for row in rows] == [2, 12]


@pytest.mark.parametrize("reaches", [True, False])
@pytest.mark.parametrize("crashes", [True, False])
def test_an_answer_to_a_commit_that_is_lost_doubles_and_loses_nothing(
    server: PostgresProcess, url: str, reaches: bool, crashes: bool
) -> None:
    """Also where the server crashes and gives the transaction's own number to others."""

    def others() -> None:
        if crashes:
            server.kill()
            server.start()
        with psycopg.connect(url, autocommit=True) as other:
            for _ in range(9):
                other.execute("INSERT INTO others VALUES (1)")

    with psycopg.connect(url, autocommit=True) as other:
        other.execute("CREATE TABLE others (number INTEGER)")
    Ledger(url).close()
    proxy = LossyProxy(server.port, b"COMMIT", reaches, meanwhile=others)
    ledger = Ledger(url.replace(str(server.port), str(proxy.port)))
    assert [ledger.acquire("one", 1.0), ledger.acquire("two", 2.0)] == [1, 2]
    assert proxy.lost == 1
    assert len(ledger.database.rows("SELECT * FROM epochs")) == 2
    ledger.close()
    proxy.close()


def test_one_process_learns_at_a_time_and_still_does_after_a_crash(
    server: PostgresProcess, url: str
) -> None:
    with PostgresDatabase(url) as first, PostgresDatabase(url) as second:

        def refused() -> bool:
            try:
                with second.lease(ROUND_LEASE, "another one learns"):
                    return False
            except UserError as error:
                return str(error) == "another one learns"

        with first.lease(ROUND_LEASE, "taken"):
            assert refused()
            server.kill()
            server.start()
            first.rows("SELECT 1")
            assert refused()
        assert not refused()


def test_killed_writers_leave_whole_generations(url: str) -> None:
    """A process that is killed while it commits leaves its members or its generation, not both."""
    script = (
        "import sys; sys.path[:0] = sys.argv[2].split(':')\n"
        "import state_desks as t; d = t.JournalDesk(sys.argv[1]); d.open()\n"
        "n = d.journal.next_generation('run')\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        "    d.journal.record_member('run', n, 0, t.some_rewards(n)[0]); d.commit(n); n += 1\n"
    )
    with PostgresDatabase(url) as seen:
        for pause in (0.02, 0.05, 0.11):
            writer = subprocess.Popen(
                [sys.executable, "-c", script, url, ":".join(sys.path)], stdout=subprocess.PIPE
            )
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"ready\n"
            time.sleep(pause)
            writer.kill()
            writer.communicate()
            journal = Journal(url)
            done = journal.next_generation("run")
            assert journal.verify("run") == done
            members = seen.rows("SELECT generation FROM members")
            assert all(row["generation"] == done for row in members)
            journal.close()


def test_a_home_that_was_on_a_file_goes_on_on_the_server(url: str, tmp_path: Path) -> None:
    file = tmp_path / "state.db"
    before = write_everything(file)
    assert move_state(file, url) == url
    with PostgresDatabase(url) as database:
        for table, rows in before.items():
            moved = database.rows(f"SELECT * FROM {table}")
            assert [{k: row[k] for k in row if k != "rowid"} for row in moved] == rows
    journal, ledger = Journal(url), Ledger(url)
    assert (journal.verify("one"), ledger.verify()) == (2, 9)
    assert [run.run_id for run in journal.runs()] == ["one", "two", "three"]
    ledger.close()
    journal.close()
    assert [path.name for path in tmp_path.iterdir()] == ["state.db.moved"]
    move_state(file, url)  # nothing is left to move


def test_a_move_that_ended_before_the_file_had_its_other_name_is_ended(
    url: str, tmp_path: Path
) -> None:
    file = tmp_path / "state.db"
    write_everything(file)
    move_state(file, url)
    file.with_name("state.db.moved").rename(file)
    with closing(Ledger(url)) as ledger:
        rows = ledger.database.rows("SELECT * FROM ledger")
        move_state(file, url)
        assert ledger.database.rows("SELECT * FROM ledger") == rows
    assert not file.exists()


def test_a_server_with_the_ledger_of_another_service_is_refused(url: str, tmp_path: Path) -> None:
    file = tmp_path / "state.db"
    write_everything(url)
    book = LedgerDesk(file)
    book(B, "ANCHOR")
    book.ledger.close()
    with pytest.raises(UserError, match="has the ledger of another service") as error:
        move_state(file, url)
    assert "a-secret" not in str(error.value)
    assert file.exists()
