"""PostgreSQL in place of SQLite: a server that is waited for, and journal and ledger on it.

A connection that was lost is made again by its owner (``PostgresDatabase``, SQLAlchemy's pool), who
runs again what had not been committed. While the server is away a process says so in one line.
"""

import logging
import re
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.errors import UserError, masked
from agent.store.database import BUSY_SECONDS, Database, ServerLostError
from agent.store.migrations import newest, upgrade

if TYPE_CHECKING:  # the package is optional, and nobody on SQLite waits for its import
    from psycopg import Connection

LOG = logging.getLogger("anchorage.store")
RETRY_S = 1.0  # between two attempts to connect
CONNECT_TIMEOUT_S = 10
LASTING = re.compile(  # refusals that waiting does not change
    r"authentication|does not exist|pg_hba|permission denied|no password|SSL was required"
)

SCHEMA = "anchorage"  # of PostgreSQL: apart from the experience store's tables and all others
WRITER = 0x616E63686F73  # advisory lock of the one writer
COMMIT_POLL_S = 0.1
NUMBER = """
    INSERT INTO writers (writer, number, seen)
    SELECT ?::text, ?::bigint, now() WHERE pg_current_xact_id_if_assigned() IS NOT NULL
    ON CONFLICT (writer) DO UPDATE SET number = excluded.number, seen = excluded.seen
    RETURNING number
"""  # of a transaction that wrote something
FORGET_WRITERS = "DELETE FROM writers WHERE seen < now() - interval '30 days'"
SESSION = f"""
    SET search_path = {SCHEMA};
    SET synchronous_commit = on;
    SET lock_timeout = '{BUSY_SECONDS:.0f}s';
    SET idle_in_transaction_session_timeout = '60s';
    SET tcp_keepalives_idle = 10; SET tcp_keepalives_interval = 5; SET tcp_keepalives_count = 3
"""  # the last two: the locks of a machine that is gone are freed within a minute

_away: dict[str, float] = {}  # servers that did not answer this process, and since when
_guard = threading.Lock()  # of _away: several threads meet the same outage, one of them says it


class ServerAwayError(UserError):
    """The server did not answer for as long as it was waited for."""


class PostgresServer:
    """One server and database; ``wait_s``: longest wait for it, infinite while a round runs."""

    def __init__(self, url: str, wait_s: float) -> None:
        scheme, _, rest = url.partition("://")
        self._conninfo = f"{scheme.partition('+')[0]}://{rest}"  # libpq knows no drivers
        self.wait_s = wait_s
        self.name = masked(self._conninfo)

    def connect(self, **options: Any) -> "Connection[Any]":
        """A new connection, once the server answers; ``options`` as ``psycopg.connect`` has them.

        Raises:
            UserError: It refuses for good (a password, a database that is not there), or did not
                answer within ``wait_s``.
        """
        psycopg = _psycopg()
        until = time.monotonic() + self.wait_s
        while True:
            try:
                made: Connection[Any] = psycopg.connect(
                    self._conninfo, connect_timeout=CONNECT_TIMEOUT_S, prepare_threshold=None,
                    **options,
                )  # fmt: skip
            except psycopg.OperationalError as error:
                reason = " ".join(str(error).split())
                self._wait(reason, until)
            except psycopg.Error:  # libpq's message about a URL repeats it, password included
                raise UserError(
                    f"{self.name}: no URL of a database; allowed: postgresql://user@host/database"
                ) from None
            else:
                self._back()
                return made

    def _wait(self, reason: str, until: float) -> None:
        """Until the next attempt; UserError where there is to be none."""
        if LASTING.search(reason):
            raise UserError(f"{self.name}: {reason}")
        with _guard:
            known = self.name in _away
            _away.setdefault(self.name, time.monotonic())
        if time.monotonic() >= until:
            raise ServerAwayError(f"{self.name}: no answer for {self.wait_s:g} s ({reason})")
        if not known:
            LOG.warning("%s does not answer (%s); asked again until it does", self.name, reason)
        time.sleep(RETRY_S)

    def _back(self) -> None:
        with _guard:
            since = _away.pop(self.name, None)
        if since is not None:
            LOG.info("%s answers again after %.0f s", self.name, time.monotonic() - since)


class PostgresDatabase(Database):
    """The same tables on a PostgreSQL server, through outages of it.

    A statement that the server did not answer is run again on a new connection, a transaction from
    its start (``atomically``). Each transaction leaves its number beside what it writes: where the
    answer to a COMMIT was lost, the number tells whether it was committed, also on a server that
    crashed. Nothing is lost and nothing is written twice.
    """

    def __init__(self, url: str, wait_s: float = BUSY_SECONDS):
        self._server = PostgresServer(url, wait_s)
        self.name = self._server.name
        self._lock = threading.RLock()  # one connection: threads may not interleave statements
        self._leases: dict[int, str] = {}
        self._within = False  # a transaction
        self._writer, self._number = uuid.uuid4().hex, 0  # and that of its newest transaction
        self._connect()
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise

    def _connect(self) -> None:
        """A new connection, with the leases that were lost with the old one.

        Raises:
            UserError: Another process has got one of them meanwhile.
        """
        from psycopg.errors import LockNotAvailable, OperationalError
        from psycopg.rows import dict_row

        while True:
            self._connection = self._server.connect(autocommit=True, row_factory=dict_row)
            taken = ""
            try:
                self._connection.execute(SESSION)
                for lease, message in self._leases.items():
                    taken = message
                    # Waited for: the server may take a moment to notice the old connection's end.
                    self._connection.execute("SELECT pg_advisory_lock(%s)", (lease,))
                return
            except LockNotAvailable:
                raise UserError(taken) from None
            except OperationalError:  # gone again
                self._connection.close()

    def _prepare(self) -> None:
        known = newest("state")
        while self._version() < known:
            self._migrate()
        if self._version() > known:
            raise UserError(
                f"{self.name}: has version {self._version()}, allowed: up to {known}; "
                "a newer program wrote it"
            )

    def _version(self) -> int:
        if self.rows(f"SELECT to_regclass('{SCHEMA}.alembic_version') AS made")[0]["made"] is None:
            return 0
        return int(self.rows("SELECT version_num FROM alembic_version")[0]["version_num"])

    def _migrate(self) -> None:
        """Run the missing steps, alone and all together; who comes second finds nothing to do.

        Returns where the server was lost in it: whether it was done is read again. The schema is
        looked for first: an owner of the database may have made it for a role that may not.
        """
        import sqlalchemy

        engine = sqlalchemy.create_engine(
            "postgresql+psycopg://", creator=self._server.connect, poolclass=sqlalchemy.NullPool
        )
        try:
            with engine.begin() as connection:
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({WRITER})")
                if not connection.exec_driver_sql(f"SELECT to_regnamespace('{SCHEMA}')").scalar():
                    connection.exec_driver_sql(f"CREATE SCHEMA {SCHEMA}")
                connection.exec_driver_sql(f"SET LOCAL search_path = {SCHEMA}")
                upgrade(connection, "state")
        except sqlalchemy.exc.SQLAlchemyError as error:
            if isinstance(error, sqlalchemy.exc.DBAPIError) and error.connection_invalidated:
                return
            reason = " ".join(str(getattr(error, "orig", None) or error).split())
            raise UserError(f"{self.name}: cannot be brought up to date ({reason})") from error

    def wait(self, seconds: float) -> None:
        """Longest wait for a server that does not answer from now on."""
        self._server.wait_s = seconds

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Everything inside is written together, or not at all; one writer at a time.

        The lock comes first and statements see what was committed before them (READ COMMITTED), so
        that whatever is read inside is still true when it is written.

        Raises:
            ServerLostError: The server went away; nothing was written.
        """
        with self._lock:
            try:
                self.rows(f"BEGIN; SELECT pg_advisory_xact_lock({WRITER})")
                self._within = True
                yield
                self._commit()
            except BaseException:
                self._within = False
                if not self._connection.closed:
                    with suppress(_psycopg().OperationalError):
                        self._connection.execute("ROLLBACK")
                raise
            self._within = False

    def _commit(self) -> None:
        """Commit, also where the answer does not come."""
        if not self._number:
            self.rows(FORGET_WRITERS)
        self._number += 1
        written = self.rows(NUMBER, self._writer, self._number)
        try:
            self._connection.execute("COMMIT")
        except _psycopg().OperationalError as error:
            self._within = False
            if not self._connection.closed:
                raise UserError(f"{self.name}: {_line(error)}") from error
            if not (written and self._was_committed()):
                raise ServerLostError from None

    def _was_committed(self) -> bool:
        """Whether the newest transaction was; it holds the writer's lock until it ends."""
        while not self.rows("SELECT pg_try_advisory_xact_lock(?) AS got", WRITER)[0]["got"]:
            time.sleep(COMMIT_POLL_S)  # its server process has not noticed our end yet
        own = self.rows("SELECT number FROM writers WHERE writer = ?", self._writer)
        return bool(own) and bool(own[0]["number"] == self._number)

    def rows(self, query: str, *values: Any) -> list[Any]:
        """All rows a query gives, by column."""
        errors = _psycopg()
        with self._lock:
            while True:
                try:
                    cursor = self._connection.execute(query.replace("?", "%s"), values or None)
                    return cursor.fetchall() if cursor.description else []
                except errors.IntegrityError:
                    raise
                except errors.Error as error:
                    if not self._connection.closed:
                        raise UserError(f"{self.name}: {_line(error)}") from error
                    if self._within:
                        raise ServerLostError from None
                    self._connect()

    @contextmanager
    def lease(self, number: int, taken: str) -> Iterator[None]:
        """Hold a lease among all who use this server until the block or the process ends.

        It belongs to the connection; a new connection takes it again.
        """
        with self._lock:
            if not self.rows("SELECT pg_try_advisory_lock(?) AS got", number)[0]["got"]:
                raise UserError(taken)
            self._leases[number] = taken
        try:
            yield
        finally:
            # A round that ended with an error does not wait for the server once more: its end frees
            # the lease as well.
            with self._lock, suppress(UserError):
                del self._leases[number]
                self.wait(0.0)
                self.rows("SELECT pg_advisory_unlock(?)", number)

    def mark(self) -> tuple[int, ...]:
        """How many rows the tables have that grow; another value after each change."""
        tables = ("runs", "generations", "choices", "outcomes", "ledger")
        counts = ", ".join(f"(SELECT count(*) FROM {name}) AS {name}" for name in tables)  # noqa: S608
        return tuple(self.rows(f"SELECT {counts}")[0].values())


def open_state(where: str | Path, wait_s: float = BUSY_SECONDS) -> "Database":
    """Journal's and ledger's database: a file's path, or a ``postgresql://`` URL.

    ``wait_s``: longest wait for a server that does not answer.
    """
    return Database(where) if isinstance(where, Path) else PostgresDatabase(where, wait_s)


TABLES = ("runs", "generations", "choices", "outcomes", "members", "epochs", "ledger")


def move_state(file: Path, where: str | Path, wait_s: float = BUSY_SECONDS) -> str | Path:
    """Bring a home's file to the server that its settings name since; returns ``where``.

    Rows are copied as they are, so that their hashes hold, in one transaction; then the file gets
    another name, so that it is not copied again, as an old state, to a third database.

    Raises:
        UserError: The server has the journal and ledger of another service.
    """
    if isinstance(where, Path) or not file.exists():
        return where
    first = "SELECT hash FROM ledger ORDER BY seq LIMIT 1"
    with open_state(where, wait_s) as server, Database(file) as old:

        def copy() -> None:
            if any(server.mark()):
                if server.rows(first)[:1] != [dict(row) for row in old.rows(first)]:
                    raise UserError(
                        f"{server.name}: has the ledger of another service than {file}; allowed: "
                        "an empty database"
                    )
                return
            for table in TABLES:
                for row in old.rows(f"SELECT * FROM {table} ORDER BY rowid"):  # noqa: S608
                    server.insert(table, dict(row))

        server.atomically(copy)
    file.rename(file.with_name(f"{file.name}.moved"))
    return where


def _psycopg() -> Any:
    try:
        import psycopg
    except ImportError as error:
        raise UserError(
            f"PostgreSQL needs a package ({error}); allowed: pip install 'psycopg[binary]'"
        ) from None
    return psycopg


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
