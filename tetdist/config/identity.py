"""The identity of a run: the keys that must not change when it is resumed."""

from operator import attrgetter
from pathlib import Path
from typing import Any

from tetdist.config.fields import TIMM
from tetdist.config.overrides import flatten
from tetdist.config.schema import RunConfig
from tetdist.storage.hub import NAMED

# Places of files, and how they are read.
_READING = ("data.index", "data.threads", "data.prefetch")

# Keys that may change on a resume: places of files, amounts of output, and ways to compute the same
# numbers; none changes the result beyond rounding. (The index's fingerprint identifies the data.)
OPERATIONAL_KEYS = (
    *_READING,
    "model.mixes_samples",
    "data.root",
    "batch.eval",
    # Checksums compare their content instead.
    "imports",
    "recompute",
    "engine",
    "zero_stage",
    "cuda_graphs",
    "peer_timeout",
    "profile",
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
)

# Keys without use for repeating a run on another machine: its places, device, tracking and
# checkpoint interval.
_OF_THE_MACHINE = (
    *(*_READING, "peer_timeout", "profile", "device", "log_every", "plots", "resume"),
    *("runs_dir", "save", "tracking", "cluster"),
)

# Keys that may differ between hosts of one run.
_OF_THE_HOST = (*_READING, "data.root", "runs_dir")

# Input files and folders, compared by absolute path. A network may also be hf:ORG/NAME or
# tetdist:NAME, and a teacher timm:NAME.
PATH_KEYS = ("init_checkpoint", "loss.distillation.teacher", "loss.distillation.teacher_weights")


def without_machine(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration without keys that concern the machine and not the result."""
    data = {key: v for key, v in config["data"].items() if f"data.{key}" not in _OF_THE_MACHINE}
    kept = {key: value for key, value in config.items() if key not in _OF_THE_MACHINE}
    return kept | {"data": data}


def of_all_hosts(config: RunConfig) -> dict[str, Any]:
    """Return the dotted keys of a configuration that must be the same on all hosts of a run."""
    flat = flatten(config.as_dict())
    return {key: value for key, value in flat.items() if key not in _OF_THE_HOST}


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """List the differences that make two configurations different runs, as parts of a sentence."""
    a, b = _with_absolute_paths(flatten(old)), _with_absolute_paths(flatten(new))
    return [
        f"{key} is {b.get(key)!r} and was {a.get(key)!r}"
        for key in sorted(a.keys() | b.keys())
        if key not in OPERATIONAL_KEYS
        and key.partition(".")[0] != "cluster"
        and a.get(key) != b.get(key)
        and {} not in (a.get(key), b.get(key))  # the keys within it are listed
    ]


def _with_absolute_paths(flat: dict[str, Any]) -> dict[str, Any]:
    return flat | {key: absolute_path(flat[key]) for key in PATH_KEYS if flat.get(key)}


def absolute_path(value: str) -> str:
    """Return the value of one of the `PATH_KEYS` so that it is valid in any folder."""
    return value if value.startswith((TIMM, *NAMED)) else str(Path(value).absolute())


def with_absolute_paths(config: RunConfig, *keys: str) -> RunConfig:
    """Return a configuration whose paths at dotted keys are valid in any folder."""
    for key in keys:
        if (path := attrgetter(key)(config)) is not None:
            config = config.with_value(key, absolute_path(path))
    return config
