"""The index of published networks, a JSON file: which network lies where, and what it is worth."""

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tetdist import checkpoint, files
from tetdist.errors import UserError

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
        split: The part of the data that its accuracies are of.
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
    split: Text
    top1: Accuracies
    recipe: Text
    trained_by: Text
    date: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\d$")]


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
            f'{file} is no index of networks ({error}); a new one is {{"networks": []}}'
        ) from error
    names = [network.name for network in networks]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UserError(f"{file} has {repeated[0]} twice; leave one of them out")
    return networks


def check_new(file: Path, name: str) -> None:
    """Make sure, before anything is pushed, that an entry can be added.

    Raises:
        UserError: The index cannot be read, or has a network of this name.
    """
    if name in [network.name for network in read(file)]:
        raise UserError(f"--zoo: {file} has {name} already; remove that entry, or rename the run")


def add(file: Path, network: Network) -> None:
    """Add a network at the end of the index.

    Raises:
        UserError: The index cannot be read or written, or has a network of this name.
    """
    check_new(file, network.name)
    networks = [*read(file), network]
    with files.explaining(file):
        files.write_json(file, {"networks": [one.model_dump() for one in networks]})


def accuracies(run: Path) -> Accuracies:
    """What a run's own evaluations found of its two checkpoints.

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
    return Accuracies(**found)
