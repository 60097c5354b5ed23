"""A network evaluated on a batch that is at hand."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tetdist.data.loader import Batch
from tetdist.evaluation.evaluate import Evaluation, Evaluator, evaluate


@dataclass(frozen=True)
class OneBatch(Evaluator):
    """Evaluates a batch in place of a folder's."""

    batch: Batch
    precision: str

    def run(
        self, title: str, also: Callable[..., Any] = lambda _logits, _labels: None
    ) -> Evaluation:
        del title
        samples, precision = len(self.batch.labels), self.precision
        return evaluate(
            self.model, [self.batch], samples, self.world, precision=precision, also=also
        )
