"""The section ``tracking``: MLflow and other trackers."""

from typing import Annotated, Literal

from pydantic import Field, PlainSerializer

from tetdist.config.fields import Names, Section
from tetdist.errors import without_passwords


def _without_passwords(uri: str | None) -> str | None:
    # Whatever is written of a configuration is serialised; only the process itself has the rest.
    return None if uri is None else without_passwords(uri)


class TrackingSection(Section):
    mlflow: bool = True
    """Log the run to MLflow."""
    uri: Annotated[str | None, PlainSerializer(_without_passwords)] = None
    """MLflow's tracking URI; null: the SQLite file RUNS_DIR/mlflow.db. Give a server's user and
    password in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD: no file keeps a password that
    is given here, so a continued run needs it again."""
    experiment: str = "tetdist"
    """Name of the experiment in MLflow, and of the W&B project unless WANDB_PROJECT names one."""
    log_checkpoint: Literal["none", "last", "best"] = "none"
    """Copy this checkpoint's model.safetensors to MLflow when the run is finished."""
    trackers: Names = ()
    """Names of trackers to use beside or instead of MLflow: tensorboard, wandb, or your own (see
    imports)."""
    register_: str | None = Field(default=None, alias="register")
    """Name of a model in MLflow's registry that gets the logged checkpoint as its next version."""
