"""Loading of a checked `RunConfig` from a YAML file, its bases, and ``key=value`` overrides."""

import difflib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from tetdist.config import names
from tetdist.config.checks import check, check_early, check_name
from tetdist.config.inheritance import COMMAND_LINE, imports_of, overridden, read_layers
from tetdist.config.messages import checked
from tetdist.config.overrides import apply_override, key_of, refuse_repeated
from tetdist.config.schema import RunConfig
from tetdist.config.sections.model import network_neuron
from tetdist.config.yaml_files import read_yaml
from tetdist.errors import UserError, typed
from tetdist.nn import neurons
from tetdist.nn.neurons import NEURONS
from tetdist.plugins import import_files
from tetdist.storage.bundled import TETDIST

# MLflow's variable, the default of tracking.uri.
TRACKING_VARIABLE = "MLFLOW_TRACKING_URI"
_PACKAGE = Path(__file__).resolve().parents[1]
# In a wheel they are in the package, in a checkout beside it.
CONFIGS_DIR = next(
    folder / "configs" for folder in (_PACKAGE, _PACKAGE.parent) if (folder / "configs").is_dir()
)


class Loaded(NamedTuple):
    """A configuration, and the origin of each value that is not a default, by dotted key."""

    config: RunConfig
    origins: dict[str, str]


def find(name: str, folder: Path = Path(), source: str = "") -> Path:
    """Find a file relative to ``folder``, or a name in configs/; errors begin with ``source``."""
    candidates = [folder / name, CONFIGS_DIR / name, CONFIGS_DIR / f"{name}.yaml"]
    for path in candidates:
        if path.is_file():
            return path
    known = {path.stem: path.stem for path in CONFIGS_DIR.glob("*.yaml")}
    known |= {path.stem: str(path) for path in (folder / name).parent.glob("*.yaml")}
    close = difflib.get_close_matches(Path(name.removeprefix(TETDIST)).stem, known, n=1)
    hint = f"did you mean {known[close[0]]}?" if close else f"`{typed('list')}` lists those"
    if (folder / name / "config.yaml").is_file():
        hint = f"did you mean {name}/config.yaml?"
    raise UserError(f"{source}no configuration {name!r}, neither as a file nor in configs/; {hint}")


def load(name: str, overrides: Sequence[str] = (), imports: Sequence[str | Path] = ()) -> RunConfig:
    """Read, override and check a configuration, after importing its files.

    Args:
        name: A file or a name in configs/.
        overrides: ``dotted.key=value``; the value is YAML, list items are numbered from 0
            (``phases.0.epochs=1``).
        imports: Further files to import; those of ``imports:`` are beside the configuration.

    Raises:
        UserError: The configuration is wrong; the text says what and where.
    """
    return load_with_origins(name, overrides, imports).config


def load_with_origins(
    name: str,
    overrides: Sequence[str] = (),
    imports: Sequence[str | Path] = (),
    check_draft: Callable[[RunConfig, str], None] | None = None,
) -> Loaded:
    """Load a configuration as `load` does, with the origin of each value.

    Args:
        check_draft: Checks keys and values before networks are imported, given the command that
            makes the data, or "".
    """
    path = find(name)
    raw, origins = read_layers(path, find)
    if {"entries", "seeds"} <= raw.keys():
        raise UserError(f"{path} is a study; run it with `{typed('study', path)}`")
    if "name" not in raw:
        raw["name"], origins["name"] = path.stem, str(path)
    refuse_repeated(overrides)
    for override in overrides:
        apply_override(raw, override)
        origins = overridden(origins, raw, key_of(override))
    tracking, uri = raw.setdefault("tracking", {}), os.environ.get(TRACKING_VARIABLE)
    if uri and isinstance(tracking, dict) and "uri" not in tracking:
        tracking["uri"], origins["tracking.uri"] = uri, TRACKING_VARIABLE
    given = next((one for one in overrides if one.startswith("imports")), path)
    raw["imports"] = [str(Path(one).absolute()) for one in [*imports_of(raw, given), *imports]]
    import_files(raw["imports"])
    config = parse(raw, str(path), overrides=overrides, origins=origins, check_draft=check_draft)
    check_name(config)
    _refuse_unread(config, str(path), origins, [key_of(one) for one in overrides])
    return Loaded(config, origins)


def data_command(file: str | Path) -> str:
    """Return the commands of a recipe's header that make its data, as one; "" without them."""
    entry = re.search(r"^# data  +(.*\n(?:#   .*\n)*)", Path(file).read_text(), re.MULTILINE)
    lines = [line.lstrip("# ") for line in entry[1].splitlines()] if entry else []
    # Further arguments, -- and so on, continue the line before.
    wanted = takewhile(re.compile(r"(python|git|apt-get|--)").match, lines)
    command = " && ".join(wanted).replace(" && --", " --")
    return re.sub(r"python tools/(\w+)\.py", lambda found: typed(found[1]), command)


def load_written(path: Path) -> RunConfig:
    """Read a written configuration of a run, and import its files."""
    try:
        raw = read_yaml(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    import_files(imports_of(raw, path))
    return parse(raw, str(path), warn=False)


def parse(
    raw: dict[str, Any],
    source: str,
    *,
    warn: bool = True,
    is_trained: bool = False,
    overrides: Sequence[str] = (),
    origins: Mapping[str, str] | None = None,
    check_draft: Callable[[RunConfig, str], None] | None = None,
) -> RunConfig:
    """Check a configuration given as nested dictionaries.

    Nothing is imported: the user's files must be imported before.

    Args:
        source: File of the configuration, as errors name it.
        warn: Refuse keys that the kind of neuron lacks.
        is_trained: The network is only used, not trained, so its loss need not be imported.
        overrides, origins: See `checked`.
        check_draft: See `load_with_origins`.

    Raises:
        UserError: It is not valid, or contradicts itself.
    """
    # Mistakes that need no network are said first: importing the networks takes seconds.
    draft = checked(RunConfig, raw, source, overrides, origins, keys_alone=True)
    check_early(draft, is_trained=is_trained)
    if "kind" in raw["model"].get("neuron", {}):  # otherwise the network's own has to be imported
        raw = _with_neuron_of_its_kind(raw, source, warn, origins or {})
    if check_draft is not None:
        set_in = (origins or {}).get("data.root", COMMAND_LINE)
        check_draft(draft, "" if set_in == COMMAND_LINE else data_command(set_in))
    raw = _with_neuron_of_its_kind(raw, source, warn, origins or {})
    config = checked(RunConfig, raw, source, overrides, origins)
    check(config, is_trained=is_trained)
    return config


def _refuse_unread(
    config: RunConfig, source: str, origins: Mapping[str, str], given: list[str]
) -> None:
    """Refuse a key that the user's own loss does not read, unless it was set for another loss.

    ``given`` has the keys of the command line. Those before loss.kind may be a study's, for all
    its entries.
    """
    from tetdist.losses import LOSSES

    later = given[given.index("loss.kind") :] if "loss.kind" in given else given
    read = {name.rstrip("_") for loss in config.losses() for name in LOSSES[loss.kind].arguments}
    for key in ("lambda", "phi", "label_smoothing"):
        place = origins.get(f"loss.{key}")
        is_typed = place == COMMAND_LINE and not {"loss", f"loss.{key}"}.isdisjoint(later)
        is_meant = is_typed or place == source == origins.get("loss.kind")
        if is_meant and key not in read and config.loss.kind not in names.LOSSES:
            raise UserError(
                f"loss.{key} has no effect: the function of loss.kind={config.loss.kind} has no "
                "such parameter; remove the key, or add the parameter"
            )


def _with_neuron_of_its_kind(
    raw: dict[str, Any], source: str, warn: bool, origins: Mapping[str, str]
) -> dict[str, Any]:
    """Return a configuration whose neuron has no keys that only other kinds have.

    With ``warn`` such a key is refused, unless the kind was chosen later: on the command line, or
    in a file that inherits the key.
    """
    model, neuron = raw["model"], raw["model"].get("neuron", {})
    kind = neuron.get("kind") or neurons.kind_of(network_neuron(model))
    if kind not in NEURONS:
        return raw
    own = {"kind", *(one.name for one in fields(NEURONS[kind]))}
    chosen_in = {origins.get(f"model.{key}", source) for key in ("neuron.kind", "name")}
    for key in sorted(neuron.keys() - own):
        place = origins.get(f"model.neuron.{key}", source)
        if warn and (place == COMMAND_LINE or (place == source and COMMAND_LINE not in chosen_in)):
            has = [name for name, cls in NEURONS.items() if key in {f.name for f in fields(cls)}]
            raise UserError(
                f"model.neuron.{key} has no effect with model.neuron.kind={kind}; remove it, or "
                f"set model.neuron.kind={' or '.join(has)}"
            )
    kept = {key: value for key, value in neuron.items() if key in own}
    return raw | {"model": model | {"neuron": kept}}
