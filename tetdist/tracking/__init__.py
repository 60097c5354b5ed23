"""The record of a run: its metrics file, MLflow, progress."""
