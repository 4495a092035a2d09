"""What is claimed is measured: each bench runs two things side by side and prints their ratio."""
