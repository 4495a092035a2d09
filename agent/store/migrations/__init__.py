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
