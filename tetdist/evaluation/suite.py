"""All results of a checkpoint on a split."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

from torch import Tensor

from tetdist.evaluation.decisions import THRESHOLDS, Decisions
from tetdist.evaluation.early_exit import ChosenExit, ExitChoice
from tetdist.evaluation.energy import EnergySection, Estimator
from tetdist.evaluation.evaluate import Also, Evaluation, Evaluator
from tetdist.evaluation.operations import OperationCounts
from tetdist.evaluation.results import EvalResult, Subject
from tetdist.models import SpikingNetwork
from tetdist.nn.norm_neuron import is_causal


def run_suite(
    evaluator: Evaluator,
    subject: Subject,
    *,
    also: Also = lambda _logits, _labels: None,
    exit_choice: ExitChoice | None = None,
    constants: EnergySection | None = None,
) -> EvalResult:
    """Evaluate at every T to report; all but the accuracy at each T is measured at one of them.

    For a causal network, one pass gives the results at all smaller T, and a second pass those at
    larger T. Any other network is evaluated at each T separately, and has no early exit, since its
    first logits depend on T. The model ends at the subject's headline T.

    Args:
        also: Called with each batch of the evaluation at the headline's T, see `evaluate`.
        exit_choice: A threshold of early exit, for a causal network.
        constants: Constants of the energy estimate; None: the defaults.
    """
    model, world, headline = evaluator.model, evaluator.world, subject.headline
    shows_each, reported = is_causal(model), subject.reported_timesteps
    others = [t for t in reported if t != headline]
    if shows_each:
        others = [t for t in reported[-1:] if t > headline]
    alone = []
    for timesteps in others:
        model.set_timesteps(timesteps)
        alone.append(evaluator.run(f"evaluate at T = {timesteps}"))
    model.set_timesteps(headline)
    thresholds = sorted({*THRESHOLDS, *([] if exit_choice is None else [exit_choice.threshold])})
    classes = evaluator.index.classes
    decisions = Decisions(classes, model.num_classes, headline, world.device, thresholds)

    def count(logits: Tensor, labels: Tensor) -> None:
        decisions.add(logits, labels)
        also(logits, labels)

    # Layers of other networks may get inputs other than (T, B, ...).
    counts = OperationCounts(model) if isinstance(model, SpikingNetwork) else None
    with counts or nullcontext():
        evaluation = evaluator.run("evaluate", also=count)
    decisions.gather(world)
    points = {point.threshold: point for point in decisions.early_exit()}
    operations = None if counts is None else counts.total(world, evaluation.samples)
    energy, chosen = None, None
    if operations is not None:
        energy = Estimator(constants or EnergySection(), headline, operations)
    if exit_choice is not None:
        point = points[exit_choice.threshold]
        chosen = ChosenExit(exit_choice, point.top1, point.mean_timesteps)
    return EvalResult(
        subject=subject,
        evaluation=_with_all_timesteps(evaluation, alone),
        early_exit=[points[threshold] for threshold in THRESHOLDS] if shows_each else None,
        classes=decisions.classes,
        confusion=decisions.confusion.tolist(),
        per_class=decisions.per_class(),
        operations=operations,
        energy=energy,
        chosen_exit=chosen,
    )


def _with_all_timesteps(evaluation: Evaluation, alone: Sequence[Evaluation]) -> Evaluation:
    """Return an evaluation with values at t = 1, 2, ..., each from the first that has it."""
    results = [evaluation, *alone]
    merged: dict[str, list[float | None]] = {}
    for key in ("top1", "top5", "loss"):
        values: list[float | None] = [None] * max(result.timesteps for result in results)
        for result in reversed(results):
            shown = getattr(result, f"per_timestep_{key}") or [getattr(result, key)]
            values[result.timesteps - len(shown) : result.timesteps] = shown
        merged[f"per_timestep_{key}"] = values
    return replace(
        evaluation,
        per_timestep_top1=merged["per_timestep_top1"],
        per_timestep_top5=merged["per_timestep_top5"],
        per_timestep_loss=merged["per_timestep_loss"],
    )
