"""Loading of a checked `RunConfig` from a YAML file, its bases, and ``key=value`` overrides."""

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from itertools import takewhile
from pathlib import Path
from typing import Any

from tetdist.config import names
from tetdist.config.checks import check, check_early
from tetdist.config.inheritance import COMMAND_LINE, imports_of, overridden, read_layers
from tetdist.config.messages import checked, refusing
from tetdist.config.overrides import apply_override, key_of, refuse_repeated
from tetdist.config.schema import RunConfig
from tetdist.config.sections.model import network_neuron, neuron_of
from tetdist.config.yaml_files import read_yaml
from tetdist.errors import UserError, WrongValue, typed
from tetdist.nn import neurons
from tetdist.nn.neurons import NEURONS
from tetdist.plugins import import_files
from tetdist.storage.bundled import TETDIST
from tetdist.wording import meant

# MLflow's variable, the default of tracking.uri.
TRACKING_VARIABLE = "MLFLOW_TRACKING_URI"
_PACKAGE = Path(__file__).resolve().parents[1]
# In a wheel they are in the package, in a checkout beside it.
CONFIGS_DIR = next(
    folder / "configs" for folder in (_PACKAGE, _PACKAGE.parent) if (folder / "configs").is_dir()
)


@dataclass(frozen=True)
class Draft:
    """A configuration with valid keys and values, before its network is imported.

    Attributes:
        config: The configuration; its neuron is a mapping of the keys that are given.
        source: File of the configuration, as errors name it.
        overrides: Overrides that were applied; errors name one in place of ``source`` if the
            mistake is in it.
        origins: Place of each value that is not a default, by dotted key.
        only_used: The network is used, not trained, so its loss is not checked, and need not be
            imported.
    """

    config: RunConfig
    source: str
    overrides: Sequence[str] = ()
    origins: Mapping[str, str] = field(default_factory=dict)
    only_used: bool = False

    @property
    def data_command(self) -> str:
        """The command that makes the data; "" if their root is the user's, or it is unknown."""
        file = self.origins.get("data.root", COMMAND_LINE)
        return "" if file == COMMAND_LINE else data_command(file)

    @property
    def neuron_keys(self) -> dict[str, Any]:
        """The keys of the neuron that are given, which the network completes."""
        keys: Any = self.config.model.neuron
        return dict(keys)

    def refusing(self, *place: str) -> AbstractContextManager[None]:
        """Turn errors about wrong values below a place into one that names their origin."""
        return refusing(RunConfig, self.source, self.overrides, self.origins, place)

    def __post_init__(self) -> None:
        # Refuse mistakes that show without the network, whose import takes seconds.
        with self.refusing():
            check_early(self.config, only_used=self.only_used)
        if kind := self.neuron_keys.get("kind"):
            self._neuron_keys_of(kind)

    def with_neuron(self) -> RunConfig:
        """Return the configuration with its neuron, for which the network may be imported."""
        model = self.config.model
        kind = self.neuron_keys.get("kind") or neurons.kind_of(network_neuron(model.name))
        with self.refusing("model", "neuron"):
            neuron = neuron_of(self._neuron_keys_of(kind), model.name)
        model = model.model_copy(update={"neuron": neuron})
        return self.config.model_copy(update={"model": model})

    def completed(self) -> RunConfig:
        """Return the configuration with its neuron, checked against what it names."""
        config = self.with_neuron()
        with self.refusing():
            check(config, only_used=self.only_used)
            if not self.only_used:
                self._check_that_the_loss_reads_all(config)
        return config

    def _neuron_keys_of(self, kind: str) -> dict[str, Any]:
        """Return the given keys of the neuron that a kind has.

        Another key is refused, unless it was given before the kind was chosen: in a base, or in the
        file if the kind is chosen on the command line.
        """
        keys_by_kind = {name: {f.name for f in fields(cls)} for name, cls in NEURONS.items()}
        own = {"kind", *keys_by_kind[kind]}
        is_typed = COMMAND_LINE in map(self.origins.get, ("model.neuron.kind", "model.name"))
        for key in sorted(self.neuron_keys.keys() - own):
            origin = self.origins.get(f"model.neuron.{key}", self.source)
            if origin == COMMAND_LINE or (origin == self.source and not is_typed):
                kinds = [name for name, keys in keys_by_kind.items() if key in keys]
                raise UserError(
                    f"model.neuron.{key} has no effect with model.neuron.kind={kind}; remove it, "
                    f"or set model.neuron.kind={' or '.join(kinds)}"
                )
        return {key: value for key, value in self.neuron_keys.items() if key in own}

    def _check_that_the_loss_reads_all(self, config: RunConfig) -> None:
        """Refuse a key that the user's own loss function has no parameter for.

        A key set before loss.kind was chosen, in a base or by a study for all entries, may be for
        another loss, and is accepted.
        """
        from tetdist.losses import LOSSES

        keys = [key_of(override) for override in self.overrides]
        later = keys[keys.index("loss.kind") :] if "loss.kind" in keys else keys
        read = {
            name.rstrip("_") for loss in config.losses() for name in LOSSES[loss.kind].arguments
        }
        for key in ("lambda", "phi", "label_smoothing"):
            place = self.origins.get(f"loss.{key}")
            is_typed = place == COMMAND_LINE and not {"loss", f"loss.{key}"}.isdisjoint(later)
            is_meant = is_typed or place == self.source == self.origins.get("loss.kind")
            if is_meant and key not in read and config.loss.kind not in names.LOSSES:
                raise WrongValue(
                    f"loss.{key}",
                    f"has no effect: the function of loss.kind={config.loss.kind} has no such "
                    "parameter; remove the key, or add the parameter",
                )


def find(name: str, folder: Path = Path(), source: str = "") -> Path:
    """Find a file relative to ``folder``, or a name in configs/; errors begin with ``source``."""
    candidates = [folder / name, CONFIGS_DIR / name, CONFIGS_DIR / f"{name}.yaml"]
    for path in candidates:
        if path.is_file():
            return path
    known = {path.stem: path.stem for path in CONFIGS_DIR.glob("*.yaml")}
    known |= {path.stem: str(path) for path in (folder / name).parent.glob("*.yaml")}
    those = f"`{typed('list')}` lists those"
    hint = meant(Path(name.removeprefix(TETDIST)).stem, known, those, known)
    if os.path.lexists(folder / name):
        hint = "it is a folder, a pipe or a link to nothing, and must be a regular file"
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
    return draft(name, overrides, imports).completed()


def draft(name: str, overrides: Sequence[str] = (), imports: Sequence[str | Path] = ()) -> Draft:
    """Read, override and check keys and values of a configuration; see `load`.

    A command checks in the draft what takes less time than an import of the network.
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
    source = next((one for one in overrides if one.startswith("imports")), path)
    raw["imports"] = [str(Path(file).absolute()) for file in [*imports_of(raw, source), *imports]]
    import_files(raw["imports"])
    config = checked(RunConfig, raw, str(path), overrides, origins)
    # A shell or Slurm would take another name for something else.
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{,199}", config.name):
        raise UserError(
            f"name: {config.name!r} must consist of letters (A to Z), digits and . _ -, at most "
            "200, and must not begin with . or -; choose another name=..."
        )
    return Draft(config, str(path), overrides, origins)


def imports_in(name: str) -> list[str]:
    """Return the files that a configuration imports, given its file or name in configs/."""
    path = find(name)
    return imports_of(read_layers(path, find)[0], path)


def command_for(name: str, root: str) -> str:
    """Return the command that makes the data of a run by its recipe; "" without one."""
    # It makes them in the current folder, and an absolute root is another place.
    return "" if Path(root).is_absolute() else data_command(CONFIGS_DIR / f"{name}.yaml")


def data_command(file: str | Path) -> str:
    """Return the commands of a recipe's header that make its data, as one; "" without them."""
    text = Path(file).read_text() if Path(file).is_file() else ""
    entry = re.search(r"^# data  +(.*\n(?:#   .*\n)*)", text, re.MULTILINE)
    lines = [line.lstrip("# ") for line in entry[1].splitlines()] if entry else []
    # Further arguments, -- and so on, continue the line before.
    commands = takewhile(re.compile(r"(python|git|apt-get|--)").match, lines)
    command = " && ".join(commands).replace(" && --", " --")
    return re.sub(r"python tools/(\w+)\.py", lambda name: typed(name[1]), command)


def load_written(path: Path) -> RunConfig:
    """Read a written configuration of a run, and import its files."""
    try:
        raw = read_yaml(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    import_files(imports_of(raw, path))
    return parse(raw, str(path))


def parse(
    raw: dict[str, Any],
    source: str,
    *,
    only_used: bool = False,
    overrides: Sequence[str] = (),
) -> RunConfig:
    """Check a configuration given as nested dictionaries.

    Nothing is imported: the user's files must be imported before. See `Draft` for the arguments.

    Raises:
        UserError: It is not valid, or contradicts itself.
    """
    origins = {key_of(override): COMMAND_LINE for override in overrides}
    config = checked(RunConfig, raw, source, overrides, origins)
    return Draft(config, source, overrides, origins, only_used).completed()
