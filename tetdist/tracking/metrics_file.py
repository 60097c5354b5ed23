"""metrics.jsonl, the record of a run's metrics: reading it, and truncating it on a resume.

A line is strict JSON: `{"kind": "train", "step": 120, "time": 1700000000.123, ...}`. `time` is Unix
time in seconds. JSON has no non-finite numbers; they are the strings "NaN", "Infinity" and
"-Infinity", which `float()` understands and `read_metrics` restores.
"""

import math
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tetdist.errors import UserError
from tetdist.storage.files import parse_json

NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_BLOCK = 1 << 20  # bytes per read from the end of a file


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read all lines of a metrics.jsonl; see `lines_of`."""
    return list(each_line(path))


def each_line(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of `read_metrics` one by one, without holding the file in memory."""
    return (line for _, line in lines_of(path))


def lines_of(path: Path, offset: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the lines of a metrics.jsonl, also while it is being written.

    Non-finite values are floats again; an incomplete last line is left out.

    Args:
        offset: Start of the first line, in bytes.

    Yields:
        Start of the next line, in bytes, and the contents of this one.
    """
    with path.open("rb") as file:
        file.seek(offset)
        for raw in file:
            if not raw.endswith(b"\n"):
                return
            offset += len(raw)
            yield offset, _parsed(path, raw, offset)


def from_end(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of `read_metrics` from the last one on, reading only as far as needed."""
    with path.open("rb") as file:
        offset = file.seek(0, os.SEEK_END)
        end, rest, is_whole = offset + 1, b"", False
        while offset > 0:
            size = min(offset, _BLOCK)
            offset = file.seek(offset - size)
            rest, *lines = (file.read(size) + rest).split(b"\n")
            for raw in reversed(lines if offset else [rest, *lines]):
                if is_whole:
                    yield _parsed(path, raw, end)
                end -= len(raw) + 1
                is_whole = True  # only what follows the last newline is incomplete


def _parsed(path: Path, raw: bytes, end: int) -> dict[str, Any]:
    try:
        line = parse_json(raw)
        if isinstance(line["kind"], str) and isinstance(line["step"], int):
            # Few lines have non-finite values, and searching all would double the time.
            return restored(line) if b'"NaN"' in raw or b'Infinity"' in raw else line
    except (ValueError, KeyError, TypeError):
        pass
    with path.open("rb") as file:
        number = file.read(end).count(b"\n")
    text = raw[:80].decode(errors="replace").strip()
    raise UserError(
        f"{path}: line {number} is damaged: {text if text.isprintable() else repr(text)}; restore "
        f"the file, or remove the line (sed -i {number}d {shlex.quote(str(path))})"
    )


def keep_until(path: Path, step: int) -> dict[str, int]:
    """Remove the lines of later steps, which come last, and an incomplete last line.

    Returns:
        The last remaining step of each kind.
    """
    last: dict[str, int] = {}
    kept = 0
    if not path.exists():
        return last
    for end, line in lines_of(path):
        if line["step"] > step:
            break
        last[line["kind"]], kept = line["step"], end
    os.truncate(path, kept)
    return last


def points_of(line: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the numbers of a line with their names in trackers.

    A value's name is ``kind/key``. A list has one number per timestep, counted from 1
    (``per_timestep_top1`` of an evaluation: ``val/top1_t1``, ``val/top1_t2``, ...), a dict one per
    entry (``val/firing_rate/layer1.0.sn1``). Text and the time left are not sent to trackers.
    """
    kind = line["kind"]
    for key, value in line.items():
        if key in ("kind", "step", "time", "eta_s"):
            continue
        if isinstance(value, dict):
            pairs = [(f"{kind}/{key}/{entry}", item) for entry, item in value.items()]
        elif isinstance(value, list):
            stem = f"{kind}/{key.removeprefix('per_timestep_')}"
            pairs = [(f"{stem}_t{t}", item) for t, item in enumerate(value, start=1)]
        else:
            pairs = [(f"{kind}/{key}", value)]
        for name, item in pairs:
            if isinstance(item, int | float):
                yield name, float(item)


def strict(value: Any) -> Any:
    """Replace non-finite numbers, which JSON lacks, by text."""
    if isinstance(value, dict):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def restored(value: Any) -> Any:
    """Undo `strict`: restore non-finite numbers from text."""
    if isinstance(value, dict):
        return {key: restored(item) for key, item in value.items()}
    if isinstance(value, list):
        return [restored(item) for item in value]
    return NON_FINITE.get(value, value) if isinstance(value, str) else value
