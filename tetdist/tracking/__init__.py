"""The record of a run: its metrics file, MLflow and other trackers, progress, environment."""

# They enter themselves among the trackers, as one's own do.
from tetdist.tracking import tensorboard_follower as tensorboard_follower
from tetdist.tracking import wandb_follower as wandb_follower
