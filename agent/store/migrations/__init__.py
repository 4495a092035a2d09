"""Alembic's steps for both databases: ``state/`` for state.db, ``experience/`` for experience.db.

Steps are numbered and only ever appended; one that was released is never changed. An opener asks
``newest`` first and calls ``upgrade`` only where the database is older: importing alembic takes
a few tenths of a second, which a rollback would wait for.
"""

import logging
import threading
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from sqlalchemy import Connection

History = Literal["state", "experience"]
# Alembic keeps a running upgrade in globals of the process, MLflow's own upgrades included: two
# databases that are opened by two threads would share it, and one of them fails.
ONE_AT_A_TIME = threading.Lock()


POSTGRESQL = {" STRICT": "", "INTEGER": "BIGINT", "REAL": "DOUBLE PRECISION", "BLOB": "BYTEA"}


@cache
def newest(history: History) -> int:
    """The number of the newest step, from the names of the files: ``v0002_keys.py`` is 2."""
    return max(int(path.stem[1:5]) for path in Path(__file__).with_name(history).glob("v*.py"))


def upgrade(connection: "Connection", history: History, to: str = "head") -> None:
    """Run the missing steps inside the transaction that ``connection`` has open.

    Raises:
        alembic.util.CommandError: The database has a step that this program does not know.
    """
    from alembic import command
    from alembic.config import Config

    logging.getLogger("alembic").setLevel(logging.WARNING)
    config = Config()
    config.set_main_option("path_separator", "newline")  # "os" would cut the colons below
    config.set_main_option("script_location", "agent.store:migrations")
    config.set_main_option("version_locations", f"agent.store:migrations/{history}")
    config.attributes["connection"] = connection
    with ONE_AT_A_TIME:
        command.upgrade(config, to)


def run_state_step(number: int, *statements: str, append_only: tuple[str, ...] = ()) -> None:
    """A step of the state's history, written in SQLite's words, on either database.

    Args:
        number: The step's; SQLite keeps it in the header of the file (``Database._version``).
        statements: In their order; PostgreSQL gets its own names of the types.
        append_only: Tables whose rows are refused to change or to go from now on.
    """
    from alembic import op

    sqlite = op.get_bind().dialect.name == "sqlite"
    for statement in statements:
        for word, own in {} if sqlite else POSTGRESQL.items():
            statement = statement.replace(word, own)
        op.execute(statement)
    for table in append_only:
        for refusing in _sqlite_triggers(table) if sqlite else _postgresql_triggers(table):
            op.execute(refusing)
    if sqlite:
        op.execute(f"PRAGMA user_version = {number}")


def _sqlite_triggers(table: str) -> list[str]:
    return [
        f"CREATE TRIGGER {table}_{verb} BEFORE {verb} ON {table} "
        f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
        for verb in ("UPDATE", "DELETE")
    ]


def _postgresql_triggers(table: str) -> list[str]:
    """A trigger of each statement, so that emptying a table is refused as well."""
    return [
        "CREATE OR REPLACE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "RAISE EXCEPTION '% is append-only', TG_TABLE_NAME "
        "USING ERRCODE = 'integrity_constraint_violation'; END $$",
        f"CREATE TRIGGER {table}_change BEFORE UPDATE OR DELETE OR TRUNCATE ON {table} "
        "FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()",
    ]
