"""Tasks, extraction and rewards; evaluation of models; statistics and the gate."""
