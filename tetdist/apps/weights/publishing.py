"""A trained network as a repository of the Hugging Face hub."""

from pathlib import Path

import tetdist
from tetdist.apps.weights.export import write_timm
from tetdist.apps.weights.trained import Trained
from tetdist.errors import UserError
from tetdist.storage import hub
from tetdist.wording import counted


def write(trained: Trained, repo: str, folder: Path) -> None:
    """Write the folder that is the repository: weights, timm's config, card, recipe and classes.

    Raises:
        UserError: Its classes have no names, or see `write_timm`.
    """
    if not trained.description.classes:
        raise UserError(
            "--push: these weights do not name their classes, which those who fetch them need; "
            "convert them again with --classes"
        )
    write_timm(trained, folder, repo)


def contents(folder: Path) -> str:
    """Return the list of files that would be pushed, a line each."""
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    lines = [f"{size:14,} bytes  {name}" for name, size in sizes.items()]
    return "\n".join([*lines, f"{sum(sizes.values()):14,} bytes  in {counted(len(sizes), 'file')}"])


def push(trained: Trained, repo: str, folder: Path, *, private: bool) -> hub.Pushed:
    """Push what `write` has written; see `hub.push`."""
    name, step = trained.config.name, counted(trained.description.step, "step")
    message = f"{name} after {step}, by tetdist {tetdist.__version__}"
    return hub.push(folder, repo, private=private, message=message)
