"""Keys of earlier versions that are gone, so that old run folders and checkpoints stay usable."""

import copy
import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from tetdist.config.overrides import key_of
from tetdist.errors import UserError

logger = logging.getLogger(__name__)


class Retired(NamedTuple):
    """A key that is gone.

    Attributes:
        default: Its value in configurations that did not set it.
        instead: Remedy, as the end of a sentence; it begins with a verb.
    """

    default: Any
    instead: str


# By dotted key; phases.N stands for each phase.
RETIRED: dict[str, Retired] = {
    "clip_mode": Retired("norm", "remove it: gradient_clipping limits the norm of the gradient"),
    "data.cache": Retired(None, "copy the shards yourself, and set data.root to the copy"),
    "data.erasing.count": Retired(1, "remove it: random erasing fills one rectangle per image"),
    "data.event_drop": Retired(0.0, "write it as a transform of your own (docs/extending.md)"),
    "data.mixing.switch_probability": Retired(0.5, "remove it: both are equally likely"),
    "data.own_process": Retired(None, "remove it: data loads in its own process for a GPU"),
    "non_finite_limit": Retired(5, "remove it: five non-finite steps in a row end a run"),
    "phases.N.decay_epochs": Retired(30.0, "remove it, with schedule=step"),
    "phases.N.decay_rate": Retired(0.1, "remove it, with schedule=step"),
    "phases.N.final_image_size": Retired(None, "train one run for each data.image_size"),
    "phases.N.image_size": Retired(None, "set data.image_size, and init_checkpoint for a next run"),
    "phases.N.optimizer.decay_neurons": Retired(
        False, "remove it: learnable neuron parameters have no weight decay"
    ),
    "phases.N.power": Retired(1.0, "remove it, with schedule=polynomial"),
    "phases.N.quantize": Retired(False, "remove it: export --int8 rounds trained weights"),
    "record_samples": Retired(
        False, "remove it: docs/make/sample_record.py, as one of imports, records samples"
    ),
    "tracking.register": Retired(None, "register the model of log_checkpoint on MLflow's pages"),
}
# Values that are gone, of keys that are not; a network trained with one is read with the default.
RETIRED_VALUES: dict[str, tuple[tuple[Any, ...], Retired]] = {
    "phases.N.schedule": (("polynomial", "step"), Retired("cosine", "set cosine or constant")),
}


def without_retired(
    raw: dict[str, Any], source: str, *, is_trained: bool, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Return a configuration without keys that are gone.

    Args:
        source: File of the configuration, as errors name it.
        is_trained: The network is only used, not trained; any value of a key that is gone is then
            dropped, because these keys concern training alone.
        overrides: Overrides that were applied; errors name one in place of ``source``.

    Raises:
        UserError: A key that is gone has another value than its default.
    """
    raw, dropped = copy.deepcopy(raw), []
    for place, parent, name, retired in _gone(raw):
        if not is_trained:
            given = [one for one in overrides if key_of(one) == place]
            what = given[-1] if given else f"{source}: {place}={parent[name]!r}"
            raise UserError(f"{what} is gone; {retired.instead}")
        parent[name] = retired.default
    for key in RETIRED:
        for place, parent, name in _found(raw, key.split(".")):
            del parent[name]
            dropped.append(place)
    if dropped and not is_trained:
        logger.info("%s: dropped keys of an earlier version: %s", source, ", ".join(dropped))
    return raw


def retired_values(raw: dict[str, Any]) -> dict[str, Any]:
    """Return what is gone, unless it has the default value: by dotted key, keys and values."""
    return {place: parent[name] for place, parent, name, _ in _gone(raw)}


def _gone(raw: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], str, Retired]]:
    """Yield each place of what is gone, unless it has the default value: see `_found`."""
    for key in (*RETIRED, *RETIRED_VALUES):
        values, retired = RETIRED_VALUES.get(key) or (None, RETIRED[key])
        for place, parent, name in _found(raw, key.split(".")):
            if parent[name] in values if values else parent[name] != retired.default:
                yield place, parent, name, retired


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
