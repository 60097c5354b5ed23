"""Trains the networks that come with the package, and exports each to tetdist/pretrained/NAME.

    python docs/make/pretrained.py
    python docs/make/pretrained.py --only quickstart --run runs/quickstart

NAME is the name of a recipe. The commands make the data, train and export; a finished training or
data set is kept. Weights are stored bitwise, except for recipes in bf16, whose matrices are rounded
to bf16 as in their evaluation.
"""

import argparse
import dataclasses
import subprocess
import sys
from pathlib import Path

from tetdist.apps.weights.export import card, write_timm
from tetdist.apps.weights.trained import load
from tetdist.config.loading import load as load_recipe
from tetdist.storage import checkpoint
from tetdist.storage.files import remove

PROJECT = Path(__file__).parent.parent.parent
FOLDER = PROJECT / "tetdist" / "pretrained"
DIGITS = ("digits", "data/digits")
SIMULATED = ("--simulate", "data/digits", "data/simulated_digits", "--timesteps", "10")
# Commands that make the data of each network.
NETWORKS: dict[str, tuple[tuple[str, ...], ...]] = {
    "quickstart": (DIGITS,),
    "simulated_digits": (DIGITS, ("prebin_dvs", *SIMULATED, "--bins", "30ms")),
}


def run(*command: str) -> None:
    subprocess.run([sys.executable, "-m", "tetdist_command", *command], cwd=PROJECT, check=True)


def export(name: str, source: Path) -> None:
    """Export a run as tetdist/pretrained/NAME, in place of an earlier export."""
    trained = load(source)
    # Without a place of this machine: the data are expected where the recipe makes them.
    config = trained.description.config
    config["data"]["root"] = load_recipe(name).data.root
    trained = dataclasses.replace(
        trained, description=trained.description.model_copy(update={"config": config})
    )
    weights = trained.model.state_dict()
    if trained.config.precision == "bf16":
        weights = {k: v.bfloat16() if v.ndim > 1 else v for k, v in weights.items()}
        trained.model.load_state_dict(weights)
    folder = FOLDER / name
    remove(folder)
    write_timm(trained, folder)
    checkpoint.write_model_file(folder / checkpoint.MODEL_FILE, weights, trained.description)
    (folder / "README.md").write_text(card(trained, f"{trained.config.model.name}.{name}"))
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {size:,} bytes, {trained.description.validation}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", choices=NETWORKS, help="default: all")
    parser.add_argument(
        "--run", type=Path, metavar="FOLDER", help="finished run to export, with --only"
    )
    options = parser.parse_args()
    if options.run and not options.only:
        parser.error("--run is a run of one network; name it with --only NAME")
    names = [options.only] if options.only else list(NETWORKS)
    if not options.run:
        # All before the first export, which changes the checkout whose commit runs record.
        for name in names:
            for command in NETWORKS[name]:
                run(*command)
            run("train", "--config", name)
    for name in names:
        export(name, options.run or PROJECT / "runs" / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
