"""The table of leases goes: the lease of a swap lies in swap.json, nothing read the table."""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Drop it; ``user_version`` is the number of the newest step, see ``store.database``."""
    op.execute("DROP TABLE leases")
    op.execute("PRAGMA user_version = 4")
