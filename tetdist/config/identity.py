"""Tells whether two configurations are of the same run: which keys make it the run that it is."""

from pathlib import Path
from typing import Any

from tetdist.config.fields import TIMM
from tetdist.config.schema import RunConfig
from tetdist.storage.hub import HF

# What may differ between a run and its continuation: where things are, how much is shown or kept,
# and how the same numbers are computed, nothing that changes the result beyond rounding. (The data
# set's content is compared by the index's fingerprint.)
OPERATIONAL_KEYS = (
    "data.root",
    "data.index",
    "data.device",
    "data.threads",
    "data.prefetch",
    "data.own_process",
    "batch.eval",
    # Their content is compared instead, by checksums.
    "imports",
    "recompute",
    "engine",
    "zero_stage",
    "cuda_graphs",
    "non_finite_limit",
    "peer_timeout",
    "record_samples",
    "profile",
    "profile.steps",
    "device",
    "max_steps",
    "log_every",
    "plots",
    "reference",
    "resume",
    "runs_dir",
    "save.every_steps",
    "save.keep_last",
    "tracking.mlflow",
    "tracking.trackers",
    "tracking.uri",
    "tracking.experiment",
    "tracking.log_checkpoint",
    "tracking.register",
)

# Of those, what repeating a run on another machine has no use for: where and on what it ran, how it
# was followed, how often it was saved.
_OF_THE_MACHINE = (
    "data.index",
    "data.device",
    "data.threads",
    "data.prefetch",
    "data.own_process",
    "peer_timeout",
    "record_samples",
    "profile",
    "device",
    "log_every",
    "plots",
    "resume",
    "runs_dir",
    "save",
    "tracking",
    "cluster",
)

# Of the first, what may differ from host to host: where the data lie, and how they are read there.
_OF_THE_HOST = (
    "data.root",
    "data.index",
    "data.threads",
    "data.prefetch",
    "data.own_process",
    "runs_dir",
)

# Files and folders of others, which are the same however their path is written. Instead, a network
# may be hf:ORG/NAME, and a teacher timm:NAME.
PATH_KEYS = ("init_checkpoint", "loss.distillation.teacher", "loss.distillation.teacher_weights")


def without_machine(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without what concerns the machine and not the result."""
    data = {key: v for key, v in config["data"].items() if f"data.{key}" not in _OF_THE_MACHINE}
    kept = {key: value for key, value in config.items() if key not in _OF_THE_MACHINE}
    return kept | {"data": data}


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries and lists as one dictionary of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{dotted}.")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            flat |= flatten({str(i): item for i, item in enumerate(value)}, f"{dotted}.")
        else:
            flat[dotted] = value
    return flat


def of_all_hosts(config: RunConfig) -> dict[str, Any]:
    """Return the dotted keys of a configuration that all processes of a run have in common."""
    flat = flatten(config.as_dict())
    return {key: value for key, value in flat.items() if key not in _OF_THE_HOST}


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """List what makes two configurations different runs, a sentence part each."""
    a, b = _with_absolute_paths(flatten(old)), _with_absolute_paths(flatten(new))
    return [
        f"{key} is {b.get(key)!r} and was {a.get(key)!r}"
        for key in sorted(a.keys() | b.keys())
        if key not in OPERATIONAL_KEYS
        and key.partition(".")[0] != "cluster"
        and a.get(key) != b.get(key)
    ]


def _with_absolute_paths(flat: dict[str, Any]) -> dict[str, Any]:
    return flat | {key: absolute_path(flat[key]) for key in PATH_KEYS if flat.get(key)}


def absolute_path(value: str) -> str:
    """The value of one of the `PATH_KEYS` as it is understood in any folder."""
    return value if value.startswith((TIMM, HF)) else str(Path(value).absolute())
