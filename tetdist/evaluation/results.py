"""The result of evaluating a checkpoint on a split, and its form in JSON."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tetdist.evaluation.decisions import ClassScores, ExitPoint
from tetdist.evaluation.early_exit import ChosenExit, MeasuredExit
from tetdist.evaluation.energy import Estimator
from tetdist.evaluation.evaluate import Evaluation
from tetdist.evaluation.operations import Operations


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A checkpoint and the split that it is evaluated on.

    Attributes:
        averaged: Description of the moving average, if the weights are one.
        published: Claims of the authors of converted weights.
        split, data_split: Folder of the samples; name of the data set's split, if it has several.
        subset: Names of the split's classes, if these are not all of the network's.
        reported_timesteps: All T to report, ascending.
    """

    checkpoint: str
    model: str
    step: int
    split: str
    averaged: str | None = None
    published: dict[str, Any] | None = None
    data_split: str | None = None
    subset: list[str] | None = None
    trained_timesteps: int
    reported_timesteps: list[int]

    @property
    def headline(self) -> int:
        """T of all results but the accuracy at each T."""
        trained, reported = self.trained_timesteps, self.reported_timesteps
        return trained if trained in reported else reported[-1]


@dataclass(frozen=True)
class RealNumbers:
    """Top-1 in real numbers, and how many decisions differ from it in integers."""

    top1: float
    changed: int


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """Everything about a network on a split; the same on every process.

    Attributes:
        evaluation: Results at the subject's headline T. ``per_timestep_*`` go up to the largest
            T; they have None where a network that is not causal was not evaluated.
        early_exit: The curve of accuracy against timesteps; None: the network is not causal.
        confusion: Samples in rows of true classes and columns of predicted ones.
        operations, energy: None if operations cannot be counted.
        chosen_exit, measured_exit, real_numbers: None if not asked for.
    """

    subject: Subject
    evaluation: Evaluation
    early_exit: list[ExitPoint] | None
    classes: list[str]
    confusion: list[list[int]]
    per_class: list[ClassScores]
    operations: Operations | None
    energy: Estimator | None
    chosen_exit: ChosenExit | None = None
    measured_exit: MeasuredExit | None = None
    real_numbers: RealNumbers | None = None

    def as_json(self) -> dict[str, Any]:
        """Return one dictionary, ready for JSON, without what does not apply."""
        exits = self.early_exit
        parts = {
            "chosen_exit": self.chosen_exit and self.chosen_exit.as_json(),
            "energy": self.energy and self.energy.as_json(),
            "real_numbers": self.real_numbers and asdict(self.real_numbers),
            "measured_exit": self.measured_exit and self.measured_exit.as_json(),
        }
        return {
            **_present(asdict(self.subject)),
            **asdict(self.evaluation),
            "early_exit": None if exits is None else [asdict(point) for point in exits],
            "classes": self.classes,
            "confusion": self.confusion,
            "per_class": [scores.as_json() for scores in self.per_class],
            "operations": self.operations and self.operations.as_dict(),
            **_present(parts),
        }


def _present(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
