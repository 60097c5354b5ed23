"""Configuration files that hold only their differences from another one, their ``base``."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from tetdist.config.overrides import flatten, over
from tetdist.config.yaml_files import MOST_LEVELS, read_yaml
from tetdist.errors import UserError

COMMAND_LINE, DEFAULT = "command line", "default"


def read_layers(
    path: Path, find: Callable[[str, Path, str], Path], above: tuple[Path, ...] = ()
) -> tuple[dict[str, Any], dict[str, str]]:
    """Read a file, and what it inherits from its ``base``.

    Args:
        find: Finds a ``base``, given its name, its file's folder, and the beginning of errors.
        above: The files that inherit from this one.

    Returns:
        The merged keys and values, as `read_yaml` returns them; and the file of each value, by
        dotted key.
    """
    if path.resolve() in above:
        names = " <- ".join(file.name for file in (*above, path))
        raise UserError(f"{path}: 'base' leads back to this file ({names}); remove one 'base'")
    if len(above) > MOST_LEVELS:
        raise UserError(f"{above[0]} inherits by 'base' from more than {MOST_LEVELS} files")
    values = read_yaml(path)
    base = values.pop("base", None)
    # Imported files are beside the configuration.
    if imports := [str((path.parent / file).absolute()) for file in imports_of(values, path)]:
        values["imports"] = imports
    if base is None:
        return values, dict.fromkeys(flatten(values, items=True), str(path))
    if not isinstance(base, str):
        raise UserError(f"{path}: 'base' must be the name of a configuration, not {base!r}")
    base_file = find(base, path.parent, f"{path}: base: ")
    inherited, from_where = read_layers(base_file, find, (*above, path.resolve()))
    # Two runs of one name would be one folder.
    inherited.pop("name", None)
    # Imports of both are kept: the base's values need the base's files.
    if imports:
        values["imports"] = [*imports_of(inherited, path), *imports]
    origins = from_where | dict.fromkeys(flatten(values, items=True), str(path))
    joined = over(inherited, values, str(path))
    return joined, {key: origins[key] for key in flatten(joined, items=True) if key in origins}


def imports_of(raw: dict[str, Any], source: Path | str) -> list[str]:
    """Return the files that a configuration imports."""
    files = raw.get("imports") or []
    files = [files] if isinstance(files, str) else files
    if isinstance(files, list) and all(isinstance(file, str) for file in files):
        return files
    raise UserError(f"{source}: 'imports' must be a list of files, such as [my_snn.py]")


def overridden(origins: Mapping[str, str], values: dict[str, Any], key: str) -> dict[str, str]:
    """Update origins after an override has set a key, or a section, of ``values``."""

    def is_inside(other: str) -> bool:
        return other == key or other.startswith(f"{key}.")

    kept = {other: source for other, source in origins.items() if not is_inside(other)}
    return kept | {other: COMMAND_LINE for other in flatten(values, items=True) if is_inside(other)}


def annotated(text: str, origins: Mapping[str, str]) -> str:
    """Add a comment behind each value of a YAML: its origin, by dotted key in ``origins``."""
    lines = text.splitlines()
    root = yaml.compose(text, yaml.SafeLoader)
    assert root is not None
    ends = {end: key for key, end in _values_by_line(root, "")}
    width = min(max(map(len, lines)), 50)
    for number, key in ends.items():
        above, _, last = key.rpartition(".")
        # A list may have been given as a text, such as 20..30.
        parts = [one for one in origins if last.isdecimal() and one.startswith(f"{above}.")]
        origin = next((origins[one] for one in [key, above, *parts] if one in origins), DEFAULT)
        lines[number] = f"{lines[number]:{width}}  # {origin}"
    return "\n".join(lines) + "\n"


def _values_by_line(node: yaml.Node, place: str) -> Iterator[tuple[str, int]]:
    """Yield the dotted key of each value with the number of its last line."""
    parts: list[tuple[str, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        parts = [(key.value, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        parts = [(str(number), item) for number, item in enumerate(node.value)]
    if not parts:
        yield place, node.end_mark.line
    for key, part in parts:
        yield from _values_by_line(part, f"{place}.{key}".lstrip("."))
