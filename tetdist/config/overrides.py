"""Layers of values: files over their bases, and overrides, ``dotted.key=value``, over files."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

from tetdist.config.yaml_files import read_value
from tetdist.errors import UserError
from tetdist.wording import counted

# Keys that name the object whose arguments a mapping holds.
_OWNERS = ("kind", "name")


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
        if covers(key := key_of(override), key_of(earlier)):
            raise UserError(f"{key} is given twice, as {earlier} and as {override}; leave out one")


def joined(*layers: Sequence[str]) -> list[str]:
    """Join layers of overrides into one list, without those that a later layer replaces."""
    result: list[str] = []
    for layer in layers:
        keys = [key_of(override) for override in layer]
        kept = [one for one in result if not any(covers(key, key_of(one)) for key in keys)]
        result = [*kept, *layer]
    return result


def covers(key: str, other: str) -> bool:
    """Return whether a dotted key is another one, or a section around it."""
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


def over(base: Any, own: Any, source: str, place: str = "", whole: str | None = None) -> Any:
    """Merge a value into the base's: mappings key by key, a list's items by their position.

    Args:
        source: File or override of the value, for errors.
        place: Dotted key of both.
        whole: Dotted key whose value replaces the base's as a whole, for an override. None: all
            keys are merged, but arguments of another network, loss or optimiser do not stay.
    """
    if not isinstance(own, dict) or not isinstance(base, dict | list) or place == whole:
        return own
    is_list = isinstance(base, list)
    merged = {str(i): item for i, item in enumerate(base)} if is_list else dict(base)
    if whole is None and any(key in own and own[key] != merged.get(key) for key in _OWNERS):
        merged.pop("arguments", None)
    for key, value in own.items():
        if is_list and key not in merged:
            raise UserError(
                f"{source}: {place} has {counted(len(base), 'item')}, counted from 0, and no "
                f"{key!r}; name one by its number, as in {place}.0, or give the whole list"
            )
        inner = f"{place}.{key}".lstrip(".")
        merged[key] = over(merged.get(key), value, source, inner, whole)
    return list(merged.values()) if is_list else merged


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one ``dotted.key=value`` in nested dictionaries."""
    key, text = key_of(override), override.partition("=")[2]
    own = read_value(text, override) if text else None
    for part in reversed(key.split(".")):
        own = {part: own}
    values |= over(values, own, override, whole=key)
