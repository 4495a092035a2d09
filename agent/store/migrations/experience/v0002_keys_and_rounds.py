"""Keys, which rounds used which traffic, and the record of deletions."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

ROW_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Create the tables that say who may ask and what was done with it."""
    op.create_table(
        "keys",
        sa.Column("key_id", sa.String(16), primary_key=True),
        sa.Column("owner", sa.String(128), nullable=False),
        sa.Column("scopes", sa.String(128), nullable=False),
        sa.Column("token_hash", sa.String(64), nullable=False),
        sa.Column("created", sa.Float(53), nullable=False),
        sa.Column("expires", sa.Float(53)),
        sa.Column("revoked", sa.Float(53)),
    )
    op.create_table(
        "rounds_used",
        sa.Column("id", ROW_ID, primary_key=True, autoincrement=True),
        sa.Column("round_id", sa.String(128), nullable=False),
        sa.Column("pool", sa.String(16), nullable=False),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("inference_id", sa.String(64), nullable=False),
        sa.Column("principal", sa.String(128), nullable=False),
        sa.Column("digest", sa.String(64)),
        sa.UniqueConstraint("round_id", "pool", "position", name="uq_rounds_used_place"),
    )
    op.create_index("ix_rounds_used_principal", "rounds_used", ["principal"])
    op.create_table(
        "forgotten",
        sa.Column("id", ROW_ID, primary_key=True, autoincrement=True),
        sa.Column("principal_hash", sa.String(64), nullable=False),
        sa.Column("created", sa.Float(53), nullable=False),
        sa.Column("interactions", sa.Integer, nullable=False),
        sa.Column("rounds", sa.Text, nullable=False),
    )
