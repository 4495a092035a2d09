"""state.db: one SQLite file, one way to open it, migrations that are only ever appended.

WAL and synchronous=FULL: what a transaction returned from is on the disk. BEGIN IMMEDIATE: one
writer at a time, whoever comes second waits BUSY_SECONDS. Times are passed in, unix seconds.
"""

import os
import sqlite3
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from agent.errors import UserError

BUSY_SECONDS = 30.0

Migration = tuple[str, ...]

JOURNAL: Migration = (
    """CREATE TABLE runs (
        run_id TEXT PRIMARY KEY, anchor_digest TEXT NOT NULL, parent_digest TEXT NOT NULL,
        parent_run TEXT REFERENCES runs (run_id), target TEXT NOT NULL, run_seed INTEGER NOT NULL,
        plan TEXT NOT NULL, created REAL NOT NULL, prev_hash TEXT NOT NULL,
        digests TEXT NOT NULL, hash TEXT NOT NULL) STRICT""",
    """CREATE TABLE generations (
        run_id TEXT NOT NULL REFERENCES runs (run_id), generation INTEGER NOT NULL,
        payload TEXT NOT NULL, rewards BLOB NOT NULL, delta_hash TEXT NOT NULL,
        drift TEXT NOT NULL, prev_hash TEXT NOT NULL, digests TEXT NOT NULL, hash TEXT NOT NULL,
        PRIMARY KEY (run_id, generation)) STRICT""",
    """CREATE TABLE outcomes (
        run_id TEXT PRIMARY KEY REFERENCES runs (run_id), digest TEXT NOT NULL,
        generations INTEGER NOT NULL, reason TEXT NOT NULL, finished REAL NOT NULL,
        prev_hash TEXT NOT NULL, digests TEXT NOT NULL, hash TEXT NOT NULL) STRICT""",
    "CREATE INDEX outcomes_digest ON outcomes (digest)",
    """CREATE TABLE members (
        run_id TEXT NOT NULL REFERENCES runs (run_id), generation INTEGER NOT NULL,
        member INTEGER NOT NULL, rewards BLOB NOT NULL, sha256 TEXT NOT NULL,
        PRIMARY KEY (run_id, generation, member)) STRICT""",
)

LEDGER: Migration = (
    """CREATE TABLE epochs (
        epoch INTEGER PRIMARY KEY, owner TEXT NOT NULL, time REAL NOT NULL) STRICT""",
    """CREATE TABLE ledger (
        seq INTEGER PRIMARY KEY, time REAL NOT NULL, epoch INTEGER NOT NULL, actor TEXT NOT NULL,
        digest TEXT NOT NULL, state TEXT NOT NULL, why TEXT NOT NULL, statistics TEXT NOT NULL,
        before TEXT, after TEXT NOT NULL, prev_hash TEXT NOT NULL, digests TEXT NOT NULL,
        hash TEXT NOT NULL) STRICT""",
    "CREATE INDEX ledger_digest ON ledger (digest, seq)",
    """CREATE TABLE leases (
        name TEXT PRIMARY KEY, owner TEXT NOT NULL, expires REAL NOT NULL) STRICT""",
)


def append_only(*tables: str) -> Migration:
    """Triggers that refuse to change or remove a row."""
    return tuple(
        f"CREATE TRIGGER {table}_{verb} BEFORE {verb} ON {table} "
        f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
        for table in tables
        for verb in ("UPDATE", "DELETE")
    )


# Only ever appended: the position of a migration is the version a database is brought to.
STATE: tuple[Migration, ...] = (
    JOURNAL,
    LEDGER,
    append_only("runs", "generations", "outcomes", "epochs", "ledger"),
)


def private_file(path: Path) -> None:
    """Make an empty database in WAL mode, mode 0600, unless the file is there.

    SQLite's change to WAL does not wait for whoever makes it at the same time, it fails; so the
    file gets its name when it is in WAL already. An existing file is not even opened: closing any
    descriptor of a file drops all of this process's locks on it, SQLite's included; another
    process would then take the log away from under our open connections.
    """
    if path.exists():
        return
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(descriptor)
    try:
        with closing(sqlite3.connect(name)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
        with suppress(FileExistsError):
            os.link(name, path)
    finally:
        Path(name).unlink()


class Database:
    """One connection, safe to share between threads; transactions take turns."""

    def __init__(
        self,
        path: Path,
        migrations: Sequence[Migration] = STATE,
        busy_seconds: float = BUSY_SECONDS,
    ):
        self.path = path
        self._lock = threading.RLock()
        path.parent.mkdir(parents=True, exist_ok=True)
        private_file(path)
        self._connection = sqlite3.connect(
            path, timeout=busy_seconds, isolation_level=None, check_same_thread=False
        )
        self._connection.row_factory = sqlite3.Row
        # A damaged text must reach the hash that names it, not stop at its decoding.
        self._connection.text_factory = lambda raw: raw.decode("utf-8", "surrogateescape")
        try:
            self._prepare(migrations)
        except (UserError, sqlite3.Error) as error:
            self.close()
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path}: cannot be opened as a database ({error})") from error

    def _prepare(self, migrations: Sequence[Migration]) -> None:
        """Durable settings, then the migrations this file has not seen, all in one transaction."""
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = FULL")
        self._connection.execute("PRAGMA foreign_keys = ON")
        # Without it REPLACE would remove a row behind the back of its trigger.
        self._connection.execute("PRAGMA recursive_triggers = ON")
        with self.transaction():
            version = int(self._connection.execute("PRAGMA user_version").fetchone()[0])
            if version > len(migrations):
                raise UserError(
                    f"{self.path}: has version {version}, allowed: up to {len(migrations)}; "
                    "a newer program wrote it"
                )
            for migration in migrations[version:]:
                for statement in migration:
                    self._connection.execute(statement)
            self._connection.execute(f"PRAGMA user_version = {len(migrations)}")

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Everything inside is written together, or not at all; only one writer is inside."""
        with self._lock:
            self.rows("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def rows(self, query: str, *values: Any) -> list[sqlite3.Row]:
        """All rows a query gives; UserError where the file itself is damaged."""
        try:
            with self._lock:
                return list(self._connection.execute(query, values))
        except sqlite3.IntegrityError:
            raise
        except sqlite3.DatabaseError as error:
            raise UserError(f"{self.path}: {error}") from error

    def insert(self, table: str, fields: dict[str, Any]) -> None:
        """Add one row; ``table`` and the field names are the program's own words."""
        names, marks = ", ".join(fields), ", ".join("?" * len(fields))
        self.rows(f"INSERT INTO {table} ({names}) VALUES ({marks})", *fields.values())  # noqa: S608

    def close(self) -> None:
        """Give the file back; closing twice is allowed."""
        self._connection.close()

    def __enter__(self) -> "Database":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
