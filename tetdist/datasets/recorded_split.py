"""The record of a split in its data root: its name, and the recording of each sample."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tetdist.errors import UserError
from tetdist.storage.files import parse_json

DATASET_FILE, RECORDS_FILE = "dataset.json", "recordings.jsonl"


def description(root: str | Path) -> dict[str, Any] | None:
    """Read a data root's dataset.json; None if there is none."""
    file = Path(root, DATASET_FILE)
    if not file.is_file():
        return None
    try:
        record: dict[str, Any] = parse_json(file.read_text(encoding="utf-8"))
        if not isinstance(record["split"], str):
            raise TypeError("it names no split")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error!r}): make the split again") from error
    return record


def recordings_of(root: str | Path) -> dict[str, str] | None:
    """Return the recording that each tensor of a data root, CLASS/NAME, was cut from.

    None if tetdist has not made the data root; each tensor then counts as a recording.
    """
    if description(root) is None:
        return None
    file = Path(root).resolve().parent.parent / RECORDS_FILE
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        return {record["key"]: record["source"] for record in map(parse_json, lines)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file}, which lists the pieces of each recording, cannot be read ({error!r}): keep "
            "the split in the folder where tools/prebin_dvs.py made it"
        ) from error


def recorded_split(root: str | Path) -> str | None:
    """Return the name of the split in a data root's dataset.json; None if there is none."""
    record = description(root)
    return record["split"] if record else None


def binning(root: str | Path) -> dict[str, Any] | None:
    """Return the parameters with which a data root's events were binned; None: unknown."""
    record = description(root) or {}
    sensor = {"sensor": record["sensor"]} if "sensor" in record else {}
    return record["parameters"] | sensor if "parameters" in record else None


def other_binning(trained: Mapping[str, Any], root: str) -> str | None:
    """Return a warning if the data's events were binned otherwise than the training's."""
    here = binning(root) or trained
    was, now = (dict(one, size=one.get("size") or one.get("sensor")) for one in (trained, here))
    keys = ["values", "bins", "resize", "size"]
    if was.get("bins") in ("count", "time"):  # windows of a fixed size do not depend on T
        keys.append("timesteps")
    differ = [key for key in keys if was.get(key) != now.get(key)]
    if not differ:
        return None
    here_with, trained_with = (
        " ".join(f"--{key} {parameters.get(key)}" for key in differ) for parameters in (now, was)
    )
    return (
        f"the events of {root} were binned with {here_with}, but those of the training with "
        f"{trained_with}: the accuracy may be far too low; bin as for the training"
    )
