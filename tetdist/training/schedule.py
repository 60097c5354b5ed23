"""Phase, epoch and learning rate as functions of the step, with no state."""

import math
from dataclasses import dataclass
from typing import assert_never

from tetdist.config.schema import PhaseSection


@dataclass(frozen=True)
class Phase:
    """One phase, placed on the run's axis of optimiser steps.

    Attributes:
        number: 0, 1, ...
        section: Its configuration.
        first_step: Its first step; steps are counted over all phases from 0.
        steps_per_epoch: Optimiser steps of one epoch.
    """

    number: int
    section: PhaseSection
    first_step: int
    steps_per_epoch: int

    @property
    def end_step(self) -> int:
        return self.first_step + self.section.epochs * self.steps_per_epoch

    def learning_rate(self, step: int) -> float:
        """Learning rate of the update of ``step``: linear warm-up, then cosine to 0 or constant."""
        done = step - self.first_step
        warmup = self.section.warmup_epochs * self.steps_per_epoch
        peak = self.section.optimizer.lr
        if done < warmup:
            return peak * min(1.0, (done + 1) / warmup)
        match self.section.schedule:
            case "constant":
                return peak
            case "cosine":
                share = (done - warmup) / (self.end_step - self.first_step - warmup)
                return peak * 0.5 * (1 + math.cos(math.pi * share))
            case other:
                assert_never(other)

    def image_size(self, step: int, default: int) -> int:
        """Size of the training images of ``step``: the same over an epoch.

        Args:
            step: One of the phase's.
            default: Where the phase says nothing.
        """
        first = self.section.image_size or default
        last = self.section.final_image_size or first
        epoch, epochs = (step - self.first_step) // self.steps_per_epoch, self.section.epochs
        if first == last or epoch == 0:
            return first
        if epoch == epochs - 1:
            return last
        # Networks divide images by up to 32: sizes are multiples of it.
        between = int(first + (last - first) * epoch / (epochs - 1)) // 32 * 32
        return min(max(between, min(first, last)), max(first, last))


def schedule_phases(sections: tuple[PhaseSection, ...], steps_per_epoch: int) -> list[Phase]:
    """Phases one after another from step 0."""
    phases: list[Phase] = []
    for number, section in enumerate(sections):
        first = phases[-1].end_step if phases else 0
        phases.append(Phase(number, section, first, steps_per_epoch))
    return phases


def phase_at(phases: list[Phase], step: int) -> Phase:
    """The phase that step ``step`` belongs to; the last one for any step after it."""
    return next((phase for phase in phases if step < phase.end_step), phases[-1])
