"""Overrides, ``dotted.key=value``: applying them, and joining lists of them."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

from tetdist.config.yaml_files import read_value
from tetdist.errors import UserError
from tetdist.wording import counted


def key_of(override: str) -> str:
    """Return the dotted key of an override."""
    key, separator, _ = override.partition("=")
    if not separator or not key:
        raise UserError(
            f"{override!r} is not of the form key=value; write it without spaces, as in seed=1"
        )
    if "[" in key:
        raise UserError(f"{override!r}: write the key with dots, as in phases.0.timesteps=2")
    return key


def refuse_repeated(overrides: Sequence[str]) -> None:
    """Refuse overrides where a later one would silently undo an earlier one."""
    for earlier, override in combinations(overrides, 2):
        if _replaces(key := key_of(override), key_of(earlier)):
            raise UserError(f"{key} is given twice, as {earlier} and as {override}; leave out one")


def joined(*layers: Sequence[str]) -> list[str]:
    """Join layers of overrides into one list, without those that a later layer replaces."""
    result: list[str] = []
    for layer in layers:
        keys = [key_of(override) for override in layer]
        kept = [one for one in result if not any(_replaces(key, key_of(one)) for key in keys)]
        result = [*kept, *layer]
    return result


def _replaces(key: str, other: str) -> bool:
    """Return whether setting ``key`` undoes a setting of ``other``."""
    return key == other or other.startswith(f"{key}.")


def flatten(values: dict[str, Any], prefix: str = "", *, items: bool = False) -> dict[str, Any]:
    """Flatten nested dictionaries into one of dotted keys, and lists with items numbered from 0.

    Args:
        items: Flatten all lists; otherwise only lists of dictionaries.
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, list) and value and (items or isinstance(value[0], dict)):
            value = {str(number): item for number, item in enumerate(value)}
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.", items=items)
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one ``dotted.key=value`` in nested dictionaries."""
    key = key_of(override)
    text = override.partition("=")[2]
    value = read_value(text, override) if text else None
    node: Any = raw
    parts = key.split(".")
    for depth, part in enumerate(parts, start=1):
        above = ".".join(parts[: depth - 1])
        place: Any = part
        if isinstance(node, list):
            place = _position(node, parts[depth - 1 :], above, override)
        elif not isinstance(node, dict):
            raise UserError(f"{override}: {above} is a single value and holds no keys")
        if depth == len(parts):
            node[place] = value
        elif isinstance(node, dict) and node.get(place) is None:
            node[place] = {}
        node = node[place]


def _position(items: list[Any], parts: list[str], name: str, override: str) -> int:
    part = parts[0]
    if part.isdecimal() and part == str(int(part)) and int(part) < len(items):
        return int(part)
    there = f"{name} has {counted(len(items), 'item')}, counted from 0"
    if not part.isdecimal() and items and isinstance(items[0], dict):
        inner = parts if part in items[0] else parts[1:] or parts  # phases.epochs, phases.N.epochs
        raise UserError(f"{override}: {there}; set {name}.0.{'.'.join(inner)}, for instance")
    raise UserError(f"{override}: {there}; add further ones in the YAML file")
