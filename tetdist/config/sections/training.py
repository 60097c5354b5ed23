"""The sections on how training runs: batches, statistics, averages, checkpoints, profile."""

from typing import Annotated

from pydantic import Field

from tetdist.config.fields import Positive, Samples, Section, Steps, Timesteps


class BatchSection(Section):
    global_: Samples = Field(alias="global")
    """Samples of one optimiser step, whatever the number of processes."""
    micro: Samples
    """Samples of one forward pass on one process: what batch norm normalises over."""
    eval: Samples = 64
    """Samples of one evaluation batch on one process."""


class SegmentsSection(Section):
    timesteps: Timesteps
    """Run each block over segments of so many timesteps, and recompute segment by segment."""


class BatchNormSection(Section):
    sync: bool = False
    """Normalise over the micro-batches of all processes together, not over each one's own. Batch
    statistics then depend on the number of processes, as they do not otherwise."""


class EmaSection(Section):
    """A moving average of the weights, which is evaluated beside them (docs/metrics.md). A run has
    it from its first step or not at all."""

    decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """The share that the average keeps at each step, such as 0.9998; null: there is none. Running
    statistics are averaged likewise. As in timm's ModelEmaV3 the first step is taken whole."""
    warmup: bool = False
    """Let the share rise to decay as 1 - step^(-2/3) does, timm's way, so that the average of the
    beginning is one of fewer steps."""


class SaveSection(Section):
    every_steps: Positive | None = None
    """Besides each epoch's end; null: only there."""
    keep_last: Annotated[int, Field(ge=2)] = 2
    """Number of newest checkpoints to keep, at least 2: a failing disk may ruin the newest."""


class ProfileSection(Section):
    steps: Steps
    """First and last of the optimiser steps, counted from 1: [20, 30], or 20..30. It ends with the
    epoch at the latest."""
