"""Measure the sharpness of trained networks, and draw their loss landscapes.

    python tools/landscape.py runs/tet-seed0 runs/sdt-seed0 --output landscape.png
    python tools/landscape.py runs/STUDY --json landscape.json

Networks that differ only by their seed form a group. Groups are compared with that of the first
network, paired by seed. The command also runs on several processes, under torchrun.
"""

import argparse
import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tetdist.apps.cli.common import (
    CHECKPOINT,
    add_evaluation,
    documented_parser,
    run_command,
    write_result,
)
from tetdist.apps.cli.eval import HANGS_AFTER, open_checkpoint
from tetdist.config.flags import positive
from tetdist.storage import files

if TYPE_CHECKING:
    from tetdist.distributed.world import World

KEYS = ("loss", "rise", "worst_rise", "curvature", "eigenvalue")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = documented_parser("landscape", __doc__)
    add = parser.add_argument
    given = f"{CHECKPOINT}; or a folder of runs, such as a study's. All of one network"
    add("checkpoints", nargs="+", type=Path, metavar="RUN_OR_FILE", help=given)
    add("--data", metavar="ROOT", help="folder of the data; default: each training's")
    add("--split", choices=("train", "val"), default="train", help="default: train")
    given = "number of samples, in whole micro-batches of the training (default: 1000)"
    add("--samples", type=positive, default=1000, metavar="N", help=given)
    given = "number of random directions, at least 2 (default: 10)"
    add("--directions", type=positive, default=10, metavar="K", help=given)
    given = "largest change of a filter, relative to its norm (default: 0.5)"
    add("--radius", type=float, default=0.5, metavar="R", help=given)
    given = "also measure N x N points in the plane of two directions, of a network of each group"
    add("--grid", type=int, default=0, metavar="N", help=given)
    add("--seed", type=int, default=0, help="seed of samples and directions (default: 0)")
    add_evaluation(parser)
    add("--json", metavar="FILE", type=Path, help="write all numbers as JSON")
    add("--output", metavar="FILE.png", type=Path, help="draw the landscapes")
    options = parser.parse_args(arguments)
    if options.directions < 2:
        parser.error("--directions: 1 has no standard deviation; give at least 2")
    if not 0 < options.radius <= 100:
        parser.error(f"--radius: {options.radius:g} must be above 0 and at most 100")
    if options.grid and (options.grid < 3 or options.grid % 2 == 0):
        parser.error(f"--grid: {options.grid} must be odd and at least 3")
    if options.output and options.output.suffix != ".png":
        parser.error(f"--output: {options.output} must end in .png")
    # `open_checkpoint` also reads these.
    options.best = options.ema = False
    options.index = options.variant = options.batch = options.exit_on = None
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    return run_command(lambda: compare_landscapes(options))


def compare_landscapes(options: argparse.Namespace) -> None:
    from tetdist.apps.file_progress import file_progress
    from tetdist.apps.weights.landscape import Landscape, evaluations, measure
    from tetdist.config.identity import flatten
    from tetdist.distributed.watchdog import Watch
    from tetdist.distributed.world import join
    from tetdist.training.setup import load_model

    networks, done = list[dict[str, Any]](), 0
    with (
        join(options.device, run=vars(options) | {"local_rank": None}) as world,
        Watch(world, HANGS_AFTER, after="nothing was written") as watch,
        file_progress("loss landscape", "evaluation") as show,
    ):
        found = world.run_on_all(lambda: opened(options, world))
        groups = grouped({str(path): flatten(config.as_dict()) for path, _, _, config, _ in found})
        grids = {names[0]: options.grid for names in groups.values()}
        total = sum(evaluations(options.directions, grids.get(str(one[0]), 0)) for one in found)

        def progress() -> None:
            nonlocal done
            done += 1
            watch.progress("the loss landscape")
            if world.rank == 0:
                show(done, total)

        for path, weights, description, config, index in found:
            model = load_model(config, index, weights, path, world)
            model.set_timesteps(description.timesteps)
            given = (model, config, index, options.samples, options.seed, world, progress)
            landscape = world.run_on_all(partial(Landscape, *given))
            grid = grids.get(str(path), 0)
            measured = measure(landscape, options.directions, options.radius, grid)
            about = {"checkpoint": str(path), "step": description.step, "seed": config.seed}
            about |= {"timesteps": model.timesteps, "configuration": flatten(config.as_dict())}
            networks.append(about | measured)
        world.run_on_all(lambda: report(networks, groups, options) if world.rank == 0 else None)


def grouped(configurations: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """Return the networks of each group, by its name."""
    from tetdist.apps.reports.runs_table import RunRecord, group

    folders = {path: Path(path).name for path in configurations}
    names = folders if len(set(folders.values())) == len(folders) else {p: p for p in folders}
    path_of = {name: path for path, name in names.items()}
    records = [RunRecord(names[path], [], [], found) for path, found in configurations.items()]
    return {k: [path_of[one.name] for one in ones] for k, ones in group(records).items()}


def opened(options: argparse.Namespace, world: "World") -> list[Any]:
    """Return path, weights, description, configuration and split of every network."""
    from tetdist.apps.reports import style
    from tetdist.apps.weights.average import check_alike, open_training_split
    from tetdist.apps.weights.variants import with_classes_of_model
    from tetdist.training.setup import open_split

    for flag, file in (("--json", options.json), ("--output", options.output)):
        if file:
            files.check_writable(flag, file)
    if options.output:
        style.new_figure(1, 1)  # fails if matplotlib is missing
    runs = [sorted(given.glob("*/metrics.jsonl")) for given in options.checkpoints]
    paths = [
        path
        for given, inside in zip(options.checkpoints, runs, strict=True)
        for path in [file.parent for file in inside] or [given]
    ]
    found: list[Any] = []
    for path in dict.fromkeys(paths):
        options.checkpoint = path
        weights, description, config = open_checkpoint(options)
        first = found[0] if found else (path, weights, description)
        because = "landscapes of different networks cannot be compared"
        check_alike(path, (weights, description), first[0], first[1:3], because)
        classes = description.classes
        if options.split == "train":
            index = open_training_split(config, classes, path, world)
        else:
            index = open_split(config, "val", world)
            index = with_classes_of_model(index, classes, config.model.num_classes, str(path))
        found.append((path, weights, description, config, index))
    return found


def report(
    networks: list[dict[str, Any]], of_group: dict[str, list[str]], options: argparse.Namespace
) -> None:
    """Print the sharpness of each group and its difference from the first; write the files."""
    from tetdist.apps.reports import landscape as figure
    from tetdist.apps.studies.numbers import paired_difference
    from tetdist.apps.weights.landscape import LOSSES
    from tetdist.tables import aligned

    of_path = {one["checkpoint"]: one for one in networks}
    groups = {name: [of_path[path] for path in paths] for name, paths in of_group.items()}
    control = next(name for name, members in groups.items() if networks[0] in members)
    differences: dict[str, Any] = {name: {} for name in groups if name != control}
    for loss in LOSSES:
        rows = [[loss, "networks", *KEYS]]
        of = {k: {one["seed"]: one["sharpness"][loss] for one in groups[k]} for k in groups}
        for name, values in of.items():
            columns = [[one[key] for one in values.values()] for key in KEYS]
            rows.append([name, str(len(values)), *(f"{sum(c) / len(c):.3g}" for c in columns)])
        for name, by_key in differences.items():
            pairs = [(of[name][seed], of[control][seed]) for seed in of[name].keys() & of[control]]
            ours, theirs = ([pair[i] for pair in pairs] for i in (0, 1))
            found = [paired_difference([x[k] for x in ours], [x[k] for x in theirs]) for k in KEYS]
            texts = (
                f"{d.mean:+.2g}" + (f" [{d.low:+.2g}, {d.high:+.2g}]" if len(pairs) > 1 else "")
                for d in found
            )
            rows.append([f"{name} - {control}", str(len(pairs)), *texts])
            by_key[loss] = dict(zip(KEYS, map(vars, found), strict=True))
        print(aligned(rows, right=range(1, len(rows[0]))), end="\n\n")
    if options.json:
        about = {key: getattr(options, key) for key in ("split", "directions", "radius", "seed")}
        about |= {"groups": of_group, "control": control, "differences": differences}
        write_result(options.json, about | {"networks": networks})
    if options.output:
        with files.explaining(options.output):
            figure.draw(groups, options.radius, options.output)
