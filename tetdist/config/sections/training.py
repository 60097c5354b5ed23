"""The sections on how training runs: batches, statistics, averages, checkpoints."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from tetdist.config.fields import Positive, Samples, Section, Timesteps
from tetdist.errors import WrongValue


class BatchSection(Section):
    global_: Samples = Field(alias="global")
    """Number of samples per optimiser step, of all processes together."""
    micro: Samples
    """Number of samples per forward pass of one process; batch norm normalises over them."""
    eval: Samples = 64
    """Number of samples per evaluation batch of one process."""

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> Self:
        if self.global_ % self.micro:
            multiple = self.global_ // self.micro * self.micro or self.micro
            smaller = range(min(self.global_, self.micro), 0, -1)
            divisor = next(n for n in smaller if self.global_ % n == 0)
            raise WrongValue(
                "global",
                f"is not a multiple of batch.micro, {self.micro}; set batch.micro={divisor} or "
                f"batch.global={multiple}, for instance",
                self.global_,
            )
        return self


class SegmentsSection(Section):
    timesteps: Timesteps
    """Number of timesteps per segment; each block runs and is recomputed one segment at a time."""


class BatchNormSection(Section):
    sync: bool = False
    """Normalise over the micro-batches of all processes together (synchronised batch norm). Batch
    statistics then depend on the number of processes; otherwise they do not."""


class EmaSection(Section):
    """A moving average of the weights, evaluated besides them (docs/metrics.md). A run keeps it
    from its first step on, or not at all."""

    decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay per step of the exponential moving average (EMA) of weights and running statistics,
    such as 0.9998 (timm's model_ema_decay); null: no average. The first step sets the average to
    the weights, as in timm's ModelEmaV3."""
    warmup: bool = False
    """Let the EMA's decay rise as 1 - step^(-2/3) up to ema.decay (timm's EMA warm-up), so that
    early averages span fewer steps."""


class SaveSection(Section):
    every_steps: Positive | None = None
    """Number of optimiser steps between two checkpoints; null: none within an epoch. Each epoch
    also ends with a checkpoint."""
    keep_last: Annotated[int, Field(ge=2, le=10**9)] = 2
    """Number of newest checkpoints to keep, besides the best: at least 2, in case a failing disk
    damages the newest."""
