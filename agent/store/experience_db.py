"""The experience store's database: its tables, and how it is opened and migrated.

It is an SQLite file or, by URL, PostgreSQL. The tables are declared here as the newest step leaves
them; ``migrations/experience`` builds them step by step, and a test compares the two. Every row
carries a seal, the hash of its columns: whoever learns, judges or admits by a row compares it.
"""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Connection,
    Engine,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    event,
    inspect,
    text,
)
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError

from agent.errors import UserError
from agent.store.database import BUSY_SECONDS, private_file
from agent.store.migrations import newest, upgrade
from agent.store.postgres import PostgresServer, ServerAwayError

METADATA = MetaData()
SEAL = "seal"  # column: hash of the row's other columns; NULL in rows from before there were any
ROW_ID = BigInteger().with_variant(Integer(), "sqlite")

interactions = Table(  # one row a request that reached the engine; text only where it was asked for
    "interactions",
    METADATA,
    Column("id", ROW_ID, primary_key=True, autoincrement=True),
    Column("inference_id", String(64), nullable=False, unique=True),
    Column("response_id", String(128)),  # the `id` in the answer's own JSON
    Column("created", Float(53), nullable=False),  # unix seconds
    Column("endpoint", String(32), nullable=False),
    Column("model", String(256), nullable=False),
    Column("version", String(64), nullable=False),  # digest of the weights that answered
    Column("principal", String(128), nullable=False),
    Column("session_id", String(128)),
    Column("task", String(64)),
    Column("source", String(16)),  # known: example_id of a row we have; submitted: the client's row
    Column("example_id", String(512)),
    Column("example", Text),  # JSON object, submitted rows only
    Column("prompt", Text),  # JSON: messages, or the prompt of a plain completion
    Column("prompt_hash", String(64)),
    Column("row_hash", String(64)),  # of the normalised task row, to find duplicates
    Column("group_hash", String(64)),  # of the conversation, to split
    Column("status", String(16), nullable=False),  # ok, error, cancelled
    Column("latency_s", Float(53), nullable=False),
    Column("prompt_tokens", Integer, nullable=False),
    Column("completion_tokens", Integer, nullable=False),
    Column(SEAL, String(64)),
    Index("ix_interactions_response_id", "response_id"),
    Index("ix_interactions_principal_created", "principal", "created"),
    Index("ix_interactions_task_created", "task", "created"),
    Index("ix_interactions_created", "created"),
)

answers = Table(  # one row a choice; reward is NULL until it is verified
    "answers",
    METADATA,
    Column("id", ROW_ID, primary_key=True, autoincrement=True),
    Column(
        "interaction_id", ROW_ID, ForeignKey("interactions.id", ondelete="CASCADE"), nullable=False
    ),
    Column("choice", Integer, nullable=False),
    Column("completion", Text),
    Column("tool_calls", Text),  # JSON
    Column("finish", String(32)),
    Column("reward", Float(53)),
    Column("format", Float(53)),
    Column("extracted", Text),
    Column("error", String(256)),  # why verification failed; the reward stays NULL, not 0
    Column("judged", Float(53)),  # unix seconds
    Column(SEAL, String(64)),
    UniqueConstraint("interaction_id", "choice", name="uq_answers_interaction_choice"),
)

feedback = Table(
    "feedback",
    METADATA,
    Column("id", ROW_ID, primary_key=True, autoincrement=True),
    Column("feedback_id", String(64), nullable=False),  # idempotency key, per principal
    Column("inference_id", String(64), nullable=False),
    Column("version", String(64), nullable=False),
    Column("principal", String(128), nullable=False),
    Column("metric_name", String(64), nullable=False),
    Column("value", Float(53), nullable=False),
    Column("tags", Text, nullable=False),  # JSON object of strings
    Column("rationale", Text),
    Column("supersedes", String(64)),
    Column("weight", Float(53), nullable=False),
    Column("created", Float(53), nullable=False),
    Column(SEAL, String(64)),
    UniqueConstraint("principal", "feedback_id", name="uq_feedback_principal_id"),
    UniqueConstraint("principal", "supersedes", name="uq_feedback_principal_supersedes"),
    CheckConstraint("weight = 0", name="ck_feedback_weight"),  # feedback is not trained on
    Index("ix_feedback_inference_id", "inference_id"),
)

keys = Table(
    "keys",
    METADATA,
    Column("key_id", String(16), primary_key=True),
    Column("owner", String(128), nullable=False),
    Column("scopes", String(128), nullable=False),  # sorted, separated by spaces
    Column("token_hash", String(64), nullable=False),
    Column("created", Float(53), nullable=False),
    Column("expires", Float(53)),
    Column("revoked", Float(53)),
    Column(SEAL, String(64)),
)

rounds_used = Table(  # which traffic went into which round, at which place
    "rounds_used",
    METADATA,
    Column("id", ROW_ID, primary_key=True, autoincrement=True),
    Column("round_id", String(128), nullable=False),
    Column("pool", String(16), nullable=False),  # train, gate, sealed
    Column("position", Integer, nullable=False),  # index of the row in the round's prompts
    Column("inference_id", String(64), nullable=False),
    Column("principal", String(128), nullable=False),
    Column("digest", String(64)),  # the candidate the round made
    Column(SEAL, String(64)),
    UniqueConstraint("round_id", "pool", "position", name="uq_rounds_used_place"),
    Index("ix_rounds_used_principal", "principal"),
)

forgotten = Table(  # record of a deletion and of the rounds it affects; the principal as a hash
    "forgotten",
    METADATA,
    Column("id", ROW_ID, primary_key=True, autoincrement=True),
    Column("principal_hash", String(64), nullable=False),
    Column("created", Float(53), nullable=False),
    Column("interactions", Integer, nullable=False),
    Column("rounds", Text, nullable=False),  # JSON: [{round_id, digest, pool, positions}]
    Column(SEAL, String(64)),
)


MIGRATION_LOCK = 0x616E63686F72  # one migration at a time on PostgreSQL
BUSY_TIMEOUT_MS = 10_000
PRAGMAS = (
    "journal_mode=WAL",
    "synchronous=NORMAL",  # a power cut may lose the last answers, never the file
    "foreign_keys=ON",
    f"busy_timeout={BUSY_TIMEOUT_MS}",
    "secure_delete=ON",  # a deleted text is overwritten, not only unlinked
)


def open_engine(where: str | Path, wait_s: float = BUSY_SECONDS) -> Engine:
    """An engine on a file path, ``sqlite:///path`` or ``postgresql://...``, schema up to date.

    ``wait_s``: longest wait for a server that does not answer, whenever a connection is needed.
    Parameters stay out of error messages: they are what clients wrote.
    """
    url = _url(where)
    engine = _sqlite(url) if url.get_backend_name() == "sqlite" else _postgresql(url, wait_s)
    version, known = _version(engine), newest("experience")
    if version > known:
        raise UserError(
            f"experience url: has version {version}, allowed: up to {known}; "
            "a newer program wrote it"
        )
    if version < known:
        migrate(engine)
    return engine


def migrate(engine: Engine, to: str = "head") -> None:
    """Run the missing steps, alone: a second process waits for the first."""
    with writing(engine) as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text(f"SELECT pg_advisory_xact_lock({MIGRATION_LOCK})"))
        upgrade(connection, "experience", to)


def _version(engine: Engine) -> int:
    """The number of the newest step in the database; 0 for a blank one."""
    with engine.connect() as connection:
        if not inspect(connection).has_table("alembic_version"):
            return 0
        return int(connection.scalar(text("SELECT version_num FROM alembic_version")) or 0)


def writing(engine: Engine) -> AbstractContextManager[Connection]:
    """A transaction that takes SQLite's write lock at its start.

    One that began by reading could not wait for another writer: SQLite refuses to upgrade it."""
    transaction: AbstractContextManager[Connection] = engine.execution_options(write=True).begin()
    return transaction


def _url(where: str | Path) -> URL:
    if isinstance(where, Path) or "://" not in where:
        return URL.create("sqlite", database=str(where))
    try:
        url = make_url(where)
    except (ArgumentError, ValueError) as error:
        raise UserError(
            "experience url: not a database URL; allowed: sqlite, postgresql"
        ) from error
    if url.get_backend_name() not in ("sqlite", "postgresql"):
        raise UserError(f"experience url: {url.drivername}; allowed: sqlite, postgresql")
    return url


def _sqlite(url: URL) -> Engine:
    if not url.database or url.database == ":memory:":
        raise UserError(f"experience url: {url.database or 'no file'}; allowed: a file's path")
    _private_file(Path(url.database))
    engine = create_engine(url, hide_parameters=True)
    event.listen(engine, "connect", _on_connect)
    event.listen(engine, "begin", _on_begin)
    return engine


def _postgresql(url: URL, wait_s: float) -> Engine:
    """Connections are tried before they are used (pre-ping), and waited for when made anew."""
    server = PostgresServer(url.render_as_string(hide_password=False), wait_s)
    return create_engine(
        "postgresql+psycopg://", creator=server.connect, hide_parameters=True, pool_pre_ping=True
    )


def is_away(error: BaseException) -> bool:
    """Whether an operation failed because the server did not answer or went away in it."""
    lost = isinstance(error, DBAPIError) and error.connection_invalidated
    return lost or isinstance(error, ServerAwayError)


def _private_file(path: Path) -> None:
    """Exists before SQLite opens it, readable by its owner only; -wal and -shm inherit the mode."""
    path.parent.mkdir(parents=True, exist_ok=True)
    private_file(path)


def _on_connect(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the driver begins nothing by itself; _on_begin does
    # A damaged text must reach the seal that shows it, not stop at its decoding.
    connection.text_factory = lambda raw: raw.decode("utf-8", "surrogateescape")
    for pragma in PRAGMAS:
        connection.execute(f"PRAGMA {pragma}")


def _on_begin(connection: Connection) -> None:
    write = connection.get_execution_options().get("write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
