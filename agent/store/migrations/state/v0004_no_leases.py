"""The table of leases goes: the lease of a swap lies in swap.json, nothing read the table."""

from agent.store.migrations import run_state_step

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Drop it."""
    run_state_step(4, "DROP TABLE leases")
