"""Trained networks that come with the package: tetdist:NAME, and timm's pretrained=True.

Each is a folder tetdist/pretrained/NAME that docs/make/pretrained.py exports for timm; NAME is the
name of its recipe.
"""

import functools
import json
from pathlib import Path
from typing import Any

from tetdist.errors import UserError
from tetdist.wording import meant

TETDIST = "tetdist:"  # before the name of a network, where a path could stand
_FOLDER = Path(__file__).parents[1] / "pretrained"
_CONFIG_FILE = "config.json"


def names() -> list[str]:
    """Return the names of all networks that come with the package, as ``tetdist:NAME``."""
    return [f"{TETDIST}{file.parent.name}" for file in sorted(_FOLDER.glob(f"*/{_CONFIG_FILE}"))]


def folder(name: str) -> Path:
    """Return the folder of a network.

    Args:
        name: ``tetdist:NAME``.
    """
    if name not in names():
        raise UserError(f"no network {name} comes with tetdist; {meant(name, names())}")
    return _FOLDER / name.removeprefix(TETDIST)


@functools.cache
def _config(file: Path) -> Any:
    return json.loads(file.read_text())


def with_weights(cfgs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Add a description ``NETWORK.NAME`` to timm's of some networks, for each one with weights."""
    for file in sorted(_FOLDER.glob(f"*/{_CONFIG_FILE}")):
        config = _config(file)
        network, values = config["architecture"], config["pretrained_cfg"].items()
        if network in cfgs:
            own = {key: tuple(v) if isinstance(v, list) else v for key, v in values}
            own["file"] = str(file.with_name("model.safetensors"))
            own["input_size"] = (*cfgs[network]["input_size"][:-3], *own["input_size"])  # with T
            cfgs = cfgs | {f"{network}.{file.parent.name}": cfgs[network] | own}
    return cfgs


def arguments(file: str | None) -> dict[str, Any]:
    """Return a network's arguments, by the file of weights in its description of `with_weights`.

    Without weights, or with others, there are none.
    """
    home = Path(file or "").parent
    if home.parent != _FOLDER:
        return {}
    arguments: dict[str, Any] = _config(home / _CONFIG_FILE)["model_args"]
    return arguments
