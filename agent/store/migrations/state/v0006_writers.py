"""On PostgreSQL: the newest transaction of each writer, so that one whose answer was lost is known.

A transaction's own number does not tell it: a server that crashed gives numbers again that were
never written to its log.
"""

from alembic import op

from agent.store.migrations import run_state_step

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the table; a file has one writer at a time, and its COMMIT always answers."""
    sqlite = op.get_bind().dialect.name == "sqlite"
    table = """CREATE TABLE writers (
        writer TEXT PRIMARY KEY, number BIGINT NOT NULL, seen TIMESTAMPTZ NOT NULL)"""
    run_state_step(6, *([] if sqlite else [table]))
