"""What models are for: one module per task, each with its records, its ways to answer, its metric and its baselines."""
