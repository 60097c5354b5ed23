"""Groups of runs that differ only by their seed, for figures of loss landscapes."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tetdist.config.identity import OPERATIONAL_KEYS, PATH_KEYS, absolute_path

# Keys that may differ within a group; OPERATIONAL_KEYS have no effect on the result.
OF_THE_SEED = ("seed", "name", *OPERATIONAL_KEYS)
# Maximum length of a value in a legend.
SHOWN_CHARACTERS = 24


@dataclass(frozen=True)
class RunRecord:
    """Run, as input of figures."""

    name: str  # of its folder, with the path if several folders have the same name
    lines: list[dict[str, Any]]
    speeds: Sequence[float]
    configuration: dict[str, Any] | None  # with dotted keys


def differing_keys(records: Sequence[RunRecord]) -> list[str]:
    """Return the configuration's keys with several values, except those that vary by seed."""
    configurations = [record.configuration for record in records if record.configuration]
    keys = dict.fromkeys(key for configuration in configurations for key in configuration)
    return [
        key
        for key in keys
        if key not in OF_THE_SEED
        and key.partition(".")[0] != "cluster"
        # A run lacks keys without effect; it differs in the key that makes them so.
        and len({repr(of_any_seed(key, c)) for c in configurations if key in c}) > 1
    ]


def of_any_seed(key: str, configuration: dict[str, Any]) -> Any:
    """Return the value of a key, with the seed removed from the paths of other runs.

    The runs of a study are named NAME-seed0, NAME-seed1, ..., and each begins with the weights, or
    the teacher, of its own seed: that does not count as a difference.
    """
    value = configuration.get(key)
    if key not in PATH_KEYS or not value:
        return value
    return re.sub(r"-seed\d+(?=/|$)", "-seed*", absolute_path(str(value)))


def group(records: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """Group runs that differ only by their seed, by a common name; sorted by name.

    The name is the runs' name without the seed or, if they have different names, the keys that
    distinguish them from the others. A run without a configuration forms its own group.
    """
    keys = differing_keys(records)
    groups: dict[tuple[str, ...], list[RunRecord]] = {}
    for record in records:
        values = record.configuration
        what = (
            (f"run {record.name}",)
            if values is None
            else tuple(repr(of_any_seed(key, values)) for key in keys)
        )
        groups.setdefault(what, []).append(record)
    names = {what: _common_name(members) for what, members in groups.items()}
    taken = Counter(names.values())
    distinct = _distinguishing(keys, [members[0] for members in groups.values()])
    named = {
        (
            name
            if (name := names[what]) and taken[name] == 1
            else _described(members[0], distinct) or "equal except for the seed"
        ): members
        for what, members in groups.items()
    }
    # Sorting gives the same runs the same colours in any order of arguments.
    return dict(sorted(named.items(), key=lambda item: by_number(item[0])))


def _common_name(members: Sequence[RunRecord]) -> str | None:
    if len(members) == 1:
        return members[0].name
    names = {re.sub(r"-seed\d+$", "", record.name) for record in members}
    return names.pop() if len(names) == 1 else None


def _distinguishing(keys: Sequence[str], records: Sequence[RunRecord]) -> list[str]:
    """Return the first keys whose values suffice to distinguish all records."""
    found: list[str] = []
    kinds = 1
    for key in keys:
        with_it = {
            tuple(repr(of_any_seed(k, record.configuration)) for k in (*found, key))
            for record in records
            if record.configuration is not None
        }
        if len(with_it) > kinds:
            found.append(key)
            kinds = len(with_it)
    return found


def _described(record: RunRecord, keys: Sequence[str]) -> str:
    if record.configuration is None:
        return f"run {record.name}"
    values = record.configuration
    return ", ".join(f"{key}={shortened(of_any_seed(key, values))}" for key in keys)


def by_number(name: str) -> list[tuple[str, int]]:
    """Return a sort key that puts t10 after t2."""
    return [(text, int(digits or 0)) for text, digits in re.findall(r"(\D*)(\d*)", name)]


def shortened(value: Any) -> str:
    """Shorten a value for a table; a long one, such as a path, keeps its end."""
    text = str(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"...{text[3 - SHOWN_CHARACTERS :]}"
