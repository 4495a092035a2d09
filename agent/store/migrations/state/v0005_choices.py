"""The point that was chosen as a round's candidate, among its generations and on the line."""

from agent.store.migrations import run_state_step

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the table; like the others it refuses to change or remove a row."""
    run_state_step(
        5,
        """CREATE TABLE choices (
            run_id TEXT PRIMARY KEY REFERENCES runs (run_id), generations INTEGER NOT NULL,
            t REAL NOT NULL, delta_hash TEXT NOT NULL, evidence TEXT NOT NULL,
            prev_hash TEXT NOT NULL, digests TEXT NOT NULL, hash TEXT NOT NULL) STRICT""",
        append_only=("choices",),
    )
