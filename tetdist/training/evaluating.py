"""The evaluations of a run: of its weights, and of their moving average."""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from tetdist.data.build import eval_loader
from tetdist.evaluation.evaluate import evaluate
from tetdist.training.ema import WeightAverage
from tetdist.training.prepared import Prepared

# Kinds of lines in metrics.jsonl.
WEIGHTS, AVERAGE = "val", "val_ema"


class Evaluated(NamedTuple):
    """One evaluation, of the kind WEIGHTS or AVERAGE."""

    kind: str
    values: dict[str, Any]

    @property
    def validation(self) -> dict[str, float]:
        """Accuracies in percent, as the checkpoint of the weights records them."""
        return {key: self.values[key] for key in ("top1", "top5")}


class Evaluations:
    """All evaluations of a run.

    Attributes:
        result: Last and best top-1; stored in checkpoints.

    Args:
        stop: See `evaluate`.
        progress: Called with this process's number of evaluated samples, and their total.
    """

    def __init__(
        self,
        run: Prepared,
        average: WeightAverage | None,
        stop: Callable[[], bool],
        progress: Callable[[int, int], None],
    ) -> None:
        self.run, self.average, self.stop, self.progress = run, average, stop, progress
        self.result: dict[str, float] = {}

    def at(self, step: int) -> list[Evaluated]:
        """Evaluate the weights of ``step`` and their moving average, if there is one.

        Raises:
            Interrupted: ``stop`` returned True; nothing has changed.
        """
        results = [(WEIGHTS, self._evaluate())]
        if self.average is not None:
            with self.average.in_model():
                results.append((AVERAGE, self._evaluate()))
        return [self._scored(step, *result) for result in results]

    def _evaluate(self) -> dict[str, Any]:
        run, started = self.run, time.monotonic()
        loader = eval_loader(run.config, run.val, run.world)
        with loader as batches:
            result = evaluate(
                run.model,
                batches,
                len(run.val),
                run.world,
                precision=run.config.precision,
                stop=self.stop,
                progress=self._count,
            )
        return {
            "timesteps": result.timesteps,
            "samples": result.samples,
            "loss": result.loss,
            "top1": result.top1,
            "top5": result.top5,
            "per_timestep_top1": result.per_timestep_top1,
            "firing_rate": result.firing_rate,
            "seconds": time.monotonic() - started,
        }

    def _count(self, samples: int) -> None:
        # Each process has its share of the samples; a moving average doubles the number.
        total = len(self.run.val) * (1 if self.average is None else 2)
        self.progress(samples, total // self.run.world.world_size or 1)

    def _scored(self, step: int, kind: str, values: dict[str, Any]) -> Evaluated:
        """Record the result, and the best one of its kind so far."""
        prefix = {WEIGHTS: "", AVERAGE: "ema_"}[kind]
        if values["top1"] > self.result.get(f"{prefix}best_top1", -math.inf):
            self.result |= {f"{prefix}best_top1": values["top1"], f"{prefix}best_step": step}
        self.result[f"{prefix}top1"] = values["top1"]
        values["best_top1"] = self.result[f"{prefix}best_top1"]
        if self.run.data_split:
            values["data_split"] = self.run.data_split
        return Evaluated(kind, values)
