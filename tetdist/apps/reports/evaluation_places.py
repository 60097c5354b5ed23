"""The files and folders of an evaluation, checked before torch is imported."""

import argparse
from pathlib import Path

from tetdist.config.yaml_files import read_yaml
from tetdist.errors import UserError
from tetdist.storage import files, hub


def check_places(options: argparse.Namespace) -> None:
    """Refuse missing files and unwritable results."""
    for flag, folder in (("--data", options.data), ("--exit-on", options.exit_on)):
        if folder is not None and not Path(folder).is_dir():
            problem = "is a file" if Path(folder).exists() else "does not exist"
            raise UserError(f"{flag}: {folder} {problem}; give the data folder")
    if root := options.exit_on:
        own = root.absolute().parent / "index" / f"{root.name}.npz"
        below = [*root.glob("index"), *root.glob("*/index"), *root.glob("splits/*/index")]
        if below and not own.is_file():  # the split's name is missing
            such = below[0].with_name("val")
            raise UserError(f"--exit-on: give ROOT/SPLIT, such as {such}, not {root}")
    for flag, result in (("--json", options.json), ("--report", options.report)):
        if result:
            files.check_writable(flag, result)
    if options.energy and not options.energy.is_file():
        raise UserError(f"--energy: there is no file {options.energy}; give YAML or JSON")
    folder = hub.check_source(options.checkpoint)
    for file in (folder / "config.yaml", folder / "recipe.yaml"):  # of a run; of an export
        if file.is_file():
            check_held_out((read_yaml(file).get("data") or {}).get("held_out"), options)
    if options.data is None:
        check_own_data(folder)


def check_own_data(folder: Path) -> None:
    """Refuse a missing data set that an export names as its own."""
    recipe = folder / "recipe.yaml"
    if recipe.is_file():
        # Imported here, because --help of eval needs neither pydantic nor NumPy.
        from tetdist.config.loading import command_for
        from tetdist.datasets.index import check_root

        config = read_yaml(recipe)
        if root := config["data"].get("root"):
            check_root(Path(root), command_for(config["name"], root), "give --data FOLDER")


def check_held_out(held_out: float | None, options: argparse.Namespace) -> None:
    """Refuse --exit-within for a network whose training held out no samples."""
    if options.exit_within is not None and options.exit_on is None and not held_out:
        raise UserError(
            "--exit-within needs training samples that the run held out, and this run held out "
            "none; train with data.held_out=0.1, or give --exit-on ROOT/SPLIT"
        )
