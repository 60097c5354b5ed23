"""Measure the exactness of runs: the same run at any world size, ZeRO stage and stop.

    python docs/make/exactness.py --data data/digits

It trains small networks for some steps several times, in real processes (on the CPU, over gloo),
stops some of them by real signals, and writes the differences of the results into the tables of
docs/exactness.md, whose other text is written by hand. There are two parts, each of 10 to 25
minutes on two cores, which `--part` makes alone: a plain SEW-ResNet, and a QKFormer with everything
that draws random numbers or averages weights. The data must be indexed (tools/images.py index, or
make quickstart).
"""

import argparse
import datetime
import platform
import random
import shlex
import shutil
import signal
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pages
from exactness_runs import COMPARED, Runs, Stop, compare, identical, loss_difference

from tetdist.datasets.index import index_splits
from tetdist.tables import markdown
from tetdist.tracking.environment import environment

STEPS = 30
TERM, KILL, INT, USR1 = signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGUSR1
FLOAT64 = ("engine=torch", "precision=fp64")

CONFIG: dict[str, Any] = {
    "model": {"name": "sew_resnet18", "arguments": {"width": 8}},
    "data": {"image_size": 32, "resize": 32, "threads": 1},
    # 24 micro-batches a step: 1, 2, 3, 4 and 8 processes can share them.
    "batch": {"global": 48, "micro": 2, "eval": 50},
    "phases": [{"epochs": 1000, "timesteps": 2, "optimizer": {"kind": "sgd", "lr": 0.02}}],
    "precision": "fp32",
    "execution": "reference",
    "log_every": 1,
    "max_steps": STEPS,
    "imports": [str(Path(__file__).with_name("sample_record.py"))],
    "save": {"every_steps": 5},
    "tracking": {"mlflow": False},
}

IDENTICAL = "bitwise identical"
EVERYTHING = "## All features together"  # where the second part begins
PAGE = Path(__file__).parents[1] / "exactness.md"
STOPS, STOPS_SEED = 20, 16
# Two epochs of six steps, of which the second mixes nothing.
STOPPED = ("batch.global=8", "data.mixing.off_epoch=1")
# Of each class; six epochs of two steps.
TRAIN_IMAGES, VAL_IMAGES, ALL_STEPS = 5, 4, 12
CONFIG_OF_ALL: dict[str, Any] = CONFIG | {
    "batch": {"global": 24, "micro": 2, "eval": 50},  # of 50 images to train
    "model": {
        "name": "qkformer_4_384_cifar",
        "arguments": {
            **{"widths": [8, 8, 16], "depths": [1, 1, 1], "heads": 2},
            "drop_path_rate": 0.3,
        },
    },
    "data": CONFIG["data"]
    | {
        "auto_augment": "rand-m9-mstd0.5-inc1",
        "erasing": {"probability": 0.5},
        "repeats": 3,
        **{"mixup": 0.5, "cutmix": 1.0},
        "mixing": {"mode": "batch", "probability": 0.8, "off_epoch": 4},
    },
    "phases": [
        {
            **{"epochs": 6, "timesteps": 2, "warmup_epochs": 0.5},
            "optimizer": {
                **{"kind": "timm:lamb", "lr": 0.01, "layer_decay": 0.8},
                **{"weight_decay": 0.05, "decay_norms": False},
            },
        }
    ],
    "loss": {"label_smoothing": 0.1},
    "gradient_clipping": 0.1,
    "ema": {"decay": 0.9, "warmup": True},
    "execution": "fused",
    "evaluate_every": 3,
    "max_steps": ALL_STEPS,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="docs/make/exactness.py", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--data", type=Path, required=True, help="an indexed folder of images")
    parser.add_argument("--part", choices=("plain", "everything"), help="make this part only")
    parser.add_argument(
        "--quick", action="store_true", help="make only a few of the runs, and print their tables"
    )
    options = parser.parse_args(arguments)
    if not (options.data / "index" / "train.npz").is_file():
        print(
            f"error: --data: {options.data} is not indexed; python tools/images.py index "
            f"{shlex.quote(str(options.data))} does it",
            file=sys.stderr,
        )
        return 2
    plain, heading, everything = PAGE.read_text().partition(EVERYTHING)
    with tempfile.TemporaryDirectory(prefix="exactness-") as name:
        folder = Path(name)
        if options.part != "everything":
            runs = Runs(folder / "plain", CONFIG, options.data)
            tables = [*processes(runs, options.quick), *stages(runs, options.quick)]
            tables.append(stops(runs, options.quick))
            plain = changed(plain, [made(options, "plain"), *tables], options.quick)
        if options.part != "plain":
            first_images(options.data, folder / "data")
            runs = Runs(folder / "everything", CONFIG_OF_ALL, folder / "data")
            worlds = (2,) if options.quick else (2, 3, 4)
            tables = [world_sizes(runs, worlds, "moving average")]
            tables.append(random_stops(runs, options.quick))
            everything = changed(everything, [made(options, "everything"), *tables], options.quick)
    PAGE.write_text(plain + heading + everything)
    return 0


def changed(text: str, tables: list[str], quick: bool) -> str:
    """Return a part of the page with new tables, which are printed; a quick one as it was."""
    print(*tables, sep="\n\n")
    new = pages.with_tables(text, tables)
    return text if quick else new


def first_images(source: Path, root: Path) -> None:
    """Put the first images of each class into a data root of their own, and index them."""
    for split, count in (("train", TRAIN_IMAGES), ("val", VAL_IMAGES)):
        for images in sorted((source / split).iterdir()):
            (root / split / images.name).mkdir(parents=True)
            for file in sorted(images.iterdir())[:count]:
                shutil.copy(file, root / split / images.name)
    index_splits(root)


# --- the tables --------------------------------------------------------------------------------


def made(options: argparse.Namespace, part: str) -> str:
    """Return a line with the command, date and machine of a part."""
    machine = environment()
    packages = ", ".join(f"{k} {v}" for k, v in machine["packages"].items() if k != "tetdist")
    return (
        f"* Made: `python docs/make/exactness.py --data {options.data.name} --part {part}` on "
        f"{datetime.date.today():%-d %B %Y}; {machine['cpu']}, {machine['usable_cores']} cores, "
        f"Python {platform.python_version()}, {packages}."
    )


def world_sizes(runs: Runs, worlds: tuple[int, ...], *more: str) -> str:
    """Return the table of runs on several processes against the run on one process, in float64.

    Args:
        worlds: Numbers of processes.
        more: Columns beside those of every comparison.
    """
    single = runs("float64-1", *FLOAT64)
    rows = [
        [str(world), *compare(runs(f"float64-{world}", *FLOAT64, world=world), single)]
        for world in worlds
    ]
    return markdown(["processes", *COMPARED, *more], rows)


def processes(runs: Runs, quick: bool) -> list[str]:
    """Return the table of any number of processes, and that of runs that changed it."""
    table, rows = world_sizes(runs, (2,) if quick else (2, 3, 4, 8)), []
    moves = [(1, 3, 7)] if quick else [(1, 3, 7), (4, 2, 12), (3, 4, 21)]
    for before, after, step in moves:
        name = f"moved-{before}-{after}"
        runs(name, *FLOAT64, world=before, stop=Stop(step, TERM, (before - 1,)))
        cells = compare(runs(name, *FLOAT64, world=after), runs.folder / "float64-1")
        rows.append([f"{before}, then {after}", str(step), *cells])
    return [table, markdown(["processes", "stopped after", *COMPARED], rows)]


def stages(runs: Runs, quick: bool) -> list[str]:
    """Return the table of DeepSpeed's stages and its controls, and the only cause of drift."""
    single = runs("float32-0-1")
    cases = [(0, 2), (1, 1)] if quick else [(0, 2), (0, 4), (1, 1), (1, 2), (1, 4), (2, 2), (2, 4)]
    named_runs = [
        (
            f"stage {stage}, {world} process" + "es" * (world > 1),
            runs(f"float32-{stage}-{world}", f"zero_stage={stage}", world=world),
        )
        for stage, world in cases
    ]
    named_runs += [
        ("control: 1 process, 2 threads", runs("control-threads", threads=2)),
        ("control: 1 process, weights contiguous", runs("control-contiguous", contiguous=True)),
    ]
    fused = runs("control-fused", "execution=fused")
    named_runs.append(("control: 1 process, fused kernels", fused))
    rows = [
        [name]
        + [
            f"{loss_difference(run, single, range(first, last + 1)):.1e}"
            for first, last in ((1, 3), (4, 10), (11, 20), (21, STEPS))
        ]
        for name, run in named_runs
    ]
    head = ["DeepSpeed, float32", "loss, steps 1-3", "4-10", "11-20", f"21-{STEPS}"]
    control, stage1 = runs.folder / "control-contiguous", runs.folder / "float32-1-1"
    # Its norm of the gradient is DeepSpeed's own sum, in another order.
    same = identical(stage1, control, but=("grad_norm",))
    cause = "Stage 1 on one process against stage 0 with contiguous weights, over whole runs"
    return [markdown(head, rows), f"* {cause}: {same}"]


def stops(runs: Runs, quick: bool) -> str:
    """Return the table of stopped and resumed runs on two processes."""
    straight = {stage: runs.folder / f"float32-{stage}-2" for stage in (0, 1, 2)}
    cases = [
        (0, Stop(1, TERM, (0,))),
        (0, Stop(7, KILL, (0, 1))),
        (0, Stop(13, KILL, (1,))),
        (0, Stop(16, USR1, (1,))),
        (0, Stop(STEPS, TERM, (0,))),  # during the evaluation
        (0, Stop(STEPS, KILL, (0, 1))),
        (1, Stop(8, INT, (0, 1))),
        (1, Stop(17, KILL, (0,))),
        (2, Stop(11, TERM, (1,))),
        (2, Stop(22, KILL, (0, 1))),
    ]
    rows = []
    for number, (stage, stop) in enumerate(cases[:2] if quick else cases):
        name = f"stopped-{number}"
        runs(name, f"zero_stage={stage}", world=2, stop=stop)
        run = runs(name, f"zero_stage={stage}", world=2)
        rows.append([str(stage), str(stop), identical(run, straight[stage])])
    return summary(["stage"], rows)


def summary(columns: list[str], rows: list[list[str]]) -> str:
    """Return a table of stops: their number for each of the columns, and each that went wrong."""
    groups: dict[tuple[str, ...], list[list[str]]] = {}
    for *group, stop, result in sorted(rows):
        groups.setdefault(tuple(group), []).append([stop, result])
    table = [
        [
            *group,
            str(len(stops)),
            "; ".join(f"{stop}: {result}" for stop, result in stops if result != IDENTICAL)
            or IDENTICAL,
        ]
        for group, stops in groups.items()
    ]
    return markdown([*columns, "stops", "result"], table)


def random_stops(runs: Runs, quick: bool) -> str:
    """Return the table of stops that are drawn at random."""
    chance = random.Random(STOPS_SEED)
    cases: list[tuple[str, int, Stop]] = []
    for _ in range(2 if quick else STOPS):
        engine, world = chance.choice(("deepspeed", "torch")), chance.choice((1, 2))
        everyone = tuple(range(world))
        ranks = chance.choice([everyone, *((rank,) for rank in everyone)])
        stop = Stop(chance.randint(1, ALL_STEPS), chance.choice([TERM, KILL, INT, USR1]), ranks)
        cases.append((engine, world, stop))
    straight = {
        (engine, world): runs(
            f"straight-{engine}-{world}", *STOPPED, f"engine={engine}", world=world
        )
        for engine, world in sorted({case[:2] for case in cases})
    }

    def row(number: int) -> list[str]:
        engine, world, stop = cases[number]
        name, overrides = f"stopped-{number}", (*STOPPED, f"engine={engine}")
        runs(name, *overrides, world=world, stop=stop)
        run = runs(name, *overrides, world=world)
        return [engine, str(world), str(stop), identical(run, straight[engine, world])]

    # Processes that wait for one another leave a core to others.
    with ThreadPoolExecutor(4) as pool:
        rows = list(pool.map(row, range(len(cases))))
    return summary(["engine", "processes"], rows)


if __name__ == "__main__":
    sys.exit(main())
