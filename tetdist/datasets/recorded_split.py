"""The record that a data root keeps of its split: its name, and the recording of each sample."""

from pathlib import Path
from typing import Any

from tetdist.errors import UserError
from tetdist.storage.files import parse_json

DATASET_FILE, RECORDS_FILE = "dataset.json", "recordings.jsonl"


def description(root: str | Path) -> dict[str, Any] | None:
    """Read what a data root says of itself in its dataset.json; None where it has none.

    Raises:
        UserError: The file is damaged.
    """
    file = Path(root, DATASET_FILE)
    if not file.is_file():
        return None
    try:
        found = parse_json(file.read_text(encoding="utf-8"))
        if isinstance(found, dict) and isinstance(found["split"], str):
            return found
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{file} is damaged ({error!r}): make the split again") from error
    raise UserError(f"{file} names no split: make it again")


def recordings_of(root: str | Path) -> dict[str, str] | None:
    """The recording that each tensor of a data root, CLASS/NAME, was cut from.

    None where tetdist has not made the data root, and each tensor stands for itself.

    Raises:
        UserError: What says so is not there any more, or damaged.
    """
    if description(root) is None:
        return None
    file = Path(root).resolve().parent.parent / RECORDS_FILE
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        return {record["key"]: record["source"] for record in map(parse_json, lines)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file}, which says what pieces of one recording are, cannot be read ({error!r}): "
            "keep the split where tools/prebin_dvs.py has made it"
        ) from error


def recorded_split(root: str | Path) -> str | None:
    """The name of the split that a data root says it is; None where it says nothing.

    Raises:
        UserError: Its dataset.json is damaged.
    """
    found = description(root)
    return found["split"] if found else None
