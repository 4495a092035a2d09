"""Serving: promotion, swaps, the watch over what is served, the stack."""
