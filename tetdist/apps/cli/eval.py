"""Evaluate a checkpoint: accuracy at any number of timesteps, early exit, operations, robustness.

    python tools/eval.py --checkpoint runs/sew34_t4
    python tools/eval.py --checkpoint model.safetensors --data /data/imagenet --timesteps 1,2,4
    python tools/eval.py --checkpoint runs/sew34_t4 --timesteps 1-8 --report report.html

Evaluation needs no DeepSpeed and no particular machine. It also runs on several processes, under
the deepspeed launcher or torchrun.
"""

import argparse
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tetdist.apps.cli.common import CHECKPOINT, add_evaluation, program, run_command
from tetdist.config.flags import MOST_TIMESTEPS, positive
from tetdist.errors import UserError
from tetdist.storage import files

# Variants of ImageNet's validation set (apps/weights/variants.py) whose folder holds class folders.
OF_CLASS_FOLDERS = ("imagenet-v2", "imagenet-a", "imagenet-r")
VARIANTS = (*OF_CLASS_FOLDERS, "imagenet-c", "real")
HANGS_AFTER = 600  # seconds without progress after which a process counts as hanging

if TYPE_CHECKING:
    from torch import Tensor

    from tetdist.apps.weights.variants import Compared
    from tetdist.config.schema import RunConfig
    from tetdist.datasets.index import Index
    from tetdist.distributed.world import World
    from tetdist.evaluation.evaluate import Also
    from tetdist.evaluation.suite import Evaluator
    from tetdist.storage.checkpoint import Description


def timesteps_list(text: str) -> list[int]:
    """Parse numbers and ranges, such as 1,2,4 or 1-8 or 1-4,8; sorted, without duplicates."""
    values: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise argparse.ArgumentTypeError(f"{text!r} must be a list such as 1,2,4 or 1-8")
        low, high = int(first), int(last or first)
        if high > MOST_TIMESTEPS:
            raise argparse.ArgumentTypeError(f"{text!r}: at most {MOST_TIMESTEPS} are allowed")
        if not 1 <= low <= high:
            raise argparse.ArgumentTypeError(f"{text!r}: T must be at least 1, and ranges ascend")
        values.update(range(low, high + 1))
    return sorted(values)


def fractions_list(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be a list such as 0.1,0.5") from None
    if not all(0 <= value <= 1 for value in values):
        raise argparse.ArgumentTypeError(f"{text!r}: fractions must be from 0 to 1")
    return sorted(set(values))


def points(text: str) -> float:
    """Parse percentage points of accuracy, from 0 to 100."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number, such as 0.5") from None
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text!r}: percentage points must be from 0 to 100")
    return value


def report_file(text: str) -> Path:
    if Path(text).suffix not in (".html", ".png"):
        raise argparse.ArgumentTypeError(f"{text!r} must end in .html or .png")
    return Path(text)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=program("eval"), description="Evaluate a checkpoint.")
    parser.add_argument(
        "--checkpoint", required=True, metavar="RUN_OR_FILE", type=Path, help=CHECKPOINT
    )
    parser.add_argument(
        "--best",
        action="store_true",
        help="use the best checkpoint of a run folder (it was chosen on the validation split)",
    )
    parser.add_argument(
        "--ema",
        action="store_true",
        help="use the moving average of the weights, if the run has one; with --best, the best "
        "average",
    )
    parser.add_argument(
        "--data", metavar="ROOT", help="folder that holds val/; default: training's"
    )
    parser.add_argument("--index", metavar="DIR", help="folder of the index; default: ROOT/index")
    parser.add_argument("--split", default="val", help="split to evaluate (default: val)")
    parser.add_argument(
        "--variant",
        choices=VARIANTS,
        help="evaluate --data as this variant of ImageNet's validation set, as published "
        "(docs/data.md); real: the validation set, with real.json beside it",
    )
    parser.add_argument(
        "--timesteps",
        type=timesteps_list,
        metavar="1,2,4-8",
        help="report top-1, top-5 and loss at these T, which may exceed the T of training (default:"
        " 1 up to it); all else uses the T of training, or the last of these if it is not listed",
    )
    parser.add_argument(
        "--recompute-statistics",
        type=positive,
        metavar="N",
        help="first recompute the running statistics from at least N training samples, as "
        "tools/average.py does, at one T (see --timesteps): that of training if it is listed",
    )
    parser.add_argument(
        "--exit-within",
        type=points,
        metavar="POINTS",
        help="choose the early-exit threshold that loses at most POINTS of top-1 on the training "
        "samples that the run held out (data.held_out), and report its effect on this split",
    )
    parser.add_argument(
        "--exit-on",
        type=Path,
        metavar="ROOT/SPLIT",
        help="choose that threshold on this split instead, without its labels: at most POINTS "
        "percent of its decisions may differ from those at T; for recordings of the place and day "
        "of use",
    )
    parser.add_argument(
        "--measured",
        action="store_true",
        help="also run early exit at that threshold for real: decided samples leave the batch; "
        "reports images/s beside those of whole passes",
    )
    parser.add_argument(
        "--drop-timesteps",
        type=fractions_list,
        default=[],
        metavar="0.1,0.5",
        help="also evaluate with this fraction of the timesteps dropped at random",
    )
    parser.add_argument(
        "--drop-events",
        type=fractions_list,
        default=[],
        metavar="0.1,0.5",
        help="also evaluate with this fraction of the events dropped at random",
    )
    parser.add_argument(
        "--unroll",
        action="store_true",
        help="split each timestep into sub-timesteps with spikes of 0 or 1, as hardware runs "
        "neurons that fire several times: slower, with the same result",
    )
    parser.add_argument(
        "--int8",
        action="store_true",
        help="evaluate the network in whole numbers (export --int8), and count the decisions that "
        "differ from those of the real numbers",
    )
    parser.add_argument(
        "--energy",
        metavar="FILE",
        type=Path,
        help="YAML or JSON file of constants and assumptions of the energy estimate that differ "
        "from the defaults (docs/evaluation.md)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the drops (default: 0)")
    parser.add_argument("--batch", type=positive, metavar="N", help="samples a forward pass")
    add_evaluation(parser)
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the result as JSON")
    parser.add_argument(
        "--report",
        metavar="FILE",
        type=report_file,
        help="write the result as a page: FILE.html (self-contained) or FILE.png",
    )
    options = parser.parse_args(arguments)
    for flag, given in (("--measured", options.measured), ("--exit-on", options.exit_on)):
        if given and options.exit_within is None:
            parser.error(f"{flag} needs the early exit of --exit-within; add --exit-within POINTS")
    unsupported = options.unroll or options.measured or options.energy
    if options.int8 and (unsupported or options.variant == "imagenet-c"):
        parser.error(
            "--int8 does not support --unroll, --measured, --energy and --variant imagenet-c"
        )
    check_variant(parser, options)
    return options


def check_variant(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse options that --variant does not support."""
    if options.variant not in (None, "real"):
        if options.data is None:
            parser.error(f"--variant {options.variant} needs its folder; give --data FOLDER")
        if options.split != "val":
            parser.error(f"--variant {options.variant} is itself a split; leave out --split")
    for flag in ("exit_within", "recompute_statistics"):
        if options.variant is not None and getattr(options, flag) is not None:
            name = flag.replace("_", "-")
            parser.error(f"--{name} needs the data of the training; leave out --variant")
    if options.variant == "imagenet-c":
        for flag in ("report", "unroll", "drop_timesteps", "drop_events", "energy"):
            if getattr(options, flag):
                parser.error(f"--variant imagenet-c does not support --{flag.replace('_', '-')}")
        if len(options.timesteps or ()) > 1:
            parser.error("--variant imagenet-c is evaluated at one T; give one --timesteps value")


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    return run_command(lambda: evaluate_checkpoint(options))


def evaluate_checkpoint(options: argparse.Namespace) -> None:
    from tetdist.apps.file_progress import file_progress
    from tetdist.apps.reports import energy
    from tetdist.apps.weights import variants
    from tetdist.apps.weights.average import open_training_split, recompute_statistics
    from tetdist.apps.weights.integers import convert
    from tetdist.apps.weights.trained import Trained
    from tetdist.distributed.watchdog import Watch
    from tetdist.distributed.world import join
    from tetdist.evaluation.early_exit import measure_exit
    from tetdist.evaluation.suite import Evaluator, choose_exit, run_suite
    from tetdist.models.streaming import stream_of
    from tetdist.nn.norm_neuron import is_causal
    from tetdist.training.setup import load_model

    with (
        join(options.device, run=vars(options) | {"local_rank": None}) as world,
        Watch(world, HANGS_AFTER, after="nothing was written") as watch,
    ):

        def alive() -> None:
            watch.progress("the evaluation")

        def opened(split: str) -> "Compared":
            if options.variant is not None:
                world.run_on_all(
                    lambda: index_variant(config, split, alive) if world.rank == 0 else None
                )
            return world.run_on_all(
                lambda: open_compared(split, description, config, options, world)
            )

        def evaluator(of: "Compared") -> Evaluator:
            return Evaluator(model, config, of.index, world, alive, outputs=of.outputs)

        constants = world.run_on_all(lambda: energy.read_constants(options.energy))
        weights, description, config = world.run_on_all(lambda: open_checkpoint(options))
        trained = description.timesteps
        corrupted: dict[str, tuple[str, int]] = {}
        if options.variant == "imagenet-c":
            corrupted = world.run_on_all(lambda: variants.corruptions(Path(options.data)))
        compared = opened(next(iter(corrupted), options.split))
        index = compared.index
        wanted = world.run_on_all(lambda: wanted_timesteps(options, config, trained, index))
        headline = trained if trained in wanted else wanted[-1]
        model = load_model(config, index, weights, options.checkpoint, world)
        found = about(description, config, compared, options) | {"reported_timesteps": wanted}
        if options.recompute_statistics is not None:
            source = options.checkpoint
            training = world.run_on_all(
                lambda: open_training_split(config, description.classes, source, world)
            )
            model.set_timesteps(headline)
            with file_progress("running statistics", "sample") as bar:
                given = (config, training, world, options.recompute_statistics, bar, watch.progress)
                done = recompute_statistics(model, *given)
            found["averaged"] = "; ".join(filter(None, [description.averaged, done]))
        real = exit_choice = None
        decided: dict[str, dict[int, int]] = {"real": {}, "whole": {}}
        if options.int8:
            model.set_timesteps(headline)
            numbers = evaluator(compared).run("real numbers", also=deciding(decided["real"]))
            plain = Trained(model.cpu(), config, description)
            whole: Any = world.run_on_all(lambda: convert(plain, max(trained, wanted[-1])))
            model = whole.to(world.device)
        if options.variant == "real":
            file = Path(config.data.root, variants.REAL_FILE)
            real = world.run_on_all(
                lambda: variants.RealLabels(file, index, model.num_classes, headline, world.device)
            )
        if options.measured:
            world.run_on_all(lambda: stream_of(model))
        if options.exit_within is not None:
            calibration = world.run_on_all(
                lambda: calibration_samples(evaluator(compared), description, headline, options)
            )
            labelled = options.exit_on is None
            within = options.exit_within
            exit_choice = choose_exit(calibration, headline, within, labelled=labelled)
        if corrupted:
            model.set_timesteps(headline)
            found |= {"timesteps": headline} | variants.run_corruptions(
                corrupted, lambda split, title: evaluator(opened(split)).run(title)
            )
        else:
            found |= run_suite(
                evaluator(compared),
                timesteps=wanted,
                headline=headline,
                unroll=options.unroll,
                drop_timesteps=options.drop_timesteps,
                drop_events=options.drop_events,
                seed=options.seed,
                also=deciding(decided["whole"], None if real is None else real.add),
                exit_choice=exit_choice,
            )
            if found["operations"]:
                found["energy"] = energy.estimate(found["operations"], headline, *constants)
            if options.int8:
                (changed,) = world.sum(
                    [sum(one != decided["real"][i] for i, one in decided["whole"].items())]
                )
                found["real_numbers"] = {"top1": numbers.top1, "changed": int(changed)}
        if real is not None:
            found["real"] = real.total(world, is_causal(model))
        if options.measured and exit_choice is not None:
            found["measured_exit"] = measure_exit(evaluator(compared), exit_choice)
        world.run_on_all(lambda: show(found, options) if world.rank == 0 else None)


def deciding(decided: dict[int, int], also: "Also | None" = None) -> "Also":
    """Return a function for `evaluate` that notes each sample's class, and calls another one."""
    from tetdist.evaluation.evaluate import running_means

    def note(logits: "Tensor", labels: "Tensor", ids: Any) -> None:
        classes = running_means(logits)[-1].argmax(-1).tolist()
        decided.update(zip(ids.tolist(), classes, strict=True))
        if also is not None:
            also(logits, labels, ids)

    return note


def open_checkpoint(
    options: argparse.Namespace,
) -> "tuple[dict[str, Tensor], Description, RunConfig]":
    """Read the weights and their description, and configure the evaluation."""
    from tetdist import plugins
    from tetdist.storage import checkpoint

    for flag, folder in (("--data", options.data), ("--exit-on", options.exit_on)):
        if folder is not None and not Path(folder).is_dir():
            problem = "is a file" if Path(folder).exists() else "does not exist"
            raise UserError(f"{flag}: {folder} {problem}; give the data folder")
    if options.variant in OF_CLASS_FOLDERS:
        # Treat the variant's folder as a split of its parent folder.
        folder = Path(options.data).absolute()
        options.data, options.split = str(folder.parent), folder.name
    plugins.import_files(options.imports)
    which = "best" if options.best else "last"
    weights, description = checkpoint.load_model_file(options.checkpoint, which, ema=options.ema)
    plugins.require(description.imports, options.checkpoint)
    return weights, description, evaluation_config(description.config, options)


def evaluation_config(raw: dict[str, Any], options: argparse.Namespace) -> "RunConfig":
    """Return the training's configuration with the command line's changes."""
    from tetdist.config.loading import parse

    # Another program may have written it.
    parse(raw, str(options.checkpoint), warn=False, is_trained=True)
    data = dict(raw["data"])
    if options.data:
        data |= {"root": options.data, "index": None}
    if options.index:
        data["index"] = options.index
    if options.variant == "imagenet-c":
        # Images of ImageNet-C are already cropped.
        data["resize"] = data["image_size"]
    if options.threads:
        data["threads"] = options.threads
    data["device"] = "cpu"
    changed = {
        **{key: value for key, value in raw.items() if key != "checkpoint"},
        "imports": options.imports,
        "data": data,
        # Settings that only affect training.
        "recompute": "none",
        "engine": "torch",
        "zero_stage": 0,
        "batch_norm": {"sync": False},
        "execution": options.execution or "fused",
        "precision": options.precision or raw["precision"],
    }
    if options.batch:
        changed["batch"] = {**raw["batch"], "eval": options.batch}
    return parse(changed, str(options.checkpoint), warn=False, is_trained=True)


def index_variant(config: "RunConfig", split: str, alive: Callable[[], None]) -> None:
    """Index a variant's split, unless an index exists."""
    from tetdist.apps.weights.variants import make_index

    data = config.data
    if data.kind != "images":
        raise UserError("--variant needs a network of images, and this one takes events; omit it")
    make_index(Path(data.root), data.index_dir, split, data.threads, alive)


def open_compared(
    split: str,
    description: "Description",
    config: "RunConfig",
    options: argparse.Namespace,
    world: "World",
) -> "Compared":
    """Open a split, and map its classes to the network's outputs."""
    from tetdist.apps.weights.variants import compared_with_model
    from tetdist.datasets.index import index_command, index_file
    from tetdist.training.setup import open_split

    data = config.data
    file = index_file(data.index_dir, split)
    if not file.is_file():
        others = sorted(other.stem for other in file.parent.glob("*.npz"))
        if options.data is None and not Path(data.root).is_dir():
            raise UserError(
                f"--data: the training's data folder, {data.root}, does not exist here; give "
                f"--data ROOT, a folder with the split {split}"
            )
        if others:
            raise UserError(
                f"--split: there is no index {file}, but one of {', '.join(others)}; give "
                f"--split {others[0]}"
            )
        if options.data is None:
            raise UserError(
                f"--data: the recipe's data folder has no index {file}; give --data ROOT, or index "
                f"it with `{index_command(data.root, split, data.kind)}`"
            )
    index = open_split(config, split, world)
    known = config.model.num_classes
    return compared_with_model(
        index, description.classes, known, options.variant, str(options.checkpoint)
    )


def calibration_samples(
    evaluator: "Evaluator",
    description: "Description",
    timesteps: int,
    options: argparse.Namespace,
) -> "Evaluator":
    """Return the evaluator on the samples that the threshold of early exit is chosen on.

    These are the training samples that the run held out or, with --exit-on, those of another split,
    whose labels are blanked, since its class folders may have any names.
    """
    import numpy as np

    from tetdist.nn.norm_neuron import is_causal
    from tetdist.training.setup import open_data, open_split

    config, world = evaluator.config, evaluator.world
    if not is_causal(evaluator.model):
        raise UserError("--exit-within: the network is not causal and has no early exit; omit it")
    if options.exit_on is not None:
        folder = options.exit_on.absolute()
        given = argparse.Namespace(**vars(options) | {"data": str(folder.parent), "index": None})
        config = evaluation_config(description.config, given)
        index = open_split(config, folder.name, world)
        if index.timesteps is not None:
            shape, wanted = index.frames_shape, (timesteps, *evaluator.index.frames_shape[1:])
            if shape[0] < timesteps or shape[1:] != wanted[1:]:
                raise UserError(
                    f"--exit-on: {options.exit_on} has frames of {'x'.join(map(str, shape))}, and "
                    f"{'x'.join(map(str, wanted))} are needed; convert it as the evaluated split"
                )
        unlabelled = replace(index, classes=(), labels=np.zeros_like(index.labels))
        return replace(evaluator, config=config, index=unlabelled, outputs=None)
    if not config.data.held_out:
        raise UserError(
            "--exit-within needs training samples that the run held out, and this run held out "
            "none; train with data.held_out=0.1, or give --exit-on ROOT/SPLIT"
        )
    _, held_out = open_data(config, world)
    if list(held_out.classes) != list(description.classes or held_out.classes):
        raise UserError(
            f"--exit-within: the classes of {config.data.root} differ from those of the training; "
            "give --data, the data of the training"
        )
    return replace(evaluator, index=held_out, outputs=None)


def wanted_timesteps(
    options: argparse.Namespace, config: "RunConfig", trained: int, index: "Index"
) -> list[int]:
    """Return every requested T; by default, every T up to the training's that the neurons support.

    It also checks, before an hour of evaluation, everything that would fail afterwards.
    """
    from tetdist.apps.reports import style

    refusal = config.model.neuron.refusal
    if options.timesteps is None:
        wanted = [t for t in range(1, trained + 1) if refusal(t) is None]
    else:
        wanted = options.timesteps
        if reason := next(filter(None, map(refusal, wanted)), None):
            raise UserError(f"--timesteps: {reason}; leave it out for {trained}")
    if index.timesteps is not None and wanted[-1] > index.timesteps:
        raise UserError(f"--timesteps: {wanted[-1]} exceeds the data's {index.timesteps} time bins")
    of_bytes = options.drop_events or (options.int8 and index.timesteps is not None)
    if of_bytes and index.dtype != "uint8":
        flag = "--drop-events" if options.drop_events else "--int8"
        raise UserError(
            f"{flag} needs frames of event counts (uint8), and the data are "
            f"{index.dtype or 'images'}; leave it out"
        )
    if options.report:
        style.new_figure(1, 1)  # fails if matplotlib is missing
    for flag, file in (("--json", options.json), ("--report", options.report)):
        if file:
            files.check_writable(flag, file)
    return wanted


def about(
    description: "Description",
    config: "RunConfig",
    compared: "Compared",
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Describe the evaluated network and data."""
    from tetdist.datasets.recorded_split import recorded_split

    some = {
        "variant": options.variant,
        "protocol": compared.protocol,
        "data_split": recorded_split(config.data.root),
        "subset": compared.subset,
    }
    return {
        "checkpoint": str(options.checkpoint),
        "model": description.config["model"]["name"],
        "step": description.step,
        **({"averaged": description.averaged} if description.averaged else {}),
        "split": options.split,
        **{key: value for key, value in some.items() if value},
        "trained_timesteps": description.timesteps,
        "seed": options.seed,
    }


def show(found: dict[str, Any], options: argparse.Namespace) -> None:
    """Print the result, and write the requested files."""
    from tetdist.apps.reports.evaluation_page import as_text, corruptions_as_text, write_page

    print(corruptions_as_text(found) if "corruptions" in found else as_text(found))
    if options.json:
        with files.explaining(options.json):
            files.write_json(options.json, found)
    if options.report:
        with files.explaining(options.report):
            write_page(found, options.report)
