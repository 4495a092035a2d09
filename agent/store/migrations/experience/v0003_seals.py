"""A seal in every row: the hash of its columns. Rows from before this step have none."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

TABLES = ("interactions", "answers", "feedback", "keys", "rounds_used", "forgotten")


def upgrade() -> None:
    """Add the column."""
    for table in TABLES:
        op.add_column(table, sa.Column("seal", sa.String(64)))
