"""Decisions of a network beyond its accuracy: the classes that it confuses, and how early it could
have decided."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from tetdist.distributed.world import World
from tetdist.losses import running_means

# Early-exit thresholds: the softmax probability of the time-mean that decides a sample.
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999)


@dataclass(frozen=True)
class ExitPoint:
    """Early exit at a threshold: top-1 (percent), mean timesteps of a sample, exits at each t."""

    threshold: float
    top1: float
    mean_timesteps: float
    exits: list[int]


@dataclass(frozen=True)
class ClassScores:
    """Decisions on the samples of a class.

    Attributes:
        recall: Percent of its samples that are decided so, None without samples.
        precision: Percent of these decisions that are right, None without any.
        mistaken_for, mistaken: The most frequent wrong class, None without errors; how often.
    """

    name: str
    samples: int
    recall: float | None
    precision: float | None
    mistaken_for: str | None
    mistaken: int

    def as_json(self) -> dict[str, Any]:
        values = asdict(self)
        return {"class": values.pop("name"), **values}


class Decisions:
    """Numbers of decisions over a split, added up batch by batch on one process.

    Attributes:
        classes: Names of the K outputs.
        confusion: Samples at T, (K, K), in rows of true classes and columns of predicted ones.
        exits: Samples decided at t = 1 to T, (thresholds, T). A sample that never reaches the
            threshold is decided at T.
        exit_correct: Correct decisions, (thresholds,).
        exit_lost: Wrong decisions of samples that are correct at T, (thresholds,).

    Args:
        classes: Names of the data's classes, which may be fewer than the network's outputs.
        thresholds: Softmax probabilities of the time-mean, rising, at which a sample is decided.
    """

    def __init__(
        self,
        classes: Sequence[str],
        num_outputs: int,
        timesteps: int,
        device: torch.device,
        thresholds: Sequence[float] = THRESHOLDS,
    ) -> None:
        unnamed, number = range(len(classes), num_outputs), len(thresholds)
        self.classes, self.thresholds = [*classes, *(f"output {k}" for k in unnamed)], thresholds
        self._thresholds = torch.tensor(thresholds, device=device).view(-1, 1, 1)
        self.confusion, self.exits, self.exit_correct, self.exit_lost = (
            torch.zeros(shape, dtype=torch.int64, device=device)
            for shape in ((num_outputs, num_outputs), (number, timesteps), (number,), (number,))
        )

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch of logits (T, B, K) with labels (B,)."""
        means = running_means(logits)
        probabilities = means.softmax(-1).amax(-1)  # (T, B)
        # argmax ranks NaN highest, and top-1 counts it as wrong.
        own = labels.view(1, -1, 1).expand(len(means), -1, 1)
        of_label = means.gather(-1, own)
        means = means.scatter(-1, own, torch.where(of_label.isnan(), -math.inf, of_label))
        decided = means.argmax(-1)  # (T, B)
        pairs = labels * len(self.classes) + decided[-1]
        self.confusion += torch.bincount(pairs, minlength=self.confusion.numel()).view_as(
            self.confusion
        )
        first = first_sure(probabilities, self._thresholds)  # (thresholds, B)
        steps = torch.arange(len(decided), device=first.device)
        self.exits += (first[:, None] == steps.view(-1, 1)).sum(-1)
        right = decided.gather(0, first) == labels
        self.exit_correct += right.sum(-1)
        self.exit_lost += ((decided[-1] == labels) & ~right).sum(-1)

    def gather(self, world: World) -> None:
        """Add up the numbers of all processes, on every process."""
        for counts in (self.confusion, self.exits, self.exit_correct, self.exit_lost):
            summed = torch.tensor(world.sum(counts.flatten().tolist()), dtype=torch.float64)
            counts.copy_(summed.view_as(counts))

    def per_class(self) -> list[ClassScores]:
        predicted, rows = self.confusion.sum(0).tolist(), []
        for k, (name, row) in enumerate(zip(self.classes, self.confusion.tolist(), strict=True)):
            samples, right = sum(row), row[k]
            wrong = [*row[:k], 0, *row[k + 1 :]]
            most = max(wrong)
            rows.append(
                ClassScores(
                    name,
                    samples,
                    recall=100 * right / samples if samples else None,
                    precision=100 * right / predicted[k] if predicted[k] else None,
                    mistaken_for=self.classes[wrong.index(most)] if most else None,
                    mistaken=most,
                )
            )
        return rows

    def early_exit(self) -> list[ExitPoint]:
        counts = zip(self.thresholds, self.exits.tolist(), self.exit_correct.tolist(), strict=True)
        return [
            ExitPoint(
                threshold,
                top1=100 * right / sum(exits),
                mean_timesteps=sum(t * n for t, n in enumerate(exits, start=1)) / sum(exits),
                exits=exits,
            )
            for threshold, exits, right in counts
        ]


class DecidedClasses:
    """Classes that a network decides on at T, of this process's samples in their order."""

    def __init__(self) -> None:
        self._batches: list[Tensor] = []

    def add(self, logits: Tensor, _labels: Tensor) -> None:
        self._batches.append(decided(logits))

    def differing(self, other: "DecidedClasses") -> int:
        """Return how many samples another network decides otherwise."""
        pairs = zip(self._batches, other._batches, strict=True)
        return sum(int((mine != others).sum()) for mine, others in pairs)


def decided(logits: Tensor) -> Tensor:
    """Return the classes, (B,), that logits (T, B, K) decide on at T."""
    return running_means(logits)[-1].argmax(-1)


def first_sure(confidence: Tensor, thresholds: Tensor | float) -> Tensor:
    """Return the first t, from 0, at which a confidence (T, B) reaches each threshold, or T - 1."""
    sure = confidence >= thresholds
    sure[..., -1, :] = True
    return sure.int().argmax(-2)
