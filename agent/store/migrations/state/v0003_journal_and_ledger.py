"""Journal and ledger, append-only.

Until this step state.db was migrated without Alembic and counted its versions in SQLite's
``user_version``; 3 is the only one that was released. A file of that version has these tables
already and is only marked.
"""

from alembic import op

from agent.store.migrations import run_state_step

revision = "0003"
down_revision = None
branch_labels = None
depends_on = None

JOURNAL = (
    """CREATE TABLE runs (
        run_id TEXT PRIMARY KEY, anchor_digest TEXT NOT NULL, parent_digest TEXT NOT NULL,
        parent_run TEXT REFERENCES runs (run_id), target TEXT NOT NULL, run_seed INTEGER NOT NULL,
        plan TEXT NOT NULL, created REAL NOT NULL, prev_hash TEXT NOT NULL,
        digests TEXT NOT NULL, hash TEXT NOT NULL) STRICT""",
    """CREATE TABLE generations (
        run_id TEXT NOT NULL REFERENCES runs (run_id), generation INTEGER NOT NULL,
        payload TEXT NOT NULL, rewards BLOB NOT NULL, delta_hash TEXT NOT NULL,
        drift TEXT NOT NULL, prev_hash TEXT NOT NULL, digests TEXT NOT NULL, hash TEXT NOT NULL,
        PRIMARY KEY (run_id, generation)) STRICT""",
    """CREATE TABLE outcomes (
        run_id TEXT PRIMARY KEY REFERENCES runs (run_id), digest TEXT NOT NULL,
        generations INTEGER NOT NULL, reason TEXT NOT NULL, finished REAL NOT NULL,
        prev_hash TEXT NOT NULL, digests TEXT NOT NULL, hash TEXT NOT NULL) STRICT""",
    "CREATE INDEX outcomes_digest ON outcomes (digest)",
    """CREATE TABLE members (
        run_id TEXT NOT NULL REFERENCES runs (run_id), generation INTEGER NOT NULL,
        member INTEGER NOT NULL, rewards BLOB NOT NULL, sha256 TEXT NOT NULL,
        PRIMARY KEY (run_id, generation, member)) STRICT""",
)

LEDGER = (
    """CREATE TABLE epochs (
        epoch INTEGER PRIMARY KEY, owner TEXT NOT NULL, time REAL NOT NULL) STRICT""",
    """CREATE TABLE ledger (
        seq INTEGER PRIMARY KEY, time REAL NOT NULL, epoch INTEGER NOT NULL, actor TEXT NOT NULL,
        digest TEXT NOT NULL, state TEXT NOT NULL, why TEXT NOT NULL, statistics TEXT NOT NULL,
        before TEXT, after TEXT NOT NULL, prev_hash TEXT NOT NULL, digests TEXT NOT NULL,
        hash TEXT NOT NULL) STRICT""",
    "CREATE INDEX ledger_digest ON ledger (digest, seq)",
    """CREATE TABLE leases (
        name TEXT PRIMARY KEY, owner TEXT NOT NULL, expires REAL NOT NULL) STRICT""",
)

APPEND_ONLY = ("runs", "generations", "outcomes", "epochs", "ledger")


# PostgreSQL keeps no order of insertion by itself, as SQLite does in the column of this name.
ORDER = "ALTER TABLE {} ADD COLUMN rowid BIGINT GENERATED ALWAYS AS IDENTITY"


def upgrade() -> None:
    """Create the tables and the triggers that refuse to change or remove a row."""
    sqlite = op.get_bind().dialect.name == "sqlite"
    if sqlite and op.get_bind().exec_driver_sql("PRAGMA user_version").scalar() == 3:
        return
    order = () if sqlite else (ORDER.format("runs"), ORDER.format("outcomes"))
    run_state_step(3, *JOURNAL, *LEDGER, *order, append_only=APPEND_ONLY)
