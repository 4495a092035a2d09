"""Benches: two things run side by side, and their ratio."""
