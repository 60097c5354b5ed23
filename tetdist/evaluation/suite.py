"""All results of a checkpoint on a split, as one dictionary ready for JSON."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from tetdist.config.schema import RunConfig
from tetdist.data.build import eval_loader
from tetdist.data.loader import Batch
from tetdist.datasets.index import Index
from tetdist.distributed.world import World
from tetdist.evaluation.decisions import FINE_THRESHOLDS, THRESHOLDS, DecisionCounts
from tetdist.evaluation.evaluate import Also, Evaluation, evaluate, running_means
from tetdist.evaluation.operations import OperationCounts, counting_operations
from tetdist.evaluation.robustness import (
    check_takes_frames,
    taking_frames,
    without_events,
    without_timesteps,
)
from tetdist.evaluation.unrolling import unrolled
from tetdist.models import SpikingNetwork
from tetdist.nn.norm_neuron import is_causal
from tetdist.tracking.progress import sample_bar


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Arguments of every pass over the split. ``alive`` is called after each batch; ``outputs`` are
    the network's compared outputs (None: all)."""

    model: SpikingNetwork
    config: RunConfig
    index: Index
    world: World
    alive: Callable[[], Any]
    outputs: Sequence[int] | None = dataclasses.field(default=None, kw_only=True)

    def run(
        self,
        title: str,
        change: Callable[[Iterable[Batch]], Iterable[Batch]] = lambda batches: batches,
        also: Also = lambda _logits, _labels, _ids: None,
    ) -> Evaluation:
        """Evaluate the split once, with changed batches; for ``also`` see `evaluate`."""
        bar = sample_bar(len(self.index), title, silent=self.world.rank != 0)

        def progress(count: int) -> None:
            bar.update(count * self.world.world_size)
            self.alive()

        with bar, eval_loader(self.config, self.index, self.world) as batches:
            return evaluate(
                self.model,
                change(batches),
                len(self.index),
                self.world,
                precision=self.config.precision,
                progress=progress,
                also=also,
                outputs=self.outputs,
            )


@dataclasses.dataclass(frozen=True)
class ExitChoice:
    """A threshold of early exit, and the criteria of its choice.

    Attributes:
        within: Maximum decrease of top-1, in points.
        threshold: Softmax probability of the time-mean; None: every threshold costs more, so all
            samples are decided at T.
        samples: Number of the samples that it was chosen on.
        top1: Their accuracy at T, in percent; None: it was chosen without labels.
    """

    within: float
    threshold: float | None
    samples: int
    top1: float | None


def choose_exit(
    evaluator: Evaluator, timesteps: int, within: float, *, labelled: bool = True
) -> ExitChoice:
    """Choose the lowest early-exit threshold with at most ``within`` loss on some samples.

    The result is the same on every process.

    Args:
        evaluator: The network, and samples used neither for training nor for the final result.
        timesteps: T, also of the model afterwards.
        within: Maximum decrease of top-1, in points.
        labelled: Use the samples' labels. Without them the decision at T counts as the right one,
            so that ``within`` limits the percentage of decisions that early exit changes.
    """
    model, world = evaluator.model, evaluator.world
    model.set_timesteps(timesteps)
    classes = list(evaluator.index.classes)
    counts = DecisionCounts(classes, model.num_classes, timesteps, world.device, FINE_THRESHOLDS)

    def count(logits: Tensor, labels: Tensor, _ids: npt.NDArray[np.int64]) -> None:
        counts.add(logits, labels if labelled else running_means(logits)[-1].argmax(-1))

    result = evaluator.run("choose a threshold", also=count)
    threshold = counts.total(world).threshold_within(within)
    return ExitChoice(within, threshold, result.samples, result.top1 if labelled else None)


def run_suite(
    evaluator: Evaluator,
    *,
    timesteps: Sequence[int],
    headline: int | None = None,
    unroll: bool = False,
    drop_timesteps: Sequence[float] = (),
    drop_events: Sequence[float] = (),
    seed: int = 0,
    also: Also = lambda _logits, _labels, _ids: None,
    exit_choice: ExitChoice | None = None,
) -> dict[str, Any]:
    """Evaluate at one T: unchanged, and then with each fraction of timesteps or events dropped.

    For a causal network, one pass gives the results at all smaller T, and a second pass those at
    larger T. Any other network is evaluated at each of ``timesteps`` separately: ``per_timestep_*``
    have None at other t, and ``early_exit`` is None, since its first logits depend on T.

    The result is the same on every process.

    Args:
        timesteps: All requested T, rising; only ``per_timestep_*`` cover all of them.
        headline: T of all other results, one of ``timesteps``; None: the last. The model keeps it.
        unroll: Run the unchanged evaluation in sub-timesteps of binary spikes, see unrolling.py.
        drop_timesteps: Shares of timesteps, see `without_timesteps`.
        drop_events: Shares of events, see `without_events`; the frames must be numbers of events.
        also: Called with each batch of the unchanged evaluation, see `evaluate`.
        exit_choice: A threshold of early exit, for a causal network.

    Returns:
        Everything in `Evaluation` and more; ``operations`` is None if they cannot be counted;
        ``chosen_exit`` is present if ``exit_choice`` is given.
    """
    model, world = evaluator.model, evaluator.world
    if drop_timesteps:
        world.run_on_all(lambda: check_takes_frames(model))
    shows_each, headline = is_causal(model), headline or timesteps[-1]
    others = [t for t in timesteps if t != headline]
    if shows_each:
        others = [t for t in timesteps[-1:] if t > headline]
    alone = []
    for one in others:
        model.set_timesteps(one)
        alone.append(evaluator.run(f"evaluate at T = {one}"))
    model.set_timesteps(headline)
    compared = model.num_classes if evaluator.outputs is None else len(evaluator.outputs)
    chosen = () if exit_choice is None else (exit_choice.threshold,)
    thresholds = sorted({*THRESHOLDS, *(one for one in chosen if one is not None)})
    classes = list(evaluator.index.classes)
    counts = DecisionCounts(classes, compared, headline, world.device, thresholds)

    def count(logits: Tensor, labels: Tensor, ids: npt.NDArray[np.int64]) -> None:
        counts.add(logits, labels)
        also(logits, labels, ids)

    # Layers of other networks may get inputs other than (T, B, ...).
    counting: AbstractContextManager[OperationCounts | None] = (
        counting_operations(model, in_spikes=unroll)
        if isinstance(model, SpikingNetwork)
        else nullcontext()
    )
    unrolling = unrolled(model) if unroll else nullcontext(dict[str, int]())
    with unrolling as sub_timesteps, counting as operations:
        result = evaluator.run("evaluate", also=count)
    decisions = counts.total(world)
    points = decisions.early_exit()
    found: dict[str, Any] = {
        **dataclasses.asdict(result),
        **_by_timestep([result, *alone]),
        "early_exit": [p for p in points if p["threshold"] in THRESHOLDS] if shows_each else None,
        "classes": decisions.classes,
        "confusion": decisions.confusion,
        "per_class": decisions.per_class(),
        "operations": operations and operations.total(world, result.samples).as_dict(),
        **({"sub_timesteps": sub_timesteps} if unroll else {}),
        **({} if exit_choice is None else {"chosen_exit": _chosen(exit_choice, result, points)}),
        "dropped_timesteps": [],
        "dropped_events": [],
    }
    for fraction in drop_timesteps:
        change = partial(without_timesteps, fraction=fraction, timesteps=headline, seed=seed)
        with taking_frames(model):
            dropped = evaluator.run(f"without {fraction:g} of timesteps", change)
        found["dropped_timesteps"].append(_robustness(fraction, dropped))
    for fraction in drop_events:
        change = partial(without_events, fraction=fraction, seed=seed)
        dropped = evaluator.run(f"without {fraction:g} of events", change)
        found["dropped_events"].append(_robustness(fraction, dropped))
    return found


def _chosen(choice: ExitChoice, result: Evaluation, points: list[dict[str, Any]]) -> dict[str, Any]:
    """Return early exit at the chosen threshold."""
    never = {"threshold": None, "top1": result.top1, "mean_timesteps": float(result.timesteps)}
    point = next((p for p in points if p["threshold"] == choice.threshold), never)
    return {
        "within": choice.within,
        "chosen_on": {"samples": choice.samples, "top1": choice.top1},
        **{key: point[key] for key in never},
    }


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


def _robustness(fraction: float, result: Evaluation) -> dict[str, Any]:
    return {
        "share": fraction,
        "top1": result.top1,
        "loss": result.loss,
        "per_timestep_top1": result.per_timestep_top1,
    }
