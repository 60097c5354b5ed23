"""Evaluation of a checkpoint with the options of the command, shown as text, JSON and a page."""

import argparse
import logging
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from tetdist import plugins
from tetdist.apps.reports import evaluation_page, style
from tetdist.apps.reports.evaluation_places import check_held_out, check_places
from tetdist.apps.weights import calibration, evaluated, integers
from tetdist.apps.weights.trained import Trained
from tetdist.config.schema import RunConfig
from tetdist.datasets.index import Index
from tetdist.datasets.recorded_split import other_binning, recorded_split
from tetdist.distributed.watchdog import Watch
from tetdist.distributed.world import World, join
from tetdist.errors import UserError
from tetdist.evaluation.decisions import DecidedClasses
from tetdist.evaluation.early_exit import choose_exit, measure_exit
from tetdist.evaluation.energy import EnergySection, read_constants
from tetdist.evaluation.evaluate import Also, Evaluator
from tetdist.evaluation.results import EvalResult, RealNumbers, Subject
from tetdist.evaluation.suite import run_suite
from tetdist.models.streaming import stream_of
from tetdist.network import load_model
from tetdist.storage import checkpoint, files
from tetdist.storage.checkpoint import Description

HANGS_AFTER = 600  # seconds without progress after which a process counts as hanging


@dataclass(frozen=True)
class Opened:
    """A checkpoint, and everything that it is evaluated with.

    Attributes:
        split: The evaluated samples, with all classes of the network.
        constants: Constants of the energy estimate.
    """

    weights: dict[str, Tensor]
    description: Description
    config: RunConfig
    split: Index
    subject: Subject
    constants: EnergySection


def evaluate_checkpoint(options: argparse.Namespace) -> None:
    """Evaluate on all processes, and show the result."""
    with (
        join(options.device, run=vars(options) | {"local_rank": None}) as world,
        Watch(world, HANGS_AFTER, after="nothing was written") as watch,
    ):
        with world.together():
            opened = open_checkpoint(options, world)
        config, split = opened.config, opened.split
        verdict = opened.description.looks_ahead
        model = load_model(config, split, opened.weights, options.checkpoint, world, verdict)
        model.set_timesteps(opened.subject.headline)
        alive = partial(watch.progress, "the evaluation")
        evaluator = Evaluator(model, config, split, world, alive)
        evaluate = evaluate_in_integers if options.int8 else evaluate_network
        result = evaluate(evaluator, opened, options)
        with world.together():
            if world.rank == 0:
                show(result, options)


def evaluate_network(
    evaluator: Evaluator,
    opened: Opened,
    options: argparse.Namespace,
    also: Also = lambda _logits, _labels: None,
) -> EvalResult:
    """Evaluate a network, with early exit if that is asked for; for ``also`` see `evaluate`."""
    suite = partial(run_suite, evaluator, opened.subject, also=also, constants=opened.constants)
    if options.exit_within is None:
        return suite()
    headline, description = opened.subject.headline, opened.description
    with evaluator.world.together():
        if options.measured:
            stream_of(evaluator.model)  # fails if the network cannot be streamed
        classes, split = description.classes, options.exit_on
        chosen_on = calibration.calibration(evaluator, headline, classes, split)
    choice = choose_exit(chosen_on, headline, options.exit_within)
    if options.exit_on:
        root = description.config["data"]["root"]
        warning = calibration.warning(options.exit_on, opened.config, opened.split, root)
        choice = choice._replace(warning=warning)
    result = suite(exit_choice=choice)
    if options.measured:
        result = replace(result, measured_exit=measure_exit(evaluator, choice.threshold))
    return result


def evaluate_in_integers(
    evaluator: Evaluator, opened: Opened, options: argparse.Namespace
) -> EvalResult:
    """Evaluate a network in integers, and count the decisions that differ from the real."""
    real, whole, world = DecidedClasses(), DecidedClasses(), evaluator.world
    top1 = evaluator.run("real numbers", real.add).top1
    trained = Trained(evaluator.model.cpu(), opened.config, opened.description)
    most = max(opened.description.timesteps, *opened.subject.reported_timesteps)
    with world.together():
        converted: Any = integers.convert(trained, most)
    converted.looks_ahead = evaluator.model.looks_ahead
    evaluator = replace(evaluator, model=converted.to(world.device))
    result = evaluate_network(evaluator, opened, options, also=whole.add)
    (changed,) = world.sum([real.differing(whole)])
    return replace(result, real_numbers=RealNumbers(top1, int(changed)))


def open_checkpoint(options: argparse.Namespace, world: World) -> Opened:
    """Open everything, and check what would otherwise fail after an hour of evaluation."""
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
    options: argparse.Namespace, config: RunConfig, trained: int, split: Index
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


def show(result: EvalResult, options: argparse.Namespace) -> None:
    """Print the result, and write the requested files."""
    if options.json:
        with files.explaining(options.json):
            files.write_json(options.json, result.as_json())
    if options.report:
        with files.explaining(options.report):
            files.write_text(options.report, evaluation_page.html_page(result))
    print(evaluation_page.as_text(result))  # last, because the output may be full
    if wrote := [str(file) for file in (options.json, options.report) if file]:
        print(f"\nwrote {' and '.join(wrote)}")
