"""Makes a checked `RunConfig` of a YAML file and ``key=value`` overrides."""

import difflib
import json
import logging
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pydantic
import yaml

from tetdist.config.checks import check, warn_without_effect
from tetdist.config.messages import explain, innermost, united
from tetdist.config.schema import RunConfig
from tetdist.errors import UserError
from tetdist.nn.neurons import NEURONS
from tetdist.plugins import import_files

logger = logging.getLogger(__name__)

_PACKAGE = Path(__file__).resolve().parents[1]
# In a wheel they are in the package, in a checkout beside it.
CONFIGS_DIR = next(
    folder / "configs" for folder in (_PACKAGE, _PACKAGE.parent) if (folder / "configs").is_dir()
)


def find(name: str) -> Path:
    """The file of a configuration: a path, or a name (with or without .yaml) in configs/."""
    candidates = [Path(name), CONFIGS_DIR / name, CONFIGS_DIR / f"{name}.yaml"]
    for path in candidates:
        if path.is_file():
            return path
    known = sorted(path.name for path in CONFIGS_DIR.glob("*.yaml"))
    close = difflib.get_close_matches(f"{name}.yaml".replace(".yaml.yaml", ".yaml"), known, n=1)
    hint = f"; did you mean {close[0]}?" if close else f"; in configs/ there are {', '.join(known)}"
    raise UserError(f"no configuration {name!r}, neither as a file nor in configs/{hint}")


def load(name: str, overrides: Sequence[str] = (), imports: Sequence[str | Path] = ()) -> RunConfig:
    """Read, override and check a configuration, when the files that it names are imported.

    Args:
        name: A file or a name in configs/.
        overrides: ``dotted.key=value``; the value is YAML, list items are numbered from 0
            (``phases.0.epochs=1``).
        imports: Files to be imported besides those of ``imports:``, which lie beside the
            configuration.

    Raises:
        UserError: Anything about it is wrong; the text says what and where.
    """
    path = find(name)
    raw = read_yaml(path)
    raw.setdefault("name", path.stem)
    raw["imports"] = [str((path.parent / one).absolute()) for one in _imports(raw, path)]
    for override in overrides:
        apply_override(raw, override)
    raw["imports"] = [str(Path(one).absolute()) for one in [*_imports(raw, path), *imports]]
    import_files(raw["imports"])
    return parse(raw, str(path))


def load_written(path: Path) -> RunConfig:
    """Read what was written down of a checked configuration, and import the files it names.

    Nothing is said of keys without effect, since every key is written out.

    Raises:
        UserError: It cannot be read, or a file of it cannot be imported.
    """
    try:
        raw = read_yaml(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    import_files(_imports(raw, path))
    return parse(raw, str(path), warn=False)


def _imports(raw: dict[str, Any], path: Path) -> list[str]:
    found = raw.get("imports") or []
    if isinstance(found, list) and all(isinstance(one, str) for one in found):
        return found
    raise UserError(f"{path}: 'imports' must be a list of files, such as [my_snn.py]")


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice: YAML's own safe loader takes the last and says nothing."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Here the keys are still those of the file; `<<` has merged nothing into them yet.
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise UserError(
                    f"{key.start_mark.name}: the key {key.value!r} is there twice, in lines "
                    f"{lines[key.value]} and {line}; rename or remove one"
                )
            lines[key.value] = line
        return node


def read_yaml(path: Path) -> dict[str, Any]:
    """Keys and values of a YAML file.

    Raises:
        UserError: It is no YAML, holds something else, or a key twice.
    """
    try:
        with path.open() as file:
            raw = yaml.load(file, _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        found = "and is empty" if raw is None else f"not a {type(raw).__name__}"
        raise UserError(f"{path} must hold keys and values, {found}")
    return raw


def parse(raw: dict[str, Any], source: str, *, warn: bool = True) -> RunConfig:
    """Check a configuration given as nested dictionaries; ``source`` is named in errors.

    Nothing is imported: what files register has to be known already.
    """
    raw = _with_present_names(raw, warn)
    try:
        config = RunConfig.model_validate_json(_as_json(raw, source))
    except pydantic.ValidationError as error:
        errors = innermost([united(e) for e in error.errors()])
        problems = "; ".join(dict.fromkeys(explain(e) for e in errors))
        raise UserError(f"{source}: {problems}") from None
    check(config)
    if warn:
        warn_without_effect(config)
    return config


def _with_present_names(raw: dict[str, Any], warn: bool) -> dict[str, Any]:
    """A configuration of any version with the keys of this one."""
    raw = dict(raw)
    if "checkpoint" in raw and "recompute" not in raw:
        raw["recompute"] = raw.pop("checkpoint")
        if warn:
            logger.warning("checkpoint is called recompute now; the old name still works")
    model = raw.get("model")
    if isinstance(model, dict) and isinstance(model.get("neuron"), dict):
        raw["model"] = model | {"neuron": _of_its_kind(model["neuron"], warn)}
    return raw


def _of_its_kind(neuron: dict[str, Any], warn: bool) -> dict[str, Any]:
    """The neuron without the keys that only other kinds have."""
    if neuron.get("spike") == "relu":  # what earlier versions called this kind
        neuron = {key: value for key, value in neuron.items() if key != "spike"} | {"kind": "relu"}
    kind = neuron.get("kind", "lif")
    if kind not in NEURONS:
        return neuron
    own = {"kind", *(one.name for one in fields(NEURONS[kind]))}
    others = {one.name for cls in NEURONS.values() for one in fields(cls)} - own
    for key in neuron.keys() & others:
        if warn:
            logger.warning("model.neuron.%s has no effect with model.neuron.kind=%s", key, kind)
    return {key: value for key, value in neuron.items() if key not in others}


def _as_json(raw: dict[str, Any], source: str) -> str:
    try:
        # Through JSON, because strict validation of JSON takes a list for a tuple, and nothing
        # else that it should not.
        return json.dumps(raw)
    except TypeError as error:
        raise UserError(
            f"{source}: a value is neither text, number, list nor mapping ({error}); "
            "quote it if it is meant as text"
        ) from error


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one ``dotted.key=value`` in nested dictionaries."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"{override!r} is not an override; write it as dotted.key=value")
    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError as error:
        raise UserError(
            f"the value of {key!r} is not valid YAML: {' '.join(str(error).split())}"
        ) from error
    # YAML 1.1 takes 1e-4 for text; nobody who types it means that.
    value = _number(value)
    node: Any = raw
    *parents, last = key.split(".")
    for depth, part in enumerate(parents):
        node = _child(node, part, ".".join(parents[: depth + 1]))
    if isinstance(node, list):
        position = _position(node, last, key)
        node[position] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise UserError(f"{key!r} cannot be set: {'.'.join(parents)} is a single value")


def _number(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return float(value) if "e" in value.lower() else value
        except ValueError:
            return value
    return value


def _child(node: Any, part: str, dotted: str) -> Any:
    if isinstance(node, list):
        return node[_position(node, part, dotted)]
    if not isinstance(node, dict):
        raise UserError(f"{dotted!r} cannot be reached: a value before it is single")
    if node.get(part) is None:
        node[part] = {}
    return node[part]


def _position(items: list[Any], part: str, dotted: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise UserError(f"{dotted!r}: {part!r} is not one of the items 0 to {len(items) - 1}")
    return int(part)
