"""The database of journal and ledger, opened in one way, and the chain of hashes of its rows.

It is an SQLite file or, by URL, a schema on PostgreSQL; both run the same statements and keep the
same values, so that a row has the same hash on either. What a transaction returned from is on the
disk (SQLite: WAL and synchronous=FULL). One writer at a time, a second one waits BUSY_SECONDS
(SQLite: BEGIN IMMEDIATE; PostgreSQL: an advisory lock). Times are passed in, unix seconds.

A row of the journal or the ledger carries a hash per field and one over them and the row before:

    digests = {field: sha256(canonical(value))}      hash = sha256(prev_hash + canonical(digests))

The chain shows that a row was changed; the hashes by field show which field it was.
"""

import hashlib
import json
import math
import os
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from agent.errors import UserError
from agent.store.migrations import newest, upgrade

BUSY_SECONDS = 30.0
ROUND_LEASE = 0x616E63686F74  # the lease of the process that runs a round

Value = str | int | float | bytes | None  # of one column
P = ParamSpec("P")
T = TypeVar("T")
MOUNTS = Path("/proc/self/mountinfo")
SHARED = frozenset({"nfs", "nfs4", "cifs", "smb3"})  # file systems of several machines


def refuse_shared(folder: Path, mounts: Path = MOUNTS) -> None:
    """UserError for a folder on a network's file system, where SQLite may lose rows.

    Its log is memory that all openers share, which two machines cannot, and locks of files are
    there what the server makes of them. A mount is known by its device; ``mounts``: the kernel's
    list of them, a line each: id, parent, device, ... - type, source, options.
    """
    device = folder.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in mounts.read_text("utf-8", "replace").splitlines() if mounts.exists() else ():
        mount, _, kind = line.partition(" - ")
        if mount.split()[2] == number and kind.split()[0] in SHARED:
            raise UserError(
                f"{folder}: lies on {kind.split()[0]}, where SQLite may lose rows; allowed: a "
                'folder of this machine, or state.url = "postgresql://user@host/database"'
            )


def private_file(path: Path) -> None:
    """Make an empty database in WAL mode, mode 0600, unless the file is there.

    SQLite's change to WAL does not wait for whoever makes it at the same time, it fails; so the
    file gets its name when it is in WAL already. An existing file is not even opened: closing any
    descriptor of a file drops all of this process's locks on it, SQLite's included; another
    process would then take the log away from under our open connections.

    Raises:
        UserError: The folder is not on a disk of this machine.
    """
    refuse_shared(path.parent)
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


class ServerLostError(Exception):
    """The server went away in mid-transaction, which wrote nothing and has to be run again."""


class Database:
    """One connection, safe to share between threads; transactions take turns."""

    _connection: Any

    def __init__(self, path: Path, busy_seconds: float = BUSY_SECONDS):
        self.path = path
        self.name = str(path)  # in messages
        self._lock = threading.RLock()  # one connection: threads may not interleave statements
        path.parent.mkdir(parents=True, exist_ok=True)
        private_file(path)
        self._connection = sqlite3.connect(
            path, timeout=busy_seconds, isolation_level=None, check_same_thread=False
        )
        self._connection.row_factory = sqlite3.Row
        # A damaged text must reach the hash that names it, not stop at its decoding.
        self._connection.text_factory = lambda raw: raw.decode("utf-8", "surrogateescape")
        try:
            self._prepare()
        except (UserError, sqlite3.Error) as error:
            self.close()
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path}: cannot be opened as a database ({error})") from error

    def _prepare(self) -> None:
        """Durable settings, then the steps of the schema that this file has not seen."""
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = FULL")
        self._connection.execute("PRAGMA foreign_keys = ON")
        # Without it REPLACE would remove a row behind the back of its trigger.
        self._connection.execute("PRAGMA recursive_triggers = ON")
        known = newest("state")
        if self._version() < known:
            _migrate(self.path)
        if self._version() > known:
            raise UserError(
                f"{self.path}: has version {self._version()}, allowed: up to {known}; "
                "a newer program wrote it"
            )

    def _version(self) -> int:
        """The number of the newest step, which every step writes into the header of the file.

        Reading it takes microseconds; Alembic's own table would have to be looked for first. A
        program from before Alembic reads the same place and refuses what it does not know.
        """
        return int(self._connection.execute("PRAGMA user_version").fetchone()[0])

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Everything inside is written together, or not at all; one writer at a time.

        BEGIN IMMEDIATE takes SQLite's write lock at once: a transaction that began by reading would
        fail instead of waiting when it starts to write beside another writer."""
        with self._lock:
            self.rows("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def atomically(self, work: Callable[[], T]) -> T:
        """What ``work`` returns, run in a transaction; again where the server was lost in it."""
        while True:
            try:
                with self.transaction():
                    return work()
            except ServerLostError:
                continue

    def wait(self, seconds: float) -> None:
        """Longest wait for a server that does not answer from now on; a file always does."""

    @contextmanager
    def lease(self, _number: int, taken: str) -> Iterator[None]:
        """Hold a lease among all who use this server; a file's users share its home's locks.

        Raises:
            UserError: ``taken``: another process holds it.
        """
        yield

    def mark(self) -> tuple[int, ...]:
        """A value that is another one after each change: when file and log were last written."""
        paths = (self.path, self.path.with_name(f"{self.path.name}-wal"))
        return tuple(path.stat().st_mtime_ns for path in paths if path.is_file())

    def rows(self, query: str, *values: Any) -> list[Any]:
        """All rows a query gives, by column; UserError where the database itself is damaged."""
        try:
            with self._lock:
                return list(self._connection.execute(query, values))
        except sqlite3.IntegrityError:
            raise
        except sqlite3.DatabaseError as error:
            raise UserError(f"{self.path}: {error}") from error

    def insert(self, table: str, fields: dict[str, Any]) -> None:
        """Add one row. ``table`` and the field names are literals of this program, never input."""
        names, marks = ", ".join(fields), ", ".join("?" * len(fields))
        self.rows(f"INSERT INTO {table} ({names}) VALUES ({marks})", *fields.values())  # noqa: S608

    def close(self) -> None:
        """Close the connection; closing twice is allowed."""
        self._connection.close()

    def __enter__(self) -> "Database":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _migrate(path: Path) -> None:
    """Run the missing steps, alone and all together; who comes second finds nothing to do.

    On a connection of its own, because Alembic wants SQLAlchemy's. ``isolation_level`` None keeps
    the driver from ending the transaction by itself before a CREATE.
    """
    import sqlalchemy
    from sqlalchemy.exc import SQLAlchemyError

    def connect() -> sqlite3.Connection:
        return sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)

    engine = sqlalchemy.create_engine("sqlite://", creator=connect, poolclass=sqlalchemy.NullPool)
    try:
        with engine.connect() as connection:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            upgrade(connection, "state")
            connection.commit()
    except SQLAlchemyError as error:
        reason = getattr(error, "orig", None) or error
        raise UserError(f"{path}: cannot be brought up to date ({reason})") from error


def atomic(
    method: Callable[Concatenate[Any, P], T],
) -> Callable[Concatenate[Any, P], T]:
    """A method of an object with a ``database``, in one transaction: all it writes, or nothing."""

    @wraps(method)
    def run(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> T:
        database: Database = self.database
        return database.atomically(lambda: method(self, *args, **kwargs))

    return run


# -- the chain of hashes ----------------------------------------------------------------------


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces; a number that is not finite is undefined: null."""
    return json.dumps(finite(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def finite(value: Any) -> Any:
    """The same value with NaN and infinities, which JSON has not, as None; tuples as lists."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def digest_field(value: Value) -> str:
    """Hex sha256 of one column: of the bytes of a blob, of the canonical JSON of the rest."""
    content = value if isinstance(value, bytes) else canonical(value).encode()
    return hashlib.sha256(content).hexdigest()


def seal(prev_hash: str, fields: Mapping[str, Value]) -> dict[str, Value]:
    """The row to insert: the fields, then prev_hash, digests and hash."""
    digests = canonical({name: digest_field(value) for name, value in fields.items()})
    return {**fields, "prev_hash": prev_hash, "digests": digests, "hash": _link(prev_hash, digests)}


def _link(prev_hash: str, digests: str) -> str:
    """Hash of a row from the row before and the digests of its fields."""
    return hashlib.sha256((prev_hash + digests).encode("utf-8", "surrogateescape")).hexdigest()


NO_FIELDS = ("prev_hash", "digests", "hash", "rowid")  # the last one: PostgreSQL's count of rows


def fault(prev_hash: str, row: Mapping[str, Value]) -> str | None:
    """The column of a stored row that is not what was written, or None.

    ``prev_hash`` is the hash of the row before. Several damaged columns: the first that is a
    field; where nothing but the link is wrong: "hash chain".
    """
    fields = {name: row[name] for name in row if name not in NO_FIELDS}
    true = {name: digest_field(value) for name, value in fields.items()}
    if row["digests"] != canonical(true):
        if row["hash"] == _link(prev_hash, canonical(true)):
            return "digests"
        return differing(str(row["digests"]), true) or "hash chain"
    if row["prev_hash"] != prev_hash:
        return "prev_hash" if row["hash"] == _link(prev_hash, canonical(true)) else "hash chain"
    return None if row["hash"] == _link(prev_hash, canonical(true)) else "hash"


def differing(stored: str, true: Mapping[str, str]) -> str | None:
    """First field whose stored digest is not the digest of its value; None where all are."""
    try:
        recorded = json.loads(stored)
    except ValueError:
        return "hash chain"
    if not isinstance(recorded, dict):
        return "hash chain"
    return next((name for name, digest in true.items() if recorded.get(name) != digest), None)
