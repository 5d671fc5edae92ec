"""Evaluation: likelihood metrics, intervals, baselines and the report."""
