"""metrics.jsonl, the truth about what a run measured: how it is read, and cut off on a resume.

A line is strict JSON: `{"kind": "train", "step": 120, "time": 1700000000.123, ...}`. `time` is Unix
time in seconds. JSON has no word for a value that is not finite; here such a value is one of the
strings "NaN", "Infinity" and "-Infinity", which `float()` understands and `read_metrics` restores.
"""

import io
import json
import math
import os
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tetdist.errors import UserError
from tetdist.storage.files import replacing

NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_BLOCK = 1 << 20  # bytes that are read at once from the end of a file


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read a metrics.jsonl, also while it is being written.

    Values that are not finite are floats again; a last line that a kill tore is left out.

    Raises:
        UserError: A line is damaged.
    """
    return list(each_line(path))


def each_line(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of `read_metrics` one by one: a file of any size takes no memory."""
    with path.open("rb") as file:
        whole = (raw for raw in file if raw.endswith(b"\n"))
        yield from (line for _, line in _parsed(path, whole))


def from_end(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of `read_metrics`, the last one first; the file is read no further than that.

    Raises:
        UserError: A line is damaged.
    """
    with path.open("rb") as file:
        offset = file.seek(0, os.SEEK_END)
        position, rest, is_whole = offset + 1, b"", False
        while offset > 0:
            size = min(offset, _BLOCK)
            offset = file.seek(offset - size)
            rest, *lines = (file.read(size) + rest).split(b"\n")
            for raw in reversed(lines if offset else [rest, *lines]):
                position -= len(raw) + 1
                if is_whole:
                    yield _line(path, raw, position)
                is_whole = True  # but for what follows the last line's end


def read_from(path: Path, offset: int) -> tuple[list[dict[str, Any]], int]:
    """Read the whole lines from `offset` on; returns them and the offset of the next one."""
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read()
    data = data[: data.rfind(b"\n") + 1]
    lines = [line for _, line in _parsed(path, io.BytesIO(data), offset)]
    return lines, offset + len(data)


def _parsed(
    path: Path, lines: Iterable[bytes], offset: int = 0
) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield lines and what they say; ``offset`` is where in the file the first of them begins."""
    for raw in lines:
        yield raw, _line(path, raw, offset)
        offset += len(raw)


def _line(path: Path, raw: bytes, offset: int) -> dict[str, Any]:
    """Return what a line says that begins at ``offset`` of the file."""
    try:
        line = json.loads(raw)
        whole = isinstance(line["kind"], str) and isinstance(line["step"], int)
    except (ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        with path.open("rb") as file:
            number = file.read(offset).count(b"\n") + 1
        raise UserError(
            f"{path}: line {number} is damaged: {_shown(raw)}; restore the file, or remove the "
            f"line (sed -i {number}d {shlex.quote(str(path))}): what it said is lost to curves "
            "and reports, the checkpoints are untouched"
        )
    # To look into each value takes longer than to parse the line.
    return restored(line) if b"NaN" in raw or b"Infinity" in raw else line


def _shown(raw: bytes) -> str:
    text = raw[:80].decode(errors="replace").strip()
    return text if text.isprintable() else repr(text)


def keep_until(path: Path, step: int) -> tuple[dict[str, int], int]:
    """Remove the lines of later steps, and a last one that a kill tore.

    Returns:
        The last step of each kind, and the number of lines that are left.
    """
    data = path.read_bytes() if path.exists() else b""
    whole = data[: data.rfind(b"\n") + 1]
    kept = [(raw, line) for raw, line in _parsed(path, io.BytesIO(whole)) if line["step"] <= step]
    last: dict[str, int] = {}
    for _, line in kept:
        last[line["kind"]] = line["step"]
    result = b"".join(raw for raw, _ in kept)
    if result != data:
        with replacing(path) as file:
            file.write(result)
    return last, len(kept)


def points_of(line: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the numbers of a line by the names that trackers show them under.

    A value is called ``kind/key``. A list has one number a timestep, counted from 1
    (``per_timestep_top1`` of an evaluation: ``val/top1_t1``, ``val/top1_t2``, ...), a dict one an
    entry (``val/firing_rate/layer1.0.sn1``). Text stays in the file, and so does the time left,
    which measures nothing.
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
    """Write numbers that are not finite, which JSON has not, as text."""
    if isinstance(value, dict):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def restored(value: Any) -> Any:
    """Undo `strict`: what JSON has as text becomes a number again."""
    if isinstance(value, dict):
        return {key: restored(item) for key, item in value.items()}
    if isinstance(value, list):
        return [restored(item) for item in value]
    return NON_FINITE.get(value, value) if isinstance(value, str) else value
