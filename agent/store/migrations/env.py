"""Alembic's entry: run the steps on the connection that ``migrations.upgrade`` hands over.

One transaction for all steps, the caller's: a step that fails leaves nothing.
"""

from alembic import context

context.configure(
    connection=context.config.attributes["connection"], transaction_per_migration=False
)
context.run_migrations()
