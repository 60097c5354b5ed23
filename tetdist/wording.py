"""Numbers with units in plain English ("2 images", "2 h 44 min"), and what a word may mean."""

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path


def counted(number: int, thing: str) -> str:
    """Return a number with its noun in singular or plural: ``counted(1, "class")`` is "1 class"."""
    if number != 1:
        hisses = thing.endswith(("s", "x", "sh", "ch")) and not thing.endswith("epoch")
        thing += "es" if hisses else "s"
    return f"{number:,} {thing}"


def are(number: int) -> str:
    """Return the verb for a number of things: "is" for one, "are" for others."""
    return "is" if number == 1 else "are"


def duration(seconds: float) -> str:
    """Format a time in its two largest units: "45 s", "3 min 5 s", "2 h 44 min", "3 d 1 h"."""
    left, parts = round(seconds), list[str]()
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1)):
        number, left = divmod(left, size)
        if number or parts or unit == "s":
            parts.append(f"{number} {unit}")
        if len(parts) == 2:
            break
    return " ".join(parts[:1] if parts[-1].startswith("0 ") else parts)


def rate(per_second: float, thing: str = "sample") -> str:
    """Format a speed: "1400 samples/s", "2.5 files/s"."""
    return f"{per_second:.{0 if per_second >= 10 else 1}f} {thing}s/s"


def speed_flag(
    per_second: float,
    model: str,
    pixels: int | None,
    precision: str,
    processes: int,
    timesteps: float,
) -> str:
    """Format one process's measured speed as slurm's flag, ready to paste, with what was measured:
    "--images-per-s 90.25 (sew_resnet34, 224 pixels, bf16, 8 processes, T=4)"."""
    size = "recordings" if pixels is None else f"{pixels} pixels"
    of = f"{model}, {size}, {precision}, {counted(processes, 'process')}, T={timesteps:g}"
    return f"--images-per-s {per_second:.4g} ({of})"


def and_more(names: Sequence[object], shown: int = 1) -> str:
    """Return the text after the first of several names: " and 2 more", or nothing."""
    return f" and {len(names) - shown:,} more" if len(names) > shown else ""


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the known word that is most like a word; None if none is."""
    return next(iter(difflib.get_close_matches(word, known, 1, cutoff)), None)


def meant(
    word: str,
    known: Collection[str],
    otherwise: str | None = None,
    shown: Mapping[str, object] | None = None,
) -> str:
    """Return "did you mean X?" for the nearest known word, or for what is ``shown`` in its place;
    without one ``otherwise``, or all."""
    names = {name.lower(): name for name in known}
    if (near := nearest(word.lower(), names)) is not None:
        return f"did you mean {(shown or {}).get(names[near], names[near])}?"
    return f"there are {', '.join(known) or 'none'}" if otherwise is None else otherwise


def meant_path(path: Path, otherwise: str, pattern: str = "*") -> str:
    """Return "did you mean PATH?" for a sibling with a similar name; without one ``otherwise``."""
    if path.is_file():
        unpack = "unpack it, or " * path.name.endswith((".gz", ".tar", ".tgz", ".zip"))
        return f"this is a file; {unpack}give a folder"
    siblings = {} if path.exists() else {one.name: one for one in path.parent.glob(pattern)}
    return meant(path.name, siblings, otherwise, siblings)
