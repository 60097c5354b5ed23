"""Selection of a run's last and best checkpoints, by their names and headers alone; needs no torch.

A checkpoint's folder gets its name when it is complete, and loses it before it is deleted. Since
nothing else records which one is the last or the best, a kill at any moment leaves both right.
"""

import math
import re
from pathlib import Path
from typing import Any

from tetdist.errors import UserError
from tetdist.storage.files import parse_json

MODEL_FILE, EMA_FILE, MANIFEST_FILE = "model.safetensors", "ema.safetensors", "manifest.json"
_NAME = re.compile(r"step-(\d+)(?:\.(\d+))?")
_LONGEST_HEADER = 100_000_000  # of safetensors


def all_in(folder: Path) -> list[Path]:
    """Return the checkpoints in a run's folder ``checkpoints``, oldest first.

    ``step-N.2`` comes after ``step-N.1``, and that after ``step-N``.
    """
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in paths if _NAME.fullmatch(path.name)), key=step_and_repeat)


def step_and_repeat(path: Path) -> tuple[int, int]:
    """Return a checkpoint's step, and its number among those of this step, by its name."""
    step, _, repeat = path.name.removeprefix("step-").partition(".")
    return int(step), int(repeat or 0)


def last(folder: Path) -> Path | None:
    """Return the checkpoint of the highest step; None if there is none."""
    return next(reversed(all_in(folder)), None)


def best(folder: Path, file: str = MODEL_FILE) -> Path | None:
    """Return the checkpoint of the highest validation top-1; of equals the earliest step.

    Args:
        file: The checkpoints' file whose header is read, MODEL_FILE or EMA_FILE.

    Returns:
        None if no checkpoint was evaluated.

    Raises:
        UserError: A checkpoint is damaged, and may be the best one.
    """
    top1 = _top1(folder, file)
    for path, value in top1.items():
        if value == math.inf:
            raise UserError(
                f"the checkpoint {path} is damaged: the header of {file} cannot be read, so it may "
                "be the best one; restore it, or remove it to choose among the others"
            )
    return _highest(top1)


def never_pruned(folder: Path) -> set[Path]:
    """Return the best checkpoint, that of the best average, and damaged ones that may be these."""
    kept = set()
    for file in (MODEL_FILE, EMA_FILE):
        top1 = _top1(folder, file)
        damaged = {path for path, value in top1.items() if value == math.inf}
        kept |= damaged | {_highest({path: top1[path] for path in top1.keys() - damaged})}
    return {path for path in kept if path is not None}


def _highest(top1: dict[Path, float]) -> Path | None:
    def order(path: Path) -> tuple[float, int, int]:
        step, repeat = step_and_repeat(path)
        return top1[path], -step, repeat

    return max(top1, key=order, default=None)


def _top1(folder: Path, file: str) -> dict[Path, float]:
    """Return the validation top-1 of the evaluated checkpoints; infinity where it is unreadable."""
    top1 = {}
    for path in all_in(folder):
        try:
            if file in parse_json((path / MANIFEST_FILE).read_bytes())["files"]:
                validation = _header(path / file).get("validation")
                if validation is not None:
                    top1[path] = float(validation["top1"])
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            if path.is_dir():  # else it was deleted meanwhile, and so is not the best one
                top1[path] = math.inf
    return top1


def _header(file: Path) -> dict[str, Any]:
    """Return the description of the weights in a file of safetensors."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = parse_json(stream.read(min(length, _LONGEST_HEADER)))
    description: dict[str, Any] = parse_json(header["__metadata__"]["tetdist"])
    return description
