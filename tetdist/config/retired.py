"""Keys of earlier versions that are gone, so that old run folders and checkpoints stay usable."""

import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any

from tetdist.errors import UserError

# By dotted key (phases.N stands for each phase), the default of a key that is gone.
RETIRED: dict[str, Any] = {
    "clip_mode": "norm",
    "data.cache": None,
    "data.erasing.count": 1,
    "data.event_drop": 0.0,
    "data.mixing.switch_probability": 0.5,
    "data.own_process": None,
    "model.neuron.mask": 1.0,
    "model.neuron.mask_epochs": 0.0,
    "non_finite_limit": 5,
    "phases.N.decay_epochs": 30.0,
    "phases.N.decay_rate": 0.1,
    "phases.N.final_image_size": None,
    "phases.N.image_size": None,
    "phases.N.optimizer.decay_neurons": False,
    "phases.N.power": 1.0,
    "phases.N.quantize": False,
    "record_samples": False,
    "tracking.register": None,
}
# Values that are gone, of keys that are not; a network trained with one is read with the default.
RETIRED_VALUES = {"phases.N.schedule": (("polynomial", "step"), "cosine")}


def without_retired(
    raw: dict[str, Any], source: str, origins: Mapping[str, str], *, is_trained: bool
) -> dict[str, Any]:
    """Return a configuration without keys that are gone.

    Args:
        source: File of the configuration, as errors name it.
        origins: Places of the values, by dotted key, if not all are from ``source``.
        is_trained: The network is only used, not trained; any value of a key that is gone is then
            dropped, because these keys concern training alone, except for a neuron's mask.

    Raises:
        UserError: A key that is gone has another value than its default.
    """
    raw = copy.deepcopy(raw)
    for place, parent, name, default in _gone(raw):
        if is_trained and place != "model.neuron.mask":
            parent[name] = default
        elif re.sub(r"\.\d+\.", ".N.", place) in RETIRED:  # other keys are checked with all
            what = f"{place}={parent[name]!r} is gone; remove it, or use the version that has it"
            raise UserError(f"{origins.get(place, source)}: {what}")
    for key in RETIRED:
        for _, parent, name in _found(raw, key.split(".")):
            del parent[name]
    return raw


def retired_values(raw: dict[str, Any]) -> dict[str, Any]:
    """Return what is gone, unless it has the default value: by dotted key, keys and values."""
    return {place: parent[name] for place, parent, name, _ in _gone(raw)}


def _gone(raw: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], str, Any]]:
    """Yield the place (see `_found`) and default of each key that is gone and has another value."""
    for key in (*RETIRED, *RETIRED_VALUES):
        values, default = RETIRED_VALUES.get(key) or (None, RETIRED[key])
        for place, parent, name in _found(raw, key.split(".")):
            if parent[name] in values if values else parent[name] != default:
                yield place, parent, name, default


def _found(
    owner: Any, key: list[str], place: str = ""
) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield each place of a key with the mapping that holds it."""
    name, *inner = key
    if isinstance(owner, list) and name == "N":
        for number, item in enumerate(owner):
            yield from _found(item, inner, f"{place}{number}.")
    elif isinstance(owner, dict) and name in owner:
        if inner:
            yield from _found(owner[name], inner, f"{place}{name}.")
        else:
            yield f"{place}{name}", owner, name
