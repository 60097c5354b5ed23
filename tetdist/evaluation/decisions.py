"""Decisions of a network beyond its accuracy: the classes that it confuses, and how early it could
have decided."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from tetdist.distributed.world import World
from tetdist.evaluation.evaluate import running_means

# Early-exit thresholds: the softmax probability of the time-mean that decides a sample.
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999)
# Candidates for a chosen threshold: from 0.3 on, each a tenth nearer to 1 than the last.
FINE_THRESHOLDS = tuple(round(1 - 0.7 * 0.9**k, 6) for k in range(90))


@dataclass(frozen=True)
class Decisions:
    """Decisions over a whole split.

    Attributes:
        classes: Names of the K classes.
        confusion: Numbers of samples at T, in rows of true classes and columns of predicted ones.
        thresholds: Softmax probabilities of the time-mean, rising, at which a sample is decided.
        exits: Numbers of samples decided at t = 1 to T, for each threshold. A sample that never
            reaches the threshold is decided at T.
        exit_correct: Number of correct decisions for each threshold.
    """

    classes: list[str]
    confusion: list[list[int]]
    thresholds: tuple[float, ...]
    exits: list[list[int]]
    exit_correct: list[int]

    def per_class(self) -> list[dict[str, Any]]:
        """Return a row for each class: samples, recall and precision (percent), `mistaken_for`.

        Recall is the class's accuracy, None without samples. Precision is None if the class was
        never predicted, and ``mistaken_for``, the most frequent wrong class, is None without
        errors.
        """
        decided = [sum(column) for column in zip(*self.confusion, strict=True)]
        rows = []
        for k, (name, row) in enumerate(zip(self.classes, self.confusion, strict=True)):
            samples, right = sum(row), row[k]
            wrong = [count if other != k else 0 for other, count in enumerate(row)]
            most = max(wrong)
            rows.append(
                {
                    "class": name,
                    "samples": samples,
                    "recall": 100 * right / samples if samples else None,
                    "precision": 100 * right / decided[k] if decided[k] else None,
                    "mistaken_for": self.classes[wrong.index(most)] if most else None,
                    "mistaken": most,
                }
            )
        return rows

    def early_exit(self) -> list[dict[str, Any]]:
        """Return a point for each threshold: top-1 (percent), mean timesteps of a sample, exits."""
        points = zip(self.thresholds, self.exits, self.exit_correct, strict=True)
        return [
            {
                "threshold": threshold,
                "top1": 100 * right / sum(exits),
                "mean_timesteps": sum(t * n for t, n in enumerate(exits, start=1)) / sum(exits),
                "exits": exits,
            }
            for threshold, exits, right in points
        ]

    def threshold_within(self, points: float) -> float | None:
        """Return the lowest threshold from which on early exit costs at most ``points`` of top-1.

        The reference is deciding all samples at T. None if the highest threshold costs more.
        """
        right = sum(row[k] for k, row in enumerate(self.confusion))
        samples = sum(self.exits[0])
        highest_first = zip(reversed(self.thresholds), reversed(self.exit_correct), strict=True)
        cheap = takewhile(lambda one: 100 * (right - one[1]) <= points * samples, highest_first)
        return min((threshold for threshold, _ in cheap), default=None)


def first_sure(confidence: Tensor, thresholds: Tensor | float) -> Tensor:
    """Return the first t, from 0, at which a confidence (T, B) reaches each threshold, or T - 1."""
    sure = confidence >= thresholds
    sure[..., -1, :] = True
    return sure.int().argmax(-2)


class DecisionCounts:
    """Collects `Decisions` batch by batch on one process; `total` adds up all processes.

    Args:
        classes: Names of the data's classes.
        num_outputs: K of the network, at least the number of classes.
        timesteps: T.
        device: The device of the logits.
        thresholds: Thresholds of early exit, rising.
    """

    def __init__(
        self,
        classes: list[str],
        num_outputs: int,
        timesteps: int,
        device: torch.device,
        thresholds: Sequence[float] = THRESHOLDS,
    ) -> None:
        unnamed = range(len(classes), num_outputs)
        self.classes = [*classes, *(f"output {k}" for k in unnamed)]
        self._confusion = torch.zeros(num_outputs, num_outputs, dtype=torch.int64, device=device)
        self.thresholds = tuple(thresholds)
        self._exits = torch.zeros(len(thresholds), timesteps, dtype=torch.int64, device=device)
        self._exit_correct = torch.zeros(len(thresholds), dtype=torch.int64, device=device)
        self._thresholds = torch.tensor(self.thresholds, device=device).view(-1, 1, 1)

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
        self._confusion += torch.bincount(pairs, minlength=self._confusion.numel()).view_as(
            self._confusion
        )
        first = first_sure(probabilities, self._thresholds)  # (thresholds, B)
        right = decided.gather(0, first) == labels
        steps = torch.arange(len(decided), device=first.device)
        self._exits += (first[:, None] == steps.view(-1, 1)).sum(-1)
        self._exit_correct += right.sum(-1)

    def total(self, world: World) -> Decisions:
        """Return the decisions of all processes, on every process."""
        tensors = (self._confusion, self._exits, self._exit_correct)
        flat = torch.cat([t.flatten() for t in tensors])
        summed = torch.tensor(world.sum(flat.tolist()), dtype=torch.float64).long()
        parts = summed.split([t.numel() for t in tensors])
        confusion, exits, right = (
            part.view_as(t).tolist() for part, t in zip(parts, tensors, strict=True)
        )
        return Decisions(self.classes, confusion, self.thresholds, exits, right)
