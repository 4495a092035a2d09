"""Numbered, append-only steps of the experience store's schema (Alembic)."""
