"""The sections on how training runs: batches, statistics, averages, checkpoints, profile."""

from typing import Annotated

from pydantic import Field

from tetdist.config.fields import Positive, Samples, Section, Steps, Timesteps


class BatchSection(Section):
    global_: Samples = Field(alias="global")
    """Number of samples of one optimiser step, over all processes together."""
    micro: Samples
    """Number of samples of one forward pass on one process, over which batch norm normalises."""
    eval: Samples = 64
    """Number of samples of one evaluation batch on one process."""


class SegmentsSection(Section):
    timesteps: Timesteps
    """Number of timesteps a segment: each block runs and is recomputed segment by segment."""


class BatchNormSection(Section):
    sync: bool = False
    """Normalise over the micro-batches of all processes together (synchronised batch norm). Batch
    statistics then depend on the number of processes; without it they do not."""


class EmaSection(Section):
    """A moving average of the weights, which is evaluated beside them (docs/metrics.md). A run has
    it from its first step or not at all."""

    decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of the moving average of the weights (EMA) at each step, such as 0.9998; null: no
    average. Running statistics are averaged with it. As in timm's ModelEmaV3 the first step is
    taken whole."""
    warmup: bool = False
    """Raise the average's decay as 1 - step^(-2/3) up to ema.decay (timm's EMA warm-up), so that
    early averages span fewer steps."""


class SaveSection(Section):
    every_steps: Positive | None = None
    """Number of optimiser steps between two checkpoints, besides those at each epoch's end; null:
    only at epochs' ends."""
    keep_last: Annotated[int, Field(ge=2)] = 2
    """Number of newest checkpoints to keep, at least 2: a failing disk may ruin the newest."""


class ProfileSection(Section):
    steps: Steps
    """First and last optimiser step to profile, counted from 1: [20, 30], or 20..30. The profile
    ends with the epoch at the latest."""
