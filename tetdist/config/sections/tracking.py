"""The section ``tracking``: MLflow and other trackers."""

from typing import Annotated, Literal

from pydantic import PlainSerializer

from tetdist.config.fields import Names, Section
from tetdist.errors import without_passwords


def _without_passwords(uri: str | None) -> str | None:
    # Written configurations are serialised, hence without passwords; only this process has them.
    return None if uri is None else without_passwords(uri)


class TrackingSection(Section):
    mlflow: bool = True
    """Log the run to MLflow."""
    uri: Annotated[str | None, PlainSerializer(_without_passwords)] = None
    """MLflow's tracking URI. If unset, it is MLFLOW_TRACKING_URI of the environment; if null, or if
    both are unset, the SQLite file RUNS_DIR/mlflow.db. Put a server's user and password into
    MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD: a password given here is written to no
    file, so a resumed run needs it again."""
    experiment: str = "tetdist"
    """Name of MLflow's experiment, and of the W&B project unless WANDB_PROJECT is set."""
    log_checkpoint: Literal["none", "last", "best"] = "none"
    """Checkpoint whose model.safetensors is copied to MLflow when the run is finished."""
    trackers: Names = ()
    """Names of trackers besides MLflow: tensorboard, wandb, or your own (see imports)."""
