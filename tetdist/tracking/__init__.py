"""The record of a run: its metrics file, MLflow and other trackers, progress, environment."""

# These modules register themselves as trackers, like the user's own.
from tetdist.tracking import tensorboard_logger as tensorboard_logger
from tetdist.tracking import wandb_logger as wandb_logger
