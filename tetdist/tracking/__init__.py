"""The record of a run: its metrics file, MLflow and other trackers, progress, environment."""
