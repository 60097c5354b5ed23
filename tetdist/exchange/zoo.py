"""The index of published networks, a JSON file: which network lies where, and what it is worth."""

import json
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tetdist.errors import UserError
from tetdist.storage import checkpoint, files
from tetdist.tracking.metrics_file import read_metrics

Percent = Annotated[float, Field(ge=0, le=100)]
Text = Annotated[str, Field(min_length=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Accuracies(_Part):
    """Top-1 of a run's two checkpoints; the best one was chosen on this very split."""

    last: Percent
    best: Percent


class Network(_Part):
    """A published network.

    Attributes:
        name: That of its run; each is in the index once.
        checkpoint: Which of the run's it is.
        repository: ``hf:ORG/NAME@COMMIT``, as the commands take it.
        sha256: Of its model.safetensors.
        model: The architecture's name.
        timesteps: T.
        classes: How many it knows.
        data: The folder of the data set that it was trained on, by its name alone.
        split: The part of the data that its accuracies are of.
        samples: How many these are.
        top1: Percent.
        recipe: The file in the repository that trains it.
        trained_by: Who did.
        date: Of the entry, YYYY-MM-DD.
    """

    name: Text
    checkpoint: Literal["last", "best"]
    repository: Annotated[str, Field(pattern=r"^hf:[^/@]+/[^/@]+@[0-9a-f]{40}$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    model: Text
    timesteps: Annotated[int, Field(gt=0)]
    classes: Annotated[int, Field(gt=0)]
    data: Text
    split: Text
    samples: Annotated[int, Field(gt=0)]
    top1: Accuracies
    recipe: Text
    trained_by: Text
    date: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\d$")]


class Evaluated(NamedTuple):
    """What a run's own evaluations found, and on what; the fields are those of `Network`."""

    data: str
    split: str
    samples: int
    top1: Accuracies


def read(file: Path) -> list[Network]:
    """Read the index, in its order.

    Raises:
        UserError: It cannot be read, or an entry is not as it should be.
    """
    try:
        found = json.loads(file.read_text())
        networks = [Network.model_validate(one) for one in found["networks"]]
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{file}: {key} of an entry: {first['msg']}; mend it there") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} is no index of networks ({error}); name another file, which is made if there "
            "is none"
        ) from error
    names = [network.name for network in networks]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UserError(f"{file} has {repeated[0]} twice; leave one of them out")
    return networks


def check_new(file: Path, name: str) -> None:
    """Make sure, before anything is pushed, that an entry can be added.

    Raises:
        UserError: The index cannot be read or made, or has a network of this name.
    """
    if not file.parent.is_dir():
        raise UserError(f"--zoo: there is no folder {file.parent}; make it, or name another file")
    if name in [network.name for network in _present(file)]:
        raise UserError(f"--zoo: {file} has {name} already; remove that entry, or rename the run")


def add(file: Path, network: Network) -> None:
    """Add a network at the end of the index, which is made if there is none.

    Raises:
        UserError: The index cannot be read or written, or has a network of this name.
    """
    check_new(file, network.name)
    networks = [*_present(file), network]
    with files.explaining(file):
        files.write_json(file, {"networks": [one.model_dump() for one in networks]})


def _present(file: Path) -> list[Network]:
    return read(file) if file.exists() else []


def evaluated(run: Path) -> Evaluated:
    """What a run's own evaluations found of its two checkpoints, and on what.

    Raises:
        UserError: It is no run folder, or one of them was not evaluated.
    """
    found = {}
    for which in ("last", "best"):
        if not (run / "checkpoints").is_dir():
            raise UserError(
                f"--zoo needs a run folder, for the accuracy of its last and its best checkpoint, "
                f"and {run} is none"
            )
        _, description = checkpoint.load_model_file(run, which)
        if not description.validation:
            raise UserError(
                f"--zoo: the {which} checkpoint of {run} was not evaluated; let the run finish"
            )
        found[which] = description.validation["top1"]
    metrics = run / "metrics.jsonl"
    lines = read_metrics(metrics) if metrics.is_file() else []
    line = next((one for one in reversed(lines) if one["kind"] == "val"), None)
    if line is None:
        raise UserError(
            f"--zoo: {metrics} has no evaluation, which says how many samples it was of"
        )
    return Evaluated(
        data=_name_of_data(Path(description.config["data"]["root"])),
        split=line.get("data_split", "val"),
        samples=line["samples"],
        top1=Accuracies(**found),
    )


def _name_of_data(root: Path) -> str:
    """The data set's folder; of a split of recordings, NAME/splits/SPLIT, not SPLIT's."""
    return root.parents[1].name if root.parent.name == "splits" else root.name
