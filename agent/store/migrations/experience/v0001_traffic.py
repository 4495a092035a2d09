"""Interactions, answers with their rewards, feedback."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

ROW_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Create the tables of captured traffic."""
    _interactions()
    _answers()
    _feedback()


def _interactions() -> None:
    op.create_table(
        "interactions",
        sa.Column("id", ROW_ID, primary_key=True, autoincrement=True),
        sa.Column("inference_id", sa.String(64), nullable=False, unique=True),
        sa.Column("response_id", sa.String(128)),
        sa.Column("created", sa.Float(53), nullable=False),
        sa.Column("endpoint", sa.String(32), nullable=False),
        sa.Column("model", sa.String(256), nullable=False),
        sa.Column("version", sa.String(64), nullable=False),
        sa.Column("principal", sa.String(128), nullable=False),
        sa.Column("session_id", sa.String(128)),
        sa.Column("task", sa.String(64)),
        sa.Column("source", sa.String(16)),
        sa.Column("example_id", sa.String(512)),
        sa.Column("example", sa.Text),
        sa.Column("prompt", sa.Text),
        sa.Column("prompt_hash", sa.String(64)),
        sa.Column("row_hash", sa.String(64)),
        sa.Column("group_hash", sa.String(64)),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("latency_s", sa.Float(53), nullable=False),
        sa.Column("prompt_tokens", sa.Integer, nullable=False),
        sa.Column("completion_tokens", sa.Integer, nullable=False),
    )
    op.create_index("ix_interactions_response_id", "interactions", ["response_id"])
    op.create_index("ix_interactions_principal_created", "interactions", ["principal", "created"])
    op.create_index("ix_interactions_task_created", "interactions", ["task", "created"])
    op.create_index("ix_interactions_created", "interactions", ["created"])


def _answers() -> None:
    op.create_table(
        "answers",
        sa.Column("id", ROW_ID, primary_key=True, autoincrement=True),
        sa.Column(
            "interaction_id",
            ROW_ID,
            sa.ForeignKey("interactions.id", ondelete="CASCADE"),
            nullable=False,
        ),
        sa.Column("choice", sa.Integer, nullable=False),
        sa.Column("completion", sa.Text),
        sa.Column("tool_calls", sa.Text),
        sa.Column("finish", sa.String(32)),
        sa.Column("reward", sa.Float(53)),
        sa.Column("format", sa.Float(53)),
        sa.Column("extracted", sa.Text),
        sa.Column("error", sa.String(256)),
        sa.Column("judged", sa.Float(53)),
        sa.UniqueConstraint("interaction_id", "choice", name="uq_answers_interaction_choice"),
    )


def _feedback() -> None:
    op.create_table(
        "feedback",
        sa.Column("id", ROW_ID, primary_key=True, autoincrement=True),
        sa.Column("feedback_id", sa.String(64), nullable=False),
        sa.Column("inference_id", sa.String(64), nullable=False),
        sa.Column("version", sa.String(64), nullable=False),
        sa.Column("principal", sa.String(128), nullable=False),
        sa.Column("metric_name", sa.String(64), nullable=False),
        sa.Column("value", sa.Float(53), nullable=False),
        sa.Column("tags", sa.Text, nullable=False),
        sa.Column("rationale", sa.Text),
        sa.Column("supersedes", sa.String(64)),
        sa.Column("weight", sa.Float(53), nullable=False),
        sa.Column("created", sa.Float(53), nullable=False),
        sa.UniqueConstraint("principal", "feedback_id", name="uq_feedback_principal_id"),
        sa.UniqueConstraint("principal", "supersedes", name="uq_feedback_principal_supersedes"),
        sa.CheckConstraint("weight = 0", name="ck_feedback_weight"),
    )
    op.create_index("ix_feedback_inference_id", "feedback", ["inference_id"])
