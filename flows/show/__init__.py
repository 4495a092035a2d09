"""What people see: MLflow, reports, plots, the terminal."""
