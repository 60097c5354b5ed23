"""What a run tells of itself: its metrics file, MLflow, progress."""
