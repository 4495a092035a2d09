"""Experiments: demo, study, benches, the trainer of the embedded model."""
