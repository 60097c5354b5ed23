"""A network evaluated on a batch that is at hand."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from tetdist.data.loader import Batch
from tetdist.evaluation.evaluate import Evaluation, evaluate
from tetdist.evaluation.suite import Evaluator


@dataclass(frozen=True)
class OneBatch(Evaluator):
    """Evaluates a batch in place of a folder's."""

    batch: Batch
    precision: str

    def run(
        self,
        title: str,
        change: Callable[[Iterable[Batch]], Iterable[Batch]] = lambda batches: batches,
        also: Callable[..., Any] = lambda _logits, _labels, _ids: None,
    ) -> Evaluation:
        del title
        batches = change([self.batch])
        samples = len(self.batch.labels)
        return evaluate(
            self.model, batches, samples, self.world, precision=self.precision, also=also
        )
