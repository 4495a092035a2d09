"""Learning: rows, rounds, evaluation and the verdict on a candidate."""
