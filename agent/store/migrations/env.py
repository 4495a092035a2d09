"""Alembic's entry: run the steps on the connection that ``experience.migrate`` hands over."""

from alembic import context

from agent.store.experience_db import METADATA

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=METADATA,
    transaction_per_migration=False,
)
context.run_migrations()
