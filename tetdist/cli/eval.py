"""Evaluate a checkpoint: accuracy at any number of timesteps, early exit, operations, robustness.

    python tools/eval.py --checkpoint runs/sew34_t4
    python tools/eval.py --checkpoint model.safetensors --data /data/imagenet --timesteps 1,2,4
    python tools/eval.py --checkpoint runs/sew34_t4 --timesteps 1-8 --report report.html

Needs neither DeepSpeed nor the machine that trained. Also runs on several processes, under the
deepspeed launcher or torchrun.
"""

import argparse
import dataclasses
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tetdist import files
from tetdist.cli.common import answer, program
from tetdist.config.flags import MOST_TIMESTEPS, add_import, positive
from tetdist.errors import UserError
from tetdist.wording import counted

HANGS_AFTER = 600  # seconds without progress of one of several processes

if TYPE_CHECKING:
    from tetdist.config.schema import RunConfig
    from tetdist.data.index import Index


def timesteps_list(text: str) -> list[int]:
    """Numbers and ranges, such as 1,2,4 or 1-8 or 1-4,8; rising, each once."""
    values: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise argparse.ArgumentTypeError(f"{text!r} is not a list such as 1,2,4 or 1-8")
        low, high = int(first), int(last or first)
        if high > MOST_TIMESTEPS:
            raise argparse.ArgumentTypeError(f"{text!r}: the most is {MOST_TIMESTEPS}")
        if not 1 <= low <= high:
            raise argparse.ArgumentTypeError(f"{text!r}: the least is 1, and a range must rise")
        values.update(range(low, high + 1))
    return sorted(values)


def shares_list(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list such as 0.1,0.5") from None
    if not all(0 <= value <= 1 for value in values):
        raise argparse.ArgumentTypeError(f"{text!r}: shares are from 0 to 1")
    return sorted(set(values))


def report_file(text: str) -> Path:
    if Path(text).suffix not in (".html", ".png"):
        raise argparse.ArgumentTypeError(f"{text!r} ends neither in .html nor in .png")
    return Path(text)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=program("eval"), description="Evaluate a checkpoint.")
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="RUN_OR_FILE",
        type=Path,
        help="a run folder (its last checkpoint), the folder of a checkpoint or an export, a "
        ".safetensors file, or hf:ORG/NAME[@REVISION] of the Hugging Face hub",
    )
    parser.add_argument(
        "--best",
        action="store_true",
        help="of a run folder, the best checkpoint, which was chosen on this very split",
    )
    parser.add_argument(
        "--ema",
        action="store_true",
        help="the moving average of the weights, of a run that has one; with --best the best "
        "average",
    )
    add_import(parser)
    parser.add_argument("--data", metavar="ROOT", help="folder of val/; default: as in training")
    parser.add_argument("--index", metavar="DIR", help="folder of the index; default: ROOT/index")
    parser.add_argument("--split", default="val", help="split to evaluate (default: val)")
    parser.add_argument(
        "--timesteps",
        type=timesteps_list,
        metavar="1,2,4-8",
        help="numbers of timesteps to report, also beyond that of the training (default: 1 to it)",
    )
    parser.add_argument(
        "--drop-timesteps",
        type=shares_list,
        default=[],
        metavar="0.1,0.5",
        help="also evaluate with this share of the timesteps dropped, by chance",
    )
    parser.add_argument(
        "--drop-events",
        type=shares_list,
        default=[],
        metavar="0.1,0.5",
        help="also evaluate with this share of the events dropped, by chance",
    )
    parser.add_argument(
        "--unroll",
        action="store_true",
        help="run each timestep as sub-timesteps of spikes that are 0 or 1, as a device runs "
        "neurons that fire several times: slower, with the same result",
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is dropped (default: 0)")
    parser.add_argument("--batch", type=positive, metavar="N", help="samples of one forward pass")
    parser.add_argument("--threads", type=positive, metavar="N", help="threads that decode")
    parser.add_argument("--precision", choices=["bf16", "fp32", "tf32", "fp16", "fp64"])
    parser.add_argument("--execution", choices=["fused", "reference"], help="default: fused")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the result there, too")
    parser.add_argument(
        "--report",
        metavar="FILE",
        type=report_file,
        help="write a page to look at: FILE.html, without anything outside of it, or FILE.png",
    )
    # The deepspeed launcher adds it; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    return answer(lambda: evaluate_checkpoint(options))


def evaluate_checkpoint(options: argparse.Namespace) -> int:
    from tetdist import checkpoint, plugins
    from tetdist.distributed.watchdog import Watch
    from tetdist.distributed.world import join
    from tetdist.evaluation.suite import Passes, run_suite
    from tetdist.events.splits import recorded_split
    from tetdist.nn.precision import choose_algorithms, place
    from tetdist.training.setup import choose_passes, make_model, open_split

    with join(options.device) as world, Watch(world, HANGS_AFTER) as watch:
        world.run_on_all(lambda: plugins.import_files(options.imports))
        weights, description = world.run_on_all(
            lambda: checkpoint.load_model_file(
                options.checkpoint, "best" if options.best else "last", ema=options.ema
            )
        )
        world.run_on_all(lambda: plugins.require(description.imports, options.checkpoint))
        config = world.run_on_all(lambda: evaluation_config(description.config, options))
        world.run_on_all(lambda: check_split(config, options.split))
        data = world.run_on_all(lambda: open_split(config, options.split, world))
        index = world.run_on_all(
            lambda: with_classes_of_model(data, description.classes, config, options)
        )
        wanted = world.run_on_all(lambda: wanted_timesteps(options, config, description.timesteps))
        world.run_on_all(lambda: check_options(options, wanted, index))
        model = world.run_on_all(lambda: make_model(config, index))
        choose_algorithms(config.precision)
        if config.execution == "fused":
            world.run_on_all(lambda: choose_passes(world))
        place(model, world.device, config.precision)
        world.run_on_all(lambda: checkpoint.load_weights(model, weights, options.checkpoint))
        data_split = recorded_split(config.data.root)
        about = {
            "checkpoint": str(options.checkpoint),
            "model": description.config["model"]["name"],
            "step": description.step,
            **({"averaged": description.averaged} if description.averaged else {}),
            "split": options.split,
            **({"data_split": data_split} if data_split else {}),
            **({"subset": list(data.classes)} if data.classes != index.classes else {}),
            "trained_timesteps": description.timesteps,
            "reported_timesteps": wanted,
            "seed": options.seed,
        }
        found = about | run_suite(
            Passes(model, config, index, world, lambda: watch.progress("the evaluation")),
            timesteps=wanted,
            unroll=options.unroll,
            drop_timesteps=options.drop_timesteps,
            drop_events=options.drop_events,
            seed=options.seed,
        )
        world.run_on_all(lambda: show(found, options) if world.rank == 0 else None)
    return 0


def wanted_timesteps(options: argparse.Namespace, config: "RunConfig", trained: int) -> list[int]:
    """Every T that was asked for, or all up to that of the training that the neurons can run.

    Raises:
        UserError: The neurons cannot run one that was asked for.
    """
    refusal = config.model.neuron.refusal
    if options.timesteps is None:
        return [t for t in range(1, trained + 1) if refusal(t) is None]
    for one in options.timesteps:
        if (reason := refusal(one)) is not None:
            raise UserError(f"--timesteps: {reason}")
    return list(options.timesteps)


def check_split(config: "RunConfig", split: str) -> None:
    """Refuse a split without an index where there are indexes of others.

    Raises:
        UserError: That is so; it names the others.
    """
    from tetdist.data.index import index_file

    file = index_file(config.data.index_dir, split)
    others = sorted(other.stem for other in file.parent.glob("*.npz"))
    if not file.is_file() and others:
        raise UserError(
            f"--split: there is no index {file}; there is that of {', '.join(others)}, so give"
            f" --split {others[0]}"
        )


def check_options(options: argparse.Namespace, wanted: list[int], index: "Index") -> None:
    """Refuse, before an hour of evaluation, what would fail after it.

    Raises:
        UserError: The options do not suit the data or this machine.
    """
    from tetdist.reports import style

    if index.timesteps is not None and wanted[-1] > index.timesteps:
        raise UserError(f"--timesteps: the data has {index.timesteps} time bins, not {wanted[-1]}")
    if options.drop_events and index.dtype != "uint8":
        raise UserError(
            f"--drop-events needs frames that hold numbers of events (uint8), and the data are "
            f"{index.dtype or 'images'}; leave it out"
        )
    if options.report:
        style.new_figure(1, 1)  # says if matplotlib is missing
    for flag, file in (("--json", options.json), ("--report", options.report)):
        if file and not os.access(file.parent, os.W_OK):
            raise UserError(f"{flag}: cannot write {file}: {file.parent} is no folder to write to")


def show(found: dict[str, Any], options: argparse.Namespace) -> None:
    """Print the result, and write what was asked for."""
    from tetdist.reports.evaluation_page import as_text, write_page

    print(as_text(found))
    if options.json:
        write_json(options.json, found)
    if options.report:
        try:
            write_page(found, options.report)
        except OSError as error:
            raise UserError(f"--report: cannot write {options.report}: {error.strerror}") from error


def evaluation_config(raw: dict[str, Any], options: argparse.Namespace) -> "RunConfig":
    """The training's configuration with the command line's changes."""
    from tetdist.config.loading import parse

    parse(raw, str(options.checkpoint), warn=False)  # Somebody else may have written it.
    data = dict(raw["data"])
    if options.data:
        data |= {"root": options.data, "index": None}
    if options.index:
        data["index"] = options.index
    if options.threads:
        data["threads"] = options.threads
    data["device"] = "cpu"
    changed = {
        **{key: value for key, value in raw.items() if key != "checkpoint"},
        "imports": options.imports,
        "data": data,
        # Settings that mean something in training only.
        "recompute": "none",
        "engine": "torch",
        "zero_stage": 0,
        "batch_norm": {"sync": False},
        "execution": options.execution or "fused",
        "precision": options.precision or raw["precision"],
    }
    if options.batch:
        changed["batch"] = {**raw["batch"], "eval": options.batch}
    return parse(changed, str(options.checkpoint), warn=False)


def with_classes_of_model(
    index: "Index",
    trained: list[str] | None,
    config: "RunConfig",
    options: argparse.Namespace,
) -> "Index":
    """The index with the classes of the model, all of them, and the labels that they have there.

    The data may have some of the classes only, which are found by their names.

    Raises:
        UserError: The model does not know a class, or does not name those that it knows.
    """
    import numpy as np

    present = index.classes
    if trained is None:
        # The weights were converted from a file that does not name the classes.
        if config.model.num_classes != len(present):
            raise UserError(
                f"the data has {counted(len(present), 'class')} and {options.checkpoint} knows "
                f"{config.model.num_classes}, without their names; give the data set of its "
                "training with --data"
            )
        return index
    unknown = sorted(set(present) - set(trained))
    if unknown:
        raise UserError(
            f"the data has other classes than {options.checkpoint} was trained on (unknown to the "
            f"model are {unknown[:3]}); give data of the classes of the training with --data"
        )
    labels = np.array([trained.index(name) for name in present], np.int32)[index.labels]
    return dataclasses.replace(index, classes=tuple(trained), labels=labels)


def write_json(path: Path, found: dict[str, Any]) -> None:
    try:
        files.write_json(path, found)
    except OSError as error:
        raise UserError(f"--json: cannot write {path}: {error.strerror}") from error
