"""Evaluate a checkpoint: accuracy at any number of timesteps, early exit, operations, energy.

    python tools/eval.py runs/sew34_t4
    python tools/eval.py model.safetensors --data /data/imagenet --timesteps 1,2,4
    python tools/eval.py runs/sew34_t4 --timesteps 1-8 --report report.html

Evaluation needs no DeepSpeed and no particular machine. It also runs on several processes, under
the deepspeed launcher or torchrun.
"""

import argparse
import logging
import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tetdist.apps.cli.common import add_checkpoint, add_local_rank, program, run_command
from tetdist.config.flags import MOST_THREADS, MOST_TIMESTEPS, Parser, add_import, positive
from tetdist.config.yaml_files import read_yaml
from tetdist.errors import UserError
from tetdist.storage import files, hub

if TYPE_CHECKING:
    from torch import Tensor

    from tetdist.config.schema import RunConfig
    from tetdist.datasets.index import Index
    from tetdist.distributed.world import World
    from tetdist.evaluation.energy import EnergySection
    from tetdist.evaluation.evaluate import Also, Evaluator
    from tetdist.evaluation.results import EvalResult, Subject
    from tetdist.storage.checkpoint import Description

HANGS_AFTER = 600  # seconds without progress after which a process counts as hanging


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
    if Path(text).suffix != ".html":
        raise argparse.ArgumentTypeError(f"{text!r} must end in .html")
    return Path(text)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog=program("eval"), description="Evaluate a checkpoint.")
    add = parser.add_argument
    add_checkpoint(parser)
    text = "use the best checkpoint of a run folder (it was chosen on the validation split)"
    add("--best", action="store_true", help=text)
    text = "use the moving average of the weights, if the run has one; with --best, the best one"
    add("--ema", action="store_true", help=text)
    add("--data", metavar="ROOT", help="folder that holds val/; default: training's")
    add("--index", metavar="DIR", help="folder of the index; default: ROOT/index")
    text = "split to evaluate (default: val, or without one the samples that the run held out)"
    add("--split", help=text)
    text = """report top-1, top-5 and loss at these T, which may exceed the T of training (default:
        1 up to it); all else uses the T of training, or the last of these if it is not listed"""
    add("--timesteps", type=timesteps_list, metavar="1,2,4-8", help=text)
    text = """choose the early-exit threshold that loses at most POINTS of top-1 on the training
        samples that the run held out (data.held_out), and report its effect on this split"""
    add("--exit-within", type=points, metavar="POINTS", help=text)
    text = """choose that threshold on this split instead, without its labels: at most POINTS
        percent of its decisions may differ from those at T; for recordings of the day of use"""
    add("--exit-on", type=Path, metavar="ROOT/SPLIT", help=text)
    text = """also run early exit at that threshold for real: decided samples leave the batch;
        reports images/s beside those of whole passes"""
    add("--measured", action="store_true", help=text)
    text = """evaluate the network in whole numbers (export --int8), and count the decisions that
        differ from those of the real numbers"""
    add("--int8", action="store_true", help=text)
    text = """YAML or JSON file of constants and assumptions of the energy estimate that differ
        from the defaults (docs/evaluation.md)"""
    add("--energy", metavar="FILE", type=Path, help=text)
    add("--batch", type=positive, metavar="N", help="samples a forward pass; default: training's")
    threads = partial(positive, most=MOST_THREADS)
    add("--threads", type=threads, metavar="N", help="decoding threads; default: training's")
    text = "precision of the forward pass; default: training's"
    add("--precision", choices=["bf16", "fp32", "tf32", "fp16", "fp64"], help=text)
    text = "fused kernels, or the definition in plain torch (default: fused)"
    add("--execution", choices=["fused", "reference"], help=text)
    text = "device of the network (default: auto, a GPU if there is one)"
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help=text)
    add_import(parser)
    add_local_rank(parser)
    add("--json", metavar="FILE", type=Path, help="also write the result as JSON")
    text = "write the result as a self-contained page with plots"
    add("--report", metavar="FILE.html", type=report_file, help=text)
    options = parser.parse_args(arguments)
    for flag, value in (("--exit-on", options.exit_on), ("--measured", options.measured)):
        if value and options.exit_within is None:
            parser.error(f"{flag} needs the early exit of --exit-within; add --exit-within POINTS")
    refused = [f"--{flag}" for flag in ("measured", "energy") if vars(options)[flag]]
    if options.int8 and refused:
        parser.error(f"--int8 does not support {' and '.join(refused)}; leave either out")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("huggingface_hub").propagate = False  # it prints its retries itself
    return run_command(lambda: evaluate_checkpoint(options))


def evaluate_checkpoint(options: argparse.Namespace) -> None:
    if "RANK" not in os.environ:  # Several processes check it later, together.
        check_places(options)
    from tetdist.distributed.watchdog import Watch
    from tetdist.distributed.world import join
    from tetdist.evaluation.evaluate import Evaluator
    from tetdist.network import load_model

    with (
        join(options.device, run=vars(options) | {"local_rank": None}) as world,
        Watch(world, HANGS_AFTER, after="nothing was written") as watch,
    ):
        opened = world.run_on_all(lambda: open_checkpoint(options, world))
        config, split = opened.config, opened.split
        model = load_model(config, split, opened.weights, options.checkpoint, world)
        model.set_timesteps(opened.subject.headline)
        alive = partial(watch.progress, "the evaluation")
        evaluator = Evaluator(model, config, split, world, alive)
        evaluate = evaluate_in_integers if options.int8 else evaluate_network
        result = evaluate(evaluator, opened, options)
        world.run_on_all(lambda: show(result, options) if world.rank == 0 else None)


def evaluate_network(
    evaluator: "Evaluator",
    opened: "Opened",
    options: argparse.Namespace,
    also: "Also" = lambda _logits, _labels: None,
) -> "EvalResult":
    """Evaluate a network, with early exit if that is asked for; for ``also`` see `evaluate`."""
    from tetdist.apps.weights import calibration
    from tetdist.evaluation.early_exit import choose_exit, measure_exit
    from tetdist.evaluation.suite import run_suite
    from tetdist.models.streaming import stream_of

    suite = partial(run_suite, evaluator, opened.subject, also=also, constants=opened.constants)
    if options.exit_within is None:
        return suite()
    headline, description = opened.subject.headline, opened.description

    def samples_to_choose_on() -> "Evaluator":
        if options.measured:
            stream_of(evaluator.model)  # fails if the network cannot be streamed
        return calibration.calibration(evaluator, headline, description.classes, options.exit_on)

    chosen_on = evaluator.world.run_on_all(samples_to_choose_on)
    choice = choose_exit(chosen_on, headline, options.exit_within)
    if options.exit_on:
        places = (options.exit_on, opened.config, opened.split, description.config["data"]["root"])
        choice = choice._replace(warning=calibration.warning(*places))
    result = suite(exit_choice=choice)
    if options.measured:
        result = replace(result, measured_exit=measure_exit(evaluator, choice.threshold))
    return result


def evaluate_in_integers(
    evaluator: "Evaluator", opened: "Opened", options: argparse.Namespace
) -> "EvalResult":
    """Evaluate a network in whole numbers, and count the decisions that differ from the real."""
    from tetdist.apps.weights import integers
    from tetdist.apps.weights.trained import Trained
    from tetdist.evaluation.decisions import DecidedClasses
    from tetdist.evaluation.results import RealNumbers

    real, whole, world = DecidedClasses(), DecidedClasses(), evaluator.world
    top1 = evaluator.run("real numbers", real.add).top1
    trained = Trained(evaluator.model.cpu(), opened.config, opened.description)
    most = max(opened.description.timesteps, *opened.subject.reported_timesteps)
    converted: Any = world.run_on_all(lambda: integers.convert(trained, most))
    evaluator = replace(evaluator, model=converted.to(world.device))
    result = evaluate_network(evaluator, opened, options, also=whole.add)
    (changed,) = world.sum([real.differing(whole)])
    return replace(result, real_numbers=RealNumbers(top1, int(changed)))


def check_places(options: argparse.Namespace) -> None:
    """Refuse missing files and unwritable results; torch is not imported yet."""
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


def check_held_out(held_out: float | None, options: argparse.Namespace) -> None:
    """Refuse --exit-within for a network whose training held out no samples."""
    if options.exit_within is not None and options.exit_on is None and not held_out:
        raise UserError(
            "--exit-within needs training samples that the run held out, and this run held out "
            "none; train with data.held_out=0.1, or give --exit-on ROOT/SPLIT"
        )


@dataclass(frozen=True)
class Opened:
    """A checkpoint, and everything that it is evaluated with.

    Attributes:
        split: The evaluated samples, with all classes of the network.
        constants: Constants of the energy estimate.
    """

    weights: "dict[str, Tensor]"
    description: "Description"
    config: "RunConfig"
    split: "Index"
    subject: "Subject"
    constants: "EnergySection"


def open_checkpoint(options: argparse.Namespace, world: "World") -> Opened:
    """Open everything, and check what would otherwise fail after an hour of evaluation."""
    from tetdist import plugins
    from tetdist.apps.reports import style
    from tetdist.apps.weights import evaluated
    from tetdist.datasets.recorded_split import other_binning, recorded_split
    from tetdist.evaluation.energy import read_constants
    from tetdist.evaluation.results import Subject
    from tetdist.storage import checkpoint

    check_places(options)
    if options.report:
        style.new_figure(1, 1)  # fails if matplotlib is missing
    constants = read_constants(options.energy)
    plugins.import_files(options.imports)
    which, source = "best" if options.best else "last", str(options.checkpoint)
    weights, description = checkpoint.load_model_file(options.checkpoint, which, ema=options.ema)
    plugins.require(description.imports, options.checkpoint)
    config = evaluated.evaluation_config(
        description.config,
        source,
        changed_data(options),
        imports=options.imports,
        execution=options.execution,
        precision=options.precision,
    )
    if options.batch:
        batch = config.batch.model_copy(update={"eval": options.batch})
        config = config.model_copy(update={"batch": batch})
    check_held_out(config.data.held_out, options)
    own_data, root = options.data is None, config.data.root
    split = evaluated.open_evaluated(config, options.split, world, own_data=own_data)
    if options.int8 and split.timesteps is not None and split.dtype != "uint8":
        raise UserError(f"--int8 needs counts of events (uint8), not {split.dtype}; leave it out")
    known, present = config.model.num_classes, split.classes
    split = evaluated.with_classes_of_model(split, description.classes, known, source)
    binning = description.binning
    if binning and world.rank == 0 and (warning := other_binning(binning, root)):
        logging.warning(warning)
    subject = Subject(
        checkpoint=source,
        model=description.config["model"]["name"],
        step=description.step,
        split=split.split,
        averaged=description.averaged,
        published=description.published,
        data_split=recorded_split(root),
        subset=list(present) if present != split.classes else None,
        trained_timesteps=description.timesteps,
        reported_timesteps=timesteps_to_report(options, config, description.timesteps, split),
    )
    return Opened(weights, description, config, split, subject, constants)


def changed_data(options: argparse.Namespace) -> dict[str, Any]:
    """Return the keys of the section data that the flags change."""
    data = {"root": options.data, "index": None} if options.data else {}
    more = {"index": options.index, "threads": options.threads}
    return data | {key: value for key, value in more.items() if value}


def timesteps_to_report(
    options: argparse.Namespace, config: "RunConfig", trained: int, split: "Index"
) -> list[int]:
    """Return the T to report; by default, every T up to the training's that the neurons support."""
    refusal, timesteps = config.model.neuron.refusal, options.timesteps
    if timesteps is None:
        timesteps = [t for t in range(1, trained + 1) if refusal(t) is None]
    elif reason := next(filter(None, map(refusal, timesteps)), None):
        raise UserError(f"--timesteps: {reason}; leave it out for {trained}")
    frames = split.frames(config.data)
    if frames is not None and timesteps[-1] > frames[0]:
        raise UserError(f"--timesteps: {timesteps[-1]} exceeds the data's {frames[0]} time bins")
    return list(timesteps)


def show(result: "EvalResult", options: argparse.Namespace) -> None:
    """Print the result, and write the requested files."""
    from tetdist.apps.reports.evaluation_page import as_text, html_page

    if options.json:
        with files.explaining(options.json):
            files.write_json(options.json, result.as_json())
    if options.report:
        with files.explaining(options.report):
            files.write_text(options.report, html_page(result))
    print(as_text(result))  # last, because the output may be full
    if wrote := [str(file) for file in (options.json, options.report) if file]:
        print(f"\nwrote {' and '.join(wrote)}")
