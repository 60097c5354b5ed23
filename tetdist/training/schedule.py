"""Phase, epoch and learning rate as functions of the step, with no state."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tetdist.config.sections.phase import OptimizerSection, PhaseSection, schedule_epochs


@dataclass(frozen=True)
class Phase:
    """One phase with its place among the run's optimiser steps.

    Attributes:
        first_step: First step, counted over all phases from 0.
        optimizer: The optimiser, which may be that of a phase before.
        schedule, schedule_start: Keys of the learning-rate schedule, with the epochs of all phases
            that it spans, and its first step.
        peak_lr: Learning rate at the end of warm-up, for the global batch.
    """

    number: int
    section: PhaseSection
    first_step: int
    steps_per_epoch: int
    optimizer: OptimizerSection
    schedule: PhaseSection
    schedule_start: int
    peak_lr: float

    @property
    def end_step(self) -> int:
        return self.first_step + self.section.epochs * self.steps_per_epoch

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of the update of ``step``."""
        section, done = self.schedule, step - self.schedule_start
        warmup = section.warmup_epochs * self.steps_per_epoch
        first = 1
        if section.lr_changes == "epochs":
            done, first = done // self.steps_per_epoch * self.steps_per_epoch, 0
        if done < warmup:
            # If the rate changes every step, start one step up, so that the first update is not 0.
            share = min(1.0, (done + first) / warmup)
            if section.warmup_lr == 0:
                return self.peak_lr * share
            return section.warmup_lr + (self.peak_lr - section.warmup_lr) * share
        start = warmup if section.clock_after_warmup else 0.0
        end = (section.epochs - section.cooldown_epochs) * self.steps_per_epoch
        if section.schedule == "constant":
            return self.peak_lr
        part = 0.5 * (1 + math.cos(math.pi * min(1.0, (done - start) / (end - start))))
        return section.min_lr + (self.peak_lr - section.min_lr) * part


def schedule_phases(
    sections: tuple[PhaseSection, ...], steps_per_epoch: int, global_batch: int
) -> list[Phase]:
    """Place the phases one after another, from step 0."""
    phases: list[Phase] = []
    for number, section in enumerate(sections):
        first = phases[-1].end_step if phases else 0
        if isinstance(section.optimizer, OptimizerSection):
            schedule = section.model_copy(update={"epochs": schedule_epochs(sections, number)})
            clock = section.optimizer, schedule, first, section.optimizer.peak_lr(global_batch)
        phases.append(Phase(number, section, first, steps_per_epoch, *clock))
    return phases


def image_timesteps(phases: Sequence[Phase], steps: int, global_batch: int) -> float:
    """Return the training images times T, a mean if drawn, of the first ``steps`` steps."""
    return global_batch * sum(
        (min(phase.end_step, steps) - phase.first_step) * phase.section.mean_timesteps
        for phase in phases
        if steps > phase.first_step
    )


def phase_at(phases: list[Phase], step: int) -> Phase:
    """Return the phase of ``step``; the last phase for any later step."""
    return next((phase for phase in phases if step < phase.end_step), phases[-1])
