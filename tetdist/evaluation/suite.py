"""All results of a checkpoint on a split, as one dictionary ready for JSON."""

import dataclasses
import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from torch import Tensor

from tetdist.evaluation.decisions import THRESHOLDS, Decisions
from tetdist.evaluation.early_exit import ExitChoice
from tetdist.evaluation.energy import EnergySection, estimate
from tetdist.evaluation.evaluate import Also, Evaluation, Evaluator
from tetdist.evaluation.operations import OperationCounts
from tetdist.models import SpikingNetwork
from tetdist.nn.norm_neuron import is_causal


def run_suite(
    evaluator: Evaluator,
    *,
    timesteps: Sequence[int],
    headline: int | None = None,
    also: Also = lambda _logits, _labels: None,
    exit_choice: ExitChoice | None = None,
    constants: EnergySection | None = None,
) -> dict[str, Any]:
    """Evaluate at every given T; all but the accuracy at each T is measured at one of them.

    For a causal network, one pass gives the results at all smaller T, and a second pass those at
    larger T. Any other network is evaluated at each of ``timesteps`` separately: ``per_timestep_*``
    have None at other t, and ``early_exit`` is None, since its first logits depend on T.

    Args:
        timesteps: All requested T, rising; only ``per_timestep_*`` cover all of them.
        headline: T of all other results, one of ``timesteps``; None: the last. The model keeps it.
        also: Called with each batch of the evaluation at the headline's T, see `evaluate`.
        exit_choice: A threshold of early exit, for a causal network.
        constants: Constants of the energy estimate; None: the defaults.

    Returns:
        Everything in `Evaluation` and more, on every process. ``operations`` is None if they cannot
        be counted; ``energy`` and ``chosen_exit`` are present if they apply.
    """
    model, world = evaluator.model, evaluator.world
    shows_each, headline = is_causal(model), headline or timesteps[-1]
    others = [t for t in timesteps if t != headline]
    if shows_each:
        others = [t for t in timesteps[-1:] if t > headline]
    alone = []
    for one in others:
        model.set_timesteps(one)
        alone.append(evaluator.run(f"evaluate at T = {one}"))
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
        result = evaluator.run("evaluate", also=count)
    decisions.gather(world)
    points = decisions.early_exit()
    operations = counts and counts.total(world, result.samples)
    found: dict[str, Any] = {
        **dataclasses.asdict(result),
        **_by_timestep([result, *alone]),
        "early_exit": [p for p in points if p["threshold"] in THRESHOLDS] if shows_each else None,
        "classes": decisions.classes,
        "confusion": decisions.confusion.tolist(),
        "per_class": decisions.per_class(),
        "operations": operations and operations.as_dict(),
    }
    if exit_choice is not None:
        point = points[thresholds.index(exit_choice.threshold)]
        found["chosen_exit"] = {
            "within": exit_choice.within,
            "chosen_on": {key: getattr(exit_choice, key) for key in ("samples", "top1", "lost")},
            "threshold": None if math.isinf(exit_choice.threshold) else exit_choice.threshold,
            "top1": point["top1"],
            "mean_timesteps": point["mean_timesteps"],
        }
    if operations:
        found["energy"] = estimate(operations, headline, constants or EnergySection())
    return found


def _by_timestep(results: Sequence[Evaluation]) -> dict[str, list[float | None]]:
    """Return the values at t = 1, 2, ..., each from the first result that has it."""
    found: dict[str, list[float | None]] = {}
    for key in ("top1", "top5", "loss"):
        values: list[float | None] = [None] * max(one.timesteps for one in results)
        for one in reversed(results):
            shown = getattr(one, f"per_timestep_{key}") or [getattr(one, key)]
            values[one.timesteps - len(shown) : one.timesteps] = shown
        found[f"per_timestep_{key}"] = values
    return found
