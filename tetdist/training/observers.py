"""Observers of a run: called at four points of the training loop on rank 0; errors end no run.

The command that starts a run passes its observers; see `tetdist.apps.reports.observers`.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from typing_extensions import override

from tetdist.data.loader import Batch
from tetdist.tracking.tracker import Tracker
from tetdist.training.evaluating import Evaluated
from tetdist.training.prepared import Prepared

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Watched:
    """A run as passed to its observers at the start.

    Attributes:
        step: Optimiser steps done before this start.
        finished: True if nothing is left to do.
    """

    run: Prepared
    tracker: Tracker
    step: int
    finished: bool


class Observer:
    """Base of observers; a subclass overrides the events it needs."""

    def on_batch(self, step: int, batch: Batch) -> None:
        """Handle a training batch of ``step`` (from 1) before it is used."""

    def on_evaluation(self, step: int, evaluated: Evaluated) -> Mapping[str, float] | None:
        """Handle an evaluation; returned values are added to its line, under new names."""

    def on_line(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Handle a written line of metrics: ``train``, or an evaluation.

        Each epoch ends with a line. The checkpoint of an evaluation may not be complete yet.
        """

    def on_end(self, result: Mapping[str, float] | None) -> None:
        """Handle the end of the run: its result, or None if it stopped; the tracker is closed."""


MakeObservers = Callable[[Watched], Sequence[Callable[[Watched], Observer]]]


class Observers(Observer):
    """All observers of a run. An observer that raises an error is reported and removed."""

    def __init__(self, observers: Sequence[Observer] = ()) -> None:
        self._observers = list(observers)

    @classmethod
    def of(cls, make: MakeObservers, watched: Watched) -> "Observers":
        """Make the observers; the run goes on without those that cannot be made."""
        observers = []
        for make_observer in make(watched):
            try:
                observers.append(make_observer(watched))
            except Exception as error:
                _report(make_observer, error)
        return cls(observers)

    @override
    def on_batch(self, step: int, batch: Batch) -> None:
        self._notify("on_batch", step, batch)

    @override
    def on_evaluation(self, step: int, evaluated: Evaluated) -> Mapping[str, float]:
        added: dict[str, float] = {}

        def take(answer: Mapping[str, float] | None) -> None:
            numbers = {key: float(value) for key, value in (answer or {}).items()}
            if known := numbers.keys() & {*evaluated.values, *added, "kind", "step", "time"}:
                raise ValueError(f"the line of metrics already has {min(known)}")
            added.update(numbers)

        self._notify("on_evaluation", step, evaluated, take=take)
        return added

    @override
    def on_line(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        self._notify("on_line", kind, step, values)

    @override
    def on_end(self, result: Mapping[str, float] | None) -> None:
        self._notify("on_end", result)

    def _notify(
        self, event: str, *facts: Any, take: Callable[[Any], None] = lambda _: None
    ) -> None:
        for observer in tuple(self._observers):
            try:
                take(getattr(observer, event)(*facts))
            except Exception as error:
                self._observers.remove(observer)
                _report(type(observer), error)


def _report(observer: Any, error: Exception) -> None:
    name, kind = observer.__name__, type(error).__name__
    logger.warning("%s failed and was disabled; the run continues (%s: %s)", name, kind, error)
