"""The study of arXiv 2605.30148: when fine-tuning forgets, and what stops it."""
